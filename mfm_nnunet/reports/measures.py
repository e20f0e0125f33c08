"""Measure masks: volumes, Dice against a reference, and signs in plain words that a mask needs a second look."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mfm_nnunet.reports.html import format_number
from mfm_nnunet.reports.views import OrientedImage

FENCE = 2.0
"""A volume is an outlier if its logarithm is this many interquartile ranges beyond the quartiles of the training set.

Of normally distributed logarithms this holds for 7 in 10,000.
"""
FEWEST_CASES = 8
"""Fewer training masks than this with a label define no usual volume."""
ALWAYS = 0.95
"""A label in at least this share of the training masks is expected in every case."""
RARELY = 0.05
"""A label at the border of at most this share of the training masks is expected to lie inside of every image."""
LOW_AGREEMENT = 0.7
"""Dice between the folds of a model, below which a label is flagged."""
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Measured:
    """Measures of one mask, by name of the label; volumes are in ``unit``."""

    unit: str
    volumes: Mapping[str, float]
    touching: Sequence[str]
    """Labels in the outermost voxels of the image."""
    dice: Mapping[str, float] = field(default_factory=dict)
    """Empty without a reference; NaN for a label in neither."""

    @property
    def mean_dice(self) -> float:
        """Mean over the labels that mask or reference have; NaN if there is none."""
        scores = [score for score in self.dice.values() if not math.isnan(score)]
        return sum(scores) / len(scores) if scores else math.nan


def measure(
    mask: OrientedImage,
    labels: Mapping[str, tuple[int, ...]],
    reference: np.ndarray | None = None,
    ignore: int | None = None,
) -> Measured:
    """Measure a mask, and compare it with ``reference`` where that is not ``ignore``."""
    voxels = mask.voxels
    counts = _count_pairs(voxels, reference)
    of_mask = counts.sum(0)
    faces = np.unique(
        np.concatenate([voxels.take(end, axis).ravel() for axis in range(voxels.ndim) for end in (0, -1)])
    )
    at_border = set(faces.tolist())
    dice = {}
    if reference is not None:
        if ignore is not None and ignore < len(counts):
            counts[ignore] = 0
        dice = {
            name: _dice(counts, [value for value in values if value < len(counts)]) for name, values in labels.items()
        }
    known = range(len(of_mask))
    return Measured(
        mask.unit,
        {
            name: float(sum(of_mask[v] for v in values if v in known)) * mask.voxel_size
            for name, values in labels.items()
        },
        [name for name, values in labels.items() if at_border & set(values)],
        dice,
    )


def _count_pairs(mask: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """Count the voxels of each pair (reference, mask) of values, plane by plane; one row without a reference."""
    size = int(max(mask.max(), 0 if reference is None else reference.max())) + 1
    rows = 1 if reference is None else size
    counts = np.zeros(rows * size, np.int64)
    planes = mask if mask.ndim == 3 else mask[None]
    others: Iterable[Any] = [None] * len(planes)
    if reference is not None:
        others = reference if reference.ndim == 3 else reference[None]
    for plane, other in zip(planes, others):
        pairs = plane.ravel() if other is None else other.ravel().astype(np.intp) * size + plane.ravel()
        counts += np.bincount(pairs, minlength=rows * size)
    return counts.reshape(rows, size)


def _dice(counts: np.ndarray, values: Sequence[int]) -> float:
    both, either = counts[np.ix_(values, values)].sum(), counts[values].sum() + counts[:, values].sum()
    return float(2 * both / either) if either else math.nan


def summarise_volumes(measured: Sequence[Measured]) -> dict[str, Any]:
    """Summarise training masks without names of cases, as JSON values by label: how many masks have it, in how many it
    touches the border, and the quartiles and range of its volume.
    """
    labels = {}
    for name in measured[0].volumes if measured else ():
        found = np.array([one.volumes[name] for one in measured if one.volumes[name] > 0])
        values = np.quantile(found, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(found) else []
        num_touching = sum(name in one.touching for one in measured)
        labels[name] = {"num_cases": len(found), "num_touching": num_touching, "quartiles": values}
    return {"unit": measured[0].unit if measured else "", "num_cases": len(measured), "labels": labels}


def usual_range(name: str, training: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the limits of usual volumes of a label; None if too few training masks have it."""
    known = training.get("labels", {}).get(name, {})
    if known.get("num_cases", 0) < FEWEST_CASES:
        return None
    low, high = math.log(known["quartiles"][1]), math.log(known["quartiles"][3])
    margin = FENCE * (high - low)
    return math.exp(low - margin), math.exp(high + margin)


def find_flags(
    measured: Measured, training: Mapping[str, Any], agreement: Mapping[str, float] | None = None
) -> list[str]:
    """List in plain words what is unusual about a mask. ``training`` is from :func:`summarise_volumes`, or empty."""
    if not any(measured.volumes.values()):
        return ["empty: no label was found"]
    flags = []
    if training.get("unit") == measured.unit:
        flags += _find_outliers(measured, training)
    if cut := [name for name in measured.touching if _is_usually_inside(name, training)]:
        flags.append(f"touches the border of the image, so a part may be missing: {_first_names(cut)}")
    if low := [f"{name} (Dice {dice:.2f})" for name, dice in (agreement or {}).items() if dice < LOW_AGREEMENT]:
        flags.append(f"the folds disagree: {_first_names(low)}")
    return flags


def _is_usually_inside(name: str, training: Mapping[str, Any]) -> bool:
    """Check if enough training masks have a label, and nearly all inside of the image. Older models do not know."""
    known = training.get("labels", {}).get(name, {})
    num_cases = known.get("num_cases", 0)
    return num_cases >= FEWEST_CASES and known.get("num_touching", num_cases) <= RARELY * num_cases


def _find_outliers(measured: Measured, training: Mapping[str, Any]) -> list[str]:
    missing, small, large = [], [], []
    for name, volume in measured.volumes.items():
        known, usual = training["labels"].get(name, {}), usual_range(name, training)
        if not volume:
            is_expected = known.get("num_cases", 0) >= max(FEWEST_CASES, ALWAYS * training["num_cases"])
            missing += [name] * is_expected
        elif usual and volume < usual[0]:
            small.append(f"{name} ({format_number(volume)}, usually from {format_number(usual[0])} {measured.unit})")
        elif usual and volume > usual[1]:
            large.append(f"{name} ({format_number(volume)}, usually up to {format_number(usual[1])} {measured.unit})")
    found = (("not found, though the training set nearly always has it", missing), ("unusually small", small),
             ("unusually large", large))  # fmt: skip
    return [f"{text}: {_first_names(names)}" for text, names in found if names]


def _first_names(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
