"""Load a trained model from a folder in nnU-Net's layout without running code from its files.

Existing folds are found. An error names what is missing and what there is.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from mfm_nnunet.checkpoint import load_weights
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import pick_device
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import sha256, whole_number
from mfm_nnunet.models.networks import build_network, check_architecture
from mfm_nnunet.plan import Plan
from mfm_nnunet.prediction.model import Model

__all__ = ["Model", "load_model"]

_MODEL_FOLDER = "A model folder has plans.json, dataset.json and folders fold_X with a checkpoint."
PLAIN_TRAINERS = ("MFMTrainer", "nnUNetTrainer")
"""Trainers that use the plan's network; others build their own."""


def load_model(
    model_folder: str | Path,
    folds: Sequence[int | str] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
    device: str | torch.device = "auto",
) -> Model:
    """Load the model of a folder in nnU-Net's layout: plans.json, dataset.json, fold_X/<checkpoint_name>.

    ``folds`` None loads all numbered folds that have the checkpoint, or ``all`` if it is the only one. Raises MFMError:
    E_NOT_FOUND (naming the expected and the existing files), E_MODEL_CORRUPT, E_MODEL_UNSAFE, E_MODEL_MISMATCH.
    """
    folder = Path(model_folder)
    _require_model_folder(folder)
    plans, dataset_json = _read_description(folder)
    chosen = _choose_folds(folder, folds, checkpoint_name)
    files = [folder / f"fold_{fold}" / checkpoint_name for fold in chosen]
    trained = [_read_fold(file) for file in files]
    first, configuration = trained[0], trained[0].configuration
    if configuration not in plans["configurations"]:
        reason = f"there is no configuration '{configuration}', with which the checkpoint was trained"
        raise _mismatch(folder / "plans.json", reason)
    if problem := Plan.of(plans).configuration(configuration).preprocessor_problem:
        advice = "Predict with the program that the model was trained with."
        raise MFMError("E_MODEL_MISMATCH", f"{folder / 'plans.json'}: {problem} {advice}")
    _require_one_model(trained, plans, dataset_json)
    plans_manager = PlansManager(plans)
    model = Model(
        network=_build(first.trainer, plans_manager, configuration, dataset_json),
        plans_manager=plans_manager,
        configuration_manager=plans_manager.get_configuration(configuration),
        dataset_json=dataset_json,
        device=pick_device(device) if isinstance(device, str) else device,
        mirror_axes=first.mirror_axes,
        weights=[fold.weights for fold in trained],
        folds=tuple(chosen),
        autocast_dtype=torch.bfloat16 if first.precision == "bf16" else torch.float16,
        sha256=_digest([folder / "plans.json", folder / "dataset.json", *files]),
    )
    for fold in trained:
        _require_match(fold.file, fold.weights, model.network)
    return model


def _require_model_folder(folder: Path) -> None:
    """Refuse a folder that is not a model folder, and name a nearby folder that is."""
    place = folder.absolute()
    if (place / "plans.json").exists():
        return
    above = next((near for near in (place.parent, place.parent.parent) if (near / "plans.json").is_file()), None)
    below = sorted(entry.name for entry in place.glob("*__*__*") if (entry / "plans.json").is_file())
    beside = [entry.name for entry in place.parent.glob("*__*__*")] if place.parent.is_dir() else []
    problem = None
    if not place.exists():
        problem = f"no such model folder. {nearest(place.name, beside) if beside else 'Check the path.'}"
    elif above is not None:
        problem = f"this is a part of a model. Give its folder, {above}, and choose with -f FOLD and -chk FILE."
    elif not place.is_dir():
        problem = f"this is a file. {_MODEL_FOLDER} Give that folder."
    elif below:
        problem = f"holds models, and is none. Give one of them: {', '.join(below)}."
    if problem:
        raise MFMError("E_NOT_FOUND", f"{folder}: {problem}")


def _read_description(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    advice = f"{_MODEL_FOLDER} Copy it again."
    plans = dict(Plan.read(folder / "plans.json", advice, "E_MODEL_CORRUPT").content)
    dataset = DatasetJson.read(folder / "dataset.json", advice, "E_MODEL_CORRUPT", of_model=True)
    return plans, dict(dataset.content)


def _choose_folds(folder: Path, folds: Sequence[int | str] | None, checkpoint_name: str) -> list[int | str]:
    trained = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint_name}"))
    numbers = sorted(number for name in trained if (number := whole_number(name)) is not None)
    existing = [*map(str, numbers), *(name for name in trained if whole_number(name) is None)]
    if folds is None and (numbers or "all" in trained):
        return [*numbers] or ["all"]
    wanted = [str(fold) for fold in folds or ()]
    if wanted and all(name in existing for name in wanted):
        return [name if (number := whole_number(name)) is None else number for name in wanted]
    missing = [name for name in wanted if name not in existing]
    others = sorted({file.name for file in folder.glob("fold_*/*.pth")} - {checkpoint_name})
    raise MFMError(
        "E_NOT_FOUND",
        f"{folder}: no fold_{missing[0] if missing else 'X'}/{checkpoint_name}. "
        + (f"Folds with this checkpoint: {', '.join(existing)}. " if existing else "No fold has this checkpoint. ")
        + (f"Other checkpoints: {', '.join(others)}." if others else "Train the model first, or check the path."),
    )


@dataclass(frozen=True)
class _Fold:
    """The description in a checkpoint, and its weights."""

    file: Path
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...] | None
    precision: str
    init_args: dict[str, Any]
    weights: dict[str, torch.Tensor]


def _read_fold(file: Path) -> _Fold:
    content = load_weights(file)
    try:
        trainer, init_args = str(content["trainer_name"]), dict(content["init_args"])
        configuration = str(init_args["configuration"])
        if not trainer.isidentifier():
            raise ValueError(f"the trainer is called {trainer[:60]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"{file}: there are weights but no trainer and configuration, so it is not a fine-tuned model (a "
            "pretrained checkpoint has no segmentation head). Fine-tune it first: mfm_train.",
        ) from error
    axes = content.get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, (list, tuple)) or not all(type(axis) is int and 0 <= axis <= 2 for axis in axes):
        raise MFMError(
            "E_MODEL_CORRUPT", f"{file}: its mirroring axes are {str(axes)[:60]}, which is not possible. Copy it again."
        )
    mirror_axes = tuple(axes) or None
    precision = _precision(content.get("mfm"))
    return _Fold(file, trainer, configuration, mirror_axes, precision, init_args, content["network_weights"])


def _require_one_model(folds: list[_Fold], plans: dict[str, Any], dataset_json: dict[str, Any]) -> None:
    """Refuse a fold that belongs to another model than the first, or does not match the folder's plan."""
    first = folds[0]
    for fold in folds:
        for name in ("trainer", "configuration", "mirror_axes"):
            own, other = getattr(fold, name), getattr(first, name)
            if own != other:
                raise _mismatch(fold.file, f"{name} is {own}, and {other} in {first.file.parent.name}")
        unequal = _differences(fold, Plan.of(plans), DatasetJson.of(dataset_json))
        if unequal:
            raise _mismatch(
                fold.file,
                f"it was trained with other values than plans.json and dataset.json say: {', '.join(unequal)}",
            )


def _differences(fold: _Fold, plan: Plan, dataset: DatasetJson) -> list[str]:
    """List differences between a checkpoint's description and the model folder's plan and dataset."""
    found = []
    own_plan, own_dataset = Plan.of_checkpoint(fold.init_args), DatasetJson.of_checkpoint(fold.init_args)
    if own_plan and fold.configuration in own_plan.configuration_names:
        found += own_plan.differences(plan, fold.configuration)
    if own_dataset:
        found += own_dataset.differences(dataset)
    return found


def _mismatch(file: Path, reason: str) -> MFMError:
    return MFMError(
        "E_MODEL_MISMATCH",
        f"{file}: {reason}. Put plans.json, dataset.json and the fold folders of one model together.",
    )


def _precision(mfm: Any) -> str:
    """Return the training precision of MFMTrainer; "auto" for other models."""
    settings = mfm.get("finetune") if isinstance(mfm, dict) else None
    return str(settings.get("precision", "auto")) if isinstance(settings, dict) else "auto"


def _build(trainer_name: str, plans_manager: PlansManager, configuration: str, dataset_json: dict) -> nn.Module:
    """Build the network like the trainer did, without deep supervision."""
    configuration_manager = plans_manager.get_configuration(configuration)
    num_inputs = determine_num_input_channels(plans_manager, configuration_manager, dataset_json)
    num_outputs = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
    if trainer_name in PLAIN_TRAINERS:
        return build_network(plans_manager.plans, configuration, num_inputs, num_outputs, deep_supervision=False)
    architecture = (
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
    )
    check_architecture(*architecture)  # the trainer's own builder would import any name in the plan
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            build = recursive_find_trainer_class_by_name(trainer_name).build_network_architecture
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:  # it may find no class at all
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"the model was trained with '{trainer_name}', which this installation of nnU-Net does not have. Install "
            "its package, and set nnUNet_extTrainer to its folder.",
        ) from error
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans_manager, configuration_manager, num_inputs, num_outputs, enable_deep_supervision=False)
    return build(*architecture, num_inputs, num_outputs, enable_deep_supervision=False)


def _require_match(file: Path, state: dict[str, torch.Tensor], network: nn.Module) -> None:
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise _mismatch(file, f"the weights belong to another network than plans.json describes ({reason})") from error


def _digest(files: list[Path]) -> str:
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()
