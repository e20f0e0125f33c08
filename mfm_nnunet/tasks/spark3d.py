"""SparK in 3D (S3D): the encoder works at visible places only, like sparse convolutions (arXiv 2301.03580, 2410.23132).

What is hidden: as in MAE for U-Nets, 75 % of the cells of a regular grid. But hidden places stay empty in every layer
of the encoder, and norms count the visible ones. Before the decoder each feature map is made dense: hidden places get a
learnable token, coarser maps also a convolution. Target and loss are MAE's. Networks with tokens have this in MAE.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone, Geometry
from mfm_nnunet.tasks.base import Augmentation, PretextTask, TaskOutput
from mfm_nnunet.tasks.masks import MaskRatio, require_mask_ratio, resolve_cell_size
from mfm_nnunet.tasks.restoration import MaskingTransform, restoration_output
from mfm_nnunet.tasks.sparse import Densify, SparseEncoder


@dataclass(frozen=True)
class SparKConfig:
    """Settings of SparK."""

    mask_ratio: MaskRatio = 0.75
    """Share of the cells that are hidden; of n cells exactly int(mask_ratio x n). Two numbers: the share is drawn
    between them for each item."""
    cell_size: tuple[int, ...] | None = None
    """Voxels per axis of a cell; one number for all axes, or one for each. None: 16 on axes of at least 64 voxels and a
    quarter of the axis (at least 4) on shorter ones."""
    fill_value: float = 0.0
    """What the first convolution sees at hidden voxels beside visible ones, in normalised units."""


class SparK(PretextTask):
    """The network restores hidden voxels through its own decoder and head: one output per image channel."""

    name = "spark3d"
    Config = SparKConfig
    backbones = ("resenc",)
    hides = "75 % of the cells of a grid, in every layer of the encoder"
    recipe = "8 x 160x160x160"
    paper = "arXiv 2410.23132"
    uses_valid = True
    citations: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "Pretraining Method",
            "name": "S3D",
            "apa_citations": [
                "Tian, K., Jiang, Y., Diao, Q., Lin, C., Wang, L., & Yuan, Z. (2023). Designing BERT for Convolutional "
                "Networks: Sparse and Hierarchical Masked Modeling. ICLR.",
                "Wald, T., Ulrich, C., Lukyanenko, S., Goncharov, A., Paderno, A., Miller, M., Maerkisch, L., Jaeger, "
                "P., & Maier-Hein, K. (2025). Revisiting MAE Pre-training for 3D Medical Image Segmentation. CVPR, "
                "5186-5196.",
            ],
        }
    ]

    def __init__(self, config: SparKConfig, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        self._encode = SparseEncoder(backbone.network.encoder)
        # The finest map has no convolution: it would cost as much as all the others together.
        self.densify = nn.ModuleList(
            Densify(width, len(backbone.patch_size), has_convolution=level > 0)
            for level, width in enumerate(backbone.feature_widths())
        )

    @classmethod
    def resolve(cls, config: SparKConfig, geometry: Geometry) -> SparKConfig:
        """Fills in ``cell_size`` and checks that masks can be drawn with it. Raises MFMError (E_CONFIG)."""
        cell = resolve_cell_size(config.cell_size, geometry)
        require_mask_ratio(config.mask_ratio, cell, geometry.patch_size)
        return dataclasses.replace(config, cell_size=cell)

    @classmethod
    def augmentation(cls, config: SparKConfig) -> Augmentation:
        return "spatial"

    @classmethod
    def num_outputs(cls, config: SparKConfig, num_inputs: int) -> int:
        return num_inputs

    @classmethod
    def transform(cls, config: SparKConfig, patch_size: tuple[int, ...]) -> MaskingTransform:
        assert config.cell_size is not None, "the config is not resolved"
        return MaskingTransform(patch_size, config.cell_size, config.mask_ratio)

    def forward(self, batch: dict[str, Tensor]) -> TaskOutput:
        restored_BCDHW = self.restore(batch["image"], batch["hidden"])
        return restoration_output(batch, restored_BCDHW, self.config.fill_value, with_pictures=not self.training)

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
        """Dense outputs (B, K, D, H, W) made from the voxels that are not hidden, and from nothing else."""
        maps = self._encode(x_BCDHW.masked_fill(hidden_B1DHW, self.config.fill_value), hidden_B1DHW)
        inactive = [self._encode.inactive(tuple(sparse_map.shape[2:])) for sparse_map in maps]
        dense_maps = [densify(*pair) for densify, pair in zip(self.densify, zip(maps, inactive))]
        return self.backbone.network.decoder(dense_maps)
