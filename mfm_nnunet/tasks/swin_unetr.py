"""SwinUNETR: restore cut-out boxes, predict the rotation and contrast images, all at once (arXiv 2111.14791).

Each patch gives two views. A view is rotated by a multiple of 90 degrees; then some boxes are filled with noise, and
others replaced by the same region of another volume. Three heads work on the encoder's coarsest features. A decoder
restores the rotated, uncut patch (L1). A linear layer predicts the rotation (cross entropy). Another linear layer gives
embeddings that should agree for the two views of a patch and differ from all others (NT-Xent). Only the encoder is
trained.

Differences from the original: it reads rotation and embedding from the tokens in one corner (``heads="token"``), ours
from the average of all tokens; its noise is always in [0, 1], ours in the range of the patch.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.models.backbone import AbstractBackbone, Geometry
from mfm_nnunet.settings import LARGEST, ranged
from mfm_nnunet.tasks.base import CropRequest, PatchTransform, PretextTask, TaskOutput, illegal_setting
from mfm_nnunet.tasks.image_operations import TURNS, cut_out, is_square, mix_in, rotate, rotation_plane
from mfm_nnunet.tasks.losses import cross_entropy, gather_batch, masked_l1, nt_xent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwinUNETRConfig:
    """Settings of SwinUNETR's tasks. A loss with weight 0 is left out, and its layers too."""

    restoration_weight: float = ranged(1.0, 0, LARGEST)
    """Weight of the mean absolute error between restored and uncut patch."""
    contrast_weight: float = ranged(1.0, 0, LARGEST)
    """Weight of NT-Xent between the two views of all items of all processes."""
    rotation_weight: float = ranged(1.0, 0, LARGEST)
    """Weight of the cross entropy of the four rotations; without effect where nothing is rotated."""
    rotation_plane: tuple[int, ...] | None = None
    """Two axes of equal length that span the plane of rotation; empty: no rotation. None: the last two axes if they are
    equal, else the last equal pair, else rotation is disabled and a warning is logged."""
    cut_out_budget: float = ranged(0.3, 0, 1)
    """Largest share of a view that is cut out; shares are drawn from 0 up to it."""
    mix: bool = True
    """Mix in parts of another volume; each item then needs two volumes."""
    mix_budget: float = ranged(0.3, 0, 1)
    """Largest share of a mixed view that is replaced; shares are drawn from 0 up to it."""
    mix_probability: float = ranged(0.875, 0, 1)
    """Share of the views that are mixed: in the original the other image is any of a batch of 8, itself included."""
    box_range: tuple[float, float] = ranged((0.05, 0.25), 0, 1, above=True, ascending=True)
    """Smallest and largest side of a box, in sides of the patch, drawn per axis; at least one voxel."""
    temperature: float = ranged(0.5, 0, LARGEST, above=True)
    """Cosines are divided by it: the smaller, the more the hardest negatives count."""
    embedding_width: int = ranged(512, 1, LARGEST)
    """Width of the compared embeddings."""
    heads: Literal["pooled", "token"] = "pooled"
    """pooled: rotation and embedding are read from the average of the coarsest features; token: from the first and the
    second place of them, as published."""


class SwinUNETRTransform(PatchTransform):
    """Make ``image`` and ``target`` (2, C, D, H, W), float32: the two views, cut and uncut.

    ``rotation`` (2,), int64, is the number of quarter turns of each; ``valid`` (2, 1, D, H, W) is rotated too.
    """

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(self.patch_size, volume) for volume in range(2 if self.config.mix else 1)]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        config, plane = self.config, self.config.rotation_plane
        turns = [int(rng.integers(TURNS)) if plane else 0 for _ in range(2)]
        targets = [rotate(crops[0], turn, plane) for turn in turns]
        views = [cut_out(target.copy(), config.cut_out_budget, config.box_range, rng) for target in targets]
        for view in views:
            if config.mix and rng.random() < config.mix_probability:
                # The other image is rotated independently of the view.
                other = rotate(crops[1], int(rng.integers(TURNS)), plane)
                mix_in(view, other, config.mix_budget, config.box_range, rng)
        item = {"image": np.stack(views), "target": np.stack(targets), "rotation": np.array(turns, np.int64)}
        if valid:
            item["valid"] = np.stack([rotate(valid[0], turn, plane) for turn in turns])
        return item


class SwinUNETR(PretextTask):
    """Combine restoration, contrast and rotation losses on the encoder's coarsest features."""

    name = "swin_unetr"
    Config = SwinUNETRConfig
    Transform = SwinUNETRTransform
    trains_decoder = False
    uses_valid = True

    def __init__(self, config: SwinUNETRConfig, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        width = backbone.feature_widths()[-1]
        self.weights = _active_weights(config)
        # Layers for a loss with weight 0 are left out, so that every parameter gets a gradient.
        self.decoder = CoarseDecoder(backbone, backbone.num_inputs) if "restoration" in self.weights else None
        self.projection = nn.Linear(width, config.embedding_width) if "contrast" in self.weights else None
        self.classifier = nn.Linear(width, TURNS) if "rotation" in self.weights else None

    @classmethod
    def resolve(cls, config: SwinUNETRConfig, geometry: Geometry) -> SwinUNETRConfig:
        config = super().resolve(config, geometry)
        plane, patch_size = config.rotation_plane, geometry.patch_size
        if plane and not is_square(plane, patch_size):
            problem = f"two different, equally long axes of the patch, {patch_size}, are needed"
            raise illegal_setting("rotation_plane", plane, problem)
        if config.heads == "token" and math.prod(n // cell for n, cell in zip(patch_size, geometry.crop_cell)) < 2:
            problem = f"the patch, {patch_size}, is a single place to the encoder, and two are needed"
            raise illegal_setting("heads", config.heads, problem)
        if plane is None:
            plane = rotation_plane(patch_size)
            if not plane and not (dist.is_initialized() and dist.get_rank()):
                logger.warning(
                    "swin_unetr: no two axes of the patch, %s, are equal, so nothing is rotated and the loss of the "
                    "rotation is left out",
                    " x ".join(map(str, patch_size)),
                )
        resolved = dataclasses.replace(config, rotation_plane=plane)
        if not _active_weights(resolved):
            problem = "no loss is left, because all weights are 0 or belong to a rotation that is off"
            raise illegal_setting("restoration_weight", config.restoration_weight, problem)
        return resolved

    @classmethod
    def smallest_batch(cls, config: SwinUNETRConfig) -> int:
        """Return two with the contrastive loss, because views of a single item have no negatives."""
        return 2 if config.contrast_weight > 0 else 1

    @classmethod
    def volumes_per_item(cls, config: SwinUNETRConfig) -> int:
        return 2 if config.mix else 1

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        image_VCDHW, target_VCDHW = batch["image"].flatten(0, 1), batch["target"].flatten(0, 1)
        features = self.backbone.features(image_VCDHW)
        for_rotation_VE, for_contrast_VE = summaries(features[-1], self.config.heads)
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        pictures = {"target": target_VCDHW[0], "view": image_VCDHW[0]}
        if self.decoder is not None:
            restored_VCDHW = self.decoder(features).float()
            pictures["restored"] = restored_VCDHW[0]
            is_valid = torch.ones_like(target_VCDHW[:, :1], dtype=torch.bool)
            valid_V1DHW = batch["valid"].flatten(0, 1) if "valid" in batch else is_valid
            losses["restoration"] = masked_l1(restored_VCDHW, target_VCDHW, valid_V1DHW)
        if self.projection is not None:
            embeddings_BVE = gather_batch(self.projection(for_contrast_VE).float().unflatten(0, (-1, 2)))
            losses["contrast"] = nt_xent(embeddings_BVE[:, 0], embeddings_BVE[:, 1], self.config.temperature)
        if self.classifier is not None:
            logits_VK, turns_V = self.classifier(for_rotation_VE), batch["rotation"].flatten()
            losses["rotation"] = cross_entropy(logits_VK, turns_V)
            metrics["rotation_found"] = (logits_VK.argmax(1) == turns_V).float().mean()
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return self.output(loss, {**losses, **metrics}, lambda: {**pictures, "other view": image_VCDHW[1]})


class CoarseDecoder(nn.Module):
    """Decoder that restores an image from an encoder's coarsest features, without skips (as in arXiv 2111.14791).

    A stage is a convolution of 3 voxels, instance norm, LeakyReLU and linear upsampling. Widths and sizes are those of
    the encoder's maps in reverse order. If the finest map is coarser than the patch (tokens), further stages double the
    size and halve the width; short axes of a token are doubled last.
    """

    def __init__(self, backbone: AbstractBackbone, num_outputs: int) -> None:
        super().__init__()
        self.patch_size = backbone.patch_size
        widths = list(reversed(backbone.feature_widths()))
        total_stride = max(backbone.crop_cell())
        self.num_doublings = max(0, total_stride.bit_length() - len(widths))
        widths += [max(1, widths[-1] // 2 ** (step + 1)) for step in range(self.num_doublings)]
        is_2d = len(self.patch_size) == 2
        self.mode = "bilinear" if is_2d else "trilinear"
        convolution = nn.Conv2d if is_2d else nn.Conv3d
        norm = nn.InstanceNorm2d if is_2d else nn.InstanceNorm3d
        self.stages = nn.ModuleList(
            nn.Sequential(
                convolution(before, after, 3, padding=1, bias=False), norm(after, affine=True), nn.LeakyReLU()
            )
            for before, after in itertools.pairwise(widths)
        )
        self.output = convolution(widths[-1], num_outputs, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return (B, num_outputs, *patch_size). ``features`` are fine to coarse; only the last map's values count."""
        x = features[-1]
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # see mfm_nnunet.device.require_sound_bf16
            with torch.autocast("cpu", enabled=False):
                return self._decode(x.float(), features)
        return self._decode(x, features)

    def _decode(self, x: Tensor, features: Sequence[Tensor]) -> Tensor:
        for stage, size in zip(self.stages, self._sizes(features), strict=True):
            x = functional.interpolate(stage(x), size=size, mode=self.mode, align_corners=False)
        assert tuple(x.shape[2:]) == self.patch_size, f"{tuple(x.shape[2:])} is not {self.patch_size}"
        return self.output(x)

    def _sizes(self, features: Sequence[Tensor]) -> list[tuple[int, ...]]:
        finest = features[0].shape[2:]
        sizes = [tuple(feature.shape[2:]) for feature in reversed(features[:-1])]
        for step in reversed(range(self.num_doublings)):
            sizes.append(tuple(max(here, size // 2**step) for here, size in zip(finest, self.patch_size)))
        return sizes


def summaries(coarsest_VEdhw: Tensor, heads: Literal["pooled", "token"]) -> tuple[Tensor, Tensor]:
    """Return the inputs of the rotation and contrast heads, (V, E) each."""
    if heads == "token":
        tokens_VET = coarsest_VEdhw.flatten(2)
        return tokens_VET[..., 0], tokens_VET[..., 1]
    pooled_VE = coarsest_VEdhw.float().flatten(2).mean(2)
    return pooled_VE, pooled_VE


def _active_weights(config: SwinUNETRConfig) -> dict[str, float]:
    weights = {"restoration": config.restoration_weight, "contrast": config.contrast_weight}
    weights["rotation"] = config.rotation_weight if config.rotation_plane else 0.0
    return {name: weight for name, weight in weights.items() if weight > 0}
