"""Preprocessed volumes and their masks, opened to read a few of their voxels. Legend: C channels, D H W voxels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from mfm_nnunet.data.masks import mask_file
from mfm_nnunet.errors import MFMError


@functools.lru_cache(maxsize=256)
def open_volume(file: str) -> Any:
    """A ``.b2nd`` file, of which slices are read when they are asked for. Raises MFMError (E_SHORT_DATA)."""
    return _open(file)


def volume_shape(file: Path) -> tuple[int, ...]:
    """The shape (C, D, H, W) of a volume; only its header is read. Raises MFMError (E_SHORT_DATA)."""
    return tuple(_open(str(file)).shape)


@functools.lru_cache(maxsize=256)
def anonymised_of(volume: str) -> Any:
    """The mask of anonymised voxels (1, D, H, W) of the volume in a file; None without one."""
    file = mask_file(Path(volume).parent, "anonymised", Path(volume).stem)
    return _open(str(file)) if file.exists() else None


@functools.lru_cache(maxsize=256)
def anatomy_of(volume: str) -> np.ndarray:
    """Voxels (n, 3) of the anatomy mask of the volume in a file; n is 0 without one."""
    file = mask_file(Path(volume).parent, "anatomy", Path(volume).stem)
    if not file.exists():
        return np.zeros((0, 3), np.int32)
    try:
        points = np.load(file, allow_pickle=False)
        if not isinstance(points, np.ndarray) or points.dtype.kind != "i" or points.ndim != 2 or points.shape[1] != 3:
            raise ValueError("it holds no list of voxels")
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(str(file), error) from error
    return points


def read_box(volume: Any, lower: Sequence[int], size: Sequence[int], leading: tuple[int, ...] = ()) -> np.ndarray:
    """The box of ``size`` voxels at ``lower`` (which may lie outside) of all channels, 0 outside the image.

    Raises MFMError (E_SHORT_DATA) for a file that is damaged there.
    """
    shape = volume.shape[1 + len(leading) :]
    inside = [(max(start, 0), min(start + extent, limit)) for start, extent, limit in zip(lower, size, shape)]
    box = np.zeros((volume.shape[0], *size), np.float32)
    if all(start < stop for start, stop in inside):
        target = tuple(slice(start - low, stop - low) for (start, stop), low in zip(inside, lower))
        source = (slice(None), *leading, *(slice(start, stop) for start, stop in inside))
        box[(slice(None), *target)] = _voxels(volume, source)
    return box


def _voxels(volume: Any, where: tuple[Any, ...]) -> np.ndarray:
    try:
        return volume[where]
    except (RuntimeError, OSError, ValueError) as error:
        raise unreadable(str(volume.schunk.urlpath), error) from error


def _open(file: str) -> Any:
    try:
        return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    except (RuntimeError, OSError, ValueError) as error:
        raise unreadable(file, error) from error


PREPROCESS_AGAIN = "run mfm_plan_and_preprocess again; it makes only what is missing."


def unreadable(file: str, error: Exception, repair: str = PREPROCESS_AGAIN) -> MFMError:
    """The error (E_SHORT_DATA) for a preprocessed file that raised ``error`` when it was read."""
    return MFMError("E_SHORT_DATA", f"{file}: the preprocessed file cannot be read ({error}). Delete it and {repair}")
