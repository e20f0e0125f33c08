"""The folder of a study: ``study.json``, and a workspace of its own.

The workspace contains only the pool (all but the test split), so fingerprint, plan and preprocessing see no test image.
It is preprocessed once; a subset is a fold of ``splits_final.json``.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_nnunet.dataset import IMAGE_TASKS, DatasetJson, check_dataset_json
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, is_file_name, read_json, write_csv, write_json
from mfm_nnunet.jobs.preflight import TABLE, Case, RawDataset, list_companions, read_subjects
from mfm_nnunet.requests import HEADS
from mfm_nnunet.settings import from_dict
from mfm_nnunet.study.design import (
    LARGEST_COUNT,
    SCRATCH,
    Arm,
    Cell,
    count_labels,
    draw_subset,
    draw_test,
    is_arm_name,
    read_order,
)
from mfm_nnunet.study_requests import StudyRequest
from mfm_nnunet.version import __version__

RECORD = "study.json"
CELLS = "cells"
"""Folder of the trainings. Once it exists, the question of the study cannot change."""
STUDY_PLANS = "mfmStudyPlans"
"""Name of a plan that a study makes in its own workspace."""
OWN, LIKE = "own", "like"
"""First words of ``Question.plans`` for such a plan."""
STUDY_SETTINGS = ("finetune.validation_iterations=1",)
"""Settings put before ``--set``: the final checkpoint is tested, so validation during training would only cost time."""
_ADVICE = "Give -o another folder, or remove this one to start again."


@dataclass(frozen=True)
class Question:
    """Everything that determines the result of a cell. It cannot change within a study folder."""

    dataset: str
    configuration: str
    plans: str
    """``NAME HASH`` of a given plan, ``like HASH`` of a checkpoint, or ``own``: planned from the pool."""
    settings: tuple[str, ...]
    tolerance_mm: float
    mirroring: bool
    test: tuple[str, ...]
    subjects: dict[str, Any]
    """The subject of every case."""
    data: str
    """Hash of names, sizes and modification times of all images and labels."""
    order: tuple[str, ...] = ()
    """Subjects with which the order of the first seed begins."""


@dataclass(frozen=True)
class Subset:
    """A subset of the pool. Its index in ``Study.folds`` is its fold number in ``splits_final.json``."""

    labels: int
    seed: int
    train: tuple[str, ...]


@dataclass(frozen=True)
class TestCase:
    """The files of a test case."""

    images: tuple[str, ...]
    label: str
    """The mask; "" where the image has labels as a whole."""
    targets: tuple[float | None, ...] = ()
    """Labels of the whole image as in :class:`LabelTable`; None for an unknown one."""

    __test__ = False  # keeps pytest from collecting it


@dataclass(frozen=True)
class Study:
    """The content of ``study.json``: the question, and the requests and findings of all calls in this folder."""

    folder: Path
    question: Question
    dataset_json: dict[str, Any]
    arms: dict[str, Arm]
    asked: tuple[Cell, ...]
    folds: tuple[Subset, ...]
    test_cases: dict[str, TestCase]
    library: dict[str, Any]
    """Name and version of the library for surface metrics."""
    plan_sha256: str | None = None
    """Hash of the plan shared by all cells; None before the first training."""
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def labels(self) -> list[int]:
        """Numbers of labelled subjects, ascending."""
        return sorted({cell.num_labels for cell in self.asked})

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return 1 + max((cell.seed for cell in self.asked), default=-1)

    @property
    def compared(self) -> list[str]:
        """Names of the arms in the requested order."""
        return list(dict.fromkeys(cell.arm for cell in self.asked))

    @property
    def curve_labels(self) -> list[int]:
        """Numbers of labels on scratch's learning curve, ascending."""
        return sorted({cell.num_labels for cell in self.asked if cell.arm == SCRATCH})

    @property
    def dataset(self) -> DatasetJson:
        """The labels and channels of the dataset."""
        return DatasetJson.of(self.dataset_json)

    @property
    def workspace(self) -> Path:
        """Root of the study's own workspace."""
        return self.folder / "workspace"

    @property
    def test_folder(self) -> Path:
        """Folder of links to the test images, the input of prediction."""
        return self.folder / "test"

    @property
    def plans_name(self) -> str:
        """Name of the plan shared by all cells."""
        word = self.question.plans.partition(" ")[0]
        return STUDY_PLANS if word in (OWN, LIKE) else word

    def head(self, arm: str) -> str:
        """Return the head of an arm's classifier; "" for masks."""
        return (self.arms[arm].head or HEADS[0]) if self.dataset.task in IMAGE_TASKS else ""

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return inside(self.folder, CELLS, cell.folder_name)

    def fold(self, cell: Cell) -> int:
        """Return the number of the fold that trains on the cell's subset."""
        return [(fold.labels, fold.seed) for fold in self.folds].index((cell.num_labels, cell.seed))

    def linked_cases(self) -> list[Case]:
        """Return the test cases with the links to their images, the input of prediction."""
        ending = self.dataset.file_ending
        return [
            Case(
                name,
                tuple(inside(self.test_folder, f"{name}_{n:04d}{ending}") for n in range(len(case.images))),
                Path(case.label) if case.label else None,
            )
            for name, case in self.test_cases.items()
        ]

    def write(self) -> None:
        """Write ``study.json``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(self)
        del content["folder"]
        derived = {"labels": self.labels, "seeds": self.seeds, "compared": self.compared}
        write_json(self.folder / RECORD, {"made_by": f"mfm_study {__version__}", **content, **derived})


def read_study(folder: Path) -> Study:
    """Read ``study.json``."""
    file = folder / RECORD
    content = read_json(file, f"Is this the folder of a study? {_ADVICE}")
    try:
        study = Study(
            folder=folder,
            question=from_dict(Question, content["question"]),
            dataset_json={**content["dataset_json"]},
            arms={name: from_dict(Arm, arm) for name, arm in content["arms"].items()},
            asked=tuple(from_dict(Cell, cell) for cell in content["asked"]),
            folds=tuple(from_dict(Subset, fold) for fold in content["folds"]),
            test_cases={name: from_dict(TestCase, case) for name, case in content["test_cases"].items()},
            library={**content["library"]},
            plan_sha256=content.get("plan_sha256"),
            results={**content.get("results", {})},
        )
    except (MFMError, KeyError, TypeError, AttributeError) as error:
        raise MFMError("E_FORMAT", f"{file}: mfm_study did not write it like this ({error}). {_ADVICE}") from error
    # These names become folders (arms, cells) and files (cases).
    is_legal = all(map(is_arm_name, (*study.arms, *study.compared))) and all(map(is_file_name, study.test_cases))
    is_legal &= all(0 <= count < LARGEST_COUNT for cell in study.asked for count in (cell.num_labels, cell.seed))
    is_legal &= all(isinstance(subject, str) for subject in study.question.subjects.values())
    if not is_legal:
        raise MFMError("E_FORMAT", f"{file}: mfm_study did not write it like this. {_ADVICE}")
    check_dataset_json(study.dataset_json, file)
    return study


def begin_study(
    folder: Path, request: StudyRequest, dataset: RawDataset, arms: Mapping[str, Arm], plans: str, before: Study | None
) -> tuple[Study, list[Cell]]:
    """Design a study, or extend the study ``before``. Return it with the cells of this call. Nothing is written.

    ``plans`` names the plan as in :class:`Question`.
    """
    if not 0 <= request.tolerance_mm < float("inf"):
        raise MFMError("E_CONFIG", f"--tolerance-mm {request.tolerance_mm}: expected a length in mm, 0 or more.")
    if any(setting.partition("=")[0].strip() == "seed" for setting in request.settings):
        raise MFMError("E_CONFIG", "--set seed: the study sets the seed of each cell. Give their number with --seeds.")
    subjects = {case.name: case.subject for case in dataset.cases}
    if request.subjects is not None:
        subjects = read_subjects(Path(request.subjects), dataset.cases, f"--subjects {request.subjects}")
    strata = _stratify(dataset, subjects)
    test = draw_test(subjects, str(request.test), strata)
    num_subjects = len(set(subjects.values())) - len({subjects[case] for case in test})
    counts = count_labels([str(number) for number in request.labels], num_subjects)
    if dataset.table and dataset.table.task == "classification" and counts[0] < len(dataset.table.classes):
        names = ", ".join(dataset.table.classes)
        raise MFMError("E_CONFIG", f"--labels {counts[0]}: a classifier needs a subject of each class ({names}).")
    question = Question(
        dataset=dataset.name,
        configuration=request.configuration,
        plans=plans,
        settings=(*STUDY_SETTINGS, *request.settings),
        tolerance_mm=float(request.tolerance_mm),
        mirroring=request.mirroring,
        test=tuple(test),
        subjects=subjects,
        data=dataset.digest,
        order=tuple(read_order(request.order, subjects)),
    )
    # Ordered by seed, so that a study stopped early leaves a fair table.
    cells = [Cell(count, seed, arm) for seed in range(request.seeds) for count in counts for arm in arms]
    files = {case.name: _test_case(dataset, case) for case in dataset.cases}
    study = Study(
        folder=folder,
        question=question,
        dataset_json=_describe_dataset(dataset),
        arms=dict(arms),
        asked=tuple(cells),
        folds=(),
        test_cases={name: files[name] for name in test},
        library={},
    )
    if before:
        _require_same_question(before, study)
        asked = tuple(dict.fromkeys([*before.asked, *cells]))
        study = dataclasses.replace(  # the numbers of the folds must not change
            before, arms={**before.arms, **arms}, asked=asked, test_cases=study.test_cases
        )
    known = {(fold.labels, fold.seed) for fold in study.folds}
    new = dict.fromkeys((cell.num_labels, cell.seed) for cell in cells if (cell.num_labels, cell.seed) not in known)
    folds = [Subset(*fold, tuple(draw_subset(subjects, test, *fold, question.order, strata))) for fold in new]
    return dataclasses.replace(study, folds=(*study.folds, *folds)), cells


def _stratify(dataset: RawDataset, subjects: Mapping[str, str]) -> dict[str, int]:
    """Return the stratum of each subject, that of its first case; empty for masks."""
    names = sorted(subjects, reverse=True)
    return (
        {subjects[case]: stratum for case, stratum in zip(names, dataset.table.strata(names))} if dataset.table else {}
    )


def _describe_dataset(dataset: RawDataset) -> dict[str, Any]:
    """Return dataset.json without cases, and with the order of the classes."""
    content = {key: value for key, value in dataset.content.items() if key not in ("dataset", "training")}
    return content if dataset.table is None else {**content, "classes": list(dataset.table.classes) or None}


def _test_case(dataset: RawDataset, case: Case) -> TestCase:
    if dataset.table is None:
        return TestCase(tuple(map(str, case.images)), str(case.label))
    targets = (None if value != value else value for value in dataset.table.targets[case.name])
    return TestCase(tuple(map(str, case.images)), "", tuple(targets))


def find_begun(folder: Path) -> Study | None:
    """Return the study in a folder, None if nothing was trained yet; refuse a folder with other content."""
    if folder.exists() and not folder.is_dir():
        raise MFMError("E_EXISTS", f"{folder}: this is a file. Give -o another folder.")
    if (folder / RECORD).is_file():
        study = read_study(folder)
        return study if (folder / CELLS).is_dir() else None  # e.g. because a bad case had to be repaired first
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise MFMError("E_EXISTS", f"{folder}: not empty, and not the folder of a study. Give -o another folder.")
    return None


def _require_same_question(before: Study, now: Study) -> None:
    """Refuse a call whose cells cannot be compared with the existing ones."""
    if differences := _list_differences(before, now):
        reason = f"this folder has a study of another question: {'; '.join(differences)}"
        raise MFMError("E_CONFIG", f"{now.folder}: {reason}. {_ADVICE}")
    known = {name.casefold(): name for name in before.arms}
    for name, arm in now.arms.items():
        old, reason = before.arms.get(name, arm), ""
        # Folders are named after arms, and some file systems ignore case.
        if (other := known.get(name.casefold(), name)) != name:
            reason = f"already has an arm '{other}'"
        elif dataclasses.replace(old, file=None) != dataclasses.replace(arm, file=None):
            kind = "was trained with other settings or unlabelled images"
            kind = "had another checkpoint" if old.sha256 != arm.sha256 else kind
            reason = f"arm '{name}' {kind}"
        if reason:
            raise MFMError("E_CONFIG", f"{now.folder}: {reason}. Name '{name}' differently: NAME=CHECKPOINT.")


def _list_differences(before: Study, now: Study) -> list[str]:
    """List the differences that affect scores, with both values if they are short."""
    question, asked = dataclasses.asdict(before.question), dataclasses.asdict(now.question)
    found = [(name, question[name], asked[name]) for name in asked if question[name] != asked[name]]
    old, new = before.dataset_json, now.dataset_json
    names = before.dataset.differences(now.dataset)
    names += [n for n in ("file_ending", "overwrite_image_reader_writer") if old.get(n, "None") != new.get(n, "None")]
    found += [(f"{name} in dataset.json", old.get(name), new.get(name)) for name in names]
    values = {name: f"{name} was {value}, is {other}" for name, value, other in found}
    return [text if len(text) < 150 else name for name, text in values.items()]


# Input files of training and prediction


def write_study_folder(study: Study, dataset: RawDataset) -> None:
    """Write the pool's dataset, its folds, links to the test images, and ``study.json`` of a new study."""
    is_begun = (study.folder / CELLS).is_dir()
    if not is_begun and (study.folder / RECORD).is_file() and _list_differences(read_study(study.folder), study):
        for stale in (study.workspace, study.test_folder):  # of another question, for which nothing was trained
            shutil.rmtree(stale, ignore_errors=True)
    links = _test_links(study)
    if not is_begun:
        study.write()  # first: it marks the folder as a study's
    for link, file in links.items():
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    pool = {
        case.name: {"images": [str(image) for image in case.images], "label": str(case.label or "")}
        for case in dataset.cases
        if case.name not in study.test_cases
    }
    name = study.question.dataset
    content = {**dataset.content, "numTraining": len(pool), "dataset": pool}
    raw = study.workspace / "nnUNet_raw" / name
    raw.mkdir(parents=True, exist_ok=True)
    if dataset.table is not None:
        content["classes"] = study.dataset_json["classes"]  # also those that only test cases have
        write_csv(raw / TABLE, *dataset.table.to_csv(list(pool)))
    # A fold validates on one of its own training cases: nnU-Net requires one, and other labels must remain unseen.
    splits = [{"train": list(fold.train), "val": list(fold.train[:1])} for fold in study.folds]
    for file, value in (
        (raw / "dataset.json", content),
        (study.workspace / "nnUNet_preprocessed" / name / "splits_final.json", splits),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, value)


def link_corpus(study: Study, raw: Path) -> None:
    """Link the raw folder of a corpus into the study's workspace, and the test images, which must not be in it."""
    for link, target in (
        (study.workspace / "nnUNet_raw" / raw.name, raw),
        (study.workspace / "nnUNet_raw" / study.question.dataset / "imagesTs", study.test_folder),
    ):
        if not link.exists():
            link.symlink_to(target.resolve())


def _test_links(study: Study) -> dict[Path, Path]:
    """Map links in the folder of test images to the images and their companion files.

    Refuse two images that need different files of one name, or a file outside their folder.
    """
    links: dict[Path, Path] = {}
    for case in study.linked_cases():
        pairs = dict(zip(case.images, map(Path, study.test_cases[case.name].images)))
        for link, image in [*pairs.items()]:
            for file in list_companions(image):
                if file.suffix == ".json":  # the spacing of a TIFF stack, which is named after the case
                    pairs[link.parent / f"{case.name}.json"] = file
                elif file.is_relative_to(image.parent):  # a header with an absolute path finds its voxels anyway
                    pairs[link.parent / file.relative_to(image.parent)] = file
        for link, file in pairs.items():
            if ".." in link.parts or links.setdefault(link, file) != file:
                raise MFMError(
                    "E_CONFIG",
                    f"{file}: this file of test case {case.name} has the name of another test image's file. Save "
                    "the test images as single files, e.g. .nrrd, .mha or .nii.gz.",
                )
    return links
