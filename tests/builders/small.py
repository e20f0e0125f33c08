"""A study without trainings: its record, results made by hand, and a labelled dataset of empty files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mfm_nnunet.study.design import Cell

NAME = "Dataset004_Small"
NUM_CASES = 10
LIBRARY = {"name": "surface-distance", "version": "0.1"}


def write_raw(root: Path, labels: dict[str, int] | None = None) -> Path:
    """The raw dataset in a workspace: files that no check before the first reading opens."""
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


def record(labels: list[int], seeds: int, compared: list[str], num_cases: int = 4) -> dict[str, Any]:
    """What ``study.json`` says before any cell has run, as far as the report looks at it."""
    return {
        "question": {
            "dataset": NAME,
            "configuration": "3d_fullres",
            "plans": "own",
            "tolerance_mm": 1.0,
            "settings": ["finetune.epochs=2"],
            "subjects": {f"case{number}": f"case{number}" for number in range(num_cases)},
        },
        "library": LIBRARY,
        "labels": labels,
        "seeds": seeds,
        "compared": compared,
        "arms": {arm: {"file": None, "sha256": None, "settings": []} for arm in compared},
        "folds": [],
        "test_cases": {f"case{number}": {} for number in range(num_cases)},
        "dataset_json": {},
    }


def result(dice: list[float], seconds: float = 90.0) -> dict[str, Any]:
    """``result.json`` of a cell whose cases have this mean Dice; the second label is 0.1 better, NSD 0.05 better."""
    scores = {
        f"case{number}": {
            "inner": {"dice": value - 0.05, "nsd": value},
            "outer": {"dice": value + 0.05, "nsd": value + 0.1},
        }
        for number, value in enumerate(dice)
    }
    return {"scores": scores, "library": LIBRARY, "seconds": {"training": seconds, "prediction": 5.0}}


def results(means: dict[tuple[str, int], list[float]]) -> dict[Cell, dict[str, Any]]:
    """Results by arm and number of labels: a mean Dice per seed; cases lie 0.03 and 0.01 around it."""
    return {
        Cell(num_labels, seed, arm): result([mean - 0.03, mean - 0.01, mean + 0.01, mean + 0.03])
        for (arm, num_labels), of_seeds in means.items()
        for seed, mean in enumerate(of_seeds)
    }
