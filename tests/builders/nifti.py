"""NIfTI files with any header."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

SPACING = (1.0, 1.5, 2.0)


def save_nifti(path: Path, array: np.ndarray, matrix: np.ndarray | None = None, **fields: Any) -> Path:
    """Write a NIfTI-1 file whose header fields are replaced after everything else was written."""
    image = nibabel.Nifti1Image(array, np.diag([*SPACING, 1]) if matrix is None else matrix, dtype=array.dtype)
    raw = bytearray(image.to_bytes())
    header = np.frombuffer(bytes(raw[:348]), nibabel.nifti1.header_dtype)[0].copy()
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.tobytes()
    path.write_bytes(gzip.compress(bytes(raw), 1, mtime=0) if path.suffix == ".gz" else bytes(raw))
    return path
