"""Swin U-Net in 2D and 3D (arXiv 2103.14030, 2105.05537, 2402.01034).

The encoder's names are those of arXiv 2402.01034 and, but for the place of the mergings, of timm.

Shapes: B batch, C channels, D H W voxels, d h w tokens, K outputs. Maps of tokens have their channels last. In 2D there
is no D, and d is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mfm_nnunet.models.windows import SwinBlock, WindowAttention

EPSILON = 1e-6
"""Of all norms (arXiv 2402.01034); timm's are 1e-5."""


@dataclass(frozen=True)
class SwinSizes:
    """Arguments of :class:`SwinUNet`. Sizes are per axis, in the plan's axis order."""

    embed_dim: int
    """Channels of the first stage; each merging doubles them."""
    depths: Sequence[int]
    """Blocks of each stage of the encoder."""
    num_heads: Sequence[int]
    """Attention heads of each stage."""
    stem: Sequence[int]
    """Size of a token in voxels."""
    merging: Sequence[Sequence[int]]
    """Tokens merged into one between two stages."""
    window: Sequence[int]
    """Largest window, in tokens."""
    decoder_depth: int = 2
    """Blocks of each stage of the decoder."""
    skips: bool = True
    """Skip connections, and outputs from features of each voxel. False: the network of arXiv 2402.01034's pretraining,
    without skips, in which one linear layer restores the voxels of a token."""
    voxel_dim: int | None = None
    """Features of each voxel, with ``skips``; None: ``embed_dim``, as published in 2D."""
    always_shift: bool = False
    """Shift windows also where one covers the map, as arXiv 2402.01034 does."""
    drop_path_rate: float = 0.1
    """Rate at the encoder's last block, in train mode; it grows linearly with depth."""

    def __post_init__(self) -> None:
        if not 0 < len(self.depths) == len(self.num_heads) == len(self.merging) + 1:
            raise ValueError(f"depths {self.depths}, num_heads {self.num_heads} and merging {self.merging} do not fit")
        if len({len(self.stem), len(self.window), *map(len, self.merging)}) > 1 or len(self.stem) not in (2, 3):
            raise ValueError("stem, merging and window need two sizes each (2D), or three (3D)")
        if any(self.width(stage) % heads for stage, heads in enumerate(self.num_heads)):
            raise ValueError(f"{self.embed_dim} channels cannot be split among {self.num_heads} heads")

    def width(self, stage: int) -> int:
        """Return the channels of a stage."""
        return self.embed_dim * 2**stage

    def blocks(self, stage: int, depth: int) -> nn.Sequential:
        """Build ``depth`` blocks with the width and the drop path rates of an encoder stage."""
        first, last = sum(self.depths[:stage]), max(1, sum(self.depths) - 1)
        rates = [self.drop_path_rate * (first + min(i, self.depths[stage] - 1)) / last for i in range(depth)]
        return nn.Sequential(*(self._block(stage, is_shifted=i % 2 == 1, rate=rate) for i, rate in enumerate(rates)))

    def _block(self, stage: int, is_shifted: bool, rate: float) -> SwinBlock:
        attention = WindowAttention(
            self.width(stage), self.num_heads[stage], self.window, is_shifted, always_shift=self.always_shift
        )
        return SwinBlock(attention, rate, epsilon=EPSILON)


class SwinUNet(nn.Module):
    """(B, C, D, H, W) -> (B, K, D, H, W); ``sizes`` are the fields of :class:`SwinSizes`.

    The image must be a multiple of the stem times all merging strides.
    """

    def __init__(self, input_channels: int, num_classes: int, **sizes: Any) -> None:
        super().__init__()
        own = SwinSizes(**sizes)
        self.stem, self.num_axes = along_axes(own.stem), len(own.stem)
        self.encoder = SwinEncoder(input_channels, own)
        self.decoder = SwinDecoder(own)
        if own.skips:
            self.head = nn.Linear(own.voxel_dim or own.embed_dim, num_classes, bias=False)
        else:
            self.head = nn.Linear(own.embed_dim, math.prod(self.stem) * num_classes)
        self.apply(_initialise)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Return dense outputs (B, K, D, H, W)."""
        return self.decode(self.encoder(self.encoder.patch_embed(x_BCDHW)))

    def decode(self, maps: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        """Return dense outputs from the encoder's maps."""
        inputs, outputs = maps
        x_BdhwC = self.head(self.decoder(outputs[-1], inputs[:-1]))
        if self.decoder.final is None:
            x_BdhwC = spread(x_BdhwC, self.stem)
        return channels_first(x_BdhwC, self.num_axes)


class SwinEncoder(nn.Module):
    """Tokens (B, d, h, w, C) to the maps before and after the blocks of each stage, fine to coarse."""

    def __init__(self, input_channels: int, sizes: SwinSizes) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(input_channels, sizes.embed_dim, sizes.stem)
        self.layers: Any = nn.ModuleList()
        for stage, depth in enumerate(sizes.depths):
            layer = nn.ModuleDict({"blocks": sizes.blocks(stage, depth)})
            if stage < len(sizes.merging):
                layer["downsample"] = PatchMerging(sizes.width(stage), sizes.merging[stage])
            self.layers.append(layer)

    def forward(self, x_BdhwC: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps before the blocks, and those after them."""
        inputs, outputs = [], []
        for layer in self.layers:
            inputs.append(x_BdhwC)
            outputs.append(layer["blocks"](x_BdhwC))
            if "downsample" in layer:
                x_BdhwC = layer["downsample"](outputs[-1])
        return inputs, outputs


class SwinDecoder(nn.Module):
    """The coarsest map to the finest, or with skips to features of each voxel."""

    def __init__(self, sizes: SwinSizes) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList()
        for stage in reversed(range(len(sizes.merging))):
            width = sizes.width(stage)
            layer = nn.ModuleDict({"expand": PatchExpanding(2 * width, width, sizes.merging[stage])})
            if sizes.skips:
                layer["skip"] = nn.Linear(2 * width, width)
            layer["blocks"] = sizes.blocks(stage, sizes.decoder_depth)
            self.layers.append(layer)
        self.norm = nn.LayerNorm(sizes.embed_dim, EPSILON)
        features = sizes.voxel_dim or sizes.embed_dim
        self.final = PatchExpanding(sizes.embed_dim, features, sizes.stem) if sizes.skips else None

    def forward(self, x_BdhwC: Tensor, skips: list[Tensor]) -> Tensor:
        for layer, skip in zip(self.layers, reversed(skips), strict=True):
            x_BdhwC = layer["expand"](x_BdhwC)
            if "skip" in layer:
                x_BdhwC = layer["skip"](torch.cat([x_BdhwC, skip], -1))
            x_BdhwC = layer["blocks"](x_BdhwC)
        x_BdhwC = self.norm(x_BdhwC)
        return x_BdhwC if self.final is None else self.final(x_BdhwC)


class PatchEmbedding(nn.Module):
    """(B, C, D, H, W) -> normalised tokens (B, d, h, w, E)."""

    def __init__(self, input_channels: int, width: int, stem: Sequence[int]) -> None:
        super().__init__()
        convolution: Any = nn.Conv3d if len(stem) == 3 else nn.Conv2d
        self.proj = convolution(input_channels, width, tuple(stem), tuple(stem))
        self.norm = nn.LayerNorm(width, EPSILON)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        x_BdhwC = self.proj(x_BCDHW).movedim(1, -1)
        return self.norm(x_BdhwC if x_BdhwC.dim() == 5 else x_BdhwC[:, None])


class PatchMerging(nn.Module):
    """Join neighbouring tokens into one of twice the width."""

    def __init__(self, width: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = along_axes(strides)
        joined = math.prod(strides) * width
        self.norm = nn.LayerNorm(joined, EPSILON)
        self.reduction = nn.Linear(joined, 2 * width, bias=False)

    def forward(self, x_BdhwC: Tensor) -> Tensor:
        cells = [part for size, stride in zip(x_BdhwC.shape[1:], self.strides) for part in (size // stride, stride)]
        parts = x_BdhwC.reshape(len(x_BdhwC), *cells, -1).permute(0, 1, 3, 5, 6, 4, 2, 7)  # axis 0 varies fastest
        return self.reduction(self.norm(parts.flatten(4)))


class PatchExpanding(nn.Module):
    """Split a token into several, by the strides of a merging or, as the last layer, into voxels."""

    def __init__(self, width: int, expanded: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = along_axes(strides)
        self.expand = nn.Linear(width, math.prod(strides) * expanded, bias=False)
        self.norm = nn.LayerNorm(expanded, EPSILON)

    def forward(self, x_BdhwC: Tensor) -> Tensor:
        return self.norm(spread(self.expand(x_BdhwC), self.strides))


def spread(x_BdhwC: Tensor, strides: Sequence[int]) -> Tensor:
    """Move channels into space: (B, d, h, w, product of strides x C) to (B, d strides[0], ..., C)."""
    batch, *grid, width = x_BdhwC.shape
    parts = x_BdhwC.reshape(batch, *grid, *strides, width // math.prod(strides)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return parts.reshape(batch, *(size * stride for size, stride in zip(grid, strides)), -1)


def along_axes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return sizes along three axes, 1 along the axis that 2D images do not have."""
    return (1,) * (3 - len(sizes)) + tuple(sizes)


def channels_first(x_BdhwC: Tensor, num_axes: int) -> Tensor:
    """Return a map as (B, C, d, h, w), in 2D (B, C, h, w)."""
    x_BCdhw = x_BdhwC.movedim(-1, 1)
    return x_BCdhw if num_axes == 3 else x_BCdhw.squeeze(2)


def resize_table(table: Tensor, window: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Convert a position table to another window: each offset keeps its row, new ones repeat the outermost."""
    grid = table.reshape(*(2 * side - 1 for side in window), -1)
    for axis, (have, want) in enumerate(zip(window, wanted)):
        offsets = torch.arange(1 - want, want).clamp(1 - have, have - 1)
        grid = grid.index_select(axis, offsets + have - 1)
    return grid.flatten(0, -2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
