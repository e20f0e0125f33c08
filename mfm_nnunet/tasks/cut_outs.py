"""Rotations by 90 degrees, and boxes that are cut out of a patch or mixed in (as in arXiv 2111.14791). NumPy.

Legend: C channels, D H W voxels; in 2D there is no D. A plane is a pair of image axes, empty for no rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

TURNS = 4
"""Rotations to choose from: 0, 90, 180 and 270 degrees."""


def rotation_plane(patch_size: Sequence[int]) -> tuple[int, ...]:
    """The last two axes if they are equally long (axes 1 and 2 in 3D, as published), else the last pair that is."""
    last = len(patch_size) - 1
    pairs = [(first, second) for second in range(last, 0, -1) for first in range(second - 1, -1, -1)]
    return next((pair for pair in pairs if patch_size[pair[0]] == patch_size[pair[1]]), ())


def rotated(x_CDHW: np.ndarray, turns: int, plane: Sequence[int]) -> np.ndarray:
    """``x_CDHW`` turned by ``turns`` times 90 degrees in the plane of two image axes; as it is without a plane."""
    if not plane:
        return x_CDHW
    return np.rot90(x_CDHW, turns, axes=(plane[0] + 1, plane[1] + 1))


def cut_out(
    view_CDHW: np.ndarray, budget: float, box_range: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Boxes of a view filled with Gaussian noise stretched to the range of each of its channels; in place."""
    axes = tuple(range(1, view_CDHW.ndim))
    lowest, highest = view_CDHW.min(axes, keepdims=True), view_CDHW.max(axes, keepdims=True)
    for box in draw_share(view_CDHW.shape[1:], budget, box_range, rng):
        noise = rng.standard_normal(view_CDHW[(slice(None), *box)].shape, np.float32)
        low, extent = noise.min(axes, keepdims=True), np.ptp(noise, axes, keepdims=True)
        # A box of one voxel has no range; it gets the middle of the image's.
        share = np.where(extent > 0, (noise - low) / np.maximum(extent, 1e-6), 0.5)
        view_CDHW[(slice(None), *box)] = lowest + share * (highest - lowest)
    return view_CDHW


def mix_in(
    view_CDHW: np.ndarray,
    other_CDHW: np.ndarray,
    budget: float,
    box_range: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Boxes of a view replaced by the same region of another image; in place."""
    for box in draw_share(view_CDHW.shape[1:], budget, box_range, rng):
        view_CDHW[(slice(None), *box)] = other_CDHW[(slice(None), *box)]
    return view_CDHW


def draw_share(
    patch_size: Sequence[int], budget: float, box_range: tuple[float, float], rng: np.random.Generator
) -> Iterator[tuple[slice, ...]]:
    """Boxes, cut at the border, until their volumes sum up to a share of the patch drawn from 0 to ``budget``.

    As in the original the last one may go beyond it, and where boxes overlap voxels are counted twice.
    """
    left = rng.uniform(0, budget) * math.prod(patch_size)
    limits = [[max(1, int(side * size)) for side in box_range] for size in patch_size]
    while left > 0:
        starts = [int(rng.integers(size - low, endpoint=True)) for size, (low, _) in zip(patch_size, limits)]
        sides = [int(rng.integers(low, high, endpoint=True)) for low, high in limits]
        box = tuple(slice(start, min(start + side, size)) for start, side, size in zip(starts, sides, patch_size))
        left -= math.prod(part.stop - part.start for part in box)
        yield box


def is_square(plane: Sequence[int], patch_size: Sequence[int]) -> bool:
    """Whether ``plane`` is two different axes that are equally long."""
    is_pair = len(plane) == len(set(plane)) == 2 and all(0 <= axis < len(patch_size) for axis in plane)
    return is_pair and patch_size[plane[0]] == patch_size[plane[1]]
