"""Read listings of images and their metadata: a CSV table, or nnssl's ``pretrain_data.json``.

Masks are matched by column name, never by position. Every listed file must exist. Only the fields of :class:`Case` are
read; age, sex and scanners are ignored.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from mfm_nnunet.data.cases import Case, named, safe_name
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import ending_of, read_json
from mfm_nnunet.settings import REMOVED

NNSSL_FILE = "pretrain_data.json"
OF_PREPROCESSED = (
    "is nnssl's index of data that it preprocessed. Give the pretrain_data.json of the raw folder "
    "($nnssl_raw/DATASET/pretrain_data.json) instead."
)
_MASK_NAMES = ("anonymisation_mask", "anonymization_mask")
"""Names of the mask of anonymised voxels in tables and in nnssl's index."""
_log = logging.getLogger(__name__)


def read_table(file: Path) -> list[Case]:
    """Read the cases of a CSV.

    The images are in the column ``image``, or ``image_0``, ``image_1``, ... for several channels, relative to the file.
    Optional columns: ``case``, ``subject``, ``modality``, ``dataset``, ``anonymisation_mask``; cells may be empty.
    A column ``label`` of image files makes a labelled dataset; one of anything else is ignored.
    """
    columns, rows = _read_rows(file)
    labels = [row.get("label", "") for row in rows]
    if any(labels) and all(ending_of(Path(label)) for label in labels if label):
        columns = [*columns, "label"]
    problems = [
        f"  line {line}: {f'no such file {row[column]}' if row[column] else f'{column} is empty'}"
        for line, row in enumerate(rows, start=2)
        for column in (*columns, *(name for name in _MASK_NAMES if row.get(name)))
        if not row[column] or not os.path.lexists(_absolute(row[column], file.parent))
    ]
    _require_all(file, problems)
    if any(row.get("anatomy_mask") for row in rows):
        _log.warning("%s: the column anatomy_mask is not used. %s", file, REMOVED["pretrain.anatomy_fraction"])
    masks = [_absolute(row["label"], file.parent) if "label" in columns else None for row in rows]
    columns = [column for column in columns if column != "label"]
    images = [tuple(_absolute(row[column], file.parent) for column in columns) for row in rows]
    if not images:
        return []
    root = os.path.commonpath([files[0].parent for files in images])
    cases = _with_columns(file, rows, named([files[0].relative_to(root) for files in images], images))
    return [dataclasses.replace(case, label=mask) for case, mask in zip(cases, masks)]


def read_nnssl(file: Path) -> list[Case]:
    """Read the cases of nnssl's index: collection, datasets, subjects, sessions, images with associated masks.

    Paths may begin with a variable (``$nnssl_raw/...``); relative ones start at the file's folder.
    """
    entries = list(_nnssl_entries(file, read_json(file, "Write it again with nnssl, or list the images in a CSV.")))
    if is_of_preprocessed(file) or (entries and not any(ending_of(Path(e["image_path"])) for _, e in entries)):
        raise MFMError("E_FORMAT", f"{file}: {OF_PREPROCESSED}")
    images = [_nnssl_path(file, entry["image_path"]) for _, entry in entries]
    masks = [_nnssl_mask(file, entry) for _, entry in entries]
    wanted = [path for image, mask in zip(images, masks) for path in (image, mask) if path is not None]
    _require_all(file, [f"  {path}" for path in wanted if not os.path.lexists(path)])
    if any(entry.get("image_info") for _, entry in entries):
        _log.info("%s: image_info (quality scores, scanners) is not used, nor are anatomy masks", file)
    cases = named([place / path.name for (place, _), path in zip(entries, images)], [(path,) for path in images])
    return [
        dataclasses.replace(
            case,
            subject="/".join(place.parts[:2]),
            modality=str(entry.get("modality") or "").strip(),
            dataset=place.parts[0],
            anonymisation_mask=mask,
        )
        for case, (place, entry), mask in zip(cases, entries, masks)
    ]


def is_of_preprocessed(file: Path) -> bool:
    """Return whether a file is named like nnssl's index of preprocessed data, ``pretrain_data__PLAN.json``."""
    return re.fullmatch(r"pretrain_data__.+\.json", file.name) is not None


def _nnssl_entries(file: Path, content: Mapping[str, Any]) -> Iterator[tuple[PurePath, dict[str, Any]]]:
    """Yield (dataset/subject/session, image entry) of all images."""
    for dataset, subjects in _nnssl_level(file, content, "datasets"):
        for subject, sessions in _nnssl_level(file, subjects, "subjects"):
            for session, images in _nnssl_level(file, sessions, "sessions"):
                entries = images.get("images")
                if not isinstance(entries, list):
                    raise _not_nnssl(file, f"session '{session}' of '{subject}' has no list 'images'")
                # Identifiers may contain slashes; each must become one path component.
                place = PurePath(*(_part(name) for name in (dataset, subject, session)))
                for entry in entries:
                    if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
                        raise _not_nnssl(file, f"an image of '{subject}' has no 'image_path'")
                    yield place, entry


def _part(name: str) -> str:
    return "_" if name in ("", ".", "..") else name.replace("/", "_")


def _nnssl_level(file: Path, content: Mapping[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    level = content.get(key)
    if not isinstance(level, dict) or not all(isinstance(value, dict) for value in level.values()):
        raise _not_nnssl(file, f"there is no table '{key}'")
    yield from ((str(name), value) for name, value in level.items())


def _not_nnssl(file: Path, problem: str) -> MFMError:
    return MFMError(
        "E_FORMAT", f"{file}: {problem}. Expected nnssl's index: datasets, subjects, sessions, images with image_path."
    )


def _nnssl_path(file: Path, path: str) -> Path:
    first, slash, rest = path.partition("/")
    if first.startswith("$"):
        root = os.environ.get(first[1:].strip("{}"))
        if root is None:
            raise MFMError("E_CONFIG", f"{file}: the paths need the environment variable {first}. Set it.")
        path = root + slash + rest
    return _absolute(path, file.parent)


def _nnssl_mask(file: Path, entry: Mapping[str, Any]) -> Path | None:
    associated = entry.get("associated_masks") or {}
    if not isinstance(associated, dict) or not all(isinstance(path, (str, type(None))) for path in associated.values()):
        raise _not_nnssl(file, f"'associated_masks' of {entry['image_path']} is no table")
    return next((_nnssl_path(file, associated[name]) for name in _MASK_NAMES if associated.get(name)), None)


def _require_all(file: Path, problems: Sequence[str]) -> None:
    if problems:
        raise MFMError("E_NOT_FOUND", f"{file}: {len(problems)} images or masks are missing:\n" + "\n".join(problems))


def read_csv(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Read a table with a header, separated by commas, semicolons or tabs, as the names of its columns and its rows."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
        header = list(reader.fieldnames or [])
        return header, [{name: row.get(name) or "" for name in header} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MFMError("E_FORMAT", f"{file}: cannot be read as a CSV table ({error}).") from error


def _read_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the names of the image columns, and the rows; column names are trimmed and in lower case."""
    names, raw = read_csv(file)
    header = [name.strip().lower() for name in names]
    rows = [{name.strip().lower(): cell.strip() for name, cell in row.items()} for row in raw]
    numbered = [name for name in header if re.fullmatch(r"image_[0-9]{1,4}", name)]
    channels = sorted(numbered, key=lambda name: int(name[6:]))
    columns = ["image"] if "image" in header else channels
    if not columns:
        found = f"only {', '.join(header)}" if header else "and no first line"
        raise MFMError("E_FORMAT", f"{file}: no column 'image' or 'image_0', {found}. Name the column of the paths.")
    return columns, rows


def _absolute(path: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / os.path.expanduser(path)))


def _with_columns(file: Path, cells: list[dict[str, str]], cases: list[Case]) -> list[Case]:
    """Apply the names, subjects, modalities, datasets and masks of the table to the cases."""
    given = [safe_name(row["case"]) if row.get("case") else case.name for row, case in zip(cells, cases)]
    uses = Counter(name.casefold() for name in given)
    twice = sorted({name for name in given if uses[name.casefold()] > 1})
    if twice:
        raise MFMError("E_CONFIG", f"{file}: these cases are named twice: {', '.join(twice)}.")
    return [
        Case(
            name,
            case.images,
            None,
            row.get("subject") or (case.subject if case.subject != case.name else name),
            row.get("modality", ""),
            row.get("dataset", ""),
            next((_absolute(row[name], file.parent) for name in _MASK_NAMES if row.get(name)), None),
        )
        for name, row, case in zip(given, cells, cases)
    ]
