"""Pretrain from a plan and a task's name: read the plan, split the corpus, build the network, start the engine."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import Selection, select
from mfm_nnunet.data.storage import Manifest, require_whole, stored_cases
from mfm_nnunet.device import default_workers, out_of_memory_is_an_error, pick_device
from mfm_nnunet.engine.pretraining import Corpus, Pretraining, make_streams
from mfm_nnunet.engine.probe import Probe, make_probe, others_waiting, prepare
from mfm_nnunet.engine.state import LONGER, STATE_FILES, flat
from mfm_nnunet.errors import MFMError, about
from mfm_nnunet.fields import takes
from mfm_nnunet.files import inside, read_json, remove_leftovers, write_json
from mfm_nnunet.finetune.pretrained import has_decoder, transfer_with_report
from mfm_nnunet.interchange.read import find_checkpoint, read_initial
from mfm_nnunet.jobs.report import report_pretraining, reported
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.transfer import Parts
from mfm_nnunet.plan import Plan
from mfm_nnunet.planning.recipes import apply_recipe
from mfm_nnunet.processes import World, join_world, leave_world, run_processes
from mfm_nnunet.requests import PretrainRequest
from mfm_nnunet.tasks.base import PretextTask, find_task
from mfm_nnunet.workspace import Workspace, num_cores, use

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"

_LESS_MEMORY = (
    "Compute a step in parts with --set pretrain.accumulation=2 (or more), add pretrain.activation_checkpointing=true, "
    "take a smaller pretrain.batch_size, or end what else uses the device."
)


@dataclasses.dataclass(frozen=True)
class PretrainRun:
    """All settings of a pretraining run, as addressed by ``--set``."""

    pretrain: mfm_settings.PretrainSettings
    pretext: Any
    """The pretext task's own Config."""
    seed: int
    num_workers: int | None
    probe: mfm_settings.ProbeSettings = dataclasses.field(default_factory=mfm_settings.ProbeSettings)


@takes(PretrainRequest)
def pretrain(request: PretrainRequest) -> Path:
    """Pretrain the network of a plan without labels and return the run's ``checkpoint_final.pth``.

    With ``num_gpus`` > 1 it runs in one process per GPU. Raises MFMError for bad input, StoppedError after a clean save
    on a stop signal, FloatingPointError when the loss becomes non-finite.
    """
    with use(request.workspace) as here:
        return launch(here, request) if request.num_gpus > 1 and not request.dry_run else pretrain_here(here, request)


def launch(here: Workspace, request: PretrainRequest) -> Path:
    """Run :func:`pretrain_here` in ``request.num_gpus`` processes and return the final checkpoint.

    An error in a process is raised here. A signal reaches all processes, and each saves before it ends.
    """
    num_gpus = request.num_gpus
    job = check(here, request)  # before starting processes, each of which would report the same error
    require_divisible(job.resolved.pretrain.batch_size, job.resolved.pretrain.accumulation, num_gpus)
    if job.device.type == "cuda" and torch.cuda.device_count() < num_gpus:
        raise MFMError("E_CONFIG", f"-num_gpus {num_gpus}: this computer has {torch.cuda.device_count()} GPUs.")
    run_processes(pretrain_here, (here, job.request), num_gpus)
    return job.folder / "checkpoint_final.pth"


def require_divisible(batch_size: int, accumulation: int, num_processes: int) -> None:
    """Raise MFMError (E_CONFIG) unless a batch divides equally into parts and processes, one item or more each."""
    if batch_size % (accumulation * num_processes):
        raise MFMError(
            "E_CONFIG",
            f"pretrain.batch_size={batch_size}: not a multiple of pretrain.accumulation={accumulation} x "
            f"{num_processes} process{'es' * (num_processes > 1)}. Change one of them.",
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """A requested run, checked as far as possible before the data are read."""

    request: PretrainRequest
    """Its settings include those of the recipe."""
    plan: Plan
    selection: Selection
    files: dict[str, Path]
    task_class: type[PretextTask]
    resolved: PretrainRun
    folder: Path
    device: torch.device
    probe: Probe | None = None


def check(here: Workspace, request: PretrainRequest) -> Job:
    """Check the requested run without writing anything. Raises MFMError for errors the user can fix."""
    dataset_name, configuration = here.dataset_name(request.dataset), request.configuration
    request = dataclasses.replace(request, plans_name=here.choose_plan(dataset_name, request.plans_name))
    assert request.plans_name is not None, "it is chosen"
    plans_file = here.plans_file(dataset_name, request.plans_name)
    plan = Plan.read(plans_file, f"Plan {dataset_name} again.")
    selection, files = select_cases(here, dataset_name, plan, configuration)
    task_class = find_task(request.pretext)
    with about(plans_file):
        block = plan.mfm
    name = "__".join(
        filter(None, ("mfm_pretrain", task_class.name, request.plans_name, configuration, request.run_name))
    )
    folder = inside(here.results, dataset_name, name)
    _require_free(folder, request.continue_training)
    run = PretrainRun(block.pretrain, task_class.Config(), block.seed, block.num_workers)
    if request.continue_training and (folder / SETTINGS).is_file():
        run, of_probe = _as_begun(folder, run)
        request = dataclasses.replace(request, probe=of_probe if request.probe is None else request.probe)
    if request.recipe is not None:
        of_recipe = apply_recipe(request.recipe, run, block.network, request.pretext)
        request = dataclasses.replace(request, recipe=None, settings=(*of_recipe, *request.settings))
    resolved = mfm_settings.override(run, request.settings)
    mfm_settings.require_in_range(mfm_settings.MFMBlock(seed=resolved.seed, num_workers=resolved.num_workers))
    mfm_settings.require_legal(resolved.pretrain, "pretrain.")
    require_divisible(resolved.pretrain.batch_size, resolved.pretrain.accumulation, 1)
    probe = make_probe(here, request.probe, plan, configuration, resolved.probe, resolved.seed)
    device = pick_device(request.device)
    return Job(request, plan, selection, files, task_class, resolved, folder, device, probe)


def _as_begun(folder: Path, planned: PretrainRun) -> tuple[PretrainRun, str | None]:
    """Return the settings that the run in ``folder`` began with, and the dataset of its probe, if any."""
    file = folder / SETTINGS
    content = read_json(file, "Restore it, or move the folder away and start again.")
    with about(file):
        probe = content.get("probe") or {}
        own = {item.name: probe[item.name] for item in dataclasses.fields(planned.probe) if item.name in probe}
        begun = PretrainRun(
            mfm_settings.from_dict(mfm_settings.PretrainSettings, content.get("pretrain", {}), "pretrain."),
            mfm_settings.from_dict(type(planned.pretext), content.get("pretext_config", {}), "pretext."),
            mfm_settings.from_dict(mfm_settings.MFMBlock, {"seed": content.get("seed", planned.seed)}).seed,
            planned.num_workers,
            mfm_settings.from_dict(mfm_settings.ProbeSettings, own, "probe."),
        )
    return begun, probe.get("dataset")


def pretrain_here(here: Workspace, request: PretrainRequest) -> Path:
    """Pretrain in this process (one of several under torchrun) and return the final checkpoint."""
    job = check(here, request)
    world, used = join_world(job.device), job.device
    torch.set_num_threads(max(1, num_cores() // (world.size if used.type == "cpu" else 1)))
    try:
        with out_of_memory_is_an_error(_LESS_MEMORY):
            if used.type == "cuda":
                used = torch.device("cuda", world.local_rank) if world.size > 1 or used.index is None else used
                torch.cuda.set_device(used)  # allocates the first memory
                torch.backends.cudnn.benchmark = True  # all patches have the same size
            return _pretrain(job, used, world)
    finally:
        leave_world(world)


def _pretrain(job: Job, device: torch.device, world: World) -> Path:
    require_divisible(job.resolved.pretrain.batch_size, job.resolved.pretrain.accumulation, world.size)
    run, notes = _prepare(job, device, world)
    if job.request.dry_run:
        _describe_run(run)
        run.rehearse(job.request.continue_training)
        logger.info("dry run: nothing was written")
        return job.folder / "checkpoint_final.pth"
    if job.probe is not None:
        with others_waiting(world):
            if world.is_main:
                prepare(job.probe)
    if world.is_main:
        _announce(run, is_new=not job.request.continue_training)
        for note in job.selection.notes():
            logger.warning("%s: %s", job.folder.parent.name, note)
        for note in notes:
            logger.info("%s", note)
    report = partial(report_pretraining, run.folder, run.description) if world.is_main else lambda _: None
    with reported(report, run.folder):
        return run.train(job.request.continue_training)


def select_cases(
    here: Workspace, dataset_name: str, plan: Plan, configuration: str
) -> tuple[Selection, dict[str, Path]]:
    """Return the corpus's current cases and the preprocessed volume of each for a configuration."""
    identifier = plan.configuration(configuration).data_identifier
    if "data_identifier" not in plan.content["configurations"][configuration]:
        raise MFMError("E_CONFIG", f"{configuration} is a cascade stage; pretrain 3d_fullres instead.")
    beside = inside(here.preprocessed, dataset_name)
    folder = inside(beside, identifier)
    selection = select(inside(here.raw, dataset_name), beside, stored_cases(folder))
    if not selection.cases:
        raise MFMError(
            "E_NOT_FOUND",
            f"{dataset_name} has no preprocessed data for {configuration} of plan {plan.name}. "
            f"Run: mfm_plan_and_preprocess -d {dataset_name} -c {configuration} -pl {plan.name}",
        )
    # Crops are drawn in the order of the files, so that runs started by an earlier version resume identically.
    selection = dataclasses.replace(selection, cases=sorted(selection.cases, key=lambda case: f"{case.name}.b2nd"))
    require_whole(folder, selection.names)
    return selection, {name: folder / f"{name}.b2nd" for name in selection.names}


def split_subjects(
    cases: Sequence[Case], fraction: float, seed: int, volumes_per_item: int = 1
) -> tuple[set[str], set[str]]:
    """Return the names of the training and validation cases, split by subject; deterministic in corpus and seed.

    More subjects than ``fraction`` are held out if it gives fewer volumes than an item is mixed from, and enough are
    left to train. Raises MFMError (E_CONFIG) for a single subject, unless ``fraction`` is 0: then training cases
    validate.
    """
    names = {case.name for case in cases}
    if fraction == 0:
        return names, names
    if not 0 < fraction < 1:
        raise MFMError("E_CONFIG", f"pretrain.validation_fraction={fraction}: legal values are 0 up to below 1.")
    subjects = sorted({case.subject for case in cases})
    if len(subjects) < 2:
        raise MFMError(
            "E_CONFIG",
            "the corpus has a single subject, so none can be held out for the validation loss. Add scans, or use "
            "--set pretrain.validation_fraction=0 to validate on the training scans.",
        )
    count = min(max(1, round(fraction * len(subjects))), len(subjects) - 1)
    validation = _of_subjects(cases, subjects, count, seed)
    while len(validation) < volumes_per_item and len(names) - len(validation) > volumes_per_item:
        count += 1
        validation = _of_subjects(cases, subjects, count, seed)
    return names - validation, validation


def _of_subjects(cases: Sequence[Case], subjects: Sequence[str], count: int, seed: int) -> set[str]:
    """Return the names of the cases of ``count`` random subjects."""
    held_out = set(random.Random(seed).sample(subjects, count))
    return {case.name for case in cases if case.subject in held_out}


def _prepare(job: Job, device: torch.device, world: World) -> tuple[Pretraining, list[str]]:
    """Make the run, up to its first step, and the notes on its corpus."""
    plan, task_class, resolved, cases, files = job.plan, job.task_class, job.resolved, job.selection.cases, job.files
    configuration = job.request.configuration
    patch_size = tuple(int(size) for size in plan.configuration(configuration).patch_size)
    num_inputs = plan.configuration(configuration).num_channels
    torch.manual_seed(resolved.seed)
    num_outputs = task_class.num_outputs(resolved.pretext, num_inputs)
    with about(f"{plan.name}.json"):
        network = build_network(plan.content, configuration, num_inputs, num_outputs)
    started_from = _start_from(job, network)
    backbone = make_backbone(network, patch_size, task_class.restoring)
    config = task_class.resolve(resolved.pretext, backbone.geometry())
    task = task_class(config, backbone)
    _require_enough_items(resolved.pretrain, task_class.smallest_batch(config))
    training, validation = split_subjects(
        cases, resolved.pretrain.validation_fraction, resolved.seed, task_class.volumes_per_item(config)
    )
    streams = make_streams(
        Corpus(cases, files, training, validation), task_class, config, patch_size, resolved.pretrain, resolved.seed
    )
    # Hashed from the preprocessed files, so that a run can resume on a machine without the raw scans.
    manifest = Manifest.read(next(iter(files.values())).parent)
    sizes = {case.name: manifest.source_sizes(case.name, len(case.images) or num_inputs) for case in cases}
    description = {
        "format": mfm_settings.FORMAT,
        "kind": "pretrained",
        "pretext": task_class.name,
        "pretext_config": mfm_settings.to_dict(config),
        "pretrain": mfm_settings.to_dict(resolved.pretrain),
        "seed": resolved.seed,
        "plans": plan.shared(),
        "configuration": configuration,
        "patch_size": list(patch_size),
        "num_inputs": num_inputs,
        "num_outputs": num_outputs,
        "corpus": {
            "num_cases": len(cases),
            "num_subjects": len({case.subject for case in cases}),
            "hash": corpus.corpus_hash(cases, sizes),
        },
        "versions": {package: version(package) for package in ("mfm_nnunet", "nnunetv2", "torch")},
        "citations": [*task_class.citations, *(started_from.pop("citations", None) or [])],
        **started_from,
        "trained": "network" if task_class.trains_decoder else "encoder",
    }
    workers = default_workers(world.size) if resolved.num_workers is None else resolved.num_workers
    run = Pretraining(
        task, resolved.pretrain, streams.training, streams.validation, job.folder, device, description,
        resolved.seed, workers, world, job.probe,
    )  # fmt: skip
    return run, streams.notes


def _start_from(job: Job, network: nn.Module) -> dict[str, Any]:
    """Transfer the initial weights of a new run, and return their licence, citations and origin for its checkpoints.

    A resumed run reads them off the report that it wrote when it began.
    """
    request, report = job.request, job.folder / "transfer.json"
    if request.pretrained_weights is None and not (request.continue_training and report.is_file()):
        return {}
    if request.continue_training:
        known = read_json(report, "Start the run again under another --run-name.")
    else:
        reading = read_initial(find_checkpoint(request.pretrained_weights or ""), network, request.accept_licence)
        known = {**reading.origin, "checkpoint": reading.origin["name"], "layout": reading.layout}
        job.folder.mkdir(parents=True, exist_ok=True)
        parts: Parts = "encoder_decoder" if has_decoder(reading, network) else "encoder"
        plans, configuration = job.plan.content, request.configuration
        transfer_with_report(reading, network, plans, configuration, job.folder, parts, "fit")
        reading.release()
    source = {"layout": known["layout"], "file": known["checkpoint"], "sha256": known["sha256"]}
    source |= {"address": known["address"]} if "address" in known else {}
    source["notes"] = [f"pretraining continued from these weights ({known.get('pretext') or 'unknown task'})"]
    own = {name: known[name] for name in ("licence", "citations") if known.get(name)}
    return {**own, "source": source}


def _require_enough_items(settings: mfm_settings.PretrainSettings, smallest: int) -> None:
    """Refuse steps with fewer items than the task needs to compare."""
    part = settings.batch_size // settings.accumulation
    if part < smallest:
        parts = f" in {settings.accumulation} parts of {part}" if settings.accumulation > 1 else ""
        raise MFMError(
            "E_CONFIG",
            f"pretrain.batch_size={settings.batch_size}{parts}: this pretext task compares items with each other and "
            f"needs at least {smallest}. Use a larger batch"
            + (" or a smaller pretrain.accumulation." if parts else "."),
        )


def _require_free(folder: Path, continue_training: bool) -> None:
    if continue_training and not any((folder / f).exists() for f in STATE_FILES):
        raise MFMError("E_NOT_FOUND", f"{folder}: there is no run to continue. Start it without --c.")
    if not continue_training and any((folder / f).exists() for f in ("resume.pth", "checkpoint_final.pth")):
        raise MFMError(
            "E_EXISTS",
            f"{folder}: there is already a run here. Continue it with --c, or name the new one with --run-name.",
        )


def _announce(run: Pretraining, is_new: bool) -> None:
    """Describe the run; write the settings of a new run into its folder, and keep those of a resumed one."""
    run.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run.folder)
    names = ("pretext", "pretext_config", "pretrain", "seed", "versions")
    values = {**{name: run.description[name] for name in names}, "num_workers": run.num_workers}
    if run.probe is not None:
        values["probe"] = run.probe.description()
    if is_new:
        write_json(run.folder / SETTINGS, values, indent=2)
    elif (run.folder / SETTINGS).is_file():
        begun = read_json(run.folder / SETTINGS, "Restore it, or move the folder away and start again.")
        if begun.get("pretrain", {}).get("epochs", math.inf) < run.settings.epochs:
            logger.info(LONGER, begun["pretrain"]["epochs"], run.settings.epochs)
            write_json(run.folder / SETTINGS, {**begun, "pretrain": values["pretrain"]}, indent=2)
    _describe_run(run)


def _describe_run(run: Pretraining) -> None:
    """Log the settings of a run, its data and its network."""
    about_run = run.description
    millions = sum(parameter.numel() for parameter in run.task.backbone.network.parameters()) / 1e6
    logger.info("run folder: %s", run.folder)
    values = {name: about_run[name] for name in ("pretrain", "seed")}
    shown = flat({"pretext": about_run["pretext_config"], **values, "num_workers": run.num_workers})
    logger.info("settings:\n%s", "\n".join(f"  {name} = {value}" for name, value in shown.items()))
    logger.info(
        "%s on %d volumes, %d held out; network of %.2f million parameters, patch %s, batch %d, on %s",
        run.description["pretext"], len(run.training.files), len(run.validation.files), millions,
        "x".join(map(str, run.description["patch_size"])), run.settings.batch_size, run.device,
    )  # fmt: skip
