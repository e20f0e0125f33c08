"""Check that PNG, JPEG and BMP files are complete and that nnU-Net's readers return them unchanged.

The rows of a PNG file are counted. Other files are decoded, because their headers do not state enough.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from mfm_nnunet.errors import MFMError

if TYPE_CHECKING:
    from PIL import Image

_BLOCK = 1 << 20
"""Bytes of inflated rows held in memory at once."""
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of the seven passes of an interlaced PNG file."""
_NO_MARKER = b"\x55\xa3" * 64


def num_bytes(path: Path) -> int:
    """Return the size of the pixels of a picture in bytes, from its header."""
    if path.suffix.lower() == ".png":
        with open(path, "rb") as file:
            header = _PngHeader.read(path, file)
        channels = 3 if header.is_palette else header.channels
        return header.width * header.height * channels * max(header.depth // 8, 1)
    with _open_picture(path) as picture:
        return picture.width * picture.height * len(picture.getbands()) * (4 if picture.mode in "IF" else 1)


def count_bands(path: Path) -> int:
    """Return the number of channels of a picture from its header; nnU-Net replaces palette indices by their colours."""
    with _open_picture(path) as picture:
        return len(picture.palette.mode if picture.palette and picture.mode == "P" else picture.getbands())


class _PngHeader(NamedTuple):
    width: int
    height: int
    depth: int
    colour: int
    compression: int
    filter: int
    interlace: int

    @classmethod
    def read(cls, path: Path, file: IO[bytes]) -> _PngHeader:
        """Read the header; the file position is then after it."""
        file.seek(8)
        start = file.read(25)
        if len(start) < 25:
            raise MFMError("E_SHORT_DATA", f"{path}: the picture is cut off. Copy it again.")
        header = cls(*struct.unpack(">IIBBBBB", start[8:21]))
        if start[:8] != b"\0\0\0\x0dIHDR" or header.colour not in _PNG_CHANNELS or not header.width * header.height:
            raise MFMError("E_FORMAT", f"{path}: the picture has no valid PNG header. Copy or export it again.")
        return header

    @property
    def channels(self) -> int:
        """Number of values per stored pixel."""
        return _PNG_CHANNELS[self.colour]

    @property
    def is_palette(self) -> bool:
        """True if pixels are palette indices."""
        return self.colour == 3

    @property
    def num_stored(self) -> int:
        """Number of bytes of all rows before compression, including the filter byte of each row."""
        bits, total = self.channels * self.depth, 0
        for x, y, step_x, step_y in _ADAM7 if self.interlace else [(0, 0, 1, 1)]:
            width, height = -(-(self.width - x) // step_x), -(-(self.height - y) // step_y)
            total += height * (1 + -(-width * bits // 8)) if width > 0 and height > 0 else 0
        return total


def check_png(path: Path) -> None:
    """Verify the checksum of every chunk and the number of rows: Pillow ignores both, and fills rows with zeros."""
    with open(path, "rb") as file:
        header = _PngHeader.read(path, file)
        _require_png_kind(path, header)
        rows = _Rows(path, header.num_stored)
        file.seek(8)
        kind = b""
        while kind != b"IEND":
            start = file.read(8)
            length = struct.unpack(">I", start[:4])[0] if len(start) == 8 else 0
            body = file.read(min(length, path.stat().st_size))
            checksum = file.read(4)
            if len(start) < 8 or len(body) < length or len(checksum) < 4:
                raise MFMError("E_SHORT_DATA", f"{path}: the picture is cut off. Copy it again.")
            kind = start[4:]
            if zlib.crc32(body, zlib.crc32(kind)) != struct.unpack(">I", checksum)[0]:
                raise MFMError("E_FORMAT", f"{path}: the picture is damaged (checksum). Copy it again.")
            if kind == b"acTL":
                raise MFMError("E_DIM", f"{path}: this is an animation. Save one picture per file.")
            if kind == b"IDAT":
                rows.count(body)
    rows.require_all()
    with _open_picture(path):  # the reader will decode it; missing data would have been found above
        pass


def _require_png_kind(path: Path, header: _PngHeader) -> None:
    """Refuse pixel formats that nnU-Net's reader does not return unchanged."""
    if header.colour == 4:
        raise MFMError(
            "E_DATATYPE",
            f"{path}: its pixels are grey with transparency (alpha), which nnU-Net cannot read. Save it without alpha.",
        )
    if header.depth == 16 and header.channels > 1:
        raise MFMError(
            "E_DATATYPE",
            f"{path}: it has 16 bits per colour, of which nnU-Net's reader drops 8. Save it with 8 bits, or save each "
            "colour as a grey picture.",
        )


class _Rows:
    """Counter of the decompressed bytes of a PNG file, which holds at most one block of them."""

    def __init__(self, path: Path, expected: int) -> None:
        self.path, self.expected, self.seen = path, expected, 0
        self.decoder = zlib.decompressobj()

    def count(self, data: bytes) -> None:
        """Count another part of the compressed stream."""
        while data and not self.decoder.eof:
            try:
                self.seen += len(self.decoder.decompress(data, _BLOCK))
            except zlib.error as error:
                raise damaged(self.path, error) from error
            if self.seen > self.expected:
                raise MFMError(
                    "E_HEADER",
                    f"{self.path}: holds more than the {self.expected} bytes of rows that its header describes. Export "
                    "it again.",
                )
            data = self.decoder.unconsumed_tail

    def require_all(self) -> None:
        """Raise MFMError (E_SHORT_DATA) if rows are missing."""
        self.seen += len(self.decoder.flush())
        if self.seen < self.expected:
            raise MFMError(
                "E_SHORT_DATA",
                f"{self.path}: holds {self.seen} of the {self.expected} bytes of rows that its header describes. Copy "
                "it again.",
            )


def check_picture(path: Path) -> None:
    """Decode a picture with Pillow."""
    with _open_picture(path) as picture:
        picture.load()
        if picture.format == "JPEG":
            _require_jpeg_rows(path, picture)


def _require_jpeg_rows(path: Path, picture: Image.Image) -> None:
    """Detect missing rows before the end mark of a JPEG file, which every decoder fills in.

    A decoder that has all rows ignores extra bytes before the end mark; one that lacks rows decodes them as pixels.
    """
    from PIL import ImageChops

    with _open_picture(path, io.BytesIO(with_more(path.read_bytes()))) as other:
        if ImageChops.difference(picture, other).getbbox() is not None:
            raise MFMError("E_SHORT_DATA", f"{path}: the last rows of the picture are missing. Copy it again.")


def with_more(jpeg: bytes) -> bytes:
    """Insert bytes that belong to no row before the end mark of a JPEG stream."""
    end = jpeg.rfind(b"\xff\xd9")
    return jpeg[:end] + _NO_MARKER + jpeg[end:] if end >= 0 else jpeg


@contextlib.contextmanager
def _open_picture(path: Path, content: io.BytesIO | None = None) -> Iterator[Image.Image]:
    """Open a picture, or ``content`` in its place, with Pillow, which reads only the header."""
    from PIL import Image

    try:
        with Image.open(content or path) as picture:
            yield picture
    except MFMError:
        raise
    except Image.DecompressionBombError as error:
        raise MFMError("E_TOO_LARGE", f"{path}: {error}. Cut the picture into tiles.") from error
    except Exception as error:  # Pillow's decoders raise arbitrary errors.
        raise damaged(path, error) from error


def check_bmp(path: Path) -> None:
    """Compare the file size with the header, then decode the picture."""
    with open(path, "rb") as file:
        start = file.read(34)
    if len(start) < 34 or path.stat().st_size < struct.unpack("<I", start[2:6])[0]:
        raise MFMError("E_SHORT_DATA", f"{path}: the picture is cut off. Copy it again.")
    check_picture(path)
    first_pixel, kind, width, height, _, bits, compression = struct.unpack("<IIiiHHI", start[10:34])
    row = (width * bits + 31) // 32 * 4
    # Headers longer than usual may have a colour profile after the pixels.
    if kind == 40 and compression == 0 and path.stat().st_size >= first_pixel + row * (abs(height) + 1):
        raise MFMError(
            "E_HEADER", f"{path}: holds more rows than the {abs(height)} that its header describes. Export it again."
        )


def damaged(path: Path, error: Exception) -> MFMError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return MFMError("E_FORMAT", f"{path}: the picture cannot be decoded ({reason}). Copy or export it again.")
