"""Processes that work together: one stop for all of them, whoever is told, and errors as they were raised."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mfm_nnunet import stopping
from mfm_nnunet.children import run_processes
from mfm_nnunet.errors import MFMError
from tests.groups import started

PARENT = """
import os, signal, sys, time
from pathlib import Path
from mfm_nnunet.children import call_recorded, run_processes
from mfm_nnunet.errors import StoppedError
from mfm_nnunet.stopping import stop_on_signal

def work(rank, folder, notes):
    call_recorded(notes, train, rank, folder)

def train(rank, folder):
    with stop_on_signal() as flag:
        note = Path(folder, f"pid_{rank}")
        note.write_text(str(os.getpid()))
        note.rename(Path(folder, f"ready_{rank}"))  # whole, whenever it is seen
        until = time.monotonic() + 100
        while flag.exit_code is None and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.5)  # it saves
        Path(folder, f"saved_{rank}").touch()
        raise StoppedError(flag.exit_code, "stopped in epoch 3")

def told(number, frame):
    raise StoppedError(128 + number, "stopped in the parent")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, told)
    signal.signal(signal.SIGINT, told)
    try:
        run_processes(work, (sys.argv[1], sys.argv[1]), 2, sys.argv[1])
    except StoppedError as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("to_all", [False, True])
def test_a_stopped_parent_stops_its_processes_which_save_first(to_all: bool, tmp_path: Path) -> None:
    """SIGTERM to the parent alone, as ``kill`` sends it, and to the whole group, as terminals and schedulers do."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    notes = tmp_path / "notes"
    notes.mkdir()
    process = started(script, notes)
    until = time.monotonic() + 120
    while len(list(notes.glob("ready_*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    children = [int(file.read_text()) for file in notes.glob("ready_*")]
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == 143
    assert "stopped in epoch 3" in output
    assert len(list(notes.glob("saved_*"))) == 2
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def _fails(rank: int, notes: str) -> None:
    from mfm_nnunet.children import call_recorded

    def refuse() -> None:
        raise MFMError("E_OOM", "too much")

    call_recorded(notes, refuse)


def test_what_a_process_raised_is_raised(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match="too much") as caught:
        run_processes(_fails, (str(tmp_path),), 2, str(tmp_path))
    assert caught.value.code == "E_OOM"


def test_signals_that_come_together_are_one_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    flag = stopping.StopFlag()
    flag.handle(signal.SIGINT, None)
    flag.handle(signal.SIGTERM, None)
    assert flag.exit_code == 130
    now += stopping.SAME_STOP_SECONDS + 0.1
    with pytest.raises(SystemExit):
        flag.handle(signal.SIGINT, None)
