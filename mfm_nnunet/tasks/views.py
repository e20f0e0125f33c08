"""Views: small crops of one region, each changed by chance, for tasks that compare embeddings instead of voxels.

Legend: C channels, D H W voxels, V views; in 2D there is no D. Sizes and positions are voxels per axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.image_operations import JITTER, jitter

VIEW_JITTER = {**JITTER, "low resolution": 0.1}
"""Probability per view of each step of :func:`jitter`, as in OpenMind's contrastive tasks."""
QUARTER_TURN = 0.3
"""Probability of a rotation by 90, 180 or 270 degrees, as there."""


def change_view(view_CDHW: np.ndarray, rng: np.random.Generator, quarter_turn: float) -> np.ndarray:
    """Noise, blur, brightness, contrast, low resolution and gamma; mirroring (p 0.5 per axis) and a quarter turn.

    ``quarter_turn`` is the probability of one to three turns by 90 degrees in the plane of the last two axes, which
    must then be equally long. Nothing else changes the size. Changes ``view_CDHW`` in place; use the result.
    """
    view_CDHW = jitter(view_CDHW, rng, VIEW_JITTER)
    view_CDHW = np.flip(view_CDHW, tuple(np.flatnonzero(rng.random(view_CDHW.ndim - 1) < 0.5) + 1))
    turns = int(rng.integers(1, 4)) if rng.random() < quarter_turn else 0
    return np.rot90(view_CDHW, turns, axes=(-2, -1))


def cut_views(
    region_CDHW: np.ndarray,
    starts_VA: np.ndarray,
    crop_size: Sequence[int],
    rng: np.random.Generator,
    quarter_turn: float,
) -> np.ndarray:
    """The crops (V, C, *crop_size) at these places (V, axes) of a region, float32, each changed on its own."""
    views = []
    for start in starts_VA:
        inside = tuple(slice(low, low + side) for low, side in zip(start, crop_size))
        views.append(change_view(region_CDHW[(slice(None), *inside)].copy(), rng, quarter_turn))
    return np.ascontiguousarray(np.stack(views), np.float32)


def resolve_per_axis(value: tuple[int, ...], num_axes: int) -> tuple[int, ...]:
    """One number stands for all axes."""
    return value * num_axes if len(value) == 1 else value


def resolve_crop_size(crop_size: tuple[int, ...] | None, geometry: Geometry) -> tuple[int, ...]:
    """The setting ``pretext.crop_size``, checked, with a number for each axis; one number stands for all of them.

    None: 64 voxels on axes of at least 128, else about half the patch, in whole cells of the network and more than one
    of them: at a single place the network's norms have no variance and attention has nothing to attend to. Raises
    MFMError (E_CONFIG).
    """
    patch_size, cell = geometry.patch_size, geometry.crop_cell
    crop = _auto_crop_size(geometry) if crop_size is None else resolve_per_axis(crop_size, len(patch_size))
    problem = _problem_of_crop(crop, patch_size, cell)
    if problem:
        raise MFMError("E_CONFIG", f"pretext.crop_size={crop}: {problem}. Leave it out for the default.")
    return crop


def _auto_crop_size(geometry: Geometry) -> tuple[int, ...]:
    patch_size, cell = geometry.patch_size, geometry.crop_cell
    wanted = [64 if size >= 128 else size // 2 for size in patch_size]
    crop = [max(want // step, 1) * step for want, step in zip(wanted, cell)]
    if crop == list(cell):
        cells = [size // step for size, step in zip(patch_size, cell)]
        longest = max(range(len(cells)), key=lambda axis: (cells[axis], axis))
        # Two cells on each axis that has four; if none has, on one alone, so that crops stay smaller than the patch.
        grown = [axis for axis, count in enumerate(cells) if count >= 4] or [longest]
        crop = [2 * step if axis in grown else step for axis, step in enumerate(cell)]
    return tuple(crop)


def _problem_of_crop(crop: tuple[int, ...], patch_size: tuple[int, ...], cell: tuple[int, ...]) -> str | None:
    if len(crop) != len(patch_size):
        return f"the patch has {len(patch_size)} axes, {patch_size}"
    if any(not 1 <= side <= size for side, size in zip(crop, patch_size)):
        return f"each axis must be 1 up to the patch's, {patch_size}"
    if any(side % step for side, step in zip(crop, cell)):
        return f"the network needs multiples of {cell}"
    if crop == cell:
        return f"it must be larger than {cell} on at least one axis, else the network sees a single place"
    return None


def resolve_quarter_turn(quarter_turn: float | None, crop_size: Sequence[int]) -> float:
    """The setting ``pretext.quarter_turn``, checked; None: the published 0.3 where the plane is square, else 0.

    Raises MFMError (E_CONFIG).
    """
    is_square = crop_size[-2] == crop_size[-1]
    if quarter_turn is None:
        return QUARTER_TURN if is_square else 0.0
    if not 0 <= quarter_turn <= 1 or (quarter_turn > 0 and not is_square):
        raise MFMError(
            "E_CONFIG",
            f"pretext.quarter_turn={quarter_turn}: legal are 0 to 1, and above 0 only where the last two axes of "
            f"pretext.crop_size={tuple(crop_size)} are equal. Leave it out for the default.",
        )
    return quarter_turn


def require_legal(rules: Iterable[tuple[bool, str]]) -> None:
    """Raise MFMError (E_CONFIG) for the first pair of which the rule, "name=value: what is legal", does not hold."""
    for holds, rule in rules:
        if not holds:
            raise MFMError("E_CONFIG", f"pretext.{rule}. Leave it out for the default.")


def side_by_side(views_VCDHW: Tensor) -> Tensor:
    """The views in a row along the last axis, (C, D, H, V W), for pictures."""
    return torch.cat(list(views_VCDHW.float()), dim=-1)


def tiled(views_VCDHW: Tensor, grid: Sequence[int]) -> Tensor:
    """The views as tiles of a grid of V = prod(grid), axis 0 outermost, (C, *grid x crop), for pictures."""
    assert len(views_VCDHW) == math.prod(grid), f"{len(views_VCDHW)} views are no grid of {tuple(grid)}"
    tiles = list(views_VCDHW.float())
    for axis, count in reversed(list(enumerate(grid, start=1))):
        tiles = [torch.cat(tiles[first : first + count], axis) for first in range(0, len(tiles), count)]
    return tiles[0]


def as_picture(table: Tensor, num_axes: int) -> Tensor:
    """A table (rows, columns) as a volume of one channel, for pictures."""
    return table.detach().float().reshape(*[1] * (num_axes - 1), *table.shape)
