"""Labels of whole images: ``labels.csv`` beside ``imagesTr``, with all its checks, and folds made from it.

A table has a header and one line per image: ``case`` (or ``image``, ``image_path``), ``label``, optionally ``subject``
and ``fold``. Several labels of a case are joined by ``;``, or each class has a column of 0 and 1. An empty cell is an
unknown label.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np

from mfm_nnunet.data.cases import stem_of, subject_of
from mfm_nnunet.data.listings import read_csv
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError, nearest

FILE = "labels.csv"
NAMES = ("case", "image", "image_path")
"""Columns that may name the case, ours first."""
OTHERS = (*NAMES, "subject", "fold")
NUM_FOLDS = 5
SEED = 12345
"""Seed of the folds, the one that nnU-Net uses."""
MOST_CLASSES = 100
"""More distinct numbers than this are no classes."""
_SIDE = re.compile(r"(?:^|[^a-z])(?:left|right)(?:[^a-z]|$)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelTable:
    """The labels of a dataset's cases."""

    task: str
    classes: tuple[str, ...]
    """In the order of the outputs; empty for regression."""
    targets: Mapping[str, tuple[float, ...]]
    """By case: the index of the class, a 0, 1 or NaN per class (multilabel), or a number. Unlabelled cases are absent.
    """
    subjects: Mapping[str, str]
    folds: Mapping[str, int]
    """By case; empty without a column ``fold``."""

    @property
    def num_outputs(self) -> int:
        """Number of the network's outputs."""
        return len(self.classes) or 1

    @property
    def has_sides(self) -> bool:
        """True if a class is named after a side, so that a mirrored image would have another label."""
        return any(_SIDE.search(name.casefold()) for name in self.classes)

    def array(self, cases: Sequence[str]) -> np.ndarray:
        """Return the targets of ``cases`` (N, T), float64."""
        return np.array([self.targets[case] for case in cases], float)

    def class_weights(self, cases: Sequence[str]) -> np.ndarray:
        """Return a weight per class, at most 10: 1/n_c with mean 1 over ``cases``; for multilabel of the positives."""
        targets = self.array(cases)
        if self.task == "classification":
            counts = np.bincount(targets[:, 0].astype(int), minlength=len(self.classes))
            return np.where(counts, len(cases) / np.maximum(counts, 1) / np.count_nonzero(counts), 0.0).clip(max=10)
        positive, known = np.nansum(targets, 0), np.isfinite(targets).sum(0)
        return ((known - positive) / np.maximum(positive, 1)).clip(0.1, 10)

    def describe(self) -> str:
        """Describe the labels in a line."""
        subjects = len({self.subjects[case] for case in self.targets})
        targets = self.array(list(self.targets))
        if self.task == "regression":
            what = f"numbers from {targets.min():g} to {targets.max():g}, median {np.median(targets):g}"
        else:
            counts = np.nansum(targets == 1, 0) if self.task == "multilabel" else np.bincount(targets[:, 0].astype(int))
            what = ", ".join(f"{name} {count}" for name, count in zip(self.classes, counts))
        return f"{self.task} of {len(self.targets)} cases of {subjects} subjects: {what}"

    def to_csv(self, cases: Sequence[str]) -> tuple[list[str], list[list[str]]]:
        """Return header and rows of a table with the labels and subjects of ``cases``, which have labels."""
        if self.task == "multilabel":
            header = ["case", "subject", *self.classes]
            cells = {
                case: ["" if math.isnan(value) else f"{value:g}" for value in self.targets[case]] for case in cases
            }
        else:
            header = ["case", "subject", "label"]
            names = {case: self.targets[case][0] for case in cases}
            cells = {case: [self.classes[int(value)] if self.classes else repr(value)] for case, value in names.items()}
        return header, [[case, self.subjects[case], *cells[case]] for case in cases]

    def make_splits(self, cases: Sequence[str], subjects: Mapping[str, str]) -> list[dict[str, list[str]]]:
        """Make folds stratified by label and grouped by subject, or those of the column ``fold``."""
        names = sorted(cases)
        if self.folds:
            numbers = sorted({self.folds[name] for name in names})
            held_out = [[name for name in names if self.folds[name] == number] for number in numbers]
        else:
            held_out = self._stratified(names, [subjects[name] for name in names])
        if len(held_out) < 2:
            raise MFMError(
                "E_CONFIG",
                f"{FILE}: there is only one labelled subject or fold, so none can be held out for validation. Train "
                "with fold 'all', or add labelled cases.",
            )
        return [{"train": [name for name in names if name not in part], "val": list(part)} for part in held_out]

    def _stratified(self, names: Sequence[str], groups: Sequence[str]) -> list[list[str]]:
        from sklearn.model_selection import StratifiedGroupKFold

        strata = self.strata(names)
        number = min(NUM_FOLDS, len(set(groups)), max(Counter(strata).values()))
        if number < 2:
            return [list(names)]
        folds = StratifiedGroupKFold(number, shuffle=True, random_state=SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer members than folds is in few of them
            parts = [[names[index] for index in held_out] for _, held_out in folds.split(names, strata, groups)]
        return [part for part in parts if part]

    def strata(self, names: Sequence[str]) -> list[int]:
        """Return the stratum of each case: its class, its set of labels, or its fifth of the numbers."""
        targets = self.array(names)
        if self.task == "classification":
            return [int(value) for value in targets[:, 0]]
        if self.task == "regression":
            return [int(value) for value in np.searchsorted(np.quantile(targets, [0.2, 0.4, 0.6, 0.8]), targets[:, 0])]
        kinds = sorted({tuple(row) for row in np.nan_to_num(targets)})
        return [kinds.index(tuple(row)) for row in np.nan_to_num(targets)]


def read_label_table(file: Path, dataset: DatasetJson, cases: Collection[str]) -> LabelTable:
    """Read and check the labels of ``cases``, all of the dataset's.

    Raises MFMError: E_NOT_FOUND (no table, unknown cases, cases without a line), E_FORMAT (not a table, columns
    missing), E_CONFIG (a case twice, a subject in two folds), E_LABEL_VALUE (labels that are none).
    """
    if not file.is_file():
        raise MFMError(
            "E_NOT_FOUND",
            f"{file}: the labels are missing; dataset.json names the task '{dataset.task}'. Write a table with the "
            "columns case and label (documentation/how_to/classify.md).",
        )
    header, rows = read_csv(file)
    columns = {name.strip().lower(): name for name in header}
    named = next((columns[name] for name in NAMES if name in columns), None)
    if named is None:
        raise MFMError(
            "E_FORMAT", f"{file}: no column 'case' or 'image', only {', '.join(header)}. Name the column of the cases."
        )
    names = _match_cases(file, [row[named] for row in rows], cases)
    cells = {name: {key.strip().lower(): value for key, value in row.items()} for name, row in zip(names, rows)}
    task = dataset.task
    if "label" in columns and task != "multilabel":
        labels = {name: row["label"] for name, row in cells.items()}
        classes, targets = _numbers(file, labels) if task == "regression" else _classes(file, labels, dataset)
    elif task == "multilabel":
        by_case = dict(zip(names, rows))
        classes, targets = _label_sets(file, by_case, columns.get("label"), dataset)
    else:
        raise MFMError("E_FORMAT", f"{file}: no column 'label', only {', '.join(header)}. Name the column of labels.")
    return LabelTable(task, classes, targets, _subjects(file, cells), _folds(file, cells))


def find_label_table(raw: Path, preprocessed: Path) -> Path:
    """Return the table in the raw folder of a dataset, or the copy that planning left with the preprocessed data."""
    return next((folder / FILE for folder in (raw, preprocessed) if (folder / FILE).is_file()), raw / FILE)


def _match_cases(file: Path, cells: Sequence[str], cases: Collection[str]) -> list[str]:
    """Return the case of each line; paths of images are reduced to the case's name."""
    names = []
    for cell in cells:
        stem = stem_of(Path(PureWindowsPath(cell.strip()).name))
        short = re.sub(r"_\d{4}$", "", stem)
        names.append(next((name for name in (cell.strip(), stem, short) if name in cases), stem or cell))
    if unknown := [name for name in names if name not in cases]:
        raise MFMError(
            "E_NOT_FOUND",
            f"{file}: {len(unknown)} lines name no image of imagesTr, e.g. '{unknown[0]}'. "
            f"{nearest(unknown[0], cases) if len(cases) < 1000 else ''} Correct the names, or remove the lines.",
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise MFMError("E_CONFIG", f"{file}: {len(twice)} cases have two lines, e.g. '{twice[0]}'. Keep one of each.")
    if missing := sorted(set(cases) - set(names)):
        raise MFMError(
            "E_NOT_FOUND",
            f"{file}: {len(missing)} images have no line, e.g. '{missing[0]}'. Add them; an empty label leaves a case "
            "out.",
        )
    return names


def _classes(
    file: Path, labels: Mapping[str, str], dataset: DatasetJson
) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Return the classes and the index of each labelled case's class."""
    _require_one_spelling(file, set(labels.values()))
    given = {name: label.strip() for name, label in labels.items() if label.strip()}
    counts = Counter(given.values())
    numbers = [_number(label) for label in counts]
    are_numbers = bool(counts) and all(math.isfinite(number) for number in numbers)
    if are_numbers and (len(counts) > MOST_CLASSES or any(number != int(number) for number in numbers)):
        raise MFMError(
            "E_LABEL_VALUE",
            f"{file}: the labels are {len(counts)} different numbers, e.g. {next(iter(counts))}, and no classes. For "
            'numbers write "task": "regression" into dataset.json.',
        )
    if len(counts) < 2:
        found = f"only '{next(iter(counts))}'" if counts else "none"
        raise MFMError("E_LABEL_VALUE", f"{file}: a classifier needs two classes, and there is {found}. Add cases.")
    classes = _known_classes(file, dataset, counts)
    if single := [name for name in classes if counts[name] == 1]:
        raise MFMError(
            "E_LABEL_VALUE",
            f"{file}: the class '{single[0]}' has a single case, so none can train and validate. Add cases, join it "
            "with another class, or leave the cell empty.",
        )
    return classes, {name: (float(classes.index(label)),) for name, label in given.items()}


def _known_classes(file: Path, dataset: DatasetJson, found: Collection[str]) -> tuple[str, ...]:
    """Return the classes in the order of dataset.json, else sorted by name."""
    classes = dataset.classes or tuple(sorted(found))
    for label in found:
        if label not in classes:
            raise MFMError(
                "E_LABEL_VALUE",
                f"{file}: '{label}' is none of the classes in dataset.json. {nearest(label, classes)}",
            )
    return classes


def _require_one_spelling(file: Path, labels: Collection[str]) -> None:
    first: dict[str, str] = {}
    for label in sorted(labels):
        spelling = re.sub(r"[\s_-]+", " ", label.strip().casefold())
        other = first.setdefault(spelling, label)
        if other != label and spelling:
            raise MFMError(
                "E_LABEL_VALUE",
                f"{file}: '{other}' and '{label}' differ only in letter case, spaces or hyphens. Spell a class in one "
                "way.",
            )


def _numbers(file: Path, labels: Mapping[str, str]) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    values = {name: _number(label) for name, label in labels.items() if label.strip()}
    if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
        raise MFMError(
            "E_LABEL_VALUE",
            f"{file}: '{labels[wrong[0]]}' (case {wrong[0]}) is no number, and the task is regression. Correct it, or "
            'write "task": "classification" into dataset.json.',
        )
    if len(set(values.values())) < 2:
        raise MFMError(
            "E_LABEL_VALUE", f"{file}: all numbers are equal, so there is nothing to learn. Check the table."
        )
    return (), {name: (value,) for name, value in values.items()}


def _label_sets(
    file: Path, rows: Mapping[str, Mapping[str, str]], column: str | None, dataset: DatasetJson
) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Return the classes and 0, 1 or NaN per class, from sets in one column or from a column per class."""
    if column is not None:
        sets = {name: [part.strip() for part in row[column].split(";") if part.strip()] for name, row in rows.items()}
        _require_one_spelling(file, {label for labels in sets.values() for label in labels})
        classes = _known_classes(file, dataset, {label for labels in sets.values() for label in labels})
        cells = {name: {label: str(int(label in labels)) for label in classes} for name, labels in sets.items()}
    else:
        wanted = dataset.classes or tuple(
            name
            for name in next(iter(rows.values()), {})
            if name.strip().lower() not in OTHERS and all(row[name].strip() in ("0", "1", "") for row in rows.values())
        )
        classes, cells = wanted, {name: dict(row) for name, row in rows.items()}
    found: dict[str, tuple[float, ...]] = {}
    for name, row in cells.items():
        for label in classes:
            if row.get(label, "?").strip() not in ("0", "1", ""):
                raise MFMError(
                    "E_LABEL_VALUE",
                    f"{file}: '{row.get(label)}' (case {name}, class {label}) is neither 0, 1 nor empty.",
                )
        values = tuple(float(row[label]) if row[label].strip() else math.nan for label in classes)
        if not all(map(math.isnan, values)):
            found[name] = values
    table = np.array(list(found.values())).reshape(len(found), -1)
    for number, label in enumerate(classes):
        if len(found) == 0 or min(np.sum(table[:, number] == 0), np.sum(table[:, number] == 1)) < 2:
            raise MFMError(
                "E_LABEL_VALUE",
                f"{file}: class '{label}' needs two cases that have it and two that do not. Add cases, or remove it.",
            )
    if not classes:
        raise MFMError("E_FORMAT", f"{file}: no column 'label' and no column of 0 and 1 for a class. Add one.")
    return classes, found


def _subjects(file: Path, cells: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the subject of each case; without the column a warning proposes names that share a beginning."""
    if any("subject" in row for row in cells.values()):
        return {name: row["subject"].strip() or name for name, row in cells.items()}
    subjects = {name: subject_of(Path(name)) or name for name in cells}
    groups: dict[str, list[str]] = {}
    for name in cells:
        groups.setdefault(re.sub(r"[_\-. ][A-Za-z0-9]{1,4}$", "", name), []).append(name)
    alike = next((names for names in groups.values() if 1 < len(names) < len(cells) / 2), None)
    if alike and len(set(subjects.values())) == len(cells):
        _log.warning(
            "%s: no column 'subject', so every case counts as a person of its own, and one may train and validate. Are "
            "%s of one person? Then add the column.", file, " and ".join(alike[:3]),
        )  # fmt: skip
    elif len(set(subjects.values())) == len(cells):
        _log.warning("%s: no column 'subject': every case counts as a person of its own", file)
    return subjects


def _folds(file: Path, cells: Mapping[str, Mapping[str, str]]) -> dict[str, int]:
    """Return the fold of each case from the column ``fold``, if there is one with values."""
    given = {name: row.get("fold", "").strip() for name, row in cells.items()}
    if not any(given.values()):
        return {}
    if wrong := [name for name, fold in given.items() if not fold.isdecimal()]:
        raise MFMError(
            "E_CONFIG", f"{file}: the fold of {wrong[0]} is '{given[wrong[0]]}', and must be a number from 0."
        )
    subjects: dict[str, str] = {}
    for name, row in cells.items():
        subject = row.get("subject", "").strip() or name
        if subjects.setdefault(subject, given[name]) != given[name]:
            raise MFMError(
                "E_CONFIG",
                f"{file}: subject '{subject}' is in the folds {subjects[subject]} and {given[name]}, so it would train "
                "and validate. Put all its cases into one fold.",
            )
    return {name: int(fold) for name, fold in given.items()}


@functools.lru_cache(4096)
def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
