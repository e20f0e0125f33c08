"""Summarise the scores of a study's finished cells: means, comparisons with scratch, labels saved.

The references alone decide what is averaged: a case's score is the mean over the labels in its reference, a subject's
the mean over its cases. Subjects are compared, after averaging over seeds. So the scores of all cells refer to the same
labels and cases; predicted labels absent from the reference are counted separately.
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
from mfm_nnunet.study.design import SCRATCH, Cell
from mfm_nnunet.study.evaluation import METRICS, RESULT
from mfm_nnunet.study.folder import CELLS, Study

MIN_CASES = 6
"""Minimum number of cases for a bootstrap interval: resamples of fewer are too alike, and the interval too narrow."""
NUM_BOOTSTRAPS = 10_000
NUM_BOOTSTRAPS_OF_LABELS = 2_000
RUN_SETTINGS = "results/*/*/fold_*/settings.json"
"""Pattern of a training's settings file inside its cell's folder."""
SHOWN_SETTINGS = ("learning_rate", "epochs", "warmup_epochs", "parts")
"""Fine-tuning settings that the report lists even if they are equal in all cells."""
Results = Mapping[Cell, Mapping[str, Any]]
"""``result.json`` of each finished cell."""


# Statistics. The unit of comparison is called a case here; cases must be independent of each other.


def compare_paired(mine: np.ndarray, theirs: np.ndarray, by_ranks: bool = True) -> dict[str, Any]:
    """Compare two scores (N,) of the same cases, with N at least 1.

    ``difference`` is the mean of ``mine - theirs``, ``interval`` its bootstrap 95 % interval over the cases (None for
    fewer than ``MIN_CASES``), ``better`` the number of cases above zero of ``cases``, and ``p`` that of Wilcoxon's
    signed-rank test, two-sided (1 if there is no difference); not ``by_ranks``, of the normal test of the mean, for
    AUROC the one of DeLong.
    """
    from scipy import stats

    difference, interval = mine - theirs, None
    if len(difference) >= MIN_CASES:
        draws = _bootstrap(len(difference), NUM_BOOTSTRAPS)
        interval = np.percentile(difference[draws].mean(1), [2.5, 97.5]).tolist()
    p = 1.0
    if difference.any():
        p = stats.wilcoxon(difference).pvalue if by_ranks else stats.norm.sf(_z_score(difference)) * 2
    return {
        "difference": float(difference.mean()),
        "interval": interval,
        "better": int((difference > 0).sum()),
        "cases": len(difference),
        "p": float(p),
    }


def _z_score(values: np.ndarray) -> float:
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return abs(float(values.mean())) / error if error else 0.0


def correct_by_holm(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` to rows that have ``p``: corrected for the number of rows by Holm's step-down method."""
    largest = 0.0
    for rank, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        largest = max(largest, min(1.0, row["p"] * (len(rows) - rank)))
        row["p_holm"] = largest


def labels_needed(curve: Mapping[int, float], score: float) -> float:
    """Return the number of labels at which the learning curve (number of labels to score) reaches ``score``.

    The curve is replaced by its running maximum, so that a setback at more labels has no effect, and interpolated
    linearly over the logarithm of the number of labels. Returns ``inf`` if it never reaches the score. The smallest
    number of the curve means "at most that many": nothing is extrapolated.
    """
    numbers = sorted(curve)
    best = np.maximum.accumulate([curve[number] for number in numbers])
    reached = np.flatnonzero(best >= score)
    if not len(reached):
        return math.inf
    after = int(reached[0])
    if after == 0:
        return float(numbers[0])
    low, high = math.log(numbers[after - 1]), math.log(numbers[after])
    share = (score - best[after - 1]) / (best[after] - best[after - 1])
    return math.exp(low + float(share) * (high - low))


def labels_needed_interval(curve: Mapping[int, np.ndarray], scores: np.ndarray) -> tuple[float, float] | None:
    """Return the bootstrap 95 % interval of :func:`labels_needed` over cases; None for fewer than ``MIN_CASES``.

    ``curve`` and ``scores`` contain a score per case, (N,), of the same cases in the same order. All are resampled
    together, so that the difficulty of a case enters both.
    """
    if len(scores) < MIN_CASES:
        return None
    draws = _bootstrap(len(scores), NUM_BOOTSTRAPS_OF_LABELS)
    means = {number: values[draws].mean(1) for number, values in curve.items()}
    needed = sorted(
        labels_needed({number: float(values[draw]) for number, values in means.items()}, float(score))
        for draw, score in enumerate(scores[draws].mean(1))
    )
    last = len(needed) - 1  # np.percentile would interpolate between a number and infinity
    return needed[round(0.025 * last)], needed[round(0.975 * last)]


def _bootstrap(num_cases: int, num_draws: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, num_cases, (num_draws, num_cases))


# The results of cells


@dataclass(frozen=True)
class Tested:
    """The test cases on which every cell is scored."""

    in_reference: Mapping[str, Collection[str]]
    """Labels in the reference of each test case."""
    subjects: Mapping[str, str]
    """The subject of each case."""
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = METRICS["segmentation"]

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], subjects: Mapping[str, str]) -> Tested:
        """Build from the results of finished cells, and refuse results whose cases or labels differ."""
        first: Mapping[str, Mapping[str, Any]] = results[0]["scores"] if results else {}
        metrics = next((tuple(of) for labels in first.values() for of in labels.values()), METRICS["segmentation"])
        names = {case: set(labels) for case, labels in first.items()}
        if any({case: set(labels) for case, labels in result["scores"].items()} != names for result in results):
            raise MFMError(
                "E_FORMAT",
                "the cells of this study were scored on different cases or labels, because dataset.json changed. "
                "Remove the folders of the outdated cells, and run mfm_study again.",
            )
        in_reference = results[0]["in_reference"] if results else {}
        return cls(in_reference, subjects, tuple(next(iter(first.values()), {})), metrics)

    def cases(self, label: str | None = None) -> list[str]:
        """List the cases with a label, or any label, in their reference."""
        return [case for case, held in self.in_reference.items() if (held if label is None else label in held)]

    def scores(self, result: Mapping[str, Any], metric: str, label: str | None = None) -> np.ndarray:
        """Return the score (S,) of every subject, for one label or all, in the same order for all results."""
        of_subject: dict[str, list[float]] = {}
        for case in self.cases(label):
            names = self.in_reference[case] if label is None else [label]
            values = [result["scores"][case][name][metric] for name in names]
            of_subject.setdefault(self.subjects[case], []).append(sum(values) / len(values))
        return np.array([sum(values) / len(values) for values in of_subject.values()])

    def mean(self, result: Mapping[str, Any], metric: str, label: str | None = None) -> float:
        """Return the mean over the subjects; NaN without any."""
        return _mean(self.scores(result, metric, label))

    def false_positives(self, results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
        """Count, for each label that some reference lacks, the cases over all results where it is wrongly predicted."""
        found = {}
        for label in self.labels:
            lacking = [case for case, held in self.in_reference.items() if label not in held]
            scores = [result["scores"][case][label][self.metrics[0]] for result in results for case in lacking]
            if scores:
                found[label] = {"predicted": sum(score is not None for score in scores), "cases": len(scores)}
        return found


def read_results(folder: Path, cells: Sequence[Cell]) -> dict[Cell, dict[str, Any]]:
    """Read the results of the finished cells, with their fine-tuning settings as ``trained_with``."""
    folders = {cell: inside(folder, CELLS, cell.folder_name) for cell in cells}
    return {
        cell: {**read_result(place), "trained_with": _read_settings(place)}
        for cell, place in folders.items()
        if (place / RESULT).is_file()
    }


def read_result(cell_folder: Path) -> dict[str, Any]:
    """Read ``result.json`` of a finished cell."""
    file, advice = cell_folder / RESULT, "Remove it and run mfm_study again to score the cell again."
    result = read_json(file, advice)
    try:
        scores, held = result["scores"], result["in_reference"]
        of_labels = [values for labels in scores.values() for values in labels.values()]
        metrics = next((known for known in METRICS.values() if of_labels and set(known) == set(of_labels[0])), ())
        numbers = [values[metric] for values in of_labels for metric in metrics]
        times = result.get("seconds", {}).values()
        is_whole = all(map(math.isfinite, (*times, *(value for value in numbers if value is not None))))
        # A label in the reference has a score in every cell.
        is_whole &= held.keys() == scores.keys() and (bool(metrics) or not of_labels)
        is_whole &= all(scores[case][name][m] is not None for case in held for name in held[case] for m in metrics)
    except (KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise MFMError("E_FORMAT", f"{file}: its scores are damaged. {advice}")
    return result


def _read_settings(cell_folder: Path) -> dict[str, Any]:
    """Read the fine-tuning settings saved by a training; empty if its folder was removed."""
    file = next(cell_folder.glob(RUN_SETTINGS), None)
    settings = read_json(file, "Remove the cell's folder and run mfm_study again.").get("settings") if file else None
    finetune = settings.get("finetune") if isinstance(settings, dict) else None
    found: dict[str, Any] = finetune if isinstance(finetune, dict) else {}
    is_pretrained = found.pop("checkpoint", None) is not None
    return {name: value for name, value in found.items() if is_pretrained or name != "parts"}


# Rows of the table


def summarise_study(study: Study, results: Results, failures: Sequence[CaseFailure] = ()) -> dict[str, Any]:
    """Return ``rows`` (one per number of labels and arm with a finished cell), counts, and failures, as JSON values.

    ``failures`` are those of this call; earlier ones are kept for unfinished cells.
    """
    tested = Tested.of([*results.values()], study.question.subjects)
    rows = [
        _make_row(study, results, tested, num_labels, arm)
        for num_labels in study.labels
        for arm in study.compared
        if _seeds(results, num_labels, arm)
    ]
    for metric in tested.metrics:
        correct_by_holm([row[metric]["against_scratch"] for row in rows if "against_scratch" in row[metric]])
    finished = {str(cell) for cell in results}
    earlier: dict[str, str] = study.results.get("failed", {})
    return {
        "rows": rows,
        "num_cells": len(study.asked),
        "num_finished": sum(cell in results for cell in study.asked),
        "num_cases_with_labels": len(tested.cases()),
        "training": _describe_training(results),
        "length_unit": next((result["length_unit"] for result in results.values()), "mm"),
        "libraries": sorted({"{name} {version}".format(**result["library"]) for result in results.values()}),
        "failed": {
            **{name: reason for name, reason in earlier.items() if name not in finished},
            **{failure.case: f"{failure.code}  {failure.reason}" for failure in failures},
        },
    }


def _describe_training(results: Results) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the main settings of each arm, and all settings in which any cells differ.

    For each arm and setting: the values that occur, each with its numbers of labels.
    """
    known = {cell: result["trained_with"] for cell, result in results.items() if result.get("trained_with")}
    names = dict.fromkeys([*SHOWN_SETTINGS, *(name for settings in known.values() for name in settings)])
    shown = [n for n in names if n in SHOWN_SETTINGS or len({json.dumps(s.get(n)) for s in known.values()}) > 1]
    arms: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in sorted(known):
        for name in (name for name in shown if name in known[cell]):
            values = arms.setdefault(cell.arm, {}).setdefault(name, [])
            entry = next((entry for entry in values if entry["value"] == known[cell][name]), None)
            if entry is None:
                values.append({"value": known[cell][name], "labels": [cell.num_labels]})
            elif cell.num_labels not in entry["labels"]:
                entry["labels"].append(cell.num_labels)
    return arms


def _seeds(results: Results, num_labels: int, arm: str) -> list[int]:
    return sorted(cell.seed for cell in results if (cell.num_labels, cell.arm) == (num_labels, arm))


def _make_row(study: Study, results: Results, tested: Tested, num_labels: int, arm: str) -> dict[str, Any]:
    """Return means and spreads over the seeds, and comparisons with scratch if it has the same labels and seeds."""
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
    for metric in tested.metrics:
        scores = {cell: tested.scores(result, metric) for cell, result in results.items()}
        per_seed = [_mean(scores[Cell(num_labels, seed, arm)]) for seed in seeds]
        row[metric] = {
            "mean": _or_none(float(np.mean(per_seed))),
            "spread": _or_none(float(np.std(per_seed, ddof=1))) if len(seeds) > 1 else None,
            "per_seed": [_or_none(value) for value in per_seed],
            "per_label": {
                label: _or_none(float(np.mean([tested.mean(result, metric, label) for result in found])))
                for label in tested.labels
            },
        }
        if arm != SCRATCH and tested.cases():
            if compared := _against_scratch(scores, tested, num_labels, arm):
                row[metric]["against_scratch"] = compared
            if saved := _labels_saved(study.curve_labels, scores, num_labels, arm):
                row[metric]["labels_saved"] = saved
    return row


def _against_scratch(
    scores: Mapping[Cell, np.ndarray], tested: Tested, num_labels: int, arm: str
) -> dict[str, Any] | None:
    """Compare with scratch subject by subject at the same number of labels, over the common seeds."""
    seeds = [cell.seed for cell in scores if cell.arm == arm and cell.num_labels == num_labels]
    seeds = sorted(seed for seed in seeds if Cell(num_labels, seed, SCRATCH) in scores)
    if not seeds:
        return None
    mine, theirs = (np.array([scores[Cell(num_labels, seed, name)] for seed in seeds]) for name in (arm, SCRATCH))
    compared = compare_paired(mine.mean(0), theirs.mean(0), by_ranks=tested.metrics == METRICS["segmentation"])
    return {
        **compared,
        "cases": len(tested.cases()),
        "subjects": compared["cases"],
        "seeds_compared": seeds,
        "seeds_better": int((mine.mean(1) > theirs.mean(1)).sum()),
    }


def _labels_saved(
    numbers: Sequence[int], scores: Mapping[Cell, np.ndarray], num_labels: int, arm: str
) -> dict[str, Any] | None:
    """Return the number of labels scratch needs for the arm's mean score; ``needed`` None: more than its largest
    number.

    Only seeds finished for the arm and for scratch at every number of labels count: other means would not be
    comparable.
    """
    wanted = [(num_labels, arm), *((number, SCRATCH) for number in numbers)]
    everywhere = sorted({cell.seed for cell in scores})
    seeds = [seed for seed in everywhere if all(Cell(number, seed, name) in scores for number, name in wanted)]
    if not seeds or not numbers:
        return None
    mine, *theirs = (np.mean([scores[Cell(number, seed, name)] for seed in seeds], 0) for number, name in wanted)
    curve = dict(zip(numbers, theirs))
    needed = labels_needed({number: _mean(values) for number, values in curve.items()}, _mean(mine))
    interval = labels_needed_interval(curve, mine)
    return {
        "needed": _or_none(needed),
        "saved": _or_none(needed - num_labels),
        "interval": None if interval is None else [_or_none(value) for value in interval],
        "seeds": seeds,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
