"""A script as the first of a group of processes, to be signalled together as terminals and schedulers do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def started(script: Path, *words: str | Path) -> subprocess.Popen[str]:
    """The running script; its process number is the group's."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
