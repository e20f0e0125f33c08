"""A script as the first of a group of processes, to be signalled together as terminals and schedulers do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = str(Path(__file__).parents[2])


def started(script: Path, *words: str | Path) -> subprocess.Popen[str]:
    """The running script; its process number is the group's."""
    return subprocess.Popen(
        [sys.executable, str(script), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))},
        start_new_session=True,
    )


def wait_for_end(group: int, seconds: float = 60) -> list[int]:
    """Wait until no process of a group is running; those that are left after all."""
    until = time.monotonic() + seconds
    while (left := _running(group)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _running(group: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = file.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(number) == group and state not in ("Z", "X"):
            found.append(int(file.parent.name))
    return found
