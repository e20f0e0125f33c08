"""From the scores of finished cells to what a study found: means, comparisons with scratch, labels saved.

The references alone decide what is averaged: a case's score is the mean over the labels that its reference holds, a
subject's the mean over its cases, and the subjects are compared. So the scores of all cells are of the same things;
what was predicted where the reference holds no such label is counted beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.files import inside, read_json
from mfm_nnunet.study.arms import SCRATCH
from mfm_nnunet.study.design import CELLS, RUN_SETTINGS, Cell, cells_of, curve_labels
from mfm_nnunet.study.evaluation import METRICS, RESULT
from mfm_nnunet.study.statistics import (
    compare_paired,
    correct_by_holm,
    labels_needed,
    labels_needed_interval,
    mean_and_spread,
)

TOLD_SETTINGS = ("learning_rate", "epochs", "warmup_epochs", "parts")
"""Settings of fine-tuning that the report tells even where all cells have the same."""
Results = Mapping[Cell, Mapping[str, Any]]
"""What ``result.json`` of each finished cell holds."""


@dataclass(frozen=True)
class Tested:
    """What every cell is scored on."""

    in_reference: Mapping[str, Collection[str]]
    """The labels that the reference of each test case holds."""
    subjects: Mapping[str, str]
    """The subject of each case."""
    labels: tuple[str, ...]

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], subjects: Mapping[str, str]) -> Tested:
        """From the results of finished cells. Raises MFMError (E_FORMAT) where they score different things."""
        first: Mapping[str, Mapping[str, Any]] = results[0]["scores"] if results else {}
        names = {case: set(labels) for case, labels in first.items()}
        if any({case: set(labels) for case, labels in result["scores"].items()} != names for result in results):
            raise MFMError(
                "E_FORMAT",
                "the results of this study's cells are of different cases or labels, so dataset.json was changed in "
                "between. Remove the folders of the cells that are of the wrong one, and run mfm_study again.",
            )
        told = next((result["in_reference"] for result in results if "in_reference" in result), None)
        if told is None:  # results that do not tell yet: neither here nor there is a label without a score
            told = {
                case: [n for n in labels if all(result["scores"][case][n]["dice"] is not None for result in results)]
                for case, labels in first.items()
            }
        return cls(told, subjects, tuple(next(iter(first.values()), {})))

    def cases(self, label: str | None = None) -> list[str]:
        """The cases whose reference holds a label, or any."""
        return [case for case, held in self.in_reference.items() if (held if label is None else label in held)]

    def num_subjects(self) -> int:
        """The number of subjects of these cases."""
        return len({self.subjects[case] for case in self.cases()})

    def scores(self, result: Mapping[str, Any], metric: str, label: str | None = None) -> np.ndarray:
        """The score of every subject, (S,), of one label or of all; in the same order for all results."""
        of_subject: dict[str, list[float]] = {}
        for case in self.cases(label):
            names = self.in_reference[case] if label is None else [label]
            values = [result["scores"][case][name][metric] for name in names]
            of_subject.setdefault(self.subjects[case], []).append(sum(values) / len(values))
        return np.array([sum(values) / len(values) for values in of_subject.values()])

    def mean(self, result: Mapping[str, Any], metric: str, label: str | None = None) -> float:
        """The mean over the subjects; NaN when there is none."""
        return _mean(self.scores(result, metric, label))

    def false_positives(self, results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
        """Per label that some reference lacks: in how many of these cases it was predicted, over all results."""
        found = {}
        for label in self.labels:
            lacking = [case for case, held in self.in_reference.items() if label not in held]
            scores = [result["scores"][case][label]["dice"] for result in results for case in lacking]
            if scores:
                found[label] = {"predicted": sum(score is not None for score in scores), "cases": len(scores)}
        return found


def read_results(folder: Path, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The results of the cells that are finished, with ``trained_with``: the settings of fine-tuning that they had."""
    folders = {cell: inside(folder, CELLS, cell.folder_name) for cell in cells}
    return {
        cell: {**read_result(place), "trained_with": _trained_with(place)}
        for cell, place in folders.items()
        if (place / RESULT).is_file()
    }


def read_result(cell_folder: Path) -> dict[str, Any]:
    """Read ``result.json`` of a finished cell. Raises MFMError (E_FORMAT) when it is damaged."""
    advice = "Remove it and run mfm_study again: the cell is then scored anew."
    result = read_json(cell_folder / RESULT, advice)
    scores, seconds = result.get("scores"), result.get("seconds", {})
    is_whole = isinstance(scores, dict) and all(isinstance(labels, dict) for labels in scores.values())
    metrics = [values for labels in scores.values() for values in labels.values()] if scores and is_whole else []
    has_numbers = all(
        isinstance(values, dict) and all(_is_score(values.get(metric, "")) for metric in METRICS) for values in metrics
    )
    has_times = isinstance(seconds, dict) and all(isinstance(value, (int, float)) for value in seconds.values())
    known = result.get("in_reference", {})
    tells = isinstance(known, dict) and all(isinstance(names, list) for names in known.values())
    if not (is_whole and has_numbers and has_times and tells):
        raise MFMError("E_FORMAT", f"{cell_folder / RESULT}: its scores are damaged. {advice}")
    return result


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _trained_with(cell_folder: Path) -> dict[str, Any]:
    """The settings of fine-tuning that a training wrote; none where its folder is gone."""
    file = next(cell_folder.glob(RUN_SETTINGS), None)
    settings = read_json(file, "Remove the cell's folder and run mfm_study again.").get("settings") if file else {}
    of_finetuning = settings.get("finetune") if isinstance(settings, dict) else None
    found: dict[str, Any] = of_finetuning if isinstance(of_finetuning, dict) else {}
    is_pretrained = found.pop("checkpoint", None) is not None
    return {name: value for name, value in found.items() if is_pretrained or name != "parts"}


def summarise(record: Mapping[str, Any], results: Results, failures: Sequence[CaseFailure] = ()) -> dict[str, Any]:
    """``rows`` (one per number of labels and arm with a finished cell), counts, and what failed; JSON values.

    ``failures`` are those of this call; what the record says of other cells that are not finished stays.
    """
    cells = cells_of(record)
    tested = Tested.of([*results.values()], record["question"]["subjects"])
    rows = [
        _row(record, results, tested, num_labels, arm)
        for num_labels in record["labels"]
        for arm in record["compared"]
        if _seeds(results, num_labels, arm)
    ]
    for metric in METRICS:
        correct_by_holm([row[metric]["against_scratch"] for row in rows if "against_scratch" in row[metric]])
    return {
        "rows": rows,
        "num_cells": len(cells),
        "num_finished": sum(cell in results for cell in cells),
        "num_cases_with_labels": len(tested.cases()),
        "training": _training(results),
        "length_unit": next((result["length_unit"] for result in results.values() if "length_unit" in result), "mm"),
        "libraries": sorted({"{name} {version}".format(**result["library"]) for result in results.values()}),
        "failed": {
            **_still_failed(record, results),
            **{failure.case: f"{failure.code}  {failure.reason}" for failure in failures},
        },
    }


def _training(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """How each arm was trained: the settings that matter most, and all in which any cells differ.

    Per arm and setting the values that occur, each with the numbers of labels at which it does.
    """
    known = {cell: result["trained_with"] for cell, result in results.items() if result.get("trained_with")}
    names = dict.fromkeys([*TOLD_SETTINGS, *(name for settings in known.values() for name in settings)])
    told = [n for n in names if n in TOLD_SETTINGS or len({json.dumps(s.get(n)) for s in known.values()}) > 1]
    arms: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in sorted(known):
        for name in (name for name in told if name in known[cell]):
            values = arms.setdefault(cell.arm, {}).setdefault(name, [])
            value = known[cell][name]
            entry = next((entry for entry in values if entry["value"] == value), None)
            if entry is None:
                values.append({"value": value, "labels": [cell.num_labels]})
            elif cell.num_labels not in entry["labels"]:
                entry["labels"].append(cell.num_labels)
    return arms


def _still_failed(record: Mapping[str, Any], results: Results) -> dict[str, str]:
    finished = {str(cell) for cell in results}
    known: dict[str, str] = record.get("results", {}).get("failed", {})
    return {name: reason for name, reason in known.items() if name not in finished}


def _seeds(results: Results, num_labels: int, arm: str) -> list[int]:
    return sorted(cell.seed for cell in results if (cell.num_labels, cell.arm) == (num_labels, arm))


def _row(record: Mapping[str, Any], results: Results, tested: Tested, num_labels: int, arm: str) -> dict[str, Any]:
    seeds = _seeds(results, num_labels, arm)
    found = [results[Cell(num_labels, seed, arm)] for seed in seeds]
    minutes = [result["seconds"]["training"] / 60 for result in found if "training" in result.get("seconds", {})]
    row: dict[str, Any] = {
        "arm": arm,
        "labels": num_labels,
        "seeds": seeds,
        "minutes_of_training": float(np.mean(minutes)) if minutes else None,
        "false_positives": tested.false_positives(found),
    }
    for metric in METRICS:
        row[metric] = _of_metric(record, results, tested, num_labels, arm, metric)
    return row


def _of_metric(
    record: Mapping[str, Any], results: Results, tested: Tested, num_labels: int, arm: str, metric: str
) -> dict[str, Any]:
    """Mean and spread over the seeds, per label too; where there is a fair partner, the comparison with scratch."""
    seeds = _seeds(results, num_labels, arm)
    found = [results[Cell(num_labels, seed, arm)] for seed in seeds]
    per_seed = [tested.mean(result, metric) for result in found]
    mean, spread = mean_and_spread(per_seed)
    part: dict[str, Any] = {
        "mean": _or_none(mean),
        "spread": spread if spread is None else _or_none(spread),
        "per_seed": [_or_none(value) for value in per_seed],
        "per_label": {
            label: _or_none(float(np.mean([tested.mean(result, metric, label) for result in found])))
            for label in tested.labels
        },
    }
    if arm != SCRATCH and tested.cases():
        if compared := _against_scratch(results, tested, num_labels, arm, metric):
            part["against_scratch"] = compared
        if saved := _labels_saved(record, results, tested, num_labels, arm, metric):
            part["labels_saved"] = saved
    return part


def _against_scratch(results: Results, tested: Tested, num_labels: int, arm: str, metric: str) -> dict[str, Any] | None:
    """Subject by subject with scratch at the same number of labels, over the seeds that both have."""
    partners = _seeds(results, num_labels, SCRATCH)
    seeds = [seed for seed in _seeds(results, num_labels, arm) if seed in partners]
    if not seeds:
        return None
    mine, theirs = (_each_seed(results, tested, num_labels, name, seeds, metric) for name in (arm, SCRATCH))
    compared = compare_paired(mine.mean(0), theirs.mean(0))
    return {
        **compared,
        "cases": len(tested.cases()),
        "subjects": compared["cases"],
        "seeds_compared": seeds,
        "seeds_better": int((mine.mean(1) > theirs.mean(1)).sum()),
    }


def _labels_saved(
    record: Mapping[str, Any], results: Results, tested: Tested, num_labels: int, arm: str, metric: str
) -> dict[str, Any] | None:
    """How many labels scratch needs for the arm's mean score; ``needed`` None: more than its largest number.

    Only seeds that the arm and scratch at every number of labels have count: means over other seeds would not compare.
    """
    numbers = curve_labels(record)
    curve_seeds = [set(_seeds(results, number, SCRATCH)) for number in numbers]
    seeds = sorted(set(_seeds(results, num_labels, arm)).intersection(*curve_seeds))
    if not seeds or not numbers:
        return None
    curve = {number: _each_seed(results, tested, number, SCRATCH, seeds, metric).mean(0) for number in numbers}
    mine = _each_seed(results, tested, num_labels, arm, seeds, metric).mean(0)
    needed = labels_needed({number: _mean(values) for number, values in curve.items()}, _mean(mine))
    interval = labels_needed_interval(curve, mine)
    return {
        "needed": _or_none(needed),
        "saved": _or_none(needed - num_labels),
        "interval": None if interval is None else [_or_none(value) for value in interval],
        "seeds": seeds,
    }


def _each_seed(
    results: Results, tested: Tested, num_labels: int, arm: str, seeds: Sequence[int], metric: str
) -> np.ndarray:
    """The score of every subject with every seed, (seeds, subjects)."""
    return np.array([tested.scores(results[Cell(num_labels, seed, arm)], metric) for seed in seeds])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
