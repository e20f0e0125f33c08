"""What every loop over cases shares: one bad case is a report line, a dead worker costs one case, changes are seen.

Used by the fingerprint (``plans``) and by preprocessing.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from mfm_nnunet import terminal
from mfm_nnunet.data.integrity import files_of
from mfm_nnunet.errors import CaseFailure, MFMError, is_out_of_memory

if TYPE_CHECKING:
    from pathlib import Path

    from mfm_nnunet.data.corpus import Case

log = logging.getLogger(__name__)
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 15.0
"""How often a loop over cases says how far it is."""


def attempt(work: Callable[[Case], Result], case: Case) -> Result | CaseFailure:
    """The result of ``work(case)``, or what went wrong. A full disk concerns all cases and is raised (E_DISK_FULL)."""
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


def source_signature(case: Case) -> list[list[int]]:
    """Size in bytes and time of change in ns of each source file of a case and of what belongs to it, the label last.

    Raises MFMError (E_NOT_FOUND) for a file that is not there.
    """
    files = [file for image in case.images for file in files_of(image)]
    files += files_of(case.label, is_label=True) if case.label is not None else []
    try:
        return [[status.st_size, status.st_mtime_ns] for status in (file.stat() for file in files)]
    except OSError as error:
        raise unreadable(error.filename, error) from error


def unreadable(file: Path | str, error: OSError) -> MFMError:
    """The error (E_NOT_FOUND) of a file that the operating system does not give."""
    reason = error.strerror or error
    return MFMError("E_NOT_FOUND", f"{file}: cannot be read ({reason}). Check the path and its permissions.")


def in_threads(
    work: Callable[[Case], Result], cases: Iterable[Case], num_threads: int
) -> Generator[tuple[Case, Result | CaseFailure], None, None]:
    """Each case with its outcome, in the order given; few are begun ahead, so that few results wait in memory."""
    if num_threads <= 1:
        yield from ((case, attempt(work, case)) for case in cases)
        return
    with ThreadPoolExecutor(num_threads) as executor:
        begun: deque[tuple[Case, Future[Result | CaseFailure]]] = deque()
        for case in cases:
            begun.append((case, executor.submit(attempt, work, case)))
            if len(begun) > num_threads:
                first, future = begun.popleft()
                yield first, future.result()
        for case, future in begun:
            yield case, future.result()


def in_processes(
    work: Callable[[Case], Result], cases: Iterable[Case], num_processes: int
) -> Generator[tuple[Case, Result | CaseFailure], None, None]:
    """Each case with its outcome as it is finished; ``work`` must be picklable.

    When a worker dies, the cases that were under way are repeated one by one, so only the one that kills is lost.
    """
    waiting = deque(cases)
    while waiting:
        suspects = yield from _until_a_death(work, waiting, num_processes)
        for case in suspects:
            alone = deque([case])
            if (yield from _until_a_death(work, alone, 1)):
                yield case, _death(case)


def with_progress(
    outcomes: Iterable[tuple[Case, Result | CaseFailure]], num_cases: int, what: str
) -> Generator[tuple[Case, Result | CaseFailure], None, None]:
    """The same outcomes; a loop that takes long logs now and then how far it is and how long the rest will take."""
    start = last = time.monotonic()
    for number, outcome in enumerate(outcomes, start=1):
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and number < num_cases:
            left = timedelta(seconds=round((now - start) / number * (num_cases - number)))
            log.info("%s: %d of %d cases, about %s left", what, number, num_cases, left)
            last = now
        yield outcome


def _until_a_death(
    work: Callable[[Case], Result], waiting: deque[Case], num_processes: int
) -> Generator[tuple[Case, Result | CaseFailure], None, list[Case]]:
    """Work through ``waiting``; when a worker dies, stop and return the cases that were under way."""
    executor = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _die_with_parent)
    running: dict[Future[Result | CaseFailure], Case] = {}
    try:
        while waiting or running:
            while waiting and len(running) <= num_processes:
                running[executor.submit(attempt, work, waiting[0])] = waiting[0]
                waiting.popleft()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                yield running.pop(future), outcome
    except BrokenProcessPool:
        log.warning("a worker process died; its cases are tried once more, one by one")
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    return list(running.values())


def _death(case: Case) -> CaseFailure:
    return CaseFailure(
        case.name, "E_OOM", "the worker process was killed, most likely because memory ran out. Use fewer processes."
    )


def _die_with_parent() -> None:
    """In a worker: end with the process that started it, however that one ends; log as that one does."""
    terminal.configure_logging()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
