"""A study without trainings: its record, results made by hand, and a labelled dataset of empty files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.jobs.preflight import read_raw_dataset
from mfm_nnunet.study.design import Arm, Cell
from mfm_nnunet.study.folder import Question, Study, TestCase, begin_study, find_begun, write_study_folder
from mfm_nnunet.study_requests import StudyRequest

NAME = "Dataset004_Small"
NUM_CASES = 10
LIBRARY = {"name": "surface-distance", "version": "0.1"}
SCRATCH = Arm()


def write_raw(root: Path, labels: Mapping[str, Any] | None = None) -> Path:
    """Write the raw dataset into a workspace: files that no check before the first reading opens."""
    folder = root / "nnUNet_raw" / NAME
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(NUM_CASES):
        (folder / "imagesTr" / f"case{number}_0000.nii.gz").touch()
        (folder / "labelsTr" / f"case{number}.nii.gz").touch()
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "inner": 1, "outer": 2} if labels is None else labels,
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def arm(root: Path, name: str = "mae", settings: tuple[str, ...] = ()) -> Arm:
    """Return an arm whose checkpoint is a file of a few bytes; its hash is that of the bytes as text."""
    file = root / f"{name}.pth"
    if not file.exists():
        file.write_bytes(name.encode())
    return Arm(str(file), file.read_text(), settings)


def begin(
    root: Path, arms: Mapping[str, Arm] | None = None, plans: str = "own", is_written: bool = True, **changes: Any
) -> tuple[Study, list[Cell]]:
    """Begin or continue the study in ``root/study`` as a call does; by default two arms, labels 1 and 2, one seed."""
    asked = {"labels": ("1", "2"), "seeds": 1, "test": "4", **changes}
    request = StudyRequest(NAME, "3d_fullres", arms=(), **asked)
    arms = {"scratch": SCRATCH, "mae": arm(root)} if arms is None else arms
    folder, dataset = root / "study", read_raw_dataset(root / "nnUNet_raw" / NAME)
    study, cells = begin_study(folder, request, dataset, arms, plans, find_begun(folder))
    study = dataclasses.replace(study, library=LIBRARY)
    if is_written:
        write_study_folder(study, dataset)
        study.write()
    return study, cells


def record(labels: list[int], seeds: int, compared: list[str], num_cases: int = 4) -> Study:
    """Return a study of which no cell has run."""
    cases = [f"case{number}" for number in range(num_cases)]
    return Study(
        folder=Path("study"),
        question=Question(
            NAME, "3d_fullres", "own", ("finetune.epochs=2",), 1.0, True, tuple(cases), {c: c for c in cases}, "hash"
        ),
        dataset_json={"labels": {"background": 0, "inner": 1, "outer": 2}, "file_ending": ".nii.gz"},
        arms=dict.fromkeys(compared, SCRATCH),
        asked=tuple(Cell(count, seed, name) for seed in range(seeds) for count in labels for name in compared),
        folds=(),
        test_cases={case: TestCase((f"{case}_0000.nii.gz",), f"{case}.nii.gz") for case in cases},
        library=LIBRARY,
    )


def result(dice: list[float], seconds: float = 90.0) -> dict[str, Any]:
    """Return ``result.json`` of a cell whose cases have this mean Dice; the second label is 0.1 better, NSD 0.05."""
    scores = {
        f"case{number}": {
            "inner": {"dice": value - 0.05, "nsd": value},
            "outer": {"dice": value + 0.05, "nsd": value + 0.1},
        }
        for number, value in enumerate(dice)
    }
    held = {case: ["inner", "outer"] for case in scores}
    times = {"training": seconds, "prediction": 5.0}
    return {"scores": scores, "in_reference": held, "library": LIBRARY, "length_unit": "mm", "seconds": times}


def results(means: dict[tuple[str, int], list[float]]) -> dict[Cell, dict[str, Any]]:
    """Return results by arm and number of labels: a mean Dice per seed; cases lie 0.03 and 0.01 around it."""
    return {
        Cell(num_labels, seed, name): result([mean - 0.03, mean - 0.01, mean + 0.01, mean + 0.03])
        for (name, num_labels), of_seeds in means.items()
        for seed, mean in enumerate(of_seeds)
    }
