"""Is a PNG, JPEG, BMP or TIFF file whole? Each is decoded completely, because their headers promise too little."""

from __future__ import annotations

import logging
import struct
import threading
import zlib
from pathlib import Path

from mfm_nnunet.errors import MFMError


def check_png(path: Path) -> None:
    """Verify the checksum of every chunk and decode the pixels.

    Raises MFMError (E_FORMAT, E_SHORT_DATA, E_TOO_LARGE). Pillow alone notices neither a lost end nor a wrong checksum.
    """
    with open(path, "rb") as file:
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
    check_picture(path)


def check_picture(path: Path) -> None:
    """Decode a picture with Pillow. Raises MFMError (E_FORMAT, E_TOO_LARGE)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
    except Image.DecompressionBombError as error:
        raise MFMError("E_TOO_LARGE", f"{path}: {error}. Cut the picture into tiles.") from error
    except Exception as error:  # Pillow raises whatever its decoders raise.
        raise _damaged(path, error) from error


def check_bmp(path: Path) -> None:
    """Compare the length with the header and decode. Raises MFMError (E_FORMAT, E_SHORT_DATA, E_TOO_LARGE)."""
    with open(path, "rb") as file:
        start = file.read(6)
    if len(start) < 6 or path.stat().st_size < struct.unpack("<I", start[2:])[0]:
        raise MFMError("E_SHORT_DATA", f"{path}: the picture is cut off. Copy it again.")
    check_picture(path)


def check_tiff(path: Path) -> None:
    """Decode all pages of a TIFF file. Raises MFMError (E_FORMAT, E_SHORT_DATA, E_TOO_LARGE)."""
    import tifffile

    lost_pages = _LostPages()
    logger = logging.getLogger("tifffile")
    logger.addHandler(lost_pages)
    try:
        tifffile.imread(path)
    except MemoryError as error:
        raise MFMError("E_TOO_LARGE", f"{path}: the picture does not fit into memory.") from error
    except Exception as error:  # tifffile and its codecs have no common base class of errors.
        raise _damaged(path, error) from error
    finally:
        logger.removeHandler(lost_pages)
    if lost_pages.found:
        raise MFMError("E_SHORT_DATA", f"{path}: pages are missing ({lost_pages.found[0]}). Copy the file again.")


def tiff_is_2d(path: Path) -> bool:
    """Whether a TIFF file is one grey or RGB(A) picture, and not a stack of slices."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            shape = file.series[0].shape
    except Exception as error:
        raise _damaged(path, error) from error
    return len(shape) == 2 or (len(shape) == 3 and shape[-1] in (3, 4))


class _LostPages(logging.Handler):
    """tifffile only logs that pages cannot be found, and returns the others."""

    SIGNS = ("page offset", "corrupted tag list of page", "failed to reshape")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        self.owner = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.thread == self.owner and any(sign in text for sign in self.SIGNS):
            self.found.append(text)


def _damaged(path: Path, error: Exception) -> MFMError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return MFMError("E_FORMAT", f"{path}: the picture cannot be decoded ({reason}). Copy or export it again.")
