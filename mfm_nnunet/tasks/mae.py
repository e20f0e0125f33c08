"""Masked autoencoder: most of the patch is hidden and restored from the rest (arXiv 2111.06377, 2410.23132).

What is hidden: 75 % of the cells of a regular grid. U-Nets see the patch with the hidden voxels filled; Primus sees the
visible tokens only. Target: the hidden voxels as they were, in the plan's normalisation. Loss: mean squared error on
them alone. The cells are 16 voxels wide (less in small patches) for U-Nets, and the tokens for Primus.
"""

from __future__ import annotations

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.masks import MaskedRestoration, MaskingConfig
from mfm_nnunet.tasks.registry import TASKS


class MAE(MaskedRestoration):
    """Restores hidden voxels; tokens of Primus are dropped, so all items of a batch hide equally many."""

    name = "mae"
    citations = TASKS["mae"].citations
    restoring = "drop"

    @classmethod
    def resolve(cls, config: MaskingConfig, geometry: Geometry) -> MaskingConfig:
        """Fill in ``cell_size``; refuse a range of ``mask_ratio`` where tokens are dropped."""
        ratio = config.mask_ratio
        if isinstance(ratio, tuple) and max(geometry.mask_cell) > 1:
            raise MFMError(
                "E_CONFIG",
                f"pretext.mask_ratio={ratio[0]},{ratio[1]}: hidden tokens are dropped, so all items of a batch must "
                "hide equally many. Give one number, or use --pretext simmim.",
            )
        return super().resolve(config, geometry)
