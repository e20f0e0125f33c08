"""The plan of a data set or corpus: what a user may ask, what is decided, and the file that says so.

The plan file is nnU-Net's, every name in it resolves in stock nnunetv2 (but the Primus class, which is importable), and
``plans["mfm"]`` holds the settings of pretraining and fine-tuning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError
from mfm_nnunet.planning import derive, like
from mfm_nnunet.planning.planner import MFMPlanner
from mfm_nnunet.planning.table import Circumstances, Decision, decisions_for, format_table
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

__all__ = [
    "DEFAULT_NAMES",
    "Decision",
    "MFMPlanner",
    "PlanRequest",
    "PlanResult",
    "check_request",
    "format_table",
    "plan",
]

DEFAULT_NAMES = {
    "resenc": "mfmPlans",
    "primus": "mfmPrimusPlans",
    "primus_v2": "mfmPrimusV2Plans",
    "primus_v3": "mfmPrimusV3Plans",
}
"""Plan names by network; a plan like a checkpoint is named by :func:`mfm_nnunet.planning.like.like_plans_name`."""


@dataclass(frozen=True)
class PlanResult:
    """A plan, the file it was written to, and why it is what it is."""

    plans: dict[str, Any]
    file: Path
    decisions: list[Decision]


def plan(workspace: Workspace, dataset_name: str, request: PlanRequest) -> PlanResult:
    """Plan ``dataset_name`` and write ``<preprocessed>/<dataset_name>/<plans name>.json``.

    Call it inside :func:`mfm_nnunet.workspace.use`. A plan of that name that says something else is replaced, with a
    warning that names what changed: finished models keep a copy of their plan and predict as before, but an unfinished
    training would go on with the new one. Configurations of the old file that this call was not asked for are kept, as
    in nnU-Net, unless axis order, reader, intensities or network family changed, which all configurations share.

    Raises MFMError: E_NOT_FOUND (no data set, or no fingerprint yet), E_CONFIG (a request that cannot be met),
    E_MODEL_MISMATCH (a checkpoint that is not one of our pretrained ones, or does not fit the data).
    """
    assert Path(os.environ.get("nnUNet_raw", "")) == workspace.raw, "plan() must run inside workspace.use()"
    source = check_request(request)
    name = request.plans_name or (
        like.like_plans_name(source.mfm["plans"]["plans_name"]) if source else DEFAULT_NAMES[request.network]
    )
    planner = MFMPlanner(
        dataset_name,
        request.memory_gb,
        plans_name=name,
        overwrite_target_spacing=_explicit_spacing(request.spacing),
    )
    family, version = derive.NETWORKS[source.network_with_version if source else request.network]
    planner.network, planner.version = ("primus" if family == "primus" else "resenc"), version
    planner.is_original_spacing = source.is_original_spacing if source else request.spacing == "original"
    planner.wanted = tuple(request.configurations) if request.configurations else None
    planner.source = source
    plans = planner.plan_experiment()
    if source:
        own, spacings = plans["configurations"][source.configuration], planner.dataset_fingerprint["spacings"]
        if doubts := like.doubts(own, spacings, plans["transpose_forward"], source.entry["name"]):
            logger.warning("%s", doubts)
    why = Circumstances(
        preset=planner.preset.name,
        memory_gb=planner.memory_gb,
        memory_was_given=request.memory_gb is not None,
        spacing=request.spacing,
        num_cases=len(planner.dataset_fingerprint["spacings"]),
        planned=planner.planned,
        slice_axis=planner.slice_axis,
    )
    return PlanResult(plans, planner.plans_file, decisions_for(plans, planner.dataset_json, why))


def check_request(request: PlanRequest) -> like.Source | None:
    """Read the checkpoint that the plan must fit, if there is one.

    Raises MFMError as :func:`mfm_nnunet.planning.like.read_source`, and E_CONFIG when another network was asked for.
    """
    source = like.read_source(Path(request.like)) if request.like else None
    if source and request.network not in ("resenc", source.network_with_version):
        holds = "a ResEnc U-Net" if source.network == "resenc" else f"the network {source.network_with_version}"
        raise MFMError(
            "E_CONFIG", f"--network {request.network} and --like: {request.like} holds {holds}. Leave --network out."
        )
    return source


def _explicit_spacing(spacing: str | Sequence[float]) -> list[float] | None:
    """Millimetres before transposing, or None where the data decide."""
    if spacing in ("median", "original"):
        return None
    return [1.0, 1.0, 1.0] if spacing == "onemm" else [float(length) for length in spacing]
