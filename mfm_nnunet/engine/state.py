"""The state of a pretraining run on disk: one self-contained file, written atomically, with the previous one kept.

``resume.pth`` holds everything that the next step depends on; a kill at any moment leaves a whole one behind. The
weights that others use (``checkpoint_latest.pth``, ``checkpoint_final.pth``) are separate files.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import to_plain

STATE_FILES = ("resume.pth", "resume_previous.pth")
"""The states that a run can continue from, the newest first."""
logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Where a run is: ``step`` steps are done; sums over the current epoch; one row per finished epoch."""

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    epoch_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_state(folder: Path, state: RunState, modules: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write ``resume.pth``; the file before it stays as ``resume_previous.pth``.

    ``modules`` are state dicts (task, optimizer, scaler); ``settings`` is what a continued run must agree with.
    """
    file, previous = (folder / name for name in STATE_FILES)
    if file.exists():
        with contextlib.suppress(OSError):
            previous.unlink(missing_ok=True)
            os.link(file, previous)
    content = {"state": asdict(state), "settings": dict(settings), **modules}
    checkpoint.save(to_plain(content), file)


def load_state(folder: Path, settings: Mapping[str, Any]) -> tuple[RunState, dict[str, Any]]:
    """The newest state that verifies, and the state dicts.

    Raises MFMError: E_NOT_FOUND without any state, E_MODEL_CORRUPT when none verifies, E_CONFIG when the settings
    differ from those of the run (a continued run must be the same run).
    """
    files = [folder / name for name in STATE_FILES if (folder / name).exists()]
    if not files:
        raise MFMError("E_NOT_FOUND", f"{folder}: there is no run to continue. Start it without --c.")
    for file in files:
        try:
            content = checkpoint.load(file)
            state = _state_of(content, file)
            break
        except MFMError as error:
            failure = error
            logger.warning("%s; trying the state saved before it", error)
    else:
        raise failure
    different = differing_settings(content["settings"], settings)
    if different:
        raise MFMError(
            "E_CONFIG", "--c continues the same run, but these settings differ: " + "; ".join(different) +
            ". Continue with the old values, or start a new run."
        )  # fmt: skip
    return state, content


def _state_of(content: Mapping[str, Any], file: Path) -> RunState:
    """Where the run of a state is. Raises MFMError (E_MODEL_CORRUPT) for a file that holds something else."""
    if not isinstance(content.get("settings"), Mapping) or not isinstance(content.get("state"), Mapping):
        what = "weights without" if "network_weights" in content else "no"
        raise _no_state(file, f"it holds {what} the state of a run")
    values = content["state"]
    kinds = {item.name: type(getattr(RunState(), item.name)) for item in fields(RunState)}
    is_whole = set(values) == set(kinds) and all(type(values[name]) is kind for name, kind in kinds.items())
    if not is_whole or values["step"] < 0 or not all(isinstance(row, Mapping) for row in values["history"]):
        raise _no_state(file, "its 'state' is damaged")
    return RunState(**values)


def _no_state(file: Path, reason: str) -> MFMError:
    return MFMError(
        "E_MODEL_CORRUPT",
        f"{file}: {reason}, so no run can be continued from it. Put the {file.name} of this run back (a "
        "checkpoint_*.pth is none), or move the folder away and start anew.",
    )


def differing_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``name was a, is b`` for every value that differs, with dotted names."""
    lines: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differing_settings(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name} was {before}, is {after}")
    return lines
