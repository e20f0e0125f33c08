"""The state of a fine-tuning run as nnU-Net's checkpoint: tensors and plain values only, no subjects, no paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mfm_nnunet.checkpoint import atomic_write, cpu_weights
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import to_plain
from mfm_nnunet.finetune.lora import merged_state
from mfm_nnunet.models.transfer import unwrapped, without_wrapper_prefixes
from mfm_nnunet.plan import shared_plan
from mfm_nnunet.settings import FORMAT, FinetuneSettings, to_dict

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer


def content_of(trainer: MFMTrainer) -> dict[str, Any]:
    """nnU-Net's keys and ours (``mfm``); the state at the end of the trainer's current epoch."""
    scaler = trainer.grad_scaler
    content = {
        **_weights_of(trainer),
        "optimizer_state": _on_cpu(trainer.optimizer.state_dict()),
        "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch + 1,
        "init_args": {
            "plans": shared_plan(trainer.plans_manager.plans),
            "configuration": trainer.configuration_name,
            "fold": trainer.fold,
            "dataset_json": trainer.dataset_json,
        },
        "trainer_name": type(trainer).__name__,
        "inference_allowed_mirroring_axes": trainer.inference_allowed_mirroring_axes,
        "mfm": {
            "format": FORMAT,
            "kind": "finetuned",
            "finetune": to_dict(trainer.block.finetune),
            "source": trainer.block.source,
            "new_weights": None if trainer.new_weights is None else sorted(trainer.new_weights),
            "versions": {package: version(package) for package in ("mfm_nnunet", "nnunetv2", "torch")},
        },
    }
    return to_plain(content)


def write_descriptions(trainer: MFMTrainer) -> None:
    """Write plan and dataset.json into the model folder, as nnU-Net does when a training starts, but atomically.

    On a full disk nnU-Net would leave half a file there, for the folds that are finished too.
    """
    folder = Path(trainer.output_folder_base)
    folder.mkdir(parents=True, exist_ok=True)
    if trainer.local_rank == 0:
        for name, content in (("plans.json", trainer.plans_manager.plans), ("dataset.json", trainer.dataset_json)):
            with atomic_write(folder / name) as file:
                file.write(json.dumps(content, indent=4).encode())


def restore(trainer: MFMTrainer, content: Mapping[str, Any]) -> None:
    """Continue where ``content`` was saved.

    Raises MFMError: E_MODEL_MISMATCH when it is of another network, E_MODEL_CORRUPT when it is not a whole run,
    E_CONFIG when other parameters learn now.
    """
    trained = "trained_weights" if _ships_other_weights(trainer) else "network_weights"
    wanted = {"network_weights", trained, "optimizer_state", "logging", "_best_ema", "current_epoch", "init_args"}
    wanted |= {"averaged_weights"} if trainer.average is not None else set()
    missing = wanted - set(content)
    ours = content.get("mfm")
    names = ours.get("new_weights") if isinstance(ours, Mapping) else None
    if names is None and trainer.settings.checkpoint is not None and needs_names(trainer.settings):
        missing.add("mfm.new_weights")
    if missing:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"a checkpoint in {trainer.output_folder} is no state of this run: {', '.join(sorted(missing))} missing. "
            "Move the folder away and train again.",
        )
    if wrong := _wrong_part(content, names):
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"a checkpoint in {trainer.output_folder} is no state of this run: {wrong} is damaged. Copy it again, or "
            "move the folder away and train again.",
        )
    trainer.prepare(None if names is None else set(names))
    try:
        unwrapped(trainer.network).load_state_dict(without_wrapper_prefixes(content[trained]))
        _require_same_groups(trainer, content["optimizer_state"])
        trainer.optimizer.load_state_dict(content["optimizer_state"])
        if trainer.average is not None:
            trainer.average.load_state_dict(content["averaged_weights"])
    except MFMError:
        raise
    except (RuntimeError, ValueError, LookupError, AssertionError, TypeError, AttributeError) as error:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"a checkpoint in {trainer.output_folder} is of another network than the plan: {error}",
        ) from error
    trainer.my_init_kwargs = content["init_args"]
    trainer.current_epoch = content["current_epoch"]
    trainer.logger.load_checkpoint(content["logging"])
    trainer._best_ema = content["_best_ema"]
    if content.get("inference_allowed_mirroring_axes") is not None:
        trainer.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
    if trainer.grad_scaler is not None and content.get("grad_scaler_state"):
        trainer.grad_scaler.load_state_dict(content["grad_scaler_state"])


def _wrong_part(content: Mapping[str, Any], names: Any) -> str:
    """Name a part of a checkpoint that is of another kind than it can be; "" if none is."""
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


def _require_same_groups(trainer: MFMTrainer, optimizer_state: Mapping[str, Any]) -> None:
    """Raise MFMError (E_CONFIG) when other parameters learn than when the run began."""
    before, now = (
        [len(group["params"]) for group in state["param_groups"]]
        for state in (optimizer_state, trainer.optimizer.state_dict())
    )
    if before != now:
        raise MFMError(
            "E_CONFIG",
            f"{trainer.output_folder} was trained by a version in which other weights learned ({sum(before)} tensors "
            f"in {len(before)} groups, here {sum(now)} in {len(now)}), so it cannot go on. Use it as it is, or train "
            "again under another plan name.",
        )


def needs_names(settings: FinetuneSettings) -> bool:
    """Whether a run can only go on when it is known which weights came from the checkpoint."""
    return settings.schedule == "sawtooth" or settings.train != "all"


def _ships_other_weights(trainer: MFMTrainer) -> bool:
    """Whether what is validated and shipped (``network_weights``) is not what the optimizer steps."""
    return trainer.average is not None or trainer.settings.train == "lora"


def _weights_of(trainer: MFMTrainer) -> dict[str, dict[str, torch.Tensor]]:
    """The weights to ship and, where training goes on with others, those and the averages."""
    network = unwrapped(trainer.network)
    with trainer.averaged():
        states = {"network_weights": merged_state(network)}
    if _ships_other_weights(trainer):
        states["trained_weights"] = network.state_dict()
    if trainer.average is not None:
        states["averaged_weights"] = trainer.average.state_dict()
    # Together, so that a tensor which is in several of them is in the file once.
    flat = cpu_weights({f"{part}/{name}": tensor for part, state in states.items() for name, tensor in state.items()})
    return {part: {name: flat[f"{part}/{name}"] for name in state} for part, state in states.items()}


def _on_cpu(value: Any) -> Any:
    """A nest of dicts, lists and tensors with the tensors on the CPU, so that the file loads on any computer."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value
