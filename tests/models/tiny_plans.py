"""Plans of networks so small that a training step takes milliseconds, for both families, in 3D and 2D."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mfm_nnunet.models.backbone import AbstractBackbone, make_backbone
from mfm_nnunet.models.build import build_network

CONFIGURATION = "3d_fullres"


def tiny_plans(family: str, patch_size: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """A plan with what ``build_network`` reads; ``changes`` go into the network's arguments."""
    architecture = _resenc(len(patch_size)) if family == "resenc" else _primus(patch_size)
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
    restores: bool = True,
    **changes: Any,
) -> AbstractBackbone:
    network = tiny_network(family, patch_size, num_inputs, num_outputs, **changes)
    return make_backbone(network, patch_size, restores)


def _resenc(num_axes: int) -> dict[str, Any]:
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [8, 16, 16],
            "conv_op": f"torch.nn.modules.conv.Conv{num_axes}d",
            "kernel_sizes": [[3] * num_axes] * 3,
            "strides": [[1] * num_axes, [2] * num_axes, [2] * num_axes],
            "n_blocks_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{num_axes}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _primus(patch_size: tuple[int, ...]) -> dict[str, Any]:
    return {
        "network_class_name": "mfm_nnunet.models.primus.PrimusSeg",
        "arch_kwargs": {
            "embed_dim": 48,
            "patch_embed_size": [8] * len(patch_size),
            "input_shape": list(patch_size),
            "eva_depth": 2,
            "eva_numheads": 2,
        },
        "_kw_requires_import": [],
    }
