"""The NIfTI-1 and NIfTI-2 header: what it promises, and whether its statements about the voxel size agree.

Format: https://nifti.nimh.nih.gov
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nibabel import nifti1, nifti2

from mfm_nnunet.data.headers import VolumeHeader, refuse, require_volume

SCALE_TOLERANCE = 1e-3
"""Relative difference between two statements of the voxel size in one header that is rounding and no contradiction."""
_ORDERS: tuple[Literal["<"], Literal[">"]] = ("<", ">")
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
"""Integers of 8 to 64 bit and floats of 32 and 64 bit; no RGB, complex, binary or 128-bit floats."""


def nifti_header(path: Path, start: bytes) -> VolumeHeader:
    """The header of a NIfTI file from the first (decompressed) bytes of it.

    Raises MFMError: E_HEADER, E_DIM, E_DATATYPE, E_SPACING, E_GEOMETRY. Big-endian files, NIfTI-2, trailing axes of
    length 1, a scale factor of 0 or NaN and missing orientations (codes 0) are legal.
    """
    for table, size, magic in ((nifti1.header_dtype, 348, b"n+1"), (nifti2.header_dtype, 540, b"n+2")):
        for order in _ORDERS:
            if len(start) >= size and struct.unpack(order + "i", start[:4])[0] == size:
                fields = np.frombuffer(start[:size], table.newbyteorder(order))[0]
                if fields["magic"][:3] != magic:
                    raise refuse("E_HEADER", path, "is an Analyze file or half of a .hdr/.img pair, not a .nii file")
                return _volume(path, fields, order, size + 4)
    raise refuse("E_HEADER", path, "does not start with a NIfTI header (348 or 540 bytes)")


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
    if not math.isfinite(offset) or (offset != 0 and offset < first_voxel) or offset != int(offset):
        raise refuse("E_HEADER", path, f"the header says the voxels start at byte {offset:g}")
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    if math.isinf(slope) or (math.isfinite(slope) and slope != 0 and not math.isfinite(inter)):
        raise refuse("E_HEADER", path, f"the intensities are scaled by {slope:g} and shifted by {inter:g}")
    if not math.isfinite(slope) or slope == 0:  # not scaled
        slope, inter = 1.0, 0.0
    _require_geometry(path, fields, min(num_axes, 3))
    return VolumeHeader(shape, dtype, path, stream_offset=int(offset) or first_voxel, slope=slope, inter=inter)


def _require_geometry(path: Path, fields: Any, num_axes: int) -> None:
    """A NIfTI header states the voxel size up to three times; a contradiction is never resolved silently."""
    spacing = fields["pixdim"][1 : num_axes + 1].astype(float)
    if not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise refuse("E_SPACING", path, f"the voxel size (pixdim) is {_numbers(spacing)}; it must be positive")
    if fields["qform_code"] > 0:
        names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
        quaternion = np.array([fields[name] for name in names], dtype=float)
        if not np.all(np.isfinite(quaternion)) or np.sum(quaternion[:3] ** 2) > 1 + SCALE_TOLERANCE:
            raise refuse("E_GEOMETRY", path, "the qform is not a rotation", "Set the orientation again.")
    if fields["sform_code"] > 0:
        rows = np.stack([fields["srow_x"], fields["srow_y"], fields["srow_z"]]).astype(float)
        _require_sform(path, rows[:, :num_axes], rows[:, 3], spacing)


def _require_sform(path: Path, axes: np.ndarray, origin: np.ndarray, spacing: np.ndarray) -> None:
    """``axes`` (3, n): the vector of one voxel along each axis; ``spacing``: the voxel size by pixdim."""
    scales = np.linalg.norm(axes, axis=0)
    if not np.all(np.isfinite(axes)) or not np.all(np.isfinite(origin)) or np.any(scales == 0):
        raise refuse("E_GEOMETRY", path, "the sform holds NaN or an axis without direction", "Set the sform again.")
    if np.max(np.abs(scales / spacing - 1)) > SCALE_TOLERANCE:
        raise refuse(
            "E_GEOMETRY",
            path,
            f"the voxel size is {_numbers(spacing)} mm by pixdim but {_numbers(scales)} mm by sform",
            "nnU-Net would use the first and put everything in the wrong place. Decide which is right and save "
            "the file again, e.g. with nibabel: image.header.set_zooms(...) or image.set_sform(...).",
        )
    directions = axes / scales
    cosines = np.abs(directions.T @ directions - np.eye(axes.shape[1]))
    if np.max(cosines) > SCALE_TOLERANCE:
        raise refuse(
            "E_GEOMETRY",
            path,
            f"the axes by sform are not perpendicular (cosine {np.max(cosines):.3g}), as after a gantry tilt",
            "Resample the image onto a grid with perpendicular axes.",
        )


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{value:.6g}" for value in values)
