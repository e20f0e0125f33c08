"""JSON files that people edit and that disks damage: an error names the file, what is wrong in it and what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import MAX_DEPTH, is_nested_too_deep
from mfm_nnunet.plan_rules import ARCHITECTURE_KEYS, NO_RESAMPLING, PLAN_KEYS, network_problem, plan_problem

__all__ = ["ARCHITECTURE_KEYS", "NO_RESAMPLING", "parse_json", "plan_problem", "read_json", "read_plans"]

SHARED_KEYS = (
    *PLAN_KEYS, "original_median_spacing_after_transp", "original_median_shape_after_transp",
    "experiment_planner_used", "label_manager", "mfm",
)  # fmt: skip
"""Keys of a plan that leave this computer with a checkpoint."""
PREPROCESSOR = "DefaultPreprocessor"
"""nnU-Net's class whose work we do; older plans do not name one."""


def parse_json(content: bytes | str) -> Any:
    """Return the value that JSON text holds: the only way in which this package reads JSON of files.

    A byte order mark is skipped, which editors on Windows write. Raises ValueError for anything that is no JSON, also
    for what is nested too deep to be worked on.
    """
    text = content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from error
    if is_nested_too_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def read_json(file: Path, advice: str, code: str = "E_FORMAT") -> dict[str, Any]:
    """The JSON object in ``file``; ``advice``, a sentence, ends the messages.

    Raises MFMError: E_NOT_FOUND, or ``code`` when the file cannot be read or holds something else.
    """
    try:
        content = parse_json(file.read_bytes())
    except FileNotFoundError as error:
        raise MFMError("E_NOT_FOUND", f"{file}: no such file. {advice}") from error
    except ValueError as error:
        raise MFMError(code, f"{file}: cannot be read as JSON ({error}). {advice}") from error
    if not isinstance(content, dict):
        raise MFMError(code, f"{file}: expected a JSON object, a table of names and values. {advice}")
    return content


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
