"""Memory that runs out is told as that, in all the words that torch has for it."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_nnunet.cli.run import _report
from mfm_nnunet.device import out_of_memory_is_an_error
from mfm_nnunet.errors import MFMError, is_out_of_memory

TOLD = [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "DataLoader worker (pid 4711) is killed by signal: Killed. ",
]
SHARED = [
    "DataLoader worker (pid(s) 4711) exited unexpectedly: is killed by signal: Bus error. It is possible that "
    "dataloader's workers are out of shared memory. Please try to raise your shared memory limit.",
    "unable to write to file </torch_17_42_0>: No space left on device (28)",
]


def test_what_the_computer_cannot_give_is_recognised() -> None:
    for ask in (lambda: torch.empty(1 << 58, dtype=torch.uint8), lambda: np.empty(1 << 58, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert is_out_of_memory(caught.value)


@pytest.mark.parametrize("message", [*TOLD, *SHARED])
def test_memory_ends_with_e_oom_and_what_helps(
    message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = "shm-size" if message in SHARED else "smaller batch"
    with pytest.raises(MFMError, match=advice) as caught, out_of_memory_is_an_error("Take a smaller batch."):
        raise RuntimeError(message)
    assert caught.value.code == "E_OOM"
    assert _report(RuntimeError(message), argparse.Namespace(debug=False, workspace=str(tmp_path))) == 2
    assert capsys.readouterr().err.startswith("E_OOM  ")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"), out_of_memory_is_an_error("Buy some."):
        raise RuntimeError("CUDA error: device-side assert triggered")
    assert not is_out_of_memory(ValueError("out of memory"))
