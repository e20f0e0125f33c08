"""Files: safe names, JSON, atomic writing, full disks, locks and journals.

Datasets, plans and checkpoints are downloaded, so a name in them may be ``../../.bashrc``. Every output path is built
by :func:`inside`. Files are replaced and never written through a link.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mfm_nnunet.errors import MFMError

try:
    import fcntl
except ImportError:  # POSIX only; without it leftovers stay and folders are not locked
    fcntl = None  # type: ignore[assignment]

IMAGE_ENDINGS = (
    *(".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"),
)
"""Endings of readable image files, in lower case; ``.nii.gz`` before ``.nii``."""
MAX_DEPTH = 100
"""Nesting limit of tables and lists in a file; nnU-Net's and ours have about ten levels."""
MAX_BYTES = 255
"""Longest file name, in bytes as stored by the file system."""
_NAME = re.compile(r"\w[\w .,+()=@&~-]*(?<![ .])")
_NUMBER = re.compile(r"[0-9]{1,9}")
_NO_LETTER = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]")
_TEMPORARY_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
_HEADER_BYTES = 1 << 16
"""Size of a file's content besides the voxels."""


# Names and paths


def ending_of(path: Path) -> str:
    """Return the known ending of an image file's name in lower case, e.g. ``.nii.gz``; "" for an unknown one."""
    name = path.name.lower()
    return next((ending for ending in IMAGE_ENDINGS if name.endswith(ending)), "")


def is_name(value: Any) -> bool:
    """Return whether ``value`` can name a dataset, a plan, a configuration or a folder of data.

    Letters of any script, digits, ``_`` and a few signs, starting with one of the first three; at most 120 characters.
    """
    return isinstance(value, str) and len(value) <= 120 and bool(_NAME.fullmatch(value)) and is_file_name(value)


def is_file_name(value: Any) -> bool:
    """Return whether ``value`` is the name of one file: no separator, no control character, valid UTF-8.

    Bidirectional marks, which reverse names on the screen, are legal: they do not change the path.
    """
    if not isinstance(value, str) or value in ("", ".", "..") or not is_unicode(value):
        return False
    return not _NO_LETTER.search(value) and len(value.encode()) <= MAX_BYTES


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; Python represents names in other encodings by surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: object) -> str:
    """Make ``text`` printable; characters that UTF-8 cannot encode become e.g. ``\\udcfc``."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def inside(folder: Path, *names: str, code: str = "E_CONFIG") -> Path:
    """Build the path of an output, ``folder/name/...``; each name is that of one file or folder.

    Raises MFMError (``code``) for a name that leads out of ``folder`` or is not a legal file name.
    """
    for name in names:
        if not is_file_name(name):
            raise MFMError(
                code,
                f"{shown(name)!r} cannot be the name of a file in {shown(folder)}: a name has no / or \\, no control "
                f"characters, is UTF-8 and at most {MAX_BYTES} bytes long. Rename it.",
            )
    return folder.joinpath(*names)


def require_unicode(path: str | os.PathLike[str], what: str) -> None:
    """Raise MFMError (E_CONFIG) for a path that is not UTF-8: libraries that write images would abort on it."""
    if not is_unicode(os.fspath(path)):
        raise MFMError(
            "E_CONFIG", f"{what} {shown(path)}: this path is not UTF-8, so images cannot be written there. Rename it."
        )


def whole_number(text: str) -> int | None:
    """Parse up to nine ASCII digits; return None for anything else, such as ``²``, -1 or 1.0."""
    return int(text) if _NUMBER.fullmatch(text) else None


def not_regular(file: Path) -> MFMError:
    """Return the error (E_NOT_REGULAR) for a link, folder, pipe or device in place of an output file."""
    kind = "a link" if file.is_symlink() else "a folder, pipe or device"
    return MFMError("E_NOT_REGULAR", f"{file}: this is {kind}, but the command writes a file here. Move it away.")


def refuse_links(folder: Path, endings: tuple[str, ...] = (".json", ".png", ".txt", ".jsonl")) -> None:
    """Raise MFMError (E_NOT_REGULAR) for a link among the files that nnU-Net overwrites: JSON, logs, plots.

    Checkpoints may be links: they are replaced as a whole.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if links := [entry for entry in entries if entry.is_symlink() and entry.suffix in endings]:
        raise not_regular(links[0])


# JSON


def is_nested_too_deep(value: Any) -> bool:
    """Return whether tables and lists are nested so deep that recursion may fail; see ``MAX_DEPTH``."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        items = (item for entry in level for item in (entry.values() if isinstance(entry, Mapping) else entry))
        level = [item for item in items if isinstance(item, (Mapping, list, tuple))]
        if not level:
            return False
    return True


def parse_json(content: bytes | str) -> Any:
    """Parse JSON text; every JSON file in this package is read through this function.

    A byte order mark, which Windows editors write, is skipped. Raises ValueError for invalid JSON and for too deep
    nesting.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from error
    if is_nested_too_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def read_json(file: Path, advice: str, code: str = "E_FORMAT") -> dict[str, Any]:
    """Return the JSON object in ``file``; ``advice``, a sentence, ends the messages.

    Raises MFMError: E_NOT_FOUND, or ``code`` if the file cannot be read or holds something else.
    """
    try:
        content = parse_json(file.read_bytes())
    except FileNotFoundError as error:
        raise MFMError("E_NOT_FOUND", f"{file}: no such file. {advice}") from error
    except ValueError as error:
        raise MFMError(code, f"{file}: cannot be read as JSON ({error}). {advice}") from error
    if not isinstance(content, dict):
        raise MFMError(code, f"{file}: expected a JSON object, a table of names and values. {advice}")
    return content


def write_json(file: Path, content: Any, indent: int = 1) -> None:
    """Write JSON as :func:`atomic_write`."""
    with atomic_write(file) as handle:
        handle.write(json.dumps(content, indent=indent).encode())


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table atomically; floats have six digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    with atomic_write(file) as handle:
        handle.write(text.getvalue().encode())


def to_plain(value: Any) -> Any:
    """Convert NumPy scalars and arrays to numbers and lists, paths and devices to text.

    Tensors are kept: checkpoints hold them.
    """
    if isinstance(value, Mapping):
        return {(key if isinstance(key, (str, int)) else str(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str) or hasattr(value, "detach"):
        return value
    return to_plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def is_same(one: Any, other: Any) -> bool:
    """Compare two values as JSON: keys are text, sequences are lists, 1 equals 1.0, and NaN equals itself."""
    return bool(_comparable(to_plain(one)) == _comparable(to_plain(other)))


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return str(float(value)) if type(value) in (int, float) else value


def digest_of(content: Any) -> str:
    """Return the SHA-256 of a value as JSON, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(to_plain(content), sort_keys=True).encode()).hexdigest()


def sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# Atomic writing


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing such that it appears whole or not at all.

    Leftover files of killed processes beside it are removed. Raises MFMError (E_DISK_FULL) if the disk is full; an
    existing file of that name is then unchanged.
    """
    target = Path(path)
    remove_leftovers(target.parent)
    with report_full_disk(target), _temporary(target) as (temporary, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, target)  # while it is open: closing it ends the lock, and it would look like a leftover
        sync_folder(target.parent)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """Open a new file beside ``target``, locked to mark it as in use; it is removed at the end."""
    while True:
        # No process number: containers and hosts that share a disk have colliding ones.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        with open(temporary, "xb") as file:
            try:
                if take_lock(file.fileno()) is False or not temporary.exists():
                    continue  # another process removed it as a leftover
                yield temporary, file
                return
            finally:
                temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder; those of living processes are locked."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY_NAME.fullmatch(name):
                with contextlib.suppress(OSError), locked(folder / name) as is_free:
                    if is_free:
                        (folder / name).unlink()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; some network shares do not support this."""
    with contextlib.suppress(OSError):
        sync(folder)


# Full disks


def is_disk_full(error: BaseException) -> bool:
    """Return whether the operating system refused a write for lack of space."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(path: Path) -> MFMError:
    """Return the error for a full disk; existing files are unchanged."""
    return MFMError("E_DISK_FULL", f"{path}: the disk is full. Free some space and run the command again.")


@contextlib.contextmanager
def report_full_disk(path: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Convert the system's errors of a full disk to MFMError (E_DISK_FULL) that names ``path``.

    If ``path`` is a folder, the message names the file in it that the error names, if any. Libraries often hide the
    cause: with ``num_bytes``, the size of their output, other errors count as well if that many bytes cannot be written
    there.
    """
    try:
        yield
    except MFMError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and is_disk_full(error):
            named = error.filename2 or error.filename  # for a copy, the second name is the output
            is_better = path.is_dir() and isinstance(named, (str, bytes, os.PathLike))
            raise disk_full(Path(os.fsdecode(named)) if is_better else path) from error
        is_hidden = num_bytes is not None and getattr(error, "errno", None) in (None, errno.EIO)
        if is_hidden and not _has_room(path.parent, (num_bytes or 0) + _HEADER_BYTES):
            raise disk_full(path) from error
        raise


def _has_room(folder: Path, num_bytes: int) -> bool:
    """Test whether this many bytes can be written into a folder; the free space of a disk does not reflect quotas."""
    if shutil.disk_usage(folder).free < num_bytes:
        return False
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(num_bytes))
    except OSError as error:
        return not is_disk_full(error)
    return True


# Locks and journals


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder for this process, and yield whether that worked.

    It fails if another process holds the lock, and on a file system without locks. The system releases the lock of a
    dead process.
    """
    # Do not follow links, and do not wait for a pipe.
    safely = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, safely | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
    try:
        yield bool(take_lock(handle))
    finally:
        os.close(handle)


def take_lock(handle: int) -> bool | None:
    """Lock an open file until it is closed; False if another process holds the lock, None if locks are unsupported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def open_to_append(file: Path) -> IO[bytes]:
    """Open a log for reading and appending; the caller closes it.

    Raises MFMError (E_NOT_REGULAR) for a link, which would lead to another file, and for a pipe or device.
    """
    safely = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = open(file, "a+b", opener=lambda path, flags: os.open(path, flags | safely, 0o666))  # noqa: SIM115
    except io.UnsupportedOperation as error:  # a pipe cannot be read from its beginning
        raise not_regular(file) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise not_regular(file) from error
        raise
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise not_regular(file)
    return handle


def append_line(handle: IO[bytes], entry: Mapping[str, Any]) -> None:
    """Append a line of JSON to a journal of :func:`open_to_append` and flush it to disk.

    An unfinished line of a killed process is terminated first. Raises MFMError (E_DISK_FULL).
    """
    with report_full_disk(Path(handle.name)):
        handle.seek(max(0, handle.seek(0, os.SEEK_END) - 1))
        cut_off = handle.read(1) not in (b"", b"\n")
        handle.write(b"\n" * cut_off + json.dumps(entry).encode() + b"\n")
        handle.flush()
        os.fsync(handle.fileno())


def read_lines(file: Path) -> Iterator[Any]:
    """Yield the values of a journal, skipping lines that are not JSON, such as a truncated one."""
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        yield value
