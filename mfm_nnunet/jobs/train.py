"""From the names on a command line to a trained fold: check everything first, then train and validate.

What can be refused is refused before the first file is written. A finished or stopped run is never overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from mfm_nnunet.checkpoint import full_disk_named, load_weights, remove_leftovers, weights_only_forced
from mfm_nnunet.children import call_recorded, run_processes
from mfm_nnunet.device import out_of_memory_is_an_error, pick_device
from mfm_nnunet.errors import MFMError, about
from mfm_nnunet.fields import takes
from mfm_nnunet.files import inside, refuse_links
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune import settings as run_settings
from mfm_nnunet.finetune.advice import Family, advised, as_begun
from mfm_nnunet.finetune.checks import (
    check_data,
    check_previous_stage,
    checkpoint_to_start_from,
    find_trainer,
    read_dataset_json,
)
from mfm_nnunet.finetune.datasets import next_stage_checked, use_checked_data
from mfm_nnunet.finetune.pretrained import describe, has_decoder, transfer_into
from mfm_nnunet.finetune.splits import Split
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
from mfm_nnunet.models.networks import build_network, check_architecture
from mfm_nnunet.models.precision import require_scaled_fp16
from mfm_nnunet.plan import read_plans
from mfm_nnunet.planning.recipes import apply_recipe
from mfm_nnunet.processes import StopFlag, stop_on_signal
from mfm_nnunet.requests import TrainRequest
from mfm_nnunet.settings import MFMBlock, block_of, override, to_dict
from mfm_nnunet.workspace import Workspace, num_cores, use

logger = logging.getLogger(__name__)

_LESS_MEMORY = (
    "End what else uses the device, or train with less: plan with a smaller --memory-gb (where the plan is like a "
    "checkpoint: --set finetune.batch_size=1). Once an epoch is saved, --c goes on with the same plan and settings "
    "only: for others move the fold's folder away first."
)
_LESS_MEMORY_TO_VALIDATE = (
    "The training is finished and saved. Validate it with --val, when nothing else uses the device or with -device cpu."
)


@dataclasses.dataclass(frozen=True)
class Job:
    """One fold to train: checked, and plain enough to be sent to another process."""

    trainer: str
    plans: dict[str, Any]
    configuration: str
    fold: int | str
    dataset_json: dict[str, Any]
    folder: Path
    device: str
    pretrained_weights: Path | None
    start_from: Path | None
    """The checkpoint of this run to go on from."""
    only_validate: bool
    save_probabilities: bool
    split: Split | None = None
    """The cases that train and validate, chosen once for all processes; None: the trainer chooses."""


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
    """Train and validate one fold (or ``"all"``); returns the fold's folder inside nnU-Net's model folder.

    Raises MFMError for everything that the user can repair, StoppedError after a stop signal.
    """
    dataset_name, configuration, fold = workspace.dataset_name(request.dataset), request.configuration, request.fold
    pretrained_weights = find_checkpoint(request.pretrained_weights) if request.pretrained_weights else None
    plans_file = workspace.plans_file(dataset_name, request.plans_name)
    plans = read_plans(plans_file, f"Plan {dataset_name} again.")
    if plans["dataset_name"] != dataset_name:  # nnU-Net reads and writes where the plan says
        raise MFMError(
            "E_CONFIG",
            f"{plans_file}: this plan is of {plans['dataset_name']}, so {plans['dataset_name']} would be trained. Plan "
            f"{dataset_name} again, or correct 'dataset_name' and preprocess.",
        )
    found = find_trainer(request.trainer)
    is_ours = issubclass(found, MFMTrainer)
    overrides = tuple(request.settings)
    if request.recipe is not None:
        block = block_of(plans)
        overrides = (*apply_recipe(request.recipe, block, block.network), *overrides)
    if overrides and not is_ours:
        raise MFMError("E_CONFIG", f"trainer {request.trainer} reads no settings; --set works with MFMTrainer.")
    dataset_json = read_dataset_json(workspace, dataset_name)
    split = check_data(workspace, dataset_name, plans, configuration, fold, dataset_json, found)
    results = workspace.results / dataset_name
    check_previous_stage(plans, configuration, results, found.__name__)
    folder = inside(results, f"{found.__name__}__{plans['plans_name']}__{configuration}", f"fold_{fold}")
    for written in (folder, folder.parent, folder / "validation"):
        refuse_links(written)
    start_from = checkpoint_to_start_from(folder, request.continue_training, request.only_validate)
    num_gpus = request.num_gpus
    used = pick_device("cuda" if num_gpus > 1 else request.device)
    if used.index:
        raise MFMError(
            "E_CONFIG",
            f"-device {used}: training takes the first GPU that is seen. Set CUDA_VISIBLE_DEVICES instead.",
        )
    remove_leftovers(folder)
    if is_ours:
        with about(plans_file):
            network = _checked_network(plans, configuration)
        block = _settings(plans, folder, overrides, pretrained_weights, start_from, network, len(split["train"]))
        run_settings.require_effect(overrides, block.finetune, used.type)
        groups.require_fitting(block.finetune, network, num_gpus > 1)
        groups.require_pretrained(block.finetune, block.finetune.checkpoint is not None)
        if not request.only_validate:
            require_scaled_fp16(block.finetune.precision, used)
        _require_a_crop_each(block, plans, configuration, num_gpus)
        if start_from is None:
            run_settings.save(folder, block, plans)
        logger.info("run folder: %s", folder)
        logger.info("settings:\n%s", run_settings.format_settings(block))
        plans = {**plans, "mfm": to_dict(block)}
    else:
        with about(plans_file):
            _require_known_architecture(plans, configuration)
    job = Job(
        request.trainer, plans, configuration, fold, dataset_json, folder,
        str(used), None if start_from else pretrained_weights, start_from, request.only_validate,
        request.save_probabilities, split,
    )  # fmt: skip
    if num_gpus > 1:
        _spawn(job, num_gpus)
    else:
        execute(job)
    return folder


def execute(job: Job) -> None:
    """Do the work of a job in this process (one of several under distributed training)."""
    device = torch.device(job.device)
    found = find_trainer(job.trainer)
    is_ours = issubclass(found, MFMTrainer)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    # Trainers of others do not look at the flag, so for them signals keep their usual effect.
    flagged = stop_on_signal() if is_ours else contextlib.nullcontext()
    # nnU-Net writes logs, plans and pictures itself, and its errors do not always name the file.
    with full_disk_named(job.folder), _threads(device), flagged as flag:
        with out_of_memory_is_an_error(_LESS_MEMORY_TO_VALIDATE if job.only_validate else _LESS_MEMORY):
            trainer = _trained(job, found, device, flag)
        with out_of_memory_is_an_error(_LESS_MEMORY_TO_VALIDATE), next_stage_checked():
            trainer.perform_actual_validation(job.save_probabilities)


def _trained(
    job: Job, trainer_class: type[nnUNetTrainer], device: torch.device, flag: StopFlag | None
) -> nnUNetTrainer:
    """The trainer of a job when its last epoch is done."""
    plans = {**job.plans, "continue_training": job.start_from is not None}
    trainer = trainer_class(plans, job.configuration, job.fold, job.dataset_json, device)
    if isinstance(trainer, MFMTrainer):
        trainer.stop_flag = flag
        trainer.split = job.split
        trainer.pretrained_checkpoint = job.pretrained_weights
    else:
        use_checked_data(trainer)
        if job.pretrained_weights is not None:
            transfer_into(trainer, job.pretrained_weights)
    if job.start_from is not None:
        if not isinstance(trainer, MFMTrainer):
            load_weights(job.start_from)  # says what is wrong with the file, which nnU-Net's loading would not
        with weights_only_forced():
            trainer.load_checkpoint(str(job.start_from))
    if not job.only_validate and trainer.current_epoch < trainer.num_epochs:
        trainer.run_training()
    return trainer


def _require_known_architecture(plans: dict[str, Any], configuration: str) -> None:
    """Raise MFMError (E_MODEL_UNSAFE) when trainers of others would import what the plan names, whatever it is."""
    manager = PlansManager(plans).get_configuration(configuration)
    to_import = manager.network_arch_init_kwargs_req_import
    check_architecture(manager.network_arch_class_name, manager.network_arch_init_kwargs, to_import)


def _checked_network(plans: dict[str, Any], configuration: str) -> nn.Module:
    """The plan's network, built from trusted names before nnU-Net builds it, once the settings can be read."""
    block_of(plans)
    channels = PlansManager(plans).get_configuration(configuration).normalization_schemes
    return build_network(plans, configuration, len(channels), 2)


def _settings(
    plans: dict[str, Any],
    folder: Path,
    overrides: Sequence[str],
    pretrained_weights: Path | None,
    start_from: Path | None,
    network: nn.Module,
    num_cases: int,
) -> MFMBlock:
    """The resolved settings of a run; a continued one has those that it began with.

    Raises MFMError (E_CONFIG) when a setting is impossible, or a continued run would get another one.
    """
    saved = run_settings.load(folder, plans) if start_from is not None else None
    about, advice = None, as_begun(saved.finetune) if saved is not None else []
    if pretrained_weights is not None:
        source = read_checkpoint(pretrained_weights)
        about = describe(pretrained_weights, source)
        if start_from is None:
            family: Family = "primus" if hasattr(network, "eva") else "resenc"
            advice = advised(family, num_cases, about["pretext"], has_decoder(source, network))
    base = saved or block_of(plans)
    if start_from is None:
        base = dataclasses.replace(base, finetune=dataclasses.replace(base.finetune, checkpoint=None))
    block = run_settings.resolve(base, overrides, about, advice)
    if saved is not None:
        # Settings that are younger than the run are resolved on both sides.
        run_settings.require_same(run_settings.resolve(saved, (), None), block, folder)
    elif override(base, overrides).finetune.learning_rate is None:
        of = block.network, block.finetune.optimizer, "scratch" if about is None else "a checkpoint"
        rate = block.finetune.learning_rate
        logger.info("finetune.learning_rate=%g: the published rate of %s with %s from %s", rate, *of)
    return block


def _require_a_crop_each(block: MFMBlock, plans: dict[str, Any], configuration: str, num_gpus: int) -> None:
    """Raise MFMError (E_CONFIG) when the crops of a step cannot be shared among the GPUs."""
    manager = PlansManager(plans).get_configuration(configuration)
    batch_size = block.finetune.batch_size or manager.batch_size
    if batch_size < num_gpus:
        raise MFMError(
            "E_CONFIG",
            f"finetune.batch_size={batch_size}: -num_gpus {num_gpus} needs at least one crop per GPU. Use fewer GPUs, "
            "or raise it.",
        )
    if manager.batch_dice and batch_size % num_gpus:
        raise MFMError(
            "E_CONFIG",
            f"finetune.batch_size={batch_size}: {configuration} computes its Dice loss over the batches of all GPUs "
            f"(batch_dice), which must be equally large: set a multiple of -num_gpus {num_gpus}.",
        )


@contextlib.contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """All cores for training on the CPU, one thread beside a GPU; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_cores() if device.type == "cpu" else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _spawn(job: Job, num_gpus: int) -> None:
    """Train on several GPUs of this computer, one process each."""
    if torch.cuda.device_count() < num_gpus:
        raise MFMError("E_CONFIG", f"-num_gpus {num_gpus}: this computer has {torch.cuda.device_count()} GPUs.")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as notes:
        run_processes(_execute_distributed, (notes, job, num_gpus, port), num_gpus, notes)


def _execute_distributed(rank: int, notes: str, job: Job, num_gpus: int, port: int) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"tcp://localhost:{port}", rank=rank, world_size=num_gpus)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # as mfm_train does in its own process
            call_recorded(notes, execute, job)
    finally:
        torch.distributed.destroy_process_group()
