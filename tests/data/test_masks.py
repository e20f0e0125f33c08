"""Masks through preprocessing: on the grid of their image, 0 and 1, by name, whole or not there, and never mixed up.

G1 to G7 and G12 are the defects of published code that must not come back.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.preprocess import preprocess_case_npy, preprocess_mask
from mfm_nnunet.data.storage import require_whole
from mfm_nnunet.data.volumes import anonymised_of, mask_file
from mfm_nnunet.errors import MFMError
from tests.builders.preprocessing import DATASET, KILLED, contents, make_case, make_plans, run

IDENTIFIER = "mfm_3d_fullres_0"


def write(file: Path, array: np.ndarray, spacing: tuple[float, ...] = (0.8, 0.9, 1.2)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    item = sitk.GetImageFromArray(array)
    item.SetSpacing(spacing)
    sitk.WriteImage(item, str(file))
    return file


def make_mask(shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[9:12, 2:5, 9:12] = 1
    return mask


def masked_cases(folder: Path, count: int = 2) -> list[Case]:
    cases = []
    for i in range(count):
        image = make_case(10 + i, shape=(14, 16, 15))[0][0]
        file, mask = (
            write(folder / f"{name}{i}.nii.gz", array)
            for name, array in (("image", image), ("anonymised", make_mask(image.shape)))
        )
        cases.append(Case(f"case{i}", (file,), anonymisation_mask=mask))
    return cases


def mask_of(case: Case) -> Path:
    assert case.anonymisation_mask is not None
    return case.anonymisation_mask


def without_mask(case: Case) -> Case:
    return dataclasses.replace(case, anonymisation_mask=None)


def stored(out: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Volume and anonymisation mask as written."""
    folder = out / IDENTIFIER
    files = (folder / f"{case}.b2nd", mask_file(folder, case))
    return tuple(blosc2.open(str(file), mode="r")[:] for file in files)  # type: ignore[return-value]


def test_a_mask_is_cropped_with_its_image(tmp_path: Path) -> None:
    (case,) = masked_cases(tmp_path / "raw", 1)
    run([case], tmp_path / "out", make_plans(spacing=[1.2, 0.9, 0.8]))
    anonymised = stored(tmp_path / "out", "case0")[1]
    # Two empty slices at the start of the first axis and at the end of the second are cropped away.
    assert anonymised.dtype == np.uint8
    assert anonymised.sum() == make_mask((14, 16, 15))[2:, :-2].sum() == 27


@pytest.mark.parametrize("name", ["isotropic", "transposed", "thick", "cropped"])
def test_masks_follow_their_image(name: str) -> None:
    """An image that is its own mask: after crop, transposition and resampling they still agree."""
    changes: dict[str, Any] = {
        "isotropic": {},
        "transposed": {"transpose_forward": [2, 0, 1], "spacing": [0.7, 1.0, 1.0]},
        "thick": {"spacing": [1.2, 0.5, 0.5]},
        "cropped": {"spacing": [1.2, 0.9, 0.8]},
    }[name]
    image = np.zeros((1, 22, 30, 26), np.float32)
    image[:, 3:20, 5:28, 4:22] = 1
    image[:, 6:14, 8:20, 9:17] = 100
    mask = image > 50
    manager = PlansManager(make_plans(normalization_schemes=["NoNormalization"], **changes))
    configuration = manager.get_configuration("3d_fullres")
    properties = {"spacing": [1.2, 0.9, 0.8]}
    data, _, properties = preprocess_case_npy(image, properties, None, manager, configuration, DATASET)
    result = preprocess_mask(mask, properties, data.shape[1:], manager, configuration)
    assert result.dtype == bool
    assert result.shape == data.shape
    assert (result == (data > 50)).mean() > 0.97
    assert result.any()
    assert not preprocess_mask(mask & False, properties, data.shape[1:], manager, configuration).any()


def test_masks_never_change_the_image(tmp_path: Path) -> None:
    """G3: with use_mask_for_norm the published code normalises over the anonymisation mask."""
    (case,) = masked_cases(tmp_path / "raw", 1)
    for name, item in (("with", case), ("without", without_mask(case))):
        run([item], tmp_path / name, make_plans(use_mask_for_norm=[True]))
    with_masks, without = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert with_masks[f"{IDENTIFIER}/case0.b2nd"] == without[f"{IDENTIFIER}/case0.b2nd"]
    assert with_masks[f"{IDENTIFIER}/case0.pkl"] == without[f"{IDENTIFIER}/case0.pkl"]


def test_masks_lie_beside_the_volumes_where_nothing_looks_for_volumes(tmp_path: Path) -> None:
    cases = masked_cases(tmp_path / "raw")
    run([cases[0], without_mask(cases[1])], tmp_path)
    folder = tmp_path / IDENTIFIER
    assert sorted(f.name for f in folder.iterdir()) == ["case0.b2nd", "case0.pkl", "case1.b2nd", "case1.pkl"]
    assert infer_dataset_class(str(folder)) is nnUNetDatasetBlosc2
    assert nnUNetDatasetBlosc2.get_identifiers(str(folder)) == ["case0", "case1"]
    assert [f.name for f in (tmp_path / f"{IDENTIFIER}_anonymised").iterdir()] == ["case0.b2nd"]
    # G5: a case without a mask costs nothing, neither a file nor a read.
    assert anonymised_of(str(folder / "case1.b2nd")) is None


@pytest.mark.parametrize("side", [11, 64])
def test_cubes_of_every_size_are_stored(tmp_path: Path, side: int) -> None:
    """G12: the block search of published code raised IndexError for sides of 11 to 32 and of 64."""
    image = np.random.default_rng(side).normal(5, 1, (side,) * 3).astype(np.float32)
    mask = np.ones((side,) * 3, np.uint8)
    files = [write(tmp_path / f"{name}.nii.gz", array, (1, 1, 1)) for name, array in (("i", image), ("m", mask))]
    case = Case("cube", (files[0],), anonymisation_mask=files[1])
    assert run([case], tmp_path / "out").done == ["cube"]
    volume, anonymised = stored(tmp_path / "out", "cube")
    assert volume.shape == anonymised.shape == (1, side, side, side)
    assert anonymised.all()


# --- bad masks ----------------------------------------------------------------------------------------------------


def test_bad_masks_cost_their_case_and_no_other(tmp_path: Path) -> None:
    """G7: a case that failed does not stay behind half-done."""
    cases = masked_cases(tmp_path / "raw", 6)
    write(mask_of(cases[0]), np.ones((14, 16, 14), np.uint8))
    write(mask_of(cases[1]), np.ones((14, 16, 15), np.uint8), (0.8, 0.9, 1.3))
    write(mask_of(cases[2]), -np.ones((14, 16, 15), np.int8))
    mask_of(cases[3]).write_bytes(b"")
    mask_of(cases[4]).unlink()
    report = run(cases, tmp_path / "out")
    assert report.done == ["case5"]
    assert {failure.case: failure.code for failure in report.failures} == {
        "case0": "E_GEOMETRY", "case1": "E_GEOMETRY", "case2": "E_LABEL_VALUE", "case3": "E_EMPTY",
        "case4": "E_NOT_FOUND",
    }  # fmt: skip
    assert "anonymised0.nii.gz" in report.failures[0].reason
    assert {Path(name).name.partition(".")[0] for name in contents(tmp_path / "out")} == {"case5", IDENTIFIER}


def test_what_is_above_zero_is_inside(tmp_path: Path) -> None:
    (case,) = masked_cases(tmp_path / "raw", 1)
    mask = make_mask((14, 16, 15)).astype(np.float32)
    run([case], tmp_path / "one")
    write(mask_of(case), mask * 0.25)
    run([case], tmp_path / "two")
    name = f"{IDENTIFIER}_anonymised/case0.b2nd"
    assert contents(tmp_path / "one")[name] == contents(tmp_path / "two")[name]


# --- whole or not there -------------------------------------------------------------------------------------------


def test_cases_are_done_again_when_their_masks_change(tmp_path: Path) -> None:
    cases, out = masked_cases(tmp_path / "raw"), tmp_path / "out"
    run(cases, out)
    before = contents(out)
    assert run(cases, out).reused == ["case0", "case1"]
    assert contents(out) == before
    os.utime(mask_of(cases[0]), ns=(1, 1))
    assert run(cases, out).done == ["case0"]
    mask_file(out / IDENTIFIER, "case1").unlink()
    assert run(cases, out).done == ["case1"]
    # No mask any more: no file either.
    assert run([without_mask(case) for case in cases], out).done == ["case0", "case1"]
    assert not list((out / f"{IDENTIFIER}_anonymised").iterdir())


def test_killed_runs_leave_no_volume_without_its_masks(tmp_path: Path) -> None:
    cases = masked_cases(tmp_path / "raw")
    run(cases, tmp_path / "unbroken")
    expected = contents(tmp_path / "unbroken")
    # 6 renames per case: 3 staged, 3 put in place (mask, properties, volume).
    moments = [4, 11]
    content = pickle.dumps((cases, make_plans(), DATASET, str(tmp_path), moments))
    subprocess.run([sys.executable, "-c", KILLED], input=content, check=True, timeout=120)
    for moment in moments:
        out = tmp_path / str(moment)
        for case in nnUNetDatasetBlosc2.get_identifiers(str(out / IDENTIFIER)):
            file = mask_file(out / IDENTIFIER, case)
            assert file.read_bytes() == expected[str(file.relative_to(out))], f"killed at {moment}"
        report = run(cases, out)
        assert report.reused == [f"case{i}" for i in range((moment - 1) // 6)]
        assert {k: v for k, v in contents(out).items() if not k.endswith("jsonl")} == {
            k: v for k, v in expected.items() if not k.endswith("jsonl")
        }


def test_masks_of_others_are_left_alone(tmp_path: Path) -> None:
    cases = masked_cases(tmp_path / "raw")
    run(cases, tmp_path / "out")
    before = contents(tmp_path / "out")
    run(cases, tmp_path / "out", make_plans(data_identifier="mfm_other", spacing=[1.0, 1.0, 2.0]))
    run(cases[:1], tmp_path / "out")
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert "mfm_other_anonymised/case0.b2nd" in after


@pytest.mark.parametrize("is_gone", [False, True])
def test_masks_that_were_damaged_later_are_found(tmp_path: Path, is_gone: bool) -> None:
    run(masked_cases(tmp_path / "raw"), tmp_path / "out")
    folder = tmp_path / "out" / IDENTIFIER
    require_whole(folder)
    file = mask_file(folder, "case1")
    if is_gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(MFMError, match=r"E_SHORT_DATA .*anonymised/case1"):
        require_whole(folder)


def test_masks_of_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 30), np.uint8)
    mask[10:20, 5:25] = 255
    files = [tmp_path / "image.png", tmp_path / "mask.png"]
    for file, array in zip(files, (rng.integers(1, 255, (40, 30)).astype(np.uint8), mask)):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
    case = Case("x", (files[0],), anonymisation_mask=files[1])
    plans = make_plans(patch_size=[16, 16], spacing=[1.0, 1.0])
    assert run([case], tmp_path / "out", {**plans, "image_reader_writer": "NaturalImage2DIO"}).done == ["x"]
    assert stored(tmp_path / "out", "x")[1].sum() == 200
