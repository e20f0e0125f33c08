"""VoCo: predict the position of a crop in the volume from its embedding (arXiv 2402.17300).

Each item cuts one region of a volume into a grid of base crops, and ``num_targets`` target crops at random places.
Contrast, noise, sharpness and orientation of each crop are changed at random. Target: the share of a target crop that
lies in each base crop, predicted by the cosine of their projected, pooled features. A regulariser makes base crops
differ. Only the encoder is trained.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.settings import LARGEST, ranged
from mfm_nnunet.tasks.base import CropRequest, PatchTransform, TaskOutput, illegal_setting
from mfm_nnunet.tasks.losses import cosines, overlap_loss, spread_loss
from mfm_nnunet.tasks.views import ViewComparison, ViewConfig, as_picture, cut_views, side_by_side, tile

MOST_BASE_CROPS = 64


@dataclass(frozen=True)
class VoCoConfig(ViewConfig):
    """Settings of VoCo."""

    grid: tuple[int, ...] | None = None
    """Base crops per axis; one number for all axes, or one for each. None: 1, 4 and 4 where the patch is as large (in
    2D 4 and 4), else 2 on each axis that holds two crops."""
    num_targets: int = ranged(4, 1, LARGEST)
    """Target crops per item."""
    prediction_weight: float = ranged(1.0, 0, LARGEST, above=True)
    """Weight of the loss of the predicted overlaps."""
    regularizer_weight: float = ranged(1.0, 0, LARGEST)
    """Weight of the loss that makes base crops differ."""


class VoCoTransform(PatchTransform):
    """Cut ``image`` (N + T, C, *crop): base crops in grid order, then targets; compute ``overlap`` (T, N)."""

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(region_size(self.config))]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        config = self.config
        bases_NA = base_places(config)
        targets_TA = rng.integers(0, bases_NA[-1], (config.num_targets, len(config.crop_size)), endpoint=True)
        places_VA = np.concatenate([bases_NA, targets_TA])
        return {
            "image": cut_views(crops[0], places_VA, config.crop_size, rng, config.quarter_turn),
            "overlap": overlaps(targets_TA, bases_NA, config.crop_size),
        }


class VoCo(ViewComparison):
    """Predict overlaps by the cosines between target and base crops."""

    name = "voco"
    Config = VoCoConfig
    Transform = VoCoTransform

    @classmethod
    def resolve(cls, config: VoCoConfig, geometry: Geometry) -> VoCoConfig:
        config = super().resolve(config, geometry)
        assert config.crop_size is not None
        return dataclasses.replace(config, grid=_resolve_grid(config.grid, config.crop_size, geometry.patch_size))

    @classmethod
    def smallest_volume(cls, config: VoCoConfig) -> tuple[int, ...] | None:
        """Return a size for which at most half of the outermost base crops lies in the padding."""
        assert config.crop_size is not None
        return tuple(max(side, size - side) for side, size in zip(config.crop_size, region_size(config)))

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        views_BVCDHW, overlap_BTN = batch["image"], batch["overlap"]
        num_bases = overlap_BTN.shape[2]
        embeddings_BVE = self.embed(views_BVCDHW)
        bases_BNE, targets_BTE = embeddings_BVE[:, :num_bases], embeddings_BVE[:, num_bases:]
        cosine_BTN = cosines(targets_BTE, bases_BNE.detach())
        prediction = overlap_loss(cosine_BTN, overlap_BTN)
        regularizer = spread_loss(cosines(bases_BNE, bases_BNE))
        guess_BTN = cosine_BTN.detach().relu()
        num_axes = views_BVCDHW.dim() - 3
        return self.output(
            self.config.prediction_weight * prediction + self.config.regularizer_weight * regularizer,
            {
                "prediction_loss": prediction,
                "regularizer": regularizer,
                "overlap_error": (guess_BTN - overlap_BTN).abs().mean(),
            },
            lambda: {
                "base crops": tile(views_BVCDHW[0, :num_bases], self.config.grid),
                "targets": side_by_side(views_BVCDHW[0, num_bases:]),
                # A row per target, a column per base crop.
                "overlaps": as_picture(overlap_BTN[0], num_axes),
                "predicted": as_picture(guess_BTN[0], num_axes),
            },
        )


def region_size(config: Any) -> tuple[int, ...]:
    """Return the size in voxels of the region tiled by base crops, for a resolved ``config``."""
    return tuple(count * side for count, side in zip(config.grid, config.crop_size))


def base_places(config: Any) -> np.ndarray:
    """Return the first voxels (N, axes) of the base crops in the region, axis 0 outermost."""
    return np.array(list(itertools.product(*map(range, config.grid)))) * config.crop_size


def overlaps(targets_TA: np.ndarray, bases_NA: np.ndarray, crop_size: Sequence[int]) -> np.ndarray:
    """Compute the share (T, N), float32, of each target crop that lies in each base crop, from their first voxels."""
    common = np.asarray(crop_size) - np.abs(targets_TA[:, None] - bases_NA)
    return (common.clip(min=0) / crop_size).prod(2).astype(np.float32)


def _resolve_grid(grid: tuple[int, ...] | None, crop: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    fitting = [size // side for size, side in zip(patch_size, crop)]
    if grid is not None:
        counts = grid * len(crop) if len(grid) == 1 else grid
    elif min(fitting[-2:]) >= 4:
        counts = (1, 4, 4)[-len(crop) :]
    else:
        counts = tuple(min(2, count) for count in fitting)
    if len(counts) != len(crop) or min(counts) < 1 or not 2 <= math.prod(counts) <= MOST_BASE_CROPS:
        problem = f"base crops of {crop} voxels are counted on {len(crop)} axes, at least 1 each and 2 to"
        raise illegal_setting("grid", counts, f"{problem} {MOST_BASE_CROPS} in all; try another pretext.crop_size")
    return counts
