"""Processes that work together: one stop for all of them, whoever is told, and errors as they were raised."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfm_nnunet import signals
from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.processes import run_processes
from tests.builders.groups import ROOT, started, wait_for_end

PARENT = """
import os, signal, sys, time
from pathlib import Path
from mfm_nnunet.processes import run_processes
from mfm_nnunet.errors import StoppedError
from mfm_nnunet.signals import stop_on_signal

def train(folder):
    rank = os.environ["RANK"]
    with stop_on_signal() as flag:
        note = Path(folder, f"pid_{rank}")
        note.write_text(str(os.getpid()))
        note.rename(Path(folder, f"ready_{rank}"))  # whole, whenever it is seen
        until = time.monotonic() + 100
        while flag.exit_code is None and time.monotonic() < until:
            time.sleep(0.05)
        Path(folder, f"saving_{rank}").touch()
        time.sleep(100 if "endless" in sys.argv else 0.5)
        Path(folder, f"saved_{rank}").touch()
        raise StoppedError(flag.exit_code, "stopped in epoch 3")

if __name__ == "__main__":
    try:
        run_processes(train, (sys.argv[1],), 2)
    except StoppedError as error:
        print(error)
        sys.exit(error.exit_code)
"""


def test_a_stopped_parent_stops_its_processes_which_save_first(tmp_path: Path) -> None:
    """Also where the whole group gets the signal, as terminals and schedulers send it."""
    number = signal.SIGHUP
    process, notes, children = run_parent(tmp_path)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == 128 + number
    assert "stopped in epoch 3" in output
    assert len(list(notes.glob("saved_*"))) == 2
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not wait_for_end(process.pid)


def test_a_second_signal_leaves_no_process(tmp_path: Path) -> None:
    """It is not waited for the save, of which the children are killed."""
    process, notes, _ = run_parent(tmp_path, "endless")
    os.kill(process.pid, signal.SIGTERM)
    until = time.monotonic() + 60
    while len(list(notes.glob("saving_*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(signals.SAME_STOP_SECONDS_ALONE)
    os.kill(process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert "stopped at once by a second signal, SIGTERM" in output + errors
    assert process.returncode == 143
    assert not list(notes.glob("saved_*"))
    assert not wait_for_end(process.pid)


def run_parent(tmp_path: Path, *words: str) -> tuple[subprocess.Popen[str], Path, list[int]]:
    """The script with its two processes at work, the folder of their notes, and their numbers."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    notes = tmp_path / "notes"
    notes.mkdir()
    process = started(script, notes, *words)
    until = time.monotonic() + 120
    while len(list(notes.glob("ready_*"))) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    return process, notes, [int(file.read_text()) for file in notes.glob("ready_*")]


def _fail() -> None:
    raise MFMError("E_OOM", "too much")


def test_what_a_process_raised_is_raised() -> None:
    with pytest.raises(MFMError, match=r"E_OOM .*too much"):
        run_processes(_fail, (), 2)


@pytest.mark.parametrize("is_child", [True, False])
def test_signals_that_come_together_are_one_stop(is_child: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent passes them on, which takes longer than a scheduler that sends one twice."""
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    monkeypatch.setattr(signals, "_has_parent", lambda: is_child)
    flag = signals.StopFlag()
    flag.handle(signal.SIGINT, None)
    flag.handle(signal.SIGTERM, None)
    assert flag.exit_code == 130
    now += (signals.SAME_STOP_SECONDS if is_child else signals.SAME_STOP_SECONDS_ALONE) + 0.1
    with pytest.raises(StoppedError, match="second signal, SIGUSR1") as caught:
        flag.handle(signal.SIGUSR1, None)
    assert caught.value.exit_code == 128 + signal.SIGUSR1


COMMAND = """
import argparse, sys, time
from pathlib import Path

import numpy as np

from mfm_nnunet import signals
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.signals import stop_on_signal

def job(arguments):
    how, ready = sys.argv[1], Path(sys.argv[2])
    if how == "library":  # a call that comes back after a long time
        matrix = np.random.rand(6000, 6000)
        ready.touch()
        np.linalg.svd(matrix)
        return
    with stop_on_signal("this step") as flag:
        ready.touch()
        until = time.monotonic() + 100
        while flag.exit_code is None and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(100)

signals.SECONDS_TO_END = 0.5
sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[2] + ".w", debug=False)))
"""


@pytest.mark.parametrize(("how", "end"), [("library", "ended at once"), ("step", "stopped at once by a second signal")])
def test_the_first_signal_is_acknowledged_and_the_second_ends_at_once(how: str, end: str, tmp_path: Path) -> None:
    """Both with a line on the terminal, also while the main thread is inside a long call of a library."""
    script, ready = tmp_path / "command.py", tmp_path / "ready"
    script.write_text(COMMAND)
    process = started(script, how, ready)
    assert process.stderr is not None
    until = time.monotonic() + 120
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    line = process.stderr.readline()
    assert line.startswith("Ctrl-C: stopping"), line
    assert "press Ctrl-C again to stop at once" in line
    assert ("after this step" in line) == (how == "step")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert end in errors
    assert process.returncode == 130


TERMINAL = """
import sys, time
from pathlib import Path
from mfm_nnunet.signals import stop_on_signal

with stop_on_signal() as flag:
    Path(sys.argv[1], "ready").touch()
    until = time.monotonic() + 100
    while flag.exit_code is None and time.monotonic() < until:
        print("step", flush=True)
        time.sleep(0.01)
    for _ in range(100):
        print("saving", flush=True)
        print("saving", file=sys.stderr, flush=True)
        time.sleep(0.01)
    Path(sys.argv[1], "saved").write_text(str(flag.exit_code))
"""


def test_a_terminal_that_is_closed_does_not_fail_the_save(tmp_path: Path) -> None:
    """What is printed after SIGHUP has nowhere to go, and raised an error."""
    pty = pytest.importorskip("pty")
    script = tmp_path / "train.py"
    script.write_text(TERMINAL)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(script), str(tmp_path)], {**os.environ, "PYTHONPATH": ROOT})
    until = time.monotonic() + 120
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        os.read(terminal, 1024)
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "saved").read_text() == str(128 + signal.SIGHUP)


def test_nohup_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_on_signal() as flag:
            os.kill(os.getpid(), signal.SIGHUP)
            assert flag.exit_code is None
        with signals.raise_on_signal():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
