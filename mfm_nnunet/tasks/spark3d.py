"""SparK in 3D (S3D): the encoder works at visible places only, like sparse convolutions (arXiv 2301.03580, 2410.23132).

What is hidden: as in MAE for U-Nets, 75 % of the cells of a regular grid. But hidden places stay empty in every layer
of the encoder, and norms count the visible ones. Before the decoder each feature map is made dense: hidden places get a
learnable token, coarser maps also a convolution. Target and loss are MAE's. Networks with tokens have this in MAE.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.tasks.masks import MaskedRestoration
from mfm_nnunet.tasks.registry import TASKS
from mfm_nnunet.tasks.sparse import Densify, SparseEncoder


class SparK(MaskedRestoration):
    """Restores hidden voxels through the network's own decoder; ``fill_value`` is seen by the first convolution."""

    name = "spark3d"
    needs = TASKS["spark3d"].needs
    citations = TASKS["spark3d"].citations

    def __init__(self, config: Any, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        self._encode = SparseEncoder(backbone.network.encoder)
        # The finest map has no convolution: it would cost as much as all the others together.
        self.densify = nn.ModuleList(
            Densify(width, len(backbone.patch_size), has_convolution=level > 0)
            for level, width in enumerate(backbone.feature_widths())
        )

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
        maps = self._encode(x_BCDHW.masked_fill(hidden_B1DHW, self.config.fill_value), hidden_B1DHW)
        inactive = [self._encode.inactive(tuple(sparse_map.shape[2:])) for sparse_map in maps]
        dense_maps = [densify(*pair) for densify, pair in zip(self.densify, zip(maps, inactive))]
        return self.backbone.network.decoder(dense_maps)
