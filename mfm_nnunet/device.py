"""Choose the device and precision; determine available memory and the number of readers.

torch is imported on use: the check of an image file only needs the memory and must not wait for torch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_nnunet.errors import OUT_OF_SHARED_MEMORY_WORDS, MFMError, is_out_of_memory
from mfm_nnunet.version import __version__
from mfm_nnunet.workspace import num_cores

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

CONTROL_GROUPS = "/sys/fs/cgroup"

_MORE_SHARED_MEMORY = (
    "Batches come from the background processes through /dev/shm: start the container with --shm-size=16g or "
    "--ipc=host, or read in the foreground with --set num_workers=0."
)


def pick_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the first GPU, else the CPU.

    Raises MFMError (E_CONFIG) for an unknown or unavailable device.
    """
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    available = {"cpu": True, "cuda": cuda, "mps": mps}
    kind = name.split(":")[0]
    if kind not in available:
        raise MFMError("E_CONFIG", f"-device {name}: known devices are cpu, cuda and mps.")
    if not available[kind]:
        raise MFMError("E_CONFIG", f"-device {name}: this computer has none. Use -device cpu.")
    device = torch.device(name)
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MFMError("E_CONFIG", f"-device {name}: this computer has {torch.cuda.device_count()} GPUs.")
    return device


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return the context for mixed precision with ``dtype``; None computes in float32."""
    import torch

    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


@contextlib.contextmanager
def default_autocast_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Set the default dtype of CUDA's autocast, which nnU-Net uses; None leaves it unchanged.

    fp16 overflows above 65504, so a network trained in bf16 must not run in fp16.
    """
    import torch

    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cuda", before)


def finetuning_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of ``finetune.precision``, None for float32. auto is nnU-Net's; fp16 needs CUDA."""
    import torch

    if precision in ("auto", "fp16"):
        return torch.float16 if device.type == "cuda" else None
    return torch.bfloat16 if precision == "bf16" else None


def require_scaled_fp16(precision: str, device: torch.device) -> None:
    """Raise MFMError (E_CONFIG) for fp16 training where nnU-Net does not scale the loss, which fp16 needs."""
    if precision == "fp16" and device.type != "cuda":
        raise MFMError(
            "E_CONFIG",
            f"finetune.precision=fp16: only for CUDA GPUs, this is {device.type}. Use finetune.precision=bf16 or fp32.",
        )


def require_sound_bf16(network: nn.Module, image_size: Sequence[int], device: torch.device, setting: str) -> None:
    """Raise MFMError (E_CONFIG) if bf16 convolutions on CPUs would return wrong weight gradients.

    In torch 2.14 (oneDNN) 3D kernels longer than 1 read uninitialised memory on feature maps of two voxels along the
    first axis. Maps of 1, 3 or more are right, and so are 2D ones. ``image_size`` is the network's input, in voxels;
    ``setting`` is named in the message. Networks without strides per stage (transformers) are not affected.
    """
    encoder: Any = getattr(network, "encoder", None)
    if device.type != "cpu" or len(image_size) != 3 or not hasattr(encoder, "strides"):
        return
    strides = (int(stride[0]) for stride in encoder.strides)
    sizes = itertools.accumulate(strides, lambda size, stride: -(-size // stride), initial=image_size[0])
    if any(size == 2 and kernel[0] > 1 for size, kernel in zip(list(sizes)[1:], encoder.kernel_sizes)):
        raise MFMError(
            "E_CONFIG",
            f"{setting}=bf16: a feature map of this network has two voxels along the first axis (images of "
            f"{tuple(image_size)}), where torch's bf16 convolutions give wrong gradients on CPUs. Use {setting}=fp32.",
        )


def has_bf16() -> bool | None:
    """Return whether this CPU computes in bf16; None if torch does not say, or the CPU is not an x86."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("architecture") != "x86_64":
        return None
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """Return bf16 for a CPU that computes in it, else None; says so where it does not."""
    import torch

    if device.type == "cpu" and not has_bf16():
        logger.warning("this CPU does not compute in bf16: float32 is used")
        return None
    return torch.bfloat16 if device.type == "cpu" else None


def warn_of_slow_bf16(device: torch.device, setting: str) -> None:
    """Warn if the CPU has no bf16 arithmetic: torch emulates it, which took six times as long with AVX2.

    Only x86 is checked, and only if torch reports capabilities.
    """
    if device.type == "cpu" and has_bf16() is False:
        logger.warning(
            "%s=bf16: this CPU has neither AVX512-BF16 nor AMX, so bf16 is emulated; %s=fp32 is probably faster",
            *(setting, setting),
        )


@contextlib.contextmanager
def out_of_memory_is_an_error(advice: str) -> Iterator[None]:
    """Raise MFMError (E_OOM) with the reason and ``advice`` if memory runs out inside."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        if any(words in str(error) for words in OUT_OF_SHARED_MEMORY_WORDS):
            advice = _MORE_SHARED_MEMORY
        raise MFMError("E_OOM", f"training needs more memory than is available ({reason}). {advice}") from error


def default_workers(world_size: int = 1) -> int:
    """Return the number of background readers per process: 0 on up to two cores (they would compete), else up to 8."""
    cores = num_cores() // world_size
    return 0 if cores <= 2 else min(cores - 1, 8)


def available_memory() -> int:
    """Return the bytes of main memory available to this process: of the computer or, if less, of its container.

    The result is ``sys.maxsize`` if the system does not report it. Memory of other programs is not subtracted.
    """
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return sys.maxsize
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_memory_limits()])


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Return the most bytes that this process used so far, on the GPU or in main memory, and the bytes available."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    import resource  # not on Windows, like the rest of training

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, available_memory()


def require_memory(needed: int, what: str, advice: str) -> None:
    """Raise MFMError (E_TOO_LARGE) if ``what``, the beginning of a sentence, needs more than the available memory."""
    available = available_memory()
    if needed > available:
        raise MFMError(
            "E_TOO_LARGE",
            f"{what} needs {needed / 1e9:.1f} GB of memory, but only {available / 1e9:.1f} GB are available. {advice}",
        )


@functools.cache
def _memory_limits() -> list[int]:
    """Return the memory limits of this process's control groups (v2), which containers and schedulers set."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = Path(f"{CONTROL_GROUPS}/{own}")
    limits = []
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit; outside the groups there is no such file
            limits.append(int((folder / "memory.max").read_text()))
    return limits


@contextlib.contextmanager
def training_threads(device: torch.device) -> Iterator[None]:
    """Use all cores for training on the CPU, one thread with a GPU; restore the number afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(num_cores() if device.type == "cpu" else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def gpu_settings(device: torch.device, dtype: torch.dtype, cpu_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Use mixed precision and cuDNN's search on a CUDA device, like stock nnU-Net; restore the settings afterwards.

    ``cpu_dtype`` is used elsewhere; None computes in float32.
    """
    import torch

    before, is_gpu = torch.backends.cudnn.benchmark, device.type == "cuda"
    torch.backends.cudnn.benchmark = before or is_gpu
    try:
        with autocast(device, dtype if is_gpu else cpu_dtype):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe_versions(device: torch.device) -> dict[str, str]:
    """Return the versions of what makes a mask, and the kind of device."""
    import torch

    names = {"mfm_nnunet": __version__, "nnunetv2": version("nnunetv2"), "torch": torch.__version__}
    return {**names, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
