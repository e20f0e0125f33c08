"""Planning of a union of datasets: how far the spacing of each may be from that of the plan."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mfm_nnunet.data.class_table import key_of
from mfm_nnunet.errors import MFMError
from mfm_nnunet.plan import Plan
from mfm_nnunet.planning.derive import times

MOST, REPORTED = 4.0, 2.0
"""Factors between the spacing of a dataset and that of the plan that are refused, and that are reported."""
logger = logging.getLogger(__name__)


def require_spacings(union: Mapping[str, Any], fingerprint: Mapping[str, Any], plan: Plan) -> None:
    """Report datasets whose median spacing is far from the plan's. Raises MFMError (E_SPACING) beyond a factor of 4."""
    axes = plan.content["transpose_forward"]
    groups: dict[str, list[list[float]]] = {}
    for case, spacing in zip(fingerprint["mfm"]["case_names"], fingerprint["spacings"]):
        groups.setdefault(key_of(case), []).append([spacing[axis] for axis in axes])
    for name in plan.configuration_names:
        target = plan.configuration(name).spacing
        if target is None or not plan.configuration(name).is_resampled:
            continue
        own = {key: np.median(found, 0)[-len(target) :] for key, found in groups.items()}
        factors = {key: max(np.maximum(mm / target, target / mm)) for key, mm in own.items()}
        for key, factor in factors.items():
            dataset, mm = union["datasets"][key]["name"], own[key].round(3).tolist()
            text = f"{dataset}: {times(mm)} mm, and {times(target)} mm in {name}"
            if factor > MOST:
                middle = np.sqrt(np.min([*own.values()], 0) * np.max([*own.values()], 0))
                raise MFMError(
                    "E_SPACING",
                    f"{text}: a factor of {factor:.1f}, and at most {MOST:g} is useful. Train this dataset by itself, "
                    f"or plan between: --spacing {_between(middle, axes)}",
                )
            if factor > REPORTED:
                logger.warning("%s: it is resampled by a factor of %.1f", text, factor)


def _between(spacing: np.ndarray, axes: list[int]) -> str:
    """Return a spacing as ``--spacing`` takes it, which is before transposing; 1 for the axis of slices."""
    whole = [*np.ones(3 - len(spacing)), *spacing]
    return " ".join(f"{whole[axes.index(axis)]:.3g}" for axis in range(3))
