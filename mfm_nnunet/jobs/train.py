"""Train and validate one fold: check everything first, then run our nnU-Net trainer on it.

A finished or stopped run is never overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mfm_nnunet.checkpoint import load_weights
from mfm_nnunet.data.class_table import require_confirmed
from mfm_nnunet.data.corpus import Selection
from mfm_nnunet.data.storage import stale_cases
from mfm_nnunet.data.unlabelled import Labelled, Unlabelled
from mfm_nnunet.dataset import IMAGE_TASKS, DatasetJson
from mfm_nnunet.device import out_of_memory_is_an_error, pick_device, require_scaled_fp16, training_threads
from mfm_nnunet.errors import MFMError, about, nearest
from mfm_nnunet.fields import takes
from mfm_nnunet.files import inside, refuse_links, remove_leftovers, report_full_disk, shown
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune import settings as run_settings
from mfm_nnunet.finetune.loading import read_dataset, read_fingerprint, select_labelled
from mfm_nnunet.finetune.splits import Split, choose_split
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.finetune.universal import BEFORE, compare_old_classes, select_old_classes
from mfm_nnunet.finetune.validation import validate_fold
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.interchange.read import find_checkpoint, read_initial, sha256
from mfm_nnunet.jobs import student
from mfm_nnunet.jobs.classify import train_classifier
from mfm_nnunet.jobs.dry_run import scratch_results
from mfm_nnunet.jobs.report import report_training, reported
from mfm_nnunet.jobs.unlabelled import add_unlabelled
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import Configuration, Plan
from mfm_nnunet.planning.recipes import apply_recipe
from mfm_nnunet.processes import join_world, leave_world, run_processes
from mfm_nnunet.requests import TrainRequest
from mfm_nnunet.settings import MFMBlock, to_dict
from mfm_nnunet.signals import stop_on_signal
from mfm_nnunet.workspace import Workspace, use

logger = logging.getLogger(__name__)

FINAL = "checkpoint_final.pth"
TO_CONTINUE = (FINAL, "checkpoint_latest.pth", "checkpoint_best.pth")
"""The checkpoints that --c looks for, in nnU-Net's order."""

_LESS_MEMORY = (
    "End what else uses the device, or train with less: plan with a smaller --memory-gb (where the plan is like a "
    "checkpoint: --set finetune.batch_size=1). Once an epoch is saved, --c resumes with the same plan and settings "
    "only: for others move the fold's folder away first."
)
_LESS_MEMORY_TO_VALIDATE = (
    "The training is finished and saved. Validate it with --val, when nothing else uses the device or with -device cpu."
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files that a request names, read and checked by themselves."""

    request: TrainRequest
    plans_file: Path
    plan: Plan
    dataset: DatasetJson
    overrides: tuple[str, ...]
    """Settings of the recipe and of the request."""
    weights: Path | None
    """The checkpoint to start from."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked fold to train. It can be pickled, to be sent to another process."""

    request: TrainRequest
    plans: dict[str, Any]
    """The plan, with the settings as resolved for this run."""
    dataset_json: dict[str, Any]
    split: Split
    folder: Path
    device: str
    pretrained: Path | Reading | None
    """The initial checkpoint, already read; or its file, if several processes read it."""
    start_from: Path | None
    """The checkpoint of this run to resume from."""
    unlabelled: Unlabelled | None = None
    """Images without labels that also train."""


@takes(TrainRequest)
def train(request: TrainRequest) -> Path:
    """Train a segmentation network or a classifier, from a pretrained checkpoint or from scratch on the same schedule.

    Returns the folder of the fold (or of ``"all"``) inside nnU-Net's model folder. Raises MFMError for bad input (also
    when less than half of the encoder's parameters match the checkpoint), StoppedError on SIGTERM or Ctrl-C, and
    FloatingPointError when the loss becomes non-finite.
    """
    return run_request(request)


def run_request(request: TrainRequest) -> Path:
    """Do what :func:`train` does."""
    with use(request.workspace) as here:
        inputs = read_inputs(here, request)
        if inputs.dataset.task in IMAGE_TASKS:
            run_settings.require_both(None, inputs.plan.mfm.semi, inputs.overrides)
            if request.unlabelled is not None:
                raise MFMError(
                    "E_CONFIG",
                    f"--unlabelled {request.unlabelled}: unlabelled images train with masks only, and "
                    f"{inputs.plan.dataset_name} has labels of whole images. Leave it out.",
                )
            return train_classifier(here, request, inputs.plan, inputs.dataset, inputs.overrides, inputs.weights)
        if request.dry_run:
            job = check(here, inputs)
            with scratch_results():
                execute(job)
            return job.folder
        if folder := student.label_only(here, inputs, check, run_fold):
            return folder
        return _execute_all(here, inputs, student.teach(here, inputs, check(here, inputs), run_fold))


def run_fold(here: Workspace, inputs: Inputs, changes: Mapping[str, Any]) -> Path:
    """Check, train and validate a fold, with some parts of its job changed; return its folder."""
    return _execute_all(here, inputs, dataclasses.replace(check(here, inputs), **changes))


def _execute_all(here: Workspace, inputs: Inputs, job: Job) -> Path:
    """Train and validate in one process or in several, and write the report."""
    report = partial(report_training, here, job.folder, job.plans, inputs.dataset, job.split)
    with reported(report, job.folder):
        if job.request.num_gpus > 1:
            run_processes(execute, (job,), job.request.num_gpus)
        else:
            execute(job)
        student.keep_better_round(job)
    return job.folder


def read_inputs(here: Workspace, request: TrainRequest) -> Inputs:
    """Read the plan, the dataset.json and the recipe of a request. Raises MFMError for errors the user can fix."""
    dataset_name, configuration = here.dataset_name(request.dataset), request.configuration
    weights = find_checkpoint(request.pretrained_weights) if request.pretrained_weights else None
    of_weights = functools.partial(sha256, weights) if weights is not None else None
    request = dataclasses.replace(request, plans_name=here.choose_plan(dataset_name, request.plans_name, of_weights))
    if request.trainer != MFMTrainer.__name__:
        other = shown(request.trainer)
        raise MFMError(
            "E_NOT_FOUND",
            f"--trainer {other}: mfm_train has only 'MFMTrainer'. Train with another in nnU-Net: "
            f"nnUNetv2_train {dataset_name} {configuration} {request.fold} -p {request.plans_name} -tr {other}",
        )
    assert request.plans_name is not None, "it is chosen"
    plans_file = here.plans_file(dataset_name, request.plans_name)
    plan = _read_plan(plans_file, dataset_name)
    with about(plans_file):
        block, overrides = plan.mfm, tuple(request.settings)
    run_settings.require_of_training(overrides, block)
    if request.recipe is not None:
        overrides = (*apply_recipe(request.recipe, block, plan.family), *overrides)
    return Inputs(request, plans_file, plan, read_dataset(here, dataset_name), overrides, weights)


def check(here: Workspace, inputs: Inputs) -> Job:
    """Check the requested run, and write the resolved settings of a new one into its folder.

    Raises MFMError for errors the user can fix, before anything is written.
    """
    request, plan, dataset, overrides = inputs.request, inputs.plan, inputs.dataset, inputs.overrides
    configuration = request.configuration
    if request.head is not None:
        raise MFMError(
            "E_CONFIG",
            f"--head {request.head}: the dataset has masks. Heads are for datasets with labels.csv and a task in "
            "dataset.json (documentation/how_to/classify.md).",
        )
    _check_union(here, plan, request)
    selection, split = _check_data(here, plan, request, dataset)
    folder, start_from = _find_folder(here.results / plan.dataset_name, plan, request)
    used = _pick_device(request)
    if not request.dry_run:
        remove_leftovers(folder)
    with about(inputs.plans_file):
        block, num_channels = plan.mfm, plan.configuration(configuration).num_channels
        network = build_network(plan.content, configuration, num_channels, 2)
    reading = read_initial(inputs.weights, network, request.accept_licence) if inputs.weights is not None else None
    if start_from is None and not request.continue_training:
        block = run_settings.resolve_new(block, overrides, reading, network, len(split["train"]))
    else:
        block = run_settings.resolve_resumed(block, overrides, reading, folder, plan.content)
    run_settings.require_effect(overrides, block.finetune, used.type)
    groups.require_fitting(block.finetune, network, request.num_gpus > 1)
    groups.require_pretrained(block.finetune, block.finetune.checkpoint is not None)
    if not request.only_validate:
        require_scaled_fp16(block.finetune.precision, used)
    _require_a_crop_each(block, plan.configuration(configuration), request.num_gpus)
    labelled = Labelled(
        plan, configuration, dataset, selection.cases, split["train"], set(split["val"]) - set(split["train"])
    )
    block, unlabelled = add_unlabelled(here, inputs, block, labelled)
    is_new = start_from is None and not request.continue_training
    is_changed = is_new or run_settings.is_longer(folder, block, plan.content)
    if is_changed and not request.dry_run:
        run_settings.save_settings(folder, block, plan.content)
    logger.info("run folder: %s", folder)
    logger.info("settings:\n%s", run_settings.format_settings(block))
    pretrained = None if start_from else reading if request.num_gpus == 1 else inputs.weights
    plans = {**plan.content, "mfm": to_dict(block)}
    return Job(request, plans, dict(dataset.content), split, folder, str(used), pretrained, start_from, unlabelled)


def execute(job: Job) -> None:
    """Train and validate in this process (one of several under distributed training)."""
    device = torch.device(job.device)
    world = join_world(device)
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
        torch.backends.cudnn.benchmark = True
    try:
        # nnU-Net writes logs and pictures itself, and its errors do not always name the file.
        with report_full_disk(job.folder), training_threads(device), stop_on_signal():
            _train_and_validate(job, device)
    finally:
        leave_world(world)


def _train_and_validate(job: Job, device: torch.device) -> None:
    request = job.request
    with out_of_memory_is_an_error(_LESS_MEMORY_TO_VALIDATE if request.only_validate else _LESS_MEMORY):
        plans = {**job.plans, "continue_training": job.start_from is not None}
        trainer = MFMTrainer(plans, request.configuration, request.fold, job.dataset_json, device)
        trainer.split = job.split
        trainer.unlabelled = job.unlabelled
        trainer.pretrained_checkpoint = job.pretrained
        if job.start_from is not None:
            trainer.load_checkpoint(str(job.start_from))
        is_to_train = not request.only_validate and trainer.current_epoch < trainer.num_epochs
        if request.dry_run:
            if is_to_train:
                trainer.rehearse()
            logger.info("then %d cases are predicted and scored. Dry run: nothing was written", len(job.split["val"]))
            return
        if is_to_train:
            _validate_old_classes(trainer)
            trainer.run_training()
    with out_of_memory_is_an_error(_LESS_MEMORY_TO_VALIDATE):
        trainer.perform_actual_validation(request.save_probabilities)
    if _extends_model(trainer) and (Path(trainer.output_folder) / BEFORE / "summary.json").is_file():
        for line in compare_old_classes(trainer):
            trainer.print_to_log_file(line)


def _extends_model(trainer: MFMTrainer) -> bool:
    return trainer.union is not None and trainer.union.num_old > 0


def _validate_old_classes(trainer: MFMTrainer) -> None:
    """Validate the classes of an extended model before it learns more, at the start of a new run."""
    if not _extends_model(trainer) or trainer.current_epoch or trainer.pretrained_checkpoint is None:
        return
    if not trainer.was_initialized:
        trainer.initialize()
    for case in validate_fold(trainer, False, BEFORE, select_old_classes(trainer)):
        trainer.print_to_log_file(f"old classes of {case} predicted")


# Checks


def _pick_device(request: TrainRequest) -> torch.device:
    used = pick_device("cuda" if request.num_gpus > 1 else request.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and used.type != "cuda":
        raise MFMError(
            "E_CONFIG",
            f"torchrun started several processes, and on {used.type} training has one: nnU-Net's trainer shares a step "
            "among GPUs only. Run mfm_train itself, with -num_gpus on a computer with several.",
        )
    if used.index:
        raise MFMError(
            "E_CONFIG", f"-device {used}: training uses the first visible GPU. Choose it with CUDA_VISIBLE_DEVICES."
        )
    return used


def _read_plan(file: Path, dataset_name: str) -> Plan:
    plan = Plan.read(file, f"Plan {dataset_name} again.")
    if plan.dataset_name != dataset_name:  # nnU-Net uses the folders of the plan's dataset
        raise MFMError(
            "E_CONFIG",
            f"{file}: this plan belongs to {plan.dataset_name}. Plan {dataset_name} again, or correct 'dataset_name' "
            "and preprocess.",
        )
    return plan


def _check_data(here: Workspace, plan: Plan, request: TrainRequest, dataset: DatasetJson) -> tuple[Selection, Split]:
    """Check the configuration and its preprocessed data, and return the dataset's cases and those of the fold."""
    configuration = request.configuration
    dataset_name, resolved = plan.dataset_name, plan.configuration(configuration)
    again = f"Run: mfm_plan_and_preprocess -d {dataset_name} -c {configuration} -pl {plan.name}"
    if missing := set(resolved.next_stages) - set(plan.configuration_names):  # nnU-Net only looks it up after training
        stage = min(missing)
        raise MFMError(
            "E_CONFIG",
            f"configuration '{configuration}' has the next_stage '{stage}', which the plan does not have. "
            f"{nearest(stage, plan.configuration_names)}",
        )
    folder = here.preprocessed / dataset_name
    data = inside(folder, resolved.data_identifier)
    selection = select_labelled(inside(here.raw, dataset_name), folder, data)
    if not selection.cases:
        source = plan.mfm.source
        like = f" --like CHECKPOINT (it was {source.get('name')}; without it the plan changes)" if source else ""
        raise MFMError(
            "E_NOT_FOUND",
            f"{dataset_name} has no preprocessed data for {configuration} of plan {plan.name}. {again}{like}",
        )
    if stale := stale_cases(data, selection.names, plan.preprocessing_digest(configuration, dataset)):
        raise MFMError(
            "E_CONFIG",
            f"{data}: {len(stale)} cases were preprocessed with another plan or dataset.json (labels, spacing or "
            f"intensities differ), e.g. {stale[0]}. {again}",
        )
    read_fingerprint(folder)
    return selection, choose_split(request.fold, folder, selection, keep=not request.dry_run)


def _check_union(here: Workspace, plan: Plan, request: TrainRequest) -> None:
    """Refuse to train a union whose classes nobody confirmed, or on several GPUs: the loss sums over one batch."""
    if (table := plan.mfm.universal) is None:
        return
    name = plan.dataset_name
    require_confirmed([inside(here.raw, name), inside(here.preprocessed, name)], table)
    if request.num_gpus > 1:
        raise MFMError("E_CONFIG", f"-num_gpus {request.num_gpus}: {name} is a union, which trains on one GPU. Use 1.")


def _find_folder(results: Path, plan: Plan, request: TrainRequest) -> tuple[Path, Path | None]:
    """Return the run's folder among the dataset's ``results``, and the checkpoint in it to resume from, if any.

    Refuses to train a cascade without its first stage's predictions, and to overwrite another run.
    """
    configuration, model = request.configuration, f"{MFMTrainer.__name__}__{plan.name}__"
    if stage := plan.configuration(configuration).previous_stage:
        predicted = inside(results, f"{model}{stage}", "predicted_next_stage", configuration)
        if not predicted.is_dir():
            raise MFMError(
                "E_NOT_FOUND",
                f"{configuration} needs the predictions of {stage}, but {predicted} does not exist. First train all "
                f"folds of {stage} with the same plan: their validation writes it.",
            )
    folder = inside(results, f"{model}{configuration}", f"fold_{request.fold}")
    for written in (folder, folder.parent, folder / "validation"):
        refuse_links(written)
    existing = _find_newest(folder, request.only_validate)
    is_finished = existing is not None and existing.name == FINAL
    if request.only_validate and not is_finished:
        raise MFMError(
            "E_NOT_FOUND", f"{folder}: no finished training here ({FINAL}). Train first, or continue with --c."
        )
    # A student is begun when its teachers are.
    if request.continue_training and existing is None and not (folder / student.TEACHERS).is_dir():
        raise MFMError("E_NOT_FOUND", f"{folder}: no checkpoint to continue from. Start without --c.")
    if existing is not None and not (request.continue_training or request.only_validate):
        raise MFMError(
            "E_EXISTS",
            f"{folder}: {'a finished' if is_finished else 'an unfinished'} training is here and is not overwritten. "
            "Continue it with --c, use another plan name (-p), or move the folder away.",
        )
    return folder, existing


def _find_newest(folder: Path, only_validate: bool) -> Path | None:
    """Return the checkpoint of a run that is furthest. A finished run that trains on has two: final and latest."""
    found = [folder / name for name in TO_CONTINUE if (folder / name).is_file()]
    names = [file.name for file in found]
    if names[:2] == list(TO_CONTINUE[:2]) and not only_validate:
        final, latest = (load_weights(file).get("current_epoch", 0) for file in found[:2])
        found = found[latest > final :]
    return found[0] if found else None


def _require_a_crop_each(block: MFMBlock, configuration: Configuration, num_gpus: int) -> None:
    if num_gpus == 1:
        return
    batch_size = block.finetune.batch_size or configuration.batch_size
    if batch_size < num_gpus:
        raise MFMError(
            "E_CONFIG",
            f"finetune.batch_size={batch_size}: -num_gpus {num_gpus} needs at least one crop per GPU. Use fewer GPUs, "
            "or a larger batch.",
        )
    if configuration.values.get("batch_dice") and batch_size % num_gpus:
        raise MFMError(
            "E_CONFIG",
            f"finetune.batch_size={batch_size}: {configuration.name} computes its Dice loss over the batches of all "
            f"GPUs (batch_dice), which must be equally large: set a multiple of -num_gpus {num_gpus}.",
        )
    if torch.cuda.device_count() < num_gpus:
        raise MFMError("E_CONFIG", f"-num_gpus {num_gpus}: this computer has {torch.cuda.device_count()} GPUs.")
