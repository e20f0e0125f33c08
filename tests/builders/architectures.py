"""The ``architecture`` of a plan, for networks small enough to test with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def resenc(
    num_axes: int = 3, features: Sequence[int] = (4, 8, 8), blocks: Sequence[int] | None = None
) -> dict[str, Any]:
    """A residual encoder U-Net with one stage per entry of ``features``; all strides but the first are 2."""
    num_stages = len(features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": num_stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{num_axes}d",
            "kernel_sizes": [[3] * num_axes] * num_stages,
            "strides": [[1] * num_axes] + [[2] * num_axes] * (num_stages - 1),
            "n_blocks_per_stage": list(blocks or [1] * num_stages),
            "n_conv_per_stage_decoder": [1] * (num_stages - 1),
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


def plain(num_axes: int = 3, features: Sequence[int] = (4, 8, 8)) -> dict[str, Any]:
    """The same without residual connections: its first stage is the stem."""
    architecture = resenc(num_axes, features)
    kwargs = architecture["arch_kwargs"]
    kwargs["n_conv_per_stage"] = kwargs.pop("n_blocks_per_stage")
    return architecture | {"network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet"}


def primus(patch_size: Sequence[int], embed_dim: int = 48, **changes: Any) -> dict[str, Any]:
    """A Primus of two blocks and two heads."""
    return {
        "network_class_name": "mfm_nnunet.models.primus.PrimusSeg",
        "arch_kwargs": {
            "embed_dim": embed_dim,
            "patch_embed_size": [8] * len(patch_size),
            "input_shape": list(patch_size),
            "eva_depth": 2,
            "eva_numheads": 2,
            **changes,
        },
        "_kw_requires_import": [],
    }


def pctnet(patch_size: Sequence[int], features: Sequence[int] = (4, 4, 8, 8), **changes: Any) -> dict[str, Any]:
    """A PCT-Net without dropout; its deepest map is two to four places wide, and windows of three need padding."""
    num_axes, num_levels = len(patch_size), len(features)
    return {
        "network_class_name": "mfm_nnunet.models.pctnet.PCTNet",
        "arch_kwargs": {
            "features_per_stage": list(features),
            "strides": [[1] * num_axes] + [[2] * num_axes] * (num_levels - 1),
            "kernel_sizes": [[3] * num_axes] * num_levels,
            "num_heads": [2] * (num_levels - 2),
            "windows": [[3] * num_axes] * (num_levels - 2),
            "dropout": 0.0,
            "drop_path": 0.0,
            **changes,
        },
        "_kw_requires_import": [],
    }


def swin(patch_size: Sequence[int], **changes: Any) -> dict[str, Any]:
    """A Swin U-Net of three stages, with tokens of two voxels and windows of three or four tokens."""
    num_axes = len(patch_size)
    kwargs = {
        "embed_dim": 12,
        "depths": [2, 2, 2],
        "num_heads": [1, 2, 4],
        "stem": [2] * num_axes,
        "merging": [[2] * num_axes] * 2,
        "window": [3 if size % 24 == 0 else 4 for size in patch_size],
    }
    return {
        "network_class_name": "mfm_nnunet.models.swin.SwinUNet",
        "arch_kwargs": kwargs | changes,
        "_kw_requires_import": [],
    }


def natural(patch_size: Sequence[int], encoder: str = "test_vit", **changes: Any) -> dict[str, Any]:
    """One of the small encoders that timm tests itself with; ``test_vit`` has six blocks and patches of 16 voxels."""
    from mfm_nnunet.models.natural_family import natural_architecture

    architecture = natural_architecture(encoder, "slices", (4, 4, 8, 8, 8, 8), patch_size, (1, 1))
    architecture["arch_kwargs"] |= changes
    return architecture
