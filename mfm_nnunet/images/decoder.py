"""Decode images in child processes, so that no file can hang, abort or exhaust this one.

Image libraries are large and are fed with untrusted files. A child (:mod:`mfm_nnunet.images.decode`) checks and decodes
one file at a time under limits of processor time and memory. It is reused for the next file, which then costs a
fraction of a millisecond more than a direct call. Voxels come back through shared memory, everything else as JSON;
nothing from a child is ever unpickled. One child serves one thread; an idle child exits.
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
"""Time after which an idle child exits."""
WALL_SECONDS = 300.0
"""Time limit per file, plus the time for its bytes at ``BYTES_PER_SECOND``; the limit of processor time (decode) is
lower."""
BYTES_PER_SECOND = 500_000
"""Speed of the slowest supported network share."""
_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 16
_START = "import sys; sys.path[:] = sys.argv[3:]; from mfm_nnunet.images.decode import serve; serve(*sys.argv[1:3])"

log = logging.getLogger(__name__)


class Reply(NamedTuple):
    """Answer of a child: plain values, and the voxels, if any, in the order of its memory."""

    content: dict[str, Any]
    voxels: np.ndarray | None


def call(file: Path, request: dict[str, Any], num_bytes: int | None = None) -> Reply:
    """Send ``request`` about ``file`` to a child and return its answer; ``num_bytes`` is the size of what it reads.

    Raises the MFMError that the child reports; E_READER_CRASH, E_READER_TIMEOUT or E_READER_MEMORY if the file ended
    the child; StoppedError if :func:`end_all` did.
    """
    num_bytes = _file_size(file) if num_bytes is None else num_bytes
    while True:
        child = _take()
        try:
            reply = child.ask({"file": str(file), **request}, WALL_SECONDS + num_bytes / BYTES_PER_SECOND)
        except BaseException as error:
            child.end()
            if not isinstance(error, (EOFError, OSError)):
                raise
            if child.was_idle:
                continue
            raise child.explain(file, error) from error
        child.log_printed(file)
        _give_back(child)
        if "error" in reply.content:
            raise MFMError(*reply.content["error"])
        if "internal" in reply.content:
            raise RuntimeError(reply.content["internal"])
        return reply


def warm() -> None:
    """Start a child that imports its libraries in the background."""
    _give_back(_take())


def end_all() -> None:
    """Kill all children at once, including busy ones. Threads that wait for them get StoppedError."""
    with _lock:
        idle, at_work = list(_idle), _living - set(_idle)
        _idle.clear()
        for child in (*idle, *at_work):
            child.is_stopped = True
            child.process.kill()
    for child in idle:  # a busy child is ended by the thread that waits for it
        child.end()


class _Child:
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
            # Pass the search path explicitly: "python -m" would put the current folder in front of it.
            command = [sys.executable, "-c", _START, str(other.fileno()), self.folder, *sys.path]
            with stop_signals_blocked():  # a terminal signals all processes, but the parent decides when a child ends
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, pass_fds=(other.fileno(),)
                )
        with _lock:
            _living.add(self)

    @property
    def was_idle(self) -> bool:
        """True if the child exited because it was idle."""
        return self.is_ready and not self.is_stopped and self.process.returncode == 0

    def ask(self, request: dict[str, Any], seconds: float) -> Reply:
        """Return the answer to a request. Raises EOFError if the child exited, TimeoutError if it takes too long."""
        self.socket.settimeout(seconds)
        if not self.is_ready:
            receive(self.socket)  # sent when the child has imported its libraries
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
        """Log the output of the libraries: stdout, where nnU-Net writes, as warnings, and stderr at debug level."""
        for level in self.printed:
            if text := " ".join(self.take_printed(level).split()):
                log.log(level, "%s: %s", file, text)

    def take_printed(self, level: int) -> str:
        """Return and clear the output on stdout (WARNING) or stderr (DEBUG)."""
        stream = self.printed[level]
        if os.fstat(stream.fileno()).st_size == 0:
            return ""
        # The file position is shared with the child, which then continues at the beginning.
        stream.seek(0)
        text = stream.read().decode(errors="replace")
        stream.seek(0)
        stream.truncate()
        return text

    def explain(self, file: Path, error: Exception) -> BaseException:
        """Return the error for a file that ended the child."""
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
                f"{file}: the system killed the process that was reading it, probably for lack of memory. Use fewer "
                "processes, free some memory, or crop the image.",
            )
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        reason = f"{name}: {last}" if last else name
        return MFMError(
            "E_READER_CRASH",
            f"{file}: the library that decodes it crashed ({reason}). The file is damaged: export it again.",
        )

    def end(self) -> None:
        """End the child and release its resources."""
        with _lock:
            _living.discard(self)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # if it is exiting by itself, keep its own exit status
        self.process.kill()
        self.process.wait()
        self.last_words = self.take_printed(logging.DEBUG)
        self.forget()
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self) -> None:
        """Close this process's file descriptors."""
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


def _give_back(child: _Child) -> None:
    with _lock:
        if not child.is_stopped:
            _idle.append(child)
            return
    child.end()  # end_all killed it after its last answer


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
    """Send a message of plain values, optionally with a file descriptor."""
    body = json.dumps(content).encode("ascii")  # escapes names that are not UTF-8
    data = _LENGTH.pack(len(body)) + body
    if descriptor is None:
        channel.sendall(data)
        return
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    sent = channel.sendmsg([data], ancillary)
    channel.sendall(data[sent:])


def receive(channel: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Receive a message, and a file descriptor if there is one. Raises EOFError at the end."""
    data, descriptors, _, _ = socket.recv_fds(channel, _CHUNK, 1)
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack(data[: _LENGTH.size])[0]:
        more = channel.recv(_CHUNK)
        if not more:
            raise EOFError("the other process ended")
        data += more
    return json.loads(data[_LENGTH.size :]), descriptors[0] if descriptors else None


def to_json(value: Any) -> Any:
    """Convert nnU-Net's properties to JSON values; :func:`from_json` restores the same types."""
    if isinstance(value, dict):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{type(value).__name__} is not plain"
    return value


def from_json(value: Any) -> Any:
    """Restore a value converted by :func:`to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: from_json(item) for key, item in content.items()}
    if kind == "tuple":
        return tuple(from_json(item) for item in content)
    dtype, shape, data = content
    array = np.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()
    return array if kind == "array" else array[()]


os.register_at_fork(after_in_child=_forget_all)
atexit.register(end_all)
