"""Views (small, randomly changed crops of one region) and the base class of tasks that compare them.

Legend: B batch, C channels, D H W voxels, V views, E embedding; in 2D there is no D. Sizes and positions are voxels per
axis.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone, Geometry
from mfm_nnunet.settings import LARGEST, ranged
from mfm_nnunet.tasks.base import PretextTask, illegal_setting, size_per_axis
from mfm_nnunet.tasks.image_operations import JITTER, jitter

VIEW_JITTER = {**JITTER, "low resolution": 0.1}
"""Probability per view of each step of :func:`jitter`, as in OpenMind's contrastive tasks."""
QUARTER_TURN = 0.3
"""Probability of a rotation by 90, 180 or 270 degrees, also as in OpenMind."""


@dataclass(frozen=True)
class ViewConfig:
    """Settings that all tasks with views share."""

    crop_size: tuple[int, ...] | None = None
    """Voxels per axis of a crop; one number for all axes, or one for each. None: 64 on axes of at least 128 voxels,
    else about half the patch, in multiples of what the network needs."""
    projector_width: int = ranged(2048, 1, LARGEST)
    """Width of the layers behind the encoder, which are not shipped."""
    quarter_turn: float | None = ranged(None, 0, 1)
    """Probability of a rotation by 90, 180 or 270 degrees in the plane of the last two axes. None: 0.3 where a crop is
    as long on both, else 0. Set it to 0 where their spacings differ."""


class ViewComparison(PretextTask):
    """Abstract base of tasks that compare views by pooled features of all stages and a projector of three layers.

    Only the encoder is trained.
    """

    trains_decoder = False

    def __init__(self, config: Any, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        width = config.projector_width
        self.projector = Projector((sum(backbone.feature_widths()), width, width, width))

    @classmethod
    def resolve(cls, config: Any, geometry: Geometry) -> Any:
        config = super().resolve(config, geometry)
        crop = resolve_crop_size(config.crop_size, geometry)
        return dataclasses.replace(config, crop_size=crop, quarter_turn=resolve_quarter_turn(config.quarter_turn, crop))

    def embed(self, views_BVCDHW: Tensor) -> Tensor:
        """Embed all views as one batch; return (B, V, E), float32."""
        features = self.backbone.features(views_BVCDHW.flatten(0, 1))
        # In an untrained network, views differ by less than the precision of bf16, so the projector runs in float32.
        with torch.autocast(views_BVCDHW.device.type, enabled=False):
            return self.projector(pool(features)).unflatten(0, views_BVCDHW.shape[:2])


def pool(features: Sequence[Tensor]) -> Tensor:
    """Average each map (B, features, ...) of an encoder over space and concatenate to (B, sum of features)."""
    return torch.cat([feature.float().flatten(2).mean(2) for feature in features], dim=1)


class Projector(nn.Sequential):
    """MLP whose hidden layers are linear, LayerNorm without affine parameters, and ReLU."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Build the layers; ``widths``: inputs, hidden layers and outputs, e.g. (1120, 2048, 2048, 2048)."""
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), nn.LayerNorm(after, elementwise_affine=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


def change_view(view_CDHW: np.ndarray, rng: np.random.Generator, quarter_turn: float) -> np.ndarray:
    """Apply jitter, mirroring (p 0.5 per axis) and a quarter turn to a view.

    ``quarter_turn`` is the probability of one to three turns by 90 degrees in the plane of the last two axes, which
    must then have equal length. ``view_CDHW`` is modified; use the returned array.
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
    """Cut crops (V, C, *crop_size), float32, that start at ``starts_VA`` in a region, and change each independently."""
    views = []
    for start in starts_VA:
        inside = tuple(slice(low, low + side) for low, side in zip(start, crop_size))
        views.append(change_view(region_CDHW[(slice(None), *inside)].copy(), rng, quarter_turn))
    return np.ascontiguousarray(np.stack(views), np.float32)


def resolve_crop_size(crop_size: tuple[int, ...] | None, geometry: Geometry) -> tuple[int, ...]:
    """Check ``pretext.crop_size`` and expand it to all axes.

    None: 64 voxels on axes of at least 128, else about half the patch, in cells of the network. A crop needs more than
    one cell: at a single place norms have no variance and attention has nothing to attend to.
    """
    cell = geometry.crop_cell
    if crop_size is None:
        return _auto_crop_size(geometry.patch_size, cell)
    crop = size_per_axis("crop_size", crop_size, geometry.patch_size)
    if any(side % step for side, step in zip(crop, cell)):
        raise illegal_setting("crop_size", crop, f"the network needs multiples of {cell}")
    return _require_several_places(crop, cell)


def _auto_crop_size(patch_size: tuple[int, ...], cell: tuple[int, ...]) -> tuple[int, ...]:
    wanted = [64 if size >= 128 else size // 2 for size in patch_size]
    crop = [max(want // step, 1) * step for want, step in zip(wanted, cell)]
    if crop == list(cell):
        cells = [size // step for size, step in zip(patch_size, cell)]
        longest = max(range(len(cells)), key=lambda axis: (cells[axis], axis))
        # Use two cells on axes with at least four, else on one axis only, so that crops are smaller than the patch.
        grown = [axis for axis, count in enumerate(cells) if count >= 4] or [longest]
        crop = [2 * step if axis in grown else step for axis, step in enumerate(cell)]
    return _require_several_places(size_per_axis("crop_size", tuple(crop), patch_size), cell)


def _require_several_places(crop: tuple[int, ...], cell: tuple[int, ...]) -> tuple[int, ...]:
    if crop == cell:
        problem = f"it must be larger than {cell} on at least one axis, else the network sees a single place"
        raise illegal_setting("crop_size", crop, problem)
    return crop


def resolve_quarter_turn(quarter_turn: float | None, crop_size: Sequence[int]) -> float:
    """Check ``pretext.quarter_turn``; None: the published 0.3 where the plane is square, else 0."""
    is_square = crop_size[-2] == crop_size[-1]
    if quarter_turn is None:
        return QUARTER_TURN if is_square else 0.0
    if quarter_turn > 0 and not is_square:
        problem = f"must be 0 where the last two axes of pretext.crop_size={tuple(crop_size)} differ"
        raise illegal_setting("quarter_turn", quarter_turn, problem)
    return quarter_turn


def side_by_side(views_VCDHW: Tensor) -> Tensor:
    """Concatenate views along the last axis, (C, D, H, V W), for pictures."""
    return torch.cat(list(views_VCDHW), dim=-1)


def tile(views_VCDHW: Tensor, grid: Sequence[int]) -> Tensor:
    """Tile V = prod(grid) views, axis 0 outermost, (C, *grid x crop), for pictures."""
    assert len(views_VCDHW) == math.prod(grid), f"{len(views_VCDHW)} views are no grid of {tuple(grid)}"
    tiles = list(views_VCDHW)
    for axis, count in reversed(list(enumerate(grid, start=1))):
        tiles = [torch.cat(tiles[first : first + count], axis) for first in range(0, len(tiles), count)]
    return tiles[0]


def as_picture(table: Tensor, num_axes: int) -> Tensor:
    """Reshape a table (rows, columns) to a volume with one channel, for pictures."""
    return table.reshape(*[1] * (num_axes - 1), *table.shape)
