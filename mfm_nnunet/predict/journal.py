"""``cases.jsonl``: one fsynced line per change of a case's state, so that a killed run knows what was really done.

Done means that the output's SHA-256 is the one in the journal, not that a file exists. The hashes are written before
the files get their final names, so a run killed in between still recognises its own masks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.checkpoint import full_disk_named, sha256
from mfm_nnunet.errors import MFMError, unreadable
from mfm_nnunet.files import is_file_name, open_to_append, parse_json

try:
    import fcntl
except ImportError:  # only POSIX has it; without it two runs on one folder are the user's responsibility
    fcntl = None  # type: ignore[assignment]

STATUSES = ("started", "stopped", "publishing", "done", "failed")
FIELDS = (
    "case", "status", "time", "model", "settings", "input", "output", "seconds", "memory_steps", "warnings",
    "versions", "code", "reason",
)  # fmt: skip
"""What a line may hold."""


def journal_name(num_parts: int = 1, part_id: int = 0) -> str:
    """The file name of a run's journal; parts of a run that share a folder have one each."""
    return "cases.jsonl" if num_parts == 1 else f"cases_{part_id}of{num_parts}.jsonl"


class Journal:
    """The journal of one run; holds a lock on its file until it is closed.

    Raises MFMError (E_EXISTS) when another run is writing to the same folder.
    """

    def __init__(self, folder: Path, num_parts: int = 1, part_id: int = 0) -> None:
        self.file = folder / journal_name(num_parts, part_id)
        self.last: dict[str, dict[str, Any]] = {}
        """The newest line of each case."""
        self.written: dict[str, set[str]] = {}
        """All hashes that an output file of ours ever had, by file name."""
        self.starts: dict[str, int] = {}
        """How often each case was started and ended in no way since, because the process was killed."""
        self.newest: dict[str, Any] = {}
        """The newest line of all: who worked on this folder last, with which settings."""
        entries = [entry for file in sorted(folder.glob("cases*.jsonl")) for entry in _read(file)]
        for entry in sorted(entries, key=lambda entry: str(entry.get("time", ""))):
            self._take(entry)
        self._handle = open_to_append(self.file)  # closed by __exit__
        self._lock()
        self._handle.seek(max(0, self._handle.seek(0, os.SEEK_END) - 1))
        if self._handle.read(1) not in (b"", b"\n"):  # the last run was killed within a line
            self._append(b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def write(self, case: str, status: str, **fields: Any) -> None:
        """Append a line; it is on the disk when this returns. Raises MFMError (E_DISK_FULL)."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = {"case": case, "status": status, **fields, "time": now}
        self._append(json.dumps(line).encode() + b"\n")
        self._take(line)

    def is_done(self, case: str, folder: Path, names: Iterable[str], expected: Mapping[str, Any]) -> bool:
        """Whether ``case`` was finished with the ``expected`` fields and its files are still those that were written.

        ``names`` are the files that would be written now. Raises MFMError: E_CHANGED when one of them was edited
        since, or is not ours: it is never overwritten silently; E_NOT_FOUND when one cannot be read.
        """
        entry = self.last.get(case, {})
        outputs = entry.get("output", {})
        present = {}
        for name in sorted({*names, *outputs}):
            if os.path.isfile(folder / name):  # unlike Path.is_file, no error for a name that is too long
                try:
                    present[name] = sha256(folder / name)
                except OSError as error:
                    raise unreadable(folder / name, error) from error
        for name, digest in present.items():
            if digest not in self.written.get(name, set()):
                raise MFMError(
                    "E_CHANGED",
                    f"{folder / name} was edited after it was written, or was not written by this command. It was left "
                    "as it is. Move it away, or predict again with --overwrite.",
                )
        same = all(entry.get(name) == value for name, value in expected.items())
        return same and bool(outputs) and entry["status"] in ("done", "publishing") and present == outputs

    def _take(self, entry: dict[str, Any]) -> None:
        self.newest = entry
        self.last[entry["case"]] = entry
        self.starts[entry["case"]] = self.starts.get(entry["case"], 0) + 1 if entry["status"] == "started" else 0
        for name, digest in entry.get("output", {}).items():
            self.written.setdefault(name, set()).add(digest)

    def _append(self, line: bytes) -> None:
        with full_disk_named(self.file):
            self._handle.write(line)
            self._handle.flush()
            os.fsync(self._handle.fileno())

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._handle.close()
            raise MFMError(
                "E_EXISTS",
                f"{self.file.parent}: another run is writing to this folder. Wait for it, or choose another.",
            ) from error
        except OSError:
            return  # file systems without locks


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that a run wrote; others, such as the one during which it was killed, are ignored.

    A mask that only an ignored line knows counts as somebody else's, and is never replaced unasked.
    """
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError):
            entry = parse_json(line)
            if isinstance(entry, dict) and _is_entry(entry):
                yield {name: value for name, value in entry.items() if name in FIELDS}


def _is_entry(entry: Mapping[str, Any]) -> bool:
    """Return whether the fields of a line are of the kinds that :meth:`Journal.write` gives them."""
    outputs, settings = entry.get("output", {}), entry.get("settings", {})
    has_outputs = isinstance(outputs, dict) and all(
        is_file_name(name) and isinstance(digest, str) for name, digest in outputs.items()
    )
    warnings = entry.get("warnings", [])
    has_warnings = isinstance(warnings, list) and all(isinstance(text, str) for text in warnings)
    is_known = isinstance(entry.get("case"), str) and entry.get("status") in STATUSES
    return is_known and has_outputs and has_warnings and isinstance(settings, dict)
