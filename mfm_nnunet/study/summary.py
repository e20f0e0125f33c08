"""From the scores of finished cells to what a study found: means, comparisons with scratch, labels saved.

A case has one score per label; its mean is over the labels that it has. Means over cases leave out cases without any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import CaseFailure
from mfm_nnunet.study.arms import SCRATCH
from mfm_nnunet.study.design import CELLS, Cell
from mfm_nnunet.study.evaluation import METRICS, RESULT
from mfm_nnunet.study.statistics import (
    compare_paired,
    correct_by_holm,
    labels_needed,
    labels_needed_interval,
    mean_and_spread,
)

Results = Mapping[Cell, Mapping[str, Any]]
"""What ``result.json`` of each finished cell holds."""


def cells_of(record: Mapping[str, Any]) -> list[Cell]:
    """All cells that ``study.json`` asks for."""
    return [
        Cell(num_labels, seed, arm)
        for seed in range(record["seeds"])
        for num_labels in record["labels"]
        for arm in record["compared"]
    ]


def read_results(folder: Path, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """The results of the cells that are finished."""
    files = {cell: folder / CELLS / cell.folder_name / RESULT for cell in cells}
    return {cell: json.loads(file.read_text()) for cell, file in files.items() if file.is_file()}


def summarise(
    record: Mapping[str, Any], results: Results, failures: Sequence[CaseFailure] | None = None
) -> dict[str, Any]:
    """``rows`` (one per number of labels and arm with a finished cell), counts, and what failed; JSON values.

    Without ``failures`` what the record says of cells that are still not finished stays.
    """
    cells = cells_of(record)
    rows = [
        _row(record, results, num_labels, arm)
        for num_labels in record["labels"]
        for arm in record["compared"]
        if _seeds(record, results, num_labels, arm)
    ]
    for metric in METRICS:
        correct_by_holm([row[metric]["against_scratch"] for row in rows if "against_scratch" in row[metric]])
    return {
        "rows": rows,
        "num_cells": len(cells),
        "num_finished": sum(cell in results for cell in cells),
        "failed": _still_failed(record, results)
        if failures is None
        else {failure.case: f"{failure.code}  {failure.reason}" for failure in failures},
    }


def case_scores(result: Mapping[str, Any], metric: str, label: str | None = None) -> np.ndarray:
    """The score of every test case, (N,), of one label or the mean over a case's labels; NaN where there is none."""
    values = [
        [scores[name][metric] for name in scores if label in (None, name)] for scores in result["scores"].values()
    ]
    numbers = [[value for value in case if value is not None] for case in values]
    return np.array([sum(case) / len(case) if case else math.nan for case in numbers])


def _still_failed(record: Mapping[str, Any], results: Results) -> dict[str, str]:
    finished = {str(cell) for cell in results}
    known: dict[str, str] = record.get("results", {}).get("failed", {})
    return {name: reason for name, reason in known.items() if name not in finished}


def _seeds(record: Mapping[str, Any], results: Results, num_labels: int, arm: str) -> list[int]:
    return [seed for seed in range(record["seeds"]) if Cell(num_labels, seed, arm) in results]


def _row(record: Mapping[str, Any], results: Results, num_labels: int, arm: str) -> dict[str, Any]:
    seeds = _seeds(record, results, num_labels, arm)
    found = [results[Cell(num_labels, seed, arm)] for seed in seeds]
    minutes = [result["seconds"]["training"] / 60 for result in found if "training" in result.get("seconds", {})]
    row: dict[str, Any] = {
        "arm": arm,
        "labels": num_labels,
        "seeds": seeds,
        "minutes_of_training": float(np.mean(minutes)) if minutes else None,
    }
    for metric in METRICS:
        row[metric] = _of_metric(record, results, num_labels, arm, metric)
    return row


def _of_metric(record: Mapping[str, Any], results: Results, num_labels: int, arm: str, metric: str) -> dict[str, Any]:
    """Mean and spread over the seeds, per label too; where there is a fair partner, the comparison with scratch."""
    seeds = _seeds(record, results, num_labels, arm)
    found = [results[Cell(num_labels, seed, arm)] for seed in seeds]
    per_seed = [_mean(case_scores(result, metric)) for result in found]
    mean, spread = mean_and_spread(per_seed)
    names = list(next(iter(found[0]["scores"].values())))
    part: dict[str, Any] = {
        "mean": mean,
        "spread": spread,
        "per_seed": per_seed,
        "per_label": {name: _label_mean([case_scores(result, metric, name) for result in found]) for name in names},
    }
    if arm != SCRATCH:
        if compared := _against_scratch(record, results, num_labels, arm, metric):
            part["against_scratch"] = compared
        if saved := _labels_saved(record, results, num_labels, arm, metric):
            part["labels_saved"] = saved
    return part


def _against_scratch(
    record: Mapping[str, Any], results: Results, num_labels: int, arm: str, metric: str
) -> dict[str, Any] | None:
    """Case by case with scratch at the same number of labels, over the seeds that both have."""
    partners = _seeds(record, results, num_labels, SCRATCH)
    seeds = [seed for seed in _seeds(record, results, num_labels, arm) if seed in partners]
    if not seeds:
        return None
    mine, theirs = (_over_seeds(results, num_labels, name, seeds, metric) for name in (arm, SCRATCH))
    both = np.isfinite(mine) & np.isfinite(theirs)
    if not both.any():
        return None
    means = [
        [_mean(_over_seeds(results, num_labels, name, [seed], metric)) for name in (arm, SCRATCH)] for seed in seeds
    ]
    better = sum(of_arm > of_scratch for of_arm, of_scratch in means)
    return {**compare_paired(mine[both], theirs[both]), "seeds_compared": seeds, "seeds_better": better}


def _labels_saved(
    record: Mapping[str, Any], results: Results, num_labels: int, arm: str, metric: str
) -> dict[str, Any] | None:
    """How many labels scratch needs for the arm's mean score; ``needed`` None: more than its largest number.

    Only seeds that the arm and scratch at every number of labels have count: means over other seeds would not compare.
    """
    curve_seeds = [set(_seeds(record, results, number, SCRATCH)) for number in record["labels"]]
    seeds = sorted(set(_seeds(record, results, num_labels, arm)).intersection(*curve_seeds))
    if not seeds or SCRATCH not in record["compared"]:
        return None
    curve = {number: _over_seeds(results, number, SCRATCH, seeds, metric) for number in record["labels"]}
    mine = _over_seeds(results, num_labels, arm, seeds, metric)
    needed = labels_needed({number: _mean(values) for number, values in curve.items()}, _mean(mine))
    interval = labels_needed_interval(curve, mine)
    return {
        "needed": _or_none(needed),
        "saved": _or_none(needed - num_labels),
        "interval": [_or_none(value) for value in interval],
        "seeds": seeds,
    }


def _over_seeds(results: Results, num_labels: int, arm: str, seeds: Sequence[int], metric: str) -> np.ndarray:
    """The score of every case, averaged over the seeds in which it has one; NaN where none has."""
    scores = np.array([case_scores(results[Cell(num_labels, seed, arm)], metric) for seed in seeds])
    return np.array([_mean(of_case) for of_case in scores.T])


def _label_mean(of_seeds: Sequence[np.ndarray]) -> float | None:
    """A label's mean over cases, then over seeds; None for one that no case has and that was never predicted."""
    return _or_none(_mean(np.array([_mean(scores) for scores in of_seeds])))


def _mean(values: np.ndarray) -> float:
    """The mean of the scores that exist; NaN when none does."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
