"""Background readers of batches: signals are their parent's, and errors arrive as they were raised."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from mfm_nnunet.data.loading import end_workers, read_in_order
from mfm_nnunet.errors import MFMError
from tests.builders.groups import started

RUN = """
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mfm_nnunet.data.loading import read_in_order
from mfm_nnunet.signals import stop_on_signal

class Items(Dataset):
    def __getitem__(self, index):
        time.sleep(0.05)
        return torch.tensor(index)

if __name__ == "__main__":
    stream = read_in_order(Items(), 1, False, int, batch_size=None, sampler=range(10000))
    with stop_on_signal() as flag:
        next(stream)
        Path(sys.argv[1]).touch()
        until = time.monotonic() + 60
        while flag.exit_code is None and time.monotonic() < until:
            next(stream)
        time.sleep(0.5)
        numbers = [int(next(stream)) for _ in range(10)]
    print("saved after", numbers[-1] - numbers[0], "more")
    sys.exit(flag.exit_code)
"""


class Failing(Dataset):
    """Item 1 raises."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __getitem__(self, index: int) -> np.ndarray:
        if index == 1 and self.error is MFMError:
            raise MFMError("E_SHORT_DATA", "a.b2nd: the preprocessed volume cannot be read.")
        return np.zeros(1 << 58 if index == 1 else 2)  # numpy's own MemoryError


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_stop_of_the_whole_group_leaves_the_workers_reading(number: signal.Signals, tmp_path: Path) -> None:
    """As ``timeout``, systemd and Slurm send it; the parent may need batches until it has saved, and ends them then."""
    script, ready = tmp_path / "run.py", tmp_path / "ready"
    script.write_text(RUN)
    process = started(script, ready)
    until = time.monotonic() + 120
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == 128 + number
    assert "saved after 9 more" in output
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("how", [{"batch_size": None, "sampler": range(3)}, {"batch_sampler": [[0], [0, 1], [0]]}])
@pytest.mark.parametrize("error", [MFMError, MemoryError])
def test_errors_of_a_worker_arrive_as_they_were_raised(error: type[Exception], how: dict, num_workers: int) -> None:
    stream = read_in_order(Failing(error), num_workers, False, np.asarray, **how)
    next(stream)
    with pytest.raises(error) as caught:
        next(stream)
    if error is MFMError:
        assert caught.value.code == "E_SHORT_DATA"  # type: ignore[attr-defined]


class Places(Dataset):
    def __getitem__(self, index: int) -> int:
        return index


def test_workers_of_unfinished_streams_are_ended() -> None:
    """At exit too, where multiprocessing would terminate them and torch report them as killed."""
    before = set(multiprocessing.active_children())
    stream = read_in_order(Places(), 2, False, int, batch_size=None, sampler=range(9))
    assert next(stream) == 0
    assert len(set(multiprocessing.active_children()) - before) == 2
    end_workers()
    assert not set(multiprocessing.active_children()) - before
    assert list(stream) == []
