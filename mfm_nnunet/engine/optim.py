"""Optimisers and learning-rate schedules shared by pretraining and fine-tuning.

A schedule is a pure function of the epoch, so resuming a run needs no schedule state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

SMALLEST_LOSS_SCALE = 1.0
"""Scaling is there to make gradients larger. It begins at 2^16, is halved at each step that is skipped because its
gradients are not finite and doubled after 2000 good ones: below this, smaller losses are no remedy."""


def learning_rate_factor(epoch: float, epochs: int, warmup_epochs: float) -> float:
    """Share of the peak learning rate at ``epoch`` (0-based; fractions are allowed).

    Linear warm-up ``(epoch + 1) / warmup_epochs``, then nnU-Net's polynomial decay with exponent 0.9.
    """
    if epoch < warmup_epochs:
        return min(1.0, (epoch + 1) / warmup_epochs)
    remaining = 1 - (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return max(remaining, 0.0) ** 0.9


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    kind: Literal["sgd", "adamw"],
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """nnU-Net's SGD (Nesterov momentum 0.99), or AdamW with betas (0.9, 0.98) as Primus uses it (arXiv 2503.01835).

    ``parameters`` may be torch's parameter groups.
    """
    if kind == "sgd":
        return torch.optim.SGD(parameters, learning_rate, momentum=0.99, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)
