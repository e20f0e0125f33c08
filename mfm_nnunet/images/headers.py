"""Read headers of volumes: shape, voxel type and the position of the voxel data.

NRRD (attached and detached), MetaImage (MHA, MHD) and GIPL are read here, NIfTI in :mod:`mfm_nnunet.images.nifti`. Only
facts that decide whether a file is complete are read; nnU-Net's readers decode the voxels.

Formats: https://teem.sourceforge.net/nrrd/format.html, https://itk.org/Wiki/MetaIO/Documentation
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mfm_nnunet.errors import MFMError

HEADER_BYTES = 1 << 16
"""Longest text header that is read."""

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
_OFFSETS = ("offset", "position", "origin")
_MATRICES = ("transformmatrix", "orientation", "rotation")
"""MetaIO's names for the position of the first voxel, and for the direction of the axes."""
_META_LINE = re.compile(r"([^=:]*)[=:](.*)")
_NRRD_LINE = re.compile(r"(?!#)([^:]*):(?!=)(.*)")
"""``key:=value`` is a program's own key/value pair, not a field."""
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SET_SPACING = "Write the true voxel size in mm into the header."
_GIPL_TYPES = {7: "i1", 8: "u1", 15: "i2", 16: "u2", 31: "u4", 32: "i4", 64: "f4", 65: "f8"}


@dataclass(frozen=True)
class VolumeHeader:
    """Shape (fastest axis first), voxel type, and the position of the voxel data.

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
        """Number of bytes of all voxels, uncompressed."""
        return math.prod(self.shape) * self.dtype.itemsize


def nrrd_header(path: Path) -> VolumeHeader:
    """Return the header of an attached (``.nrrd``) or detached (``.nhdr``) NRRD file."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    end = re.search(rb"\n\r?\n", start)
    text, offset = (start[: end.start()], end.end()) if end else (start, 0)
    fields = _Fields(path, text, _NRRD_LINE)
    sizes = fields.integers("sizes")
    if len(sizes) != fields.integers("dimension")[0]:
        raise refuse(
            "E_HEADER", path, f"dimension {fields.text('dimension')} does not fit sizes {fields.text('sizes')}"
        )
    require_volume(path, sizes)
    kinds = fields.text("kinds").lower()
    if any(kind not in ("domain", "space", "time", "none", "???") for kind in kinds.split()):
        raise refuse("E_DATATYPE", path, f"an axis holds components (kinds: {kinds}), not space")
    dtype = _voxel_dtype(path, _NRRD_TYPES, fields.text("type").lower(), fields.text("endian").lower() == "big")
    encoding = fields.text("encoding").lower()
    if encoding not in ("raw", "gzip", "gz") or fields.integers("lineskip", default="0")[0] != 0:
        raise refuse("E_FORMAT", path, f"encoding '{encoding}' cannot be checked", "Save it with raw or gzip encoding.")
    _require_nrrd_geometry(path, fields, min(len(sizes), 3))
    data_file = path
    if name := fields.text("datafile"):
        data_file, offset = _sibling(path, name), 0
    elif not end:
        raise refuse("E_SHORT_DATA", path, "the file ends within its header", "Copy it again.")
    skip = fields.integers("byteskip", default="0")[0]
    if skip < -1:
        raise refuse("E_HEADER", path, f"the header says 'byte skip: {skip}'; legal are -1, 0 and more")
    if encoding == "raw":
        return VolumeHeader(sizes, dtype, data_file, file_offset=offset + skip if skip >= 0 else -1)
    return VolumeHeader(sizes, dtype, data_file, file_offset=offset, stream_offset=max(skip, 0), compression="gzip")


def _require_nrrd_geometry(path: Path, fields: _Fields, num_axes: int) -> None:
    """Refuse what teem and ITK replace silently: a missing or NaN voxel size by 1, other units by mm."""
    vectors = fields.text("spacedirections")
    if vectors:
        for axis in _vectors(path, "space directions", vectors, num_axes):
            if not any(axis):
                raise refuse("E_SPACING", path, f"an axis has no direction and no voxel size ({vectors})", _SET_SPACING)
    else:
        # The size of further axes, which have one sample, may be unknown.
        _require_spacing(path, fields.numbers("spacings", code="E_SPACING", most=num_axes), num_axes, "spacings")
    if fields.text("spaceorigin", default="none").lower() != "none":
        _vectors(path, "space origin", fields.text("spaceorigin"), 1)
    for name in ("spaceunits", "units"):
        for unit in re.findall(r'"([^"]*)"', fields.text(name)):
            _require_mm(path, unit, "???")


def _vectors(path: Path, name: str, text: str, at_least: int) -> list[tuple[float, ...]]:
    """Parse vectors such as ``(1,0,0) (0,1,0) none``; ``none`` is zeros, and not allowed as the first."""
    found = re.findall(r"none|\([^()]*\)", text)
    vectors: list[tuple[float, ...]] = []
    for vector in found:
        numbers = [] if vector == "none" else [_decimal(part.strip()) for part in vector[1:-1].split(",")]
        if any(number is None for number in numbers):
            raise refuse("E_GEOMETRY", path, f"the header says '{name}: {text}', where not all are numbers")
        vectors.append(tuple(number or 0.0 for number in numbers))
    if len(found) < at_least or re.sub(r"none|\([^()]*\)|\s", "", text):
        raise refuse("E_GEOMETRY", path, f"the header says '{name}: {text}', which are no {at_least} vectors")
    return vectors[:at_least]


def meta_header(path: Path) -> VolumeHeader:
    """Return the header of a MetaImage (``.mha``, or ``.mhd`` with its data file)."""
    with open(path, "rb") as file:
        start = file.read(HEADER_BYTES)
    last = re.search(rb"^[ \t]*ElementDataFile\b[^\n]*(\n)?", start, re.MULTILINE)
    if last is None or (last[1] is None and path.suffix.lower() == ".mha"):
        raise refuse("E_HEADER", path, "the header has no complete line ElementDataFile", "Copy the file again.")
    fields = _Fields(path, start[: last.end()], _META_LINE)
    shape = fields.integers("dimsize")
    if len(shape) != fields.integers("ndims")[0]:
        raise refuse("E_HEADER", path, f"NDims {fields.text('ndims')} does not fit DimSize {fields.text('dimsize')}")
    require_volume(path, shape)
    if fields.integers("elementnumberofchannels", default="1") != (1,):
        number = fields.text("elementnumberofchannels")
        raise refuse("E_DATATYPE", path, f"voxels have {number} components, not one value")
    if not fields.flag("binarydata", default="true"):
        raise refuse("E_FORMAT", path, "the voxels are written as text", "Save the file as binary data.")
    for name, neutral in (("elementtointensityfunctionslope", 1), ("elementtointensityfunctionoffset", 0)):
        if fields.numbers(name, default=str(neutral)) != (neutral,):
            raise refuse(
                "E_HEADER", path, f"the header says '{name} = {fields.text(name)}', which SimpleITK ignores",
                "Save the file with the scaled values and without this line.",
            )  # fmt: skip
    _require_meta_geometry(path, fields, len(shape))
    big = fields.flag("binarydatabyteordermsb", "elementbyteordermsb", default="false")
    dtype = _voxel_dtype(path, _META_TYPES, fields.text("elementtype").removeprefix("MET_"), big)
    return _meta_volume(path, fields, VolumeHeader(shape, dtype, path, file_offset=last.end()))


def _meta_volume(path: Path, fields: _Fields, local: VolumeHeader) -> VolumeHeader:
    """Complete the header with the position of the voxels; ``local`` is the header for voxels that follow it.

    ITK returns random memory if the declared size truncates a compressed stream, and the header's own text as voxels if
    HeaderSize counts from the start of the file.
    """
    name = fields.text("elementdatafile")
    if not name:
        raise refuse("E_HEADER", path, "the header does not say where the voxels are (ElementDataFile)")
    is_local = name.upper() == "LOCAL"
    skip = fields.integers("headersize", default="0")[0]
    zipped = fields.flag("compresseddata", default="false")
    if skip < -1 or (skip > 0 and is_local) or (skip < 0 and zipped):
        raise refuse("E_HEADER", path, f"HeaderSize = {skip} contradicts where the voxels are ({name})")
    header = local if is_local else replace(local, data_file=_sibling(path, name), file_offset=skip)
    if not zipped:
        return header
    present = header.data_file.stat().st_size - header.file_offset
    declared = fields.integers("compresseddatasize", default="0")[0]
    if declared != present and (declared or is_local or skip):
        code = "E_SHORT_DATA" if present < declared else "E_HEADER"
        raise refuse(
            code, path, f"CompressedDataSize is {declared or 'missing'}, but {present} bytes are there",
            "Copy the file again, or save it again with ITK.",
        )  # fmt: skip
    return replace(header, compression="zlib")


def _require_meta_geometry(path: Path, fields: _Fields, num_axes: int) -> None:
    """Refuse what ITK replaces silently: non-numbers by 0, a missing voxel size by 1, other units by mm."""
    for number, names in ((num_axes, _OFFSETS), (num_axes**2, _MATRICES)):
        values = fields.numbers(*names, code="E_GEOMETRY")
        if values and len(values) != number:
            raise refuse(
                "E_GEOMETRY", path, f"the header says '{names[0]} = {fields.text(*names)}', not {number} numbers"
            )
    name = "elementspacing" if fields.text("elementspacing") else "elementsize"
    _require_spacing(path, fields.numbers(name, code="E_SPACING"), num_axes, "ElementSpacing")
    _require_mm(path, fields.text("distanceunits", default="mm"), "?")


def _require_spacing(path: Path, spacing: tuple[float, ...], num_axes: int, name: str) -> None:
    if not spacing:
        raise refuse("E_SPACING", path, f"the header gives no voxel size ({name})", _SET_SPACING)
    if len(spacing) != num_axes or not all(0 < value < math.inf for value in spacing):
        numbers = " ".join(f"{value:g}" for value in spacing)
        raise refuse("E_SPACING", path, f"{name} is {numbers}; {num_axes} positive numbers are needed", _SET_SPACING)


def _require_mm(path: Path, unit: str, unknown: str) -> None:
    """Refuse other units: ITK reads every length in a text header as mm."""
    if unit.strip().lower() not in ("", "mm", "millimeter", "millimeters", unknown):
        raise refuse("E_SPACING", path, f"the header gives lengths in {unit}, which would be read as mm", _SET_SPACING)


def gipl_header(path: Path) -> VolumeHeader:
    """Return the header (256 bytes, big-endian) of a GIPL file."""
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
    _require_spacing(path, struct.unpack(f">{len(shape)}f", start[10 : 10 + 4 * len(shape)]), len(shape), "pixdim")
    return VolumeHeader(tuple(shape), np.dtype(">" + _GIPL_TYPES[code]), path, file_offset=256)


def require_volume(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse anything but 2D or 3D (E_DIM, E_HEADER); trailing axes of length 1 are legal."""
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


class _Fields:
    """Fields of a text header; keys are in lower case, without blanks.

    Programs disagree about which of two lines with one key counts, so a requested key must be unique.
    """

    def __init__(self, path: Path, text: bytes, line: re.Pattern[str]) -> None:
        self.path = path
        self.lines: dict[str, list[str]] = {}
        # File names in a header are raw bytes, so only a line feed ends a line.
        for found in map(line.match, text.decode("utf-8", "surrogateescape").split("\n")):
            if found:
                self.lines.setdefault("".join(found[1].lower().split()), []).append(found[2].strip())

    def text(self, *names: str, default: str = "") -> str:
        """Return the value of a key; ``names`` are its spellings."""
        values = [value for name in names for value in self.lines.get(name, [])]
        if any(len(self.lines.get(name, [])) > 1 for name in names) or len(set(values)) > 1:
            raise refuse("E_HEADER", self.path, f"the header says {names[0]} twice ({', '.join(values)})")
        return values[0] if values else default

    def integers(self, name: str, default: str = "") -> tuple[int, ...]:
        """Return one or more whole numbers."""
        parts = self.text(name, default=default).split()
        if not parts or not all(_INTEGER.fullmatch(part) for part in parts):
            raise refuse("E_HEADER", self.path, f"the header says '{name}: {' '.join(parts)}', which is no number")
        return tuple(map(int, parts))

    def numbers(
        self, *names: str, default: str = "", code: str = "E_HEADER", most: int | None = None
    ) -> tuple[float, ...]:
        """Return the first ``most`` finite numbers; empty for a missing key."""
        text = self.text(*names, default=default)
        numbers = [_decimal(part) for part in text.split()[:most]]
        if any(number is None for number in numbers) or (not numbers and any(name in self.lines for name in names)):
            raise refuse(code, self.path, f"the header says '{names[0]}: {text}', where not all are numbers")
        return tuple(number for number in numbers if number is not None)

    def flag(self, *names: str, default: str) -> bool:
        """Return whether a key is true; the first letter decides, as in MetaIO."""
        text = self.text(*names, default=default)
        if text[:1].lower() not in ("t", "1", "f", "0"):
            raise refuse("E_HEADER", self.path, f"the header says '{names[0]}: {text}', neither true nor false")
        return text[:1].lower() in ("t", "1")


def _decimal(text: str) -> float | None:
    """Return a finite number, or None. ``float`` alone would also accept 1_000 and digits of other scripts."""
    value = float(text) if _DECIMAL.fullmatch(text) else math.nan
    return value if math.isfinite(value) else None


def _voxel_dtype(path: Path, table: dict[str, str], name: str, big_endian: bool) -> np.dtype[Any]:
    if name not in table:
        raise refuse("E_DATATYPE", path, f"voxels have type '{name}'; integers, float32 and float64 can be read")
    return np.dtype((">" if big_endian else "<") + table[name])


def _sibling(path: Path, name: str) -> Path:
    pattern = name.split()[0].upper() == "LIST" or "%" in name
    if pattern or (len(name.split()) > 1 and not (path.parent / name).exists()):
        raise refuse("E_FORMAT", path, f"the voxels are in several files ({name})", "Save the volume as one file.")
    data_file = path.parent / name
    if not data_file.is_file():
        raise refuse("E_NOT_FOUND", path, f"the data file {data_file} is missing", "Copy it beside the header.")
    return data_file


def refuse(code: str, path: Path, reason: str, advice: str = "Export the image again.") -> MFMError:
    """Return the error for a refused file: which file, why, and what to do."""
    return MFMError(code, f"{path}: {reason}. {advice}")
