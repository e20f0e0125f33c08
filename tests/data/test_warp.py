"""Resampling of images against scipy, and of label maps against batchgeneratorsv2, on random maps of coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

from mfm_nnunet.data.crops import apply_spatial, draw_spatial
from mfm_nnunet.data.warp import Order, find_box, warp_image, warp_labels

SIZES = [(40, 33, 50), (6, 40, 40), (70, 90), (300, 30), (1, 20, 24)]


def draw_map(seed: int, size: tuple[int, ...]) -> np.ndarray:
    """A matrix with rotation or scale, and flips."""
    rng = np.random.default_rng(seed)
    while (matrix := draw_spatial(rng, size, "spatial").matrix) is None:
        pass
    return matrix * np.where(rng.random(len(size)) < 0.5, -1, 1)


def draw_labels(seed: int, shape: tuple[int, ...], number: int) -> np.ndarray:
    """Label maps of blobs, which meet at faces, edges and corners."""
    noise = np.random.default_rng(seed).normal(size=(number, *shape))
    return scipy.ndimage.gaussian_filter(noise, [0, *(1.5 for _ in shape)]).argmax(0).astype(np.int16)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_images_lie_where_scipy_puts_them(size: tuple[int, ...], order: Order) -> None:
    """The image is a ramp along each axis, so a difference of values is one of places, in voxels."""
    for seed in range(3):
        matrix = draw_map(seed, size)
        first, box = find_box(matrix, np.full(len(size), 0.3), size)
        shape, offset = box + 16, 8.3 - first
        ramps = np.indices(shape).astype(np.float32)
        got = warp_image(ramps, matrix, offset, size, order)
        for ramp, moved in zip(ramps, got):
            expected = scipy.ndimage.affine_transform(ramp.astype(float), matrix, offset, size, order=order)
            assert np.abs(moved - expected).max() < 0.01


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_images_are_scipys(size: tuple[int, ...], order: Order) -> None:
    for seed in range(3):
        matrix = draw_map(seed, size)
        first, box = find_box(matrix, np.zeros(len(size)), size)
        shape, offset = box + 16, 8.0 - first
        image = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
        got = warp_image(image, matrix, offset, size, order)
        for channel, moved in zip(image, got):
            expected = scipy.ndimage.affine_transform(channel.astype(float), matrix, offset, size, order=order)
            assert np.abs(moved - expected).max() < 0.01


def test_linear_interpolation_needs_no_more_than_its_box() -> None:
    """A constant image stays constant; where the box is too small, its edge would mix with zeros or other slices."""
    for seed in range(200):
        size = SIZES[seed % len(SIZES)]
        matrix, rng = draw_map(seed, size), np.random.default_rng(seed)
        offset = rng.normal(size=len(size)).round(rng.integers(3))
        first, box = find_box(matrix, offset, size)
        ramp = np.arange(box[0], dtype=np.float32).reshape(1, -1, *(1 for _ in size[1:])) + np.zeros(box, np.float32)
        got = warp_image(ramp, matrix, offset - first, size)[0]
        points = np.tensordot(matrix[0], np.indices(size), 1) + offset[0] - first[0]
        assert np.abs(got - points).max() < 0.01


@pytest.mark.parametrize("number", [2, 4, 40])
@pytest.mark.parametrize("size", [(24, 20, 28), (40, 60)])
def test_labels_are_those_of_batchgeneratorsv2(size: tuple[int, ...], number: int) -> None:
    """With the same matrix; the crop is too small in places, outside of which lies -1."""
    num_mixed = 0
    for seed in range(6):
        matrix = draw_map(seed, size)
        shape = tuple(int(length * (1.2 + 0.3 * (seed % 2))) for length in size)
        labels = draw_labels(seed, (2, *shape), number)
        stock = SpatialTransform(size, 0, False, border_mode_seg="constant", padding_value_seg=-1)
        grid = np.moveaxis(np.indices(size) - (np.array(size).reshape(-1, *(1 for _ in size)) - 1) / 2, 0, -1)
        grid = (grid @ matrix.T / (np.array(shape) / 2))[..., ::-1]
        expected = stock._apply_to_segmentation(
            torch.from_numpy(labels), grid=torch.from_numpy(grid.astype(np.float32).copy())
        ).numpy()
        offset = (np.array(shape) - 1) / 2 - matrix @ (np.array(size) - 1) / 2
        margin = 40
        padded = np.pad(labels, [(0, 0), *((margin, margin) for _ in size)], constant_values=-1)
        got = warp_labels(padded, matrix, offset + margin, size)
        assert got.dtype == np.int16
        assert (got != expected).mean() < 1e-4
        num_mixed += len(np.unique(got))
    assert num_mixed > 6 * min(number, 3)


def test_ties_go_to_the_nearest_voxel_or_else_to_the_lower_label() -> None:
    half, three = np.array([[[5, 2]] * 2], np.int16), np.array([[[7, 3], [9, 3]]], np.int16)
    identity = np.eye(2)
    assert warp_labels(half, identity, np.array([0.0, 0.5001]), (1, 1)).item() == 2
    assert warp_labels(half, identity, np.array([0.0, 0.4999]), (1, 1)).item() == 5
    assert warp_labels(half, identity, np.array([0.3, 0.5]), (1, 1)).item() == 5, "both have half the weight"
    # 3 has half of the weight, 7 and 9 a quarter each.
    assert warp_labels(three, identity, np.array([0.4, 0.4]), (1, 1)).item() == 3 + 4 * (0.36 > 0.4)


def test_flips_are_part_of_the_map() -> None:
    """Flipping the patch gives the same as flipping a transformed patch."""
    rng, size = np.random.default_rng(0), (12, 16, 20)
    for _ in range(20):
        parameters = draw_spatial(rng, size, "spatial")
        image = rng.normal(size=(1, *parameters.read_size(size))).astype(np.float32)
        plain = apply_spatial(image, type(parameters)(parameters.matrix, (False,) * 3), size)
        axes = tuple(np.flatnonzero(parameters.flips) + 1)
        assert np.abs(apply_spatial(image, parameters, size) - np.flip(plain, axes)).max() < 0.01
