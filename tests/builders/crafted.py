"""Preprocessed files that would run code if they were followed: pickles, blosc2 files, arrays of objects.

What would run makes the folder ``mark``.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

SHAPE = (1, 40, 24, 30)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def pickles(mark: Path) -> dict[str, bytes]:
    """Pickles by name, each of which makes the folder, or would build an object that is not on the list."""
    path = str(mark).encode()
    text = b"X" + len(path).to_bytes(4, "little") + path
    good = {"spacing": [1.0, 1.0, 1.0], "class_locations": {1: np.zeros((2, 4), np.int64)}}
    found = {f"protocol {n}": pickle.dumps({**good, "more": Payload(mark)}, n) for n in range(pickle.HIGHEST_PROTOCOL)}
    found["as a key"] = pickle.dumps({(1, Payload(mark)): 1})
    found["in an array"] = pickle.dumps({**good, "class_locations": {1: np.array([Payload(mark)], object)}})
    found["instance"] = b"(V" + path + b"\nios\nmkdir\n."
    found["object"] = b"(cos\nmkdir\n" + text + b"o."
    found["new object"] = b"\x80\x02cos\nmkdir\n" + text + b"\x85\x81."
    found["name on the stack"] = b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R."
    found["dotted name"] = b"\x80\x04\x8c\x05numpy\x8c\x13dtype.__class__.mro\x93" + text + b"\x85R."
    found["loader of NumPy"] = b"cnumpy\nload\n" + text + b"\x85R."
    found["state of a function"] = b"cbuiltins\nprint\n}b."
    found["object elsewhere"] = b"Vname\nQ."
    # NumPy would take the place of fields and the flags of elements from the file.
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I00\nI01\ntR(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI63\ntb"
    scalar = b"cnumpy.core.multiarray\nscalar\n(" + dtype + b"C\x0812345678tR."
    found["scalar that is an address"] = b"\x80\x02" + scalar
    return found


def volumes(mark: Path, modules: Path) -> dict[str, Callable[[Path], None]]:
    """Writers of ``.b2nd`` files by name; ``modules`` gets what a compressor's name would import from there."""
    source = f"def f(inputs, output, offset=open({str(mark)!r}, 'w')):\n    output[:] = 1\n"
    udf = {
        "kind": "lazyudf",
        "version": 1,
        "function_kind": "dsl",
        "dsl_version": 1,
        "name": "f",
        "udf_source": source,
        "dtype": "<f4",
        "shape": list(SHAPE),
        "operands": {},
        "kwargs": {},
    }
    lazy = {"UDF": source, "operands": {}, "name": "f", "dtype": "<f4", "shape": list(SHAPE), "chunks": list(SHAPE)}
    server = {"urlbase": "http://127.0.0.1:9/", "path": "a.b2nd"}
    reference = {"kind": "c2array", "version": 1, **server}
    proxy = {"local_abspath": None, "urlpath": ["a.b2nd", "http://127.0.0.1:9/", None], "caterva2_env": False}

    def by_grok(file: Path, at_index: bool) -> None:
        modules.mkdir(exist_ok=True)
        (modules / "blosc2_grok.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
        file.write_bytes(_compressed_by_grok(at_index))

    return {
        "a function": lambda file: _carrier(file, {"b2o": {"kind": "lazyudf", "version": 1}}, {"b2o": udf}),
        "a function of older versions": lambda file: _carrier(file, {"LazyArray": 1}, {"_LazyArray": lazy}),
        "an expression": lambda file: _carrier(
            file, {"LazyArray": 0}, {"_LazyArray": {"expression": "a + 1", "operands": {"a": server}}}
        ),
        "an array of a server": lambda file: _carrier(
            file, {"b2o": {"kind": "c2array", "version": 1}}, {"b2o": reference}
        ),
        "a proxy": lambda file: _carrier(file, {"proxy-source": proxy}, {}),
        "a remote store": lambda file: _carrier(file, {"b2remote_store": {}}, {}),
        "a folder of stores": lambda file: _carrier(file, {"b2dict": {}}, {}),
        "pickled objects": _objects,
        "no array": _no_array,
        "a compressor for the chunks": lambda file: by_grok(file, at_index=False),
        "a compressor for the list of chunks": lambda file: by_grok(file, at_index=True),
    }


def object_arrays(mark: Path, folder: Path, stem: str, names: tuple[str, ...]) -> tuple[Path, Path]:
    """Write ``.npy`` and ``.npz`` files with arrays of objects."""
    objects = np.array([Payload(mark)], object)
    np.save(folder / f"{stem}.npy", objects, allow_pickle=True)
    np.savez(folder / f"{stem}.npz", **dict.fromkeys(names, objects))
    return folder / f"{stem}.npy", folder / f"{stem}.npz"


def _no_array(file: Path) -> None:
    file.write_bytes(blosc2.SChunk(chunksize=64, data=bytes(640)).to_cframe())


def _carrier(file: Path, meta: dict[str, Any], more: dict[str, Any]) -> None:
    file.unlink(missing_ok=True)
    array = blosc2.zeros(SHAPE, dtype=np.float32, meta=meta, urlpath=str(file), mode="w")
    for name, value in more.items():
        array.schunk.vlmeta[name] = value


def _objects(file: Path) -> None:
    """Numbers whose type is changed to objects: blosc2 would take them for addresses."""
    content = blosc2.asarray(np.arange(np.prod(SHAPE), dtype=np.int64).reshape(SHAPE)).to_cframe()
    assert content.count(b"<i8") == 1
    file.write_bytes(content.replace(b"<i8", b"|O8"))


def _compressed_by_grok(at_index: bool) -> bytes:
    """A file whose first chunk, or list of chunks, names a compressor that blosc2 looks for with a new Python."""
    voxels = np.random.default_rng(0).integers(0, 50, SHAPE).astype(np.float32)
    settings = {"codec": blosc2.Codec.LZ4HC, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}
    array = blosc2.asarray(voxels, chunks=(1, 2, 8, 8), blocks=(1, 2, 8, 8), cparams=settings)
    content = bytearray(array.to_cframe())
    place = int.from_bytes(content[11:15], "big") + at_index * int.from_bytes(content[39:47], "big")
    content[place + 2] = (content[place + 2] & 0x1F) | (6 << 5)
    content[place + 22] = blosc2.Codec.GROK.value
    return bytes(content)
