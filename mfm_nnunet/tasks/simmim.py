"""SimMIM: hidden tokens are replaced by a learned one and restored from the others (arXiv 2111.09886).

What is hidden: 75 % of the tokens. Unlike in MAE all places go through the encoder, the hidden ones as one learned
token that takes their place before positions are added; the network's own patch decoder restores them, and no other
decoder is needed. Target and loss are MAE's. U-Nets have the same in MAE, where hidden voxels are filled.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.base import Augmentation, PretextTask, TaskOutput
from mfm_nnunet.tasks.masks import MaskRatio, require_mask_ratio, resolve_cell_size
from mfm_nnunet.tasks.restoration import MaskingTransform, restoration_output


@dataclass(frozen=True)
class SimMIMConfig:
    """Settings of SimMIM."""

    mask_ratio: MaskRatio = 0.75
    """Share of the cells that are hidden; of n cells exactly int(mask_ratio x n). Two numbers: the share is drawn
    between them for each item."""
    cell_size: tuple[int, ...] | None = None
    """Voxels per axis of a cell, in whole tokens; one number for all axes, or one for each. None: one token."""
    loss: Literal["mse", "l1"] = "mse"
    """Mean squared error on hidden voxels, as in OpenMind, or mean absolute error, as in the paper."""
    fill_value: float = 0.0
    """What stems with overlapping kernels see at hidden voxels, in normalised units. Where each token is embedded on
    its own it has no effect."""


class SimMIM(PretextTask):
    """The network restores hidden tokens through its own patch decoder: one output per image channel."""

    name = "simmim"
    Config = SimMIMConfig
    backbones = ("primus",)
    hides = "75 % of the tokens, replaced by a learned one"
    recipe = "8 x 160x160x160"
    paper = "arXiv 2111.09886"
    restoring = "replace"
    uses_valid = True
    citations: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "Pretraining Method",
            "name": "SimMIM",
            "apa_citations": [
                "Xie, Z., Zhang, Z., Cao, Y., Lin, Y., Bao, J., Yao, Z., Dai, Q., & Hu, H. (2022). SimMIM: A Simple "
                "Framework for Masked Image Modeling. CVPR, 9653-9663.",
            ],
        }
    ]

    @classmethod
    def resolve(cls, config: SimMIMConfig, geometry: Geometry) -> SimMIMConfig:
        """Fills in ``cell_size`` and checks that masks can be drawn with it. Raises MFMError (E_CONFIG)."""
        cell = resolve_cell_size(config.cell_size, geometry)
        require_mask_ratio(config.mask_ratio, cell, geometry.patch_size)
        return dataclasses.replace(config, cell_size=cell)

    @classmethod
    def augmentation(cls, config: SimMIMConfig) -> Augmentation:
        return "spatial"

    @classmethod
    def num_outputs(cls, config: SimMIMConfig, num_inputs: int) -> int:
        return num_inputs

    @classmethod
    def transform(cls, config: SimMIMConfig, patch_size: tuple[int, ...]) -> MaskingTransform:
        assert config.cell_size is not None, "the config is not resolved"
        return MaskingTransform(patch_size, config.cell_size, config.mask_ratio)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        config = self.config
        restored_BCDHW = self.backbone.restore(batch["image"], batch["hidden"], config.fill_value)
        return restoration_output(
            batch, restored_BCDHW, config.fill_value, with_pictures=not self.training, is_l1=config.loss == "l1"
        )
