"""Build the network of a plan with nnU-Net's own factory.

A plan may come with a downloaded checkpoint. It names Python classes, and nnU-Net's factory would import any of them.
So the names are checked first: networks against the families' classes, layers against a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from mfm_nnunet.errors import MFMError, is_out_of_memory
from mfm_nnunet.models.families import NetworkFamily, all_families, family_of_architecture, family_of_class
from mfm_nnunet.plan import ARCHITECTURE_KEYS, Plan

_DNA = "dynamic_network_architectures"

MAX_PARAMETERS = 4_000_000_000
"""16 GB of weights. Published segmentation networks have less than one billion."""

_PARTS = re.compile(
    r"torch\.nn\.(modules\.(conv|instancenorm|batchnorm|dropout|activation)\.)?"
    r"((Conv|InstanceNorm|BatchNorm|Dropout)[123]d|Dropout|(Leaky)?ReLU|P?ReLU|ELU|GELU|SiLU|Mish)"
    rf"|{_DNA}\.building_blocks\.(residual\.(BasicBlockD|BottleneckD)|patch_encode_decode\.LayerNormNd)"
    r"|timm\.layers(\.pos_embed_sincos)?\.RotaryEmbeddingCat"
)
"""Layers, blocks and position encodings that a plan may name as network arguments."""


def build_network(
    plans: Mapping[str, Any], configuration: str, num_inputs: int, num_outputs: int, deep_supervision: bool = False
) -> nn.Module:
    """Build the network of ``configuration`` with fresh weights (from torch's generator) on the current device.

    Raises MFMError: E_CONFIG for an unknown configuration or invalid arguments or patch size (plans are edited by
    hand), E_MODEL_UNSAFE if the plan names anything but known networks and layers, E_TOO_LARGE.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    Plan.of(plans).configuration(configuration)  # refused here if there is none of that name
    manager = PlansManager(dict(plans)).get_configuration(configuration)
    name, kwargs = manager.network_arch_class_name, manager.network_arch_init_kwargs
    to_import, patch_size = manager.network_arch_init_kwargs_req_import, manager.patch_size
    family = check_architecture(name, kwargs, to_import)
    architecture = dict(zip(ARCHITECTURE_KEYS, (name, kwargs, to_import)))
    if problem := family.patch_problem(kwargs, patch_size):
        raise MFMError(
            "E_CONFIG",
            f"the plan's configuration {configuration} has a patch of {' x '.join(map(str, patch_size))} voxels, but "
            f"{problem}. Change one of the two in the plan, or plan again.",
        )
    try:
        _require_buildable(lambda: build_architecture(architecture, num_inputs, num_outputs), configuration)
        return build_architecture(architecture, num_inputs, num_outputs, deep_supervision)
    except MFMError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MFMError(
            "E_CONFIG",
            f"the plan's network for {configuration} cannot be built: {reason}. Undo the change of the plan, or plan "
            "again.",
        ) from error


def build_architecture(
    architecture: Mapping[str, Any], num_inputs: int, num_outputs: int, deep_supervision: bool = False
) -> nn.Module:
    """Build the network of a checked ``architecture`` entry."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    name = architecture["network_class_name"]
    takes_it = family_of_architecture(architecture).takes_deep_supervision(name)
    return get_network_from_plans(
        name,
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        num_inputs,
        num_outputs,
        deep_supervision=deep_supervision if takes_it else None,
    )


def check_architecture(class_name: Any, kwargs: Mapping[str, Any], to_import: Any) -> NetworkFamily:
    """Check that an architecture names only known networks and layers, and return its family.

    Raises MFMError: E_MODEL_UNSAFE for any other name, E_CONFIG for missing arguments.
    """
    family = family_of_class(class_name) if isinstance(class_name, str) else None
    if family is None:
        _raise_unsafe(f"network_class_name {class_name!r}")
    if not isinstance(kwargs, Mapping) or not isinstance(to_import, (list, tuple)):
        raise MFMError("E_CONFIG", f"the plan names {class_name} but has no arguments for it. Plan again.")
    for name in to_import:
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, str) and _PARTS.fullmatch(value)):
            _raise_unsafe(f"{name} {value!r}")
    return family


def _require_buildable(build: Callable[[], nn.Module], configuration: str) -> None:
    """Refuse a network with more than MAX_PARAMETERS weights before any is allocated."""
    try:
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in build().parameters())
    except Exception:  # the real build reports invalid arguments; some networks do not work without values
        return
    if num_parameters > MAX_PARAMETERS:
        raise MFMError(
            "E_TOO_LARGE",
            f"the plan's network for {configuration} has {num_parameters / 1e9:.3g} billion weights; the maximum is "
            f"{MAX_PARAMETERS / 1e9:g} billion. Correct the features and blocks in the plan, or plan again.",
        )


def _raise_unsafe(what: str) -> NoReturn:
    raise MFMError(
        "E_MODEL_UNSAFE",
        f"the plan's architecture has the {what}, which is not a network or layer of mfm_nnunet. "
        "Loading it could run foreign code, so it was not imported. Use a plan with a network of mfm_nnunet "
        f"({', '.join(family.title for family in all_families())}).",
    )
