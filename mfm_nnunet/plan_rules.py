"""The rules of a plan: required keys, legal names, and limits of its numbers.

A plan names classes and functions of nnU-Net, folders and sizes, and is often downloaded. Stock nnU-Net imports any
class named there and builds any size. Here names come from a list, and impossible numbers are refused before anything
is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mfm_nnunet.files import MAX_DEPTH, is_name, is_nested_too_deep

INTENSITIES = "foreground_intensity_properties_per_channel"
PLAN_KEYS = (
    "dataset_name", "plans_name", "configurations", "image_reader_writer", "transpose_forward", "transpose_backward",
    INTENSITIES,
)  # fmt: skip
RESAMPLING_KEYS = tuple(f"resampling_fn_{part}" for part in ("data", "seg", "probabilities"))
CONFIGURATION_KEYS = (
    "data_identifier", "batch_size", "batch_dice", "patch_size", "spacing", "normalization_schemes",
    "use_mask_for_norm", *RESAMPLING_KEYS, *(f"{key}_kwargs" for key in RESAMPLING_KEYS),
)  # fmt: skip
ARCHITECTURE_KEYS = ("network_class_name", "arch_kwargs", "_kw_requires_import")
OLD_ARCHITECTURE_KEYS = (
    "UNet_base_num_features", "unet_max_num_features", "n_conv_per_stage_encoder", "n_conv_per_stage_decoder",
    "num_pool_per_axis", "pool_op_kernel_sizes", "conv_kernel_sizes",
)  # fmt: skip
"""Keys that the first versions of nnU-Net 2 wrote instead of ``architecture``."""
OLD_NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet")
READERS = (
    *("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"),
    *("Tiff3DIO", "NaturalImage2DIO"),
)
LABEL_MANAGERS = ("LabelManager",)
CT = "CTNormalization"
PERCENTILES = "PercentileNormalization"
"""Ours, which stock nnU-Net does not have: each image is clipped to its own percentiles, then scaled as a z-score."""
NNUNETS = (*("ZScoreNormalization", CT, "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"),)
NORMALISATIONS = (*NNUNETS, PERCENTILES)
NO_RESAMPLING = "no_resampling_hack"
"""nnU-Net's resampling function that returns its input unchanged."""
_SPLINE = ("is_seg", "force_separate_z", "separate_z_anisotropy_threshold")
RESAMPLING_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "resample_data_or_seg_to_shape": (*_SPLINE, "order", "order_z"),
    "resample_torch_fornnunet": (
        *_SPLINE, "num_threads", "device", "memefficient_seg_resampling", "mode", "aniso_axis_mode",
    ),
    NO_RESAMPLING: (),
}  # fmt: skip
"""nnU-Net's functions, and the arguments that a plan may set for each."""
SPACING_LIMITS_MM = (1e-3, 1e3)
MAX_EDGE, MAX_PATCH_VOXELS = 1 << 14, 1 << 30
"""Limits of voxels along a patch edge, and in a patch: the largest takes a few GB per channel."""
MAX_BATCH = 1 << 16
MAX_ARGUMENT, MAX_ARGUMENTS = 1 << 13, 1 << 10
"""Limits of numbers among network arguments (published ones have at most 1,728), and of the length of a list."""


def plan_problem(plans: Mapping[str, Any]) -> str:
    """Return the first missing or impossible value of a plan, as the end of a sentence; "" if there is none."""
    if lacking := [key for key in PLAN_KEYS if key not in plans]:
        return f"this plan has no '{lacking[0]}'"
    if is_nested_too_deep(plans):
        return f"it is nested more than {MAX_DEPTH} levels deep"
    return next(_problems(plans), "")


def network_problem(plans: Mapping[str, Any]) -> str:
    """Return what a valid plan lacks for building its networks, as the end of a sentence; "" if nothing.

    Plans in checkpoints of other programs may lack it: their networks are derived from the tensors.
    """
    for name in plans["configurations"]:
        resolved, _ = resolve_inheritance(plans["configurations"], name)
        architecture = resolved.get("architecture")
        if architecture is None and resolved["UNet_class_name"] not in OLD_NETWORKS:
            return f"configuration '{name}' names the unknown network {_shown(resolved['UNet_class_name'])}"
        is_whole = architecture is not None and "." not in str(
            architecture["network_class_name"]
        )  # one name for the whole network
        keys = OLD_ARCHITECTURE_KEYS if architecture is None else () if is_whole else ARCHITECTURE_KEYS
        lacking = [key for key in keys if (resolved if architecture is None else architecture).get(key) is None]
        if lacking:
            return f"configuration '{name}' has no '{lacking[0]}'"
    return ""


def _problems(plans: Mapping[str, Any]) -> Iterator[str]:
    configurations = plans["configurations"]
    if not isinstance(configurations, dict):
        yield "'configurations' is no table of names and configurations"
        return
    for key in ("dataset_name", "plans_name"):
        if not is_name(plans[key]):
            yield f"'{key}' is {_shown(plans[key])}, which can name no folder"
    yield from _unknown("image_reader_writer", plans["image_reader_writer"], READERS)
    if plans.get("label_manager") is not None:
        yield from _unknown("label_manager", plans["label_manager"], LABEL_MANAGERS)
    if not is_name(plans.get("experiment_planner_used") or "none"):
        yield f"'experiment_planner_used' is {_shown(plans['experiment_planner_used'])}, which is no name of a planner"
    yield from _axes_problems(plans["transpose_forward"], plans["transpose_backward"])
    if not isinstance(plans[INTENSITIES], dict):
        yield f"'{INTENSITIES}' is no table of channels"
        return
    rest = {key: value for key, value in plans.items() if key != INTENSITIES}
    if place := _place_of_nonfinite(rest):
        yield f"'{place}' is not finite"
    if isinstance(plans.get("mfm"), dict) and plans["mfm"].get("modalities") is not None:
        yield from _modality_problems(plans["mfm"].get("modalities"))
    for name in configurations:
        yield from (f"configuration {_shown(name)} {problem}" for problem in _configuration_problems(plans, name))


def _axes_problems(forward: Any, backward: Any) -> Iterator[str]:
    is_order = _is_row(forward) and all(type(axis) is int for axis in forward)
    if not is_order or sorted(forward) not in ([0, 1], [0, 1, 2]):
        yield f"'transpose_forward' is {_shown(forward)}, no order of the axes"
    elif not _is_row(backward) or [*backward] != [forward.index(axis) for axis in range(len(forward))]:
        yield f"'transpose_backward' is {_shown(backward)}, and not the way back of {forward}"


def _configuration_problems(plans: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield the faults of a configuration, each as the end of a sentence that starts with its name."""
    if not is_name(name):
        yield "has a name that can name no folder"
        return
    resolved, parent = resolve_inheritance(plans["configurations"], name)
    if parent is not None:
        yield f"inherits from {_shown(parent)}, which is no other configuration of this plan"
        return
    lacking = [key for key in CONFIGURATION_KEYS if key not in resolved]
    if lacking:
        yield f"has no '{lacking[0]}'"
        return
    yield from (f"has the {key} {_shown(resolved[key])}, {reason}" for key, reason in _wrong_values(resolved))
    yield from _normalisation_problems(resolved, plans[INTENSITIES])
    yield from _resampling_problems(resolved)
    yield from _architecture_problems(resolved, len(resolved["patch_size"]))


def resolve_inheritance(configurations: Mapping[str, Any], name: str) -> tuple[dict[str, Any], Any]:
    """Return a configuration with all inherited values, and the missing parent, if any."""
    resolved: dict[str, Any] = {}
    visited: list[str] = []
    place: Any = name
    while place is not None:
        own = configurations.get(place) if isinstance(place, str) else None
        if place in visited or not isinstance(own, dict):
            return resolved, place
        visited.append(place)
        resolved = {**own, **resolved}
        place = own.get("inherits_from")
    return resolved, None


def _wrong_values(resolved: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key of the first impossible value, and the reason."""
    patch, spacing, batch = resolved["patch_size"], resolved["spacing"], resolved["batch_size"]
    rules: list[tuple[str, Callable[[], bool], str]] = [
        ("patch_size", lambda: _are_sizes(patch) and len(patch) in (2, 3), "not two or three whole numbers"),
        (
            "patch_size", lambda: max(patch) <= MAX_EDGE and math.prod(patch) <= MAX_PATCH_VOXELS,
            f"and at most {MAX_EDGE} along an edge and {MAX_PATCH_VOXELS} voxels can be worked on",
        ),
        (
            "patch_size", lambda: not _is_row(spacing) or len(spacing) == len(patch),
            f"and the spacing {_shown(spacing)}, of another number of axes",
        ),
        ("batch_size", lambda: type(batch) is int and 1 <= batch <= MAX_BATCH, f"not from 1 to {MAX_BATCH}"),
        ("batch_dice", lambda: type(resolved["batch_dice"]) is bool, "neither true nor false"),
        ("data_identifier", lambda: is_name(resolved["data_identifier"]), "which can name no folder"),
        ("spacing", lambda: _is_spacing(spacing), "not a length from 0.001 to 1000 mm for each axis"),
        ("preprocessor_name", lambda: is_name(resolved.get("preprocessor_name", "none")), "no name of a class"),
        ("previous_stage", lambda: is_name(resolved.get("previous_stage") or "none"), "no name of a configuration"),
        ("next_stage", lambda: _are_stages(resolved.get("next_stage")), "no name of a configuration"),
    ]  # fmt: skip
    for key, holds, reason in rules:
        if not holds():
            yield key, reason
            return


def _is_row(value: Any) -> bool:
    """Return whether a value is a list; plans in checkpoints may hold tuples."""
    return isinstance(value, (list, tuple))


def _are_sizes(value: Any) -> bool:
    return _is_row(value) and all(type(size) is int and size > 0 for size in value)


def _is_spacing(spacing: Any) -> bool:
    """Return whether a value is a legal spacing; None, or None per axis, means images are not resampled."""
    low, high = SPACING_LIMITS_MM
    if spacing is None or (_is_row(spacing) and set(map(type, spacing)) == {type(None)}):
        return True
    are_numbers = _is_row(spacing) and all(type(mm) in (int, float) for mm in spacing)
    return are_numbers and all(low <= mm <= high for mm in spacing)


def _are_stages(value: Any) -> bool:
    return value is None or all(map(is_name, value if _is_row(value) else [value]))


def _normalisation_problems(resolved: Mapping[str, Any], intensities: Mapping[str, Any]) -> Iterator[str]:
    schemes, masks = resolved["normalization_schemes"], resolved["use_mask_for_norm"]
    if not _is_row(schemes) or not 0 < len(schemes) <= MAX_ARGUMENTS:
        yield f"has the normalization_schemes {_shown(schemes)}, no list with one for each channel"
        return
    for scheme in schemes:
        yield from (f"has {problem}" for problem in _unknown("normalization_schemes", scheme, NORMALISATIONS))
    if not _is_row(masks) or len(masks) != len(schemes) or not all(type(mask) is bool for mask in masks):
        yield f"has the use_mask_for_norm {_shown(masks)}, not true or false for each of {len(schemes)} channels"
    for channel, scheme in enumerate(schemes):
        known = intensities.get(str(channel))
        if scheme == CT and intensities and not _is_ct(known):
            yield f"normalises channel {channel} with {CT}, and '{INTENSITIES}' has no finite numbers for that"


def _modality_problems(table: Any) -> Iterator[str]:
    for kind, rule in table.items() if isinstance(table, dict) else [("", table)]:
        known = rule.get("intensities") if isinstance(rule, dict) else None
        if not isinstance(rule, dict) or rule.get("scheme") not in NORMALISATIONS:
            yield f"'mfm.modalities' has no normalisation that is known for '{kind}'"
        elif rule["scheme"] == CT and not (isinstance(known, dict) and known and all(map(_is_ct, known.values()))):
            yield f"'mfm.modalities' has no finite intensities for '{kind}'"


def _is_ct(known: Any) -> bool:
    """Return whether a channel has the intensities for clipping and scaling CT."""
    names = ("mean", "std", "percentile_00_5", "percentile_99_5")
    return isinstance(known, dict) and all(_is_finite(known.get(name)) for name in names)


def _resampling_problems(resolved: Mapping[str, Any]) -> Iterator[str]:
    for key in RESAMPLING_KEYS:
        function, arguments = resolved[key], resolved[f"{key}_kwargs"]
        if problem := next(_unknown(key, function, RESAMPLING_FUNCTIONS), ""):
            yield f"has {problem}"
        elif not isinstance(arguments, dict) or not set(arguments) <= set(RESAMPLING_FUNCTIONS[function]):
            yield f"has the {key}_kwargs {_shown(arguments)}, which are no arguments of {function}"
        elif wrong := [name for name, value in arguments.items() if not _is_argument(name, value)]:
            yield f"has the {key}_kwargs {wrong[0]} = {_shown(arguments[wrong[0]])}, which cannot be"


def _is_argument(name: str, value: Any) -> bool:
    if name in ("order", "order_z"):
        return type(value) is int and 0 <= value <= 5
    if name == "num_threads":
        return type(value) is int and 1 <= value <= MAX_ARGUMENT
    if name == "separate_z_anisotropy_threshold":
        return _is_finite(value) and value > 0
    if name in ("device", "mode", "aniso_axis_mode"):
        return isinstance(value, str)
    return type(value) is bool or (name == "force_separate_z" and value is None)


def _architecture_problems(resolved: Mapping[str, Any], num_axes: int) -> Iterator[str]:
    architecture = resolved.get("architecture")
    if architecture is None:
        if "UNet_class_name" not in resolved:  # written by older versions of nnU-Net
            yield "has no 'architecture'"
        named: Any = {key: resolved[key] for key in OLD_ARCHITECTURE_KEYS if key in resolved}
    else:
        parts = architecture if isinstance(architecture, dict) else {}
        if lacking := [f"architecture.{key}" for key in ARCHITECTURE_KEYS if key not in parts]:
            yield f"has no '{lacking[0]}'"
            return
        named, to_import = parts["arch_kwargs"] or {}, parts["_kw_requires_import"] or ()
        if not isinstance(named, dict):
            yield f"has the architecture.arch_kwargs {_shown(named)}, no table of arguments"
            return
        if not _is_row(to_import) or not all(isinstance(name, str) for name in to_import):
            yield f"has the architecture._kw_requires_import {_shown(to_import)}, no list of names"
    for name, value in named.items():
        if not _is_small(value):
            yield f"has the argument {name} = {_shown(value)}, and a network has numbers up to {MAX_ARGUMENT}"
    yield from _stride_problems(named, num_axes)


def _is_small(value: Any) -> bool:
    """Return whether all numbers of an argument, including nested ones, are of a possible size."""
    if isinstance(value, dict):
        return all(map(_is_small, value.values()))
    if _is_row(value):
        return len(value) <= MAX_ARGUMENTS and all(map(_is_small, value))
    return type(value) not in (int, float) or (_is_finite(value) and abs(value) <= MAX_ARGUMENT)


def _stride_problems(arguments: Mapping[str, Any], num_axes: int) -> Iterator[str]:
    """Yield arguments that divide the patch but are not whole numbers, one for each axis."""
    rows_per_stage = ("strides", "pool_op_kernel_sizes", "merging")
    for name in (*rows_per_stage, "patch_embed_size", "input_shape", "stem", "window"):
        value = arguments.get(name)
        if value is None:
            continue
        rows = value if name in rows_per_stage else [value]
        if _is_row(rows):
            rows = [[row] * num_axes if type(row) is int else row for row in rows]
        if not _is_row(rows) or not all(_are_sizes(row) and len(row) == num_axes for row in rows):
            yield f"has the argument {name} = {_shown(value)}, not whole numbers for {num_axes} axes"


def _unknown(key: str, value: Any, known: Mapping[str, Any] | tuple[str, ...]) -> Iterator[str]:
    if not isinstance(value, str) or value not in known:
        yield f"'{key}' {_shown(value)}, which is none of nnU-Net's: {', '.join(known)}"


def _place_of_nonfinite(value: Any, place: str = "") -> str:
    """Return the dotted name of a NaN or infinite number; "" if there is none."""
    if isinstance(value, dict):
        names = ((item, f"{place}.{key}" if place else str(key)) for key, item in value.items())
    elif _is_row(value):
        names = ((item, place) for item in value)
    else:
        return place if isinstance(value, float) and not math.isfinite(value) else ""
    return next((found for item, name in names if (found := _place_of_nonfinite(item, name))), "")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
