"""The head ``probe``: frozen features computed once per image, logistic regression, and nearest neighbours.

Legend: N cases, F features, K outputs, T targets of a case.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mfm_nnunet import metrics
from mfm_nnunet.data.label_table import LabelTable
from mfm_nnunet.data.volumes import read_arrays
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import atomic_write, digest_of
from mfm_nnunet.finetune.classification import LabelledImages
from mfm_nnunet.models.classifier import Classifier
from mfm_nnunet.reports.progress import track

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse penalties from which inner folds choose."""
NEIGHBOURS = (10, 20)
TEMPERATURE = 0.07
"""Of the weights of neighbours, exp(similarity / temperature)."""
Fit = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

logger = logging.getLogger(__name__)


def cached_features(
    classifier: Classifier, images: LabelledImages, cases: Sequence[str], folder: Path, weights: str
) -> np.ndarray:
    """Return the features (N, F) of ``cases``; those computed before are in ``folder``.

    ``weights`` identifies the encoder's weights and the plan. A file whose image was preprocessed anew is not used.
    """
    stamps = {case: images.files[case].stat() for case in cases}
    keys = {case: digest_of([case, stamp.st_size, stamp.st_mtime_ns]) for case, stamp in stamps.items()}
    file = folder / f"features_{weights[:16]}.npz"
    known = _known_features(file)
    classifier.eval()
    missing = [case for case in cases if keys[case] not in known]
    with track("features", len(missing), "images") as count:
        for case in missing:
            known[keys[case]] = classifier.embed_views(images.views(case)).mean(0).cpu().numpy().astype(np.float32)
            count()
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as handle:
            np.savez(handle, **known)  # type: ignore[arg-type]
    logger.info(
        "features of %d images: %d computed now, %d from before", len(cases), len(missing), len(cases) - len(missing)
    )
    return np.stack([known[keys[case]] for case in cases]).astype(float)


def fit_probe(
    classifier: Classifier, images: LabelledImages, train_NF: np.ndarray, validation_NF: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit the head of ``classifier`` to the training cases; return the outputs for the validation cases, and notes.

    The notes are the chosen inverse penalty and the scores of nearest neighbours.
    """
    table, names = images.table, images.split["train"]
    target_NT = np.stack([images.target(case).numpy() for case in names]).astype(float)
    centre, width = train_NF.mean(0), train_NF.std(0) + 1e-6
    x_NF = (train_NF - centre) / width
    strength, score = _choose_strength(table, names, x_NF, target_NT)
    weight_KF, bias_K = _fit(table, strength)(x_NF, target_NT)
    weight_KF = weight_KF / width
    bias_K = bias_K - weight_KF @ centre
    with torch.no_grad():
        classifier.head.output.weight.copy_(torch.from_numpy(weight_KF))
        classifier.head.output.bias.copy_(torch.from_numpy(bias_K))
    notes: dict[str, Any] = {"c": strength, "inner_score": None if score != score else score}
    validation_targets = table.array(images.split["val"])
    for number in NEIGHBOURS:
        predicted = nearest_neighbours(table.task, x_NF, target_NT, (validation_NF - centre) / width, number)
        name, value = metrics.quick_score(table.task, validation_targets, predicted)
        notes[f"knn_{number}_{name}"] = None if value != value else value
    return validation_NF @ weight_KF.T + bias_K, notes


def nearest_neighbours(
    task: str, x_NF: np.ndarray, target_NT: np.ndarray, query_MF: np.ndarray, number: int
) -> np.ndarray:
    """Return outputs (M, K), logarithms of the weighted share of each class among the neighbours; numbers: the mean."""
    unit_NF, unit_MF = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-12) for x in (x_NF, query_MF))
    similarity_MN = unit_MF @ unit_NF.T
    nearest_MN = np.argsort(-similarity_MN, axis=1, kind="stable")[:, :number]
    weight_MN = np.exp(np.take_along_axis(similarity_MN, nearest_MN, 1) / TEMPERATURE)[..., None]
    values_NK = target_NT
    if task == "classification":
        values_NK = np.eye(int(target_NT.max()) + 1)[target_NT[:, 0].astype(int)]
    found_MNK = values_NK[nearest_MN]
    known = np.isfinite(found_MNK)
    mean_MK = (np.where(known, found_MNK, 0) * weight_MN).sum(1) / np.maximum((known * weight_MN).sum(1), 1e-12)
    if task == "regression":
        return mean_MK
    mean_MK = mean_MK.clip(1e-6, 1 - 1e-6)
    return np.log(mean_MK) if task == "classification" else np.log(mean_MK / (1 - mean_MK))


def _choose_strength(
    table: LabelTable, names: Sequence[str], x_NF: np.ndarray, target_NT: np.ndarray
) -> tuple[float, float]:
    """Return the inverse penalty with the best score over inner folds, and that score."""
    subjects = {name: table.subjects[name] for name in names}
    inner = LabelTable(table.task, table.classes, table.targets, table.subjects, {})
    try:
        splits = inner.make_splits(names, subjects)
    except MFMError:  # a single subject
        return 1e-2, float("nan")
    rows = {name: row for row, name in enumerate(names)}
    scores = []
    for strength in STRENGTHS:
        outputs = np.full((len(names), table.num_outputs), np.nan)
        for split in splits:
            train, held_out = ([rows[name] for name in split[part]] for part in ("train", "val"))
            weight_KF, bias_K = _fit(table, strength)(x_NF[train], target_NT[train])
            outputs[held_out] = x_NF[held_out] @ weight_KF.T + bias_K
        scores.append(metrics.quick_score(table.task, target_NT, outputs)[1])
    if np.isnan(scores).all():
        return 1e-2, float("nan")
    best = int(np.nanargmax(scores))
    return STRENGTHS[best], scores[best]


def _fit(table: LabelTable, strength: float) -> Fit:
    """Return a function that fits weights (K, F) and biases (K,) to standardised features."""
    from sklearn.linear_model import LogisticRegression, Ridge

    def logistic(x_NF: np.ndarray, true_N: np.ndarray) -> LogisticRegression:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it stops after max_iter with features that separate all cases
            return LogisticRegression(C=strength, class_weight="balanced", max_iter=2000).fit(x_NF, true_N)

    def classes(x_NF: np.ndarray, target_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model, number = logistic(x_NF, target_NT[:, 0].astype(int)), len(table.classes)
        weight_KF, bias_K = np.zeros((number, x_NF.shape[1])), np.full(number, -30.0)  # classes that no case has
        if len(model.classes_) == 2:
            weight_KF[model.classes_[1]], bias_K[model.classes_] = model.coef_[0], [0, model.intercept_[0]]
        else:
            weight_KF[model.classes_], bias_K[model.classes_] = model.coef_, model.intercept_
        return weight_KF, bias_K

    def labels(x_NF: np.ndarray, target_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight_KF, bias_K = np.zeros((target_NT.shape[1], x_NF.shape[1])), np.zeros(target_NT.shape[1])
        for k, true_N in enumerate(target_NT.T):
            known = np.isfinite(true_N)
            if len(np.unique(true_N[known])) == 2:
                model = logistic(x_NF[known], true_N[known].astype(int))
                weight_KF[k], bias_K[k] = model.coef_[0], model.intercept_[0]
        return weight_KF, bias_K

    def numbers(x_NF: np.ndarray, target_NT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        model = Ridge(alpha=1 / strength).fit(x_NF, target_NT[:, 0])
        return model.coef_[None], np.array([model.intercept_])

    return {"classification": classes, "multilabel": labels, "regression": numbers}[table.task]


def _known_features(file: Path) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in read_arrays(file).items()} if file.is_file() else {}
