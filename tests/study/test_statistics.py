"""Comparisons and labels saved, on numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mfm_nnunet.study.statistics import (
    compare_paired,
    correct_by_holm,
    labels_needed,
    labels_needed_interval,
    mean_and_spread,
)

CURVE = {5: 0.5, 10: 0.7, 20: 0.6, 40: 0.9}


def test_paired_comparison() -> None:
    theirs = np.linspace(0.5, 0.8, 8)
    result = compare_paired(theirs + [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, -0.001], theirs)
    assert result["difference"] == pytest.approx(0.279 / 8)
    assert (result["better"], result["cases"]) == (7, 8)
    # All ranks but the smallest are positive: 2 of the 2^8 sign patterns on either side are as extreme.
    assert result["p"] == pytest.approx(4 / 2**8)
    low, high = result["interval"]
    assert 0 < low < 0.279 / 8 < high < 0.07


def test_equal_scores_are_no_difference() -> None:
    scores = np.linspace(0.5, 0.7, 6)
    assert compare_paired(scores, scores) == {
        "difference": 0.0,
        "interval": [0.0, 0.0],
        "better": 0,
        "cases": 6,
        "p": 1.0,
    }


def test_few_cases_have_no_interval() -> None:
    scores = np.linspace(0.5, 0.7, 5)
    found = compare_paired(scores + 0.1, scores)
    assert (found["interval"], found["better"]) == (None, 5)
    assert labels_needed_interval({1: scores, 10: scores + 0.2}, scores + 0.1) is None


def test_holm() -> None:
    rows = [{"p": 0.04}, {"p": 0.01}, {"p": 0.03}, {"p": 0.9}]
    correct_by_holm(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.09, 0.04, 0.09, 0.9])
    rows = [{"p": 0.6}, {"p": 0.7}]
    correct_by_holm(rows)
    assert [row["p_holm"] for row in rows] == [1.0, 1.0]
    correct_by_holm([])


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([0.5]) == (0.5, None)


@pytest.mark.parametrize(
    ("score", "needed"),
    [
        (0.4, 5),  # nothing is extrapolated: at most 5
        (0.5, 5),
        (0.6, math.sqrt(50)),  # half the way from 5 to 10 on the logarithm
        (0.7, 10),
        (0.8, math.sqrt(20 * 40)),  # the setback at 20 costs nothing: there the best so far is 0.7
        (0.9, 40),
        (0.9001, math.inf),
    ],
)
def test_labels_needed(score: float, needed: float) -> None:
    assert labels_needed(CURVE, score) == pytest.approx(needed)


def test_labels_needed_with_a_single_number() -> None:
    assert labels_needed({8: 0.5}, 0.5) == 8
    assert labels_needed({8: 0.5}, 0.6) == math.inf


def test_interval_of_labels_needed() -> None:
    hard = np.linspace(-0.2, 0.2, 10)
    curve = {number: score + hard for number, score in CURVE.items()}
    # What makes a case hard is in both, so the interval has no width.
    assert labels_needed_interval(curve, 0.6 + hard) == pytest.approx((math.sqrt(50), math.sqrt(50)))
    low, high = labels_needed_interval(curve, 0.88 + hard * np.array([1, -1] * 5))
    assert 10 < low < 40
    assert high == math.inf
