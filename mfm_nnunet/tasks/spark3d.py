"""SparK in 3D (S3D): an encoder that computes only at visible places (arXiv 2301.03580, 2410.23132).

Hidden: 75 % of the cells of a regular grid, as in MAE for U-Nets. But hidden places stay empty in every layer of the
encoder, and norms use only visible places. Before the decoder, hidden places of each feature map get a learnable token;
coarser maps also get a convolution. Target and loss are those of MAE. For networks with tokens use MAE instead.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.tasks.masks import MaskedRestoration
from mfm_nnunet.tasks.registry import TASKS
from mfm_nnunet.tasks.sparse import Densify, SparseEncoder


class SparK(MaskedRestoration):
    """Restore hidden voxels through the network's own decoder; only the first convolution sees ``fill_value``."""

    name = "spark3d"
    needs = TASKS["spark3d"].needs
    citations = TASKS["spark3d"].citations

    def __init__(self, config: Any, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        self._encode = SparseEncoder(backbone.network.encoder)
        # The finest map has no convolution, which would cost as much as all others together.
        self.densify = nn.ModuleList(
            Densify(width, len(backbone.patch_size), has_convolution=level > 0)
            for level, width in enumerate(backbone.feature_widths())
        )

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
        maps = self._encode(x_BCDHW.masked_fill(hidden_B1DHW, self.config.fill_value), hidden_B1DHW)
        inactive = [self._encode.inactive(tuple(sparse_map.shape[2:])) for sparse_map in maps]
        dense_maps = [densify(*pair) for densify, pair in zip(self.densify, zip(maps, inactive))]
        return self.backbone.network.decoder(dense_maps)
