"""Scores of labels: scikit-learn's values, hand-made cases, intervals and calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from mfm_nnunet import metrics

RNG = np.random.default_rng(0)
TRUE = (np.arange(120) % 3 == 0).astype(float)
SCORE = np.clip(0.3 * TRUE + RNG.uniform(0, 0.7, 120), 0, 1)
BINARY = np.stack([1 - SCORE, SCORE], 1)
SUBJECTS = [f"s{n // 2}" for n in range(120)]


def evaluate(target: np.ndarray, probability: np.ndarray, task: str = "classification", draws: int = 50) -> dict:
    names = [f"c{k}" for k in range(probability.shape[1])]
    subjects = SUBJECTS[: len(target)]
    return metrics.evaluate_labels(task, names, target, probability, subjects, draws=draws)


def test_two_classes_equal_scikit_learn() -> None:
    found = evaluate(TRUE[:, None], BINARY)
    chosen = BINARY.argmax(1)
    for name, expected in {
        "auroc": sk.roc_auc_score(TRUE, SCORE),
        "average_precision": sk.average_precision_score(TRUE, SCORE),
        "balanced_accuracy": sk.balanced_accuracy_score(TRUE, chosen),
        "brier": sk.brier_score_loss(TRUE, SCORE),
    }.items():
        assert found[name]["value"] == pytest.approx(expected), name
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
    assert found["confusion_matrix"] == sk.confusion_matrix(TRUE, chosen).tolist()
    assert found["num_subjects"] == 60


def test_sensitivity_by_hand() -> None:
    true, score = np.array([0] * 10 + [1] * 4), np.array([*np.arange(10) / 10, 0.95, 0.85, 0.75, 0.1])
    assert metrics.sensitivity_at(true, score) == 0.5  # one of ten negatives may lie above: 0.9


def test_several_classes_are_averaged_one_against_the_rest() -> None:
    target, probability = RNG.integers(0, 3, 90), RNG.dirichlet(np.ones(3), 90)
    found = evaluate(target[:, None].astype(float), probability)
    assert found["auroc"]["value"] == pytest.approx(sk.roc_auc_score(target, probability, multi_class="ovr"))
    lacking = evaluate(np.minimum(target, 1)[:, None].astype(float), probability)
    assert lacking["per_class"]["c2"]["auroc"] is None
    assert lacking["auroc"]["value"] is not None


def test_a_constant_classifier_knows_nothing_and_a_calibrated_one_is_calibrated() -> None:
    found = evaluate(TRUE[:, None], np.full((120, 2), 0.5))
    assert (found["auroc"]["value"], found["balanced_accuracy"]["value"]) == (0.5, 0.5)
    stated = RNG.uniform(size=20_000)
    hit = (RNG.uniform(size=20_000) < stated).astype(float)
    both = np.stack([1 - stated, stated], 1)
    assert metrics.calibration_error("classification", hit[:, None], both) < 0.02


def test_the_interval_draws_subjects_and_keeps_rare_classes() -> None:
    target = np.array([[0.0]] * 30 + [[1.0]] * 3)
    samples = metrics.draw_subjects(target, [f"s{n}" for n in range(33)], 100, 0)
    assert all((target[rows] == 1).sum() == 3 for rows in samples)
    pairs = metrics.draw_subjects(TRUE[:, None], SUBJECTS, 20, 0)
    assert all(set(np.unique(rows // 2, return_counts=True)[1] % 2) == {0} for rows in pairs)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_temperature_undoes_a_factor(task: str) -> None:
    logits = RNG.normal(size=(4000, 2)) * 2
    probability = metrics.to_probabilities(task, logits)
    draw = RNG.uniform(size=(4000, 2))
    target = (draw[:, :1] < probability[:, 1:]) if task == "classification" else draw < probability
    temperature = metrics.fit_temperature(task, target.astype(float), logits * 3)
    assert temperature == pytest.approx(3, rel=0.15)


def test_unknown_labels_do_not_count() -> None:
    target, probability = (RNG.uniform(size=(100, 2)) < 0.5).astype(float), RNG.uniform(size=(100, 2))
    holes = np.vstack([target, np.full((20, 2), np.nan)])
    more = np.vstack([probability, RNG.uniform(size=(20, 2))])
    one, other = (evaluate(*pair, "multilabel") for pair in ((target, probability), (holes, more)))
    for name in ("auroc", "average_precision", "brier", "ece", "balanced_accuracy"):
        assert one[name]["value"] == pytest.approx(other[name]["value"]), name


def test_numbers() -> None:
    truth, predicted = np.array([[1.0], [2.0], [3.0], [6.0]]), np.array([[1.0], [3.0], [3.0], [5.0]])
    found = evaluate(truth, predicted, "regression")
    assert found["mae"]["value"] == 0.5
    assert found["bias"]["value"] == 0
    assert found["r2"]["value"] == pytest.approx(sk.r2_score(truth, predicted))
    assert math.isfinite(found["limits_of_agreement"]["value"])
