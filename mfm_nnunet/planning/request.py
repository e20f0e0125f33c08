"""The plan of a data set or corpus: what a user may ask, what is decided, and the file that says so.

The plan file is nnU-Net's, every name in it resolves in stock nnunetv2 (but the Primus class, which is importable), and
``plans["mfm"]`` holds the settings of pretraining and fine-tuning.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.families import family_named
from mfm_nnunet.planning import like
from mfm_nnunet.planning.planner import MFMPlanner
from mfm_nnunet.planning.table import Circumstances, Decision, decisions_for, format_table
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

__all__ = [
    "Decision",
    "MFMPlanner",
    "PlanRequest",
    "PlanResult",
    "check_request",
    "format_table",
    "plan",
]

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
"""All that nnU-Net ever plans; which of them a data set gets is known only after its images were read."""


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks of a plan; everything else is derived.

    ``memory_gb`` is GPU memory (None: this machine's GPU, or the CPU preset without one); ``spacing`` a mode or mm in
    nnU-Net's axis order, before transposing; ``like`` a pretrained checkpoint that the plan must fit.
    """

    network: str = "resenc"
    memory_gb: float | None = None
    spacing: Literal["median", "onemm", "original"] | tuple[float, float, float] = "median"
    plans_name: str | None = None
    like: Path | None = None
    configurations: tuple[str, ...] | None = None


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
    family = source.family if source else family_named(request.network)
    name = request.plans_name or (
        like.like_plans_name(source.mfm["plans"]["plans_name"]) if source else family.plans_name(request.network)
    )
    planner = MFMPlanner(
        dataset_name,
        request.memory_gb,
        plans_name=name,
        overwrite_target_spacing=_explicit_spacing(request.spacing),
    )
    planner.family, planner.variant = family, source.variant if source else request.network
    planner.is_original_spacing = source.is_original_spacing if source else request.spacing == "original"
    planner.wanted = request.configurations
    planner.source = source
    plans = planner.plan_experiment()
    if source:
        own, spacings = plans["configurations"][source.configuration], planner.dataset_fingerprint["spacings"]
        if doubts := like.doubts(own, spacings, plans["transpose_forward"], source.entry["name"]):
            logger.warning("%s", doubts)
    why = Circumstances(
        memory_gb=planner.memory_gb,
        memory_was_given=request.memory_gb is not None,
        spacing=request.spacing,
        num_cases=len(planner.dataset_fingerprint["spacings"]),
        planned=planner.planned,
        slice_axis=planner.slice_axis,
    )
    return PlanResult(plans, planner.plans_file, decisions_for(plans, planner.dataset_json, why))


def check_request(request: PlanRequest) -> like.Source | None:
    """Refuse what no data can meet, before a dataset is read; returns the checkpoint that the plan must fit.

    Raises MFMError: E_CONFIG, and as :func:`mfm_nnunet.planning.like.read_source`.
    """
    name = request.plans_name
    problem = None
    family_named(request.network)
    if request.memory_gb is not None and not 0 < request.memory_gb < math.inf:
        problem = f"--memory-gb {request.memory_gb}: expected a positive number of GB."
    elif name is not None and not re.fullmatch(r"mfm[A-Za-z0-9_-]*", name):
        problem = f"-pl {name}: our plan names start with 'mfm' and have letters, digits, _ and - only, e.g. mfm{name}."
    elif request.like is not None and request.spacing != "median":
        problem = "--spacing and --like: the checkpoint decides the spacing. Leave --spacing out."
    unknown = [configuration for configuration in request.configurations or () if configuration not in CONFIGURATIONS]
    if unknown:
        problem = f"-c {unknown[0]}: there is no such configuration. {nearest(unknown[0], CONFIGURATIONS)}"
    if problem:
        raise MFMError("E_CONFIG", problem)
    _explicit_spacing(request.spacing)
    source = like.read_source(request.like) if request.like else None
    if source and request.network not in (PlanRequest.network, source.variant):
        holds = f"a {source.family.title} (--network {source.variant})"
        raise MFMError(
            "E_CONFIG", f"--network {request.network} and --like: {request.like} holds {holds}. Leave --network out."
        )
    return source


def _explicit_spacing(spacing: str | Sequence[float]) -> list[float] | None:
    """Millimetres before transposing, or None where the data decide."""
    if spacing in ("median", "original"):
        return None
    values = [1.0, 1.0, 1.0] if spacing == "onemm" else spacing
    if isinstance(values, str) or len(values) != 3 or not all(1e-3 <= value <= 1e3 for value in values):
        raise MFMError("E_CONFIG", f"--spacing {spacing}: expected median, onemm, original or three lengths in mm.")
    return [float(value) for value in values]
