"""The pages that a TIFF file declares, read without decoding and with a bound.

tifffile follows a chain of pages as long as it leads somewhere, also in a circle, fills what is missing with zeros and
only logs it. Here the chain is walked first. Format: TIFF 6.0, and BigTIFF (https://www.awaresystems.be/imaging/tiff).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from mfm_nnunet.images.headers import refuse

_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
"""Types of a tag's values that are whole numbers."""
_TILED, _STRIPED = (324, 325), (273, 279)
"""Tags of the places and of the lengths of the parts of a page."""
_REAL = {1: "unsigned", 2: "signed", 3: "floating point"}
MAX_TAGS = 4096


@dataclass(frozen=True)
class Page:
    """One page: the size of its picture, the kind of its values, how they are stored, and where."""

    offset: int
    shape: tuple[int, int, int]
    """Depth, height, width; the depth is 1 but in files of very few programs."""
    samples: int
    bits: int
    sample_format: int
    storage: tuple[int, ...]
    """Compression, predictor, planar configuration, and the shape of a tile or strip."""
    is_planar: bool
    places: np.ndarray
    """Where the parts are (n, 2): first byte and number of bytes."""
    num_parts: int

    @property
    def layout(self) -> tuple[object, ...]:
        """Return what pages of one volume have in common."""
        return (self.shape, self.samples, self.bits, self.sample_format, self.is_planar)

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of the decoded page."""
        return math.prod(self.shape) * self.samples * max(-(-self.bits // 8), 1)


def read_pages(path: Path) -> list[Page]:
    """Return the pages that a TIFF file declares, in their order.

    Raises MFMError: E_FORMAT (no TIFF file, pages in a circle or on top of each other), E_SHORT_DATA (a page is not
    there), E_HEADER (a page without size).
    """
    with open(path, "rb") as file:
        reader = _Reader(path, file)
        offset, seen = reader.first, set()
        pages: list[Page] = []
        while offset:
            if offset in seen:
                raise refuse("E_FORMAT", path, f"page {len(pages)} leads back to an earlier one", "Export it again.")
            seen.add(offset)
            tags, following = reader.read_tags(offset, len(pages))
            pages.append(_page(path, offset, tags, reader))
            offset = following
    if not pages:
        raise refuse("E_SHORT_DATA", path, "holds no page", "Copy the file again.")
    return pages


def require_parts(path: Path, pages: list[Page]) -> None:
    """Refuse pages whose parts are not all there (E_SHORT_DATA), or hold anything but real numbers (E_DATATYPE)."""
    size = os.stat(path).st_size
    for number, page in enumerate(pages):
        if page.sample_format not in _REAL:
            raise refuse("E_DATATYPE", path, f"page {number} holds no real numbers (SampleFormat {page.sample_format})")
        if not page.is_planar and page.samples not in (1, 3, 4):
            raise refuse(
                "E_DATATYPE", path, f"a pixel has {page.samples} values; grey pictures have 1, colours 3 or 4",
                "Save it without the alpha channel, or one file for each channel.",
            )  # fmt: skip
        offsets, lengths = page.places[:, 0], page.places[:, 1]
        is_there = (offsets > 0) & (lengths > 0) & (offsets <= size) & (lengths <= size) & (offsets + lengths <= size)
        num_there = int(np.count_nonzero(is_there[: page.num_parts]))
        is_raw = page.storage[0] == 1
        stored = math.prod(page.shape) * page.samples * page.bits // 8
        if num_there < page.num_parts or (is_raw and int(lengths[is_there].sum()) < stored):
            raise refuse(
                "E_SHORT_DATA", path, f"page {number} lacks some of its {page.num_parts} strips or tiles",
                "Copy the file again.",
            )  # fmt: skip


def _page(path: Path, offset: int, tags: dict[int, np.ndarray], reader: _Reader) -> Page:
    def number(tag: int, default: int = 1) -> int:
        values = tags.get(tag)
        return int(values[0]) if values is not None and len(values) else default

    shape = (number(32997), number(257, 0), number(256, 0))
    if min(shape) <= 0:
        raise refuse("E_HEADER", path, f"a page has the size {' x '.join(map(str, shape))}")
    samples, planar = max(number(277), 1), number(284)
    is_tiled = 322 in tags and 323 in tags
    part = (
        (number(32998), number(323), number(322)) if is_tiled else (1, min(number(278, shape[1]), shape[1]), shape[2])
    )
    if min(part) <= 0:
        raise refuse("E_HEADER", path, f"a page is cut into parts of {' x '.join(map(str, part))}")
    num_parts = math.prod(-(-n // m) for n, m in zip(shape, part)) * (samples if planar == 2 else 1)
    places = _TILED if is_tiled and _TILED[0] in tags else _STRIPED
    starts, lengths = (tags.get(tag, np.zeros(0, np.uint64)) for tag in places)
    bits = max((int(value) for value in tags.get(258, ())), default=1)
    if not len(lengths) and len(starts) == 1:  # old programs leave the length of a single strip out
        lengths = np.array([min(math.prod(shape) * samples * bits // 8, reader.size)], np.uint64)
    count = min(len(starts), len(lengths))
    return Page(
        offset,
        shape,
        samples,
        bits,
        max((int(value) for value in tags.get(339, ())), default=1),
        (number(259), number(317), planar, *part),
        planar == 2 and samples > 1,
        np.stack([starts[:count], lengths[:count]], axis=1).astype(np.uint64),
        num_parts,
    )


_USED = {256, 257, 258, 259, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 339, 32997, 32998}


class _Reader:
    """Reads tags, in both byte orders and both sizes of TIFF, and no byte of the file for two pages."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        start = file.read(16)
        self.order: Literal["<", ">"] = ">" if start[:2] == b"MM" else "<"
        self.is_big = len(start) == 16 and start[2:4] in (b"\0+", b"+\0")
        where, kind = (start[8:16], "Q") if self.is_big else (start[4:8], "I")
        if start[:2] not in (b"II", b"MM") or len(where) < struct.calcsize(kind):
            raise refuse("E_FORMAT", path, "does not start as a TIFF file", "Export it again.")
        self.first = int(struct.unpack(self.order + kind, where)[0])
        self.budget = 2 * self.size
        """Bytes that may still be read: tags, and once more what they point at."""

    def read_tags(self, offset: int, number: int) -> tuple[dict[int, np.ndarray], int]:
        """Return the values of the tags of a page that matter here, and where the next page is."""
        head, kind = ("Q", "Q") if self.is_big else ("H", "I")
        inline = 8 if self.is_big else 4
        count = struct.unpack(self.order + head, self._read(offset, struct.calcsize(head), number))[0]
        if not 0 < count <= MAX_TAGS:
            raise refuse("E_FORMAT", self.path, f"page {number} has {count} tags", "Copy or export it again.")
        entry = np.dtype([("tag", "u2"), ("type", "u2"), ("count", f"u{inline}"), ("value", f"V{inline}")])
        length = count * entry.itemsize + struct.calcsize(kind)
        body = self._read(offset + struct.calcsize(head), length, number)
        entries = np.frombuffer(body, entry.newbyteorder(self.order), count)
        tags: dict[int, np.ndarray] = {}
        for tag, type_, num_values, value in entries.tolist():
            if tag in _USED and type_ in _INTEGERS and tag not in tags:
                tags[tag] = self._values(_INTEGERS[type_], num_values, value, number)
        return tags, int(struct.unpack(self.order + kind, body[-struct.calcsize(kind) :])[0])

    def _values(self, dtype: str, count: int, value: bytes, number: int) -> np.ndarray:
        kind = np.dtype(self.order + dtype)
        data = value
        if count * kind.itemsize > len(value):
            offset = struct.unpack(self.order + ("Q" if self.is_big else "I"), value)[0]
            data = self._read(offset, count * kind.itemsize, number)
        return np.frombuffer(data, kind, count)

    def _read(self, offset: int, length: int, number: int) -> bytes:
        if offset + length > self.size:
            raise refuse("E_SHORT_DATA", self.path, f"page {number} is not there completely", "Copy the file again.")
        self.budget -= length
        if self.budget < 0:
            raise refuse("E_FORMAT", self.path, "its pages lie on top of each other", "Export it again.")
        self.file.seek(offset)
        data = self.file.read(length)
        if len(data) < length:
            raise refuse("E_SHORT_DATA", self.path, f"page {number} is not there completely", "Copy the file again.")
        return data
