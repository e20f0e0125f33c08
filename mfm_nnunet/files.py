"""Names that come out of files, and the paths that are built from them: nothing leaves the folder that it is meant for.

A dataset, a plan or a checkpoint is what people download, so a name in it may be ``../../.bashrc``. Every path that is
written goes through :func:`inside`. Files are replaced and never written through a link.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from mfm_nnunet.errors import MFMError

IMAGE_ENDINGS = (
    *(".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl", ".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"),
)
"""The endings of image files that can be read, in lower case; ``.nii.gz`` before ``.nii``."""
MAX_DEPTH = 100
"""Levels of tables and lists in a file; those of nnU-Net and ours have about ten."""
MAX_BYTES = 255
"""Longest name of a file, in the bytes that a file system stores."""
_NAME = re.compile(r"\w[\w .,+()=@&~-]*(?<![ .])")
_NUMBER = re.compile(r"[0-9]{1,9}")
_NO_LETTER = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]")


def ending_of(path: Path) -> str:
    """Return the known ending of an image file's name in lower case, e.g. ``.nii.gz``; empty for an unknown one."""
    name = path.name.lower()
    return next((ending for ending in IMAGE_ENDINGS if name.endswith(ending)), "")


def is_name(value: Any) -> bool:
    """Return whether ``value`` can name a dataset, a plan, a configuration or a folder of data.

    Letters of any script, digits, ``_`` and a few signs, beginning with one of the first three; at most 120 characters.
    """
    return isinstance(value, str) and len(value) <= 120 and bool(_NAME.fullmatch(value)) and is_file_name(value)


def is_file_name(value: Any) -> bool:
    """Return whether ``value`` is the name of one file: no separator, no control character, and text as UTF-8 has it.

    Bidirectional marks, which turn names round on the screen, are legal: they change no path.
    """
    if not isinstance(value, str) or value in ("", ".", "..") or not is_unicode(value):
        return False
    return not _NO_LETTER.search(value) and len(value.encode()) <= MAX_BYTES


def is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8; names in another encoding reach Python with surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(text: object) -> str:
    """Return ``text`` as it can be printed and written: what UTF-8 cannot hold stands as ``\\udcfc``."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def inside(folder: Path, *names: str, code: str = "E_CONFIG") -> Path:
    """Build the path of an output, ``folder/name/...``; each name is the name of one file or folder.

    Raises MFMError (``code``) for a name that would lead out of ``folder`` or that no file can have.
    """
    for name in names:
        if not is_file_name(name):
            raise MFMError(
                code,
                f"{shown(name)!r} cannot be the name of a file in {shown(folder)}: a name has no / or \\, no control "
                f"characters, is UTF-8 and at most {MAX_BYTES} bytes long. Rename what is called so.",
            )
    return folder.joinpath(*names)


def require_unicode(path: str | os.PathLike[str], what: str) -> None:
    """Raise MFMError (E_CONFIG) for a path that is not UTF-8: the libraries that write images end the process on it."""
    if not is_unicode(os.fspath(path)):
        raise MFMError(
            "E_CONFIG", f"{what} {shown(path)}: this path is not UTF-8, so images cannot be written there. Rename it."
        )


def whole_number(text: str) -> int | None:
    """Return the number that up to nine ASCII digits write; None for anything else, such as ``²``, -1 or 1.0."""
    return int(text) if _NUMBER.fullmatch(text) else None


def not_regular(file: Path) -> MFMError:
    """Return the error (E_NOT_REGULAR) of a link, folder, pipe or device where a file is written."""
    kind = "a link" if file.is_symlink() else "a folder, pipe or device"
    return MFMError("E_NOT_REGULAR", f"{file}: is {kind} where this command writes a file. Move it away.")


def open_to_append(file: Path) -> IO[bytes]:
    """Open a log for reading and appending; the caller closes it.

    Raises MFMError (E_NOT_REGULAR) for a link, which would lead to a file elsewhere, and for a pipe or device.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(file, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise not_regular(file) from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise not_regular(file)
    return os.fdopen(handle, "a+b")


def refuse_links(folder: Path, endings: tuple[str, ...] = (".json", ".png", ".txt", ".jsonl")) -> None:
    """Raise MFMError (E_NOT_REGULAR) for a link among the files that nnU-Net writes through: JSON, logs, plots.

    Checkpoints may be links: they are replaced as a whole.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    if links := [entry for entry in entries if entry.is_symlink() and entry.suffix in endings]:
        raise not_regular(links[0])


def is_nested_too_deep(value: Any) -> bool:
    """Return whether tables and lists are nested deeper than in any file of ours or nnU-Net's: recursion might fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for entry in level for item in _entries(entry) if isinstance(item, (Mapping, list, tuple))]
        if not level:
            return False
    return True


def _entries(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def parse_json(content: bytes | str) -> Any:
    """Return the value that JSON text holds: the only way in which this package reads JSON of files.

    A byte order mark is skipped, which editors on Windows write. Raises ValueError for anything that is no JSON, also
    for what is nested too deep to be worked on.
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
    """The JSON object in ``file``; ``advice``, a sentence, ends the messages.

    Raises MFMError: E_NOT_FOUND, or ``code`` when the file cannot be read or holds something else.
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


def to_plain(value: Any) -> Any:
    """Return ``value`` with NumPy's scalars and arrays as numbers and lists, paths and devices as text.

    Tensors stay: checkpoints hold them.
    """
    if isinstance(value, Mapping):
        return {(key if isinstance(key, (str, int)) else str(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str) or hasattr(value, "detach"):
        return value
    return to_plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def is_same(one: Any, other: Any) -> bool:
    """Return whether two values are the same as JSON: keys are text, sequences lists, 1 is 1.0, and NaN is itself."""
    return bool(_comparable(to_plain(one)) == _comparable(to_plain(other)))


def _comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return str(float(value)) if type(value) in (int, float) else value
