"""Dice and normalised surface distance (NSD) of predicted masks.

Tools for surface metrics differ by tens of points on equal masks. So one library is used, DeepMind's
``surface-distance``, and every result records its name and version. NSD is its surface Dice: the share of both
surfaces, by area, within the tolerance of the other one. A label in neither reference nor prediction has no score
(NaN); a label in only one of them scores 0. Each result also lists the labels in each reference: means are over these
alone, and predictions of other labels are false positives.

``python -m mfm_nnunet.study.evaluation STUDY CELL`` scores one cell of a study; each runs in its own process.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, read_json, write_json
from mfm_nnunet.jobs.preflight import list_companions, read_label_map
from mfm_nnunet.metrics import dice
from mfm_nnunet.study.folder import Study, read_study

LIBRARY = "surface-distance"
METRICS = ("dice", "nsd")
RESULT = "result.json"
"""Written last, so its presence marks a finished cell."""


def require_library() -> dict[str, str]:
    """Return name and version of the library for surface metrics, or refuse to run without it."""
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


def length_unit(reader: str, references: Sequence[Path]) -> str:
    """Return the unit of the tolerance: mm, or pixels and voxels if files have no spacing and it counts as 1."""
    if reader == "NaturalImage2DIO":
        return "pixels"
    if reader == "Tiff3DIO" and not any(list_companions(file, is_label=True) for file in references):
        return "voxels"
    return "mm"


def evaluate_cell(study: Study, folder: Path) -> None:
    """Score the masks in a cell's folder against the references of the test cases, and write ``result.json``."""
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
    result: dict[str, Any] = {
        "scores": scores,
        "in_reference": in_reference,
        "library": require_library(),
        "length_unit": length_unit(reader, list(references.values())),
    }
    if (folder / RESULT).is_file():  # scored again: keep the seconds of its steps
        result["seconds"] = read_json(folder / RESULT, "Remove it and run mfm_study again.").get("seconds", {})
    write_json(folder / RESULT, result)


if __name__ == "__main__":
    evaluate_cell(read_study(Path(sys.argv[1])), Path(sys.argv[2]))
