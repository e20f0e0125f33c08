"""The class table of a union of datasets: the outputs of one network, and which dataset annotates which of them.

A person confirms the table in ``class_table.json``; ``plans["mfm"]["universal"]`` holds the part that training and
prediction need. A class keeps its number, that of its row, when datasets are added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mfm_nnunet.data.cases import Case, subject_of
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import atomic_write, read_json

FILE = "class_table.json"
SAMPLING = 0.5
"""Datasets are drawn in proportion to their number of cases to this power: sqrt(n), as in MultiTalent (2303.14444)."""
HOW_TO = (
    "One row is one output of the network. A row with several datasets is one class: give rows other names, or split "
    "them, where protocols differ. Rows keep their order; a label without a row is background. exclusive: no voxel has "
    "two classes; else classes may overlap, and later rows are painted over earlier ones. same_patients: cases of one "
    "name are one patient and stay in one fold. Then set confirmed to true, and plan again if you changed anything."
)
_RESERVED = ("background", "ignore")
_ADVICE = "Correct the file, or delete it and plan the union again with --universal."


@dataclass(frozen=True)
class Row:
    """A class: its name, and the local label values that belong to it, by the number of the dataset."""

    name: str
    labels: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ClassTable:
    """The classes of a union and its datasets, by their number as three digits ("004")."""

    rows: tuple[Row, ...]
    datasets: Mapping[str, Mapping[str, Any]]
    """"name"; "kind" of image; "labels", the foreground of its dataset.json; "ignore", if it has that label; and
    "pseudo", the classes that an older model labelled."""
    exclusive: bool
    sampling: float = SAMPLING
    num_old: int = 0
    """Number of classes of the model that was extended; 0 without one."""

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> ClassTable:
        """Read the table from a plan or a dataset.json. Raises MFMError (E_CONFIG) if it is damaged."""
        try:
            rows = tuple(
                Row(str(row["name"]), {str(key): tuple(map(int, values)) for key, values in row["labels"].items()})
                for row in block["classes"]
            )
            datasets = {str(key): dict(entry) for key, entry in block["datasets"].items()}
            num_old, is_exclusive = int(block.get("num_old", 0)), block["exclusive"]
            return cls(rows, datasets, bool(is_exclusive), float(block.get("sampling", SAMPLING)), num_old)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MFMError("E_CONFIG", f"the table of classes is damaged ({error!r}). {_ADVICE}") from error

    def to_block(self) -> dict[str, Any]:
        """Return the table as JSON values."""
        return {
            "classes": [{"name": row.name, "labels": {k: list(v) for k, v in row.labels.items()}} for row in self.rows],
            "datasets": {key: dict(entry) for key, entry in self.datasets.items()},
            "exclusive": self.exclusive,
            "sampling": self.sampling,
            "num_old": self.num_old,
        }

    @property
    def names(self) -> list[str]:
        """Names of the classes in the order of the network's outputs, without background."""
        return [row.name for row in self.rows]

    @property
    def has_regions(self) -> bool:
        """True if classes may overlap: one sigmoid each; else they share a softmax with the background."""
        return not self.exclusive and len(self.rows) > 1

    def classes_of(self, key: str) -> list[str]:
        """Return the names of the classes that a dataset annotates, also by an older model."""
        pseudo = self.datasets[key].get("pseudo", ())
        return [row.name for row in self.rows if key in row.labels or row.name in pseudo]

    def valid_outputs(self, key: str) -> tuple[bool, ...]:
        """Return for each output of the network if a dataset annotates it; of a softmax, the first is background."""
        known = self.classes_of(key)
        valid = tuple(name in known for name in self.names)
        return valid if self.has_regions else (True, *valid)

    def expected_classes(self, num_cases: Mapping[str, int]) -> float:
        """Return the mean number of annotated classes of a case, as datasets of these sizes are drawn."""
        shares = {key: number**self.sampling for key, number in num_cases.items()}
        found = sum(share * len(self.classes_of(key)) for key, share in shares.items())
        return found / sum(shares.values())

    # Values in label maps. A value stands for a set of classes, and 0 for none.

    def _sets(self) -> list[frozenset[int]]:
        """List the sets of classes (numbers of rows) that label maps may hold; value i + 1 is set i.

        nnU-Net takes lists of one value for a softmax. A value for voxels of two classes, if there is none, makes them
        regions.
        """
        seen = self._seen_sets()
        is_needed = self.has_regions and all(len(classes) == 1 for classes in seen)
        return [*seen, frozenset([0, 1])] if is_needed else seen

    def _seen_sets(self) -> list[frozenset[int]]:
        if not self.has_regions:
            return [frozenset([number]) for number in range(len(self.rows))]
        found = {self._set_of(key, value) for key, entry in self.datasets.items() for value in _local_values(entry)}
        found = {classes for classes in found if classes}
        found |= {frozenset([n]) for n in range(len(self.rows)) if not any(n in classes for classes in found)}
        return sorted(found, key=lambda classes: (max(classes), len(classes), sorted(classes)))

    def _set_of(self, key: str, value: int) -> frozenset[int]:
        return frozenset(number for number, row in enumerate(self.rows) if value in row.labels.get(key, ()))

    def values(self, key: str) -> dict[int, int]:
        """Return the value in the union of each value in a dataset's label maps; those of no class become 0."""
        sets = self._sets()
        table = {0: 0}
        for value in _local_values(self.datasets[key]):
            classes = self._set_of(key, value)
            table[value] = sets.index(classes) + 1 if classes else 0
        ignore = self.datasets[key].get("ignore")
        return table if ignore is None else {**table, int(ignore): len(sets) + 1}

    def labels(self) -> dict[str, Any]:
        """Return ``labels`` of the union's dataset.json and, if classes may overlap, ``regions_class_order``."""
        sets = self._sets()
        labels: dict[str, Any] = {"background": 0}
        own = [
            [value for value, classes in enumerate(sets, 1) if number in classes] for number in range(len(self.rows))
        ]
        for row, values in zip(self.rows, own):
            labels[row.name] = values if self.has_regions else values[0]
        if any(entry.get("ignore") is not None for entry in self.datasets.values()):
            labels["ignore"] = len(sets) + 1
        if not self.has_regions:
            return {"labels": labels}
        seen = self._seen_sets()
        return {"labels": labels, "regions_class_order": [_paint(n, seen, values) for n, values in enumerate(own)]}


def _paint(number: int, seen: Sequence[frozenset[int]], values: Sequence[int]) -> int:
    """Return the value that a class is painted with: it lies in all classes before it with which it is seen.

    Classes are painted in order, so this is right for a tumour in a liver. Two classes that never meet in a label map
    keep values of their own.
    """
    last = [value for value in values if value <= len(seen) and max(seen[value - 1]) == number]
    return max(last, key=lambda value: len(seen[value - 1])) if last else values[0]


def _local_values(entry: Mapping[str, Any]) -> list[int]:
    return sorted({int(value) for values in entry["labels"].values() for value in values})


def union_of(dataset_json: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the table in the dataset.json of a union; None for other datasets."""
    own = dataset_json.get("mfm")
    found = own.get("universal") if isinstance(own, Mapping) else None
    return found if isinstance(found, Mapping) else None


def key_of(case: str) -> str:
    """Return the number of the dataset that a case of a union comes from."""
    return case.partition("_")[0]


def describe_cases(cases: Iterable[Case], dataset_json: Mapping[str, Any]) -> list[Case]:
    """Add kind, dataset and patient to the cases of a union; cases of other datasets stay as they are."""
    block = union_of(dataset_json)
    if block is None:
        return list(cases)
    described = []
    for case in cases:
        key, _, name = case.name.partition("_")
        if key not in block["datasets"]:
            raise MFMError("E_CONFIG", f"{case.images[0]}: no dataset {key} in this union. Plan it again.")
        entry, patient = block["datasets"][key], subject_of(Path(name)) or name
        subject = patient if block.get("same_patients", True) else f"{key}_{patient}"
        described.append(replace(case, subject=subject, modality=entry["kind"], dataset=entry["name"]))
    return described


# The file


def propose(
    datasets: Mapping[str, Mapping[str, Any]], old: ClassTable | None = None
) -> tuple[ClassTable, dict[str, list[str]]]:
    """Propose a table for some datasets, after the rows of an ``old`` one; return names that several of them have.

    Labels of equal names (apart from letter case) become one class.
    """
    rows: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {}
    for row in old.rows if old else ():
        kept = {key: values for key, values in row.labels.items() if key in datasets}
        rows[row.name.strip().casefold()] = (row.name, kept)
    known = {key for row in (old.rows if old else ()) for key in row.labels}
    same: dict[str, list[str]] = {}
    for key, entry in datasets.items():
        for name, values in () if key in known else entry["labels"].items():
            plain = name.strip().casefold()
            found, labels = rows.setdefault(plain, (name, {}))
            labels[key] = tuple(values)
            if len(labels) > 1 or (old and plain in {row.name.strip().casefold() for row in old.rows}):
                same[found] = sorted(labels)
    overlap = any(len(values) > 1 for entry in datasets.values() for values in entry["labels"].values())
    exclusive = old.exclusive if old else not overlap
    table = ClassTable(
        tuple(Row(*row) for row in rows.values()), datasets, exclusive, num_old=len(old.rows) if old else 0
    )
    return table, same


def write_class_table(file: Path, table: ClassTable, same_names: Mapping[str, list[str]], **more: Any) -> None:
    """Write a table that a person is to confirm, with a line for each class and each dataset."""
    about = {"confirmed": False, "how_to": HOW_TO, "same_names": dict(same_names), "same_patients": True, **more}
    block = table.to_block()
    rows = ",\n  ".join(json.dumps(row) for row in block.pop("classes"))
    datasets = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(entry)}" for k, entry in block.pop("datasets").items())
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in (about | block).items()]
    parts += [f'"classes": [\n  {rows}\n ]', f'"datasets": {{\n  {datasets}\n }}']
    with atomic_write(file) as handle:
        handle.write(("{\n " + ",\n ".join(parts) + "\n}\n").encode())


def read_class_table(file: Path) -> tuple[ClassTable, dict[str, Any]]:
    """Read and check a table; return it with the whole file. Raises MFMError (E_NOT_FOUND, E_FORMAT, E_CONFIG)."""
    content = read_json(file, _ADVICE)
    try:
        table = ClassTable.of(content)
    except MFMError as error:
        raise MFMError(error.code, f"{file}: {error.message}") from error
    if problems := _find_problems(table, content):
        raise MFMError("E_CONFIG", f"{file}: {'; '.join(problems[:5])}. {_ADVICE}")
    return table, content


def _find_problems(table: ClassTable, content: Mapping[str, Any]) -> list[str]:
    problems = [] if table.rows else ["there are no classes"]
    for name in ("confirmed", "exclusive", "same_patients"):
        if type(content.get(name, False)) is not bool:
            problems.append(f"'{name}' must be true or false")
    seen: dict[str, str] = {}
    for row in table.rows:
        plain = row.name.strip().casefold()
        if not plain or plain in _RESERVED:
            problems.append(f"a class cannot be called '{row.name}'")
        elif plain in seen:
            problems.append(f"the class '{row.name}' is there twice: give one another name, or make it one row")
        seen[plain] = row.name
        problems += _find_unknown(table, row)
    return problems + (_find_clashes(table) if table.exclusive else [])


def _find_unknown(table: ClassTable, row: Row) -> list[str]:
    problems = [
        f"class '{row.name}' names dataset {key}. {nearest(key, table.datasets)}"
        for key in row.labels
        if key not in table.datasets
    ]
    for key in (key for key in row.labels if key in table.datasets):
        known = _local_values(table.datasets[key])
        if wrong := [value for value in row.labels[key] if value not in known] or not row.labels[key]:
            problems.append(f"class '{row.name}': dataset {key} has no label {wrong}; it has {known}")
    return problems


def _find_clashes(table: ClassTable) -> list[str]:
    owners: dict[tuple[str, int], list[str]] = {}
    for row in table.rows:
        for key, values in row.labels.items():
            for value in values:
                owners.setdefault((key, value), []).append(row.name)
    return [
        f"label {value} of dataset {key} belongs to the classes {' and '.join(names)}, so they overlap: set exclusive "
        "to false"
        for (key, value), names in owners.items()
        if len(names) > 1
    ]


def require_confirmed(folders: Sequence[Path], planned: Mapping[str, Any]) -> None:
    """Raise MFMError (E_CONFIG) unless the table in the first folder that has one is confirmed and is the plan's."""
    file = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
    if file is None:
        raise MFMError(
            "E_NOT_FOUND", f"{folders[0] / FILE}: no such file, and a person must confirm the classes in it."
        )
    table, content = read_class_table(file)
    number = int(file.parent.name[7:10])
    if ClassTable.of(planned).to_block() != table.to_block():
        raise MFMError(
            "E_CONFIG",
            f"{file}: the classes were changed after the plan was made. Run: mfm_plan_and_preprocess -d {number}",
        )
    if content.get("confirmed") is not True:
        same = ", ".join(content.get("same_names") or {}) or "none"
        raise MFMError(
            "E_CONFIG",
            f"{file}: nobody has confirmed these classes (names in several datasets, taken as one class: {same}). Read "
            'the table, correct it, and set "confirmed": true.',
        )


def table_of_model(dataset_name: str, block: Mapping[str, Any] | None, dataset: DatasetJson) -> ClassTable:
    """Return the classes of a trained model as a table: a union's own, or the labels of its single dataset."""
    if block is not None:
        return ClassTable.of(block)
    found = dataset.foreground
    if not dataset.has_regions:
        found = dict(sorted(found.items(), key=lambda item: item[1]))
    key = dataset_name[7:10]
    entry = {"name": dataset_name, "kind": "", "labels": {name: list(values) for name, values in found.items()}}
    return ClassTable(tuple(Row(name, {key: v}) for name, v in found.items()), {key: entry}, not dataset.has_regions)
