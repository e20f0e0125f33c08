"""The example pictures: equal values look equal in all volumes of a kind, and tables are shown once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mfm_nnunet.reports import progress


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
    colours = progress._colours({name: volume[0] for name, volume in volumes().items()})
    assert colours["restored"] == colours["image"]
    assert colours["image"]["cmap"] == "gray"
    assert colours["image"]["vmax"] < 4, "the scale is the image's, not that of what was restored"
    assert colours["prediction"] == colours["label"]
    assert (colours["label"]["vmin"], colours["label"]["vmax"]) == (0, 4)
    assert colours["predicted"] == colours["overlaps"]
    assert colours["overlaps"]["vmin"] == -1


def test_tables_are_shown_once() -> None:
    assert [plane.shape for plane in progress._middle_slices(np.zeros((1, 4, 8)), (0, 1, 2))] == [(4, 8)]
    planes = progress._middle_slices(np.zeros((6, 8, 10)), (0, 1, 2))
    assert [plane.shape for plane in planes] == [(8, 10), (6, 10), (6, 8)]


@pytest.mark.parametrize("slice_axes", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("num_axes", [3, 2])
def test_a_row_per_axis(num_axes: int, slice_axes: tuple[int, ...], tmp_path: Path) -> None:
    from matplotlib.image import imread

    shown = {name: volume if num_axes == 3 else volume[:, 0] for name, volume in volumes().items()}
    progress.plot_examples(shown, tmp_path / "examples.png", "title", slice_axes)
    height = imread(tmp_path / "examples.png").shape[0]
    assert height == round(110 * (2.6 * (len(slice_axes) if num_axes == 3 else 1) + 0.5))
