"""Loops over cases that survive bad cases and dead workers, and detect files that change meanwhile.

Used by the fingerprint (``plans``) and by preprocessing.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mfm_nnunet import terminal
from mfm_nnunet.errors import CaseFailure, MFMError, is_out_of_memory, unreadable
from mfm_nnunet.images import decoder
from mfm_nnunet.images.integrity import files_of
from mfm_nnunet.reports.progress import track
from mfm_nnunet.signals import start_resource_tracker, stop_signals_blocked

if TYPE_CHECKING:
    from mfm_nnunet.data.cases import Case

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Item = TypeVar("Item")


def attempt(work: Callable[[Case], Result], case: Case) -> Result | CaseFailure:
    """Return ``work(case)``, or its failure. A full disk affects all cases, so E_DISK_FULL is raised."""
    try:
        return work(case)
    except MFMError as error:
        if error.code == "E_DISK_FULL":
            raise
        return CaseFailure(case.name, error.code, error.message)
    except Exception as error:
        if is_out_of_memory(error):
            return CaseFailure(case.name, "E_OOM", "not enough memory for this case. Use fewer processes.")
        details = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        first_line = (str(error).splitlines() or [""])[0]
        return CaseFailure(case.name, "E_INTERNAL", f"{type(error).__name__}: {first_line}", details)


def source_signature(case: Case) -> list[list[Any]]:
    """Return size in bytes and modification time in ns of the source files of a case: images, label, mask.

    The entry of the mask carries its name, so it cannot be confused with another file.
    """
    files = [*case.slices] or [file for image in case.images for file in files_of(image)]
    files += files_of(case.label, is_label=True) if case.label is not None else []
    masks = files_of(case.anonymisation_mask, is_label=True) if case.anonymisation_mask is not None else []
    try:
        return [
            *([status.st_size, status.st_mtime_ns] for status in map(Path.stat, files)),
            *([status.st_size, status.st_mtime_ns, "anonymised"] for status in map(Path.stat, masks)),
        ]
    except OSError as error:
        raise unreadable(case.name if case.slices else error.filename, error) from error


@contextlib.contextmanager
def unchanged(case: Case) -> Iterator[list[list[Any]]]:
    """Raise MFMError (E_CHANGED) if the files of a case change inside, instead of errors from half-written files.

    Yields their :func:`source_signature`. If a file vanishes, the original error is raised.
    """
    before = source_signature(case)
    failure: Exception | None = None
    try:
        yield before
    except Exception as error:
        if is_out_of_memory(error):
            raise
        failure = error
    try:
        is_changed = source_signature(case) != before
    except MFMError as error:
        raise failure or error from error
    if is_changed:
        text = f"{case.images[0]}: the file changed while it was read. Run the command again."
        raise MFMError("E_CHANGED", text) from failure
    if failure is not None:
        raise failure


def in_threads(
    work: Callable[[Case], Result], cases: Iterable[Case], num_threads: int
) -> Generator[tuple[Case, Result | CaseFailure], None, None]:
    """Yield each case with its outcome, in the given order; only a few run ahead, which bounds memory."""
    with reader_threads(num_threads) as executor:
        begun: deque[tuple[Case, Future[Result | CaseFailure]]] = deque()
        for case in cases:
            if num_threads <= 1:
                yield case, attempt(work, case)
                continue
            begun.append((case, executor.submit(attempt, work, case)))
            if len(begun) > num_threads:
                first, future = begun.popleft()
                yield first, future.result()
        for case, future in begun:
            yield case, future.result()


def one_ahead(begin: Callable[[Case], Future[Result]], cases: Iterable[Case]) -> Iterator[tuple[Case, Future[Result]]]:
    """Yield each case with its preparation, while that of the next case is already running."""
    waiting: tuple[Case, Future[Result]] | None = None
    for case in cases:
        submitted = (case, begin(case))
        if waiting is not None:
            yield waiting
        waiting = submitted
    if waiting is not None:
        yield waiting


@contextlib.contextmanager
def reader_threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Yield an executor for reading. On an early exit, such as a signal, its threads are not waited for."""
    executor = ThreadPoolExecutor(max(1, number), "mfm_reader")
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        decoder.end_all()  # also ends the decoders of these threads
        raise
    executor.shutdown()


def in_processes(
    work: Callable[[Case], Result], cases: Iterable[Case], num_processes: int
) -> Generator[tuple[Case, Result | CaseFailure], None, None]:
    """Yield each case with its outcome, as they finish; ``work`` must be picklable.

    If a worker dies, the cases in progress are repeated one by one, so only the case that kills its worker is lost.
    """
    waiting = deque(cases)
    while waiting:
        suspects, _ = yield from _until_a_death(work, waiting, num_processes)
        for case in suspects:
            again, exit_codes = yield from _until_a_death(work, deque([case]), 1)
            if again:
                yield case, _death(case, exit_codes)


@contextlib.contextmanager
def with_progress(outcomes: Generator[Item, None, None], num_cases: int, what: str) -> Iterator[Iterator[Item]]:
    """Yield an iterator over the same outcomes that shows its progress; close the outcomes at the end."""

    def counted() -> Iterator[Item]:
        for outcome in outcomes:
            count()
            yield outcome

    with contextlib.closing(outcomes), track(what, num_cases) as count:
        yield counted()


def _until_a_death(
    work: Callable[[Case], Result], waiting: deque[Case], num_processes: int
) -> Generator[tuple[Case, Result | CaseFailure], None, tuple[list[Case], list[int]]]:
    """Process ``waiting``; if a worker dies, stop and return the unfinished cases and the workers' exit codes."""
    start_resource_tracker()
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    reading, writing = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(num_processes, context, _end_with_pipe, (reading,))
    running: dict[Future[Result | CaseFailure], Case] = {}
    workers: set[BaseProcess] = set()
    try:
        while waiting or running:
            while waiting and len(running) <= num_processes:
                with stop_signals_blocked():  # a terminal signals all processes; the parent ends the workers
                    running[executor.submit(attempt, work, waiting[0])] = waiting[0]
                waiting.popleft()
                workers |= set(multiprocessing.active_children()) - others
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                yield running.pop(future), outcome
    except BrokenProcessPool:
        log.warning("a worker process died; its cases are tried once more, one by one")
    except BaseException:
        writing.close()  # end the workers, which would otherwise finish their cases first
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        writing.close()
        reading.close()
    return list(running.values()), [worker.exitcode for worker in workers if worker.exitcode]


def _death(case: Case, exit_codes: Sequence[int]) -> CaseFailure:
    """Return the failure of a case whose worker died. Only SIGKILL is blamed on memory: the OOM killer sends it."""
    if -signal.SIGKILL in exit_codes:
        reason = "the worker process was killed, as systems do when memory runs out. Use fewer processes."
        return CaseFailure(case.name, "E_OOM", reason)
    ends = [f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}" for code in exit_codes]
    reason = f"the worker process ended {', '.join(ends) or 'without a word'} while it worked on this case"
    return CaseFailure(
        case.name, "E_PROCESS_DIED", f"{reason}: a library crashed on it. Leave the case out, or export it again."
    )


def _end_with_pipe(reading: Connection) -> None:
    """Initialise a worker: log like the parent, and exit when the parent closes a pipe or dies."""
    terminal.configure_logging()

    def follow() -> None:
        with contextlib.suppress(EOFError, OSError):
            reading.recv()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
