"""Metrics: the Dice coefficient with a defined value for absent labels; scores of whole-image labels with intervals.

Legend: N cases, K classes or outputs, T targets of a case.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SPECIFICITY = 0.9
NUM_BINS = 15
"""Bins of equal width of the calibration error."""
DRAWS = 2000
"""Draws of subjects for an interval."""
RARE = 20
"""With fewer subjects in a class, each class is drawn by itself."""
_Scores = dict[str, Callable[[np.ndarray, np.ndarray], float]]


def dice(reference: np.ndarray, predicted: np.ndarray, values: tuple[int, ...], ignore: int | None = None) -> float:
    """Return the Dice of one label, i.e. of the voxels whose value is in ``values``.

    Voxels with the reference value ``ignore`` do not count. The result is NaN if neither array has the label, and 0 if
    only one has it.
    """
    is_counted = np.ones(reference.shape, bool) if ignore is None else reference != ignore
    is_reference = np.isin(reference, values) & is_counted
    is_predicted = np.isin(predicted, values) & is_counted
    num_voxels = int(is_reference.sum()) + int(is_predicted.sum())
    return 2 * int((is_reference & is_predicted).sum()) / num_voxels if num_voxels else float("nan")


def mean_dice(values: list[float]) -> float:
    """Return the mean of the defined Dice values; NaN if there are none."""
    existing = [value for value in values if value == value]
    return sum(existing) / len(existing) if existing else float("nan")


def agreement_of(maps: Sequence[np.ndarray], num_labels: int) -> dict[int, float]:
    """Return the mean Dice over all pairs of label maps, by label (from 0 for value 1) that any of them has."""
    found: dict[int, list[float]] = {}
    for one, other in itertools.combinations(maps, 2):
        pairs = np.bincount((one * (num_labels + 1) + other).ravel(), minlength=(num_labels + 1) ** 2)
        counts = pairs.reshape(num_labels + 1, num_labels + 1)
        sizes = counts.sum(0) + counts.sum(1)
        for label in range(num_labels):
            if sizes[label + 1]:
                found.setdefault(label, []).append(float(2 * counts[label + 1, label + 1] / sizes[label + 1]))
    return {label: round(sum(values) / len(values), 4) for label, values in found.items()}


# Labels of whole images


def to_probabilities(task: str, logits_NK: np.ndarray, temperature: float | None = None) -> np.ndarray:
    """Return probabilities (N, K) of logits; numbers are returned unchanged."""
    from scipy.special import expit, softmax

    if task == "regression":
        return logits_NK
    scaled = logits_NK / (temperature or 1.0)
    return softmax(scaled, axis=1) if task == "classification" else expit(scaled)


def fit_temperature(task: str, target_NT: np.ndarray, logits_NK: np.ndarray) -> float | None:
    """Return the temperature (0.05 to 20) of the lowest log loss (arXiv 1706.04599); None for numbers."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_expit, log_softmax

    if task == "regression":
        return None

    def loss(log_temperature: float) -> float:
        scaled = logits_NK / math.exp(log_temperature)
        if task == "classification":
            return -float(np.take_along_axis(log_softmax(scaled, axis=1), target_NT.astype(int), 1).mean())
        return -float(np.nanmean(target_NT * log_expit(scaled) + (1 - target_NT) * log_expit(-scaled)))

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


def quick_score(task: str, target_NT: np.ndarray, logits_NK: np.ndarray) -> tuple[str, float]:
    """Return the name and value of the score to watch while training: AUROC, or R2 of numbers."""
    name = "r2" if task == "regression" else "auroc"
    return name, _scores(task)[name](target_NT, to_probabilities(task, logits_NK))


def evaluate_labels(
    task: str,
    classes: Sequence[str],
    target_NT: np.ndarray,
    probability_NK: np.ndarray,
    subjects: Sequence[str],
    draws: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all scores as JSON values, each with a 95 % interval from drawing subjects with replacement.

    ``draws`` is by default :data:`DRAWS`. A score that the cases do not define is None. Averages over classes are over
    those that are defined.
    """
    import sklearn

    scores = _scores(task)
    values = {name: score(target_NT, probability_NK) for name, score in scores.items()}
    samples = draw_subjects(target_NT, subjects, DRAWS if draws is None else draws, seed)
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):  # thousands of small calls
        drawn = {
            name: [score(target_NT[rows], probability_NK[rows]) for rows in samples] for name, score in scores.items()
        }
    result: dict[str, Any] = {"task": task, "num_cases": len(target_NT), "num_subjects": len(set(subjects))}
    for name, value in values.items():
        defined = [number for number in drawn[name] if number == number]
        low, high = np.percentile(defined, [2.5, 97.5]) if defined and value == value else (math.nan, math.nan)
        result[name] = {"value": _plain(value), "low": _plain(low), "high": _plain(high)}
    if task == "regression":
        return result
    one_versus_rest = _one_versus_rest(task, target_NT, probability_NK.shape[1])
    result["per_class"] = {
        name: {
            "prevalence": _plain(np.nanmean(true)),
            "auroc": _plain(auroc(true, probability)),
            "average_precision": _plain(average_precision(true, probability)),
        }
        for name, true, probability in zip(classes, one_versus_rest.T, probability_NK.T)
    }
    if task == "classification":
        from sklearn.metrics import confusion_matrix

        chosen, labels = probability_NK.argmax(1), range(len(classes))
        result["confusion_matrix"] = confusion_matrix(target_NT[:, 0].astype(int), chosen, labels=labels).tolist()
    return result


def describe_scores(result: Mapping[str, Any]) -> list[str]:
    """Describe the result of :func:`evaluate_labels`, a line per score."""
    lines = [f"validation on {result['num_cases']} cases of {result['num_subjects']} subjects (95 % intervals):"]
    for name, score in result.items():
        if isinstance(score, Mapping) and "low" in score:
            numbers = [f"{score[key]:.3f}" if score[key] is not None else "-" for key in ("value", "low", "high")]
            lines.append(f"  {name.replace('_', ' ')} {numbers[0]} ({numbers[1]} to {numbers[2]})")
    return lines


def draw_subjects(target_NT: np.ndarray, subjects: Sequence[str], draws: int, seed: int) -> list[np.ndarray]:
    """Return the rows of ``draws`` samples of subjects; each class by itself if one has few subjects."""
    rows: dict[str, list[int]] = {}
    for row, subject in enumerate(subjects):
        rows.setdefault(subject, []).append(row)
    names = list(rows)
    is_class = target_NT.shape[1] == 1 and len(np.unique(target_NT)) <= len(names) / 2
    strata = np.array([target_NT[rows[name][0], 0] if is_class else 0 for name in names])
    kinds, counts = np.unique(strata, return_counts=True)
    groups = [np.flatnonzero(strata == kind) for kind in kinds] if counts.min() < RARE else [np.arange(len(names))]
    rng, samples = np.random.default_rng(seed), []
    for _ in range(draws):
        chosen = np.concatenate([rng.choice(group, len(group)) for group in groups])
        samples.append(np.concatenate([rows[names[index]] for index in chosen]))
    return samples


def auroc(true_N: np.ndarray, score_N: np.ndarray) -> float:
    """Return the area under the ROC curve over the known cases; NaN with one class."""
    from sklearn.metrics import roc_auc_score

    true, score = _known(true_N, score_N)
    return float(roc_auc_score(true, score)) if len(np.unique(true)) == 2 else math.nan


def average_precision(true_N: np.ndarray, score_N: np.ndarray) -> float:
    """Return the average precision over the known cases; NaN without positives."""
    from sklearn.metrics import average_precision_score

    true, score = _known(true_N, score_N)
    return float(average_precision_score(true, score)) if true.any() else math.nan


def sensitivity_at(true_N: np.ndarray, score_N: np.ndarray, specificity: float = SPECIFICITY) -> float:
    """Return the highest sensitivity of a threshold with at least this specificity."""
    from sklearn.metrics import roc_curve

    true, score = _known(true_N, score_N)
    if len(np.unique(true)) < 2:
        return math.nan
    false_positives, sensitivity, _ = roc_curve(true, score)
    return float(sensitivity[false_positives <= 1 - specificity + 1e-12].max())


def balanced_accuracy(true_N: np.ndarray, chosen_N: np.ndarray) -> float:
    """Return the mean recall over the classes that occur."""
    return float(np.mean([(chosen_N[true_N == label] == label).mean() for label in np.unique(true_N)]))


def reliability(
    task: str, target_NT: np.ndarray, probability_NK: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean probability, share of hits and number of predictions per bin.

    Two classes and several labels: of the (second) class; more classes: of the chosen class.
    """
    if task == "multilabel":
        hit, stated = _known(target_NT.ravel(), probability_NK.ravel())
    elif probability_NK.shape[1] == 2:
        hit, stated = target_NT[:, 0] == 1, probability_NK[:, 1]
    else:
        hit, stated = probability_NK.argmax(1) == target_NT[:, 0], probability_NK.max(1)
    bins = np.minimum((stated * NUM_BINS).astype(int), NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    filled = np.maximum(counts, 1)
    means, shares = (np.bincount(bins, values.astype(float), NUM_BINS) / filled for values in (stated, hit))
    return means, shares, counts


def calibration_error(task: str, target_NT: np.ndarray, probability_NK: np.ndarray) -> float:
    """Return the expected calibration error: the mean distance of share and probability over the predictions."""
    means, shares, counts = reliability(task, target_NT, probability_NK)
    return float((np.abs(means - shares) * counts).sum() / counts.sum())


def _scores(task: str) -> _Scores:
    """Return the scores of a task, functions of targets and probabilities."""
    if task == "regression":
        return {"mae": _mae, "r2": _r2, "bias": _bias, "limits_of_agreement": _agreement}

    def averaged(score: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
        """Average over classes; of two classes only the second counts."""

        def compute(target_NT: np.ndarray, probability_NK: np.ndarray) -> float:
            true_NK = _one_versus_rest(task, target_NT, probability_NK.shape[1])
            first = 1 if task == "classification" and probability_NK.shape[1] == 2 else 0
            values = [score(*pair) for pair in zip(true_NK.T[first:], probability_NK.T[first:])]
            defined = [value for value in values if value == value]
            return float(np.mean(defined)) if defined else math.nan

        return compute

    scores: _Scores = {
        "auroc": averaged(auroc),
        "average_precision": averaged(average_precision),
        "sensitivity_at_specificity_0.9": averaged(sensitivity_at),
        "balanced_accuracy": averaged(lambda true, p: balanced_accuracy(*_known(true, p > 0.5))),
        "brier": averaged(lambda true, p: float(np.mean(np.square(np.subtract(*_known(true, p)))))),
        "ece": lambda target, p: calibration_error(task, target, p),
    }
    if task == "classification":
        scores["balanced_accuracy"] = lambda target, p: balanced_accuracy(target[:, 0], p.argmax(1))
    return scores


def _one_versus_rest(task: str, target_NT: np.ndarray, num_classes: int) -> np.ndarray:
    if task == "multilabel":
        return target_NT
    return (target_NT == np.arange(num_classes)).astype(float)


def _known(true_N: np.ndarray, other_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    is_known = np.isfinite(true_N)
    return true_N[is_known], other_N[is_known]


def _mae(target_NT: np.ndarray, predicted_NT: np.ndarray) -> float:
    return float(np.abs(predicted_NT - target_NT).mean())


def _r2(target_NT: np.ndarray, predicted_NT: np.ndarray) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(target_NT, predicted_NT)) if len(np.unique(target_NT)) > 1 else math.nan


def _bias(target_NT: np.ndarray, predicted_NT: np.ndarray) -> float:
    return float((predicted_NT - target_NT).mean())


def _agreement(target_NT: np.ndarray, predicted_NT: np.ndarray) -> float:
    """Return half the width of Bland and Altman's limits of agreement around the bias."""
    return float(1.96 * np.std(predicted_NT - target_NT, ddof=1)) if len(target_NT) > 1 else math.nan


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
