"""Masks with the exact geometry of their scan: the scan's NIfTI header is copied, not recomputed.

nnU-Net's writers rebuild the header from spacing, origin and direction, which rounds oblique affines and loses the
q/sform codes and the units. Here the source header is copied byte by byte, and only the fields that describe voxel
values are replaced.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images.nifti import read_start

_TEXT_FIELDS = ("descrip", "aux_file", "db_name", "intent_name")
_VALUE_FIELDS = {"scl_slope": 1, "scl_inter": 0, "cal_max": 0, "cal_min": 0, "intent_code": 0}
_VALUE_FIELDS |= {"intent_p1": 0, "intent_p2": 0, "intent_p3": 0}


def is_nifti(file: Path) -> bool:
    """Check for the file name of a NIfTI file."""
    return file.name.endswith((".nii", ".nii.gz"))


def read_header(file: Path) -> nibabel.Nifti1Header:
    """Return the unmodified header of a NIfTI-1 or NIfTI-2 file (nibabel's loader would repair it)."""
    start = read_start(file)
    for header_class in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        size = header_class.template_dtype.itemsize
        for endianness in "<>":
            if len(start) < size:
                continue
            header = header_class(start[:size], endianness, check=False)
            if int(header["sizeof_hdr"]) == size:
                return header
    raise MFMError("E_HEADER", f"{file}: not a NIfTI file, so its geometry cannot be given to the mask.")


def write_like(mask_XYZ: np.ndarray, header: nibabel.Nifti1Header, target: Path) -> None:
    """Write ``mask_XYZ`` (unsigned integers, voxel order of the source file) with the geometry of ``header``.

    Shape, affines, codes, spacing and units keep their bytes; scaling, display range, intent and free text (which may
    contain a person's name) are reset. Header extensions are not copied. ``target`` is compressed if it ends with .gz.
    """
    shape = tuple(int(size) for size in header.get_data_shape())
    if _without_trailing_ones(mask_XYZ.shape) != _without_trailing_ones(shape):
        raise MFMError(
            "E_GEOMETRY",
            f"{target.name}: the mask has the shape {mask_XYZ.shape}, the scan's header says {shape}, so the header "
            "cannot be the mask's. Export the scan again.",
        )
    copy = type(header)(header.binaryblock, header.endianness, check=False)
    copy.set_data_dtype(mask_XYZ.dtype)
    copy["magic"], copy["vox_offset"] = copy.single_magic, copy.single_vox_offset
    names = copy.template_dtype.names or ()
    for name in _TEXT_FIELDS:
        if name in names:
            copy[name] = b""
    for name, value in _VALUE_FIELDS.items():
        copy[name] = value
    padding = b"\0" * (copy.single_vox_offset - len(copy.binaryblock))
    voxels = mask_XYZ.astype(mask_XYZ.dtype.newbyteorder(copy.endianness), copy=False).tobytes(order="F")
    with open(target, "wb") as file:
        if target.name.endswith(".gz"):
            # No name or time in the stream: the same mask always gives the same file.
            with gzip.GzipFile("", "wb", 4, file, mtime=0) as stream:
                stream.write(copy.binaryblock + padding)
                stream.write(voxels)
        else:
            file.write(copy.binaryblock + padding)
            file.write(voxels)


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
