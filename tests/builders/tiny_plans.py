"""Plans of networks so small that a training step takes milliseconds, for every network, in 3D and 2D.

To add a family: write its entries in ``mfm_nnunet.models.families`` (BUILT_IN and MEETING) and one in NETWORKS below.
With that it joins ``tests/tasks/test_conformance.py`` (every task it supports), ``tests/models/test_families.py``
(every question that families answer) and ``tests/tasks/test_frozen_losses.py``. Write its losses down by
``python -m tests.tasks.test_frozen_losses``, which leaves those of others alone, and give it a column in
``documentation/reference/pretext_tasks.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import small_network
import torch
from torch import nn

from mfm_nnunet.models.backbone import AbstractBackbone, Restoring, make_backbone
from mfm_nnunet.models.networks import build_network
from tests.builders.architectures import natural, pctnet, primus, resenc, swin

CONFIGURATION = "3d_fullres"


class TinyNetwork(NamedTuple):
    """How to plan a tiny network, and the patches to test it on."""

    architecture: Callable[[Sequence[int]], dict[str, Any]]
    """The plan's ``architecture`` for a patch of 2 or 3 axes, of some ten thousand weights."""
    deterministic: Mapping[str, Any] = {}
    """Arguments that switch drop path and dropout off."""
    cubic: tuple[int, ...] = (16, 16, 16)
    flat: tuple[int, ...] = (16, 32)
    uneven: tuple[int, ...] = (16, 24, 16)


NETWORKS = {
    "resenc": TinyNetwork(lambda patch: resenc(len(patch), (8, 16, 16))),
    "primus": TinyNetwork(primus, {"drop_path_rate": 0.0}),
    "primus_v2": TinyNetwork(
        lambda patch: primus(patch, version=2, stem_features=[4, 4, 8, 8]), {"drop_path_rate": 0.0}
    ),
    "primus_v3": TinyNetwork(
        lambda patch: primus(patch, version=3, stem_features=[4, 8, 8, 16]), {"drop_path_rate": 0.0}
    ),
    "swin": TinyNetwork(swin, {"drop_path_rate": 0.0}),
    "pctnet": TinyNetwork(pctnet),
    "timm": TinyNetwork(natural, cubic=(4, 32, 32), flat=(32, 64), uneven=(8, 48, 32)),
    "small": TinyNetwork(lambda patch: small_network.architecture("small", len(patch))),
}
"""By the value of ``--network``; "small" is the network of tests/packages."""


def tiny_plans(network: str, patch_size: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """A plan with what ``build_network`` reads; ``changes`` go into the network's arguments."""
    architecture = NETWORKS[network].architecture(patch_size)
    architecture["arch_kwargs"].update(changes)
    configuration = {"patch_size": list(patch_size), "architecture": architecture}
    return {"plans_name": "mfmPlans", "configurations": {CONFIGURATION: configuration}}


def tiny_network(
    network: str, patch_size: tuple[int, ...], num_inputs: int = 1, num_outputs: int = 2, **changes: Any
) -> nn.Module:
    torch.manual_seed(0)
    return build_network(tiny_plans(network, patch_size, **changes), CONFIGURATION, num_inputs, num_outputs)


def tiny_backbone(
    network: str,
    patch_size: tuple[int, ...],
    num_inputs: int = 1,
    num_outputs: int = 1,
    restoring: Restoring = "drop",
    **changes: Any,
) -> AbstractBackbone:
    built = tiny_network(network, patch_size, num_inputs, num_outputs, **changes)
    return make_backbone(built, patch_size, restoring)
