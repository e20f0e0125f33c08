"""SIGTERM and Ctrl-C set a flag; the step ends, the state is saved, and the process ends with 143 or 130."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from mfm_nnunet.errors import StoppedError

_HANDLED = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]


SAME_STOP_SECONDS = 2.0
"""Ctrl-C and schedulers signal a whole group of processes, and their parent passes the signal on: that is one stop."""


class StopFlag:
    """Set by the first signal. A later one ends the process at once; the last saved state stays intact."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self._since = 0.0
        self._message_at_once: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self._message_at_once is not None:
            raise StoppedError(128 + number, self._message_at_once)
        if self.exit_code is None:
            self.exit_code, self._since = 128 + number, time.monotonic()
        elif time.monotonic() - self._since > SAME_STOP_SECONDS:
            raise SystemExit(128 + number)

    @contextlib.contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Inside, a signal raises StoppedError with ``message``: for long work of others, who look at no flag."""
        self._message_at_once = message
        try:
            yield
        finally:
            self._message_at_once = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT for the duration of a run (only possible in the main thread)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    with signal_handlers_kept():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, flag.handle)
        yield flag


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put this process's signal handlers back afterwards; torchrun's agent replaces four of them and leaves its own,
    which the next child process would inherit and raise on a plain terminate()."""
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
