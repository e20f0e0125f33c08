"""Write masks and probabilities atomically. Legend: K classes or regions; D H W voxels."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mfm_nnunet.data.storage import staging
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import disk_full, report_full_disk, sync, sync_folder
from mfm_nnunet.prediction import geometry
from mfm_nnunet.prediction.logits import logits_to_mask, logits_to_probabilities

logger = logging.getLogger(__name__)


def write_case(
    logits_KDHW: torch.Tensor,
    properties: dict,
    managers: tuple[PlansManager, ConfigurationManager, LabelManager],
    target_truncated: Path,
    file_ending: str,
    *,
    header: nibabel.Nifti1Header | None = None,
    save_probabilities: bool = False,
) -> None:
    """Write a case's mask and, on request, nnU-Net's ``.npz`` and ``.pkl`` next to it (for its ensembling).

    ``target_truncated`` is the mask's path without its ending. ``header`` is the scan's NIfTI header, which is copied
    to the mask; without it nnU-Net's writer is used. Raises MFMError (E_DISK_FULL, E_GEOMETRY), and E_CONFIG if
    nnU-Net's writer class changes the labels.
    """
    if save_probabilities:
        mask, probabilities = logits_to_probabilities(logits_KDHW, properties, *managers)
        with report_full_disk(target_truncated, 1):
            np.savez_compressed(f"{target_truncated}.npz", probabilities=probabilities)
            save_pickle(properties, f"{target_truncated}.pkl")
    else:
        mask = logits_to_mask(logits_KDHW, properties, *managers)
    write_mask(mask, properties, managers[0], Path(f"{target_truncated}{file_ending}"), header)


def write_mask(
    mask_DHW: np.ndarray,
    properties: dict,
    plans_manager: PlansManager,
    target: Path,
    header: nibabel.Nifti1Header | None = None,
) -> None:
    """Write a mask, in the axes of nnU-Net's reader, to ``target``.

    ``target`` is not replaced atomically: pass a file in a folder of :func:`staging`.
    """
    writer = plans_manager.image_reader_writer_class()
    with report_full_disk(target, mask_DHW.nbytes):
        if header is not None and geometry.is_nifti(target):
            # nnU-Net's writer restores the file's voxel order; the header is then replaced by the source's own.
            plain = target.with_name(".voxels.nii")  # cannot be the name of a case, and is shorter than any
            writer.write_seg(mask_DHW, str(plain), properties)
            voxels_XYZ = np.asarray(nibabel.load(plain).dataobj.get_unscaled())  # type: ignore[attr-defined]
            if not _same_counts(voxels_XYZ.T, mask_DHW):
                raise MFMError(
                    "E_CONFIG",
                    f"{target.name}: nnU-Net's {type(writer).__name__} does not write the labels as they are (largest: "
                    f"{mask_DHW.max()}). A model with labels above 255 needs another image_reader_writer in its plan.",
                )
            geometry.write_like(voxels_XYZ, header, target)
            plain.unlink()
        else:
            writer.write_seg(mask_DHW, str(target), properties)
            written, _ = writer.read_seg(str(target))
            if not np.array_equal(written.reshape(mask_DHW.shape), mask_DHW):
                raise OSError(errno.EIO, f"{target} reads back with other values than were written")


def _same_counts(one: np.ndarray, other: np.ndarray) -> bool:
    """Check that two masks, whose axes may differ, have equal voxel counts per label; by planes, to save memory."""
    counts = np.zeros((2, int(max(one.max(), other.max())) + 1), np.int64)
    for row, mask in zip(counts, (one, other)):
        for plane in mask:
            row += np.bincount(plane.ravel(), minlength=len(row))
    return np.array_equal(*counts)


def export_validation_case(
    logits_KDHW: torch.Tensor,
    properties: dict,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict,
    target_truncated: Path,
    save_probabilities: bool = False,
) -> None:
    """Write the mask of a preprocessed case atomically, like nnU-Net's own export (there is no source header).

    ``target_truncated`` is the mask's path without its ending. Raises MFMError (E_DISK_FULL).
    """
    target = Path(target_truncated)
    managers = (plans_manager, configuration_manager, plans_manager.get_label_manager(dataset_json))
    with staging(target.parent) as stage:
        ending = dataset_json["file_ending"]
        write_case(
            logits_KDHW.cpu(), properties, managers, stage / target.name, ending, save_probabilities=save_probabilities
        )
        publish(stage, target.parent)


def publish(stage: Path, folder: Path) -> None:
    """Move the files in ``stage`` to their final place atomically: flush to disk, then rename."""
    files = sorted(stage.iterdir())
    with report_full_disk(folder, 1):
        for file in files:
            sync(file)
        for file in files:
            os.replace(file, folder / file.name)
    sync_folder(folder)


def require_space(target: Path, properties: dict) -> None:
    """Raise MFMError (E_DISK_FULL) if a case's mask will not fit on the disk, before it is computed."""
    if shutil.disk_usage(target.parent).free < math.prod(properties["shape_before_cropping"]):
        raise disk_full(target)
