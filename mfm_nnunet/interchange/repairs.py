"""Exact repairs of what foreign pretraining code got wrong or orders otherwise; each is the identity on sound files.

Legend: T tokens, E embedding, H heads, h width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mfm_nnunet.errors import MFMError

_TRAINED_COPY = {"conv": "all_modules.0", "norm": "all_modules.1"}


def without_stale_copies(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The weights with each ``conv`` and ``norm`` equal to its trained copy in ``all_modules``, and how many differed.

    A block registers its layers under both names. Sparse pretraining as published (S3D) converts them one by one, so
    that only ``all_modules`` is trained and the other name keeps the first weights.
    """
    repaired, changed = dict(weights), 0
    for name in weights:
        head, _, kind = name.rpartition(".")
        block, _, layer = head.rpartition(".")
        twin = f"{block}.{_TRAINED_COPY[layer]}.{kind}" if layer in _TRAINED_COPY else ""
        if twin not in weights:
            continue
        changed += not torch.equal(weights[name], weights[twin])
        repaired[name] = weights[twin]
    return repaired, changed


def with_axis_0_outermost(weights: Mapping[str, Tensor], grid: Sequence[int], num_heads: int) -> dict[str, Tensor]:
    """Primus' weights for tokens that are flattened axis 0 outermost, from weights for axis 1 outermost.

    dynamic-network-architectures up to 0.4.2 and nnssl flatten (h w d), later ones (w h d). In the old order the token
    at (i, j, k) has the row and the rotary angles of (j, i, k). So the rows of the position table are exchanged, and in
    every head the thirds of the query and key channels that turn with the first and the second axis. The same function
    results (to rounding), and applying it twice gives the weights back. ``grid`` is tokens per axis.

    Raises MFMError (E_MODEL_MISMATCH) for a grid with different first axes: there the old order mixes up positions in
    a way that no weights for the new one repeat.
    """
    if len(grid) != 3 or grid[0] != grid[1]:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"its tokens are flattened axis 1 outermost on a grid of {' x '.join(map(str, grid))}: that can be "
            "repaired exactly only where the first two axes are equal. Use a checkpoint pretrained on such a patch.",
        )
    return {name: _reordered(name, tensor, grid, num_heads) for name, tensor in weights.items()}


def _reordered(name: str, tensor: Tensor, grid: Sequence[int], num_heads: int) -> Tensor:
    if name == "eva.pos_embed":
        first = tensor.shape[1] - math.prod(grid)  # register tokens stay in front
        table = tensor[:, first:].reshape(1, *grid, -1).transpose(1, 2).flatten(1, 3)
        return torch.cat([tensor[:, :first], table], dim=1)
    if name.endswith((".attn.q_proj.weight", ".attn.q_proj.bias", ".attn.k_proj.weight", ".attn.k_proj.bias")):
        width = tensor.shape[0] // num_heads
        heads = tensor.reshape(num_heads, 3, width // 3, *tensor.shape[1:])
        return heads[:, [1, 0, 2]].reshape(tensor.shape)
    return tensor
