"""What a classifier sees of images smaller and larger than the patch."""

from __future__ import annotations

import numpy as np
import pytest

from mfm_nnunet.data.views import choose_places, list_places, read_views


def test_a_small_image_is_padded_and_a_large_one_keeps_its_shape() -> None:
    small = np.ones((1, 4, 6, 5), np.float32)
    view = read_views(small, list_places(small.shape[1:], (8, 8, 8), "whole"), (8, 8, 8))
    assert view.shape == (1, 1, 8, 8, 8)
    assert view.sum() == small.sum()
    assert view[0, 0, 2:6, 1:7, 2:7].min() == 1
    large = np.ones((1, 16, 32, 8), np.float32)
    view = read_views(large, list_places(large.shape[1:], (8, 8, 8), "whole"), (8, 8, 8))[0, 0]
    assert [int(view.amax(axes).sum()) for axes in ((1, 2), (0, 2), (0, 1))] == [4, 8, 2]


@pytest.mark.parametrize("shape", [(5, 6, 7), (20, 30, 8)])
def test_tiles_cover_the_image(shape: tuple[int, ...]) -> None:
    image = np.ones((2, *shape), np.float32)
    places = list_places(shape, (8, 8, 8), "tiles")
    views = read_views(image, places, (8, 8, 8))
    assert views.shape[1:] == (2, 8, 8, 8)
    seen = np.zeros(shape)
    for place in places:
        seen[place] = 1
    assert seen.all()


def test_a_flat_patch_sees_slices() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1) * np.ones((1, 6, 8, 8), np.float32)
    places = list_places(image.shape[1:], (8, 8), "whole")
    views = read_views(image, places, (8, 8))
    assert views.shape == (6, 1, 8, 8)
    assert views[:, 0, 0, 0].tolist() == list(range(6))
    chosen = choose_places(places, 3, np.random.default_rng(0))
    assert [place[0] // 2 for place in chosen] == [0, 1, 2]
    assert len(choose_places(places[:1], 4, np.random.default_rng(0))) == 4
