"""Volume Fusion: two crops are mixed in blocks, and the mixing weight is segmented (arXiv 2306.16925; IEEE TIP 2025).

Each voxel of the patch is a foreground crop with weight l/K plus a background crop with weight 1 - l/K. The label l,
0 to K, is the class to predict. This is ordinary segmentation, so encoder and decoder are both trained.
PCT-Net, which was published with it, is supervised at all resolutions. Variants:

* ``grid`` (the authors' code of 2025, our default): both crops from one volume, resized and with changed contrast;
  the blocks form a regular lattice.
* ``boxes`` (the authors' code of 2023): crops of two volumes; overlapping boxes of random size.
* ``two_image`` (OpenMind): crops of two volumes with nnU-Net's intensity augmentation; some boxes erase others. The
  original always crops the centre of the volume, ours crops at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.settings import LARGEST, ranged
from mfm_nnunet.tasks.base import Augmentation, CropRequest, PatchTransform, PretextTask, TaskOutput
from mfm_nnunet.tasks.image_operations import apply_gamma, jitter, map_percentiles, resize_linear, standardise
from mfm_nnunet.tasks.losses import class_shares, cross_entropy, halving_weights, soft_dice
from mfm_nnunet.tasks.masks import draw_boxes, draw_lattice


@dataclass(frozen=True)
class VolumeFusionConfig:
    """Settings of Volume Fusion. Those after ``num_classes`` are for ``grid`` only."""

    variant: Literal["grid", "boxes", "two_image"] = "grid"
    """Published method; see above."""
    num_classes: int = ranged(4, 1, 100)
    """K: foreground weights are 1/K to 1. With pure background (class 0) the network has K + 1 outputs."""
    foreground_fraction: float = ranged(0.7, 0, 1, above=True)
    """Of n cells exactly int(foreground_fraction x n) are mixed."""
    cell_range: tuple[int, int] = ranged((8, 32), 1, LARGEST, ascending=True)
    """Smallest and largest side of a cell in voxels, on axes of at least 64; proportionally less on shorter ones."""
    scale_range: tuple[float, float] = ranged((0.7, 1.5), 0, 10, above=True, ascending=True)
    """Size of a crop before it is resized, in patch sizes, drawn per axis."""


class VolumeFusionTransform(PatchTransform):
    """Make ``image`` (C, D, H, W) float32, the fused patch, and ``label`` (D, H, W) uint8, 0 to K."""

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        if self.config.variant != "grid":
            return [CropRequest(self.patch_size, volume) for volume in range(2)]
        smallest, largest = self.config.scale_range
        scales = rng.uniform(smallest, largest, (2, len(self.patch_size)))
        sizes = [tuple(max(1, int(size * scale)) for size, scale in zip(self.patch_size, row)) for row in scales]
        return [CropRequest(size, pad=False) for size in sizes]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        foreground, background = self.prepare(crops, rng)
        label = draw_label(self.config, self.patch_size, rng)
        fused = fuse(foreground, background, label, self.config.num_classes)
        # The grid variant mixes intensities in [0, 1], but fine-tuning uses z-scored images.
        return {"image": standardise(fused) if self.config.variant == "grid" else fused, "label": label}

    def prepare(self, crops: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Prepare foreground and background (C, *patch) for mixing."""
        if self.config.variant == "boxes":
            return crops
        if self.config.variant == "two_image":
            return [jitter(crop, rng) for crop in crops]
        views = [_random_view(resize_linear(crop, self.patch_size), rng) for crop in crops]
        return [1 - view for view in views] if rng.random() < 0.25 else views


class VolumeFusion(PretextTask):
    """Segment the fused patch: K + 1 outputs, Dice and cross entropy."""

    name = "volume_fusion"
    Config = VolumeFusionConfig
    Transform = VolumeFusionTransform
    pictures_are = "mirrored"

    def __init__(self, config: VolumeFusionConfig, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        backbone.supervise_deeply()

    @classmethod
    def volumes_per_item(cls, config: VolumeFusionConfig) -> int:
        """Return two for ``boxes`` and ``two_image``, because mixing a volume with itself is invisible."""
        return 1 if config.variant == "grid" else 2

    @classmethod
    def augmentation(cls, config: VolumeFusionConfig) -> Augmentation:
        # grid does its own mirroring; boxes has no augmentation in the original.
        return "mirror" if config.variant == "two_image" else "none"

    @classmethod
    def num_outputs(cls, config: VolumeFusionConfig, num_inputs: int) -> int:
        return config.num_classes + 1

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        image_BCDHW, label_BDHW = batch["image"], batch["label"]
        logits_BKDHW, *coarser = self.backbone.outputs(image_BCDHW)
        is_openmind = self.config.variant == "two_image"
        dice = soft_dice(logits_BKDHW, label_BDHW, over_batch=not is_openmind)
        entropy = cross_entropy(logits_BKDHW, label_BDHW)
        loss = 1 - dice + entropy
        if coarser:  # each is compared with the share of every class in its voxels
            losses, num_classes = [loss], self.config.num_classes + 1
            for coarse_BKDHW in coarser:
                shares_BKDHW = class_shares(label_BDHW, num_classes, coarse_BKDHW.shape[2:])
                coarse_dice = soft_dice(coarse_BKDHW, shares_BKDHW, over_batch=not is_openmind)
                losses.append(1 - coarse_dice + cross_entropy(coarse_BKDHW, shares_BKDHW))
            loss = torch.stack(losses).dot(torch.tensor(halving_weights(len(losses)), device=loss.device))
        return self.output(
            loss * (1.0 if is_openmind else 0.5),
            {"soft_dice": dice, "cross_entropy": entropy},
            lambda: {"fused": image_BCDHW[0], "label": label_BDHW[:1], "prediction": logits_BKDHW[:1].argmax(1)},
        )


def fuse(
    foreground_CDHW: np.ndarray, background_CDHW: np.ndarray, label_DHW: np.ndarray, num_classes: int
) -> np.ndarray:
    """Compute (l/K) foreground + (1 - l/K) background, with one weight for all channels."""
    weight = label_DHW.astype(np.float32) / np.float32(num_classes)
    return weight * foreground_CDHW + (1 - weight) * background_CDHW


def draw_label(config: Any, patch_size: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Draw a class map (D, H, W), uint8, 0 to K, for the variant of ``config``."""
    if config.variant == "grid":
        return draw_lattice(patch_size, config.cell_range, config.foreground_fraction, config.num_classes, rng)
    return draw_boxes(patch_size, config.num_classes, rng, erases=config.variant == "two_image")


def _random_view(x_CDHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror each axis with p 0.5 and change contrast and gamma; the result is in [0, 1]."""
    x_CDHW = np.flip(x_CDHW, tuple(np.flatnonzero(rng.random(x_CDHW.ndim - 1) < 0.5) + 1))
    x_CDHW = map_percentiles(x_CDHW, rng.uniform(0.1, 2), rng.uniform(98, 99.9))
    return apply_gamma(x_CDHW, rng.uniform(0.7, 1.5))
