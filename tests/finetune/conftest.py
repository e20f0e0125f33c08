"""Fixtures of whole fine-tuning runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """The tiny dataset in a workspace that is in use; runs draw nothing and end without their validation."""
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", lambda self, save_probabilities=False: None)
    tiny.make(tmp_path)
    with use(tmp_path) as workspace:
        yield workspace
