"""SimCLR: overlapping crops should look alike to the encoder, all others different (arXiv 2002.05709).

Each item reads one region of a volume. ``num_references`` crops are cut from it at random places. Each is paired with a
second crop, shifted by at most half a crop per axis. Contrast, noise, sharpness and orientation of crops are changed at
random. Loss: NT-Xent between the projected, pooled features of all pairs in the batch over all processes. Two
references of one volume may overlap and still count as negatives, as in OpenMind's recipe. Only the encoder is trained.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.settings import LARGEST, ranged
from mfm_nnunet.tasks.base import CropRequest, PatchTransform, TaskOutput, illegal_setting
from mfm_nnunet.tasks.losses import gather_batch, nt_xent, pair_similarity
from mfm_nnunet.tasks.views import ViewComparison, ViewConfig, as_picture, cut_views, side_by_side


@dataclass(frozen=True)
class SimCLRConfig(ViewConfig):
    """Settings of SimCLR."""

    num_references: int = ranged(2, 1, LARGEST)
    """Pairs per item; all are cut from one region."""
    region_size: tuple[int, ...] | None = None
    """Voxels per axis of the region that the crops are cut from; one number for all axes, or one for each. None: three
    crops on the last two axes and one on the first of three, but at most the patch. Smaller volumes are taken whole."""
    max_shift: float = ranged(0.5, 0, 1, below=True)
    """Largest distance per axis between the two crops of a pair, in crops."""
    temperature: float = ranged(0.5, 0, LARGEST, above=True)
    """Cosines are divided by it: the smaller, the more the hardest negatives count."""


class SimCLRTransform(PatchTransform):
    """Cut ``image`` (2R, C, *crop): R reference crops, then their partners in the same order."""

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(self.config.region_size, pad=False)]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        starts_VA = np.concatenate(draw_pairs(self.config, crops[0].shape[1:], rng))
        return {"image": cut_views(crops[0], starts_VA, self.config.crop_size, rng, self.config.quarter_turn)}


class SimCLR(ViewComparison):
    """Find the partner of each crop among all crops of the batch."""

    name = "simclr"
    Config = SimCLRConfig
    Transform = SimCLRTransform

    @classmethod
    def resolve(cls, config: SimCLRConfig, geometry: Geometry) -> SimCLRConfig:
        config = super().resolve(config, geometry)
        assert config.crop_size is not None
        region = _resolve_region(config.region_size, config.crop_size, geometry.patch_size)
        return dataclasses.replace(config, region_size=region)

    @classmethod
    def smallest_volume(cls, config: SimCLRConfig) -> tuple[int, ...] | None:
        """Return the size of a crop, because volumes are not padded."""
        return config.crop_size

    @classmethod
    def smallest_batch(cls, config: SimCLRConfig) -> int:
        """Return the items for two pairs, because a single pair has no negatives."""
        return math.ceil(2 / config.num_references)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        views_BVCDHW = batch["image"]
        embeddings_BVE = gather_batch(self.embed(views_BVCDHW))
        first_NE, second_NE = (part_BRE.flatten(0, 1) for part_BRE in embeddings_BVE.chunk(2, dim=1))
        assert len(first_NE) >= 2, "a single pair has no negatives"
        with torch.no_grad():
            similarity, partner = pair_similarity(first_NE, second_NE)
        references_RCDHW, partners_RCDHW = views_BVCDHW[0].chunk(2)
        return self.output(
            nt_xent(first_NE, second_NE, self.config.temperature),
            {"partner_found": (similarity.argmax(1) == partner).float().mean()},
            lambda: {
                "crops": side_by_side(references_RCDHW),
                "their partners": side_by_side(partners_RCDHW),
                # Rows and columns are all crops; pairs are offset from the diagonal by half the width.
                "cosines": as_picture(similarity.nan_to_num(neginf=1), views_BVCDHW.dim() - 3),
            },
        )


def draw_pairs(config: Any, region_size: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the first voxels of reference crops and of their partners in a region: two arrays (R, axes).

    All crops lie inside the region. Partners are at most ``max_shift`` crops apart on each axis.
    """
    crop = np.asarray(config.crop_size)
    last = np.asarray(region_size) - crop
    assert (last >= 0).all(), f"a region of {region_size} is smaller than a crop of {config.crop_size}"
    reach = (config.max_shift * crop).astype(int)
    references = rng.integers(0, last, (config.num_references, len(crop)), endpoint=True)
    lower, upper = np.maximum(references - reach, 0), np.minimum(references + reach, last)
    return references, rng.integers(lower, upper, endpoint=True)


def _resolve_region(
    region_size: tuple[int, ...] | None, crop: tuple[int, ...], patch_size: tuple[int, ...]
) -> tuple[int, ...]:
    counts = (1, 3, 3)[-len(crop) :]
    region = tuple(max(side, min(count * side, size)) for count, side, size in zip(counts, crop, patch_size))
    if region_size is not None:
        region = region_size * len(crop) if len(region_size) == 1 else region_size
    if len(region) != len(crop) or any(size < side for size, side in zip(region, crop)) or region == crop:
        problem = f"needs {len(crop)} axes, none shorter than pretext.crop_size={crop} and one of them longer"
        raise illegal_setting("region_size", region, f"{problem}; else all crops are the same")
    return region
