"""Verify a checkpoint against its network, and complete the names of its tensors.

A checkpoint is complete if the network can be built, and all its tensors are there, fit and are finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of, family_of_class
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import Plan


def require_complete(content: Mapping[str, Any]) -> None:
    """Verify a checkpoint. Raises MFMError: E_MODEL_CORRUPT, E_NONFINITE, and those of building the network."""
    weights: Mapping[str, Tensor] = content["network_weights"]
    mfm = content["mfm"]
    network = _network_of(mfm)
    expected = network.state_dict()
    wanted = {name for name, _ in network.named_parameters()}
    if mfm.get("trained") == "encoder":
        wanted = family_of(network).encoder_names(network)
    aliases = _names_of_each(network)
    missing = [name for name in sorted(wanted) if not aliases[name] & set(weights)]
    foreign = [name for name in weights if name not in expected]
    wrong = [name for name in weights if name in expected and weights[name].shape != expected[name].shape]
    for what, names in (("missing", missing), ("not in its network", foreign), ("of another shape", wrong)):
        if names:
            raise MFMError(
                "E_MODEL_CORRUPT",
                f"{len(names)} tensors are {what}, e.g. {', '.join(names[:3])}. Copy it again, or import it again.",
            )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise MFMError("E_NONFINITE", f"the tensor {name} contains NaN or infinity. Use another checkpoint.")


def with_all_names(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a complete checkpoint, each tensor under all its names in the network.

    Names of the encoder inside a U-Net's decoder are left out: no reader needs them, and a file with only the encoder
    should have no ``decoder`` names.
    """
    weights: Mapping[str, Tensor] = content["network_weights"]
    network = _network_of(content["mfm"])
    names, family = _names_of_each(network), family_of(network)
    added = {alias: tensor for name, tensor in weights.items() for alias in names[name] if alias not in weights}
    is_twice = {name: name.startswith(family.encoder) and name.startswith(family.decoder) for name in added}
    return {**weights, **{name: tensor for name, tensor in added.items() if not is_twice[name]}}


def _network_of(mfm: Mapping[str, Any]) -> torch.nn.Module:
    return build_network(_plans_as_seen(mfm), mfm["configuration"], mfm["num_inputs"], mfm["num_outputs"])


def _plans_as_seen(mfm: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan with the patch size of the training, which the position table depends on."""
    name, patch = mfm["configuration"], list(mfm["patch_size"])
    configuration = {**Plan.of(mfm["plans"]).configuration(name).values, "patch_size": patch}
    configuration.pop("inherits_from", None)
    architecture = configuration["architecture"]
    if family := family_of_class(str(architecture["network_class_name"])):
        configuration["architecture"] = family.with_patch(architecture, patch)
    return {**mfm["plans"], "configurations": {name: configuration}}


def _names_of_each(network: torch.nn.Module) -> dict[str, set[str]]:
    """Map each name to all names of the same tensor."""
    names: dict[int, set[str]] = {}
    state = network.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), set()).add(name)
    return {name: names[id(tensor)] for name, tensor in state.items()}
