"""The Dice coefficient, with a defined value for absent labels."""

from __future__ import annotations

import numpy as np


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
