"""The order in which to label: disagreement, distance to what is labelled, reasons in words; agreement of teachers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mfm_nnunet.finetune.pseudo_labels import agreement
from mfm_nnunet.finetune.ranking import rank


def entry(case: str, place: float, agreement: float = 0.5) -> dict[str, Any]:
    return {"case": case, "feature": [place, 0.0], "agreement": agreement}


def test_disagreement_comes_first_and_twins_come_late() -> None:
    images = [entry("a", 0.0, 0.9), entry("b", 5.0, 0.3), entry("twin_of_b", 5.01, 0.31), entry("c", 10.0, 0.5)]
    rows = rank(images, []).rows
    assert [row[0] for row in rows] == ["b", "c", "a", "twin_of_b"]
    assert "disagree" in rows[0][3]
    assert "like b, which is ranked before" in rows[3][3]


def test_images_like_labelled_ones_come_late() -> None:
    rows = rank([entry("near", 1.0), entry("far", 9.0)], [entry("known", 0.9)]).rows
    assert [row[0] for row in rows] == ["far", "near"]
    assert "known, which is labelled" in rows[1][3]


def test_equal_images_and_full_agreement_are_ranked_too() -> None:
    rows = rank([entry(name, 1.0, 1.0) for name in "cab"], [entry("k", 1.0)]).rows
    assert sorted(row[0] for row in rows) == ["a", "b", "c"]
    assert rank([], []).rows == []


def test_agreement_is_the_mean_dice_and_defined_without_foreground() -> None:
    common = torch.zeros(2, 4, 4, dtype=torch.bool)
    assert agreement([common, common], common) == 1
    common[0, :2] = True
    other = torch.zeros_like(common)
    other[0, :1] = True
    assert agreement([common, other], common) == pytest.approx((1 + 2 * 4 / 12) / 2)
    assert agreement([torch.zeros_like(common)], common) == 0
