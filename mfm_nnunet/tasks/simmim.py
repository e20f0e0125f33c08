"""SimMIM: hidden tokens are replaced by a learned one and restored from the others (arXiv 2111.09886).

Hidden: 75 % of the tokens. Unlike in MAE, the encoder sees all places. A learned token replaces the hidden ones before
positions are added. The network's own patch decoder restores them, so no other decoder is needed. Target and loss are
those of MAE. For U-Nets MAE already does the same, because it fills hidden voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mfm_nnunet.tasks.losses import masked_l1
from mfm_nnunet.tasks.masks import MaskedRestoration, MaskingConfig


@dataclass(frozen=True)
class SimMIMConfig(MaskingConfig):
    """Settings of SimMIM; ``fill_value`` matters only for stems with overlapping kernels."""

    loss: Literal["mse", "l1"] = "mse"
    """Mean squared error on hidden voxels, as in OpenMind, or mean absolute error, as in the paper."""


class SimMIM(MaskedRestoration):
    """Restore hidden tokens through the network's own patch decoder."""

    name = "simmim"
    Config = SimMIMConfig
    restoring = "replace"

    def error(self, restored_BCDHW: Tensor, target_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
        if self.config.loss == "l1":
            return masked_l1(restored_BCDHW, target_BCDHW, counted_B1DHW)
        return super().error(restored_BCDHW, target_BCDHW, counted_B1DHW)
