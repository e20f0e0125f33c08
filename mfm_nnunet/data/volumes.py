"""Preprocessed volumes and their masks, opened to read a few of their voxels. Legend: C channels, D H W voxels.

A file cannot run code, start a program or open a connection. So ``blosc2.open`` is not used: it follows what the file's
metalayers name (expressions, functions, files, servers). Only built-in compressors are accepted: for any other, blosc2
starts a Python that imports a module of the compressor's name, even from the current folder.

A mask marks voxels that were altered to prevent identification: 1 there, 0 elsewhere and outside the image. It is
cropped, transposed and resampled with its image and never used for normalisation. It is stored beside the folder of the
preprocessed volumes, where no search for volumes finds it: ``<folder>_anonymised/{case}.b2nd``, uint8 (1, D, H, W). A
case without a mask has no such file.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import stat
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import blosc2
import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside

COMPRESSORS = range(5)
"""Numbers of the compressed formats built into blosc2."""
FILTERS = {*range(6), *range(32, 37)}
"""Numbers of the filters built into blosc2."""
HEADER_BYTES = 32
"""Length of the header of a compressed chunk."""
PREPROCESS_AGAIN = "run mfm_plan_and_preprocess again; it makes only what is missing."


def mask_file(folder: Path, case: str) -> Path:
    """Return the path of a case's mask; ``folder`` is the folder of its volume."""
    return inside(folder.with_name(f"{folder.name}_anonymised"), f"{case}.b2nd")


def masked_cases(folder: Path) -> set[str]:
    """Return the names of the cases in the data folder ``folder`` that have a mask."""
    return {file.stem for file in mask_file(folder, "x").parent.glob("*.b2nd")}


class Volume(blosc2.NDArray):
    """An array in a file checked by :func:`open_array`; slices are decompressed on access."""

    repair: str
    """Advice at the end of messages: how to create the file again."""

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return the voxels at ``key``."""
        try:
            for number in self._chunks_of(key):
                _require_built_in(self.schunk.get_lazychunk(int(number)), str(self.schunk.urlpath), self.repair)
            return super().__getitem__(key)
        except MFMError:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            raise unreadable(str(self.schunk.urlpath), error, self.repair) from error

    def _chunks_of(self, key: Any) -> Iterable[int]:
        """Return the numbers of the chunks that hold the voxels at ``key``; all chunks if it is not a simple box."""
        parts = key if isinstance(key, tuple) else (key,)
        is_box = all(isinstance(part, int) or (isinstance(part, slice) and part.step in (None, 1)) for part in parts)
        return blosc2.get_slice_nchunks(self, key) if is_box else range(self.schunk.nchunks)


@functools.lru_cache(maxsize=256)
def open_volume(file: str) -> Volume:
    """Open a ``.b2nd`` file (C, D, H, W), whose slices are read on access."""
    volume = open_array(file)
    if volume.ndim != 4:
        raise unreadable(file, f"it has {volume.ndim} axes instead of 4")
    return volume


def volume_shape(file: Path) -> tuple[int, ...]:
    """Return the shape (C, D, H, W) of a volume, reading only its header."""
    return tuple(open_volume.__wrapped__(str(file)).shape)


@functools.lru_cache(maxsize=256)
def anonymised_of(volume: str) -> Volume | None:
    """Open the mask of anonymised voxels (1, D, H, W) of a volume; None if it has none."""
    file = mask_file(Path(volume).parent, Path(volume).stem)
    return open_volume.__wrapped__(str(file)) if file.exists() else None


def read_box(
    volume: Any,
    lower: Sequence[int],
    size: Sequence[int],
    leading: tuple[int, ...] = (),
    fill: int = 0,
    dtype: Any = np.float32,
) -> np.ndarray:
    """Read a box of all channels, ``fill`` outside the image; ``lower`` may lie outside."""
    num_others = len(volume.shape) - len(size)
    shape = volume.shape[num_others:]
    channels = volume.shape[: num_others - len(leading)]
    inside = [(max(start, 0), min(start + extent, limit)) for start, extent, limit in zip(lower, size, shape)]
    source = (*(slice(None) for _ in channels), *leading, *(slice(int(start), int(stop)) for start, stop in inside))
    if all(stop - start == extent for (start, stop), extent in zip(inside, size)):
        return np.asarray(volume[source], dtype)
    box = np.full((*channels, *size), fill, dtype)
    if all(start < stop for start, stop in inside):
        target: Any = (..., *(slice(start - low, stop - low) for (start, stop), low in zip(inside, lower)))
        box[target] = volume[source]
    return box


def open_array(file: str, repair: str = PREPROCESS_AGAIN) -> Volume:
    """Open a ``.b2nd`` file that holds a plain array of numbers, and nothing that blosc2 would follow or call."""
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
    if dtype.hasobject:  # an object array would hold pointers chosen by the file
        raise unsafe(file, f"is no array of numbers ({', '.join(map(ascii, sorted(kinds)[:3]))})", repair)
    if dtype.kind not in "biuf" or not dtype.isnative or dtype.itemsize != volume.schunk.typesize:
        raise unreadable(file, f"its voxels are no numbers but {dtype}", repair)
    volume.__class__ = Volume
    volume.repair = repair
    return volume


def require_plain_file(file: str | Path) -> None:
    """Raise OSError for anything but a regular file: reading a pipe would block for ever."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("it is not a regular file")


def _index_header(file: str) -> bytes:
    """Return the header of the compressed chunk index, which blosc2 decompresses when it opens the file."""
    require_plain_file(file)
    with open(file, "rb") as stream:
        start = stream.read(47)
        if not start.startswith(b"\x9e\xa8b2frame\0"):
            raise ValueError("it is not a file of blosc2")
        stream.seek(int.from_bytes(start[11:15], "big") + int.from_bytes(start[39:47], "big"))
        return stream.read(HEADER_BYTES)


def _require_built_in(header: bytes, file: str, repair: str) -> None:
    """Refuse a chunk that needs a compressor or filter not built into blosc2."""
    if len(header) < HEADER_BYTES:
        raise ValueError("a chunk is cut off")
    is_extended = header[2] & 0b101 == 0b101
    if header[2] >> 5 not in COMPRESSORS or (is_extended and not FILTERS.issuperset(header[16:22])):
        raise unsafe(file, "needs a compressor that is not part of blosc2, for which it would start a program", repair)


def read_arrays(file: Path, repair: str = PREPROCESS_AGAIN) -> dict[str, np.ndarray]:
    """Return the arrays of a ``.npz`` file by name; the array of a ``.npy`` file, memory-mapped, as ""."""
    try:
        require_plain_file(file)
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
    """Return the error (E_SHORT_DATA) for a preprocessed file whose reading raised ``error``."""
    return MFMError("E_SHORT_DATA", f"{file}: the preprocessed file cannot be read ({error}). Delete it and {repair}")


def unsafe(file: str, reason: str, repair: str = PREPROCESS_AGAIN) -> MFMError:
    """Return the error (E_DATA_UNSAFE) for a preprocessed file that could run code if loaded normally."""
    return MFMError(
        "E_DATA_UNSAFE",
        f"{file}: the preprocessed file {reason}, so it could run code. It was refused and nothing was run. Neither "
        f"nnU-Net nor mfm_nnunet writes such files: find out who did. Then delete it and {repair}",
    )


PLAIN = (type(None), bool, int, float, str, bytes)


class _UnsafeError(Exception):
    """Raised for a pickle that names or holds a type not on the list."""


class _Stored:
    """A NumPy value as described in its pickle: arguments of a call, and a state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> Any:
        """Build the described value."""
        raise NotImplementedError


class _StoredDtype(_Stored):
    def value(self) -> np.dtype:
        """Return the numeric type; NumPy itself would take its fields and flags from the file."""
        _, order, *rest = self.state[:5]
        if any(part is not None for part in rest) or not re.fullmatch("[biufc][0-9]{1,2}", self.arguments[0]):
            raise _UnsafeError(f"holds arrays of {ascii(self.arguments[0])[:80]}")
        return np.dtype(order + self.arguments[0])


class _StoredArray(_Stored):
    """``numpy._core.multiarray._reconstruct``, with the array in the state."""

    def value(self) -> np.ndarray:
        _, shape, dtype, is_fortran, content = self.state
        return _array(content, dtype, shape, "F" if is_fortran else "C")


class _StoredBuffer(_Stored):
    """``numpy._core.numeric._frombuffer``, the form of an array since protocol 5."""

    def value(self) -> np.ndarray:
        content, dtype, shape, order = self.arguments
        return _array(content, dtype, shape, order)


class _StoredScalar(_Stored):
    def value(self) -> Any:
        dtype, content = self.arguments
        return _array(content, dtype, (), "C")[()]


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.ndarray(shape, dtype.value(), content, order=order).copy(order)


_NAMES: dict[str, Any] = {
    "numpy.dtype": _StoredDtype,
    "numpy.ndarray": None,  # only an argument of _reconstruct
    "numpy.core.multiarray._reconstruct": _StoredArray,
    "numpy.core.multiarray.scalar": _StoredScalar,
    "numpy.core.numeric._frombuffer": _StoredBuffer,
    "collections.OrderedDict": dict,
}
"""Names allowed in a pickle (``numpy._core`` counts as ``numpy.core``), and their stand-ins."""


class _PlainUnpickler(pickle._Unpickler):  # the C version allocates as much memory as the file claims
    read: Any
    append: Any

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)
        if full_name not in _NAMES:
            raise _UnsafeError(f"names {ascii(full_name)[:80]}")
        return _NAMES[full_name]

    def persistent_load(self, pid: Any) -> Any:
        raise _UnsafeError("names an object outside of it")

    def load_bytearray8(self) -> None:
        """Read without allocating the claimed size."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


def read_properties(file: Path, repair: str = PREPROCESS_AGAIN) -> dict[Any, Any]:
    """Return the properties of a case from its ``.pkl`` file."""
    try:
        require_plain_file(file)
        properties = _unpack(_PlainUnpickler(io.BytesIO(file.read_bytes())).load(), {})
    except _UnsafeError as error:
        raise unsafe(str(file), str(error), repair) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise unreadable(str(file), error, repair) from error
    if not isinstance(properties, dict):
        raise unreadable(str(file), f"it holds no properties but a {type(properties).__name__}", repair)
    return properties


def _unpack(value: Any, done: dict[int, Any]) -> Any:
    """Replace stored values by NumPy's own, recursively; ``done`` holds those made so far by identity."""
    if type(value) in PLAIN:
        return value
    if id(value) in done:  # otherwise a few nested lists could stand for billions
        return done[id(value)]
    if isinstance(value, _Stored) and not isinstance(value, _StoredDtype):
        made: Any = value.value()
    elif type(value) is list:
        made = done[id(value)] = []
        made.extend(_unpack(item, done) for item in value)
    elif type(value) is dict:
        made = done[id(value)] = {}
        made.update((_unpack(key, done), _unpack(item, done)) for key, item in value.items())
    elif type(value) in (tuple, set, frozenset):
        made = type(value)(_unpack(item, done) for item in value)
    else:
        raise _UnsafeError(f"holds a {ascii(type(value).__name__)[:80]}")
    done[id(value)] = made
    return made
