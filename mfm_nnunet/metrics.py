"""The Dice coefficient, with what happens to absent labels stated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mfm_nnunet.dataset import DatasetJson


def dice(reference: np.ndarray, predicted: np.ndarray, values: tuple[int, ...], ignore: int | None = None) -> float:
    """Dice of one label, the voxels whose value is in ``values``.

    Voxels with the reference value ``ignore`` do not count. A label that is in neither array has no Dice: NaN, which
    means leave out. One that is in only one of them has 0.
    """
    is_counted = np.ones(reference.shape, bool) if ignore is None else reference != ignore
    is_reference = np.isin(reference, values) & is_counted
    is_predicted = np.isin(predicted, values) & is_counted
    num_voxels = int(is_reference.sum()) + int(is_predicted.sum())
    return 2 * int((is_reference & is_predicted).sum()) / num_voxels if num_voxels else float("nan")


def mean_dice(values: list[float]) -> float:
    """Mean of the Dice values that exist; NaN when none does."""
    existing = [value for value in values if value == value]
    return sum(existing) / len(existing) if existing else float("nan")


def foreground_labels(dataset_json: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Label names and their values from a dataset.json; regions have several; without background and ignore."""
    return DatasetJson.of(dataset_json).foreground


def ignore_label(dataset_json: Mapping[str, Any]) -> int | None:
    """The value of the label ``ignore``, if there is one."""
    return DatasetJson.of(dataset_json).ignore
