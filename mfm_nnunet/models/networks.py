"""The network of a plan, built by nnU-Net's own factory, and which of its parameters are encoder and head.

A plan may come with a downloaded checkpoint and names Python classes, which nnU-Net's factory would import whatever
they are. So the names are checked against a list first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from mfm_nnunet.errors import MFMError, is_out_of_memory, nearest

_DNA = "dynamic_network_architectures"

MAX_PARAMETERS = 4_000_000_000
"""Weights of 16 GB; published networks for segmentation have below one billion."""
NETWORKS: tuple[str, ...] = (
    *(f"{_DNA}.architectures.unet.{name}" for name in ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")),
    # The module's old name, which plans of older nnU-Nets hold and nnU-Net's factory redirects.
    f"{_DNA}.architectures.residual_unet.ResidualEncoderUNet",
    *(f"{_DNA}.architectures.primus.{name}" for name in ("Primus", "PrimusV2", "PrimusV3")),
    "mfm_nnunet.models.primus.PrimusSeg",
)
"""Network classes that a plan may name."""

_PARTS = re.compile(
    r"torch\.nn\.(modules\.(conv|instancenorm|batchnorm|dropout|activation)\.)?"
    r"((Conv|InstanceNorm|BatchNorm|Dropout)[123]d|Dropout|(Leaky)?ReLU|P?ReLU|ELU|GELU|SiLU|Mish)"
    rf"|{_DNA}\.building_blocks\.(residual\.(BasicBlockD|BottleneckD)|patch_encode_decode\.LayerNormNd)"
    r"|timm\.layers(\.pos_embed_sincos)?\.RotaryEmbeddingCat"
)
"""Layers, blocks and positions that a plan may name as arguments of its network."""


def build_network(
    plans: Mapping[str, Any], configuration: str, num_inputs: int, num_outputs: int, deep_supervision: bool = False
) -> nn.Module:
    """The network of ``configuration`` with fresh weights (drawn from torch's generator), on the current device.

    Raises MFMError: E_CONFIG for an unknown configuration and for arguments or a patch size that are impossible (plans
    are edited by hand), E_MODEL_UNSAFE when the plan names anything but networks and layers.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    known = plans.get("configurations", {})
    if configuration not in known:
        raise MFMError("E_CONFIG", f"the plan has no configuration '{configuration}'. {nearest(configuration, known)}")
    manager = PlansManager(dict(plans)).get_configuration(configuration)
    name, kwargs = manager.network_arch_class_name, manager.network_arch_init_kwargs
    check_architecture(name, kwargs, manager.network_arch_init_kwargs_req_import)
    _require_fitting_patch(kwargs, manager.patch_size, configuration)
    arguments = (name, kwargs, manager.network_arch_init_kwargs_req_import, num_inputs, num_outputs)
    pyramid = deep_supervision if knows_deep_supervision(name) else None
    try:
        _require_buildable(lambda: get_network_from_plans(*arguments, deep_supervision=pyramid), configuration)
        return get_network_from_plans(*arguments, deep_supervision=pyramid)
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


def _require_buildable(build: Callable[[], nn.Module], configuration: str) -> None:
    """Raise MFMError (E_TOO_LARGE) for a network with more weights than a computer holds, before any is allocated."""
    try:
        with torch.device("meta"):
            num_parameters = sum(parameter.numel() for parameter in build().parameters())
    except Exception:  # what is wrong with its arguments, or cannot be built without values, shows when it is built
        return
    if num_parameters > MAX_PARAMETERS:
        raise MFMError(
            "E_TOO_LARGE",
            f"the plan's network for {configuration} has {num_parameters / 1e9:.3g} billion weights, and at most "
            f"{MAX_PARAMETERS / 1e9:g} billion are built. Correct the features and blocks in the plan, or plan again.",
        )


def knows_deep_supervision(class_name: str) -> bool:
    """Whether a network of NETWORKS can be told of deep supervision when it is built: all but DNA's own Primus."""
    return f"{_DNA}.architectures.primus." not in class_name


def _require_fitting_patch(kwargs: Mapping[str, Any], patch_size: Sequence[int], configuration: str) -> None:
    """Raise MFMError (E_CONFIG) when the network's arguments are for another patch than the configuration's."""
    num_axes = len(patch_size)
    convolution = kwargs.get("conv_op")
    strides = [[stride] * num_axes if isinstance(stride, int) else stride for stride in kwargs.get("strides", ())]
    steps = [math.prod(along_axis) for along_axis in zip(*strides)] or list(kwargs.get("patch_embed_size", ()))
    problem = ""
    if kwargs.get("n_stages") == 1:
        problem = "the network has one stage, and a U-Net needs two"
    elif isinstance(convolution, str) and not convolution.endswith(f"Conv{num_axes}d"):
        problem = f"the network's layers are {convolution.rpartition('.')[2]}"
    elif steps and (len(steps) != num_axes or any(size % step for size, step in zip(patch_size, steps))):
        problem = f"the network needs multiples of {' x '.join(map(str, steps))}"
    elif "input_shape" in kwargs and list(kwargs["input_shape"]) != list(patch_size):
        problem = f"the network's input_shape is {' x '.join(map(str, kwargs['input_shape']))}"
    if problem:
        raise MFMError(
            "E_CONFIG",
            f"the plan's configuration {configuration} has a patch of {' x '.join(map(str, patch_size))} voxels, but "
            f"{problem}. Change one of the two in the plan, or plan again.",
        )


def check_architecture(class_name: Any, kwargs: Mapping[str, Any], to_import: Any) -> None:
    """Raise MFMError (E_MODEL_UNSAFE) unless a plan's architecture names only networks and layers that we know."""
    if class_name not in NETWORKS:
        _refuse(f"network_class_name {class_name!r}")
    if not isinstance(kwargs, Mapping) or not isinstance(to_import, (list, tuple)):
        raise MFMError("E_CONFIG", f"the plan names {class_name} and has no arguments of it. Plan again.")
    for name in to_import:
        value = kwargs.get(name)
        if value is not None and not (isinstance(value, str) and _PARTS.fullmatch(value)):
            _refuse(f"{name} {value!r}")


def head_names(network: nn.Module) -> set[str]:
    """Names (of ``named_parameters``) of the output layers: they belong to one job and are never transferred."""
    if hasattr(network, "up_projection"):
        last = len(network.up_projection.decode) - 1  # type: ignore[union-attr, arg-type]
        return _with_prefixes(network, f"up_projection.decode.{last}.")
    return _with_prefixes(network, "decoder.seg_layers.")


def encoder_names(network: nn.Module) -> set[str]:
    """Names (of ``named_parameters``, so each tensor once) of the encoder, stem included."""
    if hasattr(network, "eva"):
        return _with_prefixes(network, "down_projection.", "eva.")
    return _with_prefixes(network, "encoder.")


def stem_names(network: nn.Module) -> set[str]:
    """Names of the weights that see the image, under every name that the state dict has for them."""
    keys = getattr(network, "keys_to_in_proj", None)
    if keys:
        return {f"{key}.weight" for key in keys}
    encoder = encoder_names(network)
    return {next((name for name, p in network.named_parameters() if name in encoder and p.ndim >= 4), "")}


def part_of(name: str, network: nn.Module) -> Literal["encoder", "decoder", "other"]:
    """Which part of the network a name of its state dict belongs to; buffers count too."""
    is_primus = hasattr(network, "eva")
    encoder = ("down_projection.", "eva.") if is_primus else ("encoder.", "decoder.encoder.")
    if name.startswith(encoder):
        return "encoder"
    return "decoder" if name.startswith("up_projection." if is_primus else "decoder.") else "other"


def token_size(network: nn.Module) -> tuple[int, ...]:
    """Voxels per axis of a token of Primus, ours or DNA's, of which V2 and V3 halve the image in each stage."""
    own = getattr(network, "patch_embed_size", None)
    stem: Any = network.down_projection
    if own is not None:
        return tuple(own)
    if hasattr(stem, "proj"):
        return tuple(stem.proj.weight.shape[2:])
    return (2 ** len(stem.stages),) * (stem.final_proj.weight.ndim - 2)


def _with_prefixes(network: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in network.named_parameters() if name.startswith(prefixes)}


def _refuse(what: str) -> None:
    raise MFMError(
        "E_MODEL_UNSAFE",
        f"the plan's architecture has the {what}, which is none of the networks and layers that mfm_nnunet builds. "
        "Loading it could run foreign code, so it was not imported. Use a plan with a ResEnc U-Net, a plain U-Net or "
        "Primus.",
    )
