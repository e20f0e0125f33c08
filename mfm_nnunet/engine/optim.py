"""Optimisers, learning rates and averaged weights.

A learning rate is a pure function of the epoch, so resuming a run needs no schedule state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

SMALLEST_LOSS_SCALE = 1.0
"""Lower limit of the loss scale. Loss scaling makes gradients larger: the scale starts at 2^16, is halved by each step
skipped for non-finite gradients, and doubled after 2000 good ones. Below 1, a smaller scale cannot help.
"""


def learning_rate_factor(epoch: float, epochs: int, warmup_epochs: float) -> float:
    """Return the share of the peak learning rate at ``epoch`` (0-based, may be fractional).

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
    """Make nnU-Net's SGD (Nesterov momentum 0.99), or AdamW with betas (0.9, 0.98) as for Primus (arXiv 2503.01835).

    ``parameters`` may be torch's parameter groups.
    """
    if kind == "sgd":
        return torch.optim.SGD(parameters, learning_rate, momentum=0.99, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)


class WeightAverage:
    """An exponential moving average (arXiv 1703.01780) of a module's trained parameters and running statistics.

    ``trained`` names the parameters; the default is those that require gradients. The decay of update n (0-based) is
    min(decay, (1 + n) / (10 + n)), so the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float, trained: Collection[str] | None = None) -> None:
        self._decay = decay
        self._tensors: dict[str, Tensor] = {
            name: weight
            for name, weight in module.named_parameters()
            if (weight.requires_grad if trained is None else name in trained)
        }
        self._tensors |= {n: b for n, b in module.named_buffers() if n.endswith(("running_mean", "running_var"))}
        self._averages = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimiser step ``step`` (0-based)."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        for name, tensor in self._tensors.items():
            self._averages[name].lerp_(tensor, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the module inside the block, and restore the module's own weights, bit for bit,
        afterwards.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore saved averages."""
        assert state.keys() == self._averages.keys(), "the averages are those of another module"
        for name, average in self._averages.items():
            average.copy_(state[name])

    def _swap(self) -> None:
        # Swap the storages: nothing is copied, and optimizers and DDP keep their parameters.
        for name, tensor in self._tensors.items():
            tensor.data, self._averages[name] = self._averages[name], tensor.data
