"""What a study asks: cells, the question that they share, and the cases and subjects of a labelled dataset."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside
from mfm_nnunet.finetune import settings as finetune_settings
from mfm_nnunet.metrics import foreground_labels
from mfm_nnunet.study.arms import SCRATCH, Arm
from mfm_nnunet.study.splits import Cases, nested_subset
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

CELLS = "cells"
"""Folder of the trainings inside the study folder; with it a study's question is settled."""

RUN_SETTINGS = f"results/*/*/fold_*/{finetune_settings.FILE}"
"""What a training wrote about its settings and its plan, inside its cell's folder."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training: an arm, a number of labelled subjects and a seed."""

    num_labels: int
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.num_labels} labels, seed {self.seed}"

    @property
    def folder_name(self) -> str:
        """Its folder below ``cells``."""
        return f"{self.arm}__{self.num_labels}_labels__seed{self.seed}"


def cells_of(record: Mapping[str, Any]) -> list[Cell]:
    """All cells that any call asked for, as ``study.json`` tells."""
    if "asked" in record:
        return [Cell(**cell) for cell in record["asked"]]
    return [  # a study that was begun by an earlier version tells what its last call asked for
        Cell(num_labels, seed, arm)
        for seed in range(record["seeds"])
        for num_labels in record["labels"]
        for arm in record["compared"]
    ]


def curve_labels(record: Mapping[str, Any]) -> list[int]:
    """The numbers of labels of scratch's learning curve, ascending."""
    return sorted({cell.num_labels for cell in cells_of(record) if cell.arm == SCRATCH})


@dataclass(frozen=True)
class Question:
    """What decides about the result of every cell; it cannot change within one study folder. JSON values."""

    dataset: str
    configuration: str
    plans: str
    """``NAME HASH`` of a plan that was given, ``like HASH`` of a checkpoint, or ``own``: planned from the pool."""
    settings: list[str]
    tolerance_mm: float
    mirroring: bool
    test: list[str]
    subjects: dict[str, str]
    """The subject of every case."""
    data: str
    """A hash of names, sizes and times of change of all images and labels."""


@dataclass(frozen=True)
class Design:
    """A study that can be run. ``folds`` are (number of labels, seed), by their place in ``splits_final.json``."""

    folder: Path
    question: Question
    arms: tuple[Arm, ...]
    labels: list[int]
    seeds: int
    folds: list[tuple[int, int]]
    known_arms: dict[str, Any]
    """What ``study.json`` says of the arms of earlier calls and of this one."""
    asked_before: list[Cell]
    """The cells that earlier calls asked for."""
    plan_sha256: str | None
    """The digest of the plan of earlier calls; None before the first training."""
    cases: dict[str, Case]
    dataset_json: dict[str, Any]

    @property
    def workspace(self) -> Path:
        """The root of the study's own workspace."""
        return self.folder / "workspace"

    @property
    def pool(self) -> list[Case]:
        """The labelled cases that do not test."""
        test = set(self.question.test)
        return [case for name, case in self.cases.items() if name not in test]

    @property
    def test(self) -> list[Case]:
        """The cases that test."""
        return [self.cases[name] for name in self.question.test]

    @property
    def test_folder(self) -> Path:
        """Links to the images of the test cases, which is what prediction reads."""
        return self.folder / "test"

    def test_images(self, case: Case) -> list[Path]:
        """The links to the channels of a test case."""
        ending = self.dataset_json["file_ending"]
        return [inside(self.test_folder, f"{case.name}_{channel:04d}{ending}") for channel in range(len(case.images))]

    def cells(self) -> Iterator[Cell]:
        """The cells of this call, seed by seed, so that a study that is stopped early leaves a fair table."""
        for seed in range(self.seeds):
            for num_labels in self.labels:
                for arm in self.arms:
                    yield Cell(num_labels, seed, arm.name)

    def asked(self) -> list[Cell]:
        """The cells of earlier calls and of this one: what the report is about."""
        return list(dict.fromkeys([*self.asked_before, *self.cells()]))

    def arm(self, name: str) -> Arm:
        """An arm of this call or of an earlier one."""
        known = self.known_arms[name]
        return Arm(name, Path(known["file"]) if known["file"] else None, tuple(known["settings"]))

    def cell_folder(self, cell: Cell) -> Path:
        """Where everything of a cell is."""
        return inside(self.folder, CELLS, cell.folder_name)

    def fold(self, cell: Cell) -> int:
        """The fold that trains on the cell's subset."""
        return self.folds.index((cell.num_labels, cell.seed))

    def subset(self, num_labels: int, seed: int) -> list[str]:
        """The cases that a subset holds."""
        test = set(self.question.test)
        known = Cases.of(self.question.subjects)
        subjects = sorted({subject for case, subject in self.question.subjects.items() if case not in test})
        return nested_subset(known, subjects, num_labels, seed)


def labelled_cases(here: Workspace, dataset_name: str) -> tuple[list[Case], dict[str, Any]]:
    """The cases of a labelled raw dataset, and its dataset.json.

    Raises MFMError: E_CONFIG for a corpus, or a dataset that names no structure; E_NOT_FOUND for missing files.
    """
    raw = here.raw_folder(dataset_name)
    cases, content = corpus.load_cases(raw), corpus.read_dataset_json(raw)
    unlabelled = [case.name for case in cases if case.label is None]
    if corpus.is_corpus(raw) or len(unlabelled) == len(cases) or not foreground_labels(content):
        raise MFMError(
            "E_CONFIG", f"{dataset_name} has no labels, so there is nothing to learn from. Give a labelled one."
        )
    if unlabelled:
        raise MFMError(
            "E_NOT_FOUND",
            f"{raw / 'dataset.json'}: {len(unlabelled)} of {len(cases)} cases have no label, e.g. {unlabelled[0]}. Add "
            "the labels, or take these cases out.",
        )
    return cases, content


def read_subjects(file: Path | None, cases: Sequence[Case]) -> dict[str, str]:
    """The subject of every case: from a CSV with the columns ``case`` and ``subject``, else as the names tell.

    Raises MFMError: E_NOT_FOUND (no such file), E_FORMAT (no such columns), E_CONFIG (a case with no subject or two).
    """
    if file is None:
        return {case.name: case.subject for case in cases}
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"--subjects {file}: no such file. Give a CSV with the columns case and subject.")
    try:
        with open(file, newline="", encoding="utf-8-sig") as handle:
            rows = list(csv.DictReader(handle, skipinitialspace=True))
        pairs = {(row["case"].strip(), row["subject"].strip()) for row in rows}
    except (KeyError, AttributeError, ValueError, csv.Error) as error:
        raise MFMError("E_FORMAT", f"--subjects {file}: expected a CSV with the columns case and subject.") from error
    named = dict(sorted(pairs))
    if contradicting := sorted(case for case, subject in pairs if named[case] != subject):
        case = contradicting[0]
        subjects = " and ".join(sorted(subject for other, subject in pairs if other == case))
        raise MFMError("E_CONFIG", f"--subjects {file}: case {case} is of {subjects}. Leave one line for each case.")
    missing = [case.name for case in cases if not named.get(case.name)]
    if missing:
        raise MFMError(
            "E_CONFIG",
            f"--subjects {file}: {len(missing)} cases have no subject, e.g. {missing[0]}. Add a line for each.",
        )
    if others := sorted(set(named) - {case.name for case in cases}):
        logger.warning("--subjects %s: %d cases are not in the dataset, e.g. %s", file, len(others), others[0])
    return {case.name: named[case.name] for case in cases}
