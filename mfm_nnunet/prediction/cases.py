"""Find the cases of a folder, and prepare a case for the network.

Legend: C channels, D H W voxels.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from mfm_nnunet.data.cases import PICTURES, Case, spelling_of
from mfm_nnunet.data.dicom import Series
from mfm_nnunet.data.loops import unchanged
from mfm_nnunet.data.preprocess import preprocess_case_npy
from mfm_nnunet.data.sizes import Sizes, count_windows, require_predictable
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, MFMError, about, unreadable
from mfm_nnunet.files import IMAGE_ENDINGS, ending_of, inside, is_unicode, sha256, shown
from mfm_nnunet.images.integrity import files_of
from mfm_nnunet.images.reading import check_label, read_image, read_label, read_series
from mfm_nnunet.prediction.export import is_nifti, read_header
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.requests import PredictRequest

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.+)_(\d{4})", re.DOTALL)
_SEVERAL_CHANNELS_PER_FILE = "NaturalImage2DIO"
_NEEDS_NUMBERED_NAMES = "Tiff3DIO"  # it derives the name of the spacing file by removing the channel number


@dataclass(frozen=True)
class PreparedCase:
    """A case ready for the network, with the SHA-256 of each of its files by name."""

    x_CDHW: torch.Tensor
    properties: dict[str, Any]
    input_hashes: dict[str, str]
    header: nibabel.Nifti1Header | None = None
    """Header of the first image if it is a NIfTI file, read together with the voxels, so both match."""
    warnings: tuple[str, ...] = ()
    """Peculiarities of the images that are no reason to refuse them."""


def find_cases(
    source: Path, model: Model, previous_stage: Path | None = None, series: Sequence[Series] = ()
) -> list[Case | CaseFailure]:
    """Find the cases of a folder, one file, or the DICOM ``series`` in them, sorted by name.

    ``label`` is the mask of the previous stage, if any. Returns a CaseFailure for each that cannot be one. Raises
    MFMError: E_NOT_FOUND (no case at all), E_CHANNELS (no file of several channels has a number; a series for a model
    of several channels).
    """
    found = _series_cases(series, model, previous_stage)
    if source.is_dir() or not found:
        found += _image_cases(source, model, previous_stage)
    _require_cases(found, source, model)
    return sorted(found, key=case_name_of)


def check_previous_stage(model: Model, folder: Path | None) -> None:
    """Refuse a missing or needless folder of masks of the previous stage (E_CONFIG, E_NOT_FOUND)."""
    needed = model.configuration_manager.previous_stage_name
    if needed is not None and folder is None:
        raise MFMError(
            "E_CONFIG",
            f"the model is the second stage of a cascade: predict the same images with configuration '{needed}' first "
            "and give that folder (-prev_stage_predictions).",
        )
    if needed is None and folder is not None:
        raise MFMError("E_CONFIG", "-prev_stage_predictions: the model takes no previous stage. Leave it out.")
    if folder is not None and not folder.is_dir():
        raise MFMError("E_NOT_FOUND", f"{folder}: no such folder. Give the masks of the previous stage.")


def _image_cases(source: Path, model: Model, previous_stage: Path | None) -> list[Case | CaseFailure]:
    """Find the images of a folder, or of one file, in nnU-Net's naming.

    A case is <case>_0000<ending>, one file per channel; if the model has one channel and no file has a numbered name,
    each file is a case. Formats may be mixed: volumes for a model of volumes, pictures for one of pictures. Returns a
    CaseFailure for a case with other channels than the model's (E_CHANNELS), an image whose ending is not in lower case
    (E_FORMAT), and cases whose names differ in letter case or ending alone (E_CONFIG). Other images are named in a
    warning. The list may be empty.
    """
    folder, ending = (source if source.is_dir() else source.parent), model.dataset_json["file_ending"]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    if not source.is_dir():
        names = _channels_of(source.name, names)
    matching = [name for name in names if _is_alike(name, model)]
    channels, plain = _group(matching)
    if matching and not channels:
        channels, plain = _plain_cases(folder, plain, ending, model), []
    unnumbered = f"the name has no channel number; expected <case>_0000{ending}."
    found: list[Case | CaseFailure] = [
        CaseFailure(name, "E_CHANNELS", f"{folder / name}: {unnumbered}") for name in plain
    ]
    found += _other_images(folder, [name for name in names if name not in matching], model)
    spellings = Counter(spelling_of(name) for name in channels)
    for name, numbered in channels.items():
        code, problem = "E_CHANNELS", _channel_problem(sorted(numbered), model)
        twice = [files for files in numbered.values() if len(files) > 1]
        if not is_unicode(name):  # SimpleITK would crash the process when writing the mask
            code, problem = "E_CONFIG", "the name is not UTF-8, so no mask can be named after it. Rename the files."
        elif twice:
            code, problem = "E_CONFIG", f"{' and '.join(twice[0])} would have the same mask. Rename one of them."
        elif spellings[spelling_of(name)] > 1:
            code = "E_CONFIG"
            problem = "another case differs only in letter case or Unicode form. Rename one of them."
        if problem:
            found.append(CaseFailure(name, code, f"{shown(folder / name)}: {problem}"))
        else:
            files = tuple(folder / numbered[k][0] for k in sorted(numbered))
            found.append(Case(name, files, _mask(previous_stage, name, ending)))
    return found


def _series_cases(series: Sequence[Series], model: Model, previous_stage: Path | None) -> list[Case | CaseFailure]:
    """Return the cases of DICOM series; a model of several channels reads none (E_CHANNELS)."""
    if series and model.num_channels > 1:
        raise MFMError(
            "E_CHANNELS",
            f"the model expects {model.num_channels} channels{_channel_names(model)}, and a DICOM series is one. Save "
            "the series as NIfTI on one grid, <case>_0000.nii.gz, <case>_0001.nii.gz, ..., and give that folder.",
        )
    ending = model.dataset_json["file_ending"]
    return [item.failure or replace(item.case, label=_mask(previous_stage, item.name, ending)) for item in series]


def _require_cases(found: Sequence[Case | CaseFailure], source: Path, model: Model) -> None:
    """Raise MFMError (E_NOT_FOUND) if there is no case at all."""
    if any(isinstance(item, Case) or item.code != "E_FORMAT" for item in found):
        return
    ending = model.dataset_json["file_ending"]
    names = sorted(entry.name for entry in source.iterdir()) if source.is_dir() else [source.name]
    other = f"It holds {len(names)} others, e.g. {names[0]}." if names else "It is empty."
    alike = ", ".join(kind for kind in IMAGE_ENDINGS if _is_alike(f"x{kind}", model))
    raise MFMError(
        "E_NOT_FOUND",
        f"{source}: no file ends with '{ending}', which this model reads (<case>_0000{ending}), nor with {alike}, "
        f"and there is no DICOM in it. {other}",
    )


def case_name_of(item: Case | CaseFailure) -> str:
    """Return the name of a case, good or bad."""
    return item.case if isinstance(item, CaseFailure) else item.name


def _mask(previous_stage: Path | None, name: str, ending: str) -> Path | None:
    return inside(previous_stage, f"{name}{ending}") if previous_stage is not None else None


def _is_alike(name: str, model: Model) -> bool:
    """Return whether a model reads a file: volumes for a model of volumes, pictures for one of pictures.

    TIFF stacks are for models of TIFF stacks. Endings in capitals are not read: nnU-Net's readers do not know them.
    """
    own, ending = ending_of(Path(name)), model.dataset_json["file_ending"]
    if name.endswith(ending):
        return True
    if not own or not name.endswith(own) or model.plans_manager.plans["image_reader_writer"] == _NEEDS_NUMBERED_NAMES:
        return False
    return (own in PICTURES) == (ending.lower() in PICTURES)


def _channels_of(name: str, names: Sequence[str]) -> list[str]:
    """Return the files of the case to which the file ``name`` belongs."""
    stem, kind = _split(name)
    match = _NUMBERED.fullmatch(stem)
    if not match:
        return [name]
    return [other for other in names if re.fullmatch(re.escape(match[1]) + r"_\d{4}" + re.escape(kind), other)]


def _split(name: str) -> tuple[str, str]:
    """Split a name into stem and known ending."""
    ending = ending_of(Path(name))
    return name[: len(name) - len(ending)], name[len(name) - len(ending) :]


def prepare_case(model: Model, case: Case, request: PredictRequest) -> PreparedCase:
    """Read and preprocess a case; the mask of a previous stage becomes additional channels.

    ``request`` affects the memory and time that the prediction will take. Raises MFMError: those of the image checks,
    E_CHANNELS, E_CHANGED when a file changed while it was read, E_TOO_LARGE before anything too large is resampled, and
    E_LABEL_GEOMETRY and E_LABEL_VALUE for the mask of a previous stage.
    """
    reader = model.plans_manager.plans["image_reader_writer"]
    with unchanged(case):
        if case.slices:
            image, properties = read_series(case.name, case.slices, reader)
        else:
            image, properties = read_image(case.images, reader)
        mask, mask_properties = read_label(case.label, reader) if case.label is not None else (None, {})
        header = read_header(case.images[0]) if is_nifti(case.images[0]) and not case.slices else None
        input_hashes = hash_inputs(case)
    if len(image) != model.num_channels:
        raise MFMError(
            "E_CHANNELS",
            f"{case.images[0]}: {len(image)} channels, the model expects {model.num_channels}{_channel_names(model)}.",
        )
    if mask is not None:
        name = f"{case.label} (mask of the previous stage)"
        predicted = {label: value for label, value in model.dataset_json["labels"].items() if label != "ignore"}
        check_label(mask, mask_properties, image, properties, {"labels": predicted}, name)
    # Not refused: models are trained with sequences that some patients lack, which are filled with zeros.
    constant = [k for k, channel in enumerate(image) if len(case.images) > 1 and (channel == channel.flat[0]).all()]
    warnings = tuple(f"channel {k} is {image[k].flat[0]:g} everywhere" for k in constant)
    plans_manager, configuration_manager, label_manager = model.managers

    def require_size(sizes: Sizes) -> None:
        num_heads, num_folds = label_manager.num_segmentation_heads, len(model.weights)
        num_windows = count_windows(sizes.resampled, configuration_manager.patch_size, request.step_size)
        require_predictable(
            sizes, num_heads, num_windows, num_folds=num_folds, probabilities=request.save_probabilities
        )

    with about(case.images[0]):
        x_CDHW, seg, properties = preprocess_case_npy(
            image, properties, mask, plans_manager, configuration_manager, model.dataset_json, require_size
        )
    if mask is not None:
        assert seg is not None, "preprocessing returns the mask that it was given"
        x_CDHW = np.vstack((x_CDHW, convert_labelmap_to_one_hot(seg[0], label_manager.foreground_labels, x_CDHW.dtype)))
    x_CDHW = np.ascontiguousarray(x_CDHW, np.float32)
    return PreparedCase(torch.from_numpy(x_CDHW), properties, input_hashes, header, warnings)


def hash_inputs(case: Case) -> dict[str, str]:
    """Return the SHA-256 of each file of a case and its companions, by name; empty if one is not a regular file.

    Slices of a DICOM series have numbers instead of names.

    Raises MFMError (E_NOT_FOUND, E_PERMISSION) for a file that cannot be read.
    """
    files = {f"slice_{number:04d}": file for number, file in enumerate(case.slices)}
    if not case.slices:
        files = {os.path.relpath(file, image.parent): file for image in case.images for file in files_of(image)}
    if (label := case.label) is not None:
        of_label = files_of(label, is_label=True)
        files |= {f"previous_stage/{os.path.relpath(file, label.parent)}": file for file in of_label}
    if not all(os.path.isfile(file) for file in files.values()):
        return {}
    hashes = {}
    for name, file in files.items():
        try:
            hashes[name] = sha256(file)
        except OSError as error:
            raise unreadable(name if case.slices else file, error) from error
    return hashes


def _other_images(folder: Path, names: list[str], model: Model) -> list[CaseFailure]:
    """Return the images that only lack an ending in lower case to be cases, and warn of other images."""
    kinds = {name: _split(name)[1] for name in names if ending_of(Path(name))}
    failures = []
    for name in [name for name, kind in kinds.items() if kind != kind.lower() and _is_alike(f"x{kind.lower()}", model)]:
        kind = kinds.pop(name)
        reason = f"{folder / name}: endings must be in lower case. Rename it to {_split(name)[0]}{kind.lower()}."
        failures.append(CaseFailure(name, "E_FORMAT", reason))
    if kinds:
        text = "%s: %d images are left out, because this model reads files that end with '%s': %s%s"
        more = ", ..." if len(kinds) > 3 else ""
        logger.warning(text, folder, len(kinds), model.dataset_json["file_ending"], ", ".join([*kinds][:3]), more)
    return failures


def _group(names: list[str]) -> tuple[dict[str, dict[int, list[str]]], list[str]]:
    """Group numbered file names by case and channel, and list the names without a number."""
    channels: dict[str, dict[int, list[str]]] = {}
    plain = []
    for name in names:
        match = _NUMBERED.fullmatch(_split(name)[0])
        if match:
            channels.setdefault(match[1], {}).setdefault(int(match[2]), []).append(name)
        else:
            plain.append(name)
    return channels, plain


def _plain_cases(folder: Path, names: list[str], ending: str, model: Model) -> dict[str, dict[int, list[str]]]:
    reader = model.plans_manager.plans["image_reader_writer"]
    one_file = model.num_channels == 1 or reader == _SEVERAL_CHANNELS_PER_FILE
    if not one_file or reader == _NEEDS_NUMBERED_NAMES:
        last = f" ... <case>_{model.num_channels - 1:04d}{ending}" if model.num_channels > 1 else ""
        raise MFMError(
            "E_CHANNELS",
            f"{folder}: no file name has a channel number (e.g. {names[0]}). This model expects {model.num_channels} "
            f"files per case{_channel_names(model)}: <case>_0000{ending}{last}.",
        )
    logger.info(
        "no file in %s has a channel number (_0000): each of the %d files is taken as a case", folder, len(names)
    )
    cases: dict[str, dict[int, list[str]]] = {}
    for name in names:
        cases.setdefault(_split(name)[0], {}).setdefault(0, []).append(name)
    return cases


def _channel_problem(numbers: list[int], model: Model) -> str:
    """Describe the error in the channel numbers of a case; empty if there is none."""
    several_per_file = model.plans_manager.plans["image_reader_writer"] == _SEVERAL_CHANNELS_PER_FILE
    expected = list(range(len(numbers) if several_per_file else model.num_channels))
    if numbers == expected and len(numbers) <= model.num_channels:
        return ""
    there = ", ".join(f"_{number:04d}" for number in numbers)
    return f"the files {there} are there, the model expects {model.num_channels} channels{_channel_names(model)}."


def _channel_names(model: Model) -> str:
    names = DatasetJson.of(model.dataset_json).channels
    return " (" + ", ".join(f"_{number:04d} {name}" for number, name in enumerate(names)) + ")"
