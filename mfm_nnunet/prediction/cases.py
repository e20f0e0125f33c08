"""Find the cases of a folder, and prepare a case for the network.

Legend: C channels, D H W voxels.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from mfm_nnunet.data.cases import Case, spelling_of
from mfm_nnunet.data.loops import unchanged
from mfm_nnunet.data.preprocess import preprocess_case_npy
from mfm_nnunet.data.sizes import Sizes, count_windows, require_predictable
from mfm_nnunet.data.sources import advise_dicom
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, MFMError, about, unreadable
from mfm_nnunet.files import ending_of, inside, is_unicode, sha256, shown
from mfm_nnunet.images.integrity import files_of
from mfm_nnunet.images.reading import check_label, read_image, read_label
from mfm_nnunet.prediction.export import is_nifti, read_header
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.requests import PredictRequest

logger = logging.getLogger(__name__)

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


def find_cases(folder: Path, model: Model, previous_stage: Path | None = None) -> list[Case | CaseFailure]:
    """Find the cases of ``folder`` in nnU-Net's naming (<case>_0000<ending>, one file per channel), sorted by name.

    Returns a CaseFailure for a case with other channels than the model's (E_CHANNELS), an image whose ending differs in
    letter case or compression (E_FORMAT), and cases whose names differ in letter case alone (E_CONFIG). Other images
    are named in a warning. If the model has one channel and no file has a numbered name, each file is a case. ``label``
    is the mask of the previous stage, if any. Raises MFMError (E_NOT_FOUND, E_CHANNELS) when there is no case at all.
    """
    ending = model.dataset_json["file_ending"]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    matching = [name for name in names if name.endswith(ending)]
    if not matching:
        other = f"It holds {len(names)} others, e.g. {names[0]}." if names else "It is empty."
        raise MFMError(
            "E_NOT_FOUND",
            f"{folder}: no file ends with '{ending}', which this model reads (<case>_0000{ending}). {other} "
            f"{advise_dicom(folder)}",
        )
    channels, plain = _group(matching, ending)
    if not channels:
        channels, plain = _plain_cases(folder, plain, ending, model), []
    unnumbered = f"the name has no channel number; expected <case>_0000{ending}."
    found: list[Case | CaseFailure] = [
        CaseFailure(name, "E_CHANNELS", f"{folder / name}: {unnumbered}") for name in plain
    ]
    found += _other_images(folder, [name for name in names if name not in matching], ending)
    spellings = Counter(spelling_of(name) for name in channels)
    for name, numbered in channels.items():
        code, problem = "E_CHANNELS", _channel_problem(sorted(numbered), model)
        if not is_unicode(name):  # SimpleITK would crash the process when writing the mask
            code, problem = "E_CONFIG", "the name is not UTF-8, so no mask can be named after it. Rename the files."
        elif spellings[spelling_of(name)] > 1:
            code = "E_CONFIG"
            problem = "another case differs only in letter case or Unicode form. Rename one of them."
        if problem:
            found.append(CaseFailure(name, code, f"{shown(folder / name)}: {problem}"))
        else:
            mask = inside(previous_stage, f"{name}{ending}") if previous_stage is not None else None
            found.append(Case(name, tuple(folder / numbered[k] for k in sorted(numbered)), mask))
    return sorted(found, key=lambda item: item.case if isinstance(item, CaseFailure) else item.name)


def prepare_case(model: Model, case: Case, request: PredictRequest) -> PreparedCase:
    """Read and preprocess a case; the mask of a previous stage becomes additional channels.

    ``request`` affects the memory and time that the prediction will take. Raises MFMError: those of the image checks,
    E_CHANNELS, E_CHANGED when a file changed while it was read, E_TOO_LARGE before anything too large is resampled, and
    E_LABEL_GEOMETRY and E_LABEL_VALUE for the mask of a previous stage.
    """
    reader = model.plans_manager.plans["image_reader_writer"]
    with unchanged(case):
        image, properties = read_image(case.images, reader)
        mask, mask_properties = read_label(case.label, reader) if case.label is not None else (None, {})
        header = read_header(case.images[0]) if is_nifti(case.images[0]) else None
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

    Raises MFMError (E_NOT_FOUND, E_PERMISSION) for a file that cannot be read.
    """
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
            raise unreadable(file, error) from error
    return hashes


def _other_images(folder: Path, names: list[str], ending: str) -> list[CaseFailure]:
    """Return the images that only lack the right ending to be cases, and warn of other images."""
    kinds = {name: ending_of(Path(name)) for name in names if ending_of(Path(name))}
    failures = []
    for name in [
        name for name, kind in kinds.items() if kind.removesuffix(".gz") == ending.lower().removesuffix(".gz")
    ]:
        kind = kinds.pop(name)
        repair = "Rename it to" if kind == ending.lower() else "Convert it to"
        reason = (
            f"{folder / name}: this model reads files that end with '{ending}'. {repair} {name[: -len(kind)]}{ending}."
        )
        failures.append(CaseFailure(name, "E_FORMAT", reason))
    if kinds:
        logger.warning(
            "%s: %d images are left out, because this model reads files that end with '%s': %s%s",
            folder, len(kinds), ending, ", ".join(list(kinds)[:3]), ", ..." if len(kinds) > 3 else "",
        )  # fmt: skip
    return failures


def _group(names: list[str], ending: str) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Group numbered file names by case and channel, and list the names without a number."""
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending))
    channels: dict[str, dict[int, str]] = {}
    plain = []
    for name in names:
        match = pattern.fullmatch(name)
        if match:
            channels.setdefault(match[1], {})[int(match[2])] = name
        else:
            plain.append(name)
    return channels, plain


def _plain_cases(folder: Path, names: list[str], ending: str, model: Model) -> dict[str, dict[int, str]]:
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
    return {name[: -len(ending)]: {0: name} for name in names}


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
