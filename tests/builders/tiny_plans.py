"""Plans of networks so small that a training step takes milliseconds, for each family, in 3D and 2D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import small_network
import torch
from torch import nn

from mfm_nnunet.models.backbone import AbstractBackbone, Restoring, make_backbone
from mfm_nnunet.models.networks import build_network
from tests.builders.architectures import primus, resenc, swin

CONFIGURATION = "3d_fullres"
ARCHITECTURES: dict[str, Callable[[Sequence[int]], dict[str, Any]]] = {
    "resenc": lambda patch: resenc(len(patch), (8, 16, 16)),
    "primus": primus,
    "swin": lambda patch: swin(len(patch)),
    "small": lambda patch: small_network.architecture("small", len(patch)),
}
"""The ``architecture`` of a tiny plan by family; "small" is the network of tests/packages."""


def tiny_plans(family: str, patch_size: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """A plan with what ``build_network`` reads; ``changes`` go into the network's arguments."""
    architecture = ARCHITECTURES[family](patch_size)
    architecture["arch_kwargs"].update(changes)
    configuration = {"patch_size": list(patch_size), "architecture": architecture}
    return {"plans_name": "mfmPlans", "configurations": {CONFIGURATION: configuration}}


def tiny_network(
    family: str, patch_size: tuple[int, ...], num_inputs: int = 1, num_outputs: int = 2, **changes: Any
) -> nn.Module:
    torch.manual_seed(0)
    return build_network(tiny_plans(family, patch_size, **changes), CONFIGURATION, num_inputs, num_outputs)


def tiny_backbone(
    family: str,
    patch_size: tuple[int, ...],
    num_inputs: int = 1,
    num_outputs: int = 1,
    restoring: Restoring = "drop",
    **changes: Any,
) -> AbstractBackbone:
    network = tiny_network(family, patch_size, num_inputs, num_outputs, **changes)
    return make_backbone(network, patch_size, restoring)
