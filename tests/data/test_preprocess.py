"""Preprocessing gives nnU-Net's arrays in nnU-Net's files, and the loop around it loses nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.data import preprocess, storage
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.preprocess import preprocess_case_npy
from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import reading
from tests.builders.preprocessing import (
    DATASET,
    KILLED,
    contents,
    make_case,
    make_dataset,
    make_plans,
    run,
)


def both(
    image: np.ndarray,
    label: np.ndarray | None,
    plans: dict[str, Any],
    dataset_json: dict[str, Any] = DATASET,
    spacing: tuple[float, ...] = (1.2, 0.9, 0.8),
) -> tuple[tuple, tuple]:
    """Ours and stock's (data, seg, properties) of one case."""
    results = []
    for function in (preprocess_case_npy, DefaultPreprocessor(verbose=False).run_case_npy):
        manager = PlansManager(copy.deepcopy(plans))
        arguments = [image.copy(), {"spacing": list(spacing)}, None if label is None else label.copy()]
        if function is not preprocess_case_npy:
            arguments = [arguments[0], arguments[2], arguments[1]]
        results.append(function(*arguments, manager, manager.get_configuration("3d_fullres"), dataset_json))
    return results[0], results[1]


def assert_equal(ours: tuple, stock: tuple) -> None:
    data, seg, properties = ours
    np.testing.assert_allclose(data, stock[0], rtol=0, atol=1e-5 * max(1, np.abs(stock[0]).max()))
    assert data.dtype == stock[0].dtype == np.float32
    if seg is not None:
        assert seg.dtype == stock[1].dtype
        np.testing.assert_array_equal(seg, stock[1])
    expected = dict(stock[2])
    locations = expected.pop("class_locations", None)
    assert {k: v for k, v in properties.items() if k != "class_locations"} == expected
    if locations is not None:
        assert list(properties["class_locations"]) == list(locations)
        for key, value in locations.items():
            np.testing.assert_array_equal(properties["class_locations"][key], value)


CASES = {
    "isotropic": {},
    "thick slices": {"spacing": [1.0, 0.5, 0.5]},
    "transposed": {"transpose_forward": [2, 0, 1], "spacing": [0.7, 1.0, 1.0]},
    "ct": {"normalization_schemes": ["CTNormalization"]},
    "masked normalisation": {"use_mask_for_norm": [True]},
    "no resampling": {"spacing": [1.2, 0.9, 0.8]},
    "other resampler": {
        "resampling_fn_data": "resample_torch_fornnunet",
        "resampling_fn_data_kwargs": {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False},
    },
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_case_equals_stock(name: str, labelled: bool) -> None:
    spacing = (4.0, 0.7, 0.7) if name == "thick slices" else (1.2, 0.9, 0.8)
    image, label = make_case(0)
    before = image.copy(), label.copy()
    ours, stock = both(image, label if labelled else None, make_plans(**copy.deepcopy(CASES[name])), spacing=spacing)
    assert_equal(ours, stock)
    assert (ours[1] is not None) == labelled
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])


def test_two_channels_with_masks_equal_stock() -> None:
    image, label = make_case(1, channels=2)
    assert_equal(*both(image, label, make_plans(channels=2, use_mask_for_norm=[True, False])))


@pytest.mark.parametrize("value", [130, 40_000])
def test_large_label_values_equal_stock(value: int) -> None:
    image, label = make_case(2)
    label[label == 2] = value
    dataset = {**DATASET, "labels": {"background": 0, "a": 1, "b": value}}
    ours, stock = both(image, label, make_plans(), dataset)
    assert_equal(ours, stock)


def test_regions_and_ignore_label_equal_stock() -> None:
    image, label = make_case(3, labels=4)
    dataset = {
        **DATASET,
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
    }
    assert_equal(*both(image, label, make_plans(), dataset))


def test_2d_equals_stock() -> None:
    image, label = make_case(4, shape=(1, 30, 40), margin=3)
    plans = make_plans(patch_size=[16, 16], spacing=[0.8, 1.1])
    assert_equal(*both(image, label, plans, spacing=(999, 1.0, 1.0)))


def test_slices_across_those_of_a_2d_plan_are_refused_and_not_cut_into_lines() -> None:
    image, label = make_case(4, shape=(30, 1, 40), margin=0)
    with pytest.raises(MFMError, match=r"E_DIM .*30 x 1 x 40 voxels"):
        both(image, label, make_plans(patch_size=[16, 16], spacing=[0.8, 1.1]), spacing=(1.0, 1.0, 1.0))
    along = make_plans(patch_size=[16, 16], spacing=[0.8, 1.1])
    along |= {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}
    assert_equal(*both(image, label, along, spacing=(1.0, 0.5, 1.0)))


def test_image_without_any_zero_and_image_of_zeros_equal_stock() -> None:
    image, label = make_case(5)
    assert_equal(*both(image + 100, label, make_plans(use_mask_for_norm=[True])))
    assert_equal(*both(image * 0, label, make_plans()))


def test_wrong_cases_are_refused() -> None:
    image, label = make_case(6)
    with pytest.raises(MFMError, match="E_CHANNELS"):
        both(image, label, make_plans(channels=2))
    with pytest.raises(MFMError, match="E_SPACING"):
        both(image, label, make_plans(spacing=[90.0, 1.0, 1.0]))


def test_a_foreign_preprocessor_is_refused(tmp_path: Path) -> None:
    plans = make_plans(preprocessor_name="PreprocessorOfSomebody")
    with pytest.raises(MFMError, match=r"E_CONFIG.*PreprocessorOfSomebody"):
        run(make_dataset(tmp_path / "raw", 1), tmp_path / "out", plans)
    assert not (tmp_path / "out").exists()


def test_files_are_what_stock_writes(tmp_path: Path) -> None:
    cases = make_dataset(tmp_path / "raw", 2)
    report = run(cases, tmp_path / "out")
    assert (report.done, report.reused, report.failures) == (["case0", "case1"], [], [])
    ours, stock = tmp_path / "out" / "mfm_3d_fullres_0", tmp_path / "stock"
    stock.mkdir()
    manager = PlansManager(make_plans())
    for case in cases:
        images, label = [str(file) for file in case.images], str(case.label)
        configuration = manager.get_configuration("3d_fullres")
        DefaultPreprocessor(verbose=False).run_case_save(
            str(stock / case.name), images, label, manager, configuration, DATASET
        )
        assert (tmp_path / "out" / "gt_segmentations" / f"{case.name}.nii.gz").read_bytes() == case.label.read_bytes()
    assert sorted(f.name for f in ours.iterdir()) == sorted(f.name for f in stock.iterdir())
    assert infer_dataset_class(str(ours)) is nnUNetDatasetBlosc2
    one, other = (nnUNetDatasetBlosc2(str(folder)) for folder in (ours, stock))
    assert one.identifiers == other.identifiers
    for name in one.identifiers:
        mine, theirs = one.load_case(name), other.load_case(name)
        assert_equal((mine[0][:], mine[1][:], mine[3]), (theirs[0][:], theirs[1][:], theirs[3]))
        for a, b in zip(mine[:2], theirs[:2]):
            assert (a.chunks, a.blocks, a.dtype) == (b.chunks, b.blocks, b.dtype)
            assert a.schunk.cparams == b.schunk.cparams


def test_finished_cases_are_reused_and_changed_ones_done_again(tmp_path: Path) -> None:
    cases, out = make_dataset(tmp_path / "raw", 3), tmp_path / "out"
    run(cases, out)
    before = contents(out)
    assert run(cases, out).reused == ["case0", "case1", "case2"]
    assert contents(out) == before
    os.utime(cases[1].label, ns=(1, 1))
    assert run(cases, out).done == ["case1"]
    (out / "mfm_3d_fullres_0" / "case2_seg.b2nd").unlink()
    assert run(cases, out).done == ["case2"]
    assert run(cases, out, make_plans(spacing=[1.0, 1.0, 2.0])).done == ["case0", "case1", "case2"]
    assert run([dataclasses.replace(case, label=None) for case in cases], out).reused == []
    assert not list(out.glob("mfm_*/*_seg.b2nd"))


@pytest.mark.parametrize(("part", "fails"), [("image", True), ("label", False)])
def test_a_file_that_changes_while_it_is_read(
    part: str, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether what was read looks damaged or not."""
    cases, out = make_dataset(tmp_path / "raw", 2), tmp_path / "out"
    read = reading.read_image

    def changed_meanwhile(files: Sequence[Path], reader: str) -> Any:
        found = read(files, reader)
        if files == cases[1].images:
            os.utime(files[0] if part == "image" else cases[1].label, ns=(1, 1))
            if fails:
                raise MFMError("E_SHORT_DATA", "cut off")
        return found

    monkeypatch.setattr(reading, "read_image", changed_meanwhile)
    report = run(cases, out)
    assert (report.done, [failure.code for failure in report.failures]) == (["case0"], ["E_CHANGED"])
    assert not list(out.rglob("case1*"))


def test_a_bad_case_costs_no_other(tmp_path: Path) -> None:
    cases = make_dataset(tmp_path / "raw", 4)
    cases[1].images[0].write_bytes(b"")
    cases[2].images[0].write_bytes(cases[2].images[0].read_bytes()[:-40])
    missing = Case("gone", (tmp_path / "gone.nii.gz",))
    report = run([*cases, missing], tmp_path / "out")
    assert report.done == ["case0", "case3"]
    codes = {failure.case: failure.code for failure in report.failures}
    assert codes == {"case1": "E_EMPTY", "case2": "E_GZIP_TRUNCATED", "gone": "E_NOT_FOUND"}
    assert not list((tmp_path / "out").glob(".partial_*"))


def test_a_case_that_resampling_would_blow_up_is_refused_and_costs_no_other(tmp_path: Path) -> None:
    cases = make_dataset(tmp_path / "raw", 2, labelled=False)
    item = sitk.ReadImage(str(cases[1].images[0]))
    item.SetSpacing((90.0,) * 3)
    sitk.WriteImage(item, str(cases[1].images[0]))
    report = run(cases, tmp_path / "out")
    assert report.done == ["case0"]
    assert [failure.code for failure in report.failures] == ["E_TOO_LARGE"]
    assert "11 x 12 x 13 voxels of 90 x 90 x 90 mm become 990 x 1080 x 1170" in report.failures[0].reason
    assert cases[1].images[0].name in report.failures[0].reason
    unresampled = make_plans(resampling_fn_data="no_resampling_hack", resampling_fn_data_kwargs={})
    assert run(cases, tmp_path / "original", unresampled).done == ["case0", "case1"]


def test_full_disk_stops_and_keeps_what_is_done(tmp_path: Path) -> None:
    cases, out = make_dataset(tmp_path / "raw", 3), tmp_path / "out"
    run(cases[:1], out)
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = max(len(value) for value in before.values())
    try:
        # Larger files fail with EFBIG, as they would with ENOSPC on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, limits[1]))
        with pytest.raises(MFMError, match="E_DISK_FULL"):
            run(cases, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = contents(out)
    assert {name: after[name] for name in before} == before
    assert not list(out.glob("mfm_*/case1*"))
    report = run(cases, out)
    assert (report.reused, report.done) == (["case0"], ["case1", "case2"])


def test_a_staged_file_that_is_gone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label map belongs to the case: without it, the case would be one without labels."""
    cases, write = make_dataset(tmp_path / "raw", 2), storage.write_array

    def lost(array: np.ndarray, patch_size: tuple[int, ...], file: Path) -> None:
        write(array, patch_size, file)
        if file.name == "_seg.b2nd~case0":
            file.unlink()

    monkeypatch.setattr(storage, "write_array", lost)
    report = run(cases, tmp_path / "out")
    assert [failure.case for failure in report.failures] == ["case0"]
    assert report.done == ["case1"]
    assert not list(tmp_path.glob("out/mfm_*/case0.b2nd"))


def test_cases_of_others_are_left_alone_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = make_dataset(tmp_path / "raw", 2)
    run(cases, tmp_path / "out")
    before = contents(tmp_path / "out")
    run(cases[:1], tmp_path / "out")
    assert "1 cases that are no longer in the dataset, e.g. case1" in caplog.text
    assert contents(tmp_path / "out") == before


def test_a_pool_of_processes_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_dataset(tmp_path / "raw", 3)
    cases[1].images[0].write_bytes(b"")
    run(cases, tmp_path / "one")
    monkeypatch.setattr(preprocess, "POOL_MIN_BYTES", 0)
    report = run(cases, tmp_path / "two", num_processes=2)
    assert (report.done, [failure.code for failure in report.failures]) == (["case0", "case2"], ["E_EMPTY"])
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    manifest = "mfm_3d_fullres_0.manifest.jsonl"
    first, second = (sorted(json_lines(files.pop(manifest)), key=lambda entry: entry["case"]) for files in (one, two))
    assert first == second
    assert one == two


def test_killed_runs_go_on_where_they_were(tmp_path: Path) -> None:
    cases = make_dataset(tmp_path / "raw", 3)
    run(cases, tmp_path / "unbroken")
    expected = contents(tmp_path / "unbroken")
    # Files are put in place by 7 renames per case: 3 staged, the label copy, 3 final ones. Each kind of gap is tried.
    moments = [3, 6, 7, 13]
    content = pickle.dumps((cases, make_plans(), DATASET, str(tmp_path), moments))
    subprocess.run([sys.executable, "-c", KILLED], input=content, check=True, timeout=120)
    for moment in moments:
        out = tmp_path / str(moment)
        folder, manifest = out / "mfm_3d_fullres_0", out / "mfm_3d_fullres_0.manifest.jsonl"
        for case in nnUNetDatasetBlosc2.get_identifiers(str(folder)):
            for ending in (".pkl", "_seg.b2nd", ".b2nd"):
                name = f"mfm_3d_fullres_0/{case}{ending}"
                assert (out / name).read_bytes() == expected[name], f"killed at {moment}: {name} is not whole"
        noted = [entry["case"] for entry in json_lines(manifest.read_bytes())] if manifest.exists() else []
        assert noted == [f"case{i}" for i in range((moment - 1) // 7)]
        report = run(cases, out)
        assert report.reused == noted
        assert report.done == [case.name for case in cases if case.name not in noted]
        result = contents(out)
        name = "mfm_3d_fullres_0.manifest.jsonl"
        assert json_lines(result.pop(name)) == json_lines(expected[name])
        assert result == {key: value for key, value in expected.items() if key != name}


def json_lines(content: bytes) -> list[Any]:
    """The lines of a manifest without the time, which differs from run to run."""
    entries = [json.loads(line) for line in content.split(b"\n") if line]
    return [{key: value for key, value in entry.items() if key != "time"} for entry in entries]


@pytest.mark.parametrize("dataset", ["Dataset004_Hippocampus", "Dataset053_STSMR", "Dataset057_CXRLung"])
def test_real_scans_equal_stock(dataset: str, shared_data: Path) -> None:
    folder = shared_data / dataset
    dataset_json = json.loads((folder / "dataset.json").read_text())
    ending = dataset_json["file_ending"]
    image_file = sorted((folder / "imagesTr").glob(f"*{ending}"))[0]
    label_file = folder / "labelsTr" / image_file.name.replace(f"_0000{ending}", ending)
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    reader = determine_reader_writer_from_dataset_json(dataset_json, str(image_file), verbose=False)()
    image, properties = reader.read_images([str(image_file)])
    label, _ = reader.read_seg(str(label_file))
    spacing = tuple(float(mm) for mm in properties["spacing"])
    target = [1.3 * mm for mm in spacing[-2:]]
    plans = (
        make_plans(patch_size=[64, 64], spacing=target) if image.shape[1] == 1 else make_plans(spacing=[2.0, 1.5, 1.5])
    )
    assert_equal(*both(image, label, plans, dataset_json, spacing))
