"""VoCo: from the embedding of a crop the network is to tell where in the volume it lies (arXiv 2402.17300).

Per item one region of a volume is cut into a grid of base crops, and ``num_targets`` target crops are cut from it at
random places. Contrast, noise, sharpness and orientation of each crop are changed by chance. What is to be told: how
much of a target lies in each base crop, by the cosine of their projected, pooled features. A regulariser makes base
crops differ. Only the encoder is trained.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone, Geometry
from mfm_nnunet.tasks.base import CropRequest, ItemTransform, PretextTask, TaskOutput
from mfm_nnunet.tasks.heads import embed_views, make_projector
from mfm_nnunet.tasks.losses import cosines, overlap_loss, spread_loss
from mfm_nnunet.tasks.views import (
    as_picture,
    cut_views,
    require_legal,
    resolve_crop_size,
    resolve_per_axis,
    resolve_quarter_turn,
    side_by_side,
    tiled,
)

MOST_BASE_CROPS = 64


@dataclass(frozen=True)
class VoCoConfig:
    """Settings of VoCo."""

    crop_size: tuple[int, ...] | None = None
    """Voxels per axis of a crop; one number for all axes, or one for each. None: 64 on axes of at least 128 voxels,
    else about half the patch, in multiples of what the network needs."""
    grid: tuple[int, ...] | None = None
    """Base crops per axis; one number for all axes, or one for each. None: 1, 4 and 4 where the patch is as large (in
    2D 4 and 4), else 2 on each axis that holds two crops."""
    num_targets: int = 4
    """Target crops per item."""
    prediction_weight: float = 1.0
    """Weight of the loss of the predicted overlaps."""
    regularizer_weight: float = 1.0
    """Weight of the loss that makes base crops differ."""
    projector_width: int = 2048
    """Width of the layers behind the encoder, which are not shipped."""
    quarter_turn: float | None = None
    """Probability of a rotation by 90, 180 or 270 degrees in the plane of the last two axes. None: 0.3 where a crop is
    as long on both, else 0. Set it to 0 where their spacings differ."""


@dataclass(frozen=True)
class VoCoTransform(ItemTransform):
    """Makes ``image`` (N + T, C, *crop), base crops in the order of the grid, then targets; and ``overlap`` (T, N)."""

    config: VoCoConfig

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(region_size(self.config))]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        config = self.config
        assert config.crop_size is not None, "the config is not resolved"
        assert config.quarter_turn is not None, "the config is not resolved"
        bases_NA = base_places(config)
        targets_TA = rng.integers(0, bases_NA[-1], (config.num_targets, len(config.crop_size)), endpoint=True)
        places_VA = np.concatenate([bases_NA, targets_TA])
        return {
            "image": cut_views(crops[0], places_VA, config.crop_size, rng, config.quarter_turn),
            "overlap": overlaps(targets_TA, bases_NA, config.crop_size),
        }


class VoCo(PretextTask):
    """Pooled features of all stages, a projector of three layers, cosines between targets and base crops."""

    name = "voco"
    Config = VoCoConfig
    hides = "where a crop lies in the grid of base crops"
    recipe = "8 x 256x256x64"
    paper = "arXiv 2402.17300"
    trains_decoder = False
    citations: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "Pretraining Method",
            "name": "VoCo",
            "apa_citations": [
                "Wu, L., Zhuang, J., & Chen, H. (2024). VoCo: A Simple-yet-Effective Volume Contrastive Learning "
                "Framework for 3D Medical Image Analysis. CVPR, 22873-22882.",
            ],
        }
    ]

    def __init__(self, config: VoCoConfig, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        self.projector = make_projector(backbone, config.projector_width)

    @classmethod
    def resolve(cls, config: VoCoConfig, geometry: Geometry) -> VoCoConfig:
        """Fills in the sizes and checks everything. Raises MFMError (E_CONFIG)."""
        weights = (config.prediction_weight, config.regularizer_weight)
        require_legal(
            [
                (config.num_targets >= 1, f"num_targets={config.num_targets}: must be at least 1"),
                (weights[0] > 0, f"prediction_weight={weights[0]}: must be greater than 0"),
                (weights[1] >= 0, f"regularizer_weight={weights[1]}: must not be below 0"),
                (config.projector_width >= 1, f"projector_width={config.projector_width}: must be at least 1"),
            ]
        )
        crop = resolve_crop_size(config.crop_size, geometry)
        return dataclasses.replace(
            config,
            crop_size=crop,
            grid=_resolve_grid(config.grid, crop, geometry.patch_size),
            quarter_turn=resolve_quarter_turn(config.quarter_turn, crop),
        )

    @classmethod
    def smallest_volume(cls, config: VoCoConfig) -> tuple[int, ...] | None:
        """So much that of the outermost base crops at most half lies in the zeros around the volume."""
        assert config.crop_size is not None, "the config is not resolved"
        return tuple(max(side, size - side) for side, size in zip(config.crop_size, region_size(config)))

    @classmethod
    def num_outputs(cls, config: VoCoConfig, num_inputs: int) -> int:
        """The decoder's outputs are not used."""
        return num_inputs

    @classmethod
    def transform(cls, config: VoCoConfig, patch_size: tuple[int, ...]) -> VoCoTransform:
        return VoCoTransform(config)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        views_BVCDHW, overlap_BTN = batch["image"], batch["overlap"]
        num_bases = overlap_BTN.shape[2]
        embeddings_BVE = embed_views(self.backbone, self.projector, views_BVCDHW)
        bases_BNE, targets_BTE = embeddings_BVE[:, :num_bases], embeddings_BVE[:, num_bases:]
        cosine_BTN = cosines(targets_BTE, bases_BNE.detach())
        prediction = overlap_loss(cosine_BTN, overlap_BTN)
        regularizer = spread_loss(cosines(bases_BNE, bases_BNE))
        loss = self.config.prediction_weight * prediction + self.config.regularizer_weight * regularizer
        guess_BTN = cosine_BTN.detach().relu()
        metrics = {
            "prediction_loss": prediction.detach(),
            "regularizer": regularizer.detach(),
            "overlap_error": (guess_BTN - overlap_BTN).abs().mean(),
        }
        pictures = None
        if not self.training:
            num_axes = views_BVCDHW.dim() - 3
            pictures = {
                "base crops": tiled(views_BVCDHW[0, :num_bases], self.config.grid),
                "targets": side_by_side(views_BVCDHW[0, num_bases:]),
                # A row per target, a column per base crop.
                "overlaps": as_picture(overlap_BTN[0], num_axes),
                "predicted": as_picture(guess_BTN[0], num_axes),
            }
        return TaskOutput(loss, metrics, pictures)


def region_size(config: VoCoConfig) -> tuple[int, ...]:
    """Voxels per axis of the region that the base crops tile, for a resolved ``config``."""
    assert config.crop_size is not None, "the config is not resolved"
    assert config.grid is not None, "the config is not resolved"
    return tuple(count * side for count, side in zip(config.grid, config.crop_size))


def base_places(config: VoCoConfig) -> np.ndarray:
    """Where the base crops start in the region, (N, axes), axis 0 outermost: side by side, without overlap."""
    assert config.grid is not None, "the config is not resolved"
    return np.array(list(itertools.product(*map(range, config.grid)))) * config.crop_size


def overlaps(targets_TA: np.ndarray, bases_NA: np.ndarray, crop_size: Sequence[int]) -> np.ndarray:
    """Share (T, N), float32, of each target crop that lies in each base crop; places as given by their first voxels."""
    common = np.asarray(crop_size) - np.abs(targets_TA[:, None] - bases_NA)
    return (common.clip(min=0) / crop_size).prod(2).astype(np.float32)


def _resolve_grid(grid: tuple[int, ...] | None, crop: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    counts = _auto_grid(crop, patch_size) if grid is None else resolve_per_axis(grid, len(crop))
    is_legal = len(counts) == len(crop) and min(counts) >= 1 and 2 <= math.prod(counts) <= MOST_BASE_CROPS
    if not is_legal:
        raise MFMError(
            "E_CONFIG",
            f"pretext.grid={counts}: base crops of {crop} voxels must be counted on {len(crop)} axes, at least 1 each "
            f"and 2 to {MOST_BASE_CROPS} in all. Choose another grid, or smaller crops with pretext.crop_size.",
        )
    return counts


def _auto_grid(crop: tuple[int, ...], patch_size: tuple[int, ...]) -> tuple[int, ...]:
    fitting = [size // side for size, side in zip(patch_size, crop)]
    if min(fitting[-2:]) >= 4:
        return (1, 4, 4)[-len(crop) :]
    return tuple(min(2, count) for count in fitting)
