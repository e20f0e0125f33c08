"""Stop signals (SIGTERM, Ctrl-C, SIGHUP, SIGUSR1): how a process reacts and what it prints.

After the first signal, training ends its step, saves and raises StoppedError; everything else raises StoppedError at
once. The exit code is 128 plus the number of the signal. A thread acknowledges the signal within a second, even while
the main thread is inside a long library call. The second signal ends the process at once.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from types import FrameType

from mfm_nnunet.errors import StoppedError

logger = logging.getLogger(__name__)

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
_KEPT = [*STOP_SIGNALS, *(getattr(signal, name) for name in ("SIGQUIT",) if hasattr(signal, name))]
SAME_STOP_SECONDS = 2.0
"""Signals within this time are one stop: Ctrl-C and schedulers signal a whole group, and the parent passes it on."""
SAME_STOP_SECONDS_ALONE = 0.5
"""The same for a process whose parent does not pass signals on; ``timeout`` sends SIGTERM twice."""
SECONDS_WITHOUT_A_WORD = 0.5
"""A process that ends sooner prints only the reason why it ended."""
SECONDS_TO_END = 2.0
"""Time that a library call in the main thread gets after the second signal."""


def name_of(number: int) -> str:
    """Return the usual name of a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class StopFlag:
    """Set by the first signal; the next one raises StoppedError. The last saved state stays intact."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.after = "this step"
        """Work that is finished after the first signal, for the message."""
        self._since = 0.0
        self._message_at_once: str | None = None
        self._process = os.getpid()

    @property
    def is_of_this_process(self) -> bool:
        """True if the flag was created in this process, not before a fork."""
        return os.getpid() == self._process

    @property
    def is_raising(self) -> bool:
        """True if a signal raises StoppedError at once."""
        return self._message_at_once is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if self.is_raising and not self.is_of_this_process:  # a fork has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if name_of(number) == "SIGHUP":
            _replace_closed_streams()
        if self.exit_code is None:
            self.exit_code = 128 + number
            self._since = self._since or time.monotonic()
            if self.is_raising:
                raise StoppedError(self.exit_code, self._message_at_once or f"stopped by {name_of(number)}.")
        elif not self.is_same_stop(time.monotonic() - self._since):
            message = f"stopped at once by a second signal, {name_of(number)}. The last saved state is intact."
            raise StoppedError(128 + number, message)

    def note_arrival(self, moment: float) -> None:
        """Record when the first signal arrived: the main thread may handle it late."""
        self._since = moment

    def is_same_stop(self, seconds: float) -> bool:
        """Return whether a signal ``seconds`` after the first one belongs to the same stop."""
        return seconds <= (SAME_STOP_SECONDS if _has_parent() else SAME_STOP_SECONDS_ALONE)

    @contextlib.contextmanager
    def at_once(self, message: str = "") -> Iterator[None]:
        """Make a signal raise StoppedError with ``message`` inside: for work that does not check the flag."""
        before, self._message_at_once = self._message_at_once, message
        try:
            yield
        finally:
            self._message_at_once = before

    @contextlib.contextmanager
    def noted(self, after: str) -> Iterator[None]:
        """Make a signal only set the flag inside; ``after`` names the work that is finished first."""
        before = self._message_at_once, self.after
        self._message_at_once, self.after = None, after
        try:
            yield
        finally:
            self._message_at_once, self.after = before


_active: StopFlag | None = None
"""Flag whose handlers are installed in this process."""


@contextlib.contextmanager
def stop_on_signal(after: str = "this step") -> Iterator[StopFlag]:
    """Set the yielded flag on stop signals (main thread only); ``after`` names the work that is finished first."""
    with _flag() as flag, flag.noted(after):
        yield flag


@contextlib.contextmanager
def raise_on_signal(is_command: bool = False) -> Iterator[StopFlag]:
    """Raise StoppedError on stop signals, so that half-written files are cleaned up (main thread only).

    With ``is_command`` the process is ended if its main thread does not answer a second signal.
    """
    with _flag(is_command) as flag, flag.at_once():
        yield flag


@contextlib.contextmanager
def _flag(is_command: bool = False) -> Iterator[StopFlag]:
    """Yield the flag of this process. All parts of a command share it, so they agree on the first signal."""
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()
    elif _active is not None and _active.is_of_this_process:
        yield _active
    else:
        flag = StopFlag()
        with _installed(flag, is_command):
            yield flag


@contextlib.contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Restore this process's signal handlers afterwards.

    torchrun's agent replaces some handlers and leaves them installed. The next child process would inherit them and
    raise on a plain terminate().
    """
    before = {number: signal.getsignal(number) for number in _KEPT}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def stop_signals_ignored() -> None:
    """Ignore all stop signals except SIGTERM in a worker process, which its parent ends."""
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Block stop signals except SIGTERM for processes started inside; this process receives them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number for number in STOP_SIGNALS if number != signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Start Python's resource tracker with signals blocked: SIGHUP and SIGUSR1 would kill it."""
    with stop_signals_blocked():
        resource_tracker.ensure_running()


def handled_signals() -> list[int]:
    """Return the stop signals that this process handles; under ``nohup`` it ignores SIGHUP."""
    return [n for n in STOP_SIGNALS if not (name_of(n) == "SIGHUP" and signal.getsignal(n) is signal.SIG_IGN)]


def end_despite_threads(exit_code: int) -> None:
    """End a stopped command with running threads, for which the interpreter would wait."""
    main = threading.main_thread()
    left = [thread for thread in threading.enumerate() if thread is not main and not thread.daemon]

    def end() -> None:
        until = time.monotonic() + SECONDS_WITHOUT_A_WORD
        for thread in left:
            thread.join(max(0.0, until - time.monotonic()))
        if any(thread.is_alive() for thread in left):
            _end_now(exit_code)

    if left:
        threading.Thread(target=end, daemon=True).start()


@contextlib.contextmanager
def _installed(flag: StopFlag, is_command: bool) -> Iterator[None]:
    global _active
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    answers = threading.Thread(target=_answer, args=(flag, reading, is_command), daemon=True, name="stop signals")
    with signal_handlers_kept():
        before, _active = _active, flag
        # The interpreter writes signal numbers to it immediately, whatever the main thread is doing.
        other = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        answers.start()
        try:
            for number in handled_signals():
                signal.signal(number, flag.handle)
            yield
        finally:
            _active = before
            signal.set_wakeup_fd(other)
            os.write(writing, b"\0")  # closing is not enough: forked processes hold it open too
            answers.join()
            os.close(reading)
            os.close(writing)


def _answer(flag: StopFlag, reading: int, is_command: bool) -> None:
    """Acknowledge a signal; after a second one, end a command whose main thread does not.

    Returns when it reads a zero from the pipe ``reading``.
    """
    first: float | None = None
    last, seconds, is_second = 0, None, False
    while (number := _next_signal(reading, seconds)) != 0:
        now = time.monotonic()
        if number is None and is_second:
            logger.error("%s again: ended at once, in the middle of a long computation.", name_of(last))
            _end_now(128 + last)
        elif number is None:
            _acknowledge(flag, last)
            seconds = None
        elif number in STOP_SIGNALS and first is None:
            first, last, seconds = now, number, SECONDS_WITHOUT_A_WORD
            flag.note_arrival(now)
        elif number in STOP_SIGNALS and first is not None and is_command and not flag.is_same_stop(now - first):
            last, seconds, is_second = number, SECONDS_TO_END, True


def _next_signal(reading: int, seconds: float | None) -> int | None:
    """Wait for the number of a signal; None after ``seconds``."""
    ready, _, _ = select.select([reading], [], [], seconds)
    return os.read(reading, 1)[0] if ready else None


def _acknowledge(flag: StopFlag, number: int) -> None:
    if name_of(number) == "SIGHUP":  # the reader of a pipe may have ended slightly later than the terminal
        _replace_closed_streams()
    if _has_parent():  # the parent prints the message for all
        return
    end = "" if flag.is_raising else f" after {flag.after}"
    again = "press Ctrl-C again" if number == signal.SIGINT else "send it again"
    lead = "\n" if sys.stderr.isatty() else ""  # below a progress line
    logger.warning(f"{lead}%s: stopping%s; %s to stop at once", name_of(number), end, again)


def _has_parent() -> bool:
    """Return whether our own parent process, or torchrun, started this one and passes signals on."""
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


def _replace_closed_streams() -> None:
    """Discard output if the terminal or pipe is closed: a message must not make the save fail."""
    if not hasattr(select, "poll"):
        return
    for stream in (1, 2):
        poll = select.poll()
        poll.register(stream, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, stream)
            os.close(sink)


def _end_now(exit_code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)
