"""Images in the planes of the body: axial, coronal and sagittal slices in radiological view, with true proportions.

Arrays here have the axes (S, P, L): indices grow towards superior, posterior and the patient's left. Slices have their
first row on top; the patient's left is on the right. Pictures and single slices without a position are shown as they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mfm_nnunet.files import ending_of

PICTURES = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")
"""Endings of images without a length unit."""
PLANES = (("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI"))
"""Name of the plane by the axis that is cut, and the letters at its left, right, top and bottom edge."""
_OPPOSITE = {"I": "S", "A": "P", "R": "L"}
_AXES = "SPL"


@dataclass(frozen=True)
class OrientedImage:
    """An image (S, P, L), or (H, W) as it is, with the size of its voxels; in mm if ``has_mm``, else 1."""

    voxels: np.ndarray
    spacing: tuple[float, ...]
    has_mm: bool = True

    @property
    def voxel_size(self) -> float:
        """OrientedImage of a voxel in ml, area of a pixel in mm², or 1 without a length unit."""
        size = float(np.prod(self.spacing))
        return size / 1000 if self.has_mm and len(self.spacing) == 3 else size

    @property
    def unit(self) -> str:
        """Unit of :attr:`voxel_size`."""
        if not self.has_mm:
            return "voxels" if len(self.spacing) == 3 else "pixels"
        return "ml" if len(self.spacing) == 3 else "mm²"


@dataclass(frozen=True)
class Plane:
    """Plane through a volume: ``axis`` and ``index``; ``axis`` -1 is a flat image as a whole."""

    axis: int
    index: int = 0
    num_slices: int = 1

    @property
    def name(self) -> str:
        """Name of the plane and number of the slice; "" for a flat image."""
        if self.axis < 0:
            return ""
        return f"{PLANES[self.axis][0]}, slice {self.index + 1} of {self.num_slices}"

    @property
    def letters(self) -> str:
        """Letters at the left, right, top and bottom edge."""
        return "" if self.axis < 0 else PLANES[self.axis][1]

    def cut(self, voxels: np.ndarray) -> np.ndarray:
        """Return the slice, its first row on top."""
        if self.axis < 0:
            return voxels
        slice_HW = voxels.take(self.index, self.axis)
        return slice_HW if self.axis == 0 else slice_HW[::-1]  # superior is up

    def pixel(self, spacing: Sequence[float]) -> tuple[float, float]:
        """Return height and width of a pixel."""
        height, width = (size for axis, size in enumerate(spacing) if axis != self.axis)
        return height, width


def read_oriented(file: Path | Sequence[Path], is_label: bool = False) -> OrientedImage:
    """Read an image, or the sorted slices of a DICOM series; colours become grey.

    Raises RuntimeError (SimpleITK) for a file that is not an image.
    """
    import SimpleITK as sitk

    image = sitk.ReadImage(str(file) if isinstance(file, Path) else [str(name) for name in file])
    array, spacing = sitk.GetArrayViewFromImage(image), image.GetSpacing()[::-1]
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = array[..., 0] if is_label else array.mean(-1)
    is_exact = not is_label or array.dtype.kind in "iu"
    array = np.array(array) if is_exact else np.rint(array).astype(np.int32)
    if image.GetDimension() == 3:
        name = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
        array, spacing = reorient(array, name[::-1], spacing)
    return OrientedImage(
        *_without_single(array, spacing), not isinstance(file, Path) or ending_of(file) not in PICTURES
    )


def reorient(
    array: np.ndarray, directions: Sequence[str], spacing: Sequence[float]
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return a view (S, P, L) of an array (D, H, W) and its spacing; ``directions`` are letters such as ``IAR``."""
    letters = [_OPPOSITE.get(letter, letter) for letter in directions]
    order = [letters.index(letter) for letter in _AXES]
    turned = tuple(axis for axis, old in enumerate(order) if directions[old] in _OPPOSITE)
    return np.flip(array.transpose(order), turned), tuple(float(spacing[old]) for old in order)


def _without_single(array: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Reduce a volume of one slice to the slice, its first row on top."""
    if array.ndim == 3 and 1 in array.shape:
        plane = Plane(array.shape.index(1))
        return plane.cut(array), plane.pixel(spacing)
    return array, tuple(float(size) for size in spacing)


def choose_planes(shape: Sequence[int], mask: np.ndarray | None = None) -> list[Plane]:
    """Choose three planes through the largest cross-section of ``mask``, or through the middle; one for flat images."""
    if len(shape) == 2:
        return [Plane(-1)]
    middles = [size // 2 for size in shape]
    if mask is not None and mask.any():
        middles = [largest_cross_section(mask, axis) for axis in range(3)]
    return [Plane(axis, index, shape[axis]) for axis, index in enumerate(middles)]


def largest_cross_section(mask: np.ndarray, axis: int) -> int:
    """Find the slice along ``axis`` with most voxels of ``mask``, or one nearer to the middle with nearly as many."""
    counts, middle = mask.sum(axis=tuple(other for other in range(mask.ndim) if other != axis)), mask.shape[axis] // 2
    if counts.min() >= counts.max() / 2:  # e.g. a block of tissue: its border is no better than its middle
        return middle
    large = np.flatnonzero(counts >= 0.9 * counts.max())
    return int(large[np.abs(large - middle).argmin()])
