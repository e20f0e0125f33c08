"""Whether the plans.json, the dataset.json and the folds of a model folder are of one model.

Weights fit many plans of one network: with the spacing, the normalisation or the label table of another, masks come
out that look plausible and are wrong. Checkpoints hold the plan and the dataset.json that they were trained with, so
that is noticed. Compared is only what decides a prediction; a batch size, for example, may be another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfm_nnunet.checkpoint import to_plain
from mfm_nnunet.data.preprocess import NORMALISED_BY_CASE
from mfm_nnunet.dataset import channel_numbers
from mfm_nnunet.plan import plan_problem, resolved

_OF_CONFIGURATION = (
    "spacing", "patch_size", "normalization_schemes", "use_mask_for_norm", "previous_stage",
    *(f"resampling_fn_{part}" for part in ("data", "seg")),
    *(f"resampling_fn_{part}_kwargs" for part in ("data", "seg")),
)  # fmt: skip
"""Not how probabilities are brought back to the image: people set a faster way there, in a model that is theirs."""


def differences(
    init_args: Mapping[str, Any], plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> list[str]:
    """Names of what decides a prediction and is not the same in a checkpoint's ``init_args`` and in its model folder.

    What a checkpoint does not hold, or not whole, is not compared.
    """
    found = []
    own = init_args.get("plans")
    if isinstance(own, Mapping) and not plan_problem(own) and configuration in own["configurations"]:
        found += _unequal(_of_plan(own, configuration), _of_plan(plans, configuration))
    own = init_args.get("dataset_json")
    if isinstance(own, Mapping) and isinstance(own.get("labels"), Mapping):
        found += _unequal(_of_dataset(own), _of_dataset(dataset_json))
    return found


def _of_plan(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    settings = resolved(plans, configuration)
    of_configuration = {name: settings.get(name) for name in _OF_CONFIGURATION}
    from_dataset = set(settings["normalization_schemes"]) - NORMALISED_BY_CASE
    name = "foreground_intensity_properties_per_channel"
    intensities = {name: plans[name]} if from_dataset else {}
    return {**of_configuration, "transpose_forward": plans["transpose_forward"], **intensities}


def _of_dataset(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    labels, order = dataset_json["labels"], dataset_json.get("regions_class_order")
    return {
        "labels": labels if order is None else list(labels.items()),  # the order of regions is that of the outputs
        "regions_class_order": order,
        "channel_names": _channels(dataset_json.get("channel_names") or dataset_json.get("modality")),
    }


def _channels(names: Any) -> Any:
    """The channels by number, however a file writes it."""
    numbers = channel_numbers(names) if isinstance(names, Mapping) else None
    return names if numbers is None else {number: names[name] for number, name in numbers.items()}


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in one if _comparable(one[name]) != _comparable(other[name])]


def _comparable(value: Any) -> Any:
    """``value`` as JSON has it: keys are text, sequences lists, 1 is 1.0, and NaN is itself."""
    value = to_plain(value)
    if isinstance(value, dict):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item) for item in value]
    return str(float(value)) if type(value) in (int, float) else value
