"""Decode images in child processes, so that nothing in a file can hang, abort or exhaust this one.

The libraries that decode images are large and are fed with files of strangers. A child
(:mod:`mfm_nnunet.images.decode`) checks and decodes one file at a time under limits of processor time and memory. It
stays for the next file, which then costs a fraction of a millisecond more than a call. Voxels come back through shared
memory, everything else as JSON; nothing from a child is ever unpickled. One child serves one thread; an idle one ends
by itself.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import json
import logging
import math
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.signals import stop_signals_blocked

IDLE_SECONDS = 60.0
"""Time that a child waits for the next file before it ends."""
WALL_SECONDS = 300.0
"""Time that a child may take for a file, plus the next constant; its processor time has a lower limit (decode)."""
BYTES_PER_SECOND = 500_000
"""The slowest network share that is waited for."""
_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 16
_START = "import sys; sys.path[:] = sys.argv[3:]; from mfm_nnunet.images.decode import serve; serve(*sys.argv[1:3])"

log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """The answer of a child: plain values, and the voxels in the order of its memory if there are any."""

    content: dict[str, Any]
    voxels: np.ndarray | None


def call(file: Path, request: dict[str, Any]) -> Reply:
    """Send ``request`` about ``file`` to a child and return its answer.

    Raises the MFMError that the child found, and E_READER_CRASH, E_READER_TIMEOUT and E_READER_MEMORY when the file
    ended the child; StoppedError when :func:`end_all` did.
    """
    while True:
        child = _take()
        try:
            reply = child.ask({"file": str(file), **request}, WALL_SECONDS + _file_size(file) / BYTES_PER_SECOND)
        except BaseException as error:
            child.end()
            if not isinstance(error, (EOFError, OSError)):
                raise
            if child.was_idle:
                continue
            raise child.explain(file, error) from error
        child.log_printed(file)
        with _lock:
            _idle.append(child)
        if "error" in reply.content:
            raise MFMError(*reply.content["error"])
        if "internal" in reply.content:
            raise RuntimeError(reply.content["internal"])
        return reply


def warm() -> None:
    """Start a child that imports its libraries while this process does something else."""
    child = _take()
    with _lock:
        _idle.append(child)


def end_all() -> None:
    """End all children at once, also those at work. The threads that wait for them get StoppedError."""
    with _lock:
        idle, at_work = list(_idle), _living - set(_idle)
        _idle.clear()
    for child in (*idle, *at_work):
        child.is_stopped = True
        child.process.kill()
    for child in idle:  # whoever waits for one at work ends it
        child.end()


class _Child:
    """One child process and the socket to it."""

    def __init__(self) -> None:
        self.is_stopped = self.is_ready = False
        self.memory: mmap.mmap | None = None
        self.folder = tempfile.mkdtemp(prefix="mfm_reader_")
        self.printed: dict[int, IO[bytes]] = {
            level: tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (closed by end)
            for level in (logging.WARNING, logging.DEBUG)
        }
        self.socket, other = socket.socketpair()
        with other:
            stdout, stderr = self.printed.values()
            # The search path is handed over, because "python -m" would put the current folder in front of it.
            command = [sys.executable, "-c", _START, str(other.fileno()), self.folder, *sys.path]
            with stop_signals_blocked():  # a terminal signals all processes; this one decides when a child ends
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, pass_fds=(other.fileno(),)
                )
        with _lock:
            _living.add(self)

    @property
    def was_idle(self) -> bool:
        """Return whether the child ended by itself because nothing was asked of it for a while."""
        return self.is_ready and not self.is_stopped and self.process.returncode == 0

    def ask(self, request: dict[str, Any], seconds: float) -> Reply:
        """Return the answer to a request. Raises EOFError when the child ended, TimeoutError when it takes too long."""
        self.socket.settimeout(seconds)
        if not self.is_ready:
            receive(self.socket)  # a child says that its libraries are imported
            self.is_ready = True
        send(self.socket, request)
        content, descriptor = receive(self.socket)
        if descriptor is not None:
            self.memory = mmap.mmap(descriptor, 0)
            os.close(descriptor)
        if "shape" not in content:
            return Reply(content, None)
        assert self.memory is not None, "a child sends its memory before it uses it"
        return Reply(content, np.frombuffer(self.memory, np.float32, math.prod(content["shape"])).copy())

    def log_printed(self, file: Path) -> None:
        """Log what the libraries printed: as warnings from stdout, where nnU-Net writes, else for the curious."""
        for level in self.printed:
            if text := " ".join(self.take_printed(level).split()):
                log.log(level, "%s: %s", file, text)

    def take_printed(self, level: int) -> str:
        """Return and forget what was printed on stdout (WARNING) or stderr (DEBUG)."""
        stream = self.printed[level]
        if os.fstat(stream.fileno()).st_size == 0:
            return ""
        # The position is shared with the child, which therefore continues at the beginning.
        stream.seek(0)
        text = stream.read().decode(errors="replace")
        stream.seek(0)
        stream.truncate()
        return text

    def explain(self, file: Path, error: Exception) -> BaseException:
        """Return the error of a file that ended the child."""
        status = self.process.returncode
        if self.is_stopped:
            return StoppedError(128 + signal.SIGTERM, "stopped while an image was read.")
        last = ([line for line in self.last_words.splitlines() if line.strip()] or [""])[-1].strip()
        if not self.is_ready:
            return RuntimeError(f"the process that reads images did not start (exit code {status}): {last}")
        if isinstance(error, TimeoutError) or status == -signal.SIGXCPU:
            return MFMError(
                "E_READER_TIMEOUT",
                f"{file}: reading took far longer than a file of its size should take, so it was stopped. The file is "
                "damaged, or the disk does not answer. Export or copy it again.",
            )
        if status == -signal.SIGKILL:
            return MFMError(
                "E_READER_MEMORY",
                f"{file}: the system ended the process that was reading it, as it does when memory runs out. Use fewer "
                "processes, free some memory, or crop the image.",
            )
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        reason = f"{name}: {last}" if last else name
        return MFMError(
            "E_READER_CRASH",
            f"{file}: the library that decodes it crashed ({reason}). The file is damaged: export it again.",
        )

    def end(self) -> None:
        """End the child and give back what belonged to it."""
        with _lock:
            _living.discard(self)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # one that ends by itself does so now, and its reason counts
        self.process.kill()
        self.process.wait()
        self.last_words = self.take_printed(logging.DEBUG)
        self.forget()
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self) -> None:
        """Close this process's ends."""
        self.socket.close()
        for stream in self.printed.values():
            stream.close()


_lock = threading.RLock()
_idle: list[_Child] = []
_living: set[_Child] = set()


def _take() -> _Child:
    with _lock:
        if _idle:
            return _idle.pop()
    return _Child()


def _file_size(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return 0


def _forget_all() -> None:
    """Forget all children in a forked process: they belong to the parent."""
    global _lock
    _lock = threading.RLock()
    for child in _living:
        child.forget()
    _living.clear()
    _idle.clear()


def send(channel: socket.socket, content: dict[str, Any], descriptor: int | None = None) -> None:
    """Write a message of plain values, and with it a file descriptor."""
    body = json.dumps(content).encode("ascii")  # names that are no UTF-8 are escaped
    data = _LENGTH.pack(len(body)) + body
    if descriptor is None:
        channel.sendall(data)
        return
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    sent = channel.sendmsg([data], ancillary)
    channel.sendall(data[sent:])


def receive(channel: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Read a message, and a file descriptor that came with it. Raises EOFError at the end."""
    data, descriptors, _, _ = socket.recv_fds(channel, _CHUNK, 1)
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack(data[: _LENGTH.size])[0]:
        more = channel.recv(_CHUNK)
        if not more:
            raise EOFError("the other process ended")
        data += more
    return json.loads(data[_LENGTH.size :]), descriptors[0] if descriptors else None


os.register_at_fork(after_in_child=_forget_all)
atexit.register(end_all)
