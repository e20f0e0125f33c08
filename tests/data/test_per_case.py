"""The loops over cases: failures stay with their case, a dead worker costs one case, nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfm_nnunet.data import per_case
from mfm_nnunet.data.corpus import Case
from mfm_nnunet.data.masks import mask_signature
from mfm_nnunet.data.per_case import attempt, in_processes, in_threads, source_signature, with_progress
from mfm_nnunet.errors import CaseFailure, MFMError, StoppedError

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


def test_a_long_loop_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter(range(0, 1000, 10))  # each case takes 10 s
    monkeypatch.setattr(per_case.time, "monotonic", lambda: next(clock))
    with caplog.at_level("INFO"):
        results = list(with_progress(in_threads(work, CASES, 1), len(CASES), "reading"))
    assert [outcome_of(outcome) for _, outcome in results] == EXPECTED
    assert caplog.messages == [
        "reading: 2 of 6 cases, about 0:00:40 left",
        "reading: 4 of 6 cases, about 0:00:20 left",
    ]


def test_processes_lose_only_the_case_that_kills() -> None:
    results = {case.name: outcome_of(outcome) for case, outcome in in_processes(deadly, CASES, 2)}
    assert [results[case.name] for case in CASES] == EXPECTED


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
from mfm_nnunet.data.corpus import Case
from mfm_nnunet.data.per_case import in_processes
from tests.data.test_per_case import sleep

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


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_signature_changes_with_the_files(tmp_path: Path) -> None:
    image, label = tmp_path / "image", tmp_path / "label"
    image.write_bytes(b"12")
    label.write_bytes(b"345")
    case = Case("a", (image,), label)
    before = source_signature(case)
    assert [size for size, _ in before] == [2, 3]
    os.utime(label, ns=(5, 5))
    assert source_signature(case)[0] == before[0]
    assert source_signature(case)[1] == [3, 5]
    image.unlink()
    with pytest.raises(MFMError, match="E_NOT_FOUND"):
        source_signature(case)


def test_signature_changes_with_what_belongs_to_a_file(tmp_path: Path) -> None:
    image, spacing = tmp_path / "a_0000.tif", tmp_path / "a.json"
    image.write_bytes(b"12")
    spacing.write_bytes(b"345")
    case = Case("a", (image,), anatomy_mask=tmp_path / "a.tif")
    before = source_signature(case)
    assert [size for size, _ in before] == [2, 3]
    (tmp_path / "a.tif").write_bytes(b"6")
    assert [[size, kind] for size, _, kind in mask_signature(case)] == [[1, "anatomy"], [3, "anatomy"]]
    spacing.unlink()
    assert source_signature(case) == before[:1]
