"""Check that a TIFF file is complete and holds one volume: walk its pages without decoding, then decode.

tifffile follows a chain of pages even in a circle, fills missing data with zeros and only logs it. So the chain is
walked first, within a limit. Format: TIFF 6.0, and BigTIFF (https://www.awaresystems.be/imaging/tiff).
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images.bitmaps import damaged, with_more
from mfm_nnunet.images.headers import refuse

if TYPE_CHECKING:
    import tifffile

_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
"""Types of tag values that are whole numbers."""
_TILED, _STRIPED = (324, 325), (273, 279)
"""Tags of the offsets and of the lengths of the parts of a page."""
_REAL = {1: "unsigned", 2: "signed", 3: "floating point"}
MAX_TAGS = 4096
_DESCRIBED = ("ome", "imagej", "shaped")
"""Kinds of TIFF files that describe their volume in a text of their own."""


@dataclass(frozen=True)
class Page:
    """One page: the size of its picture, the type and storage of its values, and their positions."""

    offset: int
    shape: tuple[int, int, int]
    """Depth, height, width; very few programs write a depth other than 1."""
    samples: int
    bits: int
    sample_format: int
    storage: tuple[int, ...]
    """Compression, predictor, planar configuration, and the shape of a tile or strip."""
    is_planar: bool
    places: np.ndarray
    """Offset and length in bytes of each part (n, 2)."""
    num_parts: int

    @property
    def layout(self) -> tuple[object, ...]:
        """Properties that all pages of one volume share."""
        return (self.shape, self.samples, self.bits, self.sample_format, self.is_planar)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the decoded page."""
        return math.prod(self.shape) * self.samples * max(-(-self.bits // 8), 1)


def read_pages(path: Path) -> list[Page]:
    """Return the pages that a TIFF file declares, in order."""
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


def num_decoded_bytes(path: Path) -> int:
    """Return the number of bytes of the pixels of all pages."""
    # Uncompressed slices may also follow a single page, without pages of their own.
    return max(sum(page.num_bytes for page in read_pages(path)), path.stat().st_size)


def _require_parts(path: Path, pages: list[Page]) -> None:
    """Refuse pages with missing parts (E_SHORT_DATA), or with anything but real numbers (E_DATATYPE)."""
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
    if not len(lengths) and len(starts) == 1:  # old programs omit the length of a single strip
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
    """Reader of tags, in both byte orders and both sizes of TIFF, with a limit on the bytes read."""

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
        """Bytes that may still be read: the file once for tags, and once for the values they point to."""

    def read_tags(self, offset: int, number: int) -> tuple[dict[int, np.ndarray], int]:
        """Return the used tags of a page and the offset of the next page."""
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
        return self.file.read(length)


def check_tiff(path: Path) -> None:
    """Check that all pages of a TIFF file are present, belong together and can be decoded."""
    pages = {page.offset: page for page in read_pages(path)}
    _require_parts(path, list(pages.values()))
    with _open_tiff(path) as file:
        volume = file.series[0]
        _require_one_volume(path, file, pages)
        if file.asarray().shape != volume.shape:
            raise refuse("E_SHORT_DATA", path, f"its pages do not make {volume.shape}", "Copy the file again.")
        if volume.keyframe.compression in (6, 7):  # JPEG
            _require_rows(path, file)


def _require_one_volume(path: Path, file: tifffile.TiffFile, pages: Mapping[int, Page]) -> None:
    """Refuse pages that are missing, in other files, or of another kind: tifffile zeroes or skips them."""
    volume, *others = file.series
    described = [kind for kind in _DESCRIBED if getattr(file, f"is_{kind}")]
    if described and volume.kind not in described:
        raise refuse(
            "E_FORMAT", path, f"its {described[0]} description names other files, or does not fit its pages",
            "Save the volume as one plain TIFF stack.",
        )  # fmt: skip
    if volume.kind in (*_DESCRIBED, "generic", "uniform") and any(not other.keyframe.is_reduced for other in others):
        raise refuse(
            "E_DIM", path, f"{len(file.series)} images of different kinds or sizes; only the first would be read",
            "Split it into one file each.",
        )  # fmt: skip
    first = pages.get(volume.keyframe.offset)
    for number, page in enumerate(volume.pages):
        if page is None:
            raise refuse(
                "E_SHORT_DATA", path, f"page {number} of {len(volume.pages)} is missing", "Copy the file again."
            )
        if page.parent is not file:
            raise refuse("E_FORMAT", path, f"page {number} is in another file", "Save the volume as one file.")
        own = pages.get(page.offset)
        # tifffile decodes later pages as if they had the header of the first.
        if (
            first
            and own
            and (own.layout != first.layout or (page is not page.keyframe and own.storage != first.storage))
        ):
            raise refuse("E_HEADER", path, f"page {number} is stored in another way than the first")
    if len(volume.pages) == 1 and volume.dataoffset is not None:
        missing = volume.dataoffset + volume.nbytes - path.stat().st_size
        if missing > 0:
            raise refuse("E_SHORT_DATA", path, f"{missing} bytes of {volume.shape} are missing", "Copy the file again.")


def is_2d(path: Path) -> bool:
    """Return whether a TIFF file is one grey or RGB(A) picture, not a stack of slices."""
    shape = _shape(path)
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (3, 4))


def count_samples(path: Path) -> int:
    """Return the number of channels of a picture; 1 for a stack of slices."""
    shape = _shape(path)
    return shape[-1] if len(shape) == 3 and shape[-1] in (3, 4) else 1


def _shape(path: Path) -> tuple[int, ...]:
    read_pages(path)
    with _open_tiff(path) as file:
        return file.series[0].shape


@contextlib.contextmanager
def _open_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """Open a TIFF file whose pages were already walked; files that it names are not opened."""
    import tifffile

    try:
        with tifffile.TiffFile(path, _multifile=False) as file:
            yield file
    except MFMError:
        raise
    except MemoryError as error:
        raise MFMError("E_TOO_LARGE", f"{path}: the picture does not fit into memory.") from error
    except Exception as error:  # tifffile and its codecs have no common error class.
        raise damaged(path, error) from error


def _require_rows(path: Path, file: Any) -> None:
    """Detect missing rows in strips or tiles that are JPEG streams."""
    for page in file.series[0].pages:
        segments = file.filehandle.read_segments(page.dataoffsets, page.databytecounts)
        for data, index in segments:
            pair = (
                page.keyframe.decode(stream, index, jpegtables=page.jpegtables)[0] for stream in (data, with_more(data))
            )
            if not np.array_equal(*pair):
                raise refuse(
                    "E_SHORT_DATA", path, f"part {index} of page {page.index} lacks rows", "Copy the file again."
                )
