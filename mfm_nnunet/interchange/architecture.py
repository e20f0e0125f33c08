"""The ``architecture`` entry of a plan for weights that come without one: the tensors decide.

Depth, widths, kernels and tokens are read off the shapes. What no shape shows (strides without a decoder, norms and
activations, the number of heads) comes from what the file says, else from the published family, and the notes say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange.names import Family
from mfm_nnunet.models.primus import PRIMUS_SIZES

UNETS: dict[Family, str] = {
    "resenc": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "plain": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
}
PRIMUS = "mfm_nnunet.models.primus.PrimusSeg"
PUBLISHED_UNETS = ("ResEncL",)
"""Names that stand for a whole network: norms and activations are known without arguments."""
_BLOCK = re.compile(r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.(?:conv|all_modules\.0)\.weight")
_LAYER = re.compile(r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(?:conv|all_modules\.0)\.weight")
_DECODER_LAYER = re.compile(r"decoder\.stages\.(\d+)\.convs\.(\d+)\.(?:conv|all_modules\.0)\.weight")


def unet_architecture(
    family: Family, weights: Mapping[str, Tensor], name: str | None, said: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The architecture of a U-Net, and notes.

    ``name`` and ``said`` are the file's own name of the network, such as ResEncL, and its arguments, if it has any.

    Raises MFMError (E_MODEL_MISMATCH) when convolutions of a stage are missing.
    """
    layers = _matches(_BLOCK if family == "resenc" else _LAYER, weights)
    num_stages = 1 + max((stage for stage, _ in layers), default=0)
    missing = [stage for stage in range(num_stages) if (stage, 0) not in layers]
    if missing:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"stage {missing[0]} of its U-Net has no first convolution among the weights: they are not a whole "
            "encoder, or of a network that we do not know.",
        )
    first = [layers[stage, 0] for stage in range(num_stages)]
    num_axes = first[0].ndim - 2
    strides, notes = _strides(num_stages, num_axes, weights, said)
    depths = [sum(stage == wanted for stage, _ in layers) for wanted in range(num_stages)]
    convolution = "encoder.stem.convs.0" if family == "resenc" else "encoder.stages.0.0.convs.0"
    kwargs = {
        "n_stages": num_stages,
        "features_per_stage": [int(weight.shape[0]) for weight in first],
        "conv_op": f"torch.nn.modules.conv.Conv{num_axes}d",
        "kernel_sizes": [[int(size) for size in weight.shape[2:]] for weight in first],
        "strides": strides,
        ("n_blocks_per_stage" if family == "resenc" else "n_conv_per_stage"): depths,
        "n_conv_per_stage_decoder": _decoder_depths(num_stages, weights),
        "conv_bias": any(f"{convolution}.{name}.bias" in weights for name in ("conv", "all_modules.0")),
    }
    if not {"norm_op", "nonlin"} <= set(said) and name not in PUBLISHED_UNETS:
        notes.append("norms and activations: InstanceNorm and LeakyReLU, as nnU-Net's; the file does not say")
    kwargs |= {key: said.get(key, value) for key, value in between_convolutions(num_axes).items()}
    return {
        "network_class_name": UNETS[family],
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }, notes


def between_convolutions(num_axes: int) -> dict[str, Any]:
    """nnU-Net's norm, dropout and activation."""
    return {
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{num_axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def primus_architecture(
    weights: Mapping[str, Tensor], patch_size: Sequence[int], name: str | None, said: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The architecture of a Primus for ``patch_size`` (voxels), and notes; ``name`` is the file's, such as PrimusM.

    Raises MFMError (E_MODEL_MISMATCH) when the number of heads is said nowhere and the width is of no published size,
    and as :func:`patch_embedding`.
    """
    embedding = patch_embedding(weights)
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("eva.blocks."))
    heads, notes = _num_heads(int(embedding.shape[0]), name, said)
    kwargs = {
        "embed_dim": int(embedding.shape[0]),
        "patch_embed_size": [int(size) for size in embedding.shape[2:]],
        "input_shape": [int(size) for size in patch_size],
        "eva_depth": depth,
        "eva_numheads": heads,
        # The start of the layer scale is of no account here; whether there is one decides about the function.
        "init_values": 0.1 if "eva.blocks.0.gamma_1" in weights else None,
        "scale_attn_inner": "eva.blocks.0.attn.norm.weight" in weights,
    }
    return {"network_class_name": PRIMUS, "arch_kwargs": kwargs, "_kw_requires_import": []}, notes


def patch_embedding(weights: Mapping[str, Tensor]) -> Tensor:
    """The kernel of Primus' patch embedding (E, C, *token).

    Raises MFMError (E_MODEL_MISMATCH) where there is none: versions 2 and 3 have a convolutional stem in its place.
    """
    embedding = weights.get("down_projection.proj.weight")
    if embedding is None:
        raise MFMError(
            "E_MODEL_MISMATCH",
            "there is no 'down_projection.proj.weight' beside the transformer: it is no Primus of version 1, and only "
            "those are read from other programs.",
        )
    return embedding


def _matches(pattern: re.Pattern[str], weights: Mapping[str, Tensor]) -> dict[tuple[int, int], Tensor]:
    found = ((pattern.fullmatch(name), tensor) for name, tensor in weights.items())
    return {(int(match[1]), int(match[2])): tensor for match, tensor in found if match}


def _decoder_depths(num_stages: int, weights: Mapping[str, Tensor]) -> list[int]:
    layers = _matches(_DECODER_LAYER, weights)
    return [max(1, sum(stage == wanted for stage, _ in layers)) for wanted in range(num_stages - 1)]


def _strides(
    num_stages: int, num_axes: int, weights: Mapping[str, Tensor], said: Mapping[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """Strides of the encoder's stages: as the decoder undoes them, else as the file says, else halving."""
    ups = [weights.get(f"decoder.transpconvs.{i}.weight") for i in range(num_stages - 1)]
    if all(up is not None for up in ups):
        return [[1] * num_axes] + [[int(size) for size in up.shape[2:]] for up in reversed(ups) if up is not None], []
    if len(told := said.get("strides") or ()) == num_stages:
        return [[stride] * num_axes if isinstance(stride, int) else list(stride) for stride in told], []
    halving = [[1] * num_axes] + [[2] * num_axes] * (num_stages - 1)
    return halving, ["strides: 2 along each axis in all stages but the first, as in ResEnc-L; the file does not say"]


def _num_heads(embed_dim: int, name: str | None, said: Mapping[str, Any]) -> tuple[int, list[str]]:
    published = PRIMUS_SIZES.get((name or "").removeprefix("Primus"))
    if (told := said.get("eva_numheads") or said.get("num_heads")) is not None:
        return int(told), []
    if published is not None:
        return published["eva_numheads"], []
    for size, values in PRIMUS_SIZES.items():
        if values["embed_dim"] == embed_dim:
            return values["eva_numheads"], [f"heads: {values['eva_numheads']}, those of the size {size} of this width"]
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"a transformer of width {embed_dim} is none of the published sizes, and the file does not say how many heads "
        "it has: its attention cannot be rebuilt.",
    )
