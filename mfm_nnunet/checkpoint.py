"""Read, write and describe the one checkpoint format.

A checkpoint is nnU-Net's ``.pth`` layout (``network_weights``) plus the key ``mfm``: tensors and JSON values only, so
it loads with ``weights_only=True`` and can run no code. It is written to a temporary name beside its target, flushed
to the disk and renamed, so a killed process never leaves half a file under the final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import re
import secrets
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import MAX_DEPTH, is_nested_too_deep

try:
    import fcntl
except ImportError:  # only POSIX has it; without it leftovers stay
    fcntl = None  # type: ignore[assignment]

_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing such that it appears whole or not at all.

    What killed processes left beside it is removed. Raises MFMError (E_DISK_FULL) when the disk is full; an older file
    of that name stays as it was.
    """
    target = Path(path)
    remove_leftovers(target.parent)
    with full_disk_named(target), _temporary(target) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        os.replace(temporary, target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new file beside ``target``, locked so that others see that it is in use; removed at the end."""
    while True:
        # No process number: containers and hosts that share a disk have the same ones.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with open(temporary, "xb") as file:
            try:
                if _lock(file.fileno()) is False or not temporary.exists():
                    continue  # taken for a leftover by a process that was faster
                yield temporary, file
                return
            finally:
                temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder; those of living ones are locked."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY_NAME.fullmatch(name):
                with contextlib.suppress(OSError), locked(folder / name) as is_free:
                    if is_free:
                        (folder / name).unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder for this process, and yield whether that worked; the system unlocks it for a dead one.

    It does not work where another process holds the lock, nor on a file system without locks.
    """
    # Never another file than this one, nor a wait for a pipe.
    safely = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, safely | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    try:
        yield bool(_lock(handle))
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock an open file; False where another process has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_disk_full(error: BaseException) -> bool:
    """Return whether the operating system refused a write for want of space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn the system's errors of a full disk into MFMError (E_DISK_FULL) that names ``path``.

    Where that is a folder, the file in it that the error names, if it names one.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            named = error.filename2 or error.filename  # of a copy, the second is the one that was written
            is_better = path.is_dir() and isinstance(named, (str, bytes, os.PathLike))
            raise disk_full(Path(os.fsdecode(named)) if is_better else path) from error
        raise


def disk_full(path: Path) -> MFMError:
    """The error of a full disk; what was on the disk before is untouched."""
    return MFMError("E_DISK_FULL", f"{path}: the disk is full. Free some space and run the command again.")


def save(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write ``content`` (tensors and plain values) to ``path`` atomically.

    Raises AssertionError when ``content`` holds anything that could not be loaded safely, MFMError for a full disk.
    """
    require_plain(content)
    with atomic_write(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:
            # torch's zip writer turns a failed write of ours into a RuntimeError of its own and hides the cause.
            cause = error.__context__
            if isinstance(cause, OSError):
                raise cause from error
            raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU, without running any code that the file may carry.

    Raises MFMError: E_NOT_FOUND, E_EMPTY, E_MODEL_CORRUPT (not a checkpoint, cut off, or a failed checksum),
    E_MODEL_UNSAFE (it holds objects other than tensors and plain values).
    """
    file = Path(path)
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{file}: no such checkpoint. Check the path.")
    if file.stat().st_size == 0:
        raise MFMError("E_EMPTY", f"{file}: the checkpoint is empty. Copy it again.")
    try:
        with _plain_numpy_allowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol of a file that is refused anyway
            if _is_archive(file):
                if get_unsafe_globals_in_checkpoint(file):  # before gigabytes are read for their checksums
                    raise _unsafe(file)
                _verify_checksums(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (MFMError, MemoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise _unsafe(file) from error
    except Exception as error:  # there is no end to what a damaged file can do to its readers
        raise _damaged(file, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if not isinstance(content, dict):
        raise MFMError("E_MODEL_CORRUPT", f"{file}: not a checkpoint (it holds a {type(content).__name__}).")
    if is_nested_too_deep(content):
        raise _damaged(file, f"it is nested more than {MAX_DEPTH} levels deep")
    return content


def load_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As :func:`load`, for a file that must hold ``network_weights``.

    Raises MFMError (E_MODEL_CORRUPT) when the key is missing.
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
    """A state dict on the CPU in which tensors that share memory still share it (nnU-Net has many aliases)."""
    copies: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().cpu()
        result[name] = copies[key]
    return result


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; file systems that cannot (some network shares) are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _damaged(file: Path, reason: str) -> MFMError:
    return MFMError("E_MODEL_CORRUPT", f"{file}: not a checkpoint, or damaged ({reason}). Copy it again.")


def _unsafe(file: Path) -> MFMError:
    return MFMError(
        "E_MODEL_UNSAFE",
        f"{file}: the file holds objects other than tensors and plain values, which could run code when loaded. It was "
        "refused. Ask its author for a file of plain tensors.",
    )


def _is_archive(file: Path) -> bool:
    """Whether it is torch's zip archive, with a whole list of objects; else a bare pickle, torch's before 1.6."""
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
                archive.read(name)  # raises where its checksum does not match
    return True


def _verify_checksums(file: Path) -> None:
    """torch writes a CRC for each member of its archive but does not check it on loading; we do."""
    with zipfile.ZipFile(file) as archive:
        if broken := archive.testzip():
            raise _damaged(file, f"the checksum of {broken} does not match")


@contextlib.contextmanager
def weights_only_forced() -> Iterator[None]:
    """Inside, ``torch.load`` builds tensors and plain values only, also where code of others asks for anything."""
    force, allow = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (force, allow) if name in os.environ}
    os.environ[force] = "1"
    try:
        with _plain_numpy_allowed():
            yield
    finally:
        del os.environ[force]
        os.environ.update(before)


@contextlib.contextmanager
def _plain_numpy_allowed() -> Iterator[None]:
    """Stock nnU-Net checkpoints hold NumPy scalars in their log; these types carry data and run no code."""
    import numpy as np

    core: Any = np._core if hasattr(np, "_core") else np.core
    scalar = core.multiarray.scalar
    names: list[Any] = [np.dtype, scalar, type(np.dtype("float32")), type(np.dtype("float64")), type(np.dtype("int64"))]
    names.append((scalar, "numpy.core.multiarray.scalar"))
    with torch.serialization.safe_globals(names):
        yield
