"""Scores of test cases: Dice and surface distance (NSD) of masks; balanced accuracy, AUROC and R2 of labels of images.

Tools for surface metrics differ by tens of points on equal masks. So one library is used, DeepMind's
``surface-distance``, and every result records its name and version. NSD is its surface Dice: the share of both
surfaces, by area, within the tolerance of the other one. A label in neither reference nor prediction has no score
(NaN); a label in only one of them scores 0. Each result also lists the labels in each reference: means are over these
alone, and predictions of other labels are false positives.

``python -m mfm_nnunet.study.evaluation STUDY CELL`` scores one cell of a study; each runs in its own process.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.dataset import IMAGE_TASKS
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, read_json, write_json
from mfm_nnunet.jobs.preflight import list_companions, read_label_map
from mfm_nnunet.metrics import dice
from mfm_nnunet.study.folder import Study, read_study
from mfm_nnunet.version import __version__

LIBRARY = "surface-distance"
_OF_LABELS = ("balanced_accuracy", "auroc")
METRICS = {
    "segmentation": ("dice", "nsd"),
    "classification": _OF_LABELS,
    "multilabel": _OF_LABELS,
    "regression": ("r2",),
}
"""Metrics of each task, the first for the log."""
RESULT = "result.json"
"""Written last, so its presence marks a finished cell."""


def require_library(task: str = "segmentation") -> dict[str, str]:
    """Return name and version of the library for the metrics, or refuse to run without the one for surfaces."""
    if task in IMAGE_TASKS:
        return {"name": "mfm_nnunet", "version": __version__}
    if importlib.util.find_spec("surface_distance") is None:
        raise MFMError(
            "E_NOT_FOUND",
            f"a study needs the package {LIBRARY}, which is not installed. Run: pip install 'mfm_nnunet[study]'",
        )
    return {"name": LIBRARY, "version": importlib.metadata.version(LIBRARY)}


def surface_dice(
    reference: np.ndarray, predicted: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float
) -> float:
    """Compute the NSD of two boolean masks of 2 or 3 axes: from 0 to 1, NaN if both are empty, 0 if one is."""
    if not reference.any() and not predicted.any():
        return float("nan")
    if not reference.any() or not predicted.any():  # the library would divide by zero, or give infinite distances
        return 0.0
    import surface_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports from a namespace that SciPy 2 will drop
        distances = surface_distance.compute_surface_distances(reference, predicted, [float(s) for s in spacing_mm])
        return float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm))


def score_case(
    reference: np.ndarray,
    predicted: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[str, tuple[int, ...]],
    ignore: int | None,
    tolerance_mm: float,
) -> dict[str, dict[str, float]]:
    """Compute the metrics of every label of one case; ``labels`` maps names to voxel values.

    Axes of length 1 are dropped: a 2D image has contours, not surfaces. Voxels whose reference value is ``ignore``
    belong to no label in either mask.
    """
    kept = [axis for axis, size in enumerate(reference.shape) if size > 1]
    shape, spacing = [reference.shape[axis] for axis in kept], [spacing_mm[axis] for axis in kept]
    reference, predicted = reference.reshape(shape), predicted.reshape(shape)
    is_counted = np.ones(shape, bool) if ignore is None else reference != ignore
    return {
        name: {
            "dice": dice(reference, predicted, values, ignore),
            "nsd": surface_dice(
                np.isin(reference, values) & is_counted, np.isin(predicted, values) & is_counted, spacing, tolerance_mm
            ),
        }
        for name, values in labels.items()
    }


def score_labels(
    task: str, classes: Sequence[str], target_NT: np.ndarray, predicted_NK: np.ndarray, subjects: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Compute a number per case (N,) for each class and metric; the mean over the subjects' means is the metric.

    Each number is the metric plus the case's influence on it, for the AUROC from DeLong's placement values (1988). So
    the variance of the mean is DeLong's, and labels of whole images are compared and resampled as masks are. Metrics
    are of one class against the rest; classes that no case has, or every case, are left out.
    """
    number, sizes = len(target_NT), Counter(subjects)
    shares = np.array([sizes[subject] * len(sizes) / number for subject in subjects])

    def spread(value: float, *parts: tuple[np.ndarray, np.ndarray, float]) -> np.ndarray:
        """Return ``value`` plus the influence of each case: parts are rows, their values, and the mean's weight."""
        influence = np.zeros(number)
        for rows, values, weight in parts:
            influence[rows] += weight * number / len(rows) * (values - values.mean())
        return value + influence * shares

    if task == "regression":
        errors = np.square(predicted_NK - target_NT)[:, 0] / target_NT.var()
        return {"number": {"r2": spread(1 - errors.mean(), (np.arange(number), -errors, 1.0))}}
    found = {}
    chosen_NK = (
        predicted_NK > 0.5 if task == "multilabel" else np.arange(len(classes)) == predicted_NK.argmax(1)[:, None]
    )
    true_NK = target_NT if task == "multilabel" else (target_NT == np.arange(len(classes))).astype(float)
    for name, true, score, chosen in zip(classes, true_NK.T, predicted_NK.T, chosen_NK.T):
        ill, well = np.flatnonzero(true == 1), np.flatnonzero(true == 0)
        if not len(ill) or not len(well):
            continue
        above, below = _placements(score[ill], score[well])
        hits, passes = chosen[ill].astype(float), ~chosen[well] * 1.0
        # With one class per image, the mean recall of all classes; a class of several: sensitivity and specificity.
        recalls = [(ill, hits, 1.0)] if task == "classification" else [(ill, hits, 0.5), (well, passes, 0.5)]
        found[name] = {
            "balanced_accuracy": spread(sum(weight * values.mean() for _, values, weight in recalls), *recalls),
            "auroc": spread(float(above.mean()), (ill, above, 1.0), (well, below, 1.0)),
        }
    return found


def _placements(ill: np.ndarray, well: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each score the share of the other group on its right side, ties counted half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([ill, well]))
    above = (ranks[: len(ill)] - rankdata(ill)) / len(well)
    return above, 1 - (ranks[len(ill) :] - rankdata(well)) / len(ill)


def length_unit(reader: str, references: Sequence[Path]) -> str:
    """Return the unit of the tolerance: mm, or pixels and voxels if files have no spacing and it counts as 1."""
    if reader == "NaturalImage2DIO":
        return "pixels"
    if reader == "Tiff3DIO" and not any(list_companions(file, is_label=True) for file in references):
        return "voxels"
    return "mm"


def evaluate_cell(study: Study, folder: Path) -> None:
    """Score a cell's predictions of the test cases, and write ``result.json``."""
    scores = _score_table if study.dataset.task in IMAGE_TASKS else _score_masks
    result = {**scores(study, folder), "library": require_library(study.dataset.task)}
    if (folder / RESULT).is_file():  # scored again: keep the seconds of its steps
        result["seconds"] = read_json(folder / RESULT, "Remove it and run mfm_study again.").get("seconds", {})
    write_json(folder / RESULT, result)


def _score_table(study: Study, folder: Path) -> dict[str, Any]:
    file, names = folder / "masks" / "predictions.csv", list(study.test_cases)
    with open(file, newline="", encoding="utf-8") as handle:
        rows = {row["case"]: row for row in csv.DictReader(handle)}
    task, classes = study.dataset.task, study.dataset.classes or ("prediction",)
    predicted = np.array([[float(rows[name][column]) for column in classes] for name in names])
    targets = np.array([study.test_cases[name].targets for name in names], float)
    found = score_labels(task, classes, targets, predicted, [study.question.subjects[name] for name in names])
    scores = {
        name: {label: {metric: float(values[row]) for metric, values in of.items()} for label, of in found.items()}
        for row, name in enumerate(names)
    }
    return {"scores": scores, "in_reference": {name: list(found) for name in names}, "length_unit": "mm"}


def _score_masks(study: Study, folder: Path) -> dict[str, Any]:
    reader = str(read_json(folder / "masks" / "plans.json", "Run mfm_study again.").get("image_reader_writer"))
    labels, references = study.dataset.foreground, {name: Path(case.label) for name, case in study.test_cases.items()}
    scores, in_reference = {}, {}
    for name, file in references.items():
        reference, spacing = read_label_map(file, reader)
        predicted, _ = read_label_map(inside(folder, "masks", f"{name}{study.dataset.file_ending}"), reader)
        case = score_case(reference, predicted, spacing, labels, study.dataset.ignore, study.question.tolerance_mm)
        scores[name] = {
            label: {metric: None if value != value else value for metric, value in metrics.items()}
            for label, metrics in case.items()
        }
        in_reference[name] = [label for label, values in labels.items() if np.isin(reference, values).any()]
    unit = length_unit(reader, list(references.values()))
    return {"scores": scores, "in_reference": in_reference, "length_unit": unit}


if __name__ == "__main__":
    evaluate_cell(read_study(Path(sys.argv[1])), Path(sys.argv[2]))
