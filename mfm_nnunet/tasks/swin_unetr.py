"""SwinUNETR's tasks: restore what was cut out, find the rotation, tell images apart, all at once (arXiv 2111.14791).

Of each patch two views are made: rotated by a multiple of 90 degrees, then boxes are cut out and filled with noise, and
others are replaced by the same region of another volume. From the encoder's coarsest features a decoder of the task's
own restores the rotated, uncut patch (L1), one linear layer finds the rotation (cross entropy) and another gives the
embeddings by which the two views of a patch are told from all others (NT-Xent). Only the encoder is trained.

The original reads rotation and embedding from the tokens in one corner (``heads="token"``), ours from the average of
all of them; its noise lies in [0, 1] whatever the image's range, ours in the range of the patch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone, Geometry
from mfm_nnunet.tasks.base import CropRequest, ItemTransform, PretextTask, TaskOutput
from mfm_nnunet.tasks.coarse_decoder import CoarseDecoder
from mfm_nnunet.tasks.cut_outs import TURNS, cut_out, is_square, mix_in, rotated, rotation_plane
from mfm_nnunet.tasks.gather import gather_batch, is_first_process
from mfm_nnunet.tasks.heads import pool
from mfm_nnunet.tasks.losses import cross_entropy, masked_l1, nt_xent
from mfm_nnunet.tasks.views import require_legal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwinUNETRConfig:
    """Settings of SwinUNETR's tasks. A loss with weight 0 is left out, and its layers too."""

    restoration_weight: float = 1.0
    """Of the mean absolute error between restored and uncut patch."""
    contrast_weight: float = 1.0
    """Of NT-Xent between the two views of all items of all processes."""
    rotation_weight: float = 1.0
    """Of the cross entropy of the four rotations; without effect where nothing is rotated."""
    rotation_plane: tuple[int, ...] | None = None
    """The two axes, of equal length, in which views are rotated; empty: no rotation. None: the last two axes if they
    are equal, else the last equal pair, else no rotation, which is said."""
    cut_out_budget: float = 0.3
    """Of each view a share between 0 and this is cut out."""
    mix: bool = True
    """Whether parts of another volume are mixed in; each item then needs two volumes."""
    mix_budget: float = 0.3
    """Of a mixed view a share between 0 and this is replaced."""
    mix_probability: float = 0.875
    """Share of the views that are mixed: in the original the other image is any of a batch of 8, itself included."""
    box_range: tuple[float, float] = (0.05, 0.25)
    """Smallest and largest side of a box, in sides of the patch, drawn per axis; at least one voxel."""
    temperature: float = 0.5
    """Cosines are divided by it: the smaller, the more the hardest negatives count."""
    embedding_width: int = 512
    """Width of the embeddings that are compared."""
    heads: Literal["pooled", "token"] = "pooled"
    """pooled: rotation and embedding are read from the average of the coarsest features; token: from the first and the
    second place of them, as published."""


@dataclass(frozen=True)
class SwinUNETRTransform(ItemTransform):
    """Makes ``image`` and ``target`` (2, C, D, H, W), float32: the two views, and what is to be restored of each.

    ``rotation`` (2,), int64, are the quarter turns of each; ``valid`` (2, 1, D, H, W) is turned alike.
    """

    config: SwinUNETRConfig
    patch_size: tuple[int, ...]

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(self.patch_size, volume) for volume in range(2 if self.config.mix else 1)]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        config, plane = self.config, self.config.rotation_plane
        assert plane is not None, "the config is not resolved"
        turns = [int(rng.integers(TURNS)) if plane else 0 for _ in range(2)]
        targets = [rotated(crops[0], turn, plane) for turn in turns]
        views = [cut_out(target.copy(), config.cut_out_budget, config.box_range, rng) for target in targets]
        for view in views:
            if config.mix and rng.random() < config.mix_probability:
                # The other image has a rotation of its own, which says nothing about that of the view.
                other = rotated(crops[1], int(rng.integers(TURNS)), plane)
                mix_in(view, other, config.mix_budget, config.box_range, rng)
        item = {"image": np.stack(views), "target": np.stack(targets), "rotation": np.array(turns, np.int64)}
        if valid:
            item["valid"] = np.stack([rotated(valid[0], turn, plane) for turn in turns])
        return item


class SwinUNETR(PretextTask):
    """Three losses on the encoder's coarsest features."""

    name = "swin_unetr"
    Config = SwinUNETRConfig
    hides = "boxes are cut out or mixed in, the patch is rotated, views are told apart"
    recipe = "8 x 160x160x160"
    paper = "arXiv 2111.14791"
    trains_decoder = False
    uses_valid = True
    citations: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "Pretraining Method",
            "name": "SwinUNETR",
            "apa_citations": [
                "Tang, Y., Yang, D., Li, W., Roth, H. R., Landman, B., Xu, D., Nath, V., & Hatamizadeh, A. (2022). "
                "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis. CVPR, 20730-20740.",
            ],
        }
    ]

    def __init__(self, config: SwinUNETRConfig, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        assert config.rotation_plane is not None, "the config is not resolved"
        width = backbone.feature_widths()[-1]
        self.weights = {
            name: weight
            for name, weight in (
                ("restoration", config.restoration_weight),
                ("contrast", config.contrast_weight),
                ("rotation", config.rotation_weight if config.rotation_plane else 0.0),
            )
            if weight > 0
        }
        # What a loss without weight would need is not made, so every weight that there is learns.
        self.decoder = CoarseDecoder(backbone, backbone.num_inputs) if "restoration" in self.weights else None
        self.projection = nn.Linear(width, config.embedding_width) if "contrast" in self.weights else None
        self.classifier = nn.Linear(width, TURNS) if "rotation" in self.weights else None

    @classmethod
    def resolve(cls, config: SwinUNETRConfig, geometry: Geometry) -> SwinUNETRConfig:
        """Chooses the plane of rotation and checks everything. Raises MFMError (E_CONFIG)."""
        require_legal(_rules(config, geometry))
        plane = config.rotation_plane
        if plane is None:
            plane = rotation_plane(geometry.patch_size)
            if not plane and is_first_process():
                logger.warning(
                    "swin_unetr: no two axes of the patch, %s, are equal, so nothing is rotated and the loss of the "
                    "rotation is left out",
                    " x ".join(map(str, geometry.patch_size)),
                )
        resolved = dataclasses.replace(config, rotation_plane=plane)
        has_loss = config.restoration_weight + config.contrast_weight + (config.rotation_weight if plane else 0) > 0
        require_legal([(has_loss, f"restoration_weight={config.restoration_weight}: no loss is left, because all "
                        "weights are 0 or belong to a rotation that is off")])  # fmt: skip
        return resolved

    @classmethod
    def smallest_batch(cls, config: SwinUNETRConfig) -> int:
        """Two where views are compared: those of a single item have nothing to be told from."""
        return 2 if config.contrast_weight > 0 else 1

    @classmethod
    def volumes_per_item(cls, config: SwinUNETRConfig) -> int:
        """Two with ``pretext.mix``, else one."""
        return 2 if config.mix else 1

    @classmethod
    def num_outputs(cls, config: SwinUNETRConfig, num_inputs: int) -> int:
        """The network's own outputs are not used."""
        return num_inputs

    @classmethod
    def transform(cls, config: SwinUNETRConfig, patch_size: tuple[int, ...]) -> SwinUNETRTransform:
        return SwinUNETRTransform(config, patch_size)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        image_VCDHW, target_VCDHW = batch["image"].flatten(0, 1), batch["target"].flatten(0, 1)
        features = self.backbone.features(image_VCDHW)
        for_rotation_VE, for_contrast_VE = summaries(features[-1], self.config.heads)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        restored_VCDHW = None
        if self.decoder is not None:
            restored_VCDHW = self.decoder(features).float()
            valid_V1DHW = batch["valid"].flatten(0, 1) if "valid" in batch else _all_valid(target_VCDHW)
            losses["restoration"] = masked_l1(restored_VCDHW, target_VCDHW, valid_V1DHW)
        if self.projection is not None:
            embeddings_BVE = gather_batch(self.projection(for_contrast_VE).float().unflatten(0, (-1, 2)))
            losses["contrast"] = nt_xent(embeddings_BVE[:, 0], embeddings_BVE[:, 1], self.config.temperature)
        if self.classifier is not None:
            logits_VK, turns_V = self.classifier(for_rotation_VE), batch["rotation"].flatten()
            losses["rotation"] = cross_entropy(logits_VK, turns_V)
            metrics["rotation_found"] = (logits_VK.detach().argmax(1) == turns_V).float().mean()
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        metrics = {**{name: value.detach() for name, value in losses.items()}, **metrics}
        pictures = None if self.training else _pictures(image_VCDHW, target_VCDHW, restored_VCDHW)
        return TaskOutput(loss, metrics, pictures)


def summaries(coarsest_VEdhw: Tensor, heads: Literal["pooled", "token"]) -> tuple[Tensor, Tensor]:
    """What rotation and embedding are read from, (V, E) each."""
    if heads == "token":
        tokens_VET = coarsest_VEdhw.flatten(2)
        return tokens_VET[..., 0], tokens_VET[..., 1]
    pooled_VE = pool([coarsest_VEdhw])
    return pooled_VE, pooled_VE


def _all_valid(image_VCDHW: Tensor) -> Tensor:
    return torch.ones_like(image_VCDHW[:, :1], dtype=torch.bool)


def _pictures(image_VCDHW: Tensor, target_VCDHW: Tensor, restored_VCDHW: Tensor | None) -> dict[str, Tensor]:
    pictures = {"target": target_VCDHW[0].float(), "view": image_VCDHW[0].float()}
    if restored_VCDHW is not None:
        pictures["restored"] = restored_VCDHW[0].detach()
    return {**pictures, "other view": image_VCDHW[1].float()}


def _rules(config: SwinUNETRConfig, geometry: Geometry) -> list[tuple[bool, str]]:
    patch_size, plane, (low, high) = geometry.patch_size, config.rotation_plane, config.box_range
    weights = ("restoration_weight", "contrast_weight", "rotation_weight")
    shares = ("cut_out_budget", "mix_budget", "mix_probability")
    places = math.prod(size // cell for size, cell in zip(patch_size, geometry.crop_cell))
    is_plane = plane is None or not plane or is_square(plane, patch_size)
    return [
        *((getattr(config, name) >= 0, f"{name}={getattr(config, name)}: must not be below 0") for name in weights),
        *((0 <= getattr(config, name) <= 1, f"{name}={getattr(config, name)}: legal is 0 to 1") for name in shares),
        (0 < low <= high <= 1, f"box_range={config.box_range}: legal are two sides, above 0 and up to 1"),
        (config.temperature > 0, f"temperature={config.temperature}: must be greater than 0"),
        (config.embedding_width >= 1, f"embedding_width={config.embedding_width}: must be at least 1"),
        (is_plane, f"rotation_plane={plane}: two different axes of the patch, {patch_size}, that are equally long"),
        (
            config.heads == "pooled" or places > 1,
            f"heads={config.heads}: the patch, {patch_size}, is a single place to the encoder, and two are needed",
        ),
    ]
