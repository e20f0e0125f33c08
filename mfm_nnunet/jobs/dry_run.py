"""Dry runs: where a job works so that nothing of it remains, and what a prediction would do."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.sizes import count_windows
from mfm_nnunet.device import memory_in_use
from mfm_nnunet.errors import CaseFailure
from mfm_nnunet.prediction.cases import prepare_case
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.requests import PredictRequest
from mfm_nnunet.workspace import FOLDERS, Workspace

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def scratch_results() -> Iterator[Path]:
    """Let nnU-Net write results into a folder that is removed afterwards, and yield the folder."""
    with tempfile.TemporaryDirectory(prefix="mfm_dry_run_") as folder, _variables({FOLDERS[2]: folder}):
        yield Path(folder)


@contextlib.contextmanager
def scratch_workspace(here: Workspace) -> Iterator[Workspace]:
    """Yield a workspace to plan in, removed afterwards: images are links, small files are copies."""
    with tempfile.TemporaryDirectory(prefix="mfm_dry_run_") as name:
        raw, preprocessed = (Path(name) / folder for folder in FOLDERS[:2])
        for folder in (raw, preprocessed):
            folder.mkdir()
        for dataset in here.dataset_names():
            if (here.raw / dataset).is_dir():
                _copy_files(here.raw / dataset, raw / dataset)
            _copy_files(here.preprocessed / dataset, preprocessed / dataset)
            for folder in (entry for entry in (here.raw / dataset).glob("*/") if entry.is_dir()):
                (raw / dataset / folder.name).mkdir()
                for file in folder.iterdir():  # each a link of its own: a job may replace it here
                    (raw / dataset / folder.name / file.name).symlink_to(file.absolute())
        with _variables({FOLDERS[0]: str(raw), FOLDERS[1]: str(preprocessed)}):
            yield replace(here, raw=raw, preprocessed=preprocessed)


def describe_prediction(model: Model, found: Sequence[Case | CaseFailure], request: PredictRequest) -> None:
    """Say what would be predicted; prepare the first case and time one of its windows."""
    cases = [item for item in found if isinstance(item, Case)]
    for failure in (item for item in found if isinstance(item, CaseFailure)):
        logger.warning("would fail: %s", failure)
    if cases and not model.heads:
        x_CDHW, patch = prepare_case(model, cases[0], request).x_CDHW, model.configuration_manager.patch_size
        num_windows = count_windows(tuple(x_CDHW.shape[1:]), patch, request.step_size)
        window = x_CDHW[(slice(None), *[slice(0, size) for size in (1, *patch)[-x_CDHW.ndim + 1 :]])]
        seconds = []
        for _ in range(2):  # the first one also allocates
            start = time.monotonic()
            model.predict_logits(window, step_size=1, mirroring=request.mirroring)
            seconds.append(time.monotonic() - start)
        used, available = memory_in_use(model.device)
        text = "%s: %d windows of %.2f s on %s, about %.1f minutes; memory so far %.1f of %.1f GB"
        minutes = num_windows * seconds[1] / 60
        values = (cases[0].name, num_windows, seconds[1], model.device, minutes, used / 1e9, available / 1e9)
        logger.info(text, *values)
    text = "dry run: nothing was written. It would predict %d cases with the folds %s into %s"
    logger.info(text, len(cases), ", ".join(map(str, model.folds)), request.output_folder)


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir() if source.is_dir() else ():
        if file.is_file():
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name, "") for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.update(before)
