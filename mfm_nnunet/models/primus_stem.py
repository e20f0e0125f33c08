"""The stems of Primus V2 and V3: residual convolutions in place of the patch embedding; in 3D and 2D.

Made of dynamic-network-architectures' blocks with the names and widths of its PrimusV2 and PrimusV3, whose own stems
are 3D and for tokens of 8 voxels only, so published encoder weights fit. Kernels overlap, and instance norms look at
the whole patch: what is to be hidden from a token must be hidden in the image.

Shapes: B batch, C channels, D H W voxels, d h w tokens per axis, E embedding; in 2D there is no D and no d.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import StackedResidualBlocks
from torch import Tensor, nn

STEM_FEATURES: dict[int, tuple[int, ...]] = {2: (32, 32, 64, 128, 256, 512), 3: (32, 64, 256, 1024, 1024, 1024)}
"""Published widths by version: at full size, then after each halving; continued for tokens above 8 voxels."""

SKIP_SCALE = 1e-5
"""What the skip projections of V3 are multiplied with at first: training starts without them."""


class ConvStem(nn.Module):
    """(B, C, D, H, W) -> tokens (B, E, d, h, w): one residual block at full size and one per halving, then 1x1x1.

    ``strides`` per stage give the token size. Version 3 adds, with a learned scale each, linear projections of every
    finer map to the tokens.
    """

    def __init__(
        self,
        input_channels: int,
        embed_dim: int,
        strides: Sequence[Sequence[int]],
        features: Sequence[int],
        version: int,
    ) -> None:
        assert len(features) == len(strides) + 1, "one width for the full size and one per stage"
        super().__init__()
        conv: Any = nn.Conv3d if len(strides[0]) == 3 else nn.Conv2d
        self.stem = _residual_block(conv, input_channels, features[0], 1, version)
        self.stages = nn.ModuleList(
            _residual_block(conv, before, after, list(stride), version)
            for (before, after), stride in zip(itertools.pairwise(features), strides)
        )
        self.final_proj = conv(features[-1], embed_dim, 1)
        self.add_skips = version == 3
        if self.add_skips:
            remaining = [[math.prod(axis) for axis in zip(*strides[stage:])] for stage in range(len(strides))]
            self.proj_to_tokens = nn.ModuleList(
                conv(width, embed_dim, size, size) for width, size in zip(features, remaining)
            )
            self.scale_proj_to_tokens = nn.ParameterList(
                nn.Parameter(torch.tensor(SKIP_SCALE)) for _ in self.proj_to_tokens
            )

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """The tokens as a grid (B, E, d, h, w)."""
        maps = [self.stem(x_BCDHW)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        tokens = self.final_proj(maps[-1])
        if self.add_skips:
            for projection, scale, finer in zip(self.proj_to_tokens, self.scale_proj_to_tokens, maps):
                tokens = tokens + scale * projection(finer)
        return tokens


def published_features(version: int, num_stages: int) -> tuple[int, ...]:
    """The widths of a stem with ``num_stages`` halvings."""
    return STEM_FEATURES[version][: num_stages + 1]


def _residual_block(conv: Any, before: int, after: int, stride: Any, version: int) -> nn.Module:
    return StackedResidualBlocks(
        1,
        conv,
        before,
        after,
        kernel_size=3,
        initial_stride=stride,
        # As published: the block at full size has biases, the others have none.
        conv_bias=stride == 1,
        norm_op=nn.InstanceNorm3d if conv is nn.Conv3d else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.ReLU if version == 2 else nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
