"""The whole way on real images in minutes: plan, preprocess, pretrain twice, fine-tune three times, predict, compare.

Three arms share one network and one schedule: from scratch, after MAE, after Volume Fusion. Everything that the demo
writes is inside one folder. It shows that the machinery works; one seed on a short schedule proves no accuracy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet import api, workspace
from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.demo.data import (
    Split,
    find_template,
    split_folder,
    split_template,
    write_corpus,
    write_dataset,
    write_test_folder,
)
from mfm_nnunet.demo.result import ARMS, Arm, DemoResult, compare
from mfm_nnunet.errors import MFMError
from mfm_nnunet.settings import MFMBlock, override
from mfm_nnunet.version import __version__

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = "mfm_demo"
SCHEDULE = (
    "pretrain.epochs=5",
    "pretrain.iterations_per_epoch=25",
    "pretrain.validation_iterations=3",
    "pretrain.warmup_epochs=1",
    "finetune.epochs=8",
    "finetune.iterations_per_epoch=25",
    "finetune.validation_iterations=3",
    "finetune.warmup_epochs=1",
)
"""What the demo changes in the plan's settings so that it takes minutes; ``--set`` comes after and wins."""
CORPUS_ID, CORPUS_NAME = 901, "DemoCorpus"
DATASET_ID, DATASET_NAME = 902, "DemoLabelled"
FOLD = 0
RECORD = "demo.json"
"""Written first, so that a folder is known as the demo's, and again at the end with the results."""
_OWN_FOLDERS = ("scans", "test_images", "predictions", "overlays")
_OWN_FILES = ("corpus.csv", RECORD)


def run_demo(
    folder: Path, data: Path | None = None, settings: Sequence[str] = (), device: str = "auto", overwrite: bool = False
) -> DemoResult:
    """Run the demo in ``folder``, on the template or on a dataset ``data`` in nnU-Net's raw format.

    Raises MFMError (E_EXISTS) when the folder is not empty; ``overwrite`` removes what an earlier demo made there.
    """
    schedule = (*SCHEDULE, *settings)
    override(MFMBlock(), schedule)  # what the user got wrong is an error now, before anything is written
    source = split_folder(data) if data else None
    if source is None:
        find_template("t1")
    _prepare(folder, overwrite)
    result = DemoResult()
    with _ignoring_nnunet_folders(), workspace.use(folder) as here:
        with result.timed("data"):
            split = source or split_template(folder / "scans")
            write_corpus(split, folder / "corpus.csv")
            write_dataset(split, here.raw / f"Dataset{DATASET_ID}_{DATASET_NAME}")
            write_test_folder(split, folder / "test_images")
        counts = (len(split.corpus), len(split.labelled), len(split.test))
        logger.info("%d images without labels, %d labelled ones, %d to test", *counts)
        configuration = "2d" if split.is_2d else "3d_fullres"
        checkpoints = _pretrain(result, folder, configuration, schedule, device)
        _plan_labelled(result, folder, split, configuration, checkpoints)
        for arm in ARMS:
            _train_and_predict(result, arm, folder, configuration, checkpoints.get(arm.key), schedule, device)
        with result.timed("pictures"):
            compare(result, split, folder / "overlays")
    _write_record(folder, {"schedule": schedule, "seconds": result.seconds, "dice": result.dice_or_none()})
    return result


def _prepare(folder: Path, overwrite: bool) -> None:
    """An empty folder marked as the demo's; with ``overwrite`` only what an earlier demo made is removed."""
    if folder.exists() and not folder.is_dir():
        raise MFMError("E_EXISTS", f"{folder}: this is a file. Choose another folder with --workspace DIR.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise MFMError(
                "E_EXISTS",
                f"{folder}: this folder is not empty and was left as it is. Start anew with --overwrite, which removes "
                "only what an earlier demo made there, or choose another folder with --workspace DIR.",
            )
        if not (folder / RECORD).is_file():
            raise MFMError(
                "E_EXISTS",
                f"{folder}: no demo made this folder ({RECORD} is missing), so --overwrite removes nothing there. "
                "Choose another folder with --workspace DIR.",
            )
        _remove_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, {})


def _remove_own(folder: Path) -> None:
    datasets = (f"Dataset{CORPUS_ID}_{CORPUS_NAME}", f"Dataset{DATASET_ID}_{DATASET_NAME}")
    roots = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    for name in (*_OWN_FOLDERS, *(f"{root}/{dataset}" for root in roots for dataset in datasets)):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def _pretrain(
    result: DemoResult, folder: Path, configuration: str, schedule: Sequence[str], device: str
) -> dict[str, Path]:
    """Plan the corpus and pretrain; returns the checkpoint of each arm that has one."""
    with result.timed("plan"):
        logger.info("\n== Plan and preprocess the images without labels")
        plan = api.plan_and_preprocess(
            [CORPUS_ID],
            images=folder / "corpus.csv",
            name=CORPUS_NAME,
            configurations=[configuration],
            workspace=folder,
        )[0]
    checkpoints = {}
    for arm in (arm for arm in ARMS if arm.pretext):
        logger.info("\n== Pretrain: %s", arm.title)
        with result.timed(f"pretrain {arm.key}"):
            checkpoints[arm.key] = api.pretrain(
                CORPUS_ID,
                configuration,
                plans_name=plan.file.stem,
                pretext=str(arm.pretext),
                settings=_only(schedule, "finetune."),
                device=device,
                workspace=folder,
            )
    return checkpoints


def _plan_labelled(
    result: DemoResult, folder: Path, split: Split, configuration: str, checkpoints: Mapping[str, Path]
) -> None:
    """A plan per arm, equal but for the name (nnU-Net's result folders are named by the plan); the data are shared."""
    logger.info("\n== Plan and preprocess the labelled images so that the checkpoints fit")
    first = next(iter(checkpoints.values()))
    with result.timed("plan"):
        for arm in ARMS:
            with contextlib.nullcontext() if arm is ARMS[0] else _quiet():
                plan = api.plan_and_preprocess(
                    [DATASET_ID],
                    configurations=[configuration],
                    like=checkpoints.get(arm.key, first),
                    plans_name=arm.plans_name,
                    workspace=folder,
                )[0]
    # One case validates during training; nnU-Net's own split would hold out a fifth and predict it at the end.
    names = [case.name for case in split.labelled]
    with atomic_write(plan.file.parent / "splits_final.json") as handle:
        handle.write(json.dumps([{"train": names[:-1], "val": names[-1:]}]).encode())


def _train_and_predict(
    result: DemoResult,
    arm: Arm,
    folder: Path,
    configuration: str,
    checkpoint: Path | None,
    schedule: Sequence[str],
    device: str,
) -> None:
    logger.info("\n== Fine-tune: %s", arm.title)
    with result.timed(f"train {arm.key}"):
        fold_folder = api.train(
            DATASET_ID,
            configuration,
            FOLD,
            plans_name=arm.plans_name,
            pretrained_weights=checkpoint,
            settings=_only(schedule, "pretrain."),
            device=device,
            workspace=folder,
        )
    logger.info("\n== Predict: %s", arm.title)
    result.folders[arm.key] = folder / "predictions" / arm.key
    with result.timed(f"predict {arm.key}"):
        api.predict(
            folder / "test_images",
            result.folders[arm.key],
            model_folder=fold_folder.parent,
            folds=[FOLD],
            mirroring=False,  # eight times faster in 3D, and the same for all arms
            device=device,
            workspace=folder,
        )


def _only(schedule: Sequence[str], unwanted: str) -> list[str]:
    """The settings of a stage: all but the other stage's."""
    return [setting for setting in schedule if not setting.startswith(unwanted)]


def _write_record(folder: Path, content: Mapping[str, Any]) -> None:
    with atomic_write(folder / RECORD) as handle:
        handle.write(json.dumps({"made_by": f"mfm_demo {__version__}", **content}, indent=1).encode())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without our progress messages (for what would only repeat itself)."""
    package = logging.getLogger("mfm_nnunet")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


@contextlib.contextmanager
def _ignoring_nnunet_folders() -> Iterator[None]:
    """The demo keeps to its own folder even where nnUNet_raw and the like are set: those hold somebody's real data."""
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    if before:
        logger.info("%s: set, but the demo uses its own folder", ", ".join(before))
    try:
        yield
    finally:
        os.environ.update(before)
