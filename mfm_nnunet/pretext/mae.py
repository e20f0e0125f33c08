"""Masked autoencoder: most of the patch is hidden and restored from the rest (arXiv 2111.06377, 2410.23132).

What is hidden: 75 % of the cells of a regular grid. U-Nets see the patch with the hidden voxels filled; Primus sees the
visible tokens only. Target: the hidden voxels as they were, in the plan's normalisation. Loss: mean squared error on
them alone. The cells are 16 voxels wide (less in small patches) for U-Nets, and the tokens for Primus.
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
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.pretext.base import Augmentation, CropRequest, ItemTransform, PretextTask, TaskOutput
from mfm_nnunet.pretext.losses import masked_mse
from mfm_nnunet.pretext.masks import auto_cell_size, cell_grid, draw_hidden, num_hidden_cells


@dataclass(frozen=True)
class MAEConfig:
    """Settings of MAE."""

    mask_ratio: float = 0.75
    """Share of the cells that are hidden; of n cells exactly int(mask_ratio x n), in every sample."""
    cell_size: tuple[int, ...] | None = None
    """Voxels per axis of a cell; one number for all axes, or one for each. None: the tokens of Primus; for U-Nets 16 on
    axes of at least 64 voxels and a quarter of the axis (at least 4) on shorter ones."""
    fill_value: float = 0.0
    """What U-Nets see at hidden voxels, in normalised units; 0 is the mean of z-scored images."""


@dataclass(frozen=True)
class MAETransform(ItemTransform):
    """Adds the mask: ``image`` (C, D, H, W) float32 and ``hidden`` (1, D, H, W) bool."""

    config: MAEConfig
    patch_size: tuple[int, ...]

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(self.patch_size)]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        assert self.config.cell_size is not None, "the config is not resolved"
        hidden = draw_hidden(self.patch_size, self.config.cell_size, self.config.mask_ratio, rng)
        return {"image": crops[0], "hidden": hidden, **({"valid": valid[0]} if valid else {})}


class MAE(PretextTask):
    """The network restores hidden voxels through its own head: one output per image channel."""

    name = "mae"
    Config = MAEConfig
    hides = "75 % of the cells of a grid"
    recipe = "8 x 160x160x160"
    paper = "arXiv 2410.23132"
    restoring = "drop"
    uses_valid = True
    citations: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "Pretraining Method",
            "name": "MAE",
            "apa_citations": [
                "He, K., Chen, X., Xie, S., Li, Y., Dollár, P., & Girshick, R. (2022). Masked Autoencoders Are "
                "Scalable Vision Learners. CVPR, 16000-16009.",
                "Wald, T., Ulrich, C., Lukyanenko, S., Goncharov, A., Paderno, A., Miller, M., Maerkisch, L., Jaeger, "
                "P., & Maier-Hein, K. (2025). Revisiting MAE Pre-training for 3D Medical Image Segmentation. CVPR, "
                "5186-5196.",
            ],
        }
    ]

    @classmethod
    def resolve(cls, config: MAEConfig, geometry: Geometry) -> MAEConfig:
        """Fills in ``cell_size`` and checks that masks can be drawn with it. Raises MFMError (E_CONFIG)."""
        patch_size, mask_cell = geometry.patch_size, geometry.mask_cell
        cell = config.cell_size
        if cell is None:
            cell = mask_cell if max(mask_cell) > 1 else auto_cell_size(patch_size)
        elif len(cell) == 1:
            cell = cell * len(patch_size)
        problem = _problem_of_cell(cell, patch_size, mask_cell)
        if problem:
            raise MFMError("E_CONFIG", f"pretext.cell_size={cell}: {problem}. Leave it out for the default.")
        num_cells = math.prod(cell_grid(patch_size, cell))
        if not 0 < config.mask_ratio < 1 or num_hidden_cells(patch_size, cell, config.mask_ratio) == 0:
            raise MFMError(
                "E_CONFIG",
                f"pretext.mask_ratio={config.mask_ratio}: it must be between 0 and 1 and hide at least one of the "
                f"{num_cells} cells of {cell} voxels in a patch of {patch_size}. Change it or use smaller cells.",
            )
        return dataclasses.replace(config, cell_size=cell)

    @classmethod
    def augmentation(cls, config: MAEConfig) -> Augmentation:
        return "spatial"

    @classmethod
    def num_outputs(cls, config: MAEConfig, num_inputs: int) -> int:
        return num_inputs

    @classmethod
    def transform(cls, config: MAEConfig, patch_size: tuple[int, ...]) -> MAETransform:
        return MAETransform(config, patch_size)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        image_BCDHW, hidden_B1DHW = batch["image"], batch["hidden"]
        restored_BCDHW = self.backbone.restore(image_BCDHW, hidden_B1DHW, self.config.fill_value)
        counted_B1DHW = hidden_B1DHW & batch["valid"] if "valid" in batch else hidden_B1DHW
        loss = masked_mse(restored_BCDHW, image_BCDHW, counted_B1DHW)
        with torch.no_grad():
            # 0 is the constant guess of the mean; 1 is perfect.
            explained = 1 - loss / masked_mse(torch.zeros_like(image_BCDHW), image_BCDHW, counted_B1DHW).clamp(min=1e-8)
        pictures = None
        if not self.training:
            image, hidden = image_BCDHW[0].float(), hidden_B1DHW[0]
            pictures = {
                "image": image,
                "visible": image.masked_fill(hidden, self.config.fill_value),
                "restored": torch.where(hidden, restored_BCDHW[0].detach().float(), image),
            }
        return TaskOutput(loss, {"explained_variance": explained}, pictures)


def _problem_of_cell(cell: tuple[int, ...], patch_size: tuple[int, ...], mask_cell: tuple[int, ...]) -> str | None:
    if len(cell) != len(patch_size):
        return f"the patch has {len(patch_size)} axes, {patch_size}"
    if any(not 1 <= size <= patch for size, patch in zip(cell, patch_size)):
        return f"each axis must be 1 up to the patch's, {patch_size}"
    if any(size % token for size, token in zip(cell, mask_cell)):
        return f"it must be a multiple of the network's tokens, {mask_cell}"
    if max(mask_cell) > 1 and any(patch % size for size, patch in zip(cell, patch_size)):
        # Cut cells would hide a different number of tokens in each sample.
        return f"with tokens the patch, {patch_size}, must be a multiple of it"
    return None
