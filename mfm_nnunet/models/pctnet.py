"""PCT-Net: convolutions and window attention in parallel, in 3D and 2D (arXiv 2306.16925).

Levels 0 and 1 are convolutional. At each deeper level a convolutional block and two Swin blocks see the same map, and
their outputs are added. Unlike in the published code, every relative position has its own row of the table, padding is
not attended to, tiles of any size predict, and only layers that are used are built.

Shapes: B batch, C channels, D H W voxels, or places of a map, E embedding, K outputs; in 2D there is no D.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mfm_nnunet.models.windows import SwinBlock, WindowAttention

NUM_CONVOLUTIONAL = 2
"""Levels without attention."""
MAX_WINDOW = 512
"""Most places of a window. The memory of attention grows with their square."""


@dataclass(frozen=True)
class PCTOptions:
    """Options of PCT-Net. Dropout and drop path are those of the paper."""

    norm: Literal["instance", "batch"] = "instance"
    """batch: for weights of the paper's authors; with two crops in a batch its statistics mix them."""
    dropout: float = 0.2
    """Rate in convolutional blocks and Swin blocks, from level 2 down."""
    drop_path: float = 0.2
    """Rate of dropping the update of a Swin block, the same at all levels."""
    deep_supervision: bool = False
    """Return the outputs of all levels but the deepest, finest first."""
    attends_to_padding: bool = False
    """For weights of the paper's authors, which were trained so."""
    unshifted: Sequence[int] = ()
    """Levels whose second Swin block has the windows of the first, for weights trained so."""


@dataclass(frozen=True)
class _Level:
    width: int
    stride: tuple[int, ...]
    """Step from the finer level."""
    kernel: tuple[int, ...]
    num_heads: int = 0
    """0 without attention."""
    window: tuple[int, ...] = ()
    is_shifted: bool = True


class PCTNet(nn.Module):
    """(B, C, D, H, W) -> (B, K, D, H, W), or a list of outputs with deep supervision.

    ``features_per_stage``, ``strides`` and ``kernel_sizes`` have an entry per level, ``num_heads`` and ``windows`` (in
    places per axis) one per level from 2 on. ``options`` are the fields of :class:`PCTOptions`. Each axis of the input
    must be a multiple of the product of its strides. Windows larger than a map are cut to it.

    Raises ValueError for inconsistent arguments.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        num_heads: Sequence[int],
        windows: Sequence[Sequence[int]],
        **options: Any,
    ) -> None:
        super().__init__()
        own = PCTOptions(**options)
        first = NUM_CONVOLUTIONAL
        if not len(features_per_stage) == len(strides) == len(kernel_sizes) == first + len(num_heads) > first:
            raise ValueError(f"features_per_stage, strides and kernel_sizes need {first} entries more than num_heads")
        attention = [(0, ())] * first + list(zip(num_heads, map(tuple, windows), strict=True))
        levels = [
            _Level(width, tuple(stride), tuple(kernel), heads, window, number not in own.unshifted)
            for number, (width, stride, kernel, (heads, window)) in enumerate(
                zip(features_per_stage, strides, kernel_sizes, attention)
            )
        ]
        _check_levels(levels)
        layers = _Layers(len(levels[0].stride), own)
        self.encoder = Encoder(layers, input_channels, levels)
        self.decoder = Decoder(layers, num_classes, levels)

    def forward(self, x_BCDHW: Tensor) -> Tensor | list[Tensor]:
        """Return the dense output, or with deep supervision one per level but the deepest, finest first."""
        return self.decoder(self.encoder(x_BCDHW))


class Encoder(nn.Module):
    """Return the maps of all levels, finest first."""

    def __init__(self, layers: _Layers, input_channels: int, levels: Sequence[_Level]) -> None:
        super().__init__()
        self.project = layers.conv(input_channels, levels[0].width, levels[0].kernel)
        self.downs = nn.ModuleList(layers.down(fine, coarse) for fine, coarse in pairwise(levels))
        self.blocks = nn.ModuleList(layers.block(level) for level in levels)

    def forward(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return the maps of all levels, finest first."""
        maps = [self.blocks[0](self.project(x_BCDHW))]
        for down, block in zip(self.downs, list(self.blocks)[1:]):
            maps.append(block(down(maps[-1])))
        return maps


class Decoder(nn.Module):
    """Return the output at full size, or with ``deep_supervision`` one per level but the deepest, finest first.

    Entry i of each list of modules belongs to level i.
    """

    def __init__(self, layers: _Layers, num_classes: int, levels: Sequence[_Level]) -> None:
        super().__init__()
        self.deep_supervision = layers.options.deep_supervision
        self.ups = nn.ModuleList(layers.up(coarse, fine) for fine, coarse in pairwise(levels))
        self.merges = nn.ModuleList(layers.step(2 * fine.width, fine.width, fine.kernel) for fine in levels[:-1])
        self.blocks = nn.ModuleList(layers.block(level) for level in levels[:-1])
        self.activations = nn.ModuleList(nn.Sequential(*layers.activate(level.width)) for level in levels[:-1])
        pointwise = (1,) * len(levels[0].kernel)
        self.heads = nn.ModuleList(layers.conv(level.width, num_classes, pointwise) for level in levels[:-1])

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Decode the maps of all levels, finest first."""
        outputs, x_BCDHW = [], maps[-1]
        for level in reversed(range(len(self.blocks))):
            both_BCDHW = torch.cat([maps[level], self.ups[level](x_BCDHW)], 1)
            x_BCDHW = self.blocks[level](self.merges[level](both_BCDHW))
            if self.deep_supervision or level == 0:
                outputs.append(self.heads[level](self.activations[level](x_BCDHW)))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class ParallelBlock(nn.Module):
    """Sum of a convolutional block and two Swin blocks, the second with shifted windows."""

    def __init__(self, conv: nn.Module, level: _Level, options: PCTOptions) -> None:
        super().__init__()
        self.conv = conv
        self.dropout = nn.Dropout(options.dropout)
        self.attention = nn.ModuleList(
            SwinBlock(
                WindowAttention(
                    level.width, level.num_heads, level.window, is_shifted, options.dropout, options.attends_to_padding
                ),
                options.drop_path,
                options.dropout,
            )
            for is_shifted in (False, level.is_shifted)
        )

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        is_flat = x_BCDHW.dim() == 4
        x_BDHWE = self.dropout((x_BCDHW[:, :, None] if is_flat else x_BCDHW).movedim(1, -1).contiguous())
        for block in self.attention:
            x_BDHWE = block(x_BDHWE)
        attended_BCDHW = x_BDHWE.movedim(-1, 1)
        return self.conv(x_BCDHW) + (attended_BCDHW[:, :, 0] if is_flat else attended_BCDHW)


class _Layers:
    """Make layers of 2 or 3 axes. Norm and PReLU come before each convolution."""

    def __init__(self, num_axes: int, options: PCTOptions) -> None:
        kind = f"{num_axes}d"
        self.options = options
        self.conv_class, self.transposed_class, self.pool_class = (
            getattr(nn, f"{name}{kind}") for name in ("Conv", "ConvTranspose", "MaxPool")
        )
        norms = {"instance": f"InstanceNorm{kind}", "batch": f"BatchNorm{kind}"}
        if options.norm not in norms:
            raise ValueError(f"norm={options.norm} is none of {', '.join(norms)}")
        self.norm = functools.partial(getattr(nn, norms[options.norm]), affine=True)

    def conv(self, before: int, after: int, kernel: Sequence[int]) -> nn.Module:
        return self.conv_class(before, after, kernel, padding=tuple(size // 2 for size in kernel))

    def activate(self, width: int) -> list[nn.Module]:
        return [self.norm(width), nn.PReLU()]

    def step(self, before: int, after: int, kernel: Sequence[int]) -> nn.Sequential:
        return nn.Sequential(*self.activate(before), self.conv(before, after, kernel))

    def down(self, fine: _Level, coarse: _Level) -> nn.Sequential:
        return nn.Sequential(self.pool_class(coarse.stride), self.step(fine.width, coarse.width, coarse.kernel))

    def up(self, coarse: _Level, fine: _Level) -> nn.Sequential:
        enlarge = self.transposed_class(coarse.width, fine.width, coarse.stride, coarse.stride)
        return nn.Sequential(*self.activate(coarse.width), enlarge)

    def block(self, level: _Level) -> nn.Module:
        first, second = (self.step(level.width, level.width, level.kernel) for _ in range(2))
        dropout = nn.Dropout(self.options.dropout if level.num_heads else 0.0)
        conv = nn.Sequential(*first, *list(second)[:2], dropout, second[2])
        return ParallelBlock(conv, level, self.options) if level.num_heads else conv


def _check_levels(levels: Sequence[_Level]) -> None:
    num_axes = len(levels[0].stride)
    if num_axes not in (2, 3) or any(len(row) != num_axes for level in levels for row in (level.stride, level.kernel)):
        raise ValueError("strides and kernel_sizes need 2 or 3 axes, all the same number")
    if any(size % 2 == 0 for level in levels for size in level.kernel):
        raise ValueError("kernel_sizes must be odd")
    for level in levels[NUM_CONVOLUTIONAL:]:
        if level.num_heads < 1 or level.width % level.num_heads:
            raise ValueError(f"a width of {level.width} cannot be split into {level.num_heads} heads")
        if len(level.window) != num_axes or min(level.window) < 1 or math.prod(level.window) > MAX_WINDOW:
            raise ValueError(f"a window of {level.window} needs {num_axes} axes and at most {MAX_WINDOW} places")
