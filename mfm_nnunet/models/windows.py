"""Attention in windows of a map of any size, in 3D and 2D (Swin, arXiv 2103.14030); the attention is torchvision's.

Shapes: B batch, D H W places of a map (in 2D, D is 1), E embedding, N places of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torchvision.models.video.swin_transformer import shifted_window_attention_3d

HIDDEN = -1e4
"""Added to the attention to padding. Finite, because queries of padding may have no other place to attend to."""


class SwinBlock(nn.Module):
    """Attention in windows, then an MLP, each on normalised places and added to its input."""

    def __init__(
        self, attention: WindowAttention, drop_path: float = 0.0, dropout: float = 0.0, epsilon: float = 1e-5
    ) -> None:
        super().__init__()
        width = attention.qkv.in_features
        self.norm1 = nn.LayerNorm(width, epsilon)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, epsilon)
        self.mlp = Mlp(width, 4 * width, drop=dropout)

    def forward(self, x_BDHWE: Tensor) -> Tensor:
        x_BDHWE = x_BDHWE + self.drop_path(self.attn(self.norm1(x_BDHWE)))
        return x_BDHWE + self.drop_path(self.mlp(self.norm2(x_BDHWE)))


class WindowAttention(nn.Module):
    """Attention within windows, with a learned bias for each relative position.

    ``window`` is in places per axis; on a smaller map it is the map. A map that the windows do not divide is padded,
    and nothing attends to the padding, unless ``attends_to_padding`` (for weights trained so). ``is_shifted`` moves
    windows by half their size where there are several, with ``always_shift`` (for weights trained so) a single one too.
    ``dropout`` is the rate on attention and output.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: Sequence[int],
        is_shifted: bool,
        dropout: float = 0.0,
        attends_to_padding: bool = False,
        always_shift: bool = False,
    ) -> None:
        super().__init__()
        self.window = (1,) * (3 - len(window)) + tuple(window)
        self.num_heads, self.is_shifted, self.always_shift = num_heads, is_shifted, always_shift
        self.dropout, self.attends_to_padding = dropout, attends_to_padding
        num_offsets = math.prod(2 * size - 1 for size in self.window)
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BDHWE: Tensor) -> Tensor:
        size = x_BDHWE.shape[1:4]
        window = [min(pair) for pair in zip(self.window, size)]
        is_moved = [self.is_shifted and (edge > step or self.always_shift) for edge, step in zip(size, window)]
        shift = [step // 2 if moved else 0 for moved, step in zip(is_moved, window)]
        bias = self.position_bias(window)
        if any(edge % step for edge, step in zip(size, window)) and not self.attends_to_padding:
            # torchvision pads and has no argument for a mask, but its bias may differ between windows.
            bias = bias + hide_padding(size, window, shift, x_BDHWE.device).repeat(len(x_BDHWE), 1, 1, 1)
        return shifted_window_attention_3d(
            x_BDHWE, self.qkv.weight, self.proj.weight, bias, window, self.num_heads, shift, self.dropout,
            self.dropout, self.qkv.bias, self.proj.bias, self.training,
        )  # fmt: skip

    def position_bias(self, window: Sequence[int]) -> Tensor:
        """Return the bias (1, heads, N, N) between the places of a window, which may be smaller than planned."""
        table = self.relative_position_bias_table
        return table[table_rows(self.window, window, table.device)].permute(2, 0, 1)[None]


def table_rows(planned: Sequence[int], window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return the row (N, N) of the table for each pair of places; ``planned`` is the window that the table is for.

    Rows are the offsets (dz, dy, dx), dx running fastest, from the most negative ones on.
    """
    row = 2 * planned[2] - 1
    steps = [(2 * planned[1] - 1) * row, row, 1]
    places = [torch.arange(size, device=device) * step for size, step in zip(window, steps)]
    code_N = (places[0][:, None, None] + places[1][:, None] + places[2]).flatten()
    centre = sum((size - 1) * step for size, step in zip(planned, steps))
    return code_N[:, None] - code_N + centre


def hide_padding(size: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """Return the bias (windows, 1, 1, N) that hides the places added to fill the last windows, after the shift."""
    added = [(0, -edge % step) for edge, step in zip(size, window)]
    flat = [number for pair in reversed(added) for number in pair]
    bias_DHW = nn.functional.pad(torch.zeros(tuple(size), device=device), flat, value=HIDDEN)
    bias_DHW = bias_DHW.roll([-step for step in shift], (0, 1, 2))
    cells = [number for edge, step in zip(bias_DHW.shape, window) for number in (edge // step, step)]
    return bias_DHW.reshape(cells).permute(0, 2, 4, 1, 3, 5).reshape(-1, 1, 1, math.prod(window))
