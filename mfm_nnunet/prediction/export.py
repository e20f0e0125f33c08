"""From logits to files: masks like nnU-Net's, voxel for voxel, with the geometry of their scan, written atomically.

Legend: K classes or regions; D H W voxels, in the plan's axis order until the mask is done.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import itertools
import math
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mfm_nnunet.data.resampling import resample_image
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import disk_full, report_full_disk, sync, sync_folder
from mfm_nnunet.images.nifti import read_start

Managers = tuple[PlansManager, ConfigurationManager, LabelManager]
"""nnU-Net's views of a plan, one of its configurations and the labels."""
VOXELS_AT_ONCE = 1 << 20
"""Number of close voxels computed together; bounds the memory."""


# From logits to a mask


def logits_to_mask(logits_KDHW: torch.Tensor, properties: dict[str, Any], managers: Managers) -> np.ndarray:
    """Return the mask on the original image's grid, in the reader's axes; uint8, or uint16 for many labels.

    ``logits_KDHW`` are on the plan's grid and the CPU; ``properties`` come from preprocessing.
    """
    plans_manager, _, label_manager = managers
    resampled = ResampledLogits(logits_KDHW, properties, managers)
    decide = _paint_regions if label_manager.has_regions else _argmax
    return _uncrop(decide(resampled, label_manager), properties).transpose(plans_manager.transpose_backward)


def logits_to_probabilities(
    logits_KDHW: torch.Tensor, properties: dict[str, Any], managers: Managers
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of :func:`logits_to_mask` and the probabilities (K, D, H, W) float32 on the same grid.

    All classes are resampled at once with nnU-Net's own function, so both equal stock nnU-Net's bit for bit. The mask
    is computed from the probabilities, as nnU-Net does when it saves them.
    """
    plans_manager, configuration_manager, label_manager = managers
    resampled = configuration_manager.resampling_fn_probabilities(logits_KDHW.numpy(), *_grid(properties, managers))
    probabilities = label_manager.apply_inference_nonlin(resampled)
    labels = label_manager.convert_probabilities_to_segmentation(probabilities).numpy().astype(_dtype(label_manager))
    mask = _uncrop(labels, properties).transpose(plans_manager.transpose_backward)
    probabilities = label_manager.revert_cropping_on_probabilities(
        probabilities, properties["bbox_used_for_cropping"], properties["shape_before_cropping"]
    ).numpy()
    return mask, probabilities.transpose([0, *(axis + 1 for axis in plans_manager.transpose_backward)])


class ResampledLogits:
    """Logits on the image's cropped grid, one class at a time, in float32 with nnU-Net's rounding to half precision.

    nnU-Net interpolates in float64 before it rounds. Our separable interpolation, which needs memory for one class
    only, differs by 1e-15, so about one in two thousand of the values between two half-precision numbers rounds
    otherwise. Voxels whose two best classes are that close are computed again (:meth:`exactly`).
    """

    def __init__(self, logits_KDHW: torch.Tensor, properties: dict[str, Any], managers: Managers) -> None:
        configuration_manager = managers[1]
        self.logits_KDHW = logits_KDHW.numpy()
        self.grid = _grid(properties, managers)
        self.stock = configuration_manager.resampling_fn_probabilities
        settings = configuration_manager.configuration
        kwargs = dict(settings["resampling_fn_probabilities_kwargs"])
        separate = determine_do_sep_z_and_axis(kwargs.get("force_separate_z", False), *self.grid[1:])
        self.slice_axis: int | None = separate[1] if separate[0] else None
        self.kwargs = {"force_separate_z": False, **kwargs}
        is_linear = kwargs.get("order", 3) == 1 and not kwargs.get("is_seg", False) and kwargs.get("order_z", 0) == 0
        is_ours = settings["resampling_fn_probabilities"] == "resample_data_or_seg_to_shape" and is_linear
        is_same = self.logits_KDHW.shape[1:] == tuple(self.grid[0])
        self.is_fast = is_ours and not is_same and set(kwargs) <= {"is_seg", "order", "order_z", "force_separate_z"}
        """True if values may be off by one step of half precision; :meth:`exactly` gives nnU-Net's own."""

    def __len__(self) -> int:
        return len(self.logits_KDHW)

    def __getitem__(self, k: int) -> np.ndarray:
        """Return the logits (D, H, W) of class ``k``."""
        channel = self.logits_KDHW[k : k + 1]
        if not self.is_fast:
            return np.array(self.stock(channel, *self.grid)[0], np.float32)
        return self._rounded(resample_image(channel.astype(np.float64), *self.grid, **self.kwargs)[0])

    def exactly(self, k: int, at: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the logits (V,) of class ``k`` at the voxels ``at``, computed like nnU-Net."""
        sizes = zip(self.logits_KDHW.shape[1:], self.grid[0], at)
        neighbours = [_neighbours(n, m, index, axis == self.slice_axis) for axis, (n, m, index) in enumerate(sizes)]
        channel = self.logits_KDHW[k].astype(np.float64)
        values = np.zeros(len(at[0]))
        # Corners and products are in the order of SciPy's zoom, so the result is identical to the last bit.
        for corner in itertools.product(*neighbours):
            term = channel[tuple(index for index, _ in corner)]
            for _, weight in corner:
                term = term * weight
            values += term
        return self._rounded(values)

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        return values.astype(self.logits_KDHW.dtype).astype(np.float32)


def _argmax(resampled: ResampledLogits, label_manager: LabelManager) -> np.ndarray:
    """Return the class with the largest logit; among equal ones the first, like np.argmax."""
    best = resampled[0]
    second = np.full_like(best, -np.inf)
    labels = np.zeros(best.shape, _dtype(label_manager))
    for k in range(1, len(resampled)):
        channel = resampled[k]
        if resampled.is_fast:
            np.maximum(second, np.minimum(best, channel), out=second)
        better = channel > best
        np.copyto(best, channel, where=better)
        labels[better] = k
    if resampled.is_fast:
        # Two steps of half precision, which has 2**10 steps per factor of two; 2**-24 is its smallest number.
        close = np.flatnonzero(best - second <= np.maximum(np.abs(best), np.abs(second)) * 2.0**-9 + 2.0**-23)
        for start in range(0, len(close), VOXELS_AT_ONCE):
            some = close[start : start + VOXELS_AT_ONCE]
            at = np.unravel_index(some, labels.shape)
            labels.flat[some] = np.stack([resampled.exactly(k, at) for k in range(len(resampled))]).argmax(0)
    return labels


def _paint_regions(resampled: ResampledLogits, label_manager: LabelManager) -> np.ndarray:
    """Paint the regions in ``regions_class_order``, each where its probability exceeds one half."""
    labels = np.zeros(resampled.grid[0], _dtype(label_manager))
    for k, label in enumerate(label_manager.regions_class_order):
        labels[(label_manager.apply_inference_nonlin(resampled[k]) > 0.5).numpy()] = label
    return labels


def _grid(properties: dict[str, Any], managers: Managers) -> tuple[tuple[int, ...], list[float], list[float]]:
    """Return the shape of the cropped image, the spacing of the logits and the spacing of the image."""
    plans_manager, configuration_manager, _ = managers
    shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    current = list(configuration_manager.spacing)
    # A 2d plan keeps the spacing between slices.
    return shape, current if len(current) == len(shape) else [spacing[0], *current], spacing


def _neighbours(n: int, m: int, index: np.ndarray, is_sliced: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return positions and weights on an axis of ``n`` voxels for interpolating voxels ``index`` (V,) of ``m``.

    Slices are picked and not interpolated; half goes to the upper one.
    """
    place = (index + 0.5) * (n / m) - 0.5
    low = np.floor(place + 0.5 if is_sliced else place)
    share = place - low
    corners = [(low, np.ones(len(index)))] if is_sliced else [(low, 1 - share), (low + 1, share)]
    return [(np.clip(position, 0, n - 1).astype(np.intp), weight) for position, weight in corners]


def _dtype(label_manager: LabelManager) -> type[np.unsignedinteger]:
    largest = max([*label_manager.all_labels, *(label_manager.regions_class_order or [])])
    return np.uint8 if len(label_manager.foreground_labels) < 255 and largest < 256 else np.uint16


def _uncrop(labels: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    whole = np.zeros(properties["shape_before_cropping"], labels.dtype)
    return insert_crop_into_image(whole, labels, properties["bbox_used_for_cropping"])


# Files


def write_case(
    logits_KDHW: torch.Tensor,
    properties: dict[str, Any],
    managers: Managers,
    target_truncated: Path,
    file_ending: str,
    *,
    header: nibabel.Nifti1Header | None = None,
    save_probabilities: bool = False,
    values: np.ndarray | None = None,
) -> None:
    """Write a case's mask and, on request, nnU-Net's ``.npz`` and ``.pkl`` next to it (for its ensembling).

    ``target_truncated`` is the mask's path without its ending, in a staging folder, as nothing is written atomically.
    ``header`` is the scan's NIfTI header, which is copied to the mask; without it nnU-Net's writer is used.
    ``values`` replace the labels of the mask, by their number. Raises MFMError (E_DISK_FULL, E_GEOMETRY), and E_CONFIG
    if nnU-Net's writer class changes the labels.
    """
    if save_probabilities:
        mask, probabilities = logits_to_probabilities(logits_KDHW, properties, managers)
        with report_full_disk(target_truncated, 1):
            np.savez_compressed(f"{target_truncated}.npz", probabilities=probabilities)
            save_pickle(properties, f"{target_truncated}.pkl")
    else:
        mask = logits_to_mask(logits_KDHW, properties, managers)
    if values is not None:
        mask = values[mask]
    write_mask(mask, properties, managers[0], Path(f"{target_truncated}{file_ending}"), header)


def write_mask(
    mask_DHW: np.ndarray,
    properties: dict[str, Any],
    plans_manager: PlansManager,
    target: Path,
    header: nibabel.Nifti1Header | None = None,
) -> None:
    """Write a mask, in the axes of nnU-Net's reader, to ``target``, which is not replaced atomically."""
    writer = plans_manager.image_reader_writer_class()
    with report_full_disk(target, mask_DHW.nbytes):
        if header is not None and is_nifti(target):
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
            write_like(voxels_XYZ, header, target)
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


def publish(stage: Path, folder: Path) -> None:
    """Move the files in ``stage`` to their final place atomically: flush to disk, then rename."""
    files = sorted(stage.iterdir())
    with report_full_disk(folder, 1):
        for file in files:
            sync(file)
        for file in files:
            os.replace(file, folder / file.name)
    sync_folder(folder)


def require_space(target: Path, properties: dict[str, Any]) -> None:
    """Raise MFMError (E_DISK_FULL) if a case's mask will not fit on the disk, before it is computed."""
    if shutil.disk_usage(target.parent).free < math.prod(properties["shape_before_cropping"]):
        raise disk_full(target)


# The scan's geometry

_CLEARED: dict[str, Any] = dict.fromkeys(("descrip", "aux_file", "db_name", "intent_name"), b"")
_CLEARED |= {"scl_slope": 1, "scl_inter": 0, "cal_max": 0, "cal_min": 0, "intent_code": 0}
_CLEARED |= {"intent_p1": 0, "intent_p2": 0, "intent_p3": 0}
"""Fields of a header that describe the scan's voxel values, or are free text, which may hold a person's name."""


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

    Shape, affines, codes, spacing and units keep their bytes, which nnU-Net's writers round or lose; scaling, display
    range, intent and free text are reset. Header extensions are not copied. ``target`` is compressed if it ends with
    .gz.
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
    for name, value in _CLEARED.items():
        if name in (copy.template_dtype.names or ()):
            copy[name] = value
    padding = b"\0" * (copy.single_vox_offset - len(copy.binaryblock))
    voxels = mask_XYZ.astype(mask_XYZ.dtype.newbyteorder(copy.endianness), copy=False).tobytes(order="F")
    with contextlib.ExitStack() as files:
        file: Any = files.enter_context(open(target, "wb"))
        if target.name.endswith(".gz"):
            # No name or time in the stream: the same mask always gives the same file.
            file = files.enter_context(gzip.GzipFile("", "wb", 4, file, mtime=0))
        file.write(copy.binaryblock + padding)
        file.write(voxels)


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
