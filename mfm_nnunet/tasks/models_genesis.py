"""Models Genesis: undo four kinds of corruption at once (arXiv 1908.06912, 2004.07882).

Corruption: voxels are shuffled within small windows, intensities are mapped by a random curve, and boxes, or everything
outside a few boxes, are painted over with noise. Target: the original patch. Loss: mean squared error over the whole
patch. Curve and noise are defined in [0, 1] and scaled to robust percentiles of each channel, so that normalised images
keep their range and distinct values. (The published code maps z-scored images as if they were in [0, 1].)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.settings import ranged
from mfm_nnunet.tasks.base import Augmentation, PatchTransform, PretextTask, TaskOutput, illegal_setting
from mfm_nnunet.tasks.image_operations import UNIT_KNOTS, apply_curve, draw_curve, intensity_knots
from mfm_nnunet.tasks.losses import explained_variance, masked_mse

WINDOW_SHAPES = 128
"""Number of different window shapes per item."""

MARGIN = 3
"""Minimum distance in voxels of boxes from the border of the patch, if there is room."""


@dataclass(frozen=True)
class ModelsGenesisConfig:
    """Settings of Models Genesis."""

    shuffle_probability: float = ranged(0.5, 0, 1)
    """Probability that voxels are shuffled within windows."""
    curve_probability: float = ranged(0.9, 0, 1)
    """Probability that intensities are bent; half of the curves invert the contrast."""
    paint_probability: float = ranged(0.9, 0, 1)
    """Probability that boxes, or everything around them, are painted over."""
    inpainting_share: float = ranged(0.2, 0, 1)
    """Share of the painted items in which the boxes are painted; in the others it is everything around them."""
    largest_window: float = ranged(0.1, 0, 1, above=True)
    """Largest side of a window, as a share of the axis, but at least 4 voxels; sides are drawn from 1 up to it."""
    window_coverage: float = ranged(1.5, 0, 100, above=True)
    """Voxels in all windows together, in patches: 10,000 windows at 160x160x160. Windows overlap."""


class ModelsGenesisTransform(PatchTransform):
    """Make ``image`` (corrupted) and ``target`` (original), both (C, D, H, W) float32 in normalised units."""

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        image = corrupt(crops[0], self.config, rng)
        return {"image": image, "target": crops[0], **({"valid": valid[0]} if valid else {})}


class ModelsGenesis(PretextTask):
    """Restore the whole patch through the network's own head, one output per image channel."""

    name = "models_genesis"
    Config = ModelsGenesisConfig
    Transform = ModelsGenesisTransform
    uses_valid = True

    @classmethod
    def resolve(cls, config: ModelsGenesisConfig, geometry: Geometry) -> ModelsGenesisConfig:
        config = super().resolve(config, geometry)
        if not (config.shuffle_probability or config.curve_probability or config.paint_probability):
            raise illegal_setting("paint_probability", config.paint_probability, "nothing is corrupted")
        return config

    @classmethod
    def augmentation(cls, config: ModelsGenesisConfig) -> Augmentation:
        return "mirror"

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        image_BCDHW, target_BCDHW = batch["image"], batch["target"]
        restored_BCDHW = self.backbone(image_BCDHW)
        counted_B1DHW = batch.get("valid", torch.ones_like(target_BCDHW[:, :1], dtype=torch.bool))
        loss = masked_mse(restored_BCDHW, target_BCDHW, counted_B1DHW)
        metrics = {
            "explained_variance": explained_variance(loss, target_BCDHW, counted_B1DHW),
            # Loss of returning the input. The network restores something once its loss is below this.
            "corruption": masked_mse(image_BCDHW, target_BCDHW, counted_B1DHW),
        }
        pictures = {"original": target_BCDHW[0], "corrupted": image_BCDHW[0], "restored": restored_BCDHW[0]}
        return self.output(loss, metrics, lambda: pictures)


def corrupt(x_CDHW: np.ndarray, config: Any, rng: np.random.Generator) -> np.ndarray:
    """Return a corrupted copy. Channels are shuffled and painted at the same places, but have separate curves.

    Only curve and noise use the map to [0, 1], so other voxels keep their exact values.
    """
    shuffles, bends, paints, inpaints = rng.random(4) < (
        config.shuffle_probability,
        config.curve_probability,
        config.paint_probability,
        config.inpainting_share,
    )
    patch_size = x_CDHW.shape[1:]
    corrupted = x_CDHW.copy()
    knots = [intensity_knots(channel) for channel in x_CDHW] if bends or paints else []
    if shuffles:
        source = draw_shuffle(patch_size, config.largest_window, config.window_coverage, rng)
        corrupted.reshape(len(x_CDHW), -1)[...] = x_CDHW.reshape(len(x_CDHW), -1)[:, source]
    if bends:
        for channel, scale in zip(corrupted, knots):
            channel[...] = apply_curve(channel, scale, draw_curve(rng))
    if paints:
        painted = draw_inpainting(patch_size, rng) if inpaints else draw_outpainting(patch_size, rng)
        for channel, scale in zip(corrupted, knots):
            channel[painted] = np.interp(rng.random(np.count_nonzero(painted), np.float32), UNIT_KNOTS, scale)
    return corrupted


def draw_shuffle(
    patch_size: Sequence[int], largest_window: float, coverage: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw the source of each voxel: flat indices (D * H * W,), permuted within random windows.

    Windows read the uncorrupted patch. Where they overlap, the later one counts, as published.
    """
    index = np.arange(math.prod(patch_size)).reshape(patch_size)
    source = index.flatten()
    limits = [min(size, max(4, int(largest_window * size))) for size in patch_size]
    num_windows = math.ceil(coverage * index.size / math.prod((1 + limit) / 2 for limit in limits))
    # Drawing a shape and a permutation for each of 10,000 windows costs more than moving the voxels. So windows are
    # drawn in groups that share both. The distribution of each single window is unchanged.
    bounds = np.linspace(0, num_windows, min(num_windows, WINDOW_SHAPES) + 1).astype(int)
    for count in np.diff(bounds):
        sides = rng.integers(1, limits, endpoint=True)
        lower = [rng.integers(size - side, size=count, endpoint=True) for size, side in zip(patch_size, sides)]
        starts = np.ravel_multi_index(lower, patch_size)[:, None]
        offsets = index[tuple(slice(side) for side in sides)].reshape(-1)
        source[starts + offsets] = starts + rng.permutation(offsets)
    return source


def draw_inpainting(patch_size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw a mask (D, H, W) of voxels to paint: up to 5 boxes with sides of a sixth to a third of the patch."""
    painted = np.zeros(patch_size, bool)
    for _ in range(_draw_count(5, rng)):
        painted[_draw_box(patch_size, [(size // 6, size // 3) for size in patch_size], rng)] = True
    return painted


def draw_outpainting(patch_size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw a mask (D, H, W) of voxels to paint: all but 1 to 5 boxes with sides of 3/7 to 4/7 of the patch."""
    painted = np.ones(patch_size, bool)
    for _ in range(1 + _draw_count(4, rng)):
        limits = [(size - 4 * size // 7, size - 3 * size // 7) for size in patch_size]
        painted[_draw_box(patch_size, limits, rng)] = False
    return painted


def _draw_count(most: int, rng: np.random.Generator) -> int:
    """Draw a number up to ``most``: each increment happens with probability 0.95, until the first that does not."""
    return int(np.cumprod(rng.random(most) < 0.95).sum())


def _draw_box(
    patch_size: Sequence[int], limits: Sequence[tuple[int, int]], rng: np.random.Generator
) -> tuple[slice, ...]:
    """Draw a box with sides within ``limits`` (at least 1), MARGIN voxels from the border if it fits."""
    box = []
    for size, (low, high) in zip(patch_size, limits):
        side = int(rng.integers(max(1, low), max(1, high), endpoint=True))
        margin = min(MARGIN, (size - side) // 2)
        start = int(rng.integers(margin, size - side - margin, endpoint=True))
        box.append(slice(start, start + side))
    return tuple(box)
