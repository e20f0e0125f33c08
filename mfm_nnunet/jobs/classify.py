"""Train and validate one fold of a dataset with labels of whole images."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mfm_nnunet import metrics
from mfm_nnunet.data.corpus import Selection
from mfm_nnunet.data.label_table import LabelTable, find_label_table, read_label_table
from mfm_nnunet.data.listings import read_csv
from mfm_nnunet.data.storage import stale_cases
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import (
    default_workers,
    out_of_memory_is_an_error,
    pick_device,
    require_scaled_fp16,
    training_threads,
)
from mfm_nnunet.engine.state import STATE_FILES
from mfm_nnunet.errors import MFMError, about
from mfm_nnunet.files import (
    digest_of,
    inside,
    read_json,
    refuse_links,
    remove_leftovers,
    report_full_disk,
    write_json,
)
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune import settings as run_settings
from mfm_nnunet.finetune.classification import (
    FINAL,
    ClassificationRun,
    LabelledImages,
    predict_validation,
    write_model,
)
from mfm_nnunet.finetune.loading import seed_everything, seed_of
from mfm_nnunet.finetune.pretrained import transfer_with_report, untrained_names
from mfm_nnunet.finetune.probing import cached_features, fit_probe
from mfm_nnunet.finetune.splits import choose_split, ensure_splits
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.interchange.read import read_initial
from mfm_nnunet.jobs.dry_run import scratch_results
from mfm_nnunet.jobs.pretrain import select_cases
from mfm_nnunet.jobs.report import report_classifier, reported
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.classifier import Classifier
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import Plan
from mfm_nnunet.requests import TrainRequest
from mfm_nnunet.settings import FinetuneSettings, MFMBlock
from mfm_nnunet.signals import stop_on_signal
from mfm_nnunet.tasks.classification import ClassificationTask
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

_LESS_MEMORY = "End what else uses the device, or take a smaller --set finetune.batch_size. --c resumes a run."


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked fold to train."""

    head: str
    plan: Plan
    images: LabelledImages
    block: MFMBlock
    folder: Path
    device: torch.device
    init_args: dict[str, Any]
    pretrained: Reading | None
    num_folds: int


def train_classifier(
    here: Workspace,
    request: TrainRequest,
    plan: Plan,
    dataset: DatasetJson,
    overrides: Sequence[str],
    weights: Path | None,
) -> Path:
    """Train and validate a fold and return its folder. ``weights`` is the initial checkpoint.

    Raises MFMError for errors the user can fix, StoppedError after a stop signal.
    """
    job = _check(here, request, plan, dataset, overrides, weights)
    if request.dry_run:
        with scratch_results() as folder, training_threads(job.device), out_of_memory_is_an_error(_LESS_MEMORY):
            if job.head != "probe" and not request.only_validate:
                _make_run(dataclasses.replace(job, folder=folder)).rehearse()
        logger.info("dry run: nothing was written into %s", job.folder)
        return job.folder
    job.folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(job.folder)
    logger.info("run folder: %s", job.folder)
    with (
        reported(partial(report_classifier, job.folder), job.folder),
        report_full_disk(job.folder),
        training_threads(job.device),
        stop_on_signal(),
        out_of_memory_is_an_error(_LESS_MEMORY),
    ):
        if job.head == "probe":
            _probe(job)
        else:
            _train(job, request)
        _pool_folds(job)
    return job.folder


def _check(
    here: Workspace,
    request: TrainRequest,
    plan: Plan,
    dataset: DatasetJson,
    overrides: Sequence[str],
    weights: Path | None,
) -> Job:
    """Check everything before anything is written."""
    head, configuration = request.head or "linear", request.configuration
    if request.num_gpus > 1:
        raise MFMError("E_CONFIG", f"-num_gpus {request.num_gpus}: classifiers train on one GPU. Leave it out.")
    dataset_name = plan.dataset_name
    selection, files = select_cases(here, dataset_name, plan, configuration)
    data = next(iter(files.values())).parent
    if stale := stale_cases(data, selection.names, plan.preprocessing_digest(configuration, dataset)):
        raise MFMError(
            "E_CONFIG",
            f"{data}: {len(stale)} cases were preprocessed for another plan, e.g. {stale[0]}. Run: "
            f"mfm_plan_and_preprocess -d {dataset_name} -c {configuration} -pl {plan.name}",
        )
    table, selection = _labels(here, dataset_name, dataset, selection)
    split = choose_split(request.fold, data.parent, selection, table.make_splits, keep=not request.dry_run)
    folder = inside(
        here.results, dataset_name, f"MFMTrainer_{head}__{plan.name}__{configuration}", f"fold_{request.fold}"
    )
    for written in (folder, folder.parent):
        refuse_links(written)
    is_resumed = _is_resumed(folder, request, head)
    device = pick_device(request.device)
    network = build_network(plan.content, configuration, plan.configuration(configuration).num_channels, 1)
    pretrained = None
    if weights is not None and not is_resumed:
        pretrained = read_initial(weights, network, request.accept_licence)
    planned = _mirror_no_sides(plan.mfm, table)
    if is_resumed:
        block = run_settings.resolve_resumed(planned, overrides, None, folder, plan.content)
    else:
        block = run_settings.resolve_new(planned, overrides, pretrained, network, len(split["train"]))
    _require_fitting(block, head, device, network)
    patch_size = tuple(int(size) for size in plan.configuration(configuration).patch_size)
    images = LabelledImages(table, split, files, patch_size, "tiles" if head == "mil" else "whole")
    init_args = {
        "plans": plan.shared(),
        "configuration": configuration,
        "fold": request.fold,
        "dataset_json": {**dataset.shared(), "classes": list(table.classes)},
    }
    is_longer = is_resumed and run_settings.is_longer(folder, block, plan.content)
    if not request.dry_run:
        _write_description(folder, plan, init_args, block if is_longer or not is_resumed else None)
    logger.info("settings:\n%s", run_settings.format_settings(block))
    logger.info("%s", table.describe())
    logger.info("%d training and %d validation cases", len(split["train"]), len(split["val"]))
    num_folds = 0 if request.fold == "all" or request.dry_run else len(ensure_splits(data.parent, selection.names))
    return Job(head, plan, images, block, folder, device, init_args, pretrained, num_folds)


def _labels(
    here: Workspace, dataset_name: str, dataset: DatasetJson, selection: Selection
) -> tuple[LabelTable, Selection]:
    """Return the labels, and the labelled cases with their subjects."""
    file = find_label_table(inside(here.raw, dataset_name), inside(here.preprocessed, dataset_name))
    table = read_label_table(file, dataset, {*selection.names, *selection.missing})
    if unlabelled := [name for name in selection.names if name not in table.targets]:
        logger.warning("%s: %d cases have no label and are not used, e.g. %s", file, len(unlabelled), unlabelled[0])
    cases = [
        dataclasses.replace(case, subject=table.subjects[case.name])
        for case in selection.cases
        if case.name in table.targets
    ]
    return table, dataclasses.replace(
        selection, cases=cases, missing=[n for n in selection.missing if n in table.targets]
    )


def _is_resumed(folder: Path, request: TrainRequest, head: str) -> bool:
    """Return whether a run is resumed or only validated. A new run must not overwrite another."""
    is_begun = any((folder / name).is_file() for name in STATE_FILES) or (folder / FINAL).is_file()
    resumed = request.continue_training or request.only_validate
    if resumed and (head == "probe" or not any((folder / name).is_file() for name in STATE_FILES)):
        raise MFMError("E_NOT_FOUND", f"{folder}: there is no run to continue. Start it without --c and --val.")
    if is_begun and not resumed:
        raise MFMError(
            "E_EXISTS",
            f"{folder} holds a training, which is not overwritten. Continue it with --c, use another plan name (-p), "
            "or move the folder away.",
        )
    return resumed


def _pool_folds(job: Job) -> None:
    """Write ``crossvalidation.json`` once all folds are trained: scores of all cases, each predicted when held out."""
    folders = [job.folder.parent / f"fold_{fold}" for fold in range(job.num_folds)]
    files = [folder / "predictions.csv" for folder in folders]
    if not files or not all(file.is_file() for file in files):
        return
    table = job.images.table
    found: dict[str, list[float]] = {}
    for file in files:
        header, rows = read_csv(file)
        found |= {row[header[0]]: [float(row[name]) for name in header[1:]] for row in rows}
    if not set(found) <= set(table.targets):
        logger.warning("%s: the folds were trained on other cases, so they are not pooled", job.folder.parent)
        return
    subjects = [table.subjects[case] for case in found]
    result = metrics.evaluate_labels(
        table.task, table.classes, table.array(list(found)), np.array([*found.values()]), subjects
    )
    for name, score in result.items():
        if isinstance(score, dict) and "low" in score:
            own = [read_json(folder / "metrics.json", "Train it again.")[name]["value"] for folder in folders]
            score["mean_over_folds"] = float(np.mean(own)) if None not in own else None
    write_json(job.folder.parent / "crossvalidation.json", result)
    logger.info("all %d folds pooled: %s", job.num_folds, "\n".join(metrics.describe_scores(result)))


def _mirror_no_sides(block: MFMBlock, table: LabelTable) -> MFMBlock:
    """Switch mirroring off where a class names a side."""
    if not (block.finetune.mirroring and table.has_sides):
        return block
    logger.info("finetune.mirroring=False: a class is named after a side")
    return dataclasses.replace(block, finetune=dataclasses.replace(block.finetune, mirroring=False))


def require_of_classifier(settings: FinetuneSettings) -> None:
    """Raise MFMError (E_CONFIG) for settings that only make sense with masks."""
    if settings.mix != "none":
        raise MFMError(
            "E_CONFIG", f"finetune.mix={settings.mix}: masks are mixed, and this dataset has none. Leave it out."
        )
    if settings.train == "decoder":
        raise MFMError("E_CONFIG", "finetune.train=decoder: a classifier has no decoder. Use finetune.train=head.")


def _require_fitting(block: MFMBlock, head: str, device: torch.device, network: nn.Module) -> None:
    settings = block.finetune
    groups.require_fitting(settings, network, False)
    require_scaled_fp16(settings.precision, device)
    require_of_classifier(settings)
    if head == "probe" and settings.checkpoint is None:
        logger.warning("--head probe without -pretrained_weights measures random weights")
    elif settings.checkpoint is None and settings.train != "all":
        groups.require_pretrained(settings, False)


def _write_description(folder: Path, plan: Plan, init_args: Mapping[str, Any], block: MFMBlock | None) -> None:
    """Write the plan and dataset.json into the model folder, and the settings of a new run into the fold's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"plans": plan.content, "dataset": init_args["dataset_json"]}.items():
        write_json(folder.parent / f"{name}.json", content, indent=4)
    if block is not None:
        run_settings.save_settings(folder, block, plan.content)


def _build_classifier(job: Job) -> tuple[Classifier, set[str] | None]:
    """Build the classifier under the seed, with the checkpoint's encoder; return also what learns first."""
    settings, images = job.block.finetune, job.images
    seed_everything(seed_of(job.block.seed, "network", 0))
    configuration = job.init_args["configuration"]
    with about(f"{job.plan.name}.json"):
        network = build_network(job.plan.content, configuration, job.plan.configuration(configuration).num_channels, 1)
    classifier = Classifier(make_backbone(network, images.patch_size, "none"), job.head, images.table.num_outputs)
    new = None
    if job.pretrained is not None:
        report = transfer_with_report(
            job.pretrained, network, job.plan.content, configuration, job.folder, "encoder", settings.transfer
        )
        job.pretrained.release()
        new = groups.first_names(network, settings, untrained_names(report, network))
    if settings.train == "lora":
        seed_everything(seed_of(job.block.seed, "adapters", 0))
        groups.add_adapters(network, settings.lora_rank, settings.lora_alpha)
    return classifier, new


def _make_run(job: Job) -> ClassificationRun:
    classifier, new = _build_classifier(job)
    weights = torch.ones(1)
    if job.images.table.task != "regression":
        weights = torch.from_numpy(job.images.table.class_weights(job.images.split["train"]))
    task = ClassificationTask(classifier, job.images.table.task, weights)
    workers = default_workers() if job.block.num_workers is None else job.block.num_workers
    return ClassificationRun(task, job.images, job.block, job.folder, job.device, job.init_args, new, workers)


def _train(job: Job, request: TrainRequest) -> None:
    run = _make_run(job)
    classifier = run.task.classifier
    run.train(request.continue_training or request.only_validate)
    logits = predict_validation(run)
    with run.optimisation.averaged():
        write_model(job.folder, job.images, classifier, job.block, job.init_args, logits)


def _probe(job: Job) -> None:
    classifier, _ = _build_classifier(job)
    classifier = classifier.to(job.device)
    train, validation = job.images.split["train"], job.images.split["val"]
    origin = (job.block.finetune.checkpoint or {}).get("sha256") or f"seed {job.block.seed}"
    digest = digest_of([origin, job.images.patch_size, run_settings.plan_hash(job.plan.content)])
    features = cached_features(classifier, job.images, [*train, *validation], job.folder.parent, digest)
    logits, notes = fit_probe(classifier, job.images, features[: len(train)], features[len(train) :])
    result = write_model(job.folder, job.images, classifier, job.block, job.init_args, logits)
    write_json(job.folder / "metrics.json", {**result, "probe": notes})
    logger.info("probe: %s", json.dumps(notes))
