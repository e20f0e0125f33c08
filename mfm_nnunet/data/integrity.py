"""Is an image file whole? One pass over its bytes answers, before any reader may fill what is missing with zeros.

nnU-Net's default reader accepts a .nii.gz that was cut anywhere and returns zeros for the rest. Here the whole
compressed stream is read with its checksum and its length is compared with what the header promises.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data import headers, nifti, pictures
from mfm_nnunet.errors import MFMError

BLOCK = 1 << 20
"""Bytes that are held at once, compressed and decompressed alike."""

CONTROL_GROUPS = "/sys/fs/cgroup"

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
IMAGE_ENDINGS: tuple[str, ...] = tuple(_MAGIC)
"""The file endings that can be read, in lower case; ``.nii.gz`` before ``.nii``."""

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


def ending_of(path: Path) -> str:
    """The known ending of a file name in lower case, e.g. ``.nii.gz``; empty for an unknown one."""
    name = path.name.lower()
    return next((ending for ending in IMAGE_ENDINGS if name.endswith(ending)), "")


def check_image_file(path: Path) -> None:
    """Return when ``path`` is a regular, complete image file of a known format.

    Raises MFMError: E_NOT_FOUND, E_NOT_REGULAR, E_EMPTY, E_FORMAT, E_GZIP_TRUNCATED, E_GZIP_CRC, E_HEADER, E_DIM,
    E_DATATYPE, E_SHORT_DATA, E_NONFINITE, E_SPACING, E_GEOMETRY, E_TOO_LARGE. Memory stays at a few megabytes for
    volumes; pictures are decoded. Nothing is read from a FIFO or device.
    """
    ending = require_regular(path)
    try:
        _require_content(path, ending)
        if ending in (".nii", ".nii.gz"):
            _check_nifti(path, compressed=ending == ".nii.gz")
        elif ending == ".png":
            pictures.check_png(path)
        elif ending == ".bmp":
            pictures.check_bmp(path)
        elif ending in (".jpg", ".jpeg"):
            pictures.check_picture(path)
        elif ending in (".tif", ".tiff"):
            pictures.check_tiff(path)
        else:
            read = {".nrrd": headers.nrrd_header, ".nhdr": headers.nrrd_header, ".gipl": headers.gipl_header}
            _check_voxels(path, read.get(ending, headers.meta_header)(path))
    except OSError as error:
        raise MFMError("E_NOT_FOUND", f"{path}: cannot be read ({error.strerror or error}).") from error


def files_of(path: Path, is_label: bool = False) -> list[Path]:
    """The file of an image and those that belong to it: the voxels of a detached header, the spacing of a TIFF stack.

    nnU-Net's Tiff3DIO takes the latter from CASE.json, for images named CASE_0000.tif and for labels named CASE.tif.
    What is missing or cannot be read is left out: :func:`check_image_file` says why.
    """
    ending = ending_of(path)
    files = [path]
    if ending in (".tif", ".tiff"):
        spacing = Path(str(path)[: -len(ending if is_label else f"_0000{ending}")] + ".json")
        files += [spacing] if os.path.isfile(spacing) else []
    elif ending in (".nrrd", ".nhdr", ".mha", ".mhd") and os.path.isfile(path):  # opening a pipe would wait for ever
        with contextlib.suppress(MFMError, OSError):
            read = headers.nrrd_header if ending in (".nrrd", ".nhdr") else headers.meta_header
            voxels = read(path).data_file
            files += [voxels] if voxels != path else []
    return files


def nifti_version(path: Path) -> int:
    """2 for a NIfTI-2 file, else 1 (also when it cannot be read: :func:`check_image_file` says why)."""
    try:
        require_regular(path)
        start = next(_gunzip(path) if ending_of(path) == ".nii.gz" else _blocks(path), b"")
    except (MFMError, OSError):
        return 1
    return 2 if start[:4] in _MAGIC[".nii"][2:] else 1


def require_regular(path: Path) -> str:
    """The ending of a file that exists, is a plain file and is not empty."""
    try:
        info = os.stat(path)
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
    """The file starts as files of its ending do; otherwise say what it seems to be."""
    with open(path, "rb") as file:
        start = file.read(512)
    known = next((what for magic, what in _OTHER_CONTENT.items() if start.startswith(magic)), "")
    if b"" in _MAGIC[ending]:  # MetaImage and GIPL have no magic at the start; a foreign one still tells.
        if not known:
            return
    elif start.startswith(_MAGIC[ending]):
        return
    if not known and not start.strip(b"\t\r\n" + bytes(range(32, 127))):
        is_page = start.lstrip()[:1] == b"<"
        known = "a web page; download the image itself" if is_page else "text; copy or export the image itself"
    raise MFMError(
        "E_FORMAT", f"{path}: the name ends with {ending}, the content is {known or 'something else; export it again'}."
    )


def _check_nifti(path: Path, compressed: bool) -> None:
    blocks = _gunzip(path) if compressed else _blocks(path)
    start = b""
    for block in blocks:  # The members of a concatenated gzip file may be smaller than the header.
        start += block
        if len(start) >= 540:
            break
    header = nifti.nifti_header(path, start)
    _count(path, header, itertools.chain([start], blocks))
    _require_memory(path, header)


def _check_voxels(path: Path, header: headers.VolumeHeader) -> None:
    """The data behind an NRRD, MetaImage or GIPL header."""
    offset = header.file_offset
    if offset < 0:
        offset = max(header.data_file.stat().st_size - header.num_bytes, 0)
    if header.compression == "none":
        blocks = _blocks(header.data_file, offset)
    else:
        blocks = _gunzip(header.data_file, offset, any_zlib=header.compression == "zlib")
    _count(path, header, blocks)
    _require_memory(path, header)


def _count(path: Path, header: headers.VolumeHeader, blocks: Iterable[bytes]) -> None:
    """Compare the bytes that are there with the promised number and count voxels that are not finite.

    Floats are looked at here and not only in the array, because SimpleITK turns NaN in a NIfTI file into 0.
    """
    promised = header.stream_offset + header.num_bytes
    seen = num_bad = 0
    rest = b""
    for block in blocks:
        skip = max(header.stream_offset - seen, 0)
        seen += len(block)
        if seen > promised:
            raise MFMError(
                "E_HEADER",
                f"{path}: holds more data than the {promised} bytes that its header describes, so the header or the "
                "data is wrong. Export the image again.",
            )
        if header.dtype.kind == "f":
            rest += block[skip:]
            whole = len(rest) - len(rest) % header.dtype.itemsize
            values = np.frombuffer(rest[:whole], header.dtype)
            num_bad += values.size - int(np.count_nonzero(np.isfinite(values)))
            rest = rest[whole:]
    if seen < promised:
        raise MFMError(
            "E_SHORT_DATA", f"{path}: holds {seen} of the {promised} bytes that its header describes. Copy it again."
        )
    if num_bad:
        raise non_finite(path, num_bad)


def non_finite(path: Path, num_voxels: int) -> MFMError:
    """The error of an image with NaN or infinite voxels."""
    return MFMError(
        "E_NONFINITE",
        f"{path}: {num_voxels} voxels are NaN or infinite. One of them would spread over the whole volume when it is "
        "resampled. Replace them, e.g. by the value of air or background.",
    )


def _require_memory(path: Path, header: headers.VolumeHeader) -> None:
    """A volume is worked on as float32; one that is larger than the memory that we may use cannot be."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    available = min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_memory_limits()])
    needed = 4 * int(np.prod(header.shape))
    if needed > available:
        raise MFMError(
            "E_TOO_LARGE",
            f"{path}: the volume needs {needed / 1e9:.1f} GB, and only {available / 1e9:.1f} GB may be used. Crop it.",
        )


@functools.cache
def _memory_limits() -> list[int]:
    """Bytes that the control groups (v2) of this process allow, as containers and schedulers set them."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    group = Path(f"{CONTROL_GROUPS}/{own}")
    limits = []
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # no limit is "max"; outside of the groups there is no such file
            limits.append(int((folder / "memory.max").read_text()))
    return limits


def _blocks(path: Path, offset: int = 0) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(offset)
        while block := file.read(BLOCK):
            yield block


def _gunzip(path: Path, offset: int = 0, any_zlib: bool = False) -> Iterator[bytes]:
    """The decompressed bytes in blocks of bounded size, with checksums verified.

    Several gzip members in a row are one stream, and zeros after the last are padding, as for gzip itself.
    """
    wbits = 47 if any_zlib else 31
    with open(path, "rb") as file:
        file.seek(offset)
        decoder, data = zlib.decompressobj(wbits), file.read(BLOCK // 16)
        while True:
            out = _inflate(path, decoder, data)
            if out:
                yield out
            if decoder.eof:
                data = decoder.unused_data.lstrip(b"\0")
                while not data and (block := file.read(BLOCK)):
                    data = block.lstrip(b"\0")
                if not data:
                    return
                if any_zlib:  # ITK stops after the first and leaves the rest of the voxels to chance
                    raise MFMError("E_HEADER", f"{path}: holds several compressed streams in a row. Save it again.")
                decoder = zlib.decompressobj(wbits)
                continue
            data = decoder.unconsumed_tail or file.read(BLOCK // 16)
            if not data and not out:
                raise MFMError("E_GZIP_TRUNCATED", f"{path}: the compressed data is cut off. Copy the file again.")


def _inflate(path: Path, decoder: Any, data: bytes) -> bytes:
    try:
        return decoder.decompress(data, BLOCK)
    except zlib.error as error:
        reason = str(error).rpartition(": ")[2]
        raise MFMError("E_GZIP_CRC", f"{path}: the compressed data is damaged ({reason}). Copy it again.") from error
