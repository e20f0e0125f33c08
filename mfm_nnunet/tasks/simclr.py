"""SimCLR: crops that overlap are to look alike to the encoder, all others different (arXiv 2002.05709).

Per item one region of a volume is read. In it lie ``num_references`` crops at random places and, for each of them, a
second one shifted by at most half a crop per axis: a pair. Contrast, noise, sharpness and orientation of each crop are
changed by chance. Loss: NT-Xent between the projected, pooled features of all pairs of all items of all processes. Two
references of one volume may overlap and still count as different, as in OpenMind's recipe. Only the encoder is trained.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone, Geometry
from mfm_nnunet.tasks.base import CropRequest, ItemTransform, PretextTask, TaskOutput
from mfm_nnunet.tasks.gather import gather_batch
from mfm_nnunet.tasks.heads import embed_views, make_projector
from mfm_nnunet.tasks.losses import nt_xent, pair_similarity
from mfm_nnunet.tasks.views import (
    as_picture,
    cut_views,
    require_legal,
    resolve_crop_size,
    resolve_per_axis,
    resolve_quarter_turn,
    side_by_side,
)


@dataclass(frozen=True)
class SimCLRConfig:
    """Settings of SimCLR."""

    num_references: int = 2
    """Pairs per item; all are cut from one region."""
    crop_size: tuple[int, ...] | None = None
    """Voxels per axis of a crop; one number for all axes, or one for each. None: 64 on axes of at least 128 voxels,
    else about half the patch, in multiples of what the network needs."""
    region_size: tuple[int, ...] | None = None
    """Voxels per axis of what the crops are cut from; one number for all axes, or one for each. None: three crops on
    the last two axes and one on the first of three, but not more than the patch. Smaller volumes are taken whole."""
    max_shift: float = 0.5
    """Largest distance per axis between the two crops of a pair, in crops."""
    temperature: float = 0.5
    """Cosines are divided by it: the smaller, the more the hardest negatives count."""
    projector_width: int = 2048
    """Width of the layers behind the encoder, which are not shipped."""
    quarter_turn: float | None = None
    """Probability of a rotation by 90, 180 or 270 degrees in the plane of the last two axes. None: 0.3 where a crop is
    as long on both, else 0. Set it to 0 where their spacings differ."""


@dataclass(frozen=True)
class SimCLRTransform(ItemTransform):
    """Makes ``image`` (2R, C, *crop): the R reference crops, then their partners in the same order."""

    config: SimCLRConfig

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        assert self.config.region_size is not None, "the config is not resolved"
        return [CropRequest(self.config.region_size, pad=False)]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        config = self.config
        assert config.crop_size is not None, "the config is not resolved"
        assert config.quarter_turn is not None, "the config is not resolved"
        starts_VA = np.concatenate(draw_pairs(config, crops[0].shape[1:], rng))
        return {"image": cut_views(crops[0], starts_VA, config.crop_size, rng, config.quarter_turn)}


class SimCLR(PretextTask):
    """Pooled features of all stages, a projector of three layers, NT-Xent."""

    name = "simclr"
    Config = SimCLRConfig
    hides = "pairs of shifted crops are found among all others"
    recipe = "32 x 192x192x64"
    paper = "arXiv 2002.05709"
    trains_decoder = False
    citations: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "Pretraining Method",
            "name": "SimCLR",
            "apa_citations": [
                "Chen, T., Kornblith, S., Norouzi, M., & Hinton, G. (2020). A Simple Framework for Contrastive "
                "Learning of Visual Representations. ICML, 1597-1607.",
            ],
        }
    ]

    def __init__(self, config: SimCLRConfig, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        self.projector = make_projector(backbone, config.projector_width)

    @classmethod
    def resolve(cls, config: SimCLRConfig, geometry: Geometry) -> SimCLRConfig:
        """Fills in the sizes and checks everything. Raises MFMError (E_CONFIG)."""
        require_legal(
            [
                (config.num_references >= 1, f"num_references={config.num_references}: must be at least 1"),
                (0 <= config.max_shift < 1, f"max_shift={config.max_shift}: legal is 0 up to below 1 crop"),
                (config.temperature > 0, f"temperature={config.temperature}: must be greater than 0"),
                (config.projector_width >= 1, f"projector_width={config.projector_width}: must be at least 1"),
            ]
        )
        crop = resolve_crop_size(config.crop_size, geometry)
        return dataclasses.replace(
            config,
            crop_size=crop,
            region_size=_resolve_region(config.region_size, crop, geometry.patch_size),
            quarter_turn=resolve_quarter_turn(config.quarter_turn, crop),
        )

    @classmethod
    def smallest_volume(cls, config: SimCLRConfig) -> tuple[int, ...] | None:
        """One crop: nothing is padded."""
        return config.crop_size

    @classmethod
    def smallest_batch(cls, config: SimCLRConfig) -> int:
        """As many items as make two pairs: a single pair has nothing to be told from."""
        return math.ceil(2 / config.num_references)

    @classmethod
    def num_outputs(cls, config: SimCLRConfig, num_inputs: int) -> int:
        """The decoder's outputs are not used."""
        return num_inputs

    @classmethod
    def transform(cls, config: SimCLRConfig, patch_size: tuple[int, ...]) -> SimCLRTransform:
        return SimCLRTransform(config)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        views_BVCDHW = batch["image"]
        embeddings_BVE = gather_batch(embed_views(self.backbone, self.projector, views_BVCDHW))
        first_BRE, second_BRE = embeddings_BVE.chunk(2, dim=1)
        first_NE, second_NE = first_BRE.flatten(0, 1), second_BRE.flatten(0, 1)
        assert len(first_NE) >= 2, "a single pair has nothing to be told from"
        loss = nt_xent(first_NE, second_NE, self.config.temperature)
        with torch.no_grad():
            similarity, partner = pair_similarity(first_NE, second_NE)
            found = (similarity.argmax(1) == partner).float().mean()
        pictures = None
        if not self.training:
            references, partners = views_BVCDHW[0].chunk(2)
            pictures = {
                "crops": side_by_side(references),
                "their partners": side_by_side(partners),
                # Rows and columns are all crops; pairs lie half the width off the diagonal.
                "cosines": as_picture(similarity.nan_to_num(neginf=1), views_BVCDHW.dim() - 3),
            }
        return TaskOutput(loss, {"partner_found": found}, pictures)


def draw_pairs(
    config: SimCLRConfig, region_size: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where the reference crops start in a region of this size, and where their partners: two arrays (R, axes).

    Both lie inside the region; they are at most ``max_shift`` crops apart on each axis.
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
    num_axes = len(crop)
    if region_size is None:
        counts = (1, 3, 3)[-num_axes:]
        region = tuple(max(side, min(count * side, size)) for count, side, size in zip(counts, crop, patch_size))
    else:
        region = resolve_per_axis(region_size, num_axes)
    if len(region) != num_axes or any(size < side for size, side in zip(region, crop)) or region == crop:
        raise MFMError(
            "E_CONFIG",
            f"pretext.region_size={region}: it needs {num_axes} axes, none shorter than pretext.crop_size={crop} and "
            "one of them longer, else all crops are the same. Choose a larger region or smaller crops.",
        )
    return region
