"""Which device a command runs on, and how many background processes read for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mfm_nnunet.errors import OUT_OF_SHARED_MEMORY_WORDS, MFMError, is_out_of_memory
from mfm_nnunet.workspace import num_cores

_MORE_SHARED_MEMORY = (
    "Batches travel from the background processes through /dev/shm: start the container with --shm-size=16g or "
    "--ipc=host, or read in the foreground with --set num_workers=0."
)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU there is, else the CPU.

    Raises MFMError (E_CONFIG) for an unknown device and for one that this computer lacks.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    available = {"cpu": True, "cuda": cuda, "mps": mps}
    kind = name.split(":")[0]
    if kind not in available:
        raise MFMError("E_CONFIG", f"-device {name}: known devices are cpu, cuda and mps.")
    if not available[kind]:
        raise MFMError("E_CONFIG", f"-device {name}: there is none on this computer. Use -device cpu.")
    device = torch.device(name)
    if kind == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MFMError("E_CONFIG", f"-device {name}: this computer has {torch.cuda.device_count()} GPUs.")
    return device


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Mixed precision with ``dtype``; None computes in float32."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


@contextlib.contextmanager
def default_autocast_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, CUDA's autocast without a dtype, as nnU-Net uses it, takes this one; None leaves it as it is.

    What is larger than 65504 is infinite in fp16, so a network that was trained in bf16 is not to be tried in fp16.
    """
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype or before)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cuda", before)


@contextlib.contextmanager
def out_of_memory_is_an_error(advice: str) -> Iterator[None]:
    """Raise MFMError (E_OOM) with the reason and ``advice`` for what runs out of memory inside."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        if any(words in str(error) for words in OUT_OF_SHARED_MEMORY_WORDS):
            advice = _MORE_SHARED_MEMORY
        raise MFMError("E_OOM", f"training needs more memory than there is ({reason}). {advice}") from error


def default_workers(world_size: int = 1) -> int:
    """Background readers per process: none on two cores or fewer (they would only compete), else up to eight."""
    cores = num_cores() // world_size
    return 0 if cores <= 2 else min(cores - 1, 8)
