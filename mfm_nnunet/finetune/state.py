"""Content of a fine-tuning checkpoint: nnU-Net's layout, tensors and plain values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mfm_nnunet.checkpoint import cpu_weights
from mfm_nnunet.engine.engine import Optimisation
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.lora import merged_state
from mfm_nnunet.settings import FinetuneSettings


def ships_other_weights(settings: FinetuneSettings) -> bool:
    """Check if the validated and shipped weights differ from those the optimizer steps."""
    return settings.ema_decay is not None or settings.train == "lora"


def needs_names(settings: FinetuneSettings) -> bool:
    """Check if resuming requires the names of the weights that came from the checkpoint."""
    return settings.schedule == "sawtooth" or settings.train != "all"


def collect_weights(
    network: nn.Module, how: Optimisation, settings: FinetuneSettings
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights to ship, plus the trained weights and averages if training uses others.

    ``network`` is unwrapped. A tensor in several of them is stored once in the file.
    """
    with how.averaged():
        states = {"network_weights": merged_state(network)}
    if ships_other_weights(settings):
        states["trained_weights"] = network.state_dict()
    if how.average is not None:
        states["averaged_weights"] = how.average.state_dict()
    flat = cpu_weights({f"{part}/{name}": tensor for part, state in states.items() for name, tensor in state.items()})
    return {part: {name: flat[f"{part}/{name}"] for name in state} for part, state in states.items()}


def require_state(content: Mapping[str, Any], settings: FinetuneSettings, folder: str) -> None:
    """Raise MFMError (E_MODEL_CORRUPT) unless a checkpoint contains the whole state of a run with these settings."""
    wanted = {"network_weights", "optimizer_state", "logging", "_best_ema", "current_epoch", "init_args"}
    wanted |= {"trained_weights"} if ships_other_weights(settings) else set()
    wanted |= {"averaged_weights"} if settings.ema_decay is not None else set()
    missing = wanted - set(content)
    names = names_of_new(content)
    if names is None and settings.checkpoint is not None and needs_names(settings):
        missing.add("mfm.new_weights")
    reason = f"{', '.join(sorted(missing))} missing" if missing else ""
    if not missing and (wrong := _find_wrong_part(content, names)):
        reason = f"{wrong} is damaged"
    if reason:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"a checkpoint in {folder} does not belong to this run: {reason}. Copy it again, or move the folder away "
            "and train again.",
        )


def names_of_new(content: Mapping[str, Any]) -> Any:
    """Return the names of the parameters that learn first, as listed in a checkpoint; None from scratch."""
    ours = content.get("mfm")
    return ours.get("new_weights") if isinstance(ours, Mapping) else None


def require_same_groups(before: Mapping[str, Any], now: Mapping[str, Any], folder: str) -> None:
    """Raise MFMError (E_CONFIG) unless the groups of two optimizer states have equal sizes."""
    old, new = ([len(group["params"]) for group in state["param_groups"]] for state in (before, now))
    if old != new:
        raise MFMError(
            "E_CONFIG",
            f"{folder} was trained by a version that trained other weights ({sum(old)} tensors in {len(old)} "
            f"groups, here {sum(new)} in {len(new)}), so it cannot be resumed. Use it as it is, or train again under "
            "another plan name.",
        )


def to_cpu(value: Any) -> Any:
    """Move the tensors in nested dicts and lists to the CPU, so that any computer can load them."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value


def _find_wrong_part(content: Mapping[str, Any], names: Any) -> str:
    """Name a part of a checkpoint that has the wrong type; "" if there is none."""
    tables = ("init_args", "logging", "optimizer_state", "network_weights")
    axes = content.get("inference_allowed_mirroring_axes")
    is_right = {
        **{name: isinstance(content[name], Mapping) for name in tables},
        "current_epoch": type(content["current_epoch"]) is int and content["current_epoch"] >= 0,
        "_best_ema": isinstance(content["_best_ema"], (int, float, type(None))),
        "new_weights": names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "inference_allowed_mirroring_axes": axes is None
        or (isinstance(axes, (list, tuple)) and all(axis in (0, 1, 2) for axis in axes)),
    }
    return next((name for name, holds in is_right.items() if not holds), "")
