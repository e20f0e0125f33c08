"""Run the cells of a study, several at a time, each as commands in processes of their own.

A cell that fails costs only itself. On a signal the children end cleanly, and what is finished is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

from mfm_nnunet.checkpoint import full_disk_named
from mfm_nnunet.errors import CaseFailure, MFMError, StoppedError
from mfm_nnunet.processes import stop_on_signal
from mfm_nnunet.study.commands import TRAINING, Step, Steps
from mfm_nnunet.study.design import Cell
from mfm_nnunet.workspace import num_cores

try:
    import fcntl
except ImportError:  # only POSIX has it; without it two studies in one folder are the user's responsibility
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
SECONDS_TO_STOP = 120.0
"""A training stops after its current step; what takes longer than this is killed."""
_CODE = re.compile(r"\b(E_[A-Z_]+)  (.+)")


@dataclass(frozen=True)
class Slot:
    """A share of the computer for one cell at a time: CPU cores, and the GPU that is visible to it."""

    cores: tuple[int, ...] = ()
    gpu: str | None = None


def slots(num_jobs: int, gpus: Sequence[str]) -> list[Slot]:
    """``num_jobs`` equal shares of the cores of this process; GPUs go round."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [tuple(cores[number::num_jobs]) for number in range(num_jobs)] if num_jobs <= len(cores) else []
    return [
        Slot(shares[number] if shares else tuple(cores), gpus[number % len(gpus)] if gpus else None)
        for number in range(num_jobs)
    ]


def default_jobs(gpus: Sequence[str]) -> int:
    """One cell per GPU, without any one per core."""
    return len(gpus) or num_cores()


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[IO[bytes]]:
    """Hold the study folder; yields the lock, which children inherit, so a child that outlives its parent holds it too.

    Raises MFMError (E_EXISTS) while another study works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as handle:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise MFMError(
                    "E_EXISTS",
                    f"{folder}: another mfm_study, or a training that it began, is at work there. Wait until it has "
                    "ended, or end it.",
                ) from error
            except OSError as error:
                logger.warning(
                    "%s: this file system has no locks (%s): run one mfm_study in it at a time", folder, error
                )
        yield handle


class _Run:
    """A cell under way."""

    def __init__(self, cell: Cell, steps: Iterator[Step], slot: Slot, log: Path, lock: IO[bytes] | None) -> None:
        self.cell, self.steps, self.slot, self.log, self.lock = cell, steps, slot, log, lock
        self.start = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self.step: Step | None = None
        self.offset = 0
        self.seconds: dict[str, float] = {}
        self.failure: CaseFailure | None = None
        self._next()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def is_busy(self) -> bool:
        """Whether there is still something to wait for; begins the next step when one has ended well."""
        if self.process is None:
            return False
        code = self.process.poll()
        if code is None:
            return True
        assert self.step is not None
        self.seconds[self.step.title] = time.monotonic() - self.step_start
        if code != 0:
            self.failure = self._failure(code)
            return False
        self._next()
        return self.process is not None

    def stop(self) -> None:
        """Ask the running command to end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline: float) -> None:
        """Wait for its end until ``deadline`` (monotonic seconds), then kill it with all that it started."""
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill the running command with all that it started."""
        if self.process is not None and self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def _next(self) -> None:
        self.step, self.process = next(self.steps, None), None
        if self.step is None:
            return
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.step.environment}
        if self.slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.slot.gpu
        self.step_start = time.monotonic()
        with full_disk_named(self.log), open(self.log, "ab") as handle:
            self.offset = handle.tell()
            handle.write(f"$ {shlex.join(self.step.words)}\n".encode("utf-8", "surrogateescape"))
            handle.flush()
            # A session of its own: Ctrl-C reaches only us, and we end the children in order.
            self.process = subprocess.Popen(
                self.step.line,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=() if self.lock is None else (self.lock.fileno(),),
            )
        if self.slot.cores and hasattr(os, "sched_setaffinity"):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(self.process.pid, self.slot.cores)

    def _failure(self, code: int) -> CaseFailure:
        """What the log says about it: the last error code, else the last line."""
        assert self.step is not None
        with open(self.log, "rb") as handle:
            handle.seek(self.offset)
            lines = [line for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
        where = f"{self.step.title}, see {self.log}"
        if code > 128 or code < 0:
            return CaseFailure(str(self.cell), "E_INTERNAL", f"{where}: it was ended from outside (exit code {code}).")
        found = [match for line in lines if (match := _CODE.search(line))]
        if found:
            return CaseFailure(str(self.cell), found[-1][1], f"{where}: {found[-1][2]}")
        return CaseFailure(str(self.cell), "E_INTERNAL", f"{where}: {lines[-1] if len(lines) > 1 else 'no output'}")


def run_cells(
    cells: Sequence[Cell],
    steps: Steps,
    places: Sequence[Slot],
    log_of: Callable[[Cell], Path],
    finished: Callable[[Cell, dict[str, float]], str],
    known_seconds: Sequence[float] = (),
    lock: IO[bytes] | None = None,
) -> list[CaseFailure]:
    """Run cells in their order, one per slot at a time; returns the failures, of which each costs only its own cell.

    ``finished`` is called with the seconds of each step when a cell is done, and returns what to say about it;
    ``known_seconds`` are how long cells took before, for the time left. Raises StoppedError on a stop signal, after
    the children have ended cleanly, as they also do when anything else ends this early; a second signal kills them.
    """
    waiting, free = deque(cells), list(reversed(places))
    runs: list[_Run] = []
    failures: list[CaseFailure] = []
    durations = list(known_seconds)
    num_done = 0
    with stop_on_signal("the current step of each training") as flag:
        try:
            while waiting or runs:
                if flag.exit_code is not None:
                    message = "stopped; what is finished is kept, and the same command goes on."
                    raise StoppedError(flag.exit_code, message)
                while waiting and free:
                    cell = waiting.popleft()
                    runs.append(_Run(cell, steps(cell), free.pop(), log_of(cell), lock))
                    logger.info("%s  begun: %s", time.strftime("%H:%M:%S"), cell)
                for run in [run for run in runs if not run.is_busy()]:
                    about = _outcome(run, finished, durations, failures)
                    runs.remove(run)
                    free.append(run.slot)
                    num_done += 1
                    left = time_left(durations, len(waiting), [other.elapsed for other in runs], len(places))
                    text = f"{num_done} of {len(cells)}: {run.cell}: {about}"
                    logger.info("%s  %s; %s", time.strftime("%H:%M:%S"), text, left)
                time.sleep(POLL_SECONDS)
        finally:
            _stop(runs)
    return failures


def _outcome(
    run: _Run,
    finished: Callable[[Cell, dict[str, float]], str],
    durations: list[float],
    failures: list[CaseFailure],
) -> str:
    """What to say about a cell that has ended; adds its duration or its failure."""
    if run.failure is not None:
        failures.append(run.failure)
        return f"FAILED: {run.failure.code}  {run.failure.reason}"
    if TRAINING in run.seconds:  # the last part of a training that was continued tells nothing
        durations.append(run.elapsed)
    return finished(run.cell, run.seconds)


def time_left(durations: Sequence[float], num_waiting: int, elapsed: Sequence[float], num_slots: int) -> str:
    """The time until all is done, from the mean duration of the cells so far (seconds)."""
    if num_waiting == 0 and not elapsed:
        return "nothing left"
    if not durations:
        return "time left unknown"
    mean = sum(durations) / len(durations)
    seconds = (num_waiting * mean + sum(max(mean - seconds, 0.0) for seconds in elapsed)) / num_slots
    return f"about {timedelta(seconds=round(seconds))} left"


def _stop(runs: Sequence[_Run]) -> None:
    active = [run for run in runs if run.process is not None and run.process.poll() is None]
    if not active:
        return
    logger.info("ending the trainings that run, each after its current step")
    for run in active:
        run.stop()
    deadline = time.monotonic() + SECONDS_TO_STOP
    try:
        for run in active:
            run.wait(deadline)
    finally:
        for run in active:
            run.kill()
