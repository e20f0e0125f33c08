"""An exponential moving average of the trained weights (arXiv 1703.01780), smoother than those of a step.

Pretraining and fine-tuning validate and ship it where ``ema_decay`` is set.

Decay ``d`` of update n (0-based) is min(d, (1 + n) / (10 + n)), so that the first steps are forgotten soon.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn


def decay_at(decay: float, update: int) -> float:
    """The decay of update number ``update`` (0-based)."""
    return min(decay, (1 + update) / (10 + update))


class WeightAverage:
    """The average of all parameters of ``module`` that are trained, and of its running statistics, by name.

    ``trained`` names the parameters; None are those that take gradients.
    """

    def __init__(self, module: nn.Module, decay: float, trained: Collection[str] | None = None) -> None:
        self._decay = decay
        self._tensors = dict(_averaged(module, trained))
        self._averages = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (0-based)."""
        share = 1 - decay_at(self._decay, step)
        for name, tensor in self._tensors.items():
            self._averages[name].lerp_(tensor, share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module holds the average inside, and its own weights, bit for bit, afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Tensor]:
        """The averages."""
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with saved averages."""
        assert state.keys() == self._averages.keys(), "the averages are those of another module"
        for name, average in self._averages.items():
            average.copy_(state[name])

    def _swap(self) -> None:
        # The storages change places: nothing is copied, and optimizers and DDP keep their parameters.
        for name, tensor in self._tensors.items():
            tensor.data, self._averages[name] = self._averages[name], tensor.data


def _averaged(module: nn.Module, trained: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, under its first name."""
    for name, weight in module.named_parameters():
        if weight.requires_grad if trained is None else name in trained:
            yield name, weight
    for name, buffer in module.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer
