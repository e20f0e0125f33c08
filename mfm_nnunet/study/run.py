"""Run a study from request to report: check everything first, plan, train the cells, write the table."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import mfm_nnunet
from mfm_nnunet import workspace
from mfm_nnunet.dataset import IMAGE_TASKS, DatasetJson
from mfm_nnunet.device import pick_device
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError
from mfm_nnunet.fields import takes
from mfm_nnunet.files import atomic_write, digest_of, shown, write_json
from mfm_nnunet.jobs.preflight import (
    RawDataset,
    check_labelled_cases,
    check_settings,
    check_start,
    configuration_of,
    hash_checkpoint,
    prepare_corpus,
    preprocess_plan,
    read_raw_dataset,
)
from mfm_nnunet.plan import Plan
from mfm_nnunet.reports.html import FILE, write_report
from mfm_nnunet.reports.progress import Stages
from mfm_nnunet.study import cells as running
from mfm_nnunet.study.cells import TRAINING, list_commands, steps_left
from mfm_nnunet.study.design import Arm, Cell, parse_arms
from mfm_nnunet.study.evaluation import METRICS, RESULT, require_library
from mfm_nnunet.study.folder import (
    LIKE,
    OWN,
    Study,
    begin_study,
    find_begun,
    link_corpus,
    read_study,
    write_study_folder,
)
from mfm_nnunet.study.report import TITLES, list_cautions, make_page, make_table, plot
from mfm_nnunet.study.summary import Tested, read_result, read_results, summarise_study
from mfm_nnunet.study_requests import StudyRequest
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

TABLE, PICTURE, COMMANDS = "table.md", "study.png", "commands.sh"


@takes(StudyRequest)
def run_study(request: StudyRequest) -> Path:
    """Train every arm with every number of labels and seed, and test all on one fixed split.

    Finished cells in the study folder are kept. Returns that folder, with ``table.md``, ``study.png`` and
    ``study.json``. Raises MFMError for bad input before anything is trained, CasesFailedError when cells failed and all
    others are done, StoppedError on a stop signal after the trainings have ended; the same call resumes.
    """
    arms = parse_arms(request.arms)
    for arm in arms.values():
        check_settings([*request.settings, *arm.settings])
    gpus = list_gpus(request.device)
    folder = study_folder(request.output, request.workspace).absolute()
    configuration, given, plans = request.configuration, None, None
    stages = Stages(2)
    with workspace.use(request.workspace) as here:
        dataset = read_labelled(here, request.dataset)
        arms, corpus = add_corpus(here, request, dataset, arms)
        if request.plans_name is not None:
            given = read_given_plan(here, dataset.name, request.plans_name, configuration)
            plans = f"{given.name} {digest_of(given.content)}"
        begun = find_begun(folder)
        plans = plans or (begun.question.plans if begun else name_own_plan(configuration, arms))
        study, cells = begin_study(folder, request, dataset, arms, plans, begun)
    # The last check before any work, so that it hides no other mistake.
    study = dataclasses.replace(study, library=require_library(study.dataset.task))
    with stages, running.lock_folder(folder) as lock, workspace.use_only(study.workspace) as own:
        stages.begin("Plan and preprocess")
        write_study_folder(study, dataset)
        plan = prepare_data(own, study, given)
        if corpus is not None:
            link_corpus(study, corpus)
            prepare_corpus(own, plan, configuration, corpus.name, study.folds[0].train)
        check_arms(study, arms, plan, min(cell.num_labels for cell in cells), request.accept_licence)
        check_labelled_cases(
            study.linked_cases(), plan.content["image_reader_writer"], study.dataset_json, f"{dataset.name}, test split"
        )
        # Written only now: a refused call leaves no trace.
        dataclasses.replace(study, plan_sha256=digest_of(plan.content)).write()
        stages.begin("Train, predict and score each cell")
        train_cells(study, cells, request, gpus, lock)
    return folder


def study_folder(output: str | Path | None, root: str | Path | None) -> Path:
    """Return the folder of a study: ``output``, else ``mfm_study`` in the workspace ``root``."""
    return Path(output) if output else Path(root or workspace.DEFAULT) / "mfm_study"


# The plan shared by all arms


def read_labelled(here: Workspace, dataset: str | int) -> RawDataset:
    """Read a labelled dataset."""
    raw = here.raw_folder(here.dataset_name(dataset))
    found = read_raw_dataset(raw)
    if found.table is not None:
        return found
    unlabelled = [case.name for case in found.cases if case.label is None]
    if found.is_corpus or len(unlabelled) == len(found.cases) or not DatasetJson.of(found.content).foreground:
        raise MFMError("E_CONFIG", f"{found.name} has no labels. Give a labelled dataset.")
    if len({case.modality for case in found.cases}) > 1 or "universal" in found.content.get("mfm", {}):
        raise MFMError("E_CONFIG", f"{found.name}: a study takes images of one modality and one dataset, and no union.")
    if unlabelled:
        reason = f"{len(unlabelled)} of {len(found.cases)} cases have no label, e.g. {unlabelled[0]}"
        raise MFMError("E_NOT_FOUND", f"{raw / 'dataset.json'}: {reason}. Add the labels, or remove these cases.")
    return found


def add_corpus(
    here: Workspace, request: StudyRequest, dataset: RawDataset, arms: Mapping[str, Arm]
) -> tuple[dict[str, Arm], Path | None]:
    """Return the arms with the corpus for those that use one, and its raw folder; None without such arms.

    Raises MFMError (E_CONFIG) for such arms without a corpus, a corpus without them, and whole-image labels.
    """
    users, corpus = [name for name, arm in arms.items() if arm.method], request.unlabelled
    if not users and corpus is None:
        return dict(arms), None
    if not users:
        advice = "Add one with semi.method, e.g. scratch,semi.method=consistency."
        raise MFMError("E_CONFIG", f"--unlabelled {corpus}: no arm learns from unlabelled images. {advice}")
    if corpus is None:
        raise MFMError(
            "E_CONFIG",
            f"arm {users[0]}: semi.method={arms[users[0]].method} needs unlabelled images. Add --unlabelled CORPUS, or "
            f"--unlabelled {dataset.name} for the cases that a subset leaves without label.",
        )
    if dataset.table is not None:
        raise MFMError("E_CONFIG", f"--unlabelled {corpus}: unlabelled images train with masks only. Leave it out.")
    raw = here.raw_folder(here.dataset_name(corpus))
    found = dataset if raw.name == dataset.name else read_raw_dataset(raw)
    described = f"{found.name} {found.digest}"
    return {
        name: dataclasses.replace(arm, unlabelled=described if arm.method else "") for name, arm in arms.items()
    }, raw


def read_given_plan(here: Workspace, dataset_name: str, plans_name: str, configuration: str) -> Plan:
    """Read the plan given with ``-p`` and refuse one that a study cannot train."""
    plan = Plan.read(here.plans_file(dataset_name, plans_name), f"Plan {dataset_name} again.")
    plan.configuration(configuration)
    _refuse_cascade(configuration)
    return Plan.of({**plan.content, "plans_name": plans_name})


def name_own_plan(configuration: str, arms: Mapping[str, Arm]) -> str:
    """Name the plan to be made, for :class:`Question`; refuse an impossible one before images are read."""
    _refuse_cascade(configuration)
    like = next((arm for arm in arms.values() if arm.file), Arm())
    try:
        planned = configuration_of(Path(like.file) if like.file else None, configuration)
    except MFMError as error:
        if error.code != "E_MODEL_MISMATCH":
            raise
        raise MFMError(error.code, f"{error.message} Or name a plan that all arms fit with -p.") from error
    if planned != configuration:
        reason = f"{like.file} was pretrained for {planned}. Give -c {planned}, or a plan with -p."
        raise MFMError("E_CONFIG", f"-c {configuration}: {reason}")
    return f"{LIKE} {like.sha256}" if like.file else OWN


def _refuse_cascade(configuration: str) -> None:
    if configuration == "3d_cascade_fullres":
        raise MFMError("E_CONFIG", "-c 3d_cascade_fullres: a study trains one stage. Use 3d_fullres or 3d_lowres.")


def prepare_data(own: Workspace, study: Study, given: Plan | None) -> Plan:
    """Make or copy the plan of a study in its workspace ``own``, preprocess the pool, and return the plan.

    Raises MFMError (E_CONFIG) if the plan differs from that of earlier calls; a plan just made is then removed.
    """
    name, configuration = study.question.dataset, study.question.configuration
    file = own.preprocessed / name / f"{study.plans_name}.json"
    is_new = not file.is_file()
    if is_new and given is not None:
        write_json(file, given.content)
    elif is_new:
        mfm_nnunet.plan_and_preprocess(
            [name],
            configurations=[configuration],
            like=_find_like(study),
            plans_name=study.plans_name,
            workspace=own.root,
            preprocess=False,
        )
    plan = Plan.read(file, "Remove the study folder and start again.")
    if study.plan_sha256 not in (None, digest_of(plan.content)):
        if is_new:
            file.unlink()
        raise MFMError(
            "E_CONFIG",
            f"{file}: not the plan with which the cells of this study were trained. A new plan depends on the GPU and "
            "the version of mfm_nnunet: run the study where it began, or put the old plan back, or start again in "
            "another folder (-o).",
        )
    preprocess_plan(own, plan, configuration)
    return plan


def _find_like(study: Study) -> Path | None:
    """Return the checkpoint that the study's own plan fits, even if this call does not compare it; None without one."""
    kind, _, wanted = study.question.plans.partition(" ")
    if kind != LIKE:
        return None
    files = [Path(arm.file) for arm in study.arms.values() if arm.file and arm.sha256 == wanted]
    for file in files:
        if file.exists() and hash_checkpoint(file) == wanted:
            return file
    reason = f"the plan of this study fits a checkpoint that is no longer at {' or '.join(map(str, files))}"
    raise MFMError("E_NOT_FOUND", f"{study.folder}: {reason}. Put it back, or give it again as an arm.")


def check_head(dataset: DatasetJson, head: str) -> None:
    """Raise MFMError (E_CONFIG) for a head where the dataset has masks."""
    if head and dataset.task not in IMAGE_TASKS:
        raise MFMError("E_CONFIG", f"head={head}: the dataset has masks, and heads are for labels of whole images.")


def check_arms(
    study: Study, arms: Mapping[str, Arm], plan: Plan, fewest_labels: int, licence: str | None = None
) -> None:
    """Raise MFMError (E_MODEL_MISMATCH, E_CONFIG and others) if the training of an arm would be refused."""
    for name, arm in arms.items():
        settings = (*study.question.settings, *arm.settings)
        checkpoint = Path(arm.file) if arm.file else None
        try:
            check_head(study.dataset, arm.head)
            check_start(
                plan, study.question.configuration, fewest_labels, settings, checkpoint, study.dataset.task, licence
            )
        except MFMError as error:
            advice = ""
            if error.code == "E_MODEL_MISMATCH":
                advice = (
                    f" All arms share the plan {plan.name}. Give a plan that fits all with -p, or first the checkpoint "
                    "that it should fit; once something was trained, in a new folder (-o)."
                )
            elif checkpoint is None:
                advice = " To change a setting of one arm only: NAME=CHECKPOINT,finetune.X=Y."
            raise MFMError(error.code, f"arm {name}: {error.message}{advice}") from error


# The cells, and the report


def train_cells(study: Study, cells: Sequence[Cell], request: StudyRequest, gpus: Sequence[str], lock: int) -> None:
    """Run all unfinished cells, and update table and picture after each.

    Finished cells are scored again if another version of the library scored them, so that all scores in the table come
    from the same one. Raises CasesFailedError if cells failed, after all others are done.
    """
    todo = [cell for cell in cells if not (study.cell_folder(cell) / RESULT).is_file()]
    finished = read_results(study.folder, study.asked)
    again = [cell for cell, result in finished.items() if result.get("library") != study.library]
    default = 1 if pick_device(request.device).type == "mps" else len(gpus) or workspace.num_cores()
    num_jobs = min(request.jobs or default, max(1, len(todo) + len(again)))
    with atomic_write(study.folder / COMMANDS) as handle:
        handle.write(list_commands(study, request.device, request.accept_licence).encode("utf-8", "surrogateescape"))
    logger.info("%d cells, %d of them finished; %d at a time", len(cells), len(cells) - len(todo), num_jobs)
    for caution in list_cautions(study):
        logger.warning("%s", caution)
    if again:
        logger.info("%d finished cells are scored again with the installed version of the library", len(again))

    def finish(cell: Cell, seconds: dict[str, float]) -> str:
        folder = study.cell_folder(cell)
        result = read_result(folder)
        write_json(folder / RESULT, {**result, "seconds": {**result.get("seconds", {}), **seconds}})
        for file in folder.glob("results/*/*/fold_*/checkpoint_best.pth"):  # never tested, and as large as the final
            with contextlib.suppress(OSError):
                file.unlink()
        renew(study.folder)
        metric = METRICS[study.dataset.task][0]
        mean = Tested.of([result], study.question.subjects).mean(result, metric)
        return f"{TITLES[metric]} {mean:.3f} in {sum(seconds.values()):.0f} s"

    times = [finished[cell].get("seconds", {}) for cell in cells if cell in finished]
    failures = running.run_cells(
        again + todo,
        lambda cell: steps_left(study, cell, request.device, request.accept_licence),
        running.share_computer(num_jobs, gpus),
        study.folder / "logs",
        finish,
        [sum(seconds.values()) for seconds in times if TRAINING in seconds],
        lock,
    )
    renew(study.folder, failures)
    if failures:
        raise CasesFailedError(failures, len(cells) + len(again), "cells")


def renew(folder: Path, failures: Sequence[CaseFailure] = ()) -> None:
    """Rewrite ``table.md``, ``study.png`` and the results in ``study.json`` from the finished cells.

    Earlier failures stay in the report until their cells are finished. Raises MFMError (E_NOT_FOUND) when the folder
    contains no study.
    """
    study = read_study(folder)
    study = dataclasses.replace(study, results=summarise_study(study, read_results(folder, study.asked), failures))
    study.write()
    with atomic_write(folder / TABLE) as handle:
        handle.write(shown(make_table(study)).encode())
    plot(folder / PICTURE, study)
    write_report(lambda: make_page(study, folder / PICTURE), folder / FILE)


def list_gpus(device: str) -> list[str]:
    """List the GPUs to share among cells, as in CUDA_VISIBLE_DEVICES; empty on the CPU."""
    if pick_device(device).type != "cuda":
        return []
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: torch.cuda.device_count()] or [str(number) for number in range(torch.cuda.device_count())]
