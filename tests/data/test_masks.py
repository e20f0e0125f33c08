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
from mfm_nnunet.data.volumes import MAX_POINTS, anatomy_of, anatomy_points, anonymised_of, mask_file
from mfm_nnunet.errors import MFMError
from tests.data.test_preprocess import DATASET, KILLED, contents, make_case, make_plans, run

IDENTIFIER = "mfm_3d_fullres_0"


def write(file: Path, array: np.ndarray, spacing: tuple[float, ...] = (0.8, 0.9, 1.2)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    item = sitk.GetImageFromArray(array)
    item.SetSpacing(spacing)
    sitk.WriteImage(item, str(file))
    return file


def make_masks(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Anatomy (a large block) and anonymised (a small one), which do not touch."""
    anatomy, anonymised = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    anatomy[2:9, 4:12, 3:10] = 1
    anonymised[9:12, 2:5, 9:12] = 1
    return anatomy, anonymised


def masked_cases(folder: Path, count: int = 2) -> list[Case]:
    cases = []
    for i in range(count):
        image = make_case(10 + i, shape=(14, 16, 15))[0][0]
        anatomy, anonymised = make_masks(image.shape)
        files = [
            write(folder / f"{name}{i}.nii.gz", array)
            for name, array in (("image", image), ("anatomy", anatomy), ("anonymised", anonymised))
        ]
        cases.append(Case(f"case{i}", (files[0],), None, anatomy_mask=files[1], anonymisation_mask=files[2]))
    return cases


def without_masks(case: Case) -> Case:
    return dataclasses.replace(case, anatomy_mask=None, anonymisation_mask=None)


def stored(out: Path, case: str) -> tuple[np.ndarray, np.ndarray]:
    """Volume and anonymisation mask as written."""
    folder = out / IDENTIFIER
    files = (folder / f"{case}.b2nd", mask_file(folder, "anonymised", case))
    return tuple(blosc2.open(str(file), mode="r")[:] for file in files)  # type: ignore[return-value]


def test_both_masks_are_where_their_names_say(tmp_path: Path) -> None:
    """G1: 125 anonymised and 10,976 anatomy voxels went in, 10,976 and 125 came out."""
    (case,) = masked_cases(tmp_path / "raw", 1)
    run([case], tmp_path / "out", make_plans(spacing=[1.2, 0.9, 0.8]))
    anonymised = stored(tmp_path / "out", "case0")[1]
    points = anatomy_of(str(tmp_path / "out" / IDENTIFIER / "case0.b2nd"))
    anatomy, expected = make_masks((14, 16, 15))
    # Two empty slices at the start of the first axis and at the end of the second are cropped away.
    assert anonymised.dtype == np.uint8
    assert anonymised.sum() == expected[2:, :-2].sum() == 27
    assert len(points) == anatomy[2:, :-2].sum() == 392
    assert points.dtype == np.int32
    assert points.min(axis=0).tolist() == [0, 4, 3]
    assert points.max(axis=0).tolist() == [6, 11, 9]


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


def test_outside_and_holes_of_the_image_are_zero_in_a_mask(tmp_path: Path) -> None:
    """G2: masks held -1 outside the non-zero region, which the loader made 255."""
    (case,) = masked_cases(tmp_path / "raw", 1)
    run([case], tmp_path / "out", make_plans(use_mask_for_norm=[True]))
    volume, anonymised = stored(tmp_path / "out", "case0")
    assert set(np.unique(anonymised)) == {0, 1}
    assert anonymised.shape == volume.shape


@pytest.mark.parametrize("use_mask", [False, True])
def test_masks_never_change_the_image(tmp_path: Path, use_mask: bool) -> None:
    """G3: with use_mask_for_norm the published code normalises over the anonymisation mask."""
    (case,) = masked_cases(tmp_path / "raw", 1)
    for name, item in (("with", case), ("without", without_masks(case))):
        run([item], tmp_path / name, make_plans(use_mask_for_norm=[use_mask]))
    with_masks, without = contents(tmp_path / "with"), contents(tmp_path / "without")
    assert with_masks[f"{IDENTIFIER}/case0.b2nd"] == without[f"{IDENTIFIER}/case0.b2nd"]
    assert with_masks[f"{IDENTIFIER}/case0.pkl"] == without[f"{IDENTIFIER}/case0.pkl"]


def test_masks_lie_beside_the_volumes_where_nothing_looks_for_volumes(tmp_path: Path) -> None:
    cases = masked_cases(tmp_path / "raw")
    run([cases[0], without_masks(cases[1])], tmp_path)
    folder = tmp_path / IDENTIFIER
    assert sorted(f.name for f in folder.iterdir()) == ["case0.b2nd", "case0.pkl", "case1.b2nd", "case1.pkl"]
    assert infer_dataset_class(str(folder)) is nnUNetDatasetBlosc2
    assert nnUNetDatasetBlosc2.get_identifiers(str(folder)) == ["case0", "case1"]
    assert [f.name for f in (tmp_path / f"{IDENTIFIER}_anonymised").iterdir()] == ["case0.b2nd"]
    assert [f.name for f in (tmp_path / f"{IDENTIFIER}_anatomy").iterdir()] == ["case0.npy"]
    # G5: a case without a mask costs nothing, neither a file nor a read.
    assert anonymised_of(str(folder / "case1.b2nd")) is None
    assert len(anatomy_of(str(folder / "case1.b2nd"))) == 0


def test_points_of_a_large_mask_are_few_spread_and_the_same_every_time() -> None:
    """G6: the draw had no seed."""
    mask = np.zeros((1, 40, 50, 30), bool)
    mask[:, 5:35] = True
    points = anatomy_points(mask)
    assert points.shape == (MAX_POINTS, 3)
    assert len(np.unique(points, axis=0)) == MAX_POINTS
    assert mask[0][tuple(points.T)].all()
    np.testing.assert_allclose(points.mean(axis=0), [19.5, 24.5, 14.5], atol=0.6)
    assert np.array_equal(points, anatomy_points(mask))
    assert anatomy_points(mask & False).shape == (0, 3)


@pytest.mark.parametrize("side", [*range(11, 33, 3), 32, 64])
def test_cubes_of_every_size_are_stored(tmp_path: Path, side: int) -> None:
    """G12: the block search of published code raised IndexError for sides of 11 to 32 and of 64."""
    image = np.random.default_rng(side).normal(5, 1, (side,) * 3).astype(np.float32)
    mask = np.ones((side,) * 3, np.uint8)
    files = [write(tmp_path / f"{name}.nii.gz", array, (1, 1, 1)) for name, array in (("i", image), ("m", mask))]
    case = Case("cube", (files[0],), None, anatomy_mask=files[1], anonymisation_mask=files[1])
    assert run([case], tmp_path / "out").done == ["cube"]
    volume, anonymised = stored(tmp_path / "out", "cube")
    assert volume.shape == anonymised.shape == (1, side, side, side)
    assert anonymised.all()


# --- bad masks ----------------------------------------------------------------------------------------------------


def test_bad_masks_cost_their_case_and_no_other(tmp_path: Path) -> None:
    """G7: a case that failed does not stay behind half-done."""
    cases = masked_cases(tmp_path / "raw", 6)
    write(cases[0].masks["anatomy"], np.ones((14, 16, 14), np.uint8))
    write(cases[1].masks["anonymised"], np.ones((14, 16, 15), np.uint8), (0.8, 0.9, 1.3))
    write(cases[2].masks["anonymised"], -np.ones((14, 16, 15), np.int8))
    cases[3].masks["anatomy"].write_bytes(b"")
    cases[4].masks["anatomy"].unlink()
    report = run(cases, tmp_path / "out")
    assert report.done == ["case5"]
    assert {failure.case: failure.code for failure in report.failures} == {
        "case0": "E_GEOMETRY", "case1": "E_GEOMETRY", "case2": "E_LABEL_VALUE", "case3": "E_EMPTY",
        "case4": "E_NOT_FOUND",
    }  # fmt: skip
    assert "anatomy0.nii.gz" in report.failures[0].reason
    assert {Path(name).name.partition(".")[0] for name in contents(tmp_path / "out")} == {"case5", IDENTIFIER}


def test_what_is_above_zero_is_inside(tmp_path: Path) -> None:
    (case,) = masked_cases(tmp_path / "raw", 1)
    mask = make_masks((14, 16, 15))[1].astype(np.float32)
    run([case], tmp_path / "one")
    write(case.masks["anonymised"], mask * 0.25)
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
    os.utime(cases[0].masks["anatomy"], ns=(1, 1))
    assert run(cases, out).done == ["case0"]
    mask_file(out / IDENTIFIER, "anonymised", "case1").unlink()
    assert run(cases, out).done == ["case1"]
    # The same files with their names exchanged are other masks.
    swapped = dataclasses.replace(
        cases[0], anatomy_mask=cases[0].anonymisation_mask, anonymisation_mask=cases[0].anatomy_mask
    )
    assert run([swapped], out).done == ["case0"]
    # No mask any more: no file either.
    assert run([without_masks(case) for case in cases], out).done == ["case0", "case1"]
    assert not [f for kind in ("anatomy", "anonymised") for f in (out / f"{IDENTIFIER}_{kind}").iterdir()]


def test_killed_runs_leave_no_volume_without_its_masks(tmp_path: Path) -> None:
    cases = masked_cases(tmp_path / "raw")
    run(cases, tmp_path / "unbroken")
    expected = contents(tmp_path / "unbroken")
    # 8 renames per case: 4 staged, 4 put in place (two masks, properties, volume).
    moments = [6, 7, 14]
    content = pickle.dumps((cases, make_plans(), DATASET, str(tmp_path), moments))
    subprocess.run([sys.executable, "-c", KILLED], input=content, check=True, timeout=120)
    for moment in moments:
        out = tmp_path / str(moment)
        for case in nnUNetDatasetBlosc2.get_identifiers(str(out / IDENTIFIER)):
            for kind in ("anatomy", "anonymised"):
                file = mask_file(out / IDENTIFIER, kind, case)
                assert file.read_bytes() == expected[str(file.relative_to(out))], f"killed at {moment}"
        report = run(cases, out)
        assert report.reused == [f"case{i}" for i in range((moment - 1) // 8)]
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


@pytest.mark.parametrize("kind", ["anatomy", "anonymised"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_masks_that_were_damaged_later_are_found(tmp_path: Path, kind: str, is_gone: bool) -> None:
    run(masked_cases(tmp_path / "raw"), tmp_path / "out")
    folder = tmp_path / "out" / IDENTIFIER
    require_whole(folder)
    file = mask_file(folder, kind, "case1")
    if is_gone:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(MFMError, match=f"{kind}/case1") as error:
        require_whole(folder)
    assert error.value.code == "E_SHORT_DATA"


def test_masks_of_an_image_with_several_channels(tmp_path: Path) -> None:
    (case,) = masked_cases(tmp_path / "raw", 1)
    both = dataclasses.replace(case, images=(case.images[0], case.images[0]))
    assert run([both], tmp_path / "out", make_plans(channels=2)).done == ["case0"]
    volume, anonymised = stored(tmp_path / "out", "case0")
    assert volume.shape == (2, *anonymised.shape[1:])
    assert anonymised.any()


def test_masks_of_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 30), np.uint8)
    mask[10:20, 5:25] = 255
    files = [tmp_path / "image.png", tmp_path / "mask.png"]
    for file, array in zip(files, (rng.integers(1, 255, (40, 30)).astype(np.uint8), mask)):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
    case = Case("x", (files[0],), None, anatomy_mask=files[1], anonymisation_mask=files[1])
    plans = make_plans(patch_size=[16, 16], spacing=[1.0, 1.0])
    assert run([case], tmp_path / "out", {**plans, "image_reader_writer": "NaturalImage2DIO"}).done == ["x"]
    assert (
        stored(tmp_path / "out", "x")[1].sum() == len(anatomy_of(str(tmp_path / "out" / IDENTIFIER / "x.b2nd"))) == 200
    )


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.array([{"a": 1}], dtype=object), "E_DATA_UNSAFE"),
        (np.zeros((2, 2), np.int32), "E_SHORT_DATA"),
        (np.zeros(3, np.int32), "E_SHORT_DATA"),
        (np.zeros((2, 3), np.float32), "E_SHORT_DATA"),
    ],
    ids=["objects", "two columns", "one axis", "floats"],
)
def test_points_of_another_kind_are_refused(array: np.ndarray, code: str, tmp_path: Path) -> None:
    """An array of objects is a pickle, which is never loaded."""
    file = mask_file(tmp_path / "data", "anatomy", "a")
    file.parent.mkdir()
    np.save(file, array, allow_pickle=True)
    with pytest.raises(MFMError) as caught:
        anatomy_of(str(tmp_path / "data" / "a.b2nd"))
    assert caught.value.code == code
    assert str(file) in caught.value.message
