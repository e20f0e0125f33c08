"""The example pictures: equal values look equal in all volumes of a kind, and tables are shown once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mfm_nnunet.reports import examples


def volumes() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, 6, 8, 10)).astype(np.float32)
    label = np.zeros((1, 6, 8, 10), np.float32)
    label[..., 3:] = 4
    return {
        "image": image,
        "restored": 3 * image,
        "label": label,
        "prediction": np.minimum(label, 1),
        "overlaps": rng.random((1, 1, 4, 8)).astype(np.float32),
        "predicted": -np.ones((1, 1, 4, 8), np.float32),
    }


def test_volumes_of_a_kind_share_their_scale() -> None:
    colours = examples._colours({name: volume[0] for name, volume in volumes().items()})
    assert colours["restored"] == colours["image"]
    assert colours["image"]["cmap"] == "gray"
    assert colours["image"]["vmax"] < 4, "the scale is the image's, not that of what was restored"
    assert colours["prediction"] == colours["label"]
    assert (colours["label"]["vmin"], colours["label"]["vmax"]) == (0, 4)
    assert colours["predicted"] == colours["overlaps"]
    assert colours["overlaps"]["vmin"] == -1


def test_tables_are_shown_once() -> None:
    def shapes(volume: np.ndarray, frame: examples.Frame | None = None) -> list[tuple[int, ...]]:
        rows = examples._choose_rows(volume, (0, 1, 2), frame)
        return [plane.shape for plane in examples._cut_rows(volume, rows, frame)]

    assert shapes(np.zeros((1, 4, 8))) == [(4, 8)]
    assert shapes(np.zeros((6, 8, 10))) == [(8, 10), (6, 10), (6, 8)]
    assert shapes(np.zeros((6, 8, 10)), examples.Frame("RAS", (1, 2, 3))) == [(8, 6), (10, 6), (10, 8)]


def test_planes_of_the_body_have_their_orientation_and_proportions() -> None:
    """A crop with the axes (right, anterior, superior): superior is up, the patient's left is on the right."""
    crop = np.random.default_rng(0).random((4, 6, 8))
    frame = examples.Frame("RAS", (3, 2, 1))
    rows = examples._choose_rows(crop, (0, 1, 2), frame)
    axial, coronal, sagittal = examples._cut_rows(crop, rows, frame)
    assert [plane.name.partition(",")[0] for plane, _ in rows] == ["axial", "coronal", "sagittal"]
    assert [aspect for _, aspect in rows] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    np.testing.assert_array_equal(axial, crop[::-1, ::-1, rows[0][0].index].T)
    y = crop.shape[1] - 1 - rows[1][0].index
    np.testing.assert_array_equal(coronal, crop[::-1, y, ::-1].T)
    x = crop.shape[0] - 1 - rows[2][0].index
    np.testing.assert_array_equal(sagittal, crop[x, ::-1, ::-1].T)


def test_a_slice_of_a_scan_keeps_its_plane(tmp_path: Path) -> None:
    """A 2D configuration cuts along the plan's first axis, here from left to right."""
    crop, frame = np.random.default_rng(0).random((6, 8)), examples.Frame("RAS", (1, 2, 3))
    rows = examples._choose_rows(crop, (0, 1, 2), frame)
    assert [(plane.axis, aspect) for plane, aspect in rows] == [(2, 1.5)]
    np.testing.assert_array_equal(examples._cut_rows(crop, rows, frame)[0], crop[::-1, ::-1].T)


def test_the_slice_with_most_contrast_is_shown_and_it_is_the_same_for_all() -> None:
    crop = np.zeros((16, 16, 16))
    crop[5] = np.random.default_rng(0).random((16, 16))
    (plane, _), *_ = examples._choose_rows(crop, (0,), None)
    assert plane.index == 5


@pytest.mark.parametrize("slice_axes", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("num_axes", [3, 2])
def test_a_row_per_axis(num_axes: int, slice_axes: tuple[int, ...], tmp_path: Path) -> None:
    from matplotlib.image import imread

    shown = {name: volume if num_axes == 3 else volume[:, 0] for name, volume in volumes().items()}
    examples.plot_examples(shown, tmp_path / "examples.png", "title", slice_axes)
    height = imread(tmp_path / "examples.png").shape[0]
    assert height == round(110 * (2.6 * (len(slice_axes) if num_axes == 3 else 1) + 0.5))
