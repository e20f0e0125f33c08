"""What pretext tasks put behind an encoder: pooled features and projectors. Trained with the task, never shipped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pool(features: Sequence[Tensor]) -> Tensor:
    """Global average of each of an encoder's maps (B, features, ...), side by side: (B, sum of features)."""
    return torch.cat([feature.float().flatten(2).mean(2) for feature in features], dim=1)


class Projector(nn.Sequential):
    """An MLP with normalised hidden layers: each is a linear map, a norm over its own features and a ReLU."""

    def __init__(self, widths: Sequence[int]) -> None:
        """``widths``: inputs, hidden layers and outputs, e.g. (1120, 2048, 2048, 2048)."""
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), nn.LayerNorm(after, elementwise_affine=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))
