"""The folder of a study: what is written, how it grows, and what is refused beside cells that were trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images.reading import read_image
from mfm_nnunet.jobs.preflight import check_labelled_cases
from mfm_nnunet.study.design import Arm
from mfm_nnunet.study.folder import Study, read_study
from tests.builders import small


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Two arms, one and two labels, one seed; nothing was trained."""
    small.write_raw(tmp_path)
    return small.begin(tmp_path)[0]


@pytest.fixture
def begun(study: Study) -> Study:
    """The same with a first training."""
    study.cell_folder(study.asked[0]).mkdir(parents=True)
    return study


def refused(root: Path, arms: Mapping[str, Arm] | None = None, **changes: Any) -> str:
    """Return the message of a call that is refused and leaves study.json as it is."""
    before = (root / "study" / "study.json").read_bytes()
    with pytest.raises(MFMError) as error:
        small.begin(root, arms, **changes)
    assert error.value.code == "E_CONFIG"
    assert (root / "study" / "study.json").read_bytes() == before
    return error.value.message


def test_the_record_is_read_as_it_was_written(study: Study) -> None:
    assert read_study(study.folder) == study
    content = json.loads((study.folder / "study.json").read_text())
    assert (content["labels"], content["seeds"], content["compared"]) == ([1, 2], 1, ["scratch", "mae"])


def test_folds_are_the_subsets_and_never_the_test_cases(study: Study) -> None:
    splits = json.loads((study.workspace / "nnUNet_preprocessed" / small.NAME / "splits_final.json").read_text())
    assert [len(split["train"]) for split in splits] == [1, 2]
    assert set(splits[0]["train"]) < set(splits[1]["train"])
    assert all(set(split["val"]) <= set(split["train"]) for split in splits)
    pool = json.loads((study.workspace / "nnUNet_raw" / small.NAME / "dataset.json").read_text())["dataset"]
    assert len(pool) == 6
    assert not set(pool) & set(study.question.test)
    assert {file.name.partition("_")[0] for file in study.test_folder.iterdir()} == set(study.question.test)


def test_a_study_may_grow_and_its_folds_keep_their_numbers(begun: Study, tmp_path: Path) -> None:
    grown, cells = small.begin(tmp_path, {"scratch": small.SCRATCH}, labels=("1", "100%"), seeds=2)
    assert [(fold.labels, fold.seed) for fold in grown.folds] == [(1, 0), (2, 0), (6, 0), (1, 1), (6, 1)]
    assert (len(cells), len(grown.asked)) == (4, 7)
    assert small.begin(tmp_path)[0].folds == grown.folds
    assert (set(grown.arms), grown.compared) == ({"scratch", "mae"}, ["scratch", "mae"])
    assert (grown.labels, grown.seeds) == ([1, 2, 6], 2)
    assert read_study(begun.folder) == grown


def test_another_question_is_refused_once_something_was_trained(study: Study, tmp_path: Path) -> None:
    study, _ = small.begin(tmp_path, tolerance_mm=2.0)  # nothing was trained: the folder is begun anew
    study.cell_folder(study.asked[0]).mkdir(parents=True)
    assert "tolerance_mm was 2.0, is 1.0" in refused(tmp_path)
    assert "settings" in refused(tmp_path, tolerance_mm=2.0, settings=("finetune.epochs=5",))
    assert "test was" in refused(tmp_path, tolerance_mm=2.0, test="5")
    assert "plans was own, is mfmPlans hash" in refused(tmp_path, tolerance_mm=2.0, plans="mfmPlans hash")
    mae = small.arm(tmp_path)
    assert "'mae'. Name 'MAE'" in refused(tmp_path, {"MAE": mae}, tolerance_mm=2.0)


def test_another_checkpoint_or_setting_of_an_arm_is_refused(begun: Study, tmp_path: Path) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*arm 'mae' was trained with other settings"):
        small.begin(tmp_path, {"mae": small.arm(tmp_path, settings=("finetune.parts=encoder",))})
    (tmp_path / "mae.pth").write_bytes(b"other weights")
    with pytest.raises(MFMError, match=r"E_CONFIG.*arm 'mae' had another checkpoint"):
        small.begin(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"background": 0, "inner": 2, "outer": 1}},
        {"labels": {"background": 0, "inner": 1, "ignore": 2}},
        {"labels": {"background": 0, "core": [2], "whole": [1, 2]}, "regions_class_order": [1, 2]},
        {"channel_names": {"0": "CT"}},
        {"overwrite_image_reader_writer": "NibabelIO"},
    ],
)
def test_another_meaning_of_the_labels_is_refused_once_something_was_trained(
    study: Study, tmp_path: Path, change: dict[str, Any]
) -> None:
    file = tmp_path / "nnUNet_raw" / small.NAME / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **change}))
    (study.workspace / "old").touch()
    small.begin(tmp_path)  # nothing was trained: the folder is begun anew
    assert not (study.workspace / "old").exists()
    file.write_text(json.dumps({**content, "description": "for people"}))
    study, _ = small.begin(tmp_path)
    study.cell_folder(study.asked[0]).mkdir(parents=True)
    small.begin(tmp_path)
    file.write_text(json.dumps({**content, **change}))
    assert f"{next(iter(change))} in dataset.json" in refused(tmp_path)


# The record of mfm_study as of the last version before this form of the code.
OLD_RECORD = {
    "made_by": "mfm_study 0.1.0",
    "question": {
        "dataset": small.NAME, "configuration": "3d_fullres", "plans": "own",
        "settings": ["finetune.validation_iterations=1"], "tolerance_mm": 1.0, "mirroring": True,
        "test": ["case0", "case3", "case5", "case6"],
        "subjects": {f"case{number}": f"case{number}" for number in range(small.NUM_CASES)}, "data": "",
    },
    "library": small.LIBRARY,
    "labels": [1], "seeds": 1, "compared": ["scratch"],
    "asked": [{"num_labels": 1, "seed": 0, "arm": "scratch"}],
    "arms": {"scratch": {"file": None, "sha256": None, "settings": []}},
    "folds": [{"labels": 1, "seed": 0, "train": ["case1"]}],
    "test_cases": {},
    "dataset_json": {
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "inner": 1, "outer": 2},
        "numTraining": small.NUM_CASES, "file_ending": ".nii.gz",
    },
    "plan_sha256": "digest",
}  # fmt: skip


def test_a_study_begun_with_the_version_before_is_continued(study: Study, tmp_path: Path) -> None:
    question = {
        **OLD_RECORD["question"],  # type: ignore[dict-item]
        "data": study.question.data,
        "test": list(study.question.test),
    }
    (study.folder / "study.json").write_text(json.dumps({**OLD_RECORD, "question": question}))
    (study.folder / "cells").mkdir()
    grown, _ = small.begin(tmp_path)
    assert len(grown.asked) == 4
    assert grown.folds[0].train == ("case1",)
    assert grown.plan_sha256 == "digest"


def write_volumes(root: Path, ending: str, write: Callable[[Path, np.ndarray], None]) -> None:
    """Write the small dataset again, in files that need others beside them."""
    raw = small.write_raw(root)
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({**content, "file_ending": ending}))
    for file in (*raw.glob("imagesTr/*"), *raw.glob("labelsTr/*")):
        file.unlink()
    for number in range(small.NUM_CASES):
        array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
        write(raw / "imagesTr" / f"case{number}_0000{ending}", array)
        write(raw / "labelsTr" / f"case{number}{ending}", array % 3)


def write_itk(file: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.6, 2.0))
    sitk.WriteImage(image, str(file))


def write_tiff(file: Path, array: np.ndarray) -> None:
    tifffile.imwrite(file, array, photometric="minisblack")
    spacing = file.parent / f"{file.stem.removesuffix('_0000')}.json"
    spacing.write_text(json.dumps({"spacing": [2.0, 0.6, 0.5]}))


@pytest.mark.parametrize(
    ("ending", "reader", "write"),
    [(".mhd", "SimpleITKIO", write_itk), (".nhdr", "SimpleITKIO", write_itk), (".tif", "Tiff3DIO", write_tiff)],
)
def test_test_images_keep_what_lies_beside_them(
    tmp_path: Path, ending: str, reader: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    write_volumes(tmp_path, ending, write)
    cases = small.begin(tmp_path)[0].linked_cases()
    for case in cases:
        _, properties = read_image(case.images, reader)
        assert tuple(properties["spacing"]) == (2.0, 0.6, 0.5)


def test_a_test_image_without_its_voxels_is_found_before_the_training(tmp_path: Path) -> None:
    write_volumes(tmp_path, ".mhd", write_itk)
    study, _ = small.begin(tmp_path)
    cases = study.linked_cases()
    check_labelled_cases(cases, "SimpleITKIO", study.dataset_json, "test split")
    cases[0].images[0].with_suffix(".raw").unlink()
    with pytest.raises(MFMError, match="1 of 4 labelled cases"):
        check_labelled_cases(cases, "SimpleITKIO", study.dataset_json, "test split")


def test_test_images_that_need_other_files_of_one_name(tmp_path: Path) -> None:
    write_volumes(tmp_path, ".mhd", write_itk)
    raw = tmp_path / "nnUNet_raw" / small.NAME
    content = json.loads((raw / "dataset.json").read_text())
    files = {}
    for number in range(small.NUM_CASES):
        folder = raw / f"sub-{number:02d}"
        folder.mkdir()
        write_itk(folder / "scan.mhd", np.zeros((3, 4, 5), np.uint8))
        label = str(raw / "labelsTr" / f"case{number}.mhd")
        files[f"case{number}"] = {"images": [str(folder / "scan.mhd")], "label": label}
    (raw / "dataset.json").write_text(json.dumps({**content, "dataset": files}))
    with pytest.raises(MFMError, match=r"E_CONFIG.*scan\.raw"):
        small.begin(tmp_path)
