"""Errors of child processes (one per GPU) as they were raised, not as the launcher's report about a failed child."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mfm_nnunet import terminal
from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.processes import raise_on_signal, start_resource_tracker

SECONDS_TO_SAVE = 600
"""How long processes that were told to stop may take, e.g. to end a probe and to save, before they are killed."""


def call_recorded(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` in a child process; what the user should see of its end is also noted in ``folder``."""
    try:
        with terminal.escaped_streams():
            terminal.configure_logging()
            return function(*arguments)
    except (MFMError, StoppedError, FloatingPointError) as error:
        note: dict[str, Any] = {"message": str(error)}
        if isinstance(error, MFMError):
            note = {"code": error.code, "message": error.message}
        elif isinstance(error, StoppedError):
            note["exit_code"] = error.exit_code
        (Path(folder) / f"{os.getpid()}.json").write_text(json.dumps(note))
        if isinstance(error, StoppedError):
            raise SystemExit(error.exit_code) from error  # the end of a process without a traceback
        raise


def run_processes(function: Callable[..., Any], arguments: tuple[Any, ...], number: int, folder: str) -> None:
    """Call ``function(rank, *arguments)`` in ``number`` processes and wait for them; ``folder`` is where they note.

    Raises what a process noted. What ends the wait, such as a signal, ends the processes too: each gets the same signal
    and may save, for as long as ``SECONDS_TO_SAVE``. A second signal kills them.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    start_resource_tracker()
    with raise_on_signal(), no_child_left():
        context = start_processes(function, arguments, number, join=False)
        assert context is not None, "it is not joined yet"
        try:
            while not context.join():
                pass
        except (ProcessRaisedException, ProcessExitedException):
            raise_recorded(folder)
            raise
        except BaseException as error:
            number_sent = error.exit_code - 128 if isinstance(error, StoppedError) else signal.SIGTERM
            _end(context.processes, number_sent)
            raise_recorded(folder, 128 + number_sent)
            raise


@contextlib.contextmanager
def no_child_left() -> Iterator[None]:
    """Kill the ``multiprocessing`` children of this block that are left at its end, e.g. after a second signal."""
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
                process.join()


def _end(processes: Iterable[BaseProcess], number: int) -> None:
    """Send a signal to processes and give them time to save."""
    until = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def raise_recorded(folder: str, exit_code: int | None = None) -> None:
    """In the parent, after a child failed: raise what a child noted, if any did.

    ``exit_code`` is that of the signal which ended the parent, where one did: a child may have got another one first.
    """
    for file in sorted(Path(folder).glob("*.json")):
        note = json.loads(file.read_text())
        if "code" in note:
            raise MFMError(note["code"], note["message"])
        if "exit_code" in note:
            raise StoppedError(exit_code or note["exit_code"], note["message"])
        raise FloatingPointError(note["message"])
