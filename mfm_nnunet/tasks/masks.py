"""Random maps of blocks: which voxels are hidden, and which are mixed how strongly; the same for all channels.

Legend: D H W voxels of the patch; in 2D there is no D. ``cell_size`` and ``patch_size`` are voxels per axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry

MaskRatio = float | tuple[float, float]
"""Share of the cells that are hidden, or the limits between which it is drawn for each item."""

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


def resolve_cell_size(cell_size: tuple[int, ...] | None, geometry: Geometry) -> tuple[int, ...]:
    """The setting ``pretext.cell_size``, checked, with a number for each axis; one number stands for all of them.

    None: the tokens of the network, or :func:`auto_cell_size` where it has none. Raises MFMError (E_CONFIG).
    """
    patch_size, mask_cell = geometry.patch_size, geometry.mask_cell
    cell = cell_size
    if cell is None:
        cell = mask_cell if max(mask_cell) > 1 else auto_cell_size(patch_size)
    elif len(cell) == 1:
        cell = cell * len(patch_size)
    problem = _problem_of_cell(cell, patch_size, mask_cell)
    if problem:
        raise MFMError("E_CONFIG", f"pretext.cell_size={cell}: {problem}. Leave it out for the default.")
    return cell


def require_mask_ratio(mask_ratio: MaskRatio, cell_size: tuple[int, ...], patch_size: tuple[int, ...]) -> None:
    """Raise MFMError (E_CONFIG) unless ``pretext.mask_ratio`` hides at least one cell and leaves at least one.

    Of two limits the smaller one comes first.
    """
    low, high = mask_ratio if isinstance(mask_ratio, tuple) else (mask_ratio, mask_ratio)
    if not 0 < low <= high < 1 or num_hidden_cells(patch_size, cell_size, low) == 0:
        shown = f"{low},{high}" if isinstance(mask_ratio, tuple) else mask_ratio
        raise MFMError(
            "E_CONFIG",
            f"pretext.mask_ratio={shown}: it must be between 0 and 1 (of two limits the smaller one comes first) and "
            "hide at least one of the "
            f"{math.prod(cell_grid(patch_size, cell_size))} cells of {cell_size} voxels in a patch of {patch_size}. "
            "Change it or use smaller cells.",
        )


def _problem_of_cell(cell: tuple[int, ...], patch_size: tuple[int, ...], mask_cell: tuple[int, ...]) -> str | None:
    if len(cell) != len(patch_size):
        return f"the patch has {len(patch_size)} axes, {patch_size}"
    if any(not 1 <= size <= patch for size, patch in zip(cell, patch_size)):
        return f"each axis must be 1 up to the patch's, {patch_size}"
    if any(size % token for size, token in zip(cell, mask_cell)):
        return f"it must be a multiple of the network's tokens, {mask_cell}"
    if max(mask_cell) > 1 and any(patch % size for size, patch in zip(cell, patch_size)):
        # Cut cells would hide a different number of tokens in each sample.
        return f"with tokens the patch, {patch_size}, must be a multiple of it"
    return None


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
