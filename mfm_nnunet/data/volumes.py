"""Preprocessed volumes and their masks, opened to read a few of their voxels. Legend: C channels, D H W voxels.

Nothing that a file says runs code, starts a program or opens a connection. So ``blosc2.open`` is not used: it follows
what the file's metalayers name (expressions, functions, files, servers). Compressors are the built-in ones: for any
other, blosc2 starts a Python that imports a module of the compressor's name, from the current folder too.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from mfm_nnunet.data.masks import mask_file
from mfm_nnunet.errors import MFMError

COMPRESSORS = range(5)
"""Formats of compressed chunks that are built into blosc2."""
FILTERS = {*range(6), *range(32, 37)}
"""Filters that are built into it."""
HEADER_BYTES = 32
"""Length of the header of a compressed chunk."""
PREPROCESS_AGAIN = "run mfm_plan_and_preprocess again; it makes only what is missing."


class Volume(blosc2.NDArray):
    """An array in a file that :func:`open_array` checked; slices are decompressed when they are asked for."""

    repair: str
    """How to make the file again."""

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return the voxels at ``key``.

        Raises MFMError: E_SHORT_DATA for a file that is damaged there, E_DATA_UNSAFE for an unknown compressor.
        """
        try:
            for number in self._chunks_of(key):
                _require_built_in(self.schunk.get_lazychunk(int(number)), str(self.schunk.urlpath), self.repair)
            return super().__getitem__(key)
        except MFMError:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            raise unreadable(str(self.schunk.urlpath), error, self.repair) from error

    def _chunks_of(self, key: Any) -> Iterable[int]:
        """Return the numbers of the chunks that hold the voxels at ``key``; of all, unless it is a simple box."""
        parts = key if isinstance(key, tuple) else (key,)
        is_box = all(isinstance(part, int) or (isinstance(part, slice) and part.step in (None, 1)) for part in parts)
        return blosc2.get_slice_nchunks(self, key) if is_box else range(self.schunk.nchunks)


@functools.lru_cache(maxsize=256)
def open_volume(file: str) -> Volume:
    """Open a ``.b2nd`` file (C, D, H, W), of which slices are read when they are asked for.

    Raises MFMError: E_SHORT_DATA, E_DATA_UNSAFE.
    """
    volume = open_array(file)
    if volume.ndim != 4:
        raise unreadable(file, f"it has {volume.ndim} axes instead of 4")
    return volume


def volume_shape(file: Path) -> tuple[int, ...]:
    """Return the shape (C, D, H, W) of a volume; only its header is read. Raises MFMError as :func:`open_volume`."""
    return tuple(open_volume.__wrapped__(str(file)).shape)


@functools.lru_cache(maxsize=256)
def anonymised_of(volume: str) -> Volume | None:
    """Return the mask of anonymised voxels (1, D, H, W) of the volume in a file; None without one."""
    file = mask_file(Path(volume).parent, "anonymised", Path(volume).stem)
    return open_volume.__wrapped__(str(file)) if file.exists() else None


@functools.lru_cache(maxsize=256)
def anatomy_of(volume: str) -> np.ndarray:
    """Return voxels (n, 3) of the anatomy mask of the volume in a file; n is 0 without one."""
    file = mask_file(Path(volume).parent, "anatomy", Path(volume).stem)
    if not file.exists():
        return np.zeros((0, 3), np.int32)
    points = np.array(read_arrays(file)[""])
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "iu":
        raise unreadable(str(file), f"it holds no voxels but {points.dtype} {points.shape}")
    if len(points) and (points.min() < 0 or (points.max(axis=0) >= open_volume(volume).shape[1:]).any()):
        raise unreadable(str(file), "its voxels lie outside of the image")
    return points


def read_box(volume: Any, lower: Sequence[int], size: Sequence[int], leading: tuple[int, ...] = ()) -> np.ndarray:
    """The box of ``size`` voxels at ``lower`` (which may lie outside) of all channels, 0 outside the image.

    Raises MFMError (E_SHORT_DATA, E_DATA_UNSAFE) as :meth:`Volume.__getitem__`.
    """
    shape = volume.shape[1 + len(leading) :]
    inside = [(max(start, 0), min(start + extent, limit)) for start, extent, limit in zip(lower, size, shape)]
    box = np.zeros((volume.shape[0], *size), np.float32)
    if all(start < stop for start, stop in inside):
        target = tuple(slice(start - low, stop - low) for (start, stop), low in zip(inside, lower))
        source = (slice(None), *leading, *(slice(start, stop) for start, stop in inside))
        box[(slice(None), *target)] = volume[source]
    return box


def open_array(file: str, repair: str = PREPROCESS_AGAIN) -> Volume:
    """Open a ``.b2nd`` file that holds a plain array of numbers, and nothing that blosc2 would follow or call.

    Raises MFMError: E_SHORT_DATA for a damaged file, E_DATA_UNSAFE for any other content.
    """
    options: dict[str, Any] = {} if os.name == "nt" else {"mmap_mode": "r"}
    try:
        _require_built_in(_index_header(file), file, repair)
        # Follows no metalayer, unlike blosc2.open.
        volume = blosc2.blosc2_ext.open(file, "r", 0, dparams={"nthreads": 1}, **options)
        kinds = set(getattr(volume, "schunk", volume).meta.keys())
        dtype = np.dtype(volume.dtype) if kinds == {"b2nd"} else np.dtype(object)
    except (MFMError, MemoryError):
        raise
    except Exception as error:  # damaged files raise anything
        raise unreadable(file, error, repair) from error
    if dtype.hasobject:  # voxels that are objects would be addresses of the file's choice
        raise unsafe(file, f"is no array of numbers ({', '.join(map(ascii, sorted(kinds)[:3]))})", repair)
    if dtype.kind not in "biuf" or not dtype.isnative or dtype.itemsize != volume.schunk.typesize:
        raise unreadable(file, f"its voxels are no numbers but {dtype}", repair)
    volume.__class__ = Volume
    volume.repair = repair
    return volume


def require_regular(file: str | Path) -> None:
    """Raise OSError for anything but a file: reading a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("it is not a regular file")


def _index_header(file: str) -> bytes:
    """Return the header of the compressed list of chunks, which blosc2 decompresses when it opens the file."""
    require_regular(file)
    with open(file, "rb") as stream:
        start = stream.read(47)
        if not start.startswith(b"\x9e\xa8b2frame\0"):
            raise ValueError("it is not a file of blosc2")
        stream.seek(int.from_bytes(start[11:15], "big") + int.from_bytes(start[39:47], "big"))
        return stream.read(HEADER_BYTES)


def _require_built_in(header: bytes, file: str, repair: str) -> None:
    """Raise MFMError (E_DATA_UNSAFE) when a chunk needs a compressor or filter from elsewhere."""
    if len(header) < HEADER_BYTES:
        raise ValueError("a chunk is cut off")
    is_extended = header[2] & 0b101 == 0b101
    if header[2] >> 5 not in COMPRESSORS or (is_extended and not FILTERS.issuperset(header[16:22])):
        raise unsafe(file, "needs a compressor that is not part of blosc2, for which it would start a program", repair)


def read_arrays(file: Path, repair: str = PREPROCESS_AGAIN) -> dict[str, np.ndarray]:
    """Return the arrays in a ``.npz`` file by name; of a ``.npy`` file the one in it, mapped, as "".

    Raises MFMError: E_SHORT_DATA for a damaged file, E_DATA_UNSAFE for arrays of objects, which are pickles.
    """
    try:
        require_regular(file)
        content = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray) != (file.suffix == ".npy"):
            raise ValueError(f"it is not what its ending {file.suffix} says")
        if isinstance(content, np.ndarray):
            return {"": content}
        with content:
            return {name: content[name] for name in content}
    except MemoryError:
        raise
    except Exception as error:  # damaged archives raise anything
        if str(error).startswith(("Object arrays", "Array can't be memory-mapped: Python objects")):
            raise unsafe(str(file), "holds Python objects", repair) from error
        raise unreadable(str(file), error, repair) from error


def unreadable(file: str, error: Exception | str, repair: str = PREPROCESS_AGAIN) -> MFMError:
    """Return the error (E_SHORT_DATA) for a preprocessed file that raised ``error`` when it was read."""
    return MFMError("E_SHORT_DATA", f"{file}: the preprocessed file cannot be read ({error}). Delete it and {repair}")


def unsafe(file: str, reason: str, repair: str = PREPROCESS_AGAIN) -> MFMError:
    """Return the error (E_DATA_UNSAFE) for a preprocessed file that could run code, had it been followed."""
    return MFMError(
        "E_DATA_UNSAFE",
        f"{file}: the preprocessed file {reason}, so it could run code. It was refused and nothing was run. Neither "
        f"nnU-Net nor mfm_nnunet writes such files: find out who did. Then delete it and {repair}",
    )
