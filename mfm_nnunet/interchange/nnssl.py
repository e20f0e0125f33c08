"""Parse the adaptation plan in checkpoints of nnssl and OpenMind (arXiv 2412.17041).

Files differ: sequences are lists, tuples or tensors, fields are missing, the configuration has one of four names, and
SparK trainers write no plan at all. Missing values become None or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mfm_nnunet.errors import MFMError

KEY = "nnssl_adaptation_plan"
TASKS = (
    ("simmim", "simmim"), ("spark", "spark3d"), ("s3d", "spark3d"), ("volumefusion", "volume_fusion"),
    ("genesis", "models_genesis"), ("simclr", "simclr"), ("voco", "voco"), ("swinunetr", "swin_unetr"), ("mae", "mae"),
)  # fmt: skip
"""Substrings of trainer names, in lower case without underscores, and their pretext tasks."""

TRAINED_WITH = ("spacing", "normalization_schemes", "use_mask_for_norm", "patch_size")
"""Fields of a configuration that describe the preprocessing and the patch."""


@dataclass(frozen=True)
class AdaptationPlan:
    """Values of an adaptation plan, in voxels and mm in the plan's axis order.

    ``patch_size`` was used in pretraining, ``recommended_patch`` is for fine-tuning. ``spacing`` is None if images were
    not resampled or the spacing is unknown; ``is_resampled`` distinguishes the two.
    """

    class_name: str | None = None
    arch_kwargs: dict[str, Any] = field(default_factory=dict)
    num_inputs: int | None = None
    patch_size: tuple[int, ...] | None = None
    recommended_patch: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    is_resampled: bool = True
    normalization: tuple[str, ...] = ()
    use_mask_for_norm: tuple[bool, ...] = ()
    transpose_forward: tuple[int, ...] | None = None
    key_to_encoder: str | None = None
    key_to_stem: str | None = None


def read_plan(raw: Mapping[str, Any], trained_with: Mapping[str, Any] | None = None) -> AdaptationPlan:
    """Parse an adaptation plan; missing preprocessing fields and patch are taken from ``trained_with``.

    ``trained_with`` is the result of :func:`plan_of_training`.
    """
    if not isinstance(raw, Mapping):
        raise _wrong(KEY, raw)
    architecture = _table(raw, "architecture_plans")
    pretrain = {**(trained_with or {}), **_table(raw, "pretrain_plan")}
    configuration = {**_first_configuration(trained_with or {}), **_first_configuration(pretrain)}
    if plain(configuration.get("spacing")) in ([None] * 2, [None] * 3):  # None for each axis means None
        configuration = {**configuration, "spacing": None}
    order = _row(pretrain, "transpose_forward", int)
    if order is not None and sorted(order) != list(range(len(order))):
        raise _wrong("transpose_forward", order)
    return AdaptationPlan(
        class_name=_read(architecture, "arch_class_name", str),
        arch_kwargs={key: plain(value) for key, value in _table(architecture, "arch_kwargs").items()},
        num_inputs=_read_number(raw, "pretrain_num_input_channels"),
        # Prefer the newer field: contrastive tasks train on crops, but older files store the corpus' patch.
        patch_size=_row(raw, "pretrain_patch_size", int) or _row(configuration, "patch_size", int),
        recommended_patch=_row(raw, "recommended_downstream_patchsize", int),
        spacing=_row(configuration, "spacing", float),
        is_resampled="spacing" not in configuration or configuration["spacing"] is not None,
        normalization=_row(configuration, "normalization_schemes", str) or (),
        use_mask_for_norm=_row(configuration, "use_mask_for_norm", bool) or (),
        transpose_forward=order,
        key_to_encoder=_read(raw, "key_to_encoder", str),
        key_to_stem=_read(raw, "key_to_stem", str),
    )


def plan_of_training(init_args: Any) -> dict[str, Any]:
    """Extract a ``pretrain_plan`` from the arguments of an nnssl trainer; empty if they hold none.

    SparK trainers write no adaptation plan. But all trainers store the plan they were started with, beside the index of
    the corpus (subjects, ages, paths). So only the fields of :data:`TRAINED_WITH` are copied.
    """
    plan = init_args.get("plan") if isinstance(init_args, Mapping) else None
    configurations = plan.get("configurations") if isinstance(plan, Mapping) else None
    if not isinstance(plan, Mapping) or not isinstance(configurations, Mapping):
        return {}
    name = init_args.get("configuration_name")
    configuration = configurations.get(name) if isinstance(name, str) else None
    if not isinstance(configuration, Mapping):
        return {}
    taken = {key: configuration[key] for key in TRAINED_WITH if key in configuration}
    axes = {"transpose_forward": plan["transpose_forward"]} if "transpose_forward" in plan else {}
    return {**axes, "configurations": {name: taken}}


def task_of(trainer: str | None) -> str | None:
    """Return the pretext task of an nnssl trainer by its name; None if unknown."""
    words = (trainer or "").replace("_", "").lower()
    return next((task for word, task in TASKS if word in words), None)


def token_order_of(trainer: str | None) -> str | None:
    """Return the token order of an nnssl Primus trainer: ``whd`` or ``hwd``; None for an unknown trainer.

    Only its SimMIM module flattens axis 0 outermost; all other Primus modules flatten axis 1 outermost.
    """
    task = task_of(trainer)
    return None if task is None else "whd" if task == "simmim" else "hwd"


def plain(value: Any) -> Any:
    """Convert tuples and tensors to lists and numbers, recursively."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _first_configuration(pretrain: Mapping[str, Any]) -> Mapping[str, Any]:
    configurations = _table(pretrain, "configurations")
    return _table(configurations, next(iter(configurations), ""))


def _table(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] | None = _read(values, name, Mapping)
    return found or {}


def _read(values: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    """Return a value of the right type, None if it is missing."""
    found = values.get(name)
    if found is not None and (not isinstance(found, kind) or isinstance(found, bool)):
        raise _wrong(name, found)
    return found


def _read_number(values: Mapping[str, Any], name: str) -> int | None:
    found = _read({name: plain(values.get(name))}, name, (int, float))
    if found is not None and not abs(found) < 1 << 31:
        raise _wrong(name, found)
    return None if found is None else int(found)


def _row(values: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...] | None:
    found = plain(values.get(name))
    if found is None:
        return None
    try:
        return tuple(kind(item) for item in found)
    except (TypeError, ValueError, OverflowError) as error:
        raise _wrong(name, found) from error


def _wrong(name: str, value: Any) -> MFMError:
    return MFMError(
        "E_MODEL_CORRUPT", f"its {KEY} has {name} = {str(value)[:60]!r}, which is not possible. Copy it again."
    )
