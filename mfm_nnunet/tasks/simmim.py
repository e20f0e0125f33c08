"""SimMIM: hidden tokens are replaced by a learned one and restored from the others (arXiv 2111.09886).

What is hidden: 75 % of the tokens. Unlike in MAE all places pass the encoder, the hidden ones as one learned token that
takes their place before positions are added; the network's own patch decoder restores them, and no other decoder is
needed. Target and loss are MAE's. U-Nets have the same in MAE, where hidden voxels are filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mfm_nnunet.tasks.losses import masked_l1
from mfm_nnunet.tasks.masks import MaskedRestoration, MaskingConfig
from mfm_nnunet.tasks.registry import TASKS


@dataclass(frozen=True)
class SimMIMConfig(MaskingConfig):
    """Settings of SimMIM; ``fill_value`` matters only for stems with overlapping kernels."""

    loss: Literal["mse", "l1"] = "mse"
    """Mean squared error on hidden voxels, as in OpenMind, or mean absolute error, as in the paper."""


class SimMIM(MaskedRestoration):
    """Restores hidden tokens through the network's own patch decoder."""

    name = "simmim"
    Config = SimMIMConfig
    needs = TASKS["simmim"].needs
    citations = TASKS["simmim"].citations
    restoring = "replace"

    def error(self, restored_BCDHW: Tensor, target_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
        if self.config.loss == "l1":
            return masked_l1(restored_BCDHW, target_BCDHW, counted_B1DHW)
        return super().error(restored_BCDHW, target_BCDHW, counted_B1DHW)
