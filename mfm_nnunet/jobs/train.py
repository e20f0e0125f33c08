"""Train and validate one fold: check everything first, then run our nnU-Net trainer on it.

All refusals happen before the first file is written. A finished or stopped run is never overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from mfm_nnunet import dataset as dataset_jsons
from mfm_nnunet.data.storage import stale_cases
from mfm_nnunet.device import out_of_memory_is_an_error, pick_device, require_scaled_fp16
from mfm_nnunet.errors import MFMError, about, nearest
from mfm_nnunet.fields import takes
from mfm_nnunet.files import inside, refuse_links, remove_leftovers, report_full_disk, shown
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune import settings as run_settings
from mfm_nnunet.finetune.loading import read_fingerprint, select_labelled
from mfm_nnunet.finetune.pretrained import has_decoder
from mfm_nnunet.finetune.settings import advise, advise_as_begun
from mfm_nnunet.finetune.splits import Split, choose_split
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import Plan
from mfm_nnunet.planning.recipes import apply_recipe
from mfm_nnunet.processes import join_world, leave_world, run_processes
from mfm_nnunet.requests import TrainRequest
from mfm_nnunet.settings import MFMBlock, block_of, override, to_dict
from mfm_nnunet.signals import stop_on_signal
from mfm_nnunet.workspace import Workspace, num_cores, use

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
class Job:
    """A checked fold to train. It can be pickled, to be sent to another process."""

    plans: dict[str, Any]
    configuration: str
    fold: int | str
    dataset_json: dict[str, Any]
    folder: Path
    device: str
    pretrained: Path | Reading | None
    """The initial checkpoint, already read; or its file, if several processes read it."""
    start_from: Path | None
    """The checkpoint of this run to resume from."""
    only_validate: bool
    save_probabilities: bool
    split: Split


@takes(TrainRequest)
def train(request: TrainRequest) -> Path:
    """Train a segmentation network, from a pretrained checkpoint or from scratch on the same schedule.

    Returns the fold's folder inside nnU-Net's model folder. Raises MFMError for bad input (also when less than half of
    the encoder's parameters match the checkpoint), StoppedError on SIGTERM or Ctrl-C, and FloatingPointError when the
    loss becomes non-finite.
    """
    with use(request.workspace) as here:
        return run_training(here, request)


def run_training(workspace: Workspace, request: TrainRequest) -> Path:
    """Train and validate one fold (or ``"all"``) and return its folder inside nnU-Net's model folder.

    Raises MFMError for errors the user can fix, StoppedError after a stop signal.
    """
    dataset_name, configuration, fold = workspace.dataset_name(request.dataset), request.configuration, request.fold
    num_gpus, trainer = request.num_gpus, request.trainer
    pretrained_weights = find_checkpoint(request.pretrained_weights) if request.pretrained_weights else None
    if trainer != MFMTrainer.__name__:
        raise MFMError(
            "E_NOT_FOUND",
            f"--trainer {shown(trainer)}: mfm_train has only 'MFMTrainer'. Train with another in nnU-Net: "
            f"nnUNetv2_train {dataset_name} {configuration} {fold} -p {request.plans_name} -tr {shown(trainer)}",
        )
    plans_file = workspace.plans_file(dataset_name, request.plans_name)
    plans = _read_plan(plans_file, dataset_name)
    overrides = tuple(request.settings)
    if request.recipe is not None:
        block = block_of(plans)
        overrides = (*apply_recipe(request.recipe, block, block.network), *overrides)
    dataset_json = _read_dataset_json(workspace, dataset_name)
    split = _check_data(workspace, plans, configuration, fold, dataset_json)
    results = workspace.results / dataset_name
    _check_previous_stage(plans, configuration, results)
    folder = inside(results, f"{trainer}__{plans['plans_name']}__{configuration}", f"fold_{fold}")
    for written in (folder, folder.parent, folder / "validation"):
        refuse_links(written)
    start_from = _find_start(folder, request.continue_training, request.only_validate)
    used = _pick_device(request)
    remove_leftovers(folder)
    with about(plans_file):
        network = _build_checked_network(plans, configuration)
    pretrained = read_checkpoint(pretrained_weights) if pretrained_weights is not None else None
    block = _resolve_settings(plans, folder, overrides, pretrained, start_from, network, len(split["train"]))
    run_settings.require_effect(overrides, block.finetune, used.type)
    groups.require_fitting(block.finetune, network, num_gpus > 1)
    groups.require_pretrained(block.finetune, block.finetune.checkpoint is not None)
    if not request.only_validate:
        require_scaled_fp16(block.finetune.precision, used)
    _require_a_crop_each(block, plans, configuration, num_gpus)
    if start_from is None:
        run_settings.save_settings(folder, block, plans)
    logger.info("run folder: %s", folder)
    logger.info("settings:\n%s", run_settings.format_settings(block))
    job = Job(
        {**plans, "mfm": to_dict(block)}, configuration, fold, dataset_json, folder, str(used),
        None if start_from else pretrained if num_gpus == 1 else pretrained_weights,
        start_from, request.only_validate, request.save_probabilities, split,
    )  # fmt: skip
    if num_gpus > 1:
        if torch.cuda.device_count() < num_gpus:
            raise MFMError("E_CONFIG", f"-num_gpus {num_gpus}: this computer has {torch.cuda.device_count()} GPUs.")
        run_processes(execute, (job,), num_gpus)
    else:
        execute(job)
    return folder


def execute(job: Job) -> None:
    """Train and validate in this process (one of several under distributed training)."""
    device = torch.device(job.device)
    world = join_world(device)
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank)
        torch.backends.cudnn.benchmark = True
    try:
        # nnU-Net writes logs and pictures itself, and its errors do not always name the file.
        with report_full_disk(job.folder), _threads(device), stop_on_signal():
            _train_and_validate(job, device)
    finally:
        leave_world(world)


def _train_and_validate(job: Job, device: torch.device) -> None:
    with out_of_memory_is_an_error(_LESS_MEMORY_TO_VALIDATE if job.only_validate else _LESS_MEMORY):
        plans = {**job.plans, "continue_training": job.start_from is not None}
        trainer = MFMTrainer(plans, job.configuration, job.fold, job.dataset_json, device)
        trainer.split = job.split
        trainer.pretrained_checkpoint = job.pretrained
        if job.start_from is not None:
            trainer.load_checkpoint(str(job.start_from))
        if not job.only_validate and trainer.current_epoch < trainer.num_epochs:
            trainer.run_training()
    with out_of_memory_is_an_error(_LESS_MEMORY_TO_VALIDATE):
        trainer.perform_actual_validation(job.save_probabilities)


# Checks


def _pick_device(request: TrainRequest) -> torch.device:
    used = pick_device("cuda" if request.num_gpus > 1 else request.device)
    if used.index:
        raise MFMError(
            "E_CONFIG",
            f"-device {used}: training uses the first visible GPU. Choose it with CUDA_VISIBLE_DEVICES.",
        )
    return used


def _read_plan(file: Path, dataset_name: str) -> dict[str, Any]:
    plans = dict(Plan.read(file, f"Plan {dataset_name} again.").content)
    if plans["dataset_name"] != dataset_name:  # nnU-Net uses the folders of the plan's dataset
        raise MFMError(
            "E_CONFIG",
            f"{file}: this plan belongs to {plans['dataset_name']}. Plan "
            f"{dataset_name} again, or correct 'dataset_name' and preprocess.",
        )
    return plans


def _read_dataset_json(workspace: Workspace, dataset_name: str) -> dict[str, Any]:
    """Read dataset.json of a labelled dataset, and refuse one that breaks nnU-Net's rules or has no foreground."""
    files = [root / dataset_name / "dataset.json" for root in (workspace.preprocessed, workspace.raw)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise MFMError("E_NOT_FOUND", f"{files[0]}: there is no dataset.json. Run mfm_plan_and_preprocess.")
    advice = f"Make it again with: mfm_plan_and_preprocess -d {dataset_name}"
    dataset_json = dataset_jsons.read_dataset_json(file, advice)
    if not set(dataset_json["labels"]) - {"background", "ignore"}:
        raise MFMError(
            "E_CONFIG",
            f"{dataset_name} has no labels to segment ({file}, 'labels'). A corpus without labels is only for "
            "pretraining: mfm_pretrain.",
        )
    return dataset_json


def _check_data(
    workspace: Workspace, plans: dict[str, Any], configuration: str, fold: int | str, dataset_json: dict[str, Any]
) -> Split:
    """Check the configuration and its preprocessed data, and return the fold's training and validation cases."""
    dataset_name = plans["dataset_name"]
    again = f"Run: mfm_plan_and_preprocess -d {dataset_name} -c {configuration} -pl {plans['plans_name']}"
    resolved = Plan.of(plans).configuration(configuration)
    for stage in resolved.next_stages:
        if stage not in plans["configurations"]:  # nnU-Net only looks it up after training
            raise MFMError(
                "E_CONFIG",
                f"configuration '{configuration}' has the next_stage '{stage}', which the plan does not have. "
                f"{nearest(stage, plans['configurations'])}",
            )
    folder = workspace.preprocessed / dataset_name
    data = inside(folder, resolved.data_identifier)
    selection = select_labelled(inside(workspace.raw, dataset_name), folder, data)
    if not selection.cases:
        source = block_of(plans).source
        like = f" --like CHECKPOINT (it was {source.get('name')}; without it the plan changes)" if source else ""
        raise MFMError(
            "E_NOT_FOUND",
            f"{dataset_name} has no preprocessed data for {configuration} of plan {plans['plans_name']}. {again}{like}",
        )
    if stale := stale_cases(
        data,
        selection.names,
        Plan.of(plans).preprocessing_digest(configuration, dataset_jsons.DatasetJson.of(dataset_json)),
    ):
        raise MFMError(
            "E_CONFIG",
            f"{data}: {len(stale)} cases were preprocessed with another plan or dataset.json (labels, spacing or "
            f"intensities differ), e.g. {stale[0]}. {again}",
        )
    read_fingerprint(folder)
    return choose_split(fold, folder, selection)


def _check_previous_stage(plans: dict[str, Any], configuration: str, dataset_folder: Path) -> None:
    """Refuse to train a cascade without its first stage's predictions; ``dataset_folder`` is among the results."""
    stage = PlansManager(plans).get_configuration(configuration).previous_stage_name
    if stage is None:
        return
    model = f"{MFMTrainer.__name__}__{plans['plans_name']}__{stage}"
    folder = inside(dataset_folder, model, "predicted_next_stage", configuration)
    if not folder.is_dir():
        raise MFMError(
            "E_NOT_FOUND",
            f"{configuration} needs the predictions of {stage}, but {folder} does not exist. First train all folds "
            f"of {stage} with the same plan: their validation writes it.",
        )


def _find_start(folder: Path, continue_training: bool, only_validate: bool) -> Path | None:
    """Return the checkpoint in a run folder to resume from, None for a new run, which must not overwrite another."""
    existing = next((folder / name for name in TO_CONTINUE if (folder / name).is_file()), None)
    is_finished = existing is not None and existing.name == FINAL
    if only_validate and not is_finished:
        raise MFMError(
            "E_NOT_FOUND", f"{folder}: no finished training here ({FINAL}). Train first, or continue with --c."
        )
    if continue_training and existing is None:
        raise MFMError("E_NOT_FOUND", f"{folder}: no checkpoint to continue from. Start without --c.")
    if existing is not None and not (continue_training or only_validate):
        raise MFMError(
            "E_EXISTS",
            f"{folder}: {'a finished' if is_finished else 'an unfinished'} training is here and is not overwritten. "
            "Continue it with --c, use another plan name (-p), or move the folder away.",
        )
    return existing


def _build_checked_network(plans: dict[str, Any], configuration: str) -> nn.Module:
    """Build the plan's network from trusted names before nnU-Net builds it; the settings must be readable."""
    block_of(plans)
    channels = PlansManager(plans).get_configuration(configuration).normalization_schemes
    return build_network(plans, configuration, len(channels), 2)


def _resolve_settings(
    plans: dict[str, Any],
    folder: Path,
    overrides: Sequence[str],
    pretrained: Reading | None,
    start_from: Path | None,
    network: nn.Module,
    num_cases: int,
) -> MFMBlock:
    """Resolve the settings of a run. A resumed one must keep its initial settings."""
    saved = run_settings.load_settings(folder, plans) if start_from is not None else None
    known, advice = None, advise_as_begun(saved.finetune) if saved is not None else []
    if pretrained is not None:
        known = pretrained.origin
        if start_from is None:
            advice = advise(family_of(network), num_cases, known["pretext"], has_decoder(pretrained, network))
    base = saved or block_of(plans)
    if start_from is None:
        base = dataclasses.replace(base, finetune=dataclasses.replace(base.finetune, checkpoint=None))
    block = run_settings.resolve(base, overrides, known, advice)
    if saved is not None:
        # Settings added since the run began are resolved on both sides.
        run_settings.require_same(run_settings.resolve(saved, (), None), block, folder)
    elif override(base, overrides).finetune.learning_rate is None:
        of = block.network, block.finetune.optimizer, "scratch" if known is None else "a checkpoint"
        rate = block.finetune.learning_rate
        logger.info("finetune.learning_rate=%g: the published rate of %s with %s from %s", rate, *of)
    return block


def _require_a_crop_each(block: MFMBlock, plans: dict[str, Any], configuration: str, num_gpus: int) -> None:
    manager = PlansManager(plans).get_configuration(configuration)
    batch_size = block.finetune.batch_size or manager.batch_size
    if batch_size < num_gpus:
        raise MFMError(
            "E_CONFIG",
            f"finetune.batch_size={batch_size}: -num_gpus {num_gpus} needs at least one crop per GPU. Use fewer GPUs, "
            "or a larger batch.",
        )
    if manager.batch_dice and batch_size % num_gpus:
        raise MFMError(
            "E_CONFIG",
            f"finetune.batch_size={batch_size}: {configuration} computes its Dice loss over the batches of all GPUs "
            f"(batch_dice), which must be equally large: set a multiple of -num_gpus {num_gpus}.",
        )


# Processes


@contextlib.contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """Use all cores for training on the CPU, one thread with a GPU; restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_cores() if device.type == "cpu" else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
