"""The input gate: a volume that is complete, finite and of known geometry, or a refusal that names file and reason.

Pixels are decoded by nnU-Net's own reader classes, so arrays and properties are those of nnU-Net; everything around
them is checked here. Shapes: C channels, D H W voxels in the reader's axis order (2D images have D = 1); spacing in mm.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data.geometry import Geometry, difference, geometry_of, require_sane
from mfm_nnunet.data.integrity import (
    IMAGE_ENDINGS,
    check_image_file,
    ending_of,
    nifti_version,
    non_finite,
    require_regular,
)
from mfm_nnunet.data.pictures import tiff_is_2d
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.plan_rules import READERS

__all__ = ["IMAGE_ENDINGS", "check_image_file", "check_label", "read_image", "read_label", "read_mask", "reader_for"]

_log = logging.getLogger(__name__)
_stdout_lock = threading.Lock()


def reader_for(file: Path, dataset_json: Mapping[str, Any] | None = None) -> str:
    """The name of nnU-Net's reader class for a file: what dataset.json demands, else what stock nnU-Net would take.

    JPEG, MHD and NHDR, which stock nnU-Net does not list, get the reader that can read them. Raises MFMError (E_FORMAT)
    for an unknown ending, and for a TIFF file that is missing or cannot be opened.
    """
    wanted = (dataset_json or {}).get("overwrite_image_reader_writer", "None")
    if wanted != "None":
        try:
            return _reader_class(wanted).__name__
        except MFMError:
            _warn_of_reader(str(wanted))
    ending = ending_of(file)
    if ending in (".png", ".bmp", ".jpg", ".jpeg"):
        return "NaturalImage2DIO"
    if ending in (".tif", ".tiff"):
        require_regular(file)
        return "NaturalImage2DIO" if tiff_is_2d(file) else "Tiff3DIO"
    if ending == ".nii.gz":
        # SimpleITK cannot read NIfTI-2; stock nnU-Net finds that out by trying.
        return "NibabelIO" if nifti_version(file) == 2 else "SimpleITKIO"
    if ending == ".nii":
        return "NibabelIO"
    if ending:
        return "SimpleITKIO"
    raise MFMError("E_FORMAT", f"{file}: not a known image format. Known endings: {' '.join(IMAGE_ENDINGS)}")


@functools.cache
def _warn_of_reader(name: str) -> None:
    """Once, not for every case."""
    _log.warning("dataset.json demands the unknown reader '%s'; choosing by the file ending instead", name)


def read_image(files: Sequence[Path], reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """The channels of one case as (C, D, H, W) float32, with nnU-Net's properties (``spacing`` in mm and more).

    Raises MFMError as :func:`check_image_file`, and E_NONFINITE, E_CONSTANT (nothing but one value), E_CHANNELS
    (shapes differ), E_GEOMETRY (the channels lie differently in space), E_SPACING, E_CONFIG (unknown reader).
    """
    assert files, "a case without files"
    first, *others = (_read_file(Path(file), reader_name) for file in files)
    for file, other in zip(files[1:], others):
        if other.array.shape[1:] != first.array.shape[1:]:
            raise MFMError(
                "E_CHANNELS",
                f"{file}: has size {_size(other.array)}, the first channel {files[0]} has {_size(first.array)}. "
                "All channels of a case must be on one grid: resample them to the first.",
            )
        if differs := difference(other.geometry, first.geometry):
            raise MFMError(
                "E_GEOMETRY",
                f"{file}: lies differently in space than the first channel {files[0]}: {differs}. "
                "Resample it to the first, or correct its header.",
            )
    ranges = [pair for item in (first, *others) for pair in item.ranges]
    constant = [low == high for low, high in ranges]
    if all(constant):
        raise MFMError(
            "E_CONSTANT", f"{files[0]}: every voxel is {ranges[0][0]:g}; there is no image in it. Leave the case out."
        )
    if any(constant) and len(files) > 1:
        _log.warning("%s: channel %d has the same value everywhere", files[0], constant.index(True))
    image_CDHW = first.array if not others else np.concatenate([first.array, *(other.array for other in others)])
    return image_CDHW, first.properties


def read_label(file: Path, reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """A label map as (1, D, H, W) float32 of whole numbers, with nnU-Net's properties.

    Raises MFMError as :func:`check_image_file`, and E_LABEL_VALUE for values such as 0.9999, E_CHANNELS for a colour
    picture.
    """
    item = _read_map(Path(file), reader_name, "label map")
    broken = item.array != np.rint(item.array)
    if broken.any():
        raise MFMError(
            "E_LABEL_VALUE",
            f"{file}: {int(broken.sum())} voxels hold no whole number, e.g. {item.array[broken][0]:g}. Labels must be "
            "resampled by nearest neighbour and saved as integers.",
        )
    return item.array, item.properties


def read_mask(file: Path, reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """A mask as boolean (1, D, H, W), True where the file holds more than 0, with nnU-Net's properties.

    Raises MFMError as :func:`check_image_file`, and E_LABEL_VALUE for values below 0, E_CHANNELS for a colour picture.
    """
    item = _read_map(Path(file), reader_name, "mask")
    lowest = item.ranges[0][0]
    if lowest < 0:
        raise MFMError(
            "E_LABEL_VALUE", f"{file}: the mask holds {lowest:g}. A mask is 0 outside and above 0 inside; correct it."
        )
    return item.array > 0, item.properties


def check_label(
    label: np.ndarray,
    label_properties: dict[str, Any],
    image: np.ndarray,
    image_properties: dict[str, Any],
    dataset_json: Mapping[str, Any],
    name: str,
) -> None:
    """Return when ``label`` (1, D, H, W) fits ``image`` (C, D, H, W) and holds only values that dataset.json names.

    A label without foreground is legal. Raises MFMError: E_LABEL_GEOMETRY, E_LABEL_VALUE; ``name`` is the case.
    """
    if label.shape[1:] != image.shape[1:]:
        raise MFMError(
            "E_LABEL_GEOMETRY",
            f"{name}: the label has size {_size(label)}, its image {_size(image)}. Resample the label to the image.",
        )
    if differs := difference(geometry_of(label_properties), geometry_of(image_properties)):
        raise MFMError(
            "E_LABEL_GEOMETRY",
            f"{name}: the label lies differently in space than its image: {differs}. Resample the label to the "
            "image, or copy the image's geometry into its header if only the header is wrong.",
        )
    known = known_labels(dataset_json)
    unknown = [value for value in _values(label) if value not in known]
    if unknown:
        raise MFMError(
            "E_LABEL_VALUE",
            f"{name}: the label holds the values {_list(unknown)}; dataset.json names {_list(sorted(known))}. "
            "Add them to 'labels' in dataset.json, or correct the label map.",
        )


def known_labels(dataset_json: Mapping[str, Any]) -> set[int]:
    """All values that ``labels`` in dataset.json names: classes, the members of regions, the ignore label."""
    values = dataset_json["labels"].values()
    return {int(item) for value in values for item in (value if isinstance(value, (list, tuple)) else [value])}


@dataclass(frozen=True)
class _Item:
    array: np.ndarray
    properties: dict[str, Any]
    geometry: Geometry
    ranges: list[tuple[float, float]]
    """Smallest and largest value of each channel."""


def _read_file(file: Path, reader_name: str, is_map: bool = False) -> _Item:
    """One file through the gate and through nnU-Net's reader, (C, D, H, W); C > 1 only for colour pictures.

    Label maps and masks have a method of their own there: the spacing of a TIFF stack is in a file beside it, which is
    named after the case.
    """
    reader_class = _reader_class(reader_name)
    check_image_file(file)
    try:
        # Float64 beyond the range of float32 becomes infinite, which is reported below with the file's name.
        with np.errstate(over="ignore"), _quiet(file, reader_name), _alone(file, reader_name) as readable:
            reader = reader_class()
            array, properties = reader.read_seg(str(readable)) if is_map else reader.read_images((str(readable),))
    except MemoryError as error:
        raise MFMError("E_TOO_LARGE", f"{file}: does not fit into memory. Crop it, or use fewer processes.") from error
    except Exception as error:  # Readers raise whatever their libraries raise.
        raise _reader_failed(file, reader_name, error) from error
    if array.ndim != 4 or (len(array) > 1 and reader_name != "NaturalImage2DIO"):
        raise MFMError(
            "E_DIM", f"{file}: holds several volumes (read as {array.shape}). Split it into one file per channel."
        )
    if array.size == 0:
        raise MFMError("E_HEADER", f"{file}: holds no voxel. Export it again.")
    ranges = [(float(x_DHW.min()), float(x_DHW.max())) for x_DHW in array]
    # The minimum and the maximum are NaN or infinite as soon as one voxel is.
    if not np.all(np.isfinite(ranges)):
        raise non_finite(file, array.size - int(np.count_nonzero(np.isfinite(array))))
    geometry = geometry_of(properties)
    require_sane(file, array, geometry)
    return _Item(array, properties, geometry, ranges)


def _read_map(file: Path, reader_name: str, what: str) -> _Item:
    """A file with one value per voxel. Raises MFMError (E_CHANNELS) for a colour picture."""
    item = _read_file(file, reader_name, is_map=True)
    if len(item.array) != 1:
        raise MFMError(
            "E_CHANNELS",
            f"{file}: a {what} has one value per pixel, this is a picture with {len(item.array)} colour channels. "
            "Save its numbers as a grey picture.",
        )
    return item


def _reader_failed(file: Path, reader_name: str, error: Exception) -> MFMError:
    reason = " ".join((str(error) or type(error).__name__).split())
    if "orthonormal" in reason:
        return MFMError("E_GEOMETRY", f"{file}: its axes are not perpendicular. Resample it onto a regular grid.")
    if "3d images" in reason.lower():
        return MFMError("E_DIM", f"{file}: {reader_name} reads images with exactly three axes. Save it as 3D.")
    advice = "Export it again."
    if reader_name.startswith("SimpleITKIO") and ending_of(file) in (".nii", ".nii.gz") and nifti_version(file) == 2:
        advice = (
            'It is NIfTI-2: save it as NIfTI-1, or set "overwrite_image_reader_writer": "NibabelIO" in dataset.json.'
        )
    return MFMError("E_FORMAT", f"{file}: nnU-Net's {reader_name} cannot read it ({reason[-200:]}). {advice}")


@functools.cache
def _reader_class(name: str) -> Any:
    """nnU-Net's reader class of that name, found once (the search imports a package). MFMError (E_CONFIG) if none."""
    import SimpleITK as sitk
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    # ITK warns on stderr about headers that are refused or accepted here on purpose.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if name not in READERS:  # nnU-Net would take whatever its modules hold under that name
        raise MFMError("E_CONFIG", f"nnU-Net has no image reader '{name}'. {nearest(name, READERS)}")
    return recursive_find_reader_writer_by_name(name)


@contextlib.contextmanager
def _alone(file: Path, reader_name: str) -> Iterator[Path]:
    """``file``, or a link to it in an empty folder where SimpleITK would read another file.

    For x.nii.gz it takes the header from x.nii.gz and the voxels from x.nii, if there is one in the same folder.
    """
    other = Path(str(file)[: -len(".gz")])
    if ending_of(file) != ".nii.gz" or not reader_name.startswith("SimpleITK") or not os.path.lexists(other):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "image.nii.gz")
        link.symlink_to(file.absolute())
        yield link


@contextlib.contextmanager
def _quiet(file: Path, reader_name: str) -> Iterator[None]:
    """Keep the console clean; what a reader prints goes to the log.

    Only Tiff3DIO prints when given one file. Redirecting stdout is global and other threads may be printing, so it is
    done for no other reader.
    """
    if reader_name != "Tiff3DIO":
        yield
        return
    printed = io.StringIO()
    with _stdout_lock, contextlib.redirect_stdout(printed):
        yield
    if message := " ".join(printed.getvalue().split()):
        _log.warning("%s: %s", file, message)


def _values(label: np.ndarray) -> list[int]:
    """The values in a label map of whole numbers, sorted; by counting, because sorting a large volume is slow."""
    low, high = int(label.min()), int(label.max())
    if high - low >= 1 << 20:
        return [int(value) for value in np.unique(label)]
    present = np.zeros(high - low + 1, dtype=bool)
    for plane_HW in label[0]:
        present[(plane_HW - low).astype(np.int64)] = True
    return [int(index) + low for index in np.flatnonzero(present)]


def _list(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:20]))
    return f"{shown} and {len(values) - 20} more" if len(values) > 20 else shown


def _size(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape[1:]))
