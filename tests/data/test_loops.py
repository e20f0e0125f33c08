"""The loops over cases: failures stay with their case, a dead worker costs one case, nothing outlives its parent."""

from __future__ import annotations

import errno
import faulthandler
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfm_nnunet.data import loops
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loops import attempt, in_processes, in_threads, source_signature, with_progress
from mfm_nnunet.errors import CaseFailure, MFMError, StoppedError
from mfm_nnunet.reports import progress
from tests.builders.groups import started, wait_for_end

CASES = [Case(f"case{i}", (Path(f"case{i}.nii.gz"),)) for i in range(6)]


def work(case: Case) -> str:
    if case.name == "case1":
        raise MFMError("E_EMPTY", "empty")
    if case.name == "case2":
        raise MemoryError
    if case.name == "case3":
        raise KeyError("x")
    if case.name == "full":
        raise MFMError("E_DISK_FULL", "full")
    return case.name.upper()


def deadly(case: Case) -> str:
    if case.name == "case2":
        os.kill(os.getpid(), signal.SIGKILL)
    return work(case)


def outcome_of(outcome: str | CaseFailure) -> str:
    return outcome.code if isinstance(outcome, CaseFailure) else outcome


EXPECTED = ["CASE0", "E_EMPTY", "E_OOM", "E_INTERNAL", "CASE4", "CASE5"]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_keep_the_order_and_report_failures(num_threads: int) -> None:
    results = list(in_threads(work, CASES, num_threads))
    assert [case for case, _ in results] == CASES
    assert [outcome_of(outcome) for _, outcome in results] == EXPECTED


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, "E_PERMISSION"), (errno.EIO, "E_NOT_FOUND")],
)
def test_what_the_system_does_not_give(number: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: bool) -> None:
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    for images, mask, file in (((Path("a.nii.gz"),), None, "a.nii.gz"), ((), Path("m.nii.gz"), "m.nii.gz")):
        with pytest.raises(MFMError, match=file) as caught:
            source_signature(Case("a", images, anonymisation_mask=mask))
        assert caught.value.code == code


def test_memory_that_runs_out_is_no_change(tmp_path: Path) -> None:
    file = tmp_path / "a.nii.gz"
    file.write_bytes(b"1")

    def read() -> None:
        with loops.unchanged(Case("a", (file,))):
            file.write_bytes(b"12")
            raise MemoryError

    with pytest.raises(MemoryError):
        read()


def test_a_long_loop_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a single case takes long, from the first one on."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    messages: list[str] = []
    monkeypatch.setattr(progress, "say", messages.append)

    def until_said(case: Case) -> str:
        expected = f"reading: {CASES.index(case)} of 6 cases"
        until = time.monotonic() + 60
        while not any(expected in message for message in messages) and time.monotonic() < until:
            time.sleep(0.01)
        return work(case)

    with with_progress(in_threads(until_said, CASES, 1), len(CASES), "reading") as outcomes:
        assert [outcome_of(outcome) for _, outcome in outcomes] == EXPECTED
    numbers = [int(message.split()[1]) for message in messages]
    assert numbers == sorted(numbers)
    assert set(numbers) >= set(range(6))
    assert messages[0] == "reading: 0 of 6 cases"
    assert re.fullmatch(r"reading: 3 of 6 cases, about 0:\d\d:\d\d left", next(m for m in messages if ": 3" in m))


def test_what_ends_a_loop_does_not_wait_for_its_threads() -> None:
    """A reader may never come back from a damaged file."""
    is_over, begun = threading.Event(), threading.Event()

    def hang(case: Case) -> None:
        begun.set()
        is_over.wait(120)

    def stop() -> Iterator[Case]:
        yield from CASES[:2]
        begun.wait(60)
        raise StoppedError(143, "stopped by SIGTERM")

    start = time.monotonic()
    with pytest.raises(StoppedError):
        list(in_threads(hang, stop(), 2))
    assert time.monotonic() - start < 60
    is_over.set()


def test_processes_lose_only_the_case_that_kills() -> None:
    results = {case.name: outcome_of(outcome) for case, outcome in in_processes(deadly, CASES, 2)}
    assert [results[case.name] for case in CASES] == EXPECTED


def crash(case: Case) -> str:
    if case.name == "case2":
        faulthandler.disable()
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    if case.name == "case3":
        os._exit(7)
    return case.name


def test_memory_is_not_blamed_for_a_crash() -> None:
    failures = [outcome for _, outcome in in_processes(crash, CASES[1:4], 1) if isinstance(outcome, CaseFailure)]
    assert [(failure.case, failure.code) for failure in failures] == [
        ("case2", "E_PROCESS_DIED"),
        ("case3", "E_PROCESS_DIED"),
    ]
    assert "SIGSEGV" in failures[0].reason
    assert "exit code 7" in failures[1].reason
    assert not any("memory" in failure.reason for failure in failures)


def test_a_full_disk_stops_everything() -> None:
    full = Case("full", (Path("x"),))
    with pytest.raises(MFMError, match="E_DISK_FULL"):
        attempt(work, full)
    with pytest.raises(MFMError, match="E_DISK_FULL"):
        list(in_processes(work, [CASES[0], full, CASES[4]], 1))


def test_a_stop_is_no_bad_case() -> None:
    def stopped(case: Case) -> str:
        raise StoppedError(143, "stopped by SIGTERM")

    with pytest.raises(StoppedError):
        attempt(stopped, CASES[0])


PARENT = """
import sys, time
from pathlib import Path
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loops import in_processes
from tests.data.test_loops import sleep

if __name__ == "__main__":
    list(in_processes(sleep, [Case("a", (Path(sys.argv[1]),))], 1))
"""


def sleep(case: Case) -> None:
    case.images[0].write_text(str(os.getpid()))
    time.sleep(120)


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    script, file = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(PARENT)
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, str(script), str(file)], env={**os.environ, "PYTHONPATH": root})
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    worker = int(file.read_text())
    parent.kill()
    parent.wait()
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(worker)


STOPPED_PARENT = """
import argparse, sys
from pathlib import Path
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loops import in_processes, in_threads, with_progress
from tests.data.test_loops import sleep

def job(arguments):
    loop = {"processes": in_processes, "threads": in_threads}[sys.argv[1]]
    cases = [Case(name, (Path(sys.argv[2], name),)) for name in "ab"]
    with with_progress(loop(sleep, cases, 2), 2, "sleeping") as outcomes:
        list(outcomes)

if __name__ == "__main__":
    sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[2], debug=False)))
"""


@pytest.mark.parametrize(
    ("loop", "number"),
    [("threads", signal.SIGHUP), ("processes", signal.SIGINT)],
)
def test_a_stop_of_the_whole_group_waits_for_no_case(loop: str, number: signal.Signals, tmp_path: Path) -> None:
    """Within seconds, with one message and no traceback of a worker; none is left."""
    script = tmp_path / "parent.py"
    script.write_text(STOPPED_PARENT)
    process = started(script, loop, tmp_path)
    until = time.monotonic() + 120
    while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)  # a case takes 120 s
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}."
    assert "Traceback" not in errors
    assert "worker" not in errors
    assert not wait_for_end(process.pid)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_signature_changes_with_what_belongs_to_a_file(tmp_path: Path) -> None:
    image, spacing = tmp_path / "a_0000.tif", tmp_path / "a.json"
    image.write_bytes(b"12")
    spacing.write_bytes(b"345")
    case = Case("a", (image,))
    before = source_signature(case)
    assert [size for size, _ in before] == [2, 3]
    (tmp_path / "a.tif").write_bytes(b"6")
    masked = source_signature(Case("a", (image,), anonymisation_mask=tmp_path / "a.tif"))
    assert masked[:2] == before
    assert [[size, kind] for size, _, kind in masked[2:]] == [[1, "anonymised"], [3, "anonymised"]]
    spacing.unlink()
    assert source_signature(case) == before[:1]
