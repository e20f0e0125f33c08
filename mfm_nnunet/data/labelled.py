"""List the cases of a dataset in nnU-Net's raw format; report every image file that would be ignored."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.data.cases import (
    PICTURES,
    Case,
    group_channels,
    image_files,
    is_case_name,
    require_channels,
    spelling_of,
    subject_of,
)
from mfm_nnunet.data.class_table import describe_cases
from mfm_nnunet.data.label_table import FILE, read_label_table
from mfm_nnunet.dataset import IMAGE_TASKS, DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import ending_of

IMAGES, LABELS = "imagesTr", "labelsTr"
SUBJECTS = "subjects.csv"
"""Optional table beside ``dataset.json``: the subject, and perhaps the modality, of each case."""
_log = logging.getLogger(__name__)


def raw_cases(folder: Path, dataset_json: Mapping[str, Any], need_mapped_files: bool = True) -> list[Case]:
    """Return the cases of a raw dataset, sorted by name.

    Without ``need_mapped_files``, files named by a "dataset" map may be missing.
    """
    is_mapped = "dataset" in dataset_json
    cases = _mapped(folder, dataset_json) if is_mapped else _listed(folder, dataset_json)
    if not cases:
        raise MFMError(
            "E_NOT_FOUND",
            f"{folder / IMAGES}: no image that ends with {dataset_json['file_ending']}, the file_ending in "
            "dataset.json. Add the images, or correct the ending.",
        )
    _require_names(folder, cases)
    if DatasetJson.of(dataset_json).task in IMAGE_TASKS:
        cases = _with_table(folder, dataset_json, cases)
    elif (folder / SUBJECTS).is_file():
        subjects = read_subjects(folder / SUBJECTS, cases, str(folder / SUBJECTS))
        kinds = _read_column(folder / SUBJECTS, "modality", str(folder / SUBJECTS), is_needed=False)
        cases = [
            dataclasses.replace(case, subject=subjects[case.name], modality=kinds.get(case.name) or case.modality)
            for case in cases
        ]
    if need_mapped_files or not is_mapped:
        _require_files(folder, cases)
    return describe_cases(cases, dataset_json)


def _with_table(folder: Path, dataset_json: Mapping[str, Any], cases: Sequence[Case]) -> list[Case]:
    """Check ``labels.csv`` and take the subjects from it; the cases have no masks."""
    table = read_label_table(folder / FILE, DatasetJson.of(dataset_json), {case.name for case in cases})
    return [dataclasses.replace(case, label=None, subject=table.subjects[case.name]) for case in cases]


def read_subjects(file: Path, cases: Sequence[Case], title: str) -> dict[str, str]:
    """Return the subject of each case from a CSV with the columns ``case`` and ``subject``.

    ``title`` names the table in errors. Raises MFMError: E_NOT_FOUND, E_FORMAT, E_CONFIG (a case without a subject, or
    with two).
    """
    found = _read_column(file, "subject", title)
    if missing := [case.name for case in cases if not found.get(case.name)]:
        raise MFMError("E_CONFIG", f"{title}: {len(missing)} cases have no subject, e.g. {missing[0]}. Add them.")
    if others := sorted(set(found) - {case.name for case in cases}):
        _log.warning("%s: %d cases are not in the dataset, e.g. %s", title, len(others), others[0])
    return {case.name: found[case.name] for case in cases}


def _read_column(file: Path, column: str, title: str, is_needed: bool = True) -> dict[str, str]:
    """Return the cell of each case in a column of a CSV, which may be absent if it is not needed."""
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{title}: no such file. Give a CSV with the columns case and subject.")
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle, skipinitialspace=True))
        pairs = {(row["case"].strip(), (row[column] if is_needed else row.get(column) or "").strip()) for row in rows}
    except (KeyError, AttributeError, ValueError, csv.Error) as error:
        raise MFMError("E_FORMAT", f"{title}: expected a CSV with the columns case and subject.") from error
    found = dict(sorted(pairs))
    if len(found) < len(pairs):
        case = min(case for case, cell in pairs if found[case] != cell)
        cells = " and ".join(sorted(cell for other, cell in pairs if other == case))
        raise MFMError("E_CONFIG", f"{title}: case {case} has the {column}s {cells}. Keep one line per case.")
    return found


def warn_of_differences(folder: Path, dataset_json: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Warn if dataset.json and the files disagree about the cases, or if an image is used twice."""
    stated = dataset_json.get("numTraining")
    if isinstance(stated, int) and stated != len(cases):
        _log.warning(
            "%s: numTraining is %d, and there are %d cases. Correct it, or look for what is missing.",
            folder / "dataset.json", stated, len(cases),
        )  # fmt: skip
    used = {os.path.realpath(file) for case in cases for file in (*case.images, case.label) if file is not None}
    left = [file for file in _image_files(folder) if os.path.realpath(file) not in used]
    if left:
        _log.warning(
            '%s: %d image files are left out, because the "dataset" map in dataset.json does not name them, e.g. %s',
            folder, len(left), left[0].relative_to(folder),
        )  # fmt: skip
    owners: dict[tuple[str, ...], list[str]] = {}
    for case in cases:
        owners.setdefault(tuple(os.path.realpath(file) for file in case.images), []).append(case.name)
    if twice := [names for names in owners.values() if len(names) > 1]:
        _log.warning(
            "%s: %d images are in several cases, e.g. in %s: one may train while the other validates",
            folder, len(twice), " and ".join(twice[0]),
        )  # fmt: skip


def _mapped(folder: Path, dataset_json: Mapping[str, Any]) -> list[Case]:
    """Read nnU-Net's ``"dataset"`` map: paths relative to the folder, with environment variables expanded."""

    def resolve(path: str) -> Path:
        return Path(os.path.abspath(folder / os.path.expandvars(path)))

    return [
        Case(
            name,
            tuple(resolve(file) for file in entry["images"]),
            resolve(entry["label"]) if entry.get("label") else None,
            str(entry.get("subject") or subject_of(Path(name))),
            str(entry.get("modality") or ""),
        )
        for name, entry in sorted(dataset_json["dataset"].items())
    ]


def _listed(folder: Path, dataset_json: Mapping[str, Any]) -> list[Case]:
    """List ``imagesTr/NAME_0000.nii.gz`` and ``labelsTr/NAME.nii.gz``."""
    ending = dataset_json["file_ending"]
    if not (folder / IMAGES).is_dir():
        raise MFMError("E_NOT_FOUND", f"{folder}: has no folder imagesTr. Put the images there as NAME_0000{ending}.")
    groups = group_channels(folder / IMAGES, ending)
    if not groups:
        return []
    _require_no_others(folder, ending)
    num_channels = len(dataset_json.get("channel_names") or dataset_json.get("modality") or [0])
    if ending.lower() in PICTURES and all(set(files) == {0} for files in groups.values()):
        num_channels = 1  # Colour pictures hold all channels in one file.
    require_channels(folder / IMAGES, groups, num_channels)
    _require_images(folder, ending, list(groups))
    return [
        Case(
            name,
            tuple(files[channel].absolute() for channel in sorted(files)),
            (folder / LABELS / f"{name}{ending}").absolute(),
            subject_of(Path(name)),
        )
        for name, files in groups.items()
    ]


def _image_files(folder: Path) -> list[Path]:
    """List all image files below imagesTr and labelsTr, except hidden ones.

    The content of a folder with an image's name is skipped: reading that image refuses the folder.
    """
    places = [folder / name for name in (IMAGES, LABELS) if (folder / name).is_dir()]
    return sorted(file for place in places for file in image_files(place) if not ending_of(file.parent))


def _require_no_others(folder: Path, ending: str) -> None:
    """Refuse image files that nnU-Net would ignore, so that no model is trained on less data than intended."""
    places = (folder / IMAGES, folder / LABELS)
    others = [file for file in _image_files(folder) if file.parent not in places or not file.name.endswith(ending)]
    if others:
        listing = "\n".join(f"  {file.relative_to(folder)}" for file in others)
        raise MFMError(
            "E_FORMAT",
            f"{folder}: {len(others)} image files would be left out, because cases are the files directly in imagesTr "
            f"and labelsTr that end with '{ending}', the file_ending in dataset.json. Convert, rename or move them:\n"
            f"{listing}",
        )


def _require_images(folder: Path, ending: str, names: Sequence[str]) -> None:
    labelled = {file.name[: -len(ending)] for file in (folder / LABELS).glob(f"*{ending}")}
    orphans = sorted(name for name in labelled - set(names) if not name.startswith("."))
    if not orphans:
        return
    spellings = {spelling_of(name) for name in names}
    alike = " (an image there differs from it only in letter case or Unicode form)"
    lines = [f"  {name}_0000{ending}{alike if spelling_of(name) in spellings else ''}" for name in orphans]
    raise MFMError(
        "E_NOT_FOUND",
        f"{folder}: {len(orphans)} labels have no image in imagesTr. Add the images, or remove the labels:\n"
        + "\n".join(lines),
    )


def _require_names(folder: Path, cases: Sequence[Case]) -> None:
    if impossible := [case.name for case in cases if not is_case_name(case.name)]:
        raise MFMError(
            "E_CONFIG",
            f"{folder}: {len(impossible)} cases have names that nnU-Net would mistake for label maps, or not find. "
            "Rename image and label:\n" + "\n".join(f"  {name}" for name in impossible),
        )
    uses = Counter(spelling_of(case.name) for case in cases)
    alike = [case.name for case in cases if uses[spelling_of(case.name)] > 1]
    if alike:
        raise MFMError(
            "E_CONFIG",
            f"{folder}: the names of {len(alike)} cases differ only in letter case or Unicode form, so on some disks "
            "one would replace the other. Rename all but one of each, image and label:\n"
            + "\n".join(f"  {name}" for name in sorted(alike, key=spelling_of)),
        )


def _require_files(folder: Path, cases: Sequence[Case]) -> None:
    labels = [case.label for case in cases if case.label is not None]
    files = [*(file for case in cases for file in case.images), *labels]
    missing = [file for file in files if not os.path.lexists(file)]
    is_table = (folder / FILE).is_file()
    if labels and missing == labels:
        raise MFMError(
            "E_NOT_FOUND",
            f"{folder}: {len(cases)} images but no labels, expected e.g. {labels[0]}. "
            + (f'For {FILE} write "task": one of {", ".join(IMAGE_TASKS)} into dataset.json. ' if is_table else "")
            + "Add the labels; to use the images without labels, register them as a corpus: "
            "mfm_plan_and_preprocess -d NUMBER --images FOLDER",
        )
    if missing:
        listing = "\n".join(f"  {file}" for file in missing)
        raise MFMError("E_NOT_FOUND", f"{folder}: {len(missing)} image or label files are missing:\n{listing}")
