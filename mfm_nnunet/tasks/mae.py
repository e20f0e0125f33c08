"""Masked autoencoder: most of the patch is hidden and restored from the rest (arXiv 2111.06377, 2410.23132).

What is hidden: 75 % of the cells of a regular grid. U-Nets see the patch with the hidden voxels filled; Primus sees the
visible tokens only. Target: the hidden voxels as they were, in the plan's normalisation. Loss: mean squared error on
them alone. The cells are 16 voxels wide (less in small patches) for U-Nets, and the tokens for Primus.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.base import Augmentation, PretextTask, TaskOutput
from mfm_nnunet.tasks.masks import MaskRatio, require_mask_ratio, resolve_cell_size
from mfm_nnunet.tasks.restoration import MaskingTransform, restoration_output


@dataclass(frozen=True)
class MAEConfig:
    """Settings of MAE."""

    mask_ratio: MaskRatio = 0.75
    """Share of the cells that are hidden; of n cells exactly int(mask_ratio x n). Two numbers, for U-Nets only: the
    share is drawn between them for each item."""
    cell_size: tuple[int, ...] | None = None
    """Voxels per axis of a cell; one number for all axes, or one for each. None: the tokens of Primus; for U-Nets 16 on
    axes of at least 64 voxels and a quarter of the axis (at least 4) on shorter ones."""
    fill_value: float = 0.0
    """What U-Nets see at hidden voxels, in normalised units; 0 is the mean of z-scored images."""


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
        cell, ratio = resolve_cell_size(config.cell_size, geometry), config.mask_ratio
        require_mask_ratio(ratio, cell, geometry.patch_size)
        if isinstance(ratio, tuple) and max(geometry.mask_cell) > 1:
            raise MFMError(
                "E_CONFIG",
                f"pretext.mask_ratio={ratio[0]},{ratio[1]}: hidden tokens are dropped, so all items of a batch must "
                "hide equally many. Give one number, or use --pretext simmim.",
            )
        return dataclasses.replace(config, cell_size=cell)

    @classmethod
    def augmentation(cls, config: MAEConfig) -> Augmentation:
        return "spatial"

    @classmethod
    def num_outputs(cls, config: MAEConfig, num_inputs: int) -> int:
        return num_inputs

    @classmethod
    def transform(cls, config: MAEConfig, patch_size: tuple[int, ...]) -> MaskingTransform:
        assert config.cell_size is not None, "the config is not resolved"
        return MaskingTransform(patch_size, config.cell_size, config.mask_ratio)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        fill_value = self.config.fill_value
        restored_BCDHW = self.backbone.restore(batch["image"], batch["hidden"], fill_value)
        return restoration_output(batch, restored_BCDHW, fill_value, with_pictures=not self.training)
