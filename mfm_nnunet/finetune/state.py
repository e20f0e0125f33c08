"""The state of a fine-tuning run as nnU-Net's checkpoint: tensors and plain values only, no subjects, no paths."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from mfm_nnunet.checkpoint import cpu_weights, to_plain
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.transfer import unwrapped, without_wrapper_prefixes
from mfm_nnunet.plans.schema import FORMAT, to_dict

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer


def content_of(trainer: MFMTrainer) -> dict[str, Any]:
    """nnU-Net's keys and ours (``mfm``); the state at the end of the trainer's current epoch."""
    scaler = trainer.grad_scaler
    content = {
        "network_weights": cpu_weights(unwrapped(trainer.network).state_dict()),
        "optimizer_state": _on_cpu(trainer.optimizer.state_dict()),
        "grad_scaler_state": scaler.state_dict() if scaler is not None else None,
        "logging": trainer.logger.get_checkpoint(),
        "_best_ema": trainer._best_ema,
        "current_epoch": trainer.current_epoch + 1,
        "init_args": {
            "plans": trainer.plans_manager.plans,
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
            "versions": {package: version(package) for package in ("mfm_nnunet", "nnunetv2", "torch")},
        },
    }
    return to_plain(content)


def restore(trainer: MFMTrainer, content: Mapping[str, Any]) -> None:
    """Continue where ``content`` was saved.

    Raises MFMError: E_MODEL_MISMATCH when it is of another network, E_MODEL_CORRUPT when it is not a whole run.
    """
    missing = {"network_weights", "optimizer_state", "logging", "_best_ema", "current_epoch", "init_args"} - set(
        content
    )
    if missing:
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"a checkpoint in {trainer.output_folder} is no state of a run: {', '.join(sorted(missing))} missing.",
        )
    try:
        unwrapped(trainer.network).load_state_dict(without_wrapper_prefixes(content["network_weights"]))
        trainer.optimizer.load_state_dict(content["optimizer_state"])
    except (RuntimeError, ValueError, KeyError) as error:
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


def _on_cpu(value: Any) -> Any:
    """A nest of dicts, lists and tensors with the tensors on the CPU, so that the file loads on any computer."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value
