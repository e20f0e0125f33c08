"""Parse NIfTI-1 and NIfTI-2 headers, check their consistency, and choose the reader that interprets them correctly.

Format: https://nifti.nimh.nih.gov
"""

from __future__ import annotations

import gzip
import logging
import math
import struct
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from nibabel import nifti1, nifti2
from nibabel.quaternions import quat2mat

from mfm_nnunet.images.geometry import ANGLE_TOLERANCE, Geometry, difference, show_numbers
from mfm_nnunet.images.headers import VolumeHeader, refuse, require_volume

SCALE_TOLERANCE = 1e-3
"""Relative difference between two statements of the voxel size in one header that counts as rounding."""
ITK_TOLERANCE = 0.99e-4
"""ITK accepts a sform whose axes, times their transpose, are the identity to 1e-4 in float32; slightly less is safe."""
NIBABEL_TOLERANCE = 3.5e-7
"""Largest excess over length 1 of a quaternion that nibabel accepts."""
SMALLEST_SLOPE = 1e-15
"""ITK treats a smaller scale factor as missing."""
SAME_PLACE_MM = 1e-6
"""Difference that is below every tolerance, for any voxel size."""
MAX_WARNINGS = 20
_LENGTH_UNITS = {1: "metres", 3: "micrometres"}
"""Codes of xyzt_units that ITK converts to mm and nibabel does not; all others are read as mm."""
_OTHER_READER = {"SimpleITKIO": "NibabelIO", "NibabelIO": "SimpleITKIO"}
LARGEST_CODE = 5
_ORDERS: tuple[Literal["<"], Literal[">"]] = ("<", ">")
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
"""Integers of 8 to 64 bit and floats of 32 and 64 bit; no RGB, complex, binary or 128-bit floats."""


_log = logging.getLogger(__name__)
_warned: set[Path] = set()


class _Start(NamedTuple):
    """Fields of a header as stored, their byte order, and the size of the header in bytes."""

    fields: Any
    order: Literal["<", ">"]
    size: int


def nifti_header(path: Path, start: bytes) -> VolumeHeader:
    """Return the header of a NIfTI file from its first (decompressed) bytes.

    Big-endian files, NIfTI-2, trailing axes of length 1, a scale factor of 0 or NaN and missing orientations (codes 0)
    are legal.
    """
    found = _parse(start)
    if found is None:
        raise refuse("E_HEADER", path, "does not start with a NIfTI header (348 or 540 bytes)")
    if found.fields["magic"][:3] != (b"n+1" if found.size == 348 else b"n+2"):
        raise refuse("E_HEADER", path, "is an Analyze file or half of a .hdr/.img pair, not a .nii file")
    return _volume(path, found.fields, found.order, found.size + 4)


def read_start(path: Path) -> bytes:
    """Return the header bytes of a NIfTI file, decompressed; fewer if the file is shorter.

    Raises OSError, EOFError and zlib.error for files that cannot be opened or decompressed.
    """
    with open(path, "rb") as file:
        start = file.read(nifti2.header_dtype.itemsize)
    if start[:2] != b"\x1f\x8b":
        return start
    with gzip.open(path, "rb") as stream:
        return stream.read(nifti2.header_dtype.itemsize)


def choose_nifti_reader(path: Path, reader_name: str, start: bytes | None = None) -> str:
    """Return ``reader_name``, or nnU-Net's other NIfTI reader if only that one reads the file correctly.

    SimpleITKIO cannot read NIfTI-2 or axes rounded to a few digits. NibabelIO reads exactly three axes, takes every
    length as mm, and refuses a quaternion that is slightly too long. Raises MFMError (E_SPACING) if ``reader_name``
    would read a wrong voxel size and the other cannot read the file. If the file is not NIfTI, ``reader_name`` is
    returned and the gate reports the problem. ``start`` are the first bytes, if known.
    """
    found = _parse_file(path) if start is None else _parse(start)
    if found is None or _is_able(found, reader_name):
        return reader_name
    other = _OTHER_READER.get(reader_name)
    if other and _is_able(found, other):
        return other
    if "Nibabel" in reader_name and (unit := _length_unit(found)):
        raise refuse(
            "E_SPACING", path, f"the header has lengths in {unit} (xyzt_units), but nnU-Net's {reader_name} reads mm",
            "Write the voxel size and the orientation in mm.",
        )  # fmt: skip
    return reader_name


def contradiction(start: bytes) -> str:
    """Describe how the qform and sform in a header disagree about the position; "" if they do not."""
    found = _parse(start)
    if found is None:
        return ""
    fields = found.fields
    if fields["qform_code"] <= 0 or fields["sform_code"] <= 0:
        return ""
    num_axes = min(int(fields["dim"][0]), 3)
    spacing = fields["pixdim"][1 : num_axes + 1].astype(float)
    rows, vector = _sform_rows(fields), _quaternion(fields)
    real = math.sqrt(max(1 - float(np.sum(vector**2)), 0))
    rotation = quat2mat([real, *vector])
    rotation[:, 2] *= -1 if fields["pixdim"][0] < 0 else 1
    offset = np.array([fields[f"qoffset_{letter}"] for letter in "xyz"], dtype=float)
    if np.all(np.abs(np.c_[rotation * fields["pixdim"][1:4], offset] - rows) <= SAME_PLACE_MM):
        return ""  # the usual case, and faster than the comparison below
    axes = rows[:, :num_axes] / np.linalg.norm(rows[:, :num_axes], axis=0)
    return difference(Geometry(spacing, offset, rotation[:, :num_axes]), Geometry(spacing, rows[:, 3], axes))


def warn_of_contradiction(path: Path, words: str) -> None:
    """Log the :func:`contradiction` in a header, if any, once per file."""
    if not words or path in _warned or len(_warned) == MAX_WARNINGS:
        return
    _warned.add(path)
    _log.warning(
        "%s: qform and sform contradict each other: %s. Masks keep both; programs that use the other one show image "
        "and mask elsewhere, or mirrored.%s",
        path, words, " No more files are named." if len(_warned) == MAX_WARNINGS else "",
    )  # fmt: skip


def _parse(start: bytes) -> _Start | None:
    for table in (nifti1.header_dtype, nifti2.header_dtype):
        size = table.itemsize
        for order in _ORDERS:
            if len(start) >= size and struct.unpack(order + "i", start[:4])[0] == size:
                return _Start(np.frombuffer(start[:size], table.newbyteorder(order))[0], order, size)
    return None


def _parse_file(path: Path) -> _Start | None:
    try:
        return _parse(read_start(path)) if path.is_file() else None
    except (OSError, EOFError, ValueError, zlib.error):
        return None


def _is_able(found: _Start, reader_name: str) -> bool:
    if "SimpleITK" in reader_name:
        return found.size == nifti1.header_dtype.itemsize and not _is_rounded(found)
    if "Nibabel" not in reader_name:
        return True
    fields = found.fields
    uses_quaternion = fields["qform_code"] > 0 and fields["sform_code"] <= 0
    is_long = uses_quaternion and np.sum(_quaternion(fields) ** 2) > 1 + NIBABEL_TOLERANCE
    return fields["dim"][0] == 3 and not _length_unit(found) and not is_long


def _is_rounded(found: _Start) -> bool:
    """Return whether ITK refuses the axes although they are perpendicular up to rounding.

    Programs that write direction cosines with three digits make such files. If there is a qform, ITK uses that.
    """
    fields = found.fields
    if fields["sform_code"] <= 0 or fields["qform_code"] > 0 or fields["dim"][0] < 3:
        return False
    axes = _sform_rows(fields)[:, :3].astype(np.float32)
    with np.errstate(all="ignore"):
        directions = axes / np.linalg.norm(axes, axis=0)
        rows = float(np.max(np.abs(directions @ directions.T - np.eye(3))))
        columns = float(np.max(np.abs(directions.T @ directions - np.eye(3))))
    return rows > ITK_TOLERANCE and columns <= ANGLE_TOLERANCE


def _length_unit(found: _Start) -> str:
    return _LENGTH_UNITS.get(int(found.fields["xyzt_units"]) & 7, "")


def _sform_rows(fields: Any) -> np.ndarray:
    return np.stack([fields["srow_x"], fields["srow_y"], fields["srow_z"]]).astype(float)


def _quaternion(fields: Any) -> np.ndarray:
    return np.array([fields[f"quatern_{letter}"] for letter in "bcd"], dtype=float)


def _volume(path: Path, fields: Any, order: str, first_voxel: int) -> VolumeHeader:
    num_axes = int(fields["dim"][0])
    if not 1 <= num_axes <= 7:
        raise refuse("E_HEADER", path, f"the header says {num_axes} axes, legal are 1 to 7")
    shape = tuple(int(n) for n in fields["dim"][1 : num_axes + 1])
    require_volume(path, shape)
    code = int(fields["datatype"])
    if code not in _TYPES:
        raise refuse("E_DATATYPE", path, f"voxels have NIfTI type {code}; integers, float32 and float64 can be read")
    dtype = np.dtype(order + _TYPES[code])
    if int(fields["bitpix"]) != 8 * dtype.itemsize:
        raise refuse("E_HEADER", path, f"the header says {fields['bitpix']} bits per voxel for type {dtype.name}")
    offset = float(fields["vox_offset"])
    if not math.isfinite(offset) or offset < first_voxel or offset != int(offset):
        raise refuse("E_HEADER", path, f"the header says the voxels start at byte {offset:g}")
    slope, inter = _scaling(path, float(fields["scl_slope"]), float(fields["scl_inter"]))
    _require_geometry(path, fields, min(num_axes, 3))
    return VolumeHeader(shape, dtype, path, stream_offset=int(offset), slope=slope, inter=inter)


def _scaling(path: Path, slope: float, inter: float) -> tuple[float, float]:
    """Return slope and intercept; refuse an intercept without a slope: ITK adds it to integers, nibabel does not."""
    is_scaled = math.isfinite(slope) and slope != 0
    if is_scaled and abs(slope) >= SMALLEST_SLOPE and math.isfinite(inter):
        return slope, inter
    if is_scaled or math.isinf(slope) or (math.isfinite(inter) and inter != 0):
        raise refuse(
            "E_HEADER", path, f"the intensities are scaled by {slope:g} and shifted by {inter:g}",
            "Set scl_slope to 1, or scl_slope and scl_inter to 0, whichever is right.",
        )  # fmt: skip
    return 1.0, 0.0


def _require_geometry(path: Path, fields: Any, num_axes: int) -> None:
    """Refuse a header whose statements of the voxel size (up to three) contradict each other."""
    spacing = fields["pixdim"][1 : num_axes + 1].astype(float)
    if not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise refuse("E_SPACING", path, f"the voxel size (pixdim) is {show_numbers(spacing)}; it must be positive")
    for name in ("qform_code", "sform_code"):
        if not 0 <= fields[name] <= LARGEST_CODE:
            # ITK uses the form with any code; nibabel treats an unknown code as 0.
            raise refuse("E_HEADER", path, f"{name} is {fields[name]}; legal are 0 to {LARGEST_CODE}")
    if fields["qform_code"] > 0:
        quaternion = np.append(_quaternion(fields), [fields[f"qoffset_{letter}"] for letter in "xyz"])
        if not np.all(np.isfinite(quaternion)) or np.sum(quaternion[:3] ** 2) > 1 + SCALE_TOLERANCE:
            raise refuse("E_GEOMETRY", path, "the qform is not a rotation", "Set the orientation again.")
        if fields["pixdim"][0] < 0 and fields["pixdim"][0] != -1:  # ITK mirrors the image, nibabel does not
            raise refuse("E_GEOMETRY", path, f"qfac (pixdim[0]) is {fields['pixdim'][0]:g}; legal are 1 and -1")
    if fields["sform_code"] > 0:
        rows = _sform_rows(fields)
        _require_sform(path, rows[:, :num_axes], rows[:, 3], spacing)


def _require_sform(path: Path, axes: np.ndarray, origin: np.ndarray, spacing: np.ndarray) -> None:
    """Check ``axes`` (3, n), the vector of one voxel along each axis, against ``spacing``, the size by pixdim."""
    scales = np.linalg.norm(axes, axis=0)
    if not np.all(np.isfinite(axes)) or not np.all(np.isfinite(origin)) or np.any(scales == 0):
        raise refuse("E_GEOMETRY", path, "the sform holds NaN or an axis without direction", "Set the sform again.")
    if np.max(np.abs(scales / spacing - 1)) > SCALE_TOLERANCE:
        raise refuse(
            "E_GEOMETRY",
            path,
            f"the voxel size is {show_numbers(spacing)} mm by pixdim but {show_numbers(scales)} mm by sform",
            "nnU-Net would use the first and put everything in the wrong place. Decide which is right and save "
            "the file again, e.g. with nibabel: image.header.set_zooms(...) or image.set_sform(...).",
        )
    directions = axes / scales
    cosines = np.abs(directions.T @ directions - np.eye(axes.shape[1]))
    if np.max(cosines) > ANGLE_TOLERANCE:
        raise refuse(
            "E_GEOMETRY",
            path,
            f"the axes by sform are not perpendicular (cosine {np.max(cosines):.3g}), as after a gantry tilt",
            "Resample the image onto a grid with perpendicular axes.",
        )
