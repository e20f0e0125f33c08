"""``cases.jsonl``: one fsynced line per change of a case's state, so that progress survives a kill.

A case is done if the output's SHA-256 matches the journal, which is written before the files get their final names.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.data.storage import STAGING_PREFIX
from mfm_nnunet.errors import MFMError, unreadable
from mfm_nnunet.files import append_line, ending_of, is_file_name, open_to_append, read_lines, sha256, take_lock
from mfm_nnunet.requests import PredictRequest

logger = logging.getLogger(__name__)

STATUSES = ("started", "stopped", "publishing", "done", "failed")
FIELDS = (
    "case", "status", "time", "model", "settings", "input", "output", "seconds", "memory_steps", "warnings",
    "versions", "code", "reason", "agreement",
)  # fmt: skip
"""Fields of a line."""
SETTINGS_FILE = "predict_from_raw_data_args.json"
"""nnU-Net's name of the file with the settings of a prediction."""
ERROR_FOLDER = "errors"


def journal_name(num_parts: int = 1, part_id: int = 0) -> str:
    """Return the file name of a run's journal; parts of a run that share a folder have one each."""
    return "cases.jsonl" if num_parts == 1 else f"cases_{part_id}of{num_parts}.jsonl"


def table_name(num_parts: int = 1, part_id: int = 0) -> str:
    """Return the file name of a run's table of predicted labels."""
    return journal_name(num_parts, part_id).replace("cases", "predictions").replace(".jsonl", ".csv")


def report_name(num_parts: int = 1, part_id: int = 0) -> str:
    """Return the file name of a run's report."""
    return journal_name(num_parts, part_id).replace("cases", "report").replace(".jsonl", ".html")


class Journal:
    """The journal of a run. It locks its file until it is closed.

    Raises MFMError (E_EXISTS) when another run is writing to the same folder.
    """

    def __init__(self, folder: Path, num_parts: int = 1, part_id: int = 0) -> None:
        self.folder, self.file = folder, folder / journal_name(num_parts, part_id)
        self.last: dict[str, dict[str, Any]] = {}
        """Newest line of each case."""
        self.written: dict[str, set[str]] = {}
        """All hashes that each of our output files ever had, by file name."""
        self.starts: dict[str, int] = {}
        """Number of starts of each case without a recorded end, i.e. times the process died on it."""
        self.newest: dict[str, Any] = {}
        """Newest line of all: the last model used on this folder, and its settings."""
        entries = [entry for file in sorted(folder.glob("cases*.jsonl")) for entry in _read(file)]
        for entry in sorted(entries, key=lambda entry: str(entry.get("time", ""))):
            self._take(entry)
        self._handle = open_to_append(self.file)  # closed by __exit__
        if take_lock(self._handle.fileno()) is False:
            self._handle.close()
            raise MFMError(
                "E_EXISTS", f"{self.folder}: another run is writing to this folder. Wait for it, or choose another."
            )

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def write(self, case: str, status: str, **fields: Any) -> None:
        """Append a line and flush it to disk. Raises MFMError (E_DISK_FULL)."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        line = {"case": case, "status": status, **fields, "time": now}
        self._take(line)  # first: a signal may arrive while the line is written
        append_line(self._handle, line)

    def require_same_maker(self, identity: Mapping[str, Any]) -> None:
        """Raise MFMError (E_EXISTS) if the masks in the folder come from another model or other settings."""
        before = self.newest
        if not self.written or all(before.get(key) == value for key, value in identity.items()):
            return
        maker = "another model"
        if before.get("model") == identity["model"]:
            old, new = before.get("settings", {}), identity["settings"]
            changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
            maker = f"other settings ({', '.join(changes)})"
        raise MFMError(
            "E_EXISTS",
            f"{self.folder}: the masks in it were made with {maker}. Choose another folder, or replace them with "
            "--overwrite.",
        )

    def is_done(self, case: str, names: Iterable[str], expected: Mapping[str, Any]) -> bool:
        """Check that ``case`` was finished with the ``expected`` fields and that its files are unchanged.

        ``names`` are the files that would be written now. Raises MFMError: E_CHANGED when one of them was edited since
        or is not ours, as it is never overwritten silently; E_NOT_FOUND when one cannot be read.
        """
        entry = self.last.get(case, {})
        outputs = entry.get("output", {})
        present = {}
        for name in sorted({*names, *outputs}):
            if os.path.isfile(self.folder / name):  # unlike Path.is_file, no error for a name that is too long
                try:
                    present[name] = sha256(self.folder / name)
                except OSError as error:
                    raise unreadable(self.folder / name, error) from error
        for name, digest in present.items():
            if digest not in self.written.get(name, set()):
                raise MFMError(
                    "E_CHANGED",
                    f"{self.folder / name} was edited after it was written, or was not written by this command. It was "
                    "left as it is. Move it away, or predict again with --overwrite.",
                )
        same = all(entry.get(name) == value for name, value in expected.items())
        return same and bool(outputs) and entry["status"] in ("done", "publishing") and present == outputs

    def _take(self, entry: dict[str, Any]) -> None:
        self.newest = entry
        self.last[entry["case"]] = entry
        self.starts[entry["case"]] = self.starts.get(entry["case"], 0) + 1 if entry["status"] == "started" else 0
        for name, digest in entry.get("output", {}).items():
            self.written.setdefault(name, set()).add(digest)


def _read(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the valid lines, and ignore others, such as one cut off by a kill.

    A mask recorded only in an ignored line is not recognised as ours, and never replaced without a request.
    """
    for entry in read_lines(file):
        if isinstance(entry, dict) and _is_entry(entry):
            yield {name: value for name, value in entry.items() if name in FIELDS}


def _is_entry(entry: Mapping[str, Any]) -> bool:
    """Check that the fields of a line have the types that :meth:`Journal.write` gives them."""
    outputs, warnings = entry.get("output", {}), entry.get("warnings", [])
    if not (isinstance(outputs, dict) and isinstance(warnings, list) and isinstance(entry.get("settings", {}), dict)):
        return False
    texts = [entry.get("case"), *outputs.values(), *warnings]
    is_plain = all(isinstance(text, str) for text in texts) and all(map(is_file_name, outputs))
    return is_plain and entry.get("status") in STATUSES


def check_output(folder: Path, other_cases: Sequence[str], request: PredictRequest) -> None:
    """Raise MFMError (E_EXISTS) if files would be replaced, or mixed with other ones, without a request.

    ``other_cases`` belong to the other parts of this run, which may be writing to the folder.
    """
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    entries = sorted(name for name in entries if not name.startswith(STAGING_PREFIX))
    if not entries or request.overwrite:
        return
    if request.resume:
        if not any(re.fullmatch(r"cases(_\d+of\d+)?\.jsonl", name) for name in entries):
            raise MFMError(
                "E_EXISTS", f"{folder}: not empty, and nothing to resume: it has no {journal_name()} of this command."
            )
        return
    if request.num_parts > 1:
        journals = {journal_name(request.num_parts, part) for part in range(request.num_parts)}
        for name in (table_name, report_name):
            journals |= {name(request.num_parts, part) for part in range(request.num_parts)}
        journals -= {name(request.num_parts, request.part_id) for name in (journal_name, table_name, report_name)}
        shared = journals | {"dataset.json", "plans.json", SETTINGS_FILE, ERROR_FOLDER}
        others = set(other_cases)
        entries = [name for name in entries if name not in shared and not _belongs_to(name, others)]
    if entries:
        raise MFMError(
            "E_EXISTS",
            f"{folder}: the output folder is not empty ({len(entries)} entries, e.g. {entries[0]}). Choose another, or "
            "continue with --resume, or replace what is there with --overwrite.",
        )


def warn_of_others(folder: Path, masks: set[str]) -> None:
    """Warn of images in the output folder that are not among ``masks``: they are not replaced."""
    others = [file.name for file in folder.iterdir() if ending_of(file)] if folder.is_dir() else []
    others = sorted(name for name in others if name not in masks and not name.startswith("."))
    if others:
        logger.warning(
            "%s: %d masks of other inputs were kept (%s%s); dataset.json beside them now belongs to this model",
            folder, len(others), ", ".join(others[:3]), ", ..." if len(others) > 3 else "",
        )  # fmt: skip


def _belongs_to(file_name: str, cases: set[str]) -> bool:
    """Check if a file is named after one of ``cases`` (whose names may contain dots)."""
    pieces = file_name.split(".")
    return any(".".join(pieces[:count]) in cases for count in range(1, len(pieces)))
