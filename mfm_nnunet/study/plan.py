"""Which plan all arms of a study share: one that is given, or one made from the pool like the first checkpoint.

A study's question names it in a word and a hash, so that cells of different plans never meet in one folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import read_json
from mfm_nnunet.finetune.settings import plan_hash
from mfm_nnunet.interchange.read import sha256
from mfm_nnunet.jobs.plan import check_request
from mfm_nnunet.plan import read_plans
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.study.arms import Arm
from mfm_nnunet.study.design import CELLS, RUN_SETTINGS, Design
from mfm_nnunet.workspace import Workspace

STUDY_PLANS = "mfmStudyPlans"
"""The name of a plan that a study makes; it is in the study's own workspace."""
OWN, LIKE = "own", "like"


def plans_name_of(plans: str) -> str:
    """The name of the plan that a question's ``plans`` means."""
    word = plans.partition(" ")[0]
    return STUDY_PLANS if word in (OWN, LIKE) else word


def given_plan(
    here: Workspace, dataset_name: str, configuration: str, plans_name: str | None
) -> tuple[dict[str, Any], str] | None:
    """The plan named with ``-p`` and how a study's question names it; None without one."""
    if plans_name is None:
        return None
    plans = read_plans(here.plans_file(dataset_name, plans_name), f"Plan {dataset_name} again.")
    if configuration not in plans["configurations"]:
        raise MFMError(
            "E_CONFIG",
            f"plan {plans_name} has no configuration '{configuration}'. "
            f"{nearest(configuration, plans['configurations'])}",
        )
    _refuse_cascade(configuration)
    return {**plans, "plans_name": plans_name}, f"{plans_name} {digest(plans)}"


def own_plan(configuration: str, arms: Sequence[Arm]) -> str:
    """How a study's question names the plan that is to be made; what can be refused already is."""
    _refuse_cascade(configuration)
    like = next((arm.checkpoint for arm in arms if arm.checkpoint), None)
    try:
        source = check_request(PlanRequest([], like=like, configurations=(configuration,)))
    except MFMError as error:
        if error.code != "E_MODEL_MISMATCH":
            raise
        raise MFMError(error.code, f"{error.message} Or name a plan that all arms fit with -p.") from error
    if source is not None and source.configuration != configuration:
        raise MFMError(
            "E_CONFIG",
            f"-c {configuration}: {like} was pretrained for {source.configuration}, so the plan would be of that "
            f"configuration. Give -c {source.configuration}, or a plan with -p.",
        )
    return OWN if like is None else f"{LIKE} {sha256(like)}"


def made_like(design: Design) -> Path | None:
    """The checkpoint that the study's own plan is made like, whatever this call compares; None for none.

    Raises MFMError (E_NOT_FOUND) when it is no longer where an arm had it.
    """
    kind, _, wanted = design.question.plans.partition(" ")
    if kind != LIKE:
        return None
    files = [Path(arm["file"]) for arm in design.known_arms.values() if arm["sha256"] == wanted]
    found = next((file for file in files if file.is_file() and sha256(file) == wanted), None)
    if found is None:
        raise MFMError(
            "E_NOT_FOUND",
            f"{design.folder}: the plan of this study is made like a checkpoint that is no longer at "
            f"{' or '.join(map(str, files))}. Put it back, or give it again as an arm.",
        )
    return found


def require_known(design: Design, plans: Mapping[str, Any], file: Path) -> None:
    """Raise MFMError (E_CONFIG) when cells of the study were trained on another plan than this, which is ``file``."""
    stock = plan_hash(plans)
    # A study that was begun by an earlier version tells no digest, but its trainings do, of the plan without our block.
    others = [] if design.plan_sha256 else list(design.folder.glob(f"{CELLS}/*/{RUN_SETTINGS}"))
    advice = "Remove the cell's folder and run mfm_study again."
    known = [read_json(other, advice).get("plan_sha256") for other in others]
    if design.plan_sha256 in (None, digest(plans)) and all(one == stock for one in known):
        return
    raise MFMError(
        "E_CONFIG",
        f"{file}: is another plan than the one on which this study's cells were trained. A plan that is made again "
        "follows the GPU and the version of mfm_nnunet: run the study where it was begun, or put the old plan back. "
        "Otherwise begin anew with -o another folder.",
    )


def digest(plans: Mapping[str, Any]) -> str:
    """SHA-256 of all that a plan decides, in hex."""
    return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()


def _refuse_cascade(configuration: str) -> None:
    if configuration == "3d_cascade_fullres":
        raise MFMError("E_CONFIG", "-c 3d_cascade_fullres: a study trains one stage. Take 3d_fullres or 3d_lowres.")
