"""The state of a run on disk: one self-contained file, written atomically. The previous one is kept.

``resume.pth`` holds everything the next step depends on; a kill at any moment leaves a complete one behind. The weights
for users (``checkpoint_latest.pth``, ``checkpoint_final.pth``) are separate files. The settings that a resumed run must
share are compared here for every kind of run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import to_plain
from mfm_nnunet.settings import NEUTRAL

STATE_FILES = ("resume.pth", "resume_previous.pth")
"""Files from which a run can be resumed, the newest first."""
MAY_GROW = ("pretrain.epochs", "finetune.epochs")
"""Settings that a resumed run may raise: it then trains on."""
LONGER = "the run of %d epochs continues to %d: from here on its learning rates are those of a run of that length"
logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """The position of a run: ``step`` steps done, sums over the current epoch, and one row per finished epoch."""

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    epoch_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_state(folder: Path, state: RunState, modules: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write ``resume.pth`` and keep the file before it as ``resume_previous.pth``.

    ``modules`` are state dicts (task, optimizer, scaler); a resumed run must agree with ``settings``.
    """
    file, previous = (folder / name for name in STATE_FILES)
    if file.exists():
        with contextlib.suppress(OSError):
            previous.unlink(missing_ok=True)
            os.link(file, previous)
    content = {"state": asdict(state), "settings": dict(settings), **modules}
    checkpoint.save(to_plain(content), file)


def load_state(folder: Path, settings: Mapping[str, Any]) -> tuple[RunState, dict[str, Any]]:
    """Load the newest state that verifies. Return it with the state dicts."""
    files = [folder / name for name in STATE_FILES if (folder / name).exists()]
    if not files:
        raise MFMError("E_NOT_FOUND", f"{folder}: there is no run to continue. Start it without --c.")
    for file in files:
        try:
            content = checkpoint.load(file)
            state = _read_state(content, file)
            break
        except MFMError as error:
            failure = error
            logger.warning("%s; trying the state saved before it", error)
    else:
        raise failure
    require_same_settings(content["settings"], settings, folder)
    return state, content


def _read_state(content: Mapping[str, Any], file: Path) -> RunState:
    if not isinstance(content.get("settings"), Mapping) or not isinstance(content.get("state"), Mapping):
        what = "weights without" if "network_weights" in content else "no"
        raise _not_a_state(file, f"it holds {what} the state of a run")
    values = content["state"]
    kinds = {item.name: type(getattr(RunState(), item.name)) for item in fields(RunState)}
    is_whole = set(values) == set(kinds) and all(type(values[name]) is kind for name, kind in kinds.items())
    if not is_whole or values["step"] < 0 or not all(isinstance(row, Mapping) for row in values["history"]):
        raise _not_a_state(file, "its 'state' is damaged")
    return RunState(**values)


def _not_a_state(file: Path, reason: str) -> MFMError:
    return MFMError(
        "E_MODEL_CORRUPT",
        f"{file}: {reason}, so the run cannot be continued. Restore the {file.name} of this run (a "
        "checkpoint_*.pth does not work), or move the folder away and start again.",
    )


def require_same_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, may_differ: Collection[str] = ()
) -> None:
    """Raise MFMError (E_CONFIG) naming the differences, unless a resumed run has the settings it started with.

    ``may_differ``: dotted names of settings that do not change a result. Those of ``MAY_GROW`` may be larger.
    """
    old, new = {**NEUTRAL, **flat(before)}, {**NEUTRAL, **flat(now)}
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name) and name not in may_differ]
    names = [name for name in names if not (name in MAY_GROW and new[name] > old.get(name, math.inf))]
    if names:
        lines = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
        raise MFMError(
            "E_CONFIG",
            f"--c continues the same run, but these settings differ from those of {folder}: {lines}. Leave out the "
            "settings that changed, or start a new run.",
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings into a dict from dotted names to values."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[prefix + name] = value
    return result
