"""Low-rank adapters in the encoder of a transformer (arXiv 2106.09685): W + (alpha / rank) B A.

Only A and B learn. They are parametrisations of the linear layers' weights, so every forward pass computes the merged
weight. The merged weights are also shipped, under the network's own names. B starts at zero, so the network starts as
the pretrained one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mfm_nnunet.models.families import family_of

_MIDDLE = ".parametrizations.weight."
"""Torch's infix between a layer's name and the names of its original weight ("original") and adapter ("0.*")."""


class Adapter(nn.Module):
    """Add ``scale * up @ down`` to a weight of (outputs, inputs)."""

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, in float32 even under autocast, so that the trained weights are exactly the
        shipped ones.
        """
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_adapters(network: nn.Module, rank: int, alpha: float) -> None:
    """Add adapters to the linear layers named by the network family, initialised from torch's generator."""
    for layer in family_of(network).adapted_layers(network):
        adapter = Adapter(layer.out_features, layer.in_features, rank, alpha / rank).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", adapter)


def adapter_names(network: nn.Module) -> set[str]:
    """Return the names (in ``named_parameters``) of the adapters; empty without any."""
    return {name for name, _ in network.named_parameters() if f"{_MIDDLE}0." in name}


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with the adapters merged into the weights, under the names without adapters."""
    state = {}
    for name, tensor in network.state_dict().items():
        layer, is_parametrised, rest = name.partition(_MIDDLE)
        if not is_parametrised:
            state[name] = tensor
        elif rest == "original":
            weight = network.get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            state[f"{layer}.weight"] = weight.detach()
    return state


def narrowest(network: nn.Module) -> int:
    """Return the largest useful rank: the smallest width of the layers that get adapters."""
    return min(min(layer.out_features, layer.in_features) for layer in family_of(network).adapted_layers(network))
