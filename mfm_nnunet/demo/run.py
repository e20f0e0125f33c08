"""Run every step on real images in minutes: plan, preprocess, pretrain twice, fine-tune three times, predict, compare.

Three arms share one network and one schedule: from scratch, after MAE, after Volume Fusion. Everything is written to
one folder. The demo shows that the steps work together; one seed on a short schedule proves nothing about accuracy.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mfm_nnunet
from mfm_nnunet import workspace
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.demo import data as demo_data
from mfm_nnunet.demo.data import Split
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, write_json
from mfm_nnunet.metrics import dice, mean_dice
from mfm_nnunet.reports.html import FILE, Report, Section, Table, write_report
from mfm_nnunet.reports.overlays import draw_overlay
from mfm_nnunet.reports.progress import Stages
from mfm_nnunet.reports.segmentation import PredictedCase, describe_masks
from mfm_nnunet.settings import MFMBlock, override

logger = logging.getLogger(__name__)

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
"""Settings that keep the demo to minutes; ``--set`` overrides them."""
CORPUS_ID, CORPUS_NAME = 901, "DemoCorpus"
DATASET_ID, DATASET_NAME = 902, "DemoLabelled"
FOLD = 0
RECORD = "demo.json"
"""File that marks the folder as a demo's. It is written first, and again at the end with the results."""


SCRATCH = "scratch"
ARMS = {SCRATCH: "from scratch", "mae": "MAE", "volume_fusion": "Volume Fusion"}
"""Title of each arm; all but the first are named after their pretext task."""


@dataclass
class DemoResult:
    """Dice by arm, label and test case (NaN if a label is absent), seconds by stage, and files."""

    dice: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    """Folder of predicted masks by arm."""
    masks: list[Path] = field(default_factory=list)
    overlays: list[Path] = field(default_factory=list)
    report: Path = Path()
    stages: Stages = field(default_factory=lambda: Stages(3 * len(ARMS) + 2))

    def mean(self, arm: str, label: str | None = None) -> float:
        """Return the mean Dice of an arm over the test cases, for one label or averaged over the labels."""
        if label is None:
            return mean_dice([self.mean(arm, name) for name in self.dice[arm]])
        return mean_dice(list(self.dice[arm][label].values()))

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to ``stage``."""
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


def run_demo(
    folder: Path, data: Path | None = None, settings: Sequence[str] = (), device: str = "auto", overwrite: bool = False
) -> DemoResult:
    """Run the demo in ``folder``, on the template or on a dataset ``data`` in nnU-Net's raw format.

    Raises MFMError (E_EXISTS) when the folder is not empty; ``overwrite`` removes the files of an earlier demo.
    """
    schedule = (*SCHEDULE, *settings)
    override(MFMBlock(), schedule)  # refuses a wrong setting before anything is written
    source = demo_data.split_folder(data) if data else None
    if source is None:
        demo_data.find_template("t1")
    prepare_folder(folder, overwrite)
    if ignored := [name for name in workspace.FOLDERS if name in os.environ]:  # they contain the user's real data
        logger.info("%s: ignored, the demo uses its own folder", ", ".join(ignored))
    result = DemoResult()
    with workspace.use_only(folder) as here, result.stages:
        with result.timed("data"):
            split = source or demo_data.split_template(folder / "scans")
            demo_data.write_corpus(split, folder / "corpus.csv")
            demo_data.write_dataset(split, here.raw / f"Dataset{DATASET_ID}_{DATASET_NAME}")
            demo_data.write_test_folder(split, folder / "test_images")
        counts = (len(split.corpus), len(split.labelled), len(split.test))
        logger.info("%d images without labels, %d labelled ones, %d to test", *counts)
        configuration = "2d" if split.is_2d else "3d_fullres"
        checkpoints = _pretrain_starts(result, folder, configuration, schedule, device)
        _plan_labelled(result, folder, split, configuration, checkpoints)
        for arm in ARMS:
            result.stages.begin(f"Fine-tune: {ARMS[arm]}")
            with result.timed(f"train {arm}"):
                fold_folder = mfm_nnunet.train(
                    DATASET_ID,
                    configuration,
                    FOLD,
                    plans_name=_plans_name(arm),
                    pretrained_weights=checkpoints.get(arm),
                    settings=[setting for setting in schedule if not setting.startswith("pretrain.")],
                    device=device,
                    workspace=folder,
                )
            _predict(result, arm, folder, fold_folder, device)
        result.stages.begin("Compare with the references")
        with result.timed("pictures"):
            compare(result, split, folder / "overlays")
            result.report = folder / FILE
            write_report(lambda: make_demo_report(result, split), result.report)
    scores = {
        arm: {label: {case: None if s != s else s for case, s in of.items()} for label, of in labels.items()}
        for arm, labels in result.dice.items()
    }
    _write_record(folder, {"schedule": schedule, "seconds": result.seconds, "dice": scores})
    return result


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make an empty folder and mark it as the demo's; ``overwrite`` removes only files of an earlier demo."""
    reason = ""
    if folder.exists() and not folder.is_dir():
        reason = "this is a file"
    elif folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            reason = "this folder is not empty. Remove the files of an earlier demo with --overwrite"
        elif not (folder / RECORD).is_file():
            reason = f"no demo made this folder ({RECORD} is missing), so --overwrite removes nothing in it"
    if reason:
        raise MFMError("E_EXISTS", f"{folder}: {reason}, or choose another folder with --workspace DIR.")
    if overwrite:
        datasets = (f"Dataset{CORPUS_ID}_{CORPUS_NAME}", f"Dataset{DATASET_ID}_{DATASET_NAME}")
        own = [f"{root}/{dataset}" for root in workspace.FOLDERS for dataset in datasets]
        for name in ("scans", "test_images", "predictions", "overlays", *own):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("corpus.csv", FILE):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, {})


def _pretrain_starts(
    result: DemoResult, folder: Path, configuration: str, schedule: Sequence[str], device: str
) -> dict[str, Path]:
    """Plan the corpus, pretrain, and return the checkpoint of each arm that has one."""
    with result.timed("plan"):
        result.stages.begin("Plan and preprocess the images without labels")
        images, only = folder / "corpus.csv", [configuration]
        (plan,) = mfm_nnunet.plan_and_preprocess(
            [CORPUS_ID], images=images, name=CORPUS_NAME, configurations=only, workspace=folder
        )
    checkpoints = {}
    for arm in (arm for arm in ARMS if arm != SCRATCH):
        result.stages.begin(f"Pretrain: {ARMS[arm]}")
        with result.timed(f"pretrain {arm}"):
            checkpoints[arm] = mfm_nnunet.pretrain(
                CORPUS_ID,
                configuration,
                plans_name=plan.file.stem,
                pretext=arm,
                settings=[setting for setting in schedule if not setting.startswith("finetune.")],
                device=device,
                workspace=folder,
            )
    return checkpoints


def _plans_name(arm: str) -> str:
    """Return the name of an arm's own plan: nnU-Net names result folders after the plan."""
    return f"mfmDemo{arm.title().replace('_', '')}Plans"


def _plan_labelled(
    result: DemoResult, folder: Path, split: Split, configuration: str, checkpoints: Mapping[str, Path]
) -> None:
    """Make a plan per arm. Only the names differ, so all share the preprocessed data."""
    result.stages.begin("Plan and preprocess the labelled images so that the checkpoints fit")
    first = next(iter(checkpoints.values()))
    package = logging.getLogger("mfm_nnunet")
    level = package.level
    with result.timed("plan"):
        try:
            for arm in ARMS:
                (plan,) = mfm_nnunet.plan_and_preprocess(
                    [DATASET_ID],
                    configurations=[configuration],
                    like=checkpoints.get(arm, first),
                    plans_name=_plans_name(arm),
                    workspace=folder,
                )
                package.setLevel(logging.WARNING)  # the other plans would only repeat it
        finally:
            package.setLevel(level)
    # One case validates during training; nnU-Net's own split would hold out a fifth and predict it at the end.
    names = [case.name for case in split.labelled]
    write_json(plan.file.parent / "splits_final.json", [{"train": names[:-1], "val": names[-1:]}])


def _predict(result: DemoResult, arm: str, folder: Path, fold_folder: Path, device: str) -> None:
    result.stages.begin(f"Predict: {ARMS[arm]}")
    result.folders[arm] = folder / "predictions" / arm
    with result.timed(f"predict {arm}"):
        mfm_nnunet.predict(
            folder / "test_images",
            result.folders[arm],
            model_folder=fold_folder.parent,
            folds=[FOLD],
            mirroring=False,  # eight times faster in 3D, and the same for all arms
            device=device,
            workspace=folder,
        )


def compare(result: DemoResult, split: Split, folder: Path) -> None:
    """Compute the Dice of every arm on every test case, and draw one overlay per case into ``folder``."""
    dataset = DatasetJson.of(split.dataset_json)
    labels, ignore = dataset.foreground, dataset.ignore
    folder.mkdir(exist_ok=True)
    result.dice = {arm: {label: {} for label in labels} for arm in ARMS}
    for case in split.test:
        assert case.label is not None
        reference, predictions = _read_voxels(case.label), {}
        for arm, arm_title in ARMS.items():
            file = inside(result.folders[arm], f"{case.name}{split.dataset_json['file_ending']}")
            mask = _read_voxels(file)
            scores = {label: dice(reference, mask, values, ignore) for label, values in labels.items()}
            for label, score in scores.items():
                result.dice[arm][label][case.name] = score
            result.masks.append(file)
            predictions[f"{arm_title}, Dice {mean_dice(list(scores.values())):.2f}"] = file
        overlay = inside(folder, f"{case.name}.png")
        title = f"{case.name}: predicted and reference labels"
        draw_overlay(overlay, title, case.images[0], case.label, predictions, labels)
        result.overlays.append(overlay)


def format_result(result: DemoResult) -> str:
    """Format times and Dice per label and arm as a table."""
    scores = result.dice[SCRATCH]
    num_cases = len(next(iter(scores.values())))
    rows = [["start", *scores, "mean", "pretraining", "fine-tuning", "predicting"]]
    for arm, title in ARMS.items():
        values = [f"{result.mean(arm, label):.3f}" for label in [*scores, None]]
        times = [result.seconds.get(f"{stage} {arm}") for stage in ("pretrain", "train", "predict")]
        rows.append([title, *values, *("-" if seconds is None else f"{seconds:.0f} s" for seconds in times)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    others = ", ".join(f"{name} {result.seconds[name]:.0f} s" for name in ("data", "plan", "pictures"))
    total = f"Total {sum(result.seconds.values()):.0f} s ({others}, and the times in the table)."
    return "\n".join([f"Mean Dice over {num_cases} test cases", lines[0], "-" * len(lines[0]), *lines[1:], total])


def make_demo_report(result: DemoResult, split: Split) -> Report:
    """Make the page of a demo: scores and times of all arms, and the masks of the best one."""
    best = max(ARMS, key=result.mean)
    labels = DatasetJson.of(split.dataset_json).foreground
    ending = split.dataset_json["file_ending"]
    cases = [
        PredictedCase(case.name, case.images[0], inside(result.folders[best], f"{case.name}{ending}"), case.label)
        for case in split.test
    ]
    facts, sections = describe_masks(cases, labels, {}, DatasetJson.of(split.dataset_json).ignore)
    rows = [
        [title, *(result.mean(arm, label) for label in [*labels, None]),
         *(result.seconds.get(f"{stage} {arm}") for stage in ("pretrain", "train", "predict"))]
        for arm, title in ARMS.items()
    ]  # fmt: skip
    columns = ("start", *labels, "mean Dice", "pretraining [s]", "fine-tuning [s]", "predicting [s]")
    texts = ["One seed and a few minutes of training: differences of 0.01 or 0.02 mean nothing.",
             f"The cases below were predicted by the start {ARMS[best]}."]  # fmt: skip
    scores = Section(
        "Scores of the three starts", texts, tables=[Table("Mean Dice over the test cases", columns, rows)]
    )
    subject = "Every step of mfm_nnunet on real images. It shows that the steps work, not how accurate they are."
    return Report("Demo", subject, {"Seconds": round(sum(result.seconds.values())), **facts}, [scores, *sections])


def _read_voxels(file: Path) -> Any:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def _write_record(folder: Path, content: Mapping[str, Any]) -> None:
    write_json(folder / RECORD, {"made_by": f"mfm_demo {mfm_nnunet.__version__}", **content})
