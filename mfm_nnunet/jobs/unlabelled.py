"""Unlabelled images of a training: prepared, described in its settings, and refused where they do not fit."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from mfm_nnunet.data.unlabelled import Labelled, Unlabelled, prepare_unlabelled
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune import settings as run_settings
from mfm_nnunet.settings import MFMBlock
from mfm_nnunet.workspace import Workspace

if TYPE_CHECKING:
    from mfm_nnunet.jobs.train import Inputs

logger = logging.getLogger(__name__)


def add_unlabelled(
    here: Workspace, inputs: Inputs, block: MFMBlock, labelled: Labelled
) -> tuple[MFMBlock, Unlabelled | None]:
    """Prepare the unlabelled images of a run, if any, and describe them in its settings."""
    request, before = inputs.request, block.semi.corpus
    corpus = request.unlabelled
    if corpus is None and before is not None:
        corpus = before.get("name")
        if not isinstance(corpus, str):
            text = "the run's settings do not say which unlabelled images it has (semi.corpus): give --unlabelled."
            raise MFMError("E_CONFIG", text)
    run_settings.require_both(corpus, block.semi, inputs.overrides)
    if corpus is None or request.only_validate:
        return block, None
    if request.dry_run:
        raise MFMError(
            "E_CONFIG",
            f"--dry-run writes nothing, and --unlabelled {corpus} preprocesses these images. Leave one of them out.",
        )
    if labelled.plan.mfm.universal is not None:
        raise MFMError(
            "E_CONFIG",
            f"--unlabelled {corpus}: {labelled.plan.dataset_name} is a union of datasets, which trains with labels "
            "alone. Leave it out.",
        )
    if labelled.plan.configuration(request.configuration).previous_stage:
        raise MFMError(
            "E_CONFIG",
            f"--unlabelled {corpus}: {request.configuration} refines the masks of another stage, which these images "
            "do not have. Use --unlabelled with the other configurations.",
        )
    unlabelled = prepare_unlabelled(here, corpus, labelled)
    if before not in (None, unlabelled.description):
        raise MFMError(
            "E_CONFIG",
            f"--c continues the same run, but its unlabelled images differ: they were {before}, are "
            f"{unlabelled.description}. Put the images back, or start a new run.",
        )
    logger.info("--unlabelled %s: %d images without labels", unlabelled.name, len(unlabelled.cases))
    return dataclasses.replace(block, semi=dataclasses.replace(block.semi, corpus=unlabelled.description)), unlabelled
