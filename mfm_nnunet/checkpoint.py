"""Read and write the checkpoint format.

A checkpoint is nnU-Net's ``.pth`` layout (``network_weights``) plus the key ``mfm``. It holds only tensors and JSON
values, so it loads with ``weights_only=True`` and cannot run code. It is written to a temporary file, flushed to disk
and renamed, so a killed process never leaves half a file under the final name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import MAX_DEPTH, atomic_write, is_nested_too_deep


def save(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``content`` (tensors and plain values) to ``path`` atomically.

    Raises AssertionError if ``content`` could not be loaded safely, MFMError for a full disk.
    """
    require_plain(content)
    with atomic_write(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            # torch's zip writer replaces our write error by a RuntimeError, which hides the cause.
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint on the CPU without running any code in the file.

    Raises MFMError: E_NOT_FOUND, E_EMPTY, E_MODEL_CORRUPT (not a checkpoint, truncated, or a failed checksum),
    E_MODEL_UNSAFE (it holds objects other than tensors and plain values).
    """
    file = Path(path)
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{file}: no such checkpoint. Check the path.")
    if file.stat().st_size == 0:
        raise MFMError("E_EMPTY", f"{file}: the checkpoint is empty. Copy it again.")
    try:
        with _plain_values_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol of files that are refused anyway
            if _is_archive(file):
                if get_unsafe_globals_in_checkpoint(file):  # before reading gigabytes for the checksums
                    raise _unsafe(file)
                with zipfile.ZipFile(file) as archive:  # torch writes the CRC of each member but does not check it
                    if broken := archive.testzip():
                        raise _damaged(file, f"the checksum of {broken} does not match")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (MFMError, MemoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise _unsafe(file) from error
    except Exception as error:  # damaged files raise arbitrary errors
        raise _damaged(file, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(content, dict):
        raise MFMError("E_MODEL_CORRUPT", f"{file}: not a checkpoint (it contains a {type(content).__name__}).")
    if is_nested_too_deep(content):
        raise _damaged(file, f"it is nested more than {MAX_DEPTH} levels deep")
    return content


def load_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a file that must contain ``network_weights``, as :func:`load`.

    Raises MFMError (E_MODEL_CORRUPT) if the key is missing.
    """
    content = load(path)
    if not isinstance(content.get("network_weights"), dict):
        keys = ", ".join(map(str, list(content)[:5]))
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{path}: not a checkpoint of nnU-Net or mfm_nnunet: there is no 'network_weights', only {keys}.",
        )
    return content


def require_plain(value: Any, name: str = "checkpoint") -> None:
    """Assert that ``value`` is made of tensors, plain scalars, strings, lists and dicts."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert isinstance(key, (str, int)), f"{name}: key {key!r} is not plain"
            require_plain(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            require_plain(item, name)
    else:
        plain = value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor)
        assert plain, f"{name}: {type(value).__name__} is not plain"


def cpu_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move a state dict to the CPU; tensors that share memory still do so (nnU-Net has many aliases)."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().cpu()
        result[name] = copies[key]
    return result


def _damaged(file: Path, reason: str) -> MFMError:
    return MFMError("E_MODEL_CORRUPT", f"{file}: not a checkpoint, or damaged ({reason}). Copy it again.")


def _unsafe(file: Path) -> MFMError:
    return MFMError(
        "E_MODEL_UNSAFE",
        f"{file}: the file has objects other than tensors and plain values, which could run code when loaded. It was "
        "refused. Ask its author for a file of plain tensors.",
    )


def _is_archive(file: Path) -> bool:
    """Return True for a complete zip archive of torch, False for a bare pickle from before torch 1.6."""
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as handle:
            start = handle.read(2)
        if start == b"PK":
            raise _damaged(file, "the archive is cut off")
        if start[:1] == b"\x80":
            return False
        raise _damaged(file, "it is not a torch archive")
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in archive.infolist()):
            raise _damaged(file, "members of the archive are compressed or encrypted, which torch never does")
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                archive.read(name)  # raises if the checksum does not match
    return True


@contextlib.contextmanager
def _plain_values_allowed() -> Iterator[None]:
    """Allow NumPy scalars (in the log of stock nnU-Net) and a script's arguments: neither can run code."""
    import numpy as np

    core: Any = np._core if hasattr(np, "_core") else np.core
    scalar = core.multiarray.scalar
    names: list[Any] = [np.dtype, scalar, type(np.dtype("float32")), type(np.dtype("float64")), type(np.dtype("int64"))]
    names.append((scalar, "numpy.core.multiarray.scalar"))
    with torch.serialization.safe_globals([*names, argparse.Namespace]):
        yield
