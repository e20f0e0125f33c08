"""Readers that crash, hang, exhaust memory or return wrong voxels: installed in a decoding child by tests.

The first word of a file's name chooses what happens.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.images import decode


def install() -> None:
    """Replace the search for nnU-Net's reader classes in this process, and make limits small."""
    decode.PROCESSOR_SECONDS = 1
    decode.SPARE_BYTES = 1 << 28
    find = decode.find_reader_class

    def hostile(name: str) -> Any:
        stock = find(name)

        class Reader(stock):
            def read_images(self, files: Any) -> Any:
                array, properties = super().read_images(files)
                return BEHAVIOURS.get(Path(files[0]).name.split("_")[0], lambda x: x)(array), properties

        return Reader

    decode.find_reader_class = hostile  # type: ignore[assignment]


def _abort(array: np.ndarray) -> np.ndarray:
    os.write(2, b"terminate called after throwing an instance of 'std::logic_error'\n")
    os.abort()


def _hang(array: np.ndarray) -> np.ndarray:
    while True:
        array.sum()


def _sleep(array: np.ndarray) -> np.ndarray:
    time.sleep(600)
    return array


def _kill(array: np.ndarray) -> np.ndarray:
    os.kill(os.getpid(), signal.SIGKILL)
    return array


def _fill(array: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones(1 << 30), array.ravel()])


def _shift(array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1)


def _random(array: np.ndarray) -> np.ndarray:
    return array + np.float32(1000)


def _print(array: np.ndarray) -> np.ndarray:
    os.write(1, b"a remark\n")
    os.write(2, b"a detail\n")
    return array


def _fail(array: np.ndarray) -> np.ndarray:
    raise RuntimeError("some library is not amused")


BEHAVIOURS = {
    "abort": _abort,
    "hang": _hang,
    "sleep": _sleep,
    "kill": _kill,
    "fill": _fill,
    "shift": _shift,
    "random": _random,
    "print": _print,
    "fail": _fail,
}
