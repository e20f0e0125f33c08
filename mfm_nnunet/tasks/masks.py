"""Masks of random blocks, and the base class of tasks that restore hidden voxels.

Legend: B batch, C channels, D H W voxels of the patch; in 2D there is no D. ``cell_size`` and ``patch_size`` are voxels
per axis. A mask is the same for all channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.settings import ranged
from mfm_nnunet.tasks.base import Augmentation, PatchTransform, PretextTask, TaskOutput, illegal_setting, size_per_axis
from mfm_nnunet.tasks.losses import explained_variance, masked_mse

MAX_BOX = 0.625
"""Longest side of a box, as a share of the patch's."""


@dataclass(frozen=True)
class MaskingConfig:
    """Settings that all tasks with hidden voxels share."""

    mask_ratio: float | tuple[float, float] = ranged(0.75, 0, 1, above=True, below=True, ascending=True)
    """Share of the cells that are hidden; of n cells exactly int(mask_ratio x n). Two numbers: the share is drawn
    between them for each item; not where tokens are dropped."""
    cell_size: tuple[int, ...] | None = None
    """Voxels per axis of a cell; one number for all axes, or one for each. None: the network's tokens; without tokens
    16 on axes of at least 64 voxels and a quarter of the axis (at least 4) on shorter ones."""
    fill_value: float = 0.0
    """Value of hidden voxels, in normalised units, that convolutions see; 0 is the mean of z-scored images."""


class MaskingTransform(PatchTransform):
    """Draw a mask. Items: ``image`` (C, D, H, W) float32 and ``hidden`` (1, D, H, W) bool."""

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        ratio = self.config.mask_ratio
        ratio = rng.uniform(*ratio) if isinstance(ratio, tuple) else ratio
        hidden = draw_hidden(self.patch_size, self.config.cell_size, ratio, rng)
        return {"image": crops[0], "hidden": hidden, **({"valid": valid[0]} if valid else {})}


class MaskedRestoration(PretextTask):
    """Abstract base of tasks that restore hidden voxels through the network's head, one output per image channel.

    The loss counts only hidden voxels, without anonymised ones.
    """

    Config = MaskingConfig
    Transform = MaskingTransform
    pictures_are = "scan"
    uses_valid = True

    @classmethod
    def resolve(cls, config: Any, geometry: Geometry) -> Any:
        config = super().resolve(config, geometry)
        cell = resolve_cell_size(config.cell_size, geometry)
        require_mask_ratio(config.mask_ratio, cell, geometry.patch_size)
        return dataclasses.replace(config, cell_size=cell)

    @classmethod
    def augmentation(cls, config: Any) -> Augmentation:
        return "spatial"

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
        """Compute dense outputs (B, K, D, H, W) from visible voxels only."""
        return self.backbone.restore(x_BCDHW, hidden_B1DHW, self.config.fill_value)

    def error(self, restored_BCDHW: Tensor, target_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
        """Compute the loss over the counted voxels."""
        return masked_mse(restored_BCDHW, target_BCDHW, counted_B1DHW)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        image_BCDHW, hidden_B1DHW = batch["image"], batch["hidden"]
        restored_BCDHW = self.restore(image_BCDHW, hidden_B1DHW)
        counted_B1DHW = hidden_B1DHW & batch["valid"] if "valid" in batch else hidden_B1DHW
        squared_error = masked_mse(restored_BCDHW.detach(), image_BCDHW, counted_B1DHW)
        return self.output(
            self.error(restored_BCDHW, image_BCDHW, counted_B1DHW),
            {"explained_variance": explained_variance(squared_error, image_BCDHW, counted_B1DHW)},
            lambda: {
                "image": image_BCDHW[0],
                "visible": image_BCDHW[0].masked_fill(hidden_B1DHW[0], self.config.fill_value),
                "restored": torch.where(hidden_B1DHW[0], restored_BCDHW[0].float(), image_BCDHW[0].float()),
            },
        )


def cell_grid(patch_size: Sequence[int], cell_size: Sequence[int]) -> tuple[int, ...]:
    """Count the cells per axis, including a smaller last cell if the patch is not a multiple of the cell."""
    return tuple(-(-patch // cell) for patch, cell in zip(patch_size, cell_size))


def num_hidden_cells(patch_size: Sequence[int], cell_size: Sequence[int], ratio: float) -> int:
    """Count the hidden cells per sample: int(ratio x cells)."""
    return int(ratio * math.prod(cell_grid(patch_size, cell_size)))


def draw_hidden(
    patch_size: Sequence[int], cell_size: Sequence[int], ratio: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw a boolean mask (1, D, H, W), True where hidden; cells are drawn uniformly without replacement."""
    cells = np.zeros(cell_grid(patch_size, cell_size), bool)
    cells.flat[rng.permutation(cells.size)[: num_hidden_cells(patch_size, cell_size, ratio)]] = True
    return paint_cells(cells, cell_size, patch_size)[None]


def paint_cells(cells: np.ndarray, cell_size: Sequence[int], patch_size: Sequence[int]) -> np.ndarray:
    """Enlarge a map of cells to voxels (D, H, W), cut off at the end of the patch."""
    for axis, size in enumerate(cell_size):
        cells = cells.repeat(size, axis)
    return np.ascontiguousarray(cells[tuple(slice(size) for size in patch_size)])


def auto_cell_size(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Choose cells for networks without tokens: 16 voxels on axes of 64 or more (arXiv 2410.23132), else a quarter.

    The minimum is 4 voxels, because smaller cells could be interpolated from their neighbours.
    """
    return tuple(16 if size >= 64 else min(size, max(4, size // 4)) for size in patch_size)


def resolve_cell_size(cell_size: tuple[int, ...] | None, geometry: Geometry) -> tuple[int, ...]:
    """Check ``pretext.cell_size`` and expand it to all axes.

    None: the network's tokens, or :func:`auto_cell_size` without tokens.
    """
    patch, token = geometry.patch_size, geometry.mask_cell
    has_tokens = max(token) > 1
    cell = token if has_tokens else auto_cell_size(patch)
    if cell_size is not None:
        cell = size_per_axis("cell_size", cell_size, patch)
    if any(side % step for side, step in zip(cell, token)):
        raise illegal_setting("cell_size", cell, f"it must be a multiple of the network's tokens, {token}")
    if has_tokens and any(size % side for side, size in zip(cell, patch)):
        # Cut cells would hide a different number of tokens in each sample.
        raise illegal_setting("cell_size", cell, f"with tokens the patch, {patch}, must be a multiple of it")
    return cell


def require_mask_ratio(
    mask_ratio: float | tuple[float, float], cell_size: tuple[int, ...], patch_size: tuple[int, ...]
) -> None:
    """Raise MFMError (E_CONFIG) unless ``pretext.mask_ratio`` hides at least one cell."""
    limits = mask_ratio if isinstance(mask_ratio, tuple) else (mask_ratio,)
    if num_hidden_cells(patch_size, cell_size, limits[0]) == 0:
        count = math.prod(cell_grid(patch_size, cell_size))
        problem = f"hides none of the {count} cells of {cell_size} voxels in a patch of {patch_size}"
        raise illegal_setting("mask_ratio", ",".join(map(str, limits)), f"{problem}; raise it, or use smaller cells")


def cell_limits(axis_size: int, cell_range: tuple[int, int]) -> tuple[int, int]:
    """Scale ``cell_range``, the smallest and largest side of a cell, to axes of less than 64 voxels.

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
    """Draw classes (D, H, W), uint8, on a regular lattice of equal cells at a random offset.

    Exactly int(mixed_fraction x n) of n cells get a class from 1 to ``num_classes``. The others, and the margin without
    whole cells, are class 0.
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
    """Draw classes (D, H, W), uint8, in boxes with sides of 8 voxels (less on short axes) up to 62.5 % of the patch.

    Later boxes cover earlier ones. With ``erases``: 10 to 39 boxes inside the patch, of classes 0 to ``num_classes``.
    Without: 10 to 40 boxes centred anywhere and cut at the border, of classes 1 to ``num_classes``.
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
