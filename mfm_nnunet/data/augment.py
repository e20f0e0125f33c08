"""Spatial augmentation of pretraining crops: parameters are drawn first, so only the needed voxels are read.

Legend: C channels, D H W voxels of the crop (2D crops have H W only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.ndimage

ROTATION_DEGREES = 30.0
SCALE_RANGE = (0.7, 1.4)
PROBABILITY = 0.2
ANISOTROPY = 3.0


@dataclass(frozen=True)
class SpatialParameters:
    """One draw: ``matrix`` maps centred output to centred input voxels (None: identity); a flag per axis for flips."""

    matrix: np.ndarray | None
    flips: tuple[bool, ...]

    def read_size(self, patch_size: Sequence[int]) -> tuple[int, ...]:
        """Voxels per axis that must be read so that the transformed patch is covered."""
        if self.matrix is None:
            return tuple(patch_size)
        # Three voxels around the box feed the cubic spline at its border.
        return tuple(int(np.ceil(extent)) + 6 for extent in np.abs(self.matrix) @ np.asarray(patch_size))


def draw_spatial(rng: np.random.Generator, patch_size: Sequence[int], kind: str) -> SpatialParameters:
    """Draw rotation (up to 30 degrees, p 0.2), isotropic scale 0.7-1.4 (p 0.2) and flips (p 0.5 per axis).

    ``kind``: "spatial", "mirror" (flips only) or "none". In flat patches (more than 3:1) only the plane rotates, as in
    nnU-Net. The draw consumes the same random numbers whatever the outcome.
    """
    num_axes = len(patch_size)
    flips = rng.random(num_axes) < 0.5
    rotates, scales = rng.random(2) < PROBABILITY
    angles = np.deg2rad(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3))
    scale = rng.uniform(*SCALE_RANGE)
    if kind == "none":
        return SpatialParameters(None, (False,) * num_axes)
    matrix: np.ndarray | None = None
    if kind == "spatial" and (rotates or scales):
        matrix = _rotation(angles, patch_size) if rotates else np.eye(num_axes)
        if scales:
            matrix = matrix * scale
            if _is_flat(patch_size):
                matrix[0, 0] = 1.0
    return SpatialParameters(matrix, tuple(bool(flip) for flip in flips))


def apply_spatial(
    crop_CDHW: np.ndarray, parameters: SpatialParameters, patch_size: Sequence[int], order: int = 3
) -> np.ndarray:
    """The patch (C, *patch_size) from a crop of ``parameters.read_size(patch_size)``; 0 outside.

    ``order`` of the spline: 3 for images, 0 (nearest neighbour) for masks.
    """
    if parameters.matrix is not None:
        centre_in = (np.asarray(crop_CDHW.shape[1:]) - 1) / 2
        centre_out = (np.asarray(patch_size) - 1) / 2
        offset = centre_in - parameters.matrix @ centre_out
        crop_CDHW = np.stack(
            [
                scipy.ndimage.affine_transform(channel, parameters.matrix, offset, tuple(patch_size), order=order)
                for channel in crop_CDHW
            ]
        )
    axes = [axis + 1 for axis, flip in enumerate(parameters.flips) if flip]
    return np.ascontiguousarray(np.flip(crop_CDHW, tuple(axes)) if axes else crop_CDHW, dtype=np.float32)


def _is_flat(patch_size: Sequence[int]) -> bool:
    return len(patch_size) == 3 and max(patch_size) / patch_size[0] > ANISOTROPY


def _rotation(angles: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    if len(patch_size) == 2:
        return _plane_rotation(2, 0, 1, angles[0])
    if _is_flat(patch_size):
        return _plane_rotation(3, 1, 2, angles[0])
    return (
        _plane_rotation(3, 1, 2, angles[0]) @ _plane_rotation(3, 0, 2, angles[1]) @ _plane_rotation(3, 0, 1, angles[2])
    )


def _plane_rotation(num_axes: int, first: int, second: int, angle: float) -> np.ndarray:
    matrix = np.eye(num_axes)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix
