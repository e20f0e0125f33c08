"""Dice and normalised surface distance against cases computed by hand, and what happens to absent labels."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.study import evaluation
from mfm_nnunet.study.evaluation import score_case, surface_dice
from mfm_nnunet.study.folder import TestCase
from tests.builders import small

pytest.importorskip("surface_distance", reason="the extra 'study' is not installed")
LABELS = {"whole": (1, 2), "core": (2,)}


def square(shift: int = 0) -> np.ndarray:
    """A square of 10 x 10 pixels in 20 x 20, moved to the right."""
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5 + shift : 15 + shift] = True
    return mask


@pytest.mark.parametrize(
    ("spacing", "tolerance", "expected"),
    [
        # Moved by a pixel, the upper and lower side still lie on each other and the left and right ones are a pixel
        # apart: half of the contour.
        ((1.0, 1.0), 0.5, 0.5),
        ((1.0, 1.0), 1.0, 1.0),
        # Pixels 2 mm wide: 18 pieces of 2 mm along, 18 of 1 mm across, 4 corners of sqrt(5)/2 mm.
        ((1.0, 2.0), 0.9, (36 + math.sqrt(5)) / (54 + 2 * math.sqrt(5))),
        # And of the inner side the first and last piece are 1 mm from the other square's corner side.
        ((1.0, 2.0), 1.0, (38 + math.sqrt(5)) / (54 + 2 * math.sqrt(5))),
        ((1.0, 2.0), 2.0, 1.0),
    ],
)
def test_a_square_moved_by_a_pixel(spacing: tuple[float, float], tolerance: float, expected: float) -> None:
    assert surface_dice(square(), square(1), spacing, tolerance) == pytest.approx(expected)


def test_a_cube_moved_by_a_voxel() -> None:
    """Four of six faces stay where they are, so about two thirds of the surface; all of it within one voxel."""
    cube, moved = np.zeros((2, 20, 20, 20), bool)
    cube[5:15, 5:15, 5:15] = moved[6:16, 5:15, 5:15] = True
    assert surface_dice(cube, moved, (1.0, 1.0, 1.0), 0.9) == pytest.approx(2 / 3, abs=0.01)
    assert surface_dice(cube, moved, (3.0, 1.0, 1.0), 3.0) == 1
    assert surface_dice(cube, cube, (3.0, 1.0, 1.0), 0.0) == 1


def test_absent_labels() -> None:
    empty = np.zeros((20, 20), bool)
    assert math.isnan(surface_dice(empty, empty, (1, 1), 1.0))
    assert surface_dice(empty, square(), (1, 1), 1.0) == 0
    assert surface_dice(square(), empty, (1, 1), 1.0) == 0
    scores = score_case(empty.astype(int), square().astype(int), (1, 1), LABELS, None, 1.0)
    assert scores["whole"] == {"dice": 0, "nsd": 0}
    assert all(math.isnan(value) for value in scores["core"].values())


def test_labels_regions_and_ignored_voxels() -> None:
    reference = square().astype(int)
    reference[8:12, 8:12] = 2
    predicted = square(1).astype(int)
    scores = score_case(reference, predicted, (1, 1), LABELS, None, 0.5)
    assert scores["whole"] == {"dice": 0.9, "nsd": pytest.approx(0.5)}
    assert scores["core"] == {"dice": 0, "nsd": 0}
    reference[:, 5], reference[:, 15] = 3, 3  # where the two differ nothing counts
    scores = score_case(reference, predicted, (1, 1), LABELS, 3, 0.0)
    assert scores["whole"] == {"dice": 1, "nsd": 1}


def test_a_picture_has_contours() -> None:
    """nnU-Net reads a 2D image as one slice of 999 mm."""
    flat = score_case(square()[None].astype(int), square(1)[None].astype(int), (999, 1, 1), {"a": (1,)}, None, 0.5)
    assert flat == {"a": {"dice": 0.9, "nsd": pytest.approx(0.5)}}


def test_a_cell_is_scored(tmp_path: Path) -> None:
    """Scores of every label, and which of them the reference holds; what is not a number is null."""
    folder, (reference, predicted) = tmp_path / "masks", np.zeros((2, 4, 8, 8), np.uint8)
    folder.mkdir()
    reference[1:3, 2:6, 2:6] = 1
    predicted[1:3, 2:6, 2:6] = 1
    predicted[0, 0, 0] = 3
    sitk.WriteImage(sitk.GetImageFromArray(reference), str(tmp_path / "reference.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(predicted), str(folder / "a.nii.gz"))
    labels = {"background": 0, "held": 1, "absent": 2, "wrong": 3}
    study = dataclasses.replace(
        small.record([1], 1, ["scratch"]),
        dataset_json={"labels": labels, "file_ending": ".nii.gz"},
        test_cases={"a": TestCase((), str(tmp_path / "reference.nii.gz"))},
    )
    (folder / "plans.json").write_text(json.dumps({"image_reader_writer": "SimpleITKIO"}))
    evaluation.evaluate_cell(study, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["in_reference"] == {"a": ["held"]}
    values = {"held": {"dice": 1, "nsd": 1}, "absent": {"dice": None, "nsd": None}, "wrong": {"dice": 0, "nsd": 0}}
    assert result["scores"] == {"a": values}
    before = {"scores": {}, "seconds": {"training": 90}}
    (tmp_path / "result.json").write_text(json.dumps(before))
    evaluation.evaluate_cell(study, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == {**result, "seconds": {"training": 90}}


@pytest.mark.parametrize(
    ("reader", "ending", "unit"),
    [
        ("NaturalImage2DIO", ".png", "pixels"),
        ("Tiff3DIO", ".tif", "voxels"),
        ("SimpleITKIO", ".nii.gz", "mm"),
    ],
)
def test_the_unit_of_the_tolerance(reader: str, ending: str, unit: str, tmp_path: Path) -> None:
    """Where files tell no spacing it counts as 1, and is no millimetre."""
    file = tmp_path / f"case{ending}"
    file.touch()
    assert evaluation.length_unit(reader, [file]) == unit
    (tmp_path / "case.json").write_text('{"spacing": [1, 1, 1]}')
    assert evaluation.length_unit(reader, [file]) == ("mm" if reader == "Tiff3DIO" else unit)
