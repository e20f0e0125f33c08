"""SIGTERM and Ctrl-C set a flag; the step ends, the state is saved, and the process ends with 143 or 130."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopFlag:
    """Set by the first signal. A second signal ends the process at once; the last saved state stays intact."""

    def __init__(self) -> None:
        self.exit_code: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.exit_code is not None:
            raise SystemExit(128 + number)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGINT for the duration of a run (only possible in the main thread)."""
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
