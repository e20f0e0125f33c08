"""Check in one pass over its bytes that an image file is complete, before a reader fills gaps with zeros.

nnU-Net's default reader accepts a truncated .nii.gz and returns zeros for the rest. Here the whole compressed stream is
read with its checksum, and its length is compared with the header.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.device import require_memory
from mfm_nnunet.errors import MFMError, unreadable
from mfm_nnunet.files import IMAGE_ENDINGS, ending_of
from mfm_nnunet.images import bitmaps, headers, nifti, tiff

BLOCK = 1 << 20
"""Bytes held in memory at once, compressed and decompressed alike."""
HEADER_BYTES = 540
"""Size of the larger of the two NIfTI headers."""
NUM_SAMPLES = 4096
"""Number of voxels, evenly spaced over a volume, that are compared with the reader's."""
VALUE_TOLERANCE = 1e-5
"""Relative difference between stored and read values that is due to rounding to float32."""
MAX_DEFLATE_RATIO = 1040
"""Upper limit of the compression ratio of gzip and zlib."""
READING_BYTES_PER_VOXEL, READING_BYTES_PER_BYTE = 12, 6
"""Peak memory of nnU-Net's readers: the stored voxels, a copy, and the float32 array."""

_MAGIC = {
    ".nii.gz": (b"\x1f\x8b",),
    ".nii": (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"),
    ".nrrd": (b"NRRD000",),
    ".nhdr": (b"NRRD000",),
    ".mha": (b"",),
    ".mhd": (b"",),
    ".gipl": (b"",),
    ".png": (b"\x89PNG\r\n\x1a\n",),
    ".bmp": (b"BM",),
    ".jpg": (b"\xff\xd8\xff",),
    ".jpeg": (b"\xff\xd8\xff",),
    ".tif": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    ".tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
}

_OTHER_CONTENT = {
    b"version https://git-lfs": "a git-lfs pointer and not the image itself; fetch it with: git lfs pull",
    b"\x1f\x8b": "gzip data; if it is a compressed NIfTI file its name must end with .nii.gz",
    b"\x5c\x01\0\0": "an uncompressed NIfTI file, whose name must end with .nii",
    b"\0\0\x01\x5c": "an uncompressed NIfTI file, whose name must end with .nii",
    b"\x89PNG": "a PNG picture, whose name must end with .png",
    b"\xff\xd8\xff": "a JPEG picture, whose name must end with .jpg",
    b"NRRD": "an NRRD file, whose name must end with .nrrd",
    b"PK": "a zip archive; unpack it",
}


_CHECKS = {".png": bitmaps.check_png, ".bmp": bitmaps.check_bmp, ".tif": tiff.check_tiff, ".tiff": tiff.check_tiff}
"""Checks of the content of pictures by ending; :func:`bitmaps.check_picture` for all others."""
_HEADERS = {
    **dict.fromkeys((".nrrd", ".nhdr"), headers.nrrd_header),
    **dict.fromkeys((".mha", ".mhd"), headers.meta_header),
    ".gipl": headers.gipl_header,
}
"""Readers of the headers of volumes by ending; NIfTI has its own."""


@dataclass(frozen=True)
class Declared:
    """Facts from the first bytes of a file: the header of a volume, and the memory needed to read it."""

    ending: str
    header: headers.VolumeHeader | None
    """None for a picture."""
    reading_bytes: int
    start: bytes = b""
    """First bytes of a NIfTI file, decompressed; they contain its header."""


@dataclass(frozen=True)
class Voxels:
    """Summary of the voxels of a file, in storage order, for comparison with the reader's result."""

    num_voxels: int
    lowest: float
    highest: float
    samples: np.ndarray
    """Values of every ``step``-th voxel, and of the last one."""
    step: int
    rounded_from: float
    """Largest number in the computation of the values; rounding errors are relative to it."""


def check_image_file(path: Path) -> Voxels | None:
    """Check that ``path`` is a regular, complete image file of a known format; None for a picture.

    Raises MFMError: E_NOT_FOUND, E_NOT_REGULAR, E_EMPTY, E_FORMAT, E_GZIP_TRUNCATED, E_GZIP_CRC, E_HEADER, E_DIM,
    E_DATATYPE, E_SHORT_DATA, E_NONFINITE, E_SPACING, E_GEOMETRY, E_TOO_LARGE. Volumes need only a few megabytes of
    memory; pictures are decoded. FIFOs and devices are not read.
    """
    return check_content(path, declared_by(path))


def declared_by(path: Path) -> Declared:
    """Read the declared contents of a file; refuse too large ones before anything is decompressed."""
    ending = require_regular(path)
    with _access(path):
        _require_content(path, ending)
        header, start = None, b""
        if ending in (".nii", ".nii.gz"):
            start = _first_bytes(path, ending)
            header = nifti.nifti_header(path, start)
        elif ending in _HEADERS:
            header = _HEADERS[ending](path)
        if header is None:
            count = tiff.num_decoded_bytes if ending in (".tif", ".tiff") else bitmaps.num_bytes
            reading_bytes = READING_BYTES_PER_BYTE * count(path)
        else:
            _require_possible(path, header, is_compressed=ending == ".nii.gz" or header.compression != "none")
            reading_bytes = READING_BYTES_PER_VOXEL * math.prod(header.shape)
        require_memory(reading_bytes, f"{path}: reading the image", "Crop it.")
    return Declared(ending, header, reading_bytes, start)


def check_content(path: Path, declared: Declared) -> Voxels | None:
    """Check that a file contains what it declares."""
    with _access(path):
        header = declared.header
        if header is None:
            _CHECKS.get(declared.ending, bitmaps.check_picture)(path)
            return None
        offset = header.file_offset
        if offset < 0:
            offset = max(header.data_file.stat().st_size - header.num_bytes, 0)
        if declared.ending == ".nii.gz":
            blocks = _gunzip(path)
        elif header.compression == "none":
            blocks = _read_blocks(header.data_file, offset)
        else:
            blocks = _gunzip(header.data_file, offset, any_zlib=header.compression == "zlib")
        return _count_voxels(path, header, blocks)


@contextlib.contextmanager
def _access(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def _first_bytes(path: Path, ending: str) -> bytes:
    """Return the decompressed header bytes of a NIfTI file; fewer if the file is shorter."""
    start = b""
    for block in _gunzip(path, most=HEADER_BYTES) if ending == ".nii.gz" else _read_blocks(path):
        start += block[:HEADER_BYTES]
        if len(start) >= HEADER_BYTES:  # the members of a concatenated gzip file may be smaller than the header
            break
    return start


def files_of(path: Path, is_label: bool = False) -> list[Path]:
    """List the file of an image and its further files: voxels of a detached header, spacing of a TIFF stack.

    nnU-Net's Tiff3DIO takes the spacing from CASE.json, for images named CASE_0000.tif and for labels named CASE.tif.
    Missing or unreadable files are skipped: :func:`check_image_file` reports them.
    """
    ending = ending_of(path)
    files = [path]
    if ending in (".tif", ".tiff"):
        spacing = Path(str(path)[: -len(ending if is_label else f"_0000{ending}")] + ".json")
        files += [spacing] if os.path.isfile(spacing) else []
    elif ending in _HEADERS and os.path.isfile(path):  # opening a pipe would block for ever
        with contextlib.suppress(MFMError, OSError):
            voxels = _HEADERS[ending](path).data_file
            files += [voxels] if voxels != path else []
    return files


def require_regular(path: Path) -> str:
    """Return the ending of an image file; refuse missing, empty, irregular and other files."""
    try:
        info = os.stat(path)
    except PermissionError as error:
        raise unreadable(path, error) from error
    except (OSError, ValueError) as error:
        link = " (a link whose target is missing)" if os.path.islink(path) else ""
        raise MFMError("E_NOT_FOUND", f"{path}: no such file{link}. Check the path.") from error
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
        raise MFMError("E_NOT_REGULAR", f"{path}: is {kind}, not an image file.")
    ending = ending_of(path)
    if not ending:
        raise MFMError("E_FORMAT", f"{path}: not a known image format. Known endings: {' '.join(IMAGE_ENDINGS)}")
    if info.st_size == 0:
        raise MFMError("E_EMPTY", f"{path}: the file is empty. Copy it again.")
    return ending


def _require_content(path: Path, ending: str) -> None:
    """Refuse a file whose first bytes do not match its ending, and name the apparent format."""
    with open(path, "rb") as file:
        start = file.read(512)
    known = next((what for magic, what in _OTHER_CONTENT.items() if start.startswith(magic)), "")
    if b"" in _MAGIC[ending]:  # MetaImage and GIPL have no magic bytes; those of other formats are recognised.
        if not known:
            return
    elif start.startswith(_MAGIC[ending]):
        return
    if not known and not start.strip(b"\t\r\n" + bytes(range(32, 127))):
        is_page = start.lstrip()[:1] == b"<"
        known = "a web page; download the image itself" if is_page else "text; copy or export the image itself"
    raise MFMError(
        "E_FORMAT",
        f"{path}: the name ends with {ending}, but the content is {known or 'something else; export it again'}.",
    )


def _count_voxels(path: Path, header: headers.VolumeHeader, blocks: Iterable[bytes]) -> Voxels:
    """Compare the number of bytes with the header, count voxels that are not finite, and take samples.

    Floats are checked here and not only in the array, because SimpleITK turns NaN in a NIfTI file into 0.
    """
    promised = header.stream_offset + header.num_bytes
    size = header.dtype.itemsize
    num_voxels = header.num_bytes // size
    step = max(num_voxels // NUM_SAMPLES, 1)
    samples, ranges = [], []
    seen = index = num_bad = 0
    rest = b""
    for block in blocks:
        skip = max(header.stream_offset - seen, 0)
        seen += len(block)
        if seen > promised:
            raise MFMError(
                "E_HEADER",
                f"{path}: more data than the {promised} bytes that its header describes, so the header or the "
                "data is wrong. Export the image again.",
            )
        rest = rest + block[skip:] if rest or skip else block
        values = np.frombuffer(rest, header.dtype, len(rest) // size)
        rest = rest[values.nbytes :]
        if not values.size:
            continue
        lowest, highest = values.min(), values.max()
        if header.dtype.kind == "f" and not (np.isfinite(lowest) and np.isfinite(highest)):
            num_bad += values.size - int(np.count_nonzero(np.isfinite(values)))
        ranges.append((lowest, highest))
        samples.append(values[-index % step :: step].copy())  # a view would keep all blocks
        index += values.size
        last = values[-1:].copy()
    if seen < promised:
        raise MFMError(
            "E_SHORT_DATA", f"{path}: only {seen} of the {promised} bytes that its header describes. Copy it again."
        )
    if num_bad:
        raise non_finite(path, num_bad)
    return _summary(header, num_voxels, ranges, np.concatenate([*samples, last]), step)


def _summary(
    header: headers.VolumeHeader, num_voxels: int, ranges: list[tuple[Any, Any]], samples: np.ndarray, step: int
) -> Voxels:
    limits = float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
    lowest, highest = sorted(limit * header.slope + header.inter for limit in limits)
    rounded_from = max(*(abs(limit * header.slope) for limit in limits), abs(header.inter))
    return Voxels(num_voxels, lowest, highest, samples.astype(float) * header.slope + header.inter, step, rounded_from)


def non_finite(path: Path, num_voxels: int) -> MFMError:
    """Return the error for an image with NaN or infinite voxels."""
    return MFMError(
        "E_NONFINITE",
        f"{path}: {num_voxels} voxels are NaN or infinite. One of them would spread over the whole volume when it is "
        "resampled. Replace them, e.g. by the value of air or background.",
    )


def require_same_voxels(file: Path, reader_name: str, voxels: Voxels, array: np.ndarray) -> None:
    """Compare the reader's voxels with those that the gate found in the file.

    A reader that loses its position in a file silently returns neighbouring voxels or uninitialised memory.
    """
    is_same = voxels.num_voxels == array.size
    if is_same and "Reorient" in reader_name:  # the same voxels in another order
        expected, found = np.array([voxels.lowest, voxels.highest]), np.array([array.min(), array.max()], float)
    elif is_same:
        values = array.reshape(-1)
        expected, found = voxels.samples, np.append(values[:: voxels.step], values[-1]).astype(float)
    if is_same:
        allowed = VALUE_TOLERANCE * np.maximum(np.abs(expected), voxels.rounded_from)
        is_same = bool(np.all(np.abs(expected - found) <= allowed))
    if not is_same:
        raise MFMError(
            "E_FORMAT",
            f"{file}: nnU-Net's {reader_name} reads other voxels than the file has, because it interprets the header "
            "differently. Export it again.",
        )


def _require_possible(path: Path, header: headers.VolumeHeader, is_compressed: bool) -> None:
    """Refuse a file too small for its header, even at the best possible compression."""
    present = header.data_file.stat().st_size
    most = present * MAX_DEFLATE_RATIO if is_compressed else present
    if most < header.num_bytes:
        raise MFMError(
            "E_SHORT_DATA",
            f"{path}: it has {present} bytes, but its header describes {header.num_bytes}. Copy it again.",
        )


def _read_blocks(path: Path, offset: int = 0) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            yield block


def _gunzip(path: Path, offset: int = 0, any_zlib: bool = False, most: int | None = None) -> Iterator[bytes]:
    """Yield decompressed blocks of at most ``most`` (default: BLOCK) bytes, verifying checksums.

    As in gzip, consecutive members form one stream, and zeros after the last are padding.
    """
    wbits = 47 if any_zlib else 31
    with open(path, "rb") as file:
        file.seek(offset)
        decoder, data = zlib.decompressobj(wbits), file.read(BLOCK // 16)
        while True:
            out = _inflate(path, decoder, data, most or BLOCK)
            if out:
                yield out
            if decoder.eof:
                data = decoder.unused_data.lstrip(b"\0")
                while not data and (block := file.read(BLOCK)):
                    data = block.lstrip(b"\0")
                if not data:
                    return
                if any_zlib:  # ITK stops after the first and leaves the other voxels uninitialised
                    raise MFMError("E_HEADER", f"{path}: several compressed streams in a row. Save it again.")
                decoder = zlib.decompressobj(wbits)
                continue
            data = decoder.unconsumed_tail or file.read(BLOCK // 16)
            if not data and not out:
                raise MFMError("E_GZIP_TRUNCATED", f"{path}: the compressed data is cut off. Copy the file again.")


def _inflate(path: Path, decoder: Any, data: bytes, most: int) -> bytes:
    try:
        return decoder.decompress(data, most)
    except zlib.error as error:
        reason = str(error).rpartition(": ")[2]
        raise MFMError("E_GZIP_CRC", f"{path}: the compressed data is damaged ({reason}). Copy it again.") from error
