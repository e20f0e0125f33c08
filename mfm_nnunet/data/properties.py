"""The properties of a preprocessed case: nnU-Net's pickle, read without running anything that it names.

A pickle may call any function of any module. Here it can build dictionaries, lists, numbers, text and plain NumPy
arrays, which is what nnU-Net and this package write: each name in it is looked up in a list, and stands for a class of
this module and never for the object that it names.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mfm_nnunet.data.volumes import PREPROCESS_AGAIN, require_regular, unreadable, unsafe

PLAIN = (type(None), bool, int, float, str, bytes)


class _UnsafeError(Exception):
    """A pickle names or holds something that is not on the list."""


class _Stored:
    """A value of NumPy as its pickle describes it: the arguments of a call, and a state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> Any:
        """Return what is described."""
        raise NotImplementedError


class _StoredDtype(_Stored):
    def value(self) -> np.dtype:
        """Return the type, a number's; NumPy itself would take its fields and flags from the file."""
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
    "numpy.ndarray": None,  # an argument of _reconstruct, which makes nothing else here
    "numpy.core.multiarray._reconstruct": _StoredArray,
    "numpy.core.multiarray.scalar": _StoredScalar,
    "numpy.core.numeric._frombuffer": _StoredBuffer,
    "collections.OrderedDict": dict,
}
"""What a pickle may name (``numpy._core`` counts as ``numpy.core``), and what stands for it."""


class _PlainUnpickler(pickle._Unpickler):  # in Python: the one in C reserves as much memory as the file says
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
        """Read only as much as there is."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


def read_properties(file: Path, repair: str = PREPROCESS_AGAIN) -> dict[Any, Any]:
    """Return the properties of a case from its ``.pkl`` file.

    Raises MFMError: E_SHORT_DATA for a damaged file, E_DATA_UNSAFE for one that names or holds anything but plain
    values and arrays of numbers.
    """
    try:
        require_regular(file)
        properties = _plain(_PlainUnpickler(io.BytesIO(file.read_bytes())).load(), {})
    except _UnsafeError as error:
        raise unsafe(str(file), str(error), repair) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise unreadable(str(file), error, repair) from error
    if not isinstance(properties, dict):
        raise unreadable(str(file), f"it holds no properties but a {type(properties).__name__}", repair)
    return properties


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Return a value with NumPy's own in place of those stored; ``done`` holds those made so far by identity."""
    if type(value) in PLAIN:
        return value
    if id(value) in done:  # else a few nested lists could stand for billions
        return done[id(value)]
    if isinstance(value, _Stored) and not isinstance(value, _StoredDtype):
        made: Any = value.value()
    elif type(value) is list:
        made = done[id(value)] = []
        made.extend(_plain(item, done) for item in value)
    elif type(value) is dict:
        made = done[id(value)] = {}
        made.update((_plain(key, done), _plain(item, done)) for key, item in value.items())
    elif type(value) in (tuple, set, frozenset):
        made = type(value)(_plain(item, done) for item in value)
    else:
        raise _UnsafeError(f"holds a {ascii(type(value).__name__)[:80]}")
    done[id(value)] = made
    return made
