"""Random maps of blocks: which voxels are hidden, and which are mixed how strongly; the same for all channels.

Legend: D H W voxels of the patch; in 2D there is no D. ``cell_size`` and ``patch_size`` are voxels per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_BOX = 0.625
"""Longest side of a box, as a share of the patch's."""


def cell_grid(patch_size: Sequence[int], cell_size: Sequence[int]) -> tuple[int, ...]:
    """Cells per axis; the last one of an axis is smaller where the patch is not a multiple of the cell."""
    return tuple(-(-patch // cell) for patch, cell in zip(patch_size, cell_size))


def num_hidden_cells(patch_size: Sequence[int], cell_size: Sequence[int], ratio: float) -> int:
    """How many cells are hidden: int(ratio x cells), in every sample."""
    return int(ratio * math.prod(cell_grid(patch_size, cell_size)))


def draw_hidden(
    patch_size: Sequence[int], cell_size: Sequence[int], ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """A boolean mask (1, D, H, W), True where hidden; cells are drawn uniformly without replacement."""
    cells = np.zeros(cell_grid(patch_size, cell_size), bool)
    cells.flat[rng.permutation(cells.size)[: num_hidden_cells(patch_size, cell_size, ratio)]] = True
    return paint_cells(cells, cell_size, patch_size)[None]


def paint_cells(cells: np.ndarray, cell_size: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """The map of voxels (D, H, W) in which each cell is painted with its value; what sticks out is cut off."""
    for axis, size in enumerate(cell_size):
        cells = cells.repeat(size, axis)
    return np.ascontiguousarray(cells[tuple(slice(size) for size in patch_size)])


def auto_cell_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Cells for networks without tokens: 16 voxels on axes of 64 and more (arXiv 2410.23132), else a quarter of it.

    A quarter, but at least 4 voxels: smaller cells could be filled in from their neighbours alone.
    """
    return tuple(16 if size >= 64 else min(size, max(4, size // 4)) for size in patch_size)


def cell_limits(axis_size: int, cell_range: tuple[int, int]) -> tuple[int, int]:
    """Smallest and largest side of a cell on an axis: ``cell_range`` from 64 voxels on, in proportion below.

    With the published range, 8 to 32, every axis of two or more voxels holds at least two cells.
    """
    smallest, largest = (max(1, min(side * min(axis_size, 64) // 64, axis_size)) for side in cell_range)
    return smallest, largest


def draw_lattice(
    patch_size: tuple[int, ...],
    cell_range: tuple[int, int],
    mixed_fraction: float,
    num_classes: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Classes (D, H, W), uint8, of a regular lattice of equal cells at a random offset.

    Of n cells exactly int(mixed_fraction x n) get a class from 1 to ``num_classes``; the others, and the margin where
    no whole cell fits, are class 0.
    """
    sides = [int(rng.integers(*cell_limits(size, cell_range), endpoint=True)) for size in patch_size]
    offsets = [int(rng.integers(size % side, endpoint=True)) for size, side in zip(patch_size, sides)]
    cells = np.zeros([size // side for size, side in zip(patch_size, sides)], np.uint8)
    num_mixed = int(mixed_fraction * cells.size)
    cells.flat[rng.permutation(cells.size)[:num_mixed]] = rng.integers(1, num_classes, num_mixed, endpoint=True)
    extents = [count * side for count, side in zip(cells.shape, sides)]
    label = np.zeros(patch_size, np.uint8)
    inside = tuple(slice(offset, offset + extent) for offset, extent in zip(offsets, extents))
    label[inside] = paint_cells(cells, sides, extents)
    return label


def draw_boxes(patch_size: tuple[int, ...], num_classes: int, rng: np.random.Generator, erases: bool) -> np.ndarray:
    """Classes (D, H, W), uint8, of boxes with sides of 8 voxels (less on short axes) up to 62.5 % of the patch.

    Later boxes lie over earlier ones. With ``erases`` there are 10 to 39, wholly inside, of classes 0 to
    ``num_classes``; else 10 to 40, centred anywhere and cut at the border, of classes from 1.
    """
    label = np.zeros(patch_size, np.uint8)
    limits = [(cell_limits(size, (8, 8))[0], int(MAX_BOX * size)) for size in patch_size]
    for _ in range(rng.integers(10, 39 if erases else 40, endpoint=True)):
        sides = [int(rng.integers(low, max(low, high), endpoint=True)) for low, high in limits]
        if erases:
            starts = [int(rng.integers(size - side, endpoint=True)) for size, side in zip(patch_size, sides)]
        else:
            starts = [int(rng.integers(size)) - side // 2 for size, side in zip(patch_size, sides)]
        box = tuple(slice(max(0, start), start + side) for start, side in zip(starts, sides))
        label[box] = rng.integers(0 if erases else 1, num_classes, endpoint=True)
    return label
