"""Rank unlabelled scans by what to label next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mfm_nnunet.fields import takes
from mfm_nnunet.finetune.pseudo_labels import RANKING
from mfm_nnunet.jobs.train import run_request
from mfm_nnunet.requests import TrainRequest


@takes(TrainRequest)
def rank_unlabelled(request: TrainRequest) -> Path:
    """Rank unlabelled scans by the disagreement of teachers and by diversity, and return the table.

    ``teachers`` are models, or new ones are trained. Raises the MFMErrors of :func:`mfm_nnunet.train`.
    """
    settings = (*request.settings, "semi.method=student", "semi.rounds=0")
    return run_request(replace(request, settings=settings)) / RANKING
