"""What can be refused before a training starts: the fold, the data, the trainer, and a run that is already there."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet import dataset as dataset_jsons
from mfm_nnunet.data.preprocess import preprocessing_hash
from mfm_nnunet.data.storage import stale_cases
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import inside
from mfm_nnunet.finetune.preprocessed import require_fingerprint, select_cases
from mfm_nnunet.finetune.splits import Split, choose_split
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.settings import block_of
from mfm_nnunet.workspace import Workspace

FINAL = "checkpoint_final.pth"
TO_CONTINUE = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
"""What --c continues from, the first that exists; nnU-Net's order."""


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """The trainer class: ours, nnU-Net's own, or one in the folders of ``nnUNet_extTrainer``.

    Raises MFMError (E_NOT_FOUND) with the nearest that exists.
    """
    if name == MFMTrainer.__name__:
        return MFMTrainer
    found: Any = None  # nnU-Net finds whatever has that name in its modules: functions and libraries too
    if name.isidentifier():
        with contextlib.suppress(RuntimeError, AssertionError, TypeError), contextlib.redirect_stdout(io.StringIO()):
            found = recursive_find_trainer_class_by_name(name)
    if isinstance(found, type) and issubclass(found, nnUNetTrainer):
        return found
    known = {cls.__name__ for cls in _subclasses(nnUNetTrainer)} | {nnUNetTrainer.__name__}
    raise MFMError("E_NOT_FOUND", f"there is no trainer '{name}'. {nearest(name, known)}")


def check_data(
    workspace: Workspace,
    dataset_name: str,
    plans: dict[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: dict[str, Any],
    trainer: type[nnUNetTrainer] = MFMTrainer,
) -> Split:
    """Return the labelled cases that train and validate the fold.

    Raises MFMError unless the configuration is in the plan and its preprocessed data can train the fold.
    """
    if configuration not in plans["configurations"]:
        raise MFMError(
            "E_CONFIG",
            f"plan {plans['plans_name']} has no configuration '{configuration}'. "
            f"{nearest(configuration, plans['configurations'])}",
        )
    resolved = PlansManager(plans).get_configuration(configuration)
    for stage in resolved.next_stage_names or ():
        if stage not in plans["configurations"]:  # nnU-Net looks it up when the training is done
            raise MFMError(
                "E_CONFIG",
                f"configuration '{configuration}' has the next_stage '{stage}', which the plan does not have. "
                f"{nearest(stage, plans['configurations'])}",
            )
    folder = workspace.preprocessed / dataset_name
    data = inside(folder, resolved.data_identifier)
    selection = select_cases(inside(workspace.raw, dataset_name), folder, data)
    if not selection.cases:
        source = block_of(plans).source
        like = f" --like CHECKPOINT (it was {source.get('name')}; without it the plan changes)" if source else ""
        raise MFMError(
            "E_NOT_FOUND",
            f"{dataset_name} has no preprocessed data for {configuration} of plan {plans['plans_name']}. "
            f"Run: mfm_plan_and_preprocess -d {dataset_name} -c {configuration} -pl {plans['plans_name']}{like}",
        )
    if stale := stale_cases(data, selection.names, preprocessing_hash(plans, configuration, dataset_json)):
        raise MFMError(
            "E_CONFIG",
            f"{data}: {len(stale)} cases were preprocessed for another plan or dataset.json than those that are there "
            f"now (labels, spacing or intensities differ), e.g. {stale[0]}. Run: mfm_plan_and_preprocess -d "
            f"{dataset_name} -c {configuration} -pl {plans['plans_name']}",
        )
    require_fingerprint(folder)
    return choose_split(fold, folder, selection, trainer_lists_folder=not issubclass(trainer, MFMTrainer))


def check_previous_stage(plans: dict[str, Any], configuration: str, dataset_folder: Path, trainer: str) -> None:
    """Raise MFMError (E_NOT_FOUND) when a cascade lacks the predictions of its first stage.

    ``dataset_folder`` is the dataset's folder among the results.
    """
    stage = PlansManager(plans).get_configuration(configuration).previous_stage_name
    if stage is None:
        return
    model = f"{trainer}__{plans['plans_name']}__{stage}"
    folder = inside(dataset_folder, model, "predicted_next_stage", configuration)
    if not folder.is_dir():
        raise MFMError(
            "E_NOT_FOUND",
            f"{configuration} is trained on the predictions of {stage}, and {folder} does not exist. Train all folds "
            f"of {stage} first, with the same trainer and plan; their validation writes it.",
        )


def read_dataset_json(workspace: Workspace, dataset_name: str) -> dict[str, Any]:
    """dataset.json of a dataset with labels.

    Raises MFMError: E_NOT_FOUND without the file, E_FORMAT when it is damaged or breaks nnU-Net's rules, E_CONFIG when
    it names no structure to segment.
    """
    files = [root / dataset_name / "dataset.json" for root in (workspace.preprocessed, workspace.raw)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MFMError("E_NOT_FOUND", f"{files[0]}: there is no dataset.json. Run mfm_plan_and_preprocess.")
    advice = f"Make it again with: mfm_plan_and_preprocess -d {dataset_name}"
    dataset_json = dataset_jsons.read_dataset_json(file, advice)
    if not set(dataset_json["labels"]) - {"background", "ignore"}:
        raise MFMError(
            "E_CONFIG",
            f"{dataset_name} names no structure to segment ({file}, 'labels'). A corpus without labels can only be "
            "pretrained on: mfm_pretrain.",
        )
    return dataset_json


def checkpoint_to_start_from(folder: Path, continue_training: bool, only_validate: bool) -> Path | None:
    """The checkpoint in a run folder to go on from, None for a new run.

    Raises MFMError: E_NOT_FOUND when there is none to go on from, E_EXISTS when a new run would overwrite one.
    """
    existing = next((folder / name for name in TO_CONTINUE if (folder / name).is_file()), None)
    is_finished = existing is not None and existing.name == FINAL
    if only_validate and not is_finished:
        raise MFMError("E_NOT_FOUND", f"{folder} holds no finished training ({FINAL}). Train first, or go on with --c.")
    if continue_training and existing is None:
        raise MFMError("E_NOT_FOUND", f"{folder} holds no checkpoint to continue from. Start without --c.")
    if existing is not None and not (continue_training or only_validate):
        raise MFMError(
            "E_EXISTS",
            f"{folder} holds {'a finished' if is_finished else 'an unfinished'} training, which is not overwritten. "
            "Continue it with --c, use another plan name (-p), or move the folder away.",
        )
    return existing


def _subclasses(cls: type[nnUNetTrainer]) -> Iterator[type[nnUNetTrainer]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
