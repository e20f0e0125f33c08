"""Masks among scans: recognised by their names when a folder is registered, by their values when an image is read."""

from __future__ import annotations

import re
from pathlib import Path, PurePath

import numpy as np

from mfm_nnunet.data.cases import stem_of
from mfm_nnunet.errors import MFMError

_WORDS = r"(?:masks?|segs?|segmentations?|labels?|labelmaps?|gt|ground[_ -]?truths?|annotations?)"
_STEM = re.compile(rf"(?:.*[_\-. ])?{_WORDS}(?:[_\-. ]?\d+)?", re.IGNORECASE | re.DOTALL)
_FOLDER = re.compile(rf"(?:.*[_\-. ])?{_WORDS}(?:[_\-. ]?(?:tr|ts|\d+))?", re.IGNORECASE | re.DOTALL)
_WITHOUT = re.compile(r"(?:^|[_\-. ])(?:no|non|without)[_\-. ]", re.IGNORECASE)

FEW_VALUES = 20
"""An image of at most so many whole numbers, the smallest of them 0, is a mask. Real scans of 8 bits have over 100."""
MOST_LABELS = 256
SMOOTH = 0.85
"""With up to ``MOST_LABELS`` whole numbers it is a mask where so large a part of its voxels equals the next one.

In label maps it is 0.9 and more, in ultrasound of 8 bits, the smoothest of the scans that were measured, 0.6.
"""
_SAMPLE = 1 << 18
"""Voxels that decide about nearly every scan; only what looks like a mask in these is looked at as a whole."""


def is_named_mask(relative: PurePath) -> bool:
    """Return whether the name of an image, or of a folder above it, says that it is a mask and no scan.

    ``relative`` is its path below the source: ``masks/a.nii.gz``, ``labelsTr/a.nii.gz``, ``a_seg.nii.gz``,
    ``p1/segmentation.nii.gz``, ``label0001.nii.gz``. Names such as ``no_mask`` say the opposite.
    """
    names = [(_FOLDER, folder) for folder in relative.parts[:-1]] + [(_STEM, stem_of(relative))]
    return any(pattern.fullmatch(name) and not _WITHOUT.search(name) for pattern, name in names)


def require_scan(file: Path, image_CDHW: np.ndarray) -> None:
    """Raise MFMError (E_MASK) for an image of a corpus whose values are those of a mask or label map."""
    lines = image_CDHW.reshape(-1, image_CDHW.shape[-1])
    sample = lines[:: max(1, lines.size // _SAMPLE)]
    if _count_labels(sample) and (number := _count_labels(lines)):
        raise MFMError(
            "E_MASK",
            f"{file}: is a mask and no scan: its voxels hold {number} whole numbers from 0 on. Take it out of the "
            "source.",
        )


def _count_labels(lines: np.ndarray) -> int:
    """The number of different values of a label map; 0 for a scan."""
    if lines.min() != 0 or not (lines == np.rint(lines)).all():
        return 0
    number = len(np.unique(lines))
    if number <= FEW_VALUES:
        return number
    before, after = lines[:, :-1], lines[:, 1:]
    is_inside = after != 0
    is_smooth = np.count_nonzero((before == after) & is_inside) >= SMOOTH * np.count_nonzero(is_inside)
    return number if number <= MOST_LABELS and is_smooth else 0
