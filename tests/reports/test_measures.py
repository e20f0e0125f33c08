"""Measures of masks equal those of other code, and flags say what is unusual, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mfm_nnunet.metrics import agreement_of, dice
from mfm_nnunet.reports.measures import Measured, find_flags, measure, summarise_volumes, usual_range
from mfm_nnunet.reports.views import OrientedImage

LABELS = {"whole": (1, 2), "core": (2,), "absent": (7,)}


def measured(**volumes: float) -> Measured:
    return Measured("ml", volumes, [])


def test_measures_equal_the_plain_formulas() -> None:
    rng = np.random.default_rng(0)
    mask, reference = (rng.integers(0, 4, (5, 6, 7)).astype(np.uint8) for _ in range(2))
    found = measure(OrientedImage(mask, (2, 3, 5)), LABELS, reference, ignore=3)
    assert found.unit == "ml"
    assert found.volumes == pytest.approx({n: np.isin(mask, v).sum() * 0.03 for n, v in LABELS.items()})
    for name, values in LABELS.items():
        assert found.dice[name] == pytest.approx(dice(reference, mask, values, ignore=3), nan_ok=True)
    assert found.mean_dice == pytest.approx(np.mean([found.dice["whole"], found.dice["core"]]))


@pytest.mark.parametrize("shape", [(5, 6, 7), (6, 7)])
def test_labels_at_the_border(shape: tuple[int, ...]) -> None:
    mask = np.zeros(shape, np.uint8)
    mask[..., 2, 3] = 2 if len(shape) == 2 else 0
    assert measure(OrientedImage(mask, (1,) * len(shape)), LABELS).touching == []
    mask[..., 2, -1] = 1
    assert measure(OrientedImage(mask, (1,) * len(shape)), LABELS).touching == ["whole"]


def test_a_mask_as_in_training_has_no_flag() -> None:
    training = summarise_volumes([measured(liver=1500 * factor) for factor in np.linspace(0.7, 1.4, 20)])
    assert training["num_cases"] == 20
    assert set(training["labels"]["liver"]) == {"num_cases", "num_touching", "quartiles"}, "no names of cases"
    assert find_flags(measured(liver=1100), training, {"liver": 0.9}) == []


@pytest.mark.parametrize(
    ("one", "agreement", "words"),
    [
        (measured(liver=0), {}, "empty"),
        (measured(liver=100), {}, "unusually small: liver"),
        (measured(liver=9000), {}, "unusually large: liver"),
        (Measured("ml", {"liver": 1500}, ["liver"]), {}, "touches the border"),
        (measured(liver=1500), {"liver": 0.4}, "folds disagree: liver"),
        (measured(liver=0, tumour=3), {}, "not found"),
    ],
)
def test_flags_in_plain_words(one: Measured, agreement: dict[str, float], words: str) -> None:
    training = summarise_volumes([measured(liver=1500 * factor) for factor in np.linspace(0.7, 1.4, 20)])
    flags = find_flags(one, training, agreement)
    assert len(flags) == 1
    assert words in flags[0]


@pytest.mark.parametrize(("num_cases", "num_touching", "is_flagged"), [(40, 2, True), (40, 3, False), (7, 0, False)])
def test_a_label_at_the_border_is_flagged_where_training_masks_rarely_touch_it(
    num_cases: int, num_touching: int, is_flagged: bool
) -> None:
    masks = [Measured("ml", {"vessel": 9 + n}, ["vessel"] * (n < num_touching)) for n in range(num_cases)]
    training = summarise_volumes(masks)
    assert bool(find_flags(masks[0], training)) is is_flagged
    del training["labels"]["vessel"]["num_touching"]
    assert find_flags(masks[0], training) == [], "models of earlier versions do not know"


def test_few_or_other_training_masks_say_nothing_about_volumes() -> None:
    few = summarise_volumes([measured(liver=1500) for _ in range(7)])
    assert usual_range("liver", few) is None
    pixels = {**summarise_volumes([measured(liver=factor) for factor in range(1, 30)]), "unit": "pixels"}
    for training in ({}, few, pixels):
        assert find_flags(measured(liver=1), training) == []


def test_agreement_of_folds_is_the_mean_dice_over_pairs() -> None:
    rng = np.random.default_rng(1)
    maps = [rng.integers(0, 3, (6, 7, 8)) for _ in range(3)]
    found = agreement_of(maps, 4)
    assert set(found) == {0, 1}, "labels that no fold has are left out"
    pairs = [(0, 1), (0, 2), (1, 2)]
    for label, value in found.items():
        assert value == pytest.approx(np.mean([dice(maps[a], maps[b], (label + 1,)) for a, b in pairs]), abs=1e-4)
    assert agreement_of(maps[:1], 4) == {}


def test_nothing_to_measure() -> None:
    assert summarise_volumes([]) == {"unit": "", "num_cases": 0, "labels": {}}
    assert math.isnan(measured(liver=1).mean_dice)
