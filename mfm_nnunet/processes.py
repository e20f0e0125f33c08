"""Multi-process runs: one process per GPU, and errors of child processes re-raised in the parent.

torch is imported where it is used.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_nnunet import terminal
from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.signals import (
    raise_on_signal,
    signal_handlers_kept,
    start_resource_tracker,
)

if TYPE_CHECKING:
    import torch

SECONDS_TO_SAVE = 600
"""Time that stopped child processes get, e.g. to end a probe and to save, before they are killed."""


# Several GPUs


@dataclass(frozen=True)
class World:
    """Rank of this process among ``size`` processes."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0


ALONE = World()


def join_world(device: torch.device) -> World:
    """Join the process group that torchrun announced in the environment, if any."""
    import torch.distributed as dist

    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def leave_world(world: World) -> None:
    """Leave the process group; a module wrapped for it must be released before."""
    import torch.distributed as dist

    if world.size > 1 and dist.is_initialized():
        # A wrapper in a reference cycle would keep the group's threads alive at exit, and the interpreter would abort.
        gc.collect()
        dist.destroy_process_group()


def mean(value: torch.Tensor, world: World) -> torch.Tensor:
    """Return the mean of ``value`` over all processes."""
    import torch.distributed as dist

    if world.size == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world.size


def gather(values: torch.Tensor, world: World) -> torch.Tensor:
    """Concatenate the values of all processes along the first axis; all have the same shape."""
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def largest(value: int, world: World, device: torch.device) -> int:
    """Return the largest ``value`` of all processes."""
    import torch
    import torch.distributed as dist

    if world.size == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def any_true(flag: bool, world: World, device: torch.device) -> bool:
    """Return whether ``flag`` is true in any process, so that all processes decide alike."""
    return bool(largest(int(flag), world, device))


# Children


def call_recorded(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` in a child process, and record errors for the user in ``folder``."""
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
            raise SystemExit(error.exit_code) from error  # exit without a traceback
        raise


def run_processes(function: Callable[..., Any], arguments: tuple[Any, ...], number: int) -> None:
    """Call ``function(*arguments)`` in ``number`` processes connected by :func:`join_world`, and wait for them.

    Raises the error that a process recorded. An interruption, such as a signal, is passed on to the processes, which
    get ``SECONDS_TO_SAVE`` to save. A second signal kills them.
    """
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    start_resource_tracker()
    with tempfile.TemporaryDirectory() as folder, raise_on_signal(), signal_handlers_kept(), no_child_left():
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = start_processes(_run_child, (number, port, folder, function, arguments), number, join=False)
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


def _run_child(
    rank: int, number: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Set torchrun's variables and call the function; stdout is redirected to stderr."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with contextlib.redirect_stdout(sys.stderr):
        call_recorded(folder, function, *arguments)


@contextlib.contextmanager
def no_child_left() -> Iterator[None]:
    """At exit, kill remaining ``multiprocessing`` children of this block, e.g. after a second signal."""
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()
                process.join()


def _end(processes: Iterable[BaseProcess], number: int) -> None:
    until = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, number)
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def raise_recorded(folder: str, exit_code: int | None = None) -> None:
    """Re-raise an error that a child recorded in ``folder``, if any; errors take precedence over stops.

    ``exit_code`` belongs to the signal that ended the parent, if any: a child may have received another one first.
    """
    notes = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    for note in sorted(notes, key=lambda note: "exit_code" in note):
        if "code" in note:
            raise MFMError(note["code"], note["message"])
        if "exit_code" in note:
            raise StoppedError(exit_code or note["exit_code"], note["message"])
        raise FloatingPointError(note["message"])
