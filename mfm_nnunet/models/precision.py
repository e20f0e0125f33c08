"""What fine-tuning computes in, and where half precision would train garbage without a word, or slowly."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mfm_nnunet.errors import MFMError

logger = logging.getLogger(__name__)


def finetuning_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``finetune.precision`` computes in, None for float32; auto is nnU-Net's, and fp16 is for CUDA alone."""
    if precision in ("auto", "fp16"):
        return torch.float16 if device.type == "cuda" else None
    return torch.bfloat16 if precision == "bf16" else None


def require_scaled_fp16(precision: str, device: torch.device) -> None:
    """Raise MFMError (E_CONFIG) for training in fp16 where nnU-Net does not scale the losses, which fp16 needs."""
    if precision == "fp16" and device.type != "cuda":
        raise MFMError(
            "E_CONFIG",
            f"finetune.precision=fp16: only for CUDA GPUs, this is {device.type}. Use finetune.precision=bf16 or fp32.",
        )


def require_sound_bf16(network: nn.Module, image_size: Sequence[int], device: torch.device, setting: str) -> None:
    """Raise MFMError (E_CONFIG) where bf16 convolutions on CPUs get the weight gradient of uninitialised memory.

    With torch 2.14 (oneDNN) that is so for 3D kernels longer than 1 on feature maps of two voxels along the first axis;
    maps of 1, 3 or more are right, and so are 2D ones. ``image_size`` is what the network sees, in voxels; ``setting``
    is named in the message. Networks without strides per stage (transformers) are not concerned.
    """
    encoder: Any = getattr(network, "encoder", None)
    if device.type != "cpu" or len(image_size) != 3 or not hasattr(encoder, "strides"):
        return
    sizes = itertools.accumulate((int(stride[0]) for stride in encoder.strides), _halved, initial=image_size[0])
    if any(size == 2 and kernel[0] > 1 for size, kernel in zip(list(sizes)[1:], encoder.kernel_sizes)):
        raise MFMError(
            "E_CONFIG",
            f"{setting}=bf16: a feature map of this network has two voxels along the first axis (images of "
            f"{tuple(image_size)}), where torch's bf16 convolutions give wrong gradients on CPUs. Use {setting}=fp32.",
        )


def warn_of_slow_bf16(device: torch.device, setting: str) -> None:
    """Log a warning where the CPU has no bf16 arithmetic: torch imitates it, which took six times as long with AVX2.

    What other processors than x86 can do is not looked at, nor with a torch that does not tell.
    """
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    if device.type == "cpu" and capabilities.get("architecture") == "x86_64" and not has_bf16:
        logger.warning(
            "%s=bf16: this CPU has neither AVX512-BF16 nor AMX, so bf16 is imitated; %s=fp32 is probably faster",
            *(setting, setting),
        )


def _halved(size: int, stride: int) -> int:
    """Size after a padded convolution with this stride."""
    return -(-size // stride)
