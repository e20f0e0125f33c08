"""Predict one image in memory: an array, a SimpleITK or a nibabel image. It passes the same checks as a file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import read_json
from mfm_nnunet.requests import PredictRequest

NIFTI, VOLUMES = (".nii.gz", ".nii"), (".nii.gz", ".nii", ".nrrd", ".mha")
"""Endings of the files in which an image can be handed over."""
VOXELS = ("uint8", "int16", "uint16", "int32", "float32", "float64")
"""Voxel types of all these formats; others become float32."""
NAME = "image"


def predict_image(request: PredictRequest, predict: Callable[[PredictRequest], Any], model_folder: Path) -> Any:
    """Return the mask of ``request.input_folder``, an image in memory, in the same form and place.

    ``predict`` predicts a folder. Raises MFMError: E_CONFIG for a kind of image that is not known, an array without
    spacing, or a model that does not return masks of volumes; and those of :func:`mfm_nnunet.predict`.
    """
    image = request.input_folder
    ending = str(read_json(model_folder / "dataset.json", "Give a model folder.", "E_MODEL_CORRUPT").get("file_ending"))
    if ending not in (NIFTI if isinstance(image, nibabel.spatialimages.SpatialImage) else VOLUMES):
        raise MFMError("E_CONFIG", f"this model reads {ending} files: predict a folder of them instead of an image.")
    with tempfile.TemporaryDirectory(prefix="mfm_image_") as folder:
        source, output = Path(folder) / "images", Path(folder) / "masks"
        source.mkdir()
        for number, channel in enumerate(_channels(image, request.spacing)):
            _write_channel(channel, source / f"{NAME}_{number:04d}{ending}")
        report = predict(replace(request, input_folder=source, output_folder=output, spacing=None, report=False))
        if report.failures:
            failure = report.failures[0]
            raise MFMError(failure.code, failure.reason.replace(f"{source}/", ""))
        file = output / f"{NAME}{ending}"
        if request.dry_run or not file.is_file():
            return report
        return _read_mask(file, image)


def _channels(image: Any, spacing: Sequence[float] | None) -> list[Any]:
    """Return each channel as an image of SimpleITK or nibabel."""
    if isinstance(image, np.ndarray):
        if spacing is None or image.ndim not in (3, 4) or len(spacing) != 3:
            raise MFMError("E_CONFIG", "an array (Z, Y, X) or (C, Z, Y, X) needs spacing=(Z, Y, X), in mm.")
        channels = [sitk.GetImageFromArray(_with_legal_voxels(array)) for array in image.reshape(-1, *image.shape[-3:])]
        for channel in channels:
            channel.SetSpacing([float(length) for length in spacing[::-1]])
        return channels
    if spacing is not None:
        raise MFMError("E_CONFIG", "spacing: the image has its own. Leave it out.")
    if isinstance(image, sitk.Image):
        count = image.GetNumberOfComponentsPerPixel()
        return [sitk.VectorIndexSelectionCast(image, number) for number in range(count)] if count > 1 else [image]
    if isinstance(image, nibabel.spatialimages.SpatialImage):
        voxels = _with_legal_voxels(np.asanyarray(image.dataobj))
        if voxels.ndim == 3:
            voxels = voxels[..., None]
        return [nibabel.Nifti1Image(voxels[..., number], image.affine) for number in range(voxels.shape[-1])]
    raise MFMError("E_CONFIG", f"{type(image).__name__}: give a folder, an array, or an image of SimpleITK or nibabel.")


def _with_legal_voxels(voxels: np.ndarray) -> np.ndarray:
    return voxels if voxels.dtype.name in VOXELS else voxels.astype(np.float32)


def _write_channel(channel: Any, file: Path) -> None:
    if isinstance(channel, sitk.Image):
        sitk.WriteImage(channel, str(file))
    else:
        nibabel.save(channel, file)


def _read_mask(file: Path, like: Any) -> Any:
    if isinstance(like, nibabel.spatialimages.SpatialImage):
        loaded = nibabel.Nifti1Image.from_filename(file)
        return nibabel.Nifti1Image(np.asanyarray(loaded.dataobj), loaded.affine, loaded.header)
    mask = sitk.ReadImage(str(file))
    return sitk.GetArrayFromImage(mask) if isinstance(like, np.ndarray) else mask
