"""Position of an image's voxels in space, and the comparison of two images.

Read from the properties of nnU-Net's readers; lengths in mm. Pictures (PNG, TIFF) have only a spacing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import MFMError

SPACING_LIMITS_MM = (1e-3, 100.0)
"""Voxel sizes outside these limits come from a wrong unit or a damaged header."""
SPACING_TOLERANCE = 1e-3
"""Relative difference of two spacings that counts as rounding."""
ORIGIN_TOLERANCE = 0.1
"""Distance of two origins, in units of the smallest voxel edge, that counts as rounding."""
DIRECTION_TOLERANCE = 1e-3
"""Difference of two direction cosines that counts as rounding."""
ANGLE_TOLERANCE = 2e-3
"""Largest cosine between two perpendicular axes whose direction cosines were rounded to three digits."""


@dataclass(frozen=True)
class Geometry:
    """Spacing, origin and direction per spatial axis of the file, in the reader's world coordinates."""

    spacing: np.ndarray
    origin: np.ndarray | None
    direction: np.ndarray | None


def geometry_of(properties: Mapping[str, Any]) -> Geometry:
    """Return the geometry in nnU-Net's properties; pictures have only a spacing.

    Readers do not check the spacing in a file beside a TIFF stack; values that are not numbers become NaN.
    """
    spacing = np.array([_to_float(value) for value in properties["spacing"]])
    if itk := properties.get("sitk_stuff"):
        num_axes = len(itk["spacing"])
        return Geometry(spacing, np.asarray(itk["origin"]), np.reshape(itk["direction"], (num_axes, num_axes)))
    if nibabel := properties.get("nibabel_stuff"):
        affine = np.asarray(nibabel.get("reoriented_affine", nibabel["original_affine"]), dtype=float)
        axes = affine[:3, :3]
        return Geometry(spacing, affine[:3, 3], axes / np.linalg.norm(axes, axis=0))
    return Geometry(spacing, None, None)


def letters_of(properties: Mapping[str, Any]) -> str | None:
    """Return the directions in which the indices of the reader's array (C, D, H, W) grow, e.g. ``SPL``.

    None for pictures, which have no position.
    """
    import nibabel

    direction = geometry_of(properties).direction
    if direction is None or len(direction) != 3:
        return None
    affine = np.eye(4)
    affine[:3, :3] = direction if "nibabel_stuff" in properties else np.diag([-1.0, -1.0, 1.0]) @ direction
    return "".join(nibabel.aff2axcodes(affine))[::-1]


def properties_for(reader_name: str, properties: Mapping[str, Any], num_slices: int = 2) -> dict[str, Any]:
    """Convert nnU-Net's properties of an image to the form of ``reader_name``, if another reader read it.

    The spacing is unchanged, but a picture of one slice has none. The world coordinates of SimpleITK and nibabel differ
    in the sign of the first two. Raises MFMError: E_DIM (a volume for a reader of pictures), E_SPACING (a picture for a
    reader of volumes), E_FORMAT (a reader that turns images).
    """
    if problem := _obstacle(reader_name, properties, num_slices):
        raise MFMError(*problem)
    if reader_name == "NaturalImage2DIO":
        return {"spacing": (999, 1, 1)}
    if reader_name == "Tiff3DIO":
        return {"spacing": list(properties["spacing"])}
    spacing = np.array(properties["spacing"][::-1], dtype=float)
    if reader_name == "SimpleITKIO" and "nibabel_stuff" in properties:
        affine = np.array(properties["nibabel_stuff"]["original_affine"], dtype=float)
        affine[:2] *= -1
        direction = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        place = {"spacing": spacing, "origin": affine[:3, 3], "direction": direction.ravel()}
        return {
            "sitk_stuff": {key: tuple(value.tolist()) for key, value in place.items()},
            "spacing": list(spacing[::-1]),
        }
    if reader_name == "NibabelIO" and (itk := properties.get("sitk_stuff")):
        num_axes = len(itk["spacing"])
        affine = np.eye(4)
        affine[:num_axes, :num_axes] = np.reshape(itk["direction"], (num_axes, num_axes))
        affine[:3, :3] *= spacing
        affine[:num_axes, 3] = itk["origin"]
        affine[:2] *= -1
        return {"nibabel_stuff": {"original_affine": affine}, "spacing": list(spacing[::-1])}
    return dict(properties)


def _obstacle(reader_name: str, properties: Mapping[str, Any], num_slices: int) -> tuple[str, str] | None:
    """Return code and reason if properties cannot be converted for a reader; None if they can."""
    has_place = "sitk_stuff" in properties or "nibabel_stuff" in properties
    if reader_name == "NaturalImage2DIO" and num_slices > 1:
        return "E_DIM", f"this is a volume of {num_slices} slices, and the model or dataset is of flat pictures."
    if reader_name in ("SimpleITKIO", "NibabelIO") and not has_place:
        reason = "this picture has no voxel size in mm, and the other images have. Save it in their format."
        return "E_SPACING", reason
    own = {**properties.get("sitk_stuff", {}), **properties.get("nibabel_stuff", {})}
    if "Reorient" in reader_name and not own.keys() & {"original_orientation", "reoriented_affine"}:
        return "E_FORMAT", f"nnU-Net's {reader_name}, which the plan names, reads NIfTI only. Convert the image."
    return None


def require_sane(file: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Refuse impossible voxel sizes (E_SPACING) and axes that are not perpendicular (E_GEOMETRY)."""
    low, high = SPACING_LIMITS_MM
    is_legal = (geometry.spacing >= low) & (geometry.spacing <= high)
    if len(is_legal) == 3:
        # Ignore the size along an axis of length 1: nnU-Net's readers give a 2D image 999 times the largest spacing.
        is_legal |= (np.array(array.shape[1:]) == 1) & (geometry.spacing > 0) & np.isfinite(geometry.spacing)
    if len(is_legal) != 3 or not np.all(is_legal):
        raise MFMError(
            "E_SPACING",
            f"{file}: the voxel size is {show_numbers(geometry.spacing)} mm; expected {low:g} to {high:g} mm. "
            "Correct the spacing or the unit in the header; for a TIFF stack, in the .json file beside it.",
        )
    if geometry.direction is None or geometry.origin is None:
        return
    gram = geometry.direction.T @ geometry.direction
    if not np.all(np.isfinite(geometry.origin)) or not np.allclose(gram, np.eye(len(gram)), atol=ANGLE_TOLERANCE):
        raise MFMError("E_GEOMETRY", f"{file}: the axes in the header are not perpendicular. Resample the image.")


def difference(one: Geometry, other: Geometry) -> str:
    """Describe how two geometries differ beyond rounding; "" if they agree."""
    if not np.allclose(one.spacing, other.spacing, rtol=SPACING_TOLERANCE, atol=0):
        return (
            f"spacing {show_numbers(one.spacing)} against {show_numbers(other.spacing)} mm "
            f"(tolerance {SPACING_TOLERANCE:g} relative)"
        )
    if one.origin is None or other.origin is None or one.direction is None or other.direction is None:
        return ""
    if one.origin.shape != other.origin.shape:
        return "one is 2D, the other 3D"
    if not np.allclose(one.direction, other.direction, rtol=0, atol=DIRECTION_TOLERANCE):
        largest = np.max(np.abs(one.direction - other.direction))
        return f"direction cosines differ by up to {largest:.4g} (tolerance {DIRECTION_TOLERANCE:g})"
    allowed = ORIGIN_TOLERANCE * float(np.min(other.spacing))
    if np.max(np.abs(one.origin - other.origin)) > allowed:
        return f"origin {show_numbers(one.origin)} against {show_numbers(other.origin)} mm (tolerance {allowed:.4g} mm)"
    return ""


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def show_numbers(values: np.ndarray) -> str:
    return " x ".join(f"{value:.6g}" for value in values)
