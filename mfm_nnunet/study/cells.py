"""The cells of a study: each is three commands (train, predict, score); several run in parallel.

A failed cell does not affect others. On a signal the commands end cleanly, and finished work is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from mfm_nnunet.errors import CaseFailure, MFMError, StoppedError
from mfm_nnunet.files import inside, report_full_disk, take_lock
from mfm_nnunet.reports.progress import track
from mfm_nnunet.signals import stop_on_signal
from mfm_nnunet.study.design import Cell
from mfm_nnunet.study.evaluation import RESULT
from mfm_nnunet.study.folder import Study

logger = logging.getLogger(__name__)

TRAINING = "training"
"""Title of the step that trains from the beginning; a resumed one has another title."""
POLL_SECONDS = 0.2
SECONDS_TO_STOP = 120.0
"""Time limit for stopping. A training stops after its current step; a process that takes longer is killed."""
_COMMAND = "import sys; from mfm_nnunet.cli.{} import main; sys.exit(main())"
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth", "resume.pth")
_CODE = re.compile(r"\b(E_[A-Z_]+)  (.+)")


@dataclass(frozen=True)
class Step:
    """One command: ``words`` as typed by a person, and environment variables to add."""

    title: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the command as a shell line, including environment variables."""
        variables = (f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        return " ".join([*variables, shlex.join(self.words)])

    @property
    def program(self) -> list[str]:
        """Return the command line that runs the words with this Python, regardless of PATH."""
        if self.words[0].startswith("mfm_"):
            return [sys.executable, "-c", _COMMAND.format(self.words[0].removeprefix("mfm_")), *self.words[1:]]
        return [sys.executable, *self.words[1:]] if self.words[0] == "python" else list(self.words)


Steps = Callable[[Cell], Iterator[Step]]
"""The remaining steps of a cell, as an iterator that is advanced after each step has ended."""


def all_steps(study: Study, cell: Cell, device: str, licence: str | None = None) -> tuple[Step, Step, Step]:
    """Return all steps of a cell: training, prediction, scores. ``licence`` of initial weights is accepted."""
    question, arm, folder = study.question, study.arms[cell.arm], study.cell_folder(cell)
    fold, model = str(study.fold(cell)), _model_of_cell(study, cell)
    environment = {
        "nnUNet_raw": str(study.workspace / "nnUNet_raw"),
        "nnUNet_preprocessed": str(study.workspace / "nnUNet_preprocessed"),
        "nnUNet_results": str(folder / "results"),
    }
    common = ("--workspace", str(folder), *(() if device == "auto" else ("-device", device)))
    weights = [] if arm.file is None else ["-pretrained_weights", arm.file]
    weights += [] if arm.file is None or licence is None else ["--accept-licence", licence]
    corpus = ("--unlabelled", arm.unlabelled.partition(" ")[0]) if arm.unlabelled else ()
    settings = ("--set", *question.settings, *arm.settings, f"seed={cell.seed}")
    train = ("mfm_train", question.dataset, question.configuration, fold, "-p", study.plans_name)
    head = ("--head", study.head(cell.arm)) if study.head(cell.arm) else ()
    predict = ("mfm_predict", "-i", str(study.test_folder), "-o", str(folder / "masks"), "-m", str(model), "-f", fold)
    tta = () if question.mirroring else ("--disable_tta",)
    return (
        Step(TRAINING, (*train, *head, *weights, *corpus, *common, *settings), environment),
        Step("prediction", (*predict, "--resume", *tta, *common), environment),
        Step("scores", ("python", "-m", "mfm_nnunet.study.evaluation", str(study.folder), str(folder))),
    )


def steps_left(study: Study, cell: Cell, device: str, licence: str | None = None) -> Iterator[Step]:
    """Yield the remaining steps: train (or resume), predict, score. A cell with a result is only scored again."""
    folder = study.cell_folder(cell)
    train, predict, score = all_steps(study, cell, device, licence)
    if (folder / RESULT).is_file():  # from another version of the library: masks and model are kept
        yield score
        return
    fold = _model_of_cell(study, cell) / f"fold_{study.fold(cell)}"
    existing = [name for name in _CHECKPOINTS if (fold / name).is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    if "checkpoint_final.pth" not in existing:
        continued = Step(f"{train.title}, continued", (*train.words, "--c"), train.environment)
        yield continued if existing else train
    yield predict
    yield score


def list_commands(study: Study, device: str, licence: str | None = None) -> str:
    """List the commands of every cell of the study as a shell script."""
    lines = ["# The commands of every cell, as the study runs them."]
    for cell in study.asked:
        lines += ["", f"# {cell}", *map(str, all_steps(study, cell, device, licence))]
    return "\n".join(lines) + "\n"


def _model_of_cell(study: Study, cell: Cell) -> Path:
    head = f"_{study.head(cell.arm)}" if study.head(cell.arm) else ""
    model = f"MFMTrainer{head}__{study.plans_name}__{study.question.configuration}"
    return inside(study.cell_folder(cell), "results", study.question.dataset, model)


@dataclass(frozen=True)
class Slot:
    """A share of the computer for one cell at a time: CPU cores, and the visible GPU."""

    cores: tuple[int, ...] = ()
    gpu: str | None = None


def share_computer(num_jobs: int, gpus: Sequence[str]) -> list[Slot]:
    """Divide the cores of this process into ``num_jobs`` equal shares, and assign GPUs in turn."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [tuple(cores[number::num_jobs]) if num_jobs <= len(cores) else tuple(cores) for number in range(num_jobs)]
    return [Slot(share, gpus[number % len(gpus)] if gpus else None) for number, share in enumerate(shares)]


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[int]:
    """Lock the study folder; yield the lock's file. Commands inherit it, so orphans of a killed study keep the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as handle:
        is_locked = take_lock(handle.fileno())
        if is_locked is False:
            raise MFMError(
                "E_EXISTS",
                f"{folder}: another mfm_study, or a training it started, is running in this folder. Wait, or stop it.",
            )
        if is_locked is None:
            logger.warning("%s: this file system has no locks: run only one mfm_study in it at a time", folder)
        yield handle.fileno()


class _Runner:
    """Run the steps of cells, each cell in its own slot. Called from several threads."""

    def __init__(self, slots: Sequence[Slot], lock: int | None) -> None:
        self.lock = () if lock is None else (lock,)
        self.slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in slots:
            self.slots.put(slot)
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.guard = threading.Lock()
        self.is_stopping = False

    def run(self, cell: Cell, steps: Iterator[Step], log: Path) -> dict[str, float] | CaseFailure:
        """Run the steps of a cell and return the seconds of each, or the reason of a failure."""
        slot = self.slots.get()
        try:
            if slot.cores and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, slot.cores)  # for this thread; its commands inherit it
            logger.info("%s  started: %s", time.strftime("%H:%M:%S"), cell)
            seconds = {}
            for step in steps:
                start, offset = time.monotonic(), log.stat().st_size if log.exists() else 0
                code = self._run_step(step, slot, log)
                seconds[step.title] = time.monotonic() - start
                if code:
                    return _explain(cell, step, code, log, offset)
            return seconds
        finally:
            self.slots.put(slot)

    def _run_step(self, step: Step, slot: Slot, log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **step.environment}
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
        with report_full_disk(log), open(log, "ab") as handle:
            handle.write(f"$ {shlex.join(step.words)}\n".encode("utf-8", "surrogateescape"))
            handle.flush()
            with self.guard:
                if self.is_stopping:
                    return 128 + signal.SIGTERM
                # A separate session: Ctrl-C reaches only this process, which ends the commands in order.
                process = subprocess.Popen(
                    step.program, stdin=subprocess.DEVNULL, stdout=handle, stderr=subprocess.STDOUT,
                    env=environment, start_new_session=True, pass_fds=self.lock,
                )  # fmt: skip
                self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        return code

    def stop(self) -> None:
        """Start no more commands, and end the running ones after their current step; kill those that take too long."""
        with self.guard:
            self.is_stopping = True
            running = [process for process in self.processes if process.poll() is None]
        if not running:
            return
        logger.info("stopping the running trainings, each after its current step")
        deadline = time.monotonic() + SECONDS_TO_STOP
        try:
            for process in running:
                process.terminate()
            while any(process.poll() is None for process in running) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # including its child processes


def run_cells(
    cells: Sequence[Cell],
    steps: Steps,
    slots: Sequence[Slot],
    logs: Path,
    on_success: Callable[[Cell, dict[str, float]], str],
    known_seconds: Sequence[float] = (),
    lock: int | None = None,
) -> list[CaseFailure]:
    """Run cells in order, one per slot at a time, and return the failures; a failed cell does not affect others.

    ``on_success`` gets the seconds of each step of a finished cell and returns a line for the user. ``known_seconds``
    are durations of earlier cells, to estimate the time left. Raises StoppedError on a stop signal, after the commands
    have ended cleanly; a second signal kills them.
    """
    runner, failures, durations = _Runner(slots, lock), [], list(known_seconds)
    shown = track("cells", len(cells), lines=False)
    with (
        stop_on_signal("the current step of each training") as flag,
        ThreadPoolExecutor(len(slots)) as pool,
        shown as advance,
    ):
        try:
            left = {
                pool.submit(runner.run, cell, steps(cell), inside(logs, f"{cell.folder_name}.txt")): cell
                for cell in cells
            }
            while left:
                for future in wait(left, POLL_SECONDS, FIRST_COMPLETED).done:
                    cell, outcome = left.pop(future), future.result()
                    if isinstance(outcome, CaseFailure):
                        failures.append(outcome)
                        about = f"FAILED: {outcome.code}  {outcome.reason}"
                    else:
                        if TRAINING in outcome:  # the time of a resumed training would mislead
                            durations.append(sum(outcome.values()))
                        about = on_success(cell, outcome)
                    advance()
                    text = f"{len(cells) - len(left)} of {len(cells)}: {cell}: {about}"
                    remaining = format_time_left(durations, len(left), len(slots))
                    logger.info("%s  %s; %s", time.strftime("%H:%M:%S"), text, remaining)
                if flag.exit_code is not None:
                    raise StoppedError(flag.exit_code, "stopped. Finished work is kept; the same command continues.")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            runner.stop()
    return failures


def format_time_left(durations: Sequence[float], num_left: int, num_slots: int) -> str:
    """Estimate and format the time left from the mean duration of the cells so far (seconds)."""
    if num_left == 0:
        return "nothing left"
    if not durations:
        return "time left unknown"
    seconds = num_left * sum(durations) / len(durations) / num_slots
    return f"about {timedelta(seconds=round(seconds))} left"


def _explain(cell: Cell, step: Step, exit_code: int, log: Path, offset: int) -> CaseFailure:
    """Return the reason of a failed step: the last error code in its part of the log, else the last line."""
    with open(log, "rb") as handle:
        handle.seek(offset)
        lines = [line for line in handle.read().decode(errors="replace").splitlines() if line.strip()]
    where = f"{step.title}, see {log}"
    if exit_code > 128 or exit_code < 0:
        return CaseFailure(str(cell), "E_INTERNAL", f"{where}: killed by another process (exit code {exit_code}).")
    found = [match for line in lines if (match := _CODE.search(line))]
    if found:
        return CaseFailure(str(cell), found[-1][1], f"{where}: {found[-1][2]}")
    return CaseFailure(str(cell), "E_INTERNAL", f"{where}: {lines[-1] if len(lines) > 1 else 'no output'}")
