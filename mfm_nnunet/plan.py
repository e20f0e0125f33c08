"""Plans as files hold them: read, resolved and refused with the file's name, what is wrong in it and what to do."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import read_json
from mfm_nnunet.plan_rules import ARCHITECTURE_KEYS, NO_RESAMPLING, PLAN_KEYS, network_problem, plan_problem

__all__ = ["ARCHITECTURE_KEYS", "NO_RESAMPLING", "plan_problem", "read_plans"]

SHARED_KEYS = (
    *PLAN_KEYS, "original_median_spacing_after_transp", "original_median_shape_after_transp",
    "experiment_planner_used", "label_manager", "mfm",
)  # fmt: skip
"""Keys of a plan that leave this computer with a checkpoint."""
PREPROCESSOR = "DefaultPreprocessor"
"""nnU-Net's class whose work we do; older plans do not name one."""


def read_plans(file: Path, advice: str, code: str = "E_FORMAT") -> dict[str, Any]:
    """A plans file, ours or stock nnU-Net's, that holds everything that training and prediction look up in it.

    Raises MFMError as :func:`read_json` does, with ``code`` also when something is missing or of another kind.
    """
    plans = read_json(file, advice, code)
    if problem := plan_problem(plans) or network_problem(plans):
        raise MFMError(code, f"{file}: {problem}. {advice}")
    return plans


def resolved(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration of a plan with what it inherits, as a new dict."""
    own = plans["configurations"][configuration]
    parent = resolved(plans, own["inherits_from"]) if "inherits_from" in own else {}
    return copy.deepcopy({**parent, **own})


def is_resampled(configuration: Mapping[str, Any]) -> bool:
    """Whether images are brought to one spacing; plans of others may name none, or none for each axis."""
    spacing = configuration.get("spacing")
    return configuration.get("resampling_fn_data") != NO_RESAMPLING and spacing is not None and None not in spacing


def preprocessor_problem(plans: Mapping[str, Any], configuration: str) -> str:
    """Why our preprocessing is not that of the plan, as a sentence; "" if it is."""
    named = resolved(plans, configuration).get("preprocessor_name", PREPROCESSOR)
    if named == PREPROCESSOR:
        return ""
    return (
        f"configuration '{configuration}' names the preprocessor '{named}', and only {PREPROCESSOR} is available here: "
        "what another one does to the images would be left out."
    )


def shared_plan(plans: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as checkpoints hold it: planners of others add keys of their own, such as the path of a checkpoint."""
    return {key: plans[key] for key in plans if key in SHARED_KEYS}
