"""Predicted cases with image, mask and reference."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk

from mfm_nnunet.reports.segmentation import PredictedCase


def make_case(folder: Path, name: str, shift: int = 0, shape: tuple[int, ...] = (12, 30, 40)) -> PredictedCase:
    """A case whose mask is the reference moved by some voxels."""
    rng, reference = np.random.default_rng(0), np.zeros(shape, np.uint8)
    reference[..., 8:14, 10:20], reference[..., 14:20, 10:20] = 1, 2
    if len(shape) == 3:
        reference[[0, 1, -2, -1]] = 0
    arrays = {
        "image": rng.normal(size=shape).astype(np.float32),
        "mask": np.roll(reference, shift, -1),
        "label": reference,
    }
    files = {}
    for kind, array in arrays.items():
        files[kind] = folder / f"{name}_{kind}{'.nii.gz' if len(shape) == 3 else '.png'}"
        if len(shape) == 2:
            scaled = (50 * array + 100).clip(0, 255).astype(np.uint8) if kind == "image" else array
            sitk.WriteImage(sitk.GetImageFromArray(scaled), str(files[kind]))
        else:
            nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([1, 1, 3, 1])), files[kind])
    return PredictedCase(name, files["image"], files["mask"], files["label"])
