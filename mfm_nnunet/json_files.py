"""JSON files that people edit and that disks damage: an error names the file, what is wrong in it and what to do."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError

PLAN_KEYS = (
    "dataset_name", "plans_name", "configurations", "image_reader_writer", "transpose_forward", "transpose_backward",
    "foreground_intensity_properties_per_channel",
)  # fmt: skip
SHARED_KEYS = (
    *PLAN_KEYS, "original_median_spacing_after_transp", "original_median_shape_after_transp",
    "experiment_planner_used", "label_manager", "mfm",
)  # fmt: skip
"""Keys of a plan that leave this computer with a checkpoint."""
CONFIGURATION_KEYS = (
    "data_identifier", "batch_size", "batch_dice", "patch_size", "spacing", "normalization_schemes",
    "use_mask_for_norm", *(f"resampling_fn_{part}" for part in ("data", "seg", "probabilities")),
    *(f"resampling_fn_{part}_kwargs" for part in ("data", "seg", "probabilities")),
)  # fmt: skip
ARCHITECTURE_KEYS = ("network_class_name", "arch_kwargs", "_kw_requires_import")
PREPROCESSOR = "DefaultPreprocessor"
"""nnU-Net's class whose work we do; older plans do not name one."""
NO_RESAMPLING = "no_resampling_hack"
"""nnU-Net's resampling function that returns its input as it is."""


def read_json(file: Path, advice: str, code: str = "E_FORMAT") -> dict[str, Any]:
    """The JSON object in ``file``; ``advice``, a sentence, ends the messages.

    Raises MFMError: E_NOT_FOUND, or ``code`` when the file cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
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
    if problem := plan_problem(plans):
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


def plan_problem(plans: Mapping[str, Any]) -> str:
    """What is missing in a plan, as the end of a sentence; "" if nothing is."""
    if lacking := [key for key in PLAN_KEYS if key not in plans]:
        return f"this plan has no '{lacking[0]}'"
    configurations = plans["configurations"]
    if not isinstance(configurations, dict):
        return "'configurations' is no table of names and configurations"
    problems = (_configuration_problem(configurations, name) for name in configurations)
    return next((problem for problem in problems if problem), "")


def _configuration_problem(configurations: Mapping[str, Any], name: str) -> str:
    resolved: dict[str, Any] = {}
    visited: list[str] = []
    place: str | None = name
    while place is not None:
        own = configurations.get(place)
        if place in visited or not isinstance(own, dict):
            return f"configuration '{name}' inherits from '{place}', which is no other configuration of this plan"
        visited.append(place)
        resolved = {**own, **resolved}
        place = own.get("inherits_from")
    lacking = [key for key in CONFIGURATION_KEYS if key not in resolved]
    architecture = resolved.get("architecture")
    if architecture is None and "UNet_class_name" not in resolved:  # the second is how older nnU-Nets wrote it
        lacking.append("architecture")
    elif architecture is not None:
        named = architecture if isinstance(architecture, dict) else {}
        lacking += [f"architecture.{key}" for key in ARCHITECTURE_KEYS if key not in named]
    if lacking:
        return f"configuration '{name}' has no '{lacking[0]}'"
    patch = resolved["patch_size"]
    is_patch = isinstance(patch, list) and all(type(size) is int and size > 0 for size in patch)
    if not is_patch or len(patch) not in (2, 3):
        return f"configuration '{name}' has the patch_size {patch}, not two or three whole numbers"
    return ""
