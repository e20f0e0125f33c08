"""DataLoader workers that ignore signals (the parent handles them) and re-raise our exceptions unchanged."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mfm_nnunet.errors import MFMError
from mfm_nnunet.signals import stop_signals_ignored

_open: weakref.WeakSet[Generator] = weakref.WeakSet()
"""Streams of batches that may have workers."""


def read_in_order(
    source: Dataset, num_workers: int, pin_memory: bool, collate: Callable[[Any], Any], **how: Any
) -> Iterator[Any]:
    """Load the batches of ``source`` in the order of its sampler.

    ``how`` are arguments of ``DataLoader``, including the sampler. ``pin_memory`` puts the batches into pinned memory.
    """
    loader: DataLoader = DataLoader(
        _ErrorsAsItems(source),
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_CollateUnlessError(collate),
        worker_init_fn=leave_signals_to_parent if num_workers else None,
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
        **how,
    )
    stream = _raising(iter(loader))
    _open.add(stream)
    return stream


@atexit.register
def end_workers() -> None:
    """End the workers of all streams of this process.

    At exit, multiprocessing would terminate those that are left, and torch would report them as killed.
    """
    for stream in list(_open):
        stream.close()


def leave_signals_to_parent(worker: int) -> None:
    """Make a worker ignore signals that terminals and schedulers send to all processes of a run.

    The parent first ends its step, for which it may need another batch, and saves. So a worker ignores Ctrl-C, SIGHUP
    and SIGUSR1, and any SIGTERM not sent by its parent. On systems that do not report the sender of a signal (macOS),
    any SIGTERM ends it.
    """
    stop_signals_ignored()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_request, args=(os.getppid(),), daemon=True).start()


def _end_on_request(parent: int) -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == parent or os.getppid() != parent:
            os._exit(0)


@dataclass(frozen=True)
class _ErrorsAsItems(Dataset):
    """Return errors as items: torch rebuilds a worker's exception from its text and would lose our attributes."""

    source: Dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.source[index]
        except MFMError as error:
            return error
        except MemoryError as error:
            return MemoryError(str(error))  # NumPy's cannot be sent to another process


@dataclass(frozen=True)
class _CollateUnlessError:
    """Return the first error among the items of a batch in place of the batch."""

    collate: Callable[[Any], Any]

    def __call__(self, items: Any) -> Any:
        found = [item for item in (items if isinstance(items, list) else [items]) if isinstance(item, Exception)]
        return found[0] if found else self.collate(items)


def _raising(loaded: Iterator[Any]) -> Generator[Any, None, None]:
    for batch in loaded:
        if isinstance(batch, Exception):
            raise batch
        yield batch
