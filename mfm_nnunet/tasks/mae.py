"""Masked autoencoder: most of the patch is hidden and restored from the rest (arXiv 2111.06377, 2410.23132).

Hidden: 75 % of the cells of a regular grid. Cells are 16 voxels wide for U-Nets (less in small patches) and the tokens
for Primus. U-Nets see the patch with hidden voxels filled; Primus sees only visible tokens. Target: the hidden voxels,
in the plan's normalisation. Loss: mean squared error on hidden voxels.
"""

from __future__ import annotations

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.masks import MaskedRestoration, MaskingConfig


class MAE(MaskedRestoration):
    """Restore hidden voxels. Tokens of Primus are dropped, so all items of a batch hide the same number."""

    name = "mae"
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
