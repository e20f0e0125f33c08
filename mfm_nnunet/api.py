"""The jobs under the names that they had before; new code calls them on the package: ``mfm_nnunet.train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_nnunet import workspace as places
from mfm_nnunet.fields import takes
from mfm_nnunet.jobs import plan as preparation
from mfm_nnunet.jobs.checkpoint import convert_checkpoint, describe_checkpoint
from mfm_nnunet.jobs.plan import plan_and_preprocess
from mfm_nnunet.jobs.predict import predict
from mfm_nnunet.jobs.pretrain import pretrain
from mfm_nnunet.jobs.train import train
from mfm_nnunet.plan import read_plans
from mfm_nnunet.requests import StudyRequest
from mfm_nnunet.workspace import Workspace

if TYPE_CHECKING:
    from mfm_nnunet.study.design import Design

__all__ = [
    "convert_checkpoint",
    "describe_checkpoint",
    "plan_and_preprocess",
    "predict",
    "pretrain",
    "renew_study",
    "run_study",
    "train",
]


@takes(StudyRequest)
def run_study(request: StudyRequest) -> Path:
    """The label-efficiency study: every arm with every number of labels and seed, tested on one fixed split.

    ``arms`` are ``scratch``, ``CHECKPOINT`` or ``NAME=CHECKPOINT``, with settings of their own behind commas
    (``NAME=CHECKPOINT,finetune.parts=encoder``); ``labels`` and ``test`` are numbers of subjects or
    shares such as ``20%`` (``test`` also a file of case names), ``subjects`` a CSV that tells the subject of each case.
    All arms share one plan: the dataset's ``plans_name``, else one made from the pool like the first checkpoint. Cells
    that are finished in the study folder ``output`` are kept. Returns that folder, with ``table.md``, ``study.png`` and
    ``study.json``.

    Raises MFMError for bad input before anything is trained, CasesFailedError when cells failed and all others are
    done, StoppedError on a stop signal after the children have ended; the same call goes on.
    """
    from mfm_nnunet.study import arms as study_arms
    from mfm_nnunet.study import design as designs
    from mfm_nnunet.study import folder as folders
    from mfm_nnunet.study import plan as study_plan
    from mfm_nnunet.study import run as study
    from mfm_nnunet.study.evaluation import require_library

    compared = study_arms.parse_arms(request.arms)
    for arm in compared:
        study.check_settings([*request.settings, *arm.settings])
    study.visible_gpus(request.device)  # refuses a device that is not there
    folder = study_folder(request.output, request.workspace)
    with places.use(request.workspace) as here:
        name = here.dataset_name(request.dataset)
        cases, dataset_json = designs.labelled_cases(here, name)
        given = study_plan.given_plan(here, name, request.configuration, request.plans_name)
        design = folders.make_design(
            folder.absolute(),
            cases,
            dataset_json,
            dataset=name,
            configuration=request.configuration,
            plans=given[1]
            if given
            else folders.plans_of(folder) or study_plan.own_plan(request.configuration, compared),
            arms=compared,
            labels=[str(number) for number in request.labels],
            seeds=request.seeds,
            test=str(request.test),
            subjects=Path(request.subjects) if request.subjects else None,
            settings=tuple(request.settings),
            tolerance_mm=request.tolerance_mm,
            mirroring=request.mirroring,
        )
    library = require_library()  # last of what is checked before any work, so that it hides no other mistake
    with study.running.alone(design.folder) as lock, places.use_only(design.workspace) as own:
        folders.write_design(design, library)
        plans = _plan_study(own, design, given[0] if given else None)
        study.check_checkpoints(design, plans)
        study.check_test_cases(design, plans["image_reader_writer"])
        folders.note_asked(design, library)
        study.run_design(design, plans["plans_name"], request.device, request.jobs, lock)
    return design.folder


def renew_study(output: str | Path | None = None, workspace: str | Path | None = None) -> Path:
    """Write table and picture of a study anew from the cells that are finished; returns the study folder.

    Raises MFMError (E_NOT_FOUND) when there is no study.
    """
    from mfm_nnunet.study.run import renew

    folder = study_folder(output, workspace)
    renew(folder)
    return folder


def study_folder(output: str | Path | None, workspace: str | Path | None) -> Path:
    """Where a study is: ``output``, else ``mfm_study`` in the workspace."""
    return Path(output) if output else Path(workspace or places.DEFAULT) / "mfm_study"


def _plan_study(own: Workspace, design: Design, given: dict[str, Any] | None) -> dict[str, Any]:
    """The study's plan, made once from the pool or copied, with the whole pool preprocessed."""
    from mfm_nnunet.jobs.plan import PlanResult
    from mfm_nnunet.study import plan as study_plan
    from mfm_nnunet.study.folder import pin_plan, write_json

    dataset, configuration = design.question.dataset, design.question.configuration
    cases, _ = preparation.fingerprint(own, dataset, None)
    name = study_plan.plans_name_of(design.question.plans)
    file = own.preprocessed / dataset / f"{name}.json"
    is_new = not file.is_file()
    if is_new and given is not None:
        write_json(file, given)
    elif is_new:
        like = study_plan.made_like(design)
        plan_and_preprocess([dataset], configurations=[configuration], like=like, plans_name=name, preprocess=False)
    plans = read_plans(file, "Remove the study folder and begin anew.")
    pin_plan(design, plans, file, is_new)
    preparation.preprocess(own, dataset, cases, PlanResult(plans, file, []), (configuration,), None)
    return plans
