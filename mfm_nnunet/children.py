"""Errors of child processes (one per GPU) as they were raised, not as the launcher's report about a failed child."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, StoppedError


def call_recorded(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` in a child process; an error that the user should see is also noted in ``folder``."""
    try:
        return function(*arguments)
    except (MFMError, StoppedError, FloatingPointError) as error:
        note: dict[str, Any] = {"message": str(error)}
        if isinstance(error, MFMError):
            note = {"code": error.code, "message": error.message}
        elif isinstance(error, StoppedError):
            note["exit_code"] = error.exit_code
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(note))
        raise


def raise_recorded(folder: str) -> None:
    """In the parent, after a child failed: raise what a child noted, if any did."""
    for file in sorted(Path(folder).glob("*.json")):
        note = json.loads(file.read_text())
        if "code" in note:
            raise MFMError(note["code"], note["message"])
        if "exit_code" in note:
            raise StoppedError(note["exit_code"], note["message"])
        raise FloatingPointError(note["message"])
