"""Comparisons of segmentations case by case, and how many labels a better start is worth.

Scores are between 0 and 1 and higher is better. The unit of every comparison is called a case here and must be
independent of the others: the caller averages over seeds first, and over several scans of one subject.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MIN_CASES = 6
"""Fewer than these give no bootstrap interval: resamples of so few cases are too alike, and the interval too narrow."""
NUM_BOOTSTRAPS = 10_000
NUM_BOOTSTRAPS_OF_LABELS = 2_000


def compare_paired(mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The difference ``mine - theirs`` of the scores of the same cases, (N,) each, with N at least 1.

    ``difference`` is its mean, ``interval`` the bootstrap 95 % interval over the cases (None for fewer than
    ``MIN_CASES``), ``better`` the number of cases above zero of ``cases``, and ``p`` that of Wilcoxon's signed-rank
    test, two-sided (1 when nothing differs).
    """
    from scipy import stats

    difference = mine - theirs
    interval = None
    if len(difference) >= MIN_CASES:
        draws = np.random.default_rng(0).integers(0, len(difference), (NUM_BOOTSTRAPS, len(difference)))
        interval = np.percentile(difference[draws].mean(1), [2.5, 97.5]).tolist()
    p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
    return {
        "difference": float(difference.mean()),
        "interval": interval,
        "better": int((difference > 0).sum()),
        "cases": len(difference),
        "p": p,
    }


def correct_by_holm(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` to rows that have ``p``: corrected for the number of rows by Holm's step-down method."""
    largest = 0.0
    for rank, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        largest = max(largest, min(1.0, row["p"] * (len(rows) - rank)))
        row["p_holm"] = largest


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; the latter is None for a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), spread


def labels_needed(curve: Mapping[int, float], score: float) -> float:
    """How many labels the learning curve ``curve`` (number of labels to score) needs to reach ``score``.

    The curve is made monotone by its running maximum, so that a setback at more labels costs it nothing, and is
    interpolated linearly over the logarithm of the number of labels. ``inf`` where it never gets there. The smallest
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
    """The bootstrap 95 % interval of :func:`labels_needed` over test cases; None for fewer than ``MIN_CASES``.

    ``curve`` and ``scores`` hold a score per case, (N,), of the same cases in the same order. All are drawn together,
    so that what makes a case hard is in both.
    """
    num_cases = len(scores)
    if num_cases < MIN_CASES:
        return None
    draws = np.random.default_rng(0).integers(0, num_cases, (NUM_BOOTSTRAPS_OF_LABELS, num_cases))
    means = {number: values[draws].mean(1) for number, values in curve.items()}
    needed = [
        labels_needed({number: float(values[i]) for number, values in means.items()}, float(score))
        for i, score in enumerate(scores[draws].mean(1))
    ]
    ordered = sorted(needed)  # np.percentile would interpolate between a number and infinity
    last = len(ordered) - 1
    return ordered[round(0.025 * last)], ordered[round(0.975 * last)]
