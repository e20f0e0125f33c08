"""Masks of unlabelled images: where there is anatomy, and which voxels were changed to hide who somebody is.

A mask is 0 or 1, always named and never known by its place in a list, and 0 outside the image: "not anonymised", "no
anatomy". It goes through the crop, transposition and resampling of its image and is never used for normalisation. It is
stored beside the folder of the preprocessed volumes, where nothing that looks for volumes finds it:

* ``<folder>_anonymised/{case}.b2nd``: the mask itself, uint8 (1, D, H, W), because a loss needs all of its voxels;
* ``<folder>_anatomy/{case}.npy``: up to 10,000 of its voxels, int32 (n, 3), because a crop needs a place only.

A case without a mask has no such file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mfm_nnunet.errors import MFMError, unreadable
from mfm_nnunet.files import inside
from mfm_nnunet.images import reading
from mfm_nnunet.images.geometry import difference, geometry_of
from mfm_nnunet.images.integrity import files_of

if TYPE_CHECKING:
    from mfm_nnunet.data.cases import Case

MAX_POINTS = 10_000
"""Voxels of an anatomy mask that are kept: enough places for crops, little to read."""
ENDINGS = {"anonymised": ".b2nd", "anatomy": ".npy"}
"""Kinds of masks, and the endings of their files."""


def mask_file(folder: Path, kind: str, case: str) -> Path:
    """Where the mask of a case lies whose volume is in ``folder``."""
    return inside(folder.with_name(f"{folder.name}_{kind}"), f"{case}{ENDINGS[kind]}")


def masked_cases(folder: Path, kind: str) -> set[str]:
    """The names of the cases in the data folder ``folder`` that have a mask of this kind; one look into a folder."""
    beside = mask_file(folder, kind, "x").parent
    return {file.name.removesuffix(ENDINGS[kind]) for file in beside.glob(f"*{ENDINGS[kind]}")}


def mask_signature(case: Case) -> list[list[Any]]:
    """Size in bytes, time of change in ns and kind of each mask file. Raises MFMError (E_NOT_FOUND, E_PERMISSION)."""
    try:
        status = [(kind, file.stat()) for kind, mask in case.masks.items() for file in files_of(mask, is_label=True)]
    except OSError as error:
        raise unreadable(error.filename, error) from error
    return [[found.st_size, found.st_mtime_ns, kind] for kind, found in status]


def read_masks(
    case: Case, reader_name: str, image_CDHW: np.ndarray, properties: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The masks of a case by kind, boolean (1, D, H, W), True where the file holds more than 0.

    Raises MFMError: as :func:`reading.read_mask`, and E_GEOMETRY for a mask that does not lie on the image's grid.
    """
    masks = {}
    for kind, file in case.masks.items():
        mask_1DHW, own = reading.read_mask(file, reader_name)
        differs = difference(geometry_of(own), geometry_of(properties))
        if mask_1DHW.shape[1:] != image_CDHW.shape[1:]:
            differs = f"{mask_1DHW.shape[1:]} against {image_CDHW.shape[1:]} voxels"
        if differs:
            raise MFMError(
                "E_GEOMETRY",
                f"{file}: the mask does not lie on the grid of its image {case.images[0]}: {differs}. Resample it to "
                "the image, or take it out of the source.",
            )
        masks[kind] = mask_1DHW
    return masks


def anatomy_points(mask_1DHW: np.ndarray) -> np.ndarray:
    """Up to 10,000 voxels of a mask, int32 (n, 3), in the order of the array; the same ones every time."""
    found = np.flatnonzero(mask_1DHW[0])
    if len(found) > MAX_POINTS:
        found = np.sort(np.random.default_rng(0).choice(found, MAX_POINTS, replace=False))
    return np.stack(np.unravel_index(found, mask_1DHW.shape[1:]), axis=1).astype(np.int32)
