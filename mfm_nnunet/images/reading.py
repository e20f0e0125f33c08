"""The input gate: return a complete, finite volume of known geometry, or refuse with the file and the reason.

Pixels are decoded by nnU-Net's own reader classes, so arrays and properties are nnU-Net's; everything else is checked
here. Shapes: C channels, D H W voxels in the reader's axis order (2D images have D = 1); spacing in mm.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mfm_nnunet.errors import MFMError, unreadable
from mfm_nnunet.files import IMAGE_ENDINGS, ending_of
from mfm_nnunet.images import decoder, nifti
from mfm_nnunet.images.decode import find_reader_class
from mfm_nnunet.images.geometry import Geometry, difference, geometry_of

_log = logging.getLogger(__name__)


class _Item(NamedTuple):
    """One file: ``array`` (C, D, H, W), nnU-Net's properties, its geometry, and the value range of each channel."""

    array: np.ndarray
    properties: dict[str, Any]
    geometry: Geometry
    ranges: list[tuple[float, float]]


def reader_for(file: Path, dataset_json: Mapping[str, Any] | None = None) -> str:
    """Return the name of nnU-Net's reader class: the one in dataset.json, else the one stock nnU-Net would choose.

    JPEG, MHD and NHDR, which stock nnU-Net does not list, get the reader that can read them. Raises MFMError (E_FORMAT)
    for an unknown ending, and for a TIFF file that is missing or cannot be opened.
    """
    wanted = (dataset_json or {}).get("overwrite_image_reader_writer", "None")
    if wanted != "None":
        try:
            return find_reader_class(wanted).__name__
        except MFMError:
            _warn_of_reader(str(wanted))
    ending = ending_of(file)
    if ending in (".png", ".bmp", ".jpg", ".jpeg"):
        return "NaturalImage2DIO"
    if ending in (".tif", ".tiff"):
        return decoder.call(Path(file), {"task": "name_reader"}).content["answer"]
    if ending in (".nii", ".nii.gz"):
        return nifti.choose_nifti_reader(Path(file), "SimpleITKIO" if ending == ".nii.gz" else "NibabelIO")
    if ending:
        return "SimpleITKIO"
    raise MFMError("E_FORMAT", f"{file}: not a known image format. Known endings: {' '.join(IMAGE_ENDINGS)}")


def count_channels(file: Path) -> int:
    """Return the number of channels of a picture from its header; more than 1 for colours.

    Raises MFMError as :func:`mfm_nnunet.images.integrity.declared_by`.
    """
    return decoder.call(file, {"task": "count_channels"}).content["answer"]


@functools.cache
def _warn_of_reader(name: str) -> None:
    _log.warning("dataset.json demands the unknown reader '%s'; choosing by the file ending instead", name)


def read_image(files: Sequence[Path], reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the channels of one case as (C, D, H, W) float32, with nnU-Net's properties (``spacing`` in mm and more).

    Raises MFMError as :func:`integrity.check_image_file`, and E_NONFINITE, E_CONSTANT (a single value), E_CHANNELS
    (shapes differ), E_GEOMETRY (the channels lie differently in space), E_SPACING, E_CONFIG.
    """
    assert files, "a case without files"
    first, *others = (_read_file(Path(file), reader_name) for file in files)
    for file, other in zip(files[1:], others):
        if other.array.shape[1:] != first.array.shape[1:]:
            raise MFMError(
                "E_CHANNELS",
                f"{file}: has size {_grid(other.array)}, the first channel {files[0]} has {_grid(first.array)}. "
                "All channels of a case need the same grid: resample them to the first.",
            )
        if differs := difference(other.geometry, first.geometry):
            raise MFMError(
                "E_GEOMETRY",
                f"{file}: its position in space differs from the first channel's, {files[0]}: {differs}. "
                "Resample it to the first, or correct its header.",
            )
    ranges = [pair for item in (first, *others) for pair in item.ranges]
    constant = [low == high for low, high in ranges]
    if all(constant):
        raise MFMError("E_CONSTANT", f"{files[0]}: every voxel has the value {ranges[0][0]:g}. Remove the case.")
    if any(constant) and len(files) > 1:
        _log.warning("%s: channel %d has the same value everywhere", files[0], constant.index(True))
    image_CDHW = first.array if not others else np.concatenate([first.array, *(other.array for other in others)])
    return image_CDHW, first.properties


def read_series(name: str, files: Sequence[Path], reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a DICOM series as (1, D, H, W) float32, with the properties of nnU-Net's reader ``reader_name``.

    Messages contain ``name`` and no path. Raises MFMError as :func:`mfm_nnunet.images.dicom.read_volume`, and
    E_NONFINITE, E_CONSTANT, E_NOT_FOUND.
    """
    try:
        num_bytes = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise unreadable(f"{name} (a file of the series)", error) from error
    request = {"task": "decode_series", "files": [str(file) for file in files], "reader": reader_name}
    item = _item_of(Path(name), decoder.call(Path(name), request, num_bytes))
    if item.ranges[0][0] == item.ranges[0][1]:
        raise MFMError("E_CONSTANT", f"{name}: every voxel has the value {item.ranges[0][0]:g}. Remove the series.")
    return item.array, item.properties


def read_label(file: Path, reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a label map as (1, D, H, W) float32 of whole numbers, with nnU-Net's properties.

    Raises MFMError as :func:`integrity.check_image_file`, and E_LABEL_VALUE for values such as 0.9999,
    E_CHANNELS for a colour picture.
    """
    item = _read_map(Path(file), reader_name, "label map")
    broken = item.array != np.rint(item.array)
    if broken.any():
        raise MFMError(
            "E_LABEL_VALUE",
            f"{file}: {int(broken.sum())} voxels are not whole numbers, e.g. {item.array[broken][0]:g}. Labels must be "
            "resampled by nearest neighbour and saved as integers.",
        )
    return item.array, item.properties


def read_mask(file: Path, reader_name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a mask as boolean (1, D, H, W), True where the file holds more than 0, with nnU-Net's properties.

    Raises MFMError as :func:`integrity.check_image_file`, and E_LABEL_VALUE for values below 0,
    E_CHANNELS for a colour picture.
    """
    item = _read_map(Path(file), reader_name, "mask")
    lowest = item.ranges[0][0]
    if lowest < 0:
        raise MFMError(
            "E_LABEL_VALUE", f"{file}: the mask has the value {lowest:g}. A mask is 0 outside and above 0 inside."
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
    """Check that ``label`` (1, D, H, W) fits ``image`` (C, D, H, W) and has only values named in dataset.json.

    A label without foreground is legal. ``name`` is the case. Raises MFMError: E_LABEL_GEOMETRY, E_LABEL_VALUE.
    """
    if differs := _grids_differ(label, label_properties, image, image_properties):
        raise MFMError(
            "E_LABEL_GEOMETRY",
            f"{name}: the label does not lie on the grid of its image: {differs}. Resample it to the image, or copy "
            "the image's geometry into its header if only the header is wrong.",
        )
    known = known_labels(dataset_json)
    unknown = [value for value in _label_values(label) if value not in known]
    if unknown:
        raise MFMError(
            "E_LABEL_VALUE",
            f"{name}: the label has the values {_list(unknown)}, but dataset.json lists {_list(sorted(known))}. "
            "Add them to 'labels' in dataset.json, or correct the label map.",
        )


def check_mask(
    mask_1DHW: np.ndarray,
    mask_properties: dict[str, Any],
    image_CDHW: np.ndarray,
    image_properties: dict[str, Any],
    file: Path,
) -> None:
    """Check that a mask lies on the grid of its image, else raise MFMError (E_GEOMETRY); ``file`` is the mask's."""
    if differs := _grids_differ(mask_1DHW, mask_properties, image_CDHW, image_properties):
        raise MFMError(
            "E_GEOMETRY",
            f"{file}: the mask does not have the grid of its image: {differs}. Resample it to the image, or remove "
            "it from the source.",
        )


def _grids_differ(one: np.ndarray, properties: dict, other: np.ndarray, other_properties: dict) -> str:
    """Describe how the grids of two images differ; "" if they do not."""
    if one.shape[1:] != other.shape[1:]:
        return f"{_grid(one)} against {_grid(other)} voxels"
    return difference(geometry_of(properties), geometry_of(other_properties))


def known_labels(dataset_json: Mapping[str, Any]) -> set[int]:
    """Return all values named by ``labels`` in dataset.json: classes, members of regions, the ignore label."""
    values = dataset_json["labels"].values()
    return {int(item) for value in values for item in (value if isinstance(value, (list, tuple)) else [value])}


def _read_file(file: Path, reader_name: str, is_map: bool = False) -> _Item:
    """Read one file in a child process (:mod:`mfm_nnunet.images.decode`)."""
    return _item_of(file, decoder.call(file, {"task": "decode", "reader": reader_name, "is_map": is_map}))


def _item_of(file: Path, reply: decoder.Reply) -> _Item:
    assert reply.voxels is not None, "a decoded image has voxels"
    content, order = reply.content, reply.content["order"]
    shape = [content["shape"][axis] for axis in order]
    array = reply.voxels.reshape(shape).transpose(np.argsort(order))
    properties = decoder.from_json(content["properties"])
    nifti.warn_of_contradiction(file, content["contradiction"])
    return _Item(array, properties, geometry_of(properties), content["ranges"])


def _read_map(file: Path, reader_name: str, what: str) -> _Item:
    item = _read_file(file, reader_name, is_map=True)
    if len(item.array) != 1:
        raise MFMError(
            "E_CHANNELS",
            f"{file}: a {what} has one value per pixel, this is a picture with {len(item.array)} colour channels. "
            "Save its numbers as a grey picture.",
        )
    return item


def _label_values(label: np.ndarray) -> list[int]:
    """Return the sorted values of a label map of whole numbers; counting is faster than sorting a large volume."""
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


def _grid(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape[1:]))
