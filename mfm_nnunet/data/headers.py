"""What the header of a volume promises: its shape, the type of its voxels and where their bytes are.

NRRD (attached and detached), MetaImage (MHA, MHD) and GIPL are read here, NIfTI in :mod:`mfm_nnunet.data.nifti`. Only
facts that decide whether a file is complete are taken; the voxels are decoded by nnU-Net's readers.

Formats: https://teem.sourceforge.net/nrrd/format.html, https://itk.org/Wiki/MetaIO/Documentation
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mfm_nnunet.errors import MFMError

HEADER_BYTES = 1 << 16
"""As much of a file as a text header may take."""

_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
_META_TYPES = {
    "CHAR": "i1",
    "UCHAR": "u1",
    "SHORT": "i2",
    "USHORT": "u2",
    "INT": "i4",
    "UINT": "u4",
    "LONG": "i4",
    "ULONG": "u4",
    "LONG_LONG": "i8",
    "ULONG_LONG": "u8",
    "FLOAT": "f4",
    "DOUBLE": "f8",
}
_GIPL_TYPES = {7: "i1", 8: "u1", 15: "i2", 16: "u2", 31: "u4", 32: "i4", 64: "f4", 65: "f8"}


@dataclass(frozen=True)
class VolumeHeader:
    """Shape (fastest axis first), voxel type, and where the voxels are.

    ``file_offset`` counts bytes in ``data_file``, ``stream_offset`` bytes after decompression. A negative
    ``file_offset`` means "the last bytes of the file". The value of a voxel is ``slope * stored + inter``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data_file: Path
    file_offset: int = 0
    stream_offset: int = 0
    compression: Literal["none", "gzip", "zlib"] = "none"
    slope: float = 1.0
    inter: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of all voxels, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize


def nrrd_header(path: Path) -> VolumeHeader:
    """The header of an attached (``.nrrd``) or detached (``.nhdr``) NRRD file.

    Raises MFMError: E_HEADER, E_DIM, E_DATATYPE, E_FORMAT (encodings other than raw and gzip, several data files).
    """
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    end = re.search(rb"\n\r?\n", start)
    text, offset = (start[: end.start()], end.end()) if end else (start, 0)
    fields = _text_fields(text, ":")
    sizes = _integers(path, "sizes", fields.get("sizes", ""))
    if len(sizes) != _integers(path, "dimension", fields.get("dimension", ""))[0]:
        raise refuse("E_HEADER", path, f"dimension {fields['dimension']} does not fit sizes {fields['sizes']}")
    require_volume(path, sizes)
    if any(kind not in ("domain", "space", "time", "none", "???") for kind in fields.get("kinds", "").lower().split()):
        raise refuse("E_DATATYPE", path, f"an axis holds components (kinds: {fields['kinds']}), not space")
    dtype = _dtype(path, _NRRD_TYPES, fields.get("type", ""), fields.get("endian", "").lower() == "big")
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz") or fields.get("line skip", "0") != "0":
        raise refuse("E_FORMAT", path, f"encoding '{encoding}' cannot be checked", "Save it with raw or gzip encoding.")
    data_file = path
    if name := fields.get("data file", fields.get("datafile")):
        data_file, offset = _sibling(path, name), 0
    elif not end:
        raise refuse("E_SHORT_DATA", path, "the file ends within its header", "Copy it again.")
    skip = _integers(path, "byte skip", fields.get("byte skip", "0"))[0]
    if encoding == "raw":
        return VolumeHeader(sizes, dtype, data_file, file_offset=offset + skip if skip >= 0 else -1)
    return VolumeHeader(sizes, dtype, data_file, file_offset=offset, stream_offset=max(skip, 0), compression="gzip")


def meta_header(path: Path) -> VolumeHeader:
    """The header of a MetaImage (``.mha``, or ``.mhd`` with its data file).

    Raises MFMError: E_HEADER, E_DIM, E_DATATYPE, E_FORMAT (text data, several data files).
    """
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    place = start.find(b"ElementDataFile")
    end = start.find(b"\n", place)
    if place < 0 or (end < 0 and path.suffix.lower() == ".mha"):
        raise refuse("E_HEADER", path, "the header has no complete line ElementDataFile", "Copy the file again.")
    fields = _text_fields(start[: end if end >= 0 else None], "=")
    shape = _integers(path, "DimSize", fields.get("dimsize", ""))
    if len(shape) != _integers(path, "NDims", fields.get("ndims", ""))[0]:
        raise refuse("E_HEADER", path, f"NDims {fields['ndims']} does not fit DimSize {fields['dimsize']}")
    require_volume(path, shape)
    if fields.get("elementnumberofchannels", "1") != "1":
        raise refuse("E_DATATYPE", path, f"voxels have {fields['elementnumberofchannels']} components, not one value")
    if fields.get("binarydata", "true").lower() != "true":
        raise refuse("E_FORMAT", path, "the voxels are written as text", "Save the file as binary data.")
    big = "true" in (fields.get(key, "").lower() for key in ("binarydatabyteordermsb", "elementbyteordermsb"))
    dtype = _dtype(path, _META_TYPES, fields.get("elementtype", "").removeprefix("MET_"), big)
    name = fields.get("elementdatafile", "")
    if not name:
        raise refuse("E_HEADER", path, "the header does not say where the voxels are (ElementDataFile)")
    local = name.upper() == "LOCAL"
    offset = end + 1 if local else _integers(path, "HeaderSize", fields.get("headersize", "0"))[0]
    zipped = fields.get("compresseddata", "false").lower() == "true"
    data_file = path if local else _sibling(path, name)
    return VolumeHeader(shape, dtype, data_file, file_offset=offset, compression="zlib" if zipped else "none")


def gipl_header(path: Path) -> VolumeHeader:
    """The header (256 bytes, big-endian) of a GIPL file. Raises MFMError: E_HEADER, E_DIM, E_DATATYPE."""
    with open(path, "rb") as file:
        start = file.read(256)
    if len(start) < 256 or start[252:] not in (b"\xef\xff\xe9\xb0", b"\x2a\xe3\x89\xb8"):
        raise refuse("E_HEADER", path, "does not start with a GIPL header")
    *shape, code = struct.unpack(">5H", start[:10])
    while len(shape) > 2 and shape[-1] <= 1:  # Unused axes are 0 or 1.
        shape.pop()
    require_volume(path, tuple(shape))
    if code not in _GIPL_TYPES:
        raise refuse("E_DATATYPE", path, f"voxels have GIPL type {code}")
    return VolumeHeader(tuple(shape), np.dtype(">" + _GIPL_TYPES[code]), path, file_offset=256)


def require_volume(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse what is neither 2D nor 3D (E_DIM, E_HEADER); trailing axes of length 1 are legal."""
    size = " x ".join(map(str, shape))
    if any(n <= 0 for n in shape):
        raise refuse("E_HEADER", path, f"the header says a size of {size}")
    if len(shape) < 2:
        raise refuse("E_DIM", path, "has one axis; an image has two or three")
    if any(n > 1 for n in shape[3:]):
        raise refuse(
            "E_DIM", path, f"has {len(shape)} axes ({size}); an image has two or three",
            "Split time points or channels into one file each.",
        )  # fmt: skip


def _text_fields(text: bytes, separator: str) -> dict[str, str]:
    lines = (line for line in text.decode("latin-1").splitlines() if not line.startswith("#"))
    pairs = (line.partition(separator) for line in lines)
    return {key.strip().lower(): value.strip() for key, found, value in pairs if found and not value.startswith("=")}


def _integers(path: Path, name: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split())
    except ValueError:
        numbers = ()
    if not numbers:
        raise refuse("E_HEADER", path, f"the header says '{name}: {text}', which is no number")
    return numbers


def _dtype(path: Path, table: dict[str, str], name: str, big_endian: bool) -> np.dtype[Any]:
    if name not in table:
        raise refuse("E_DATATYPE", path, f"voxels have type '{name}'; integers, float32 and float64 can be read")
    return np.dtype((">" if big_endian else "<") + table[name])


def _sibling(path: Path, name: str) -> Path:
    """The data file that a header names, relative to the header."""
    pattern = name.split()[0].upper() == "LIST" or "%" in name
    if pattern or (len(name.split()) > 1 and not (path.parent / name).exists()):
        raise refuse("E_FORMAT", path, f"the voxels are in several files ({name})", "Save the volume as one file.")
    data_file = path.parent / name
    if not data_file.is_file():
        raise refuse("E_NOT_FOUND", path, f"the data file {data_file} is missing", "Copy it beside the header.")
    return data_file


def refuse(code: str, path: Path, reason: str, advice: str = "Export the image again.") -> MFMError:
    """The error of a refused file: which one, why, and what to do."""
    return MFMError(code, f"{path}: {reason}. {advice}")
