"""Register images as they are: a corpus of scans, a labelled dataset of images and masks, and DICOM series in both.

Images and masks are not copied: the dataset.json names them where they are. DICOM series, and masks whose values are
not 0, 1, 2, ..., are converted into the dataset's folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet import workspace as places
from mfm_nnunet.data import corpus, dicom, pairs
from mfm_nnunet.data.cases import PICTURES, Case, image_files, is_case_name
from mfm_nnunet.data.labelled import IMAGES, LABELS
from mfm_nnunet.data.sources import index_source
from mfm_nnunet.errors import CaseFailure, MFMError, dataset_refused
from mfm_nnunet.files import ending_of, inside, read_json, whole_number, write_json
from mfm_nnunet.images.decode import find_reader_class
from mfm_nnunet.images.reading import count_channels, read_label, reader_for
from mfm_nnunet.modalities import kind_of
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

MADE_BY = "mfm_plan_and_preprocess --images --labels"
"""Entry ``made_by`` of a dataset.json that may be written again."""
DICOM_FOLDER = "dicom"
"""Folder of a corpus for the series that were converted to NIfTI."""
_WRITABLE = {".jpg": ".png", ".jpeg": ".png", ".mhd": ".mha", ".nhdr": ".nrrd"}
"""Endings in which masks are not written, and those that replace them."""
_MOST_PICTURES = 9
"""Number of images whose headers decide if a corpus is greyscale or in colour."""


def register(here: Workspace, dataset: str | int, request: PlanRequest, left_out: list[CaseFailure]) -> str:
    """Return the dataset's name; if the request has images, register them first.

    Series of a corpus that cannot be read are added to ``left_out``.
    """
    if request.images is None:
        dataset_name = here.dataset_name(dataset)
        if request.modality is not None and corpus.is_corpus(here.raw_folder(dataset_name)):
            raise MFMError("E_CONFIG", "--modality of a corpus belongs to --images: register it again with both.")
        return dataset_name
    if whole_number(str(dataset)) is None:  # a dataset that is registered again may be given by name
        with contextlib.suppress(MFMError):
            dataset = here.dataset_name(dataset)
    whole = re.fullmatch(r"Dataset(\d+)_(.+)", str(dataset))
    number = whole_number(whole[1] if whole else str(dataset))
    if number is None or not 1 <= number <= 999:
        raise MFMError("E_CONFIG", f"-d {dataset}: a new dataset needs a number from 1 to 999.")
    name = request.name or (whole[2] if whole else None)
    given = {"modality": request.modality, "slices": request.slices, "colour": request.colour}
    given = {name: value for name, value in given.items() if value is not None}
    images = Path(request.images)
    with dicom.find_series(images, request.series or ()) as series:
        if request.key_file is not None:
            dicom.write_key(Path(request.key_file), series, images)
        if request.labels is not None:
            folder = new_folder(here, number, name or "Labelled")
            good = _require_good(folder.name, series)
            cases = _pair_series(folder, good, images, Path(request.labels), request) if good else None
            cases = cases or pairs.pair_folders(images, Path(request.labels))
            return _register_labelled(folder, cases, request)
        cases = index_source(images, "slices" in given, with_dicom=bool(series))
        if any(case.label is not None for case in cases):
            return _register_labelled(new_folder(here, number, name or "Labelled"), cases, request)
        folder = new_folder(here, number, name or "Corpus")
        settings = corpus.read_settings(folder) | given
        cases += _convert(folder / DICOM_FOLDER, [item for item in series if item.failure is None], "", left_out)
        left_out += [item.failure for item in series if item.failure is not None]
        if not cases and left_out:
            raise dataset_refused(folder.name, left_out, len(left_out), "")
    cases = [replace(case, modality=case.modality or settings.get("modality", "")) for case in cases]
    corpus.register_corpus(here.raw, folder.name, cases, _name_channels(cases, settings), settings)
    return folder.name


def new_folder(here: Workspace, number: int, name: str) -> Path:
    """Return the raw folder of a new dataset; refuse a number that another dataset has (E_EXISTS)."""
    dataset_name = f"Dataset{number:03d}_{name}"
    others = [n for n in here.dataset_names() if n.startswith(dataset_name[:11]) and n != dataset_name]
    if others:
        raise MFMError("E_EXISTS", f"-d {number}: this number is taken by {others[0]}. Choose another.")
    return inside(here.raw, dataset_name)


def _name_channels(cases: Sequence[Case], settings: Mapping[str, Any]) -> list[str]:
    """Name the channels, as nnU-Net normalises by name: Hounsfield units are kept if every case is a CT."""
    is_ct = all(kind_of(case.modality) == "ct" for case in cases)
    return ["CT" if is_ct else f"channel{number}" for number in range(_num_channels(cases, settings))]


def _num_channels(cases: Sequence[Case], settings: Mapping[str, Any]) -> int:
    """Return the number of channels of most cases, from their headers; a colour image has several in one file."""
    if colour := settings.get("colour"):
        return {"grey": 1, "rgb": 3}[colour]
    if volumes := [case for case in cases if ending_of(case.images[0]) not in PICTURES]:
        return len(volumes[0].images)
    found: Counter[int] = Counter()
    for case in cases[:: max(1, len(cases) // _MOST_PICTURES)][:_MOST_PICTURES]:
        with contextlib.suppress(MFMError):  # planning refuses it and gives the reason
            found[sum(map(count_channels, case.images))] += 1
    return found.most_common(1)[0][0] if found else len(cases[0].images)


# DICOM


def _require_good(name: str, series: Sequence[dicom.Series]) -> list[dicom.Series]:
    if bad := [item.failure for item in series if item.failure is not None]:
        raise dataset_refused(name, bad, len(series), "; choose others with --series")
    return list(series)


def _convert(
    folder: Path, series: Sequence[dicom.Series], suffix: str, left_out: list[CaseFailure] | None
) -> list[Case]:
    """Write each series as NIfTI and return their cases; without ``left_out`` a series that fails is an error."""
    cases = []
    for number, item in enumerate(series, start=1):
        try:
            file = dicom.convert_series(item, inside(folder, f"{item.name}{suffix}.nii.gz"))
        except MFMError as error:
            if left_out is None or error.code == "E_DISK_FULL":
                raise
            left_out.append(CaseFailure(item.name, error.code, error.message))
            continue
        logger.info("%d of %d  %s: %s", number, len(series), item.name, item.description)
        cases.append(replace(item.case, images=(file.absolute(),), slices=()))
    return cases


def _pair_series(
    folder: Path, series: Sequence[dicom.Series], images: Path, labels: Path, request: PlanRequest
) -> list[Case]:
    """Pair series with masks called after the series, or after a folder that holds it alone; convert the series."""
    root = images.expanduser().absolute()
    keys: dict[str, list[dicom.Series]] = {}
    for item in series:
        folders = item.files[0].relative_to(root).parts[:-1] if root in item.files[0].parents else ()
        for key in {item.name, *folders}:
            keys.setdefault(key.casefold(), []).append(item)
    found: list[tuple[dicom.Series, Path]] = []
    lines = []
    for mask in sorted(image_files(labels.expanduser().absolute())):
        candidates = keys.get(pairs.mask_key(mask).casefold(), [])
        if len(candidates) == 1:
            found.append((candidates[0], mask))
        else:
            lines.append(f"  {mask.name}: {'no series' if not candidates else 'several series; choose with --series'}")
    uses = Counter(item.name for item, _ in found)
    lines += [
        f"  {item.name} ({item.description}): {uses[item.name] or 'no'} masks"
        for item in series
        if uses[item.name] != 1
    ]
    if lines:
        listing = "\n".join(lines[:20])
        raise MFMError(
            "E_NOT_FOUND",
            f"--labels: masks are called after their series or its folder, and {len(lines)} files have no partner. "
            f"Rename the masks, or choose series with --series:\n{listing}",
        )
    cases = _convert(folder / IMAGES, [item for item, _ in found], "_0000", None)
    return [replace(case, label=mask) for case, (_, mask) in zip(cases, found)]


# Labelled datasets


def _register_labelled(folder: Path, cases: Sequence[Case], request: PlanRequest) -> str:
    """Write the dataset.json of images and masks that lie anywhere, and return the dataset's name."""
    file = folder / "dataset.json"
    if corpus.is_corpus(folder) or (file.exists() and read_json(file, "Repair it.").get("made_by") != MADE_BY):
        raise MFMError("E_EXISTS", f"{folder}: this is a dataset already. Choose another number or --name.")
    without = [case.name for case in cases if case.label is None or not is_case_name(case.name)]
    if without:
        raise MFMError("E_NOT_FOUND", f"{len(without)} images have no mask, e.g. {without[0]}. Add it, or remove them.")
    values = pairs.find_values(cases, request.num_processes or places.num_cores())
    labels, new = pairs.name_labels(values, _parse_names(request.label_names or ()))
    folder.mkdir(parents=True, exist_ok=True)
    changed = [value for value in sorted(values) if new[value] != value]
    if changed:
        text = "the values in the masks are numbered anew in %s: %s"
        logger.info(text, folder / LABELS, ", ".join(f"{old} -> {new[old]}" for old in changed))
    # Masks of DICOM series may be called after patients, so they are written anew, too.
    if changed or folder.absolute() in cases[0].images[0].parents:
        cases = [replace(case, label=_renumber(case, new, folder)) for case in cases]
    settings = {} if request.modality is None else {"modality": request.modality}
    cases = [replace(case, modality=case.modality or request.modality or "") for case in cases]
    form = corpus.file_format(cases, may_mix=False)
    form["file_ending"] = _WRITABLE.get(form["file_ending"], form["file_ending"])
    channels = _name_channels(cases, settings)
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels,
        "numTraining": len(cases),
        **form,
        "made_by": MADE_BY,
        "dataset": {case.name: _describe_case(case, folder) for case in cases},
    }
    write_json(file, content)
    shown = ", ".join(f"{value} {name}" for name, value in labels.items())
    logger.info("%s: %d cases; channels: %s; labels: %s", file, len(cases), ", ".join(channels), shown)
    return folder.name


def _parse_names(names: Sequence[str]) -> dict[int, str]:
    return {int(value): name for value, _, name in (word.partition("=") for word in names)}


def _renumber(case: Case, new: Mapping[int, int], folder: Path) -> Path:
    """Write a copy of a mask with other values, on the same grid, and return its path."""
    assert case.label is not None, "a pair has a mask"
    reader = reader_for(case.label)
    mask_1DHW, properties = read_label(case.label, reader)
    values, where = np.unique(mask_1DHW[0], return_inverse=True)
    kind = np.uint8 if max(new.values()) < 256 else np.uint16
    mask_DHW = np.array([new[int(value)] for value in values], kind)[where].reshape(mask_1DHW.shape[1:])
    ending = ending_of(case.label)
    target = inside(folder / LABELS, f"{case.name}{_WRITABLE.get(ending, ending)}")
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".partial_{target.name}")
    find_reader_class(reader)().write_seg(mask_DHW, str(partial), properties)
    os.replace(partial, target)
    return target


def _describe_case(case: Case, folder: Path) -> dict[str, Any]:
    """Return the entry of a case in nnU-Net's "dataset" map; paths inside of ``folder`` are relative."""

    def shorten(file: Path) -> str:
        return str(file.relative_to(folder.absolute()) if folder.absolute() in file.absolute().parents else file)

    known = {key: getattr(case, key) for key in ("subject", "modality") if getattr(case, key) not in ("", case.name)}
    assert case.label is not None, "a pair has a mask"
    return {"images": [shorten(file) for file in case.images], "label": shorten(case.label), **known}
