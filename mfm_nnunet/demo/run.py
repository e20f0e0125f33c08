"""Run every step on real images in minutes: plan, preprocess, pretrain, fine-tune six times, predict, compare.

Two starts share one network and one schedule: from scratch and after MAE. Each trains with three seeds, each with other
labels, which shows the differences that are larger than the spread. nnU-Net's pseudo Dice on the test cases, which
every training logs, shows how fast each start learns. Everything is written to one folder.
"""

from __future__ import annotations

import contextlib
import itertools
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
from mfm_nnunet.files import inside, read_json, read_lines, write_json
from mfm_nnunet.metrics import mean_dice
from mfm_nnunet.reports.html import FILE, Report, Section, Table, draw_curves, write_report
from mfm_nnunet.reports.progress import Stages
from mfm_nnunet.reports.segmentation import PredictedCase, describe_masks
from mfm_nnunet.settings import MFMBlock, override

logger = logging.getLogger(__name__)

SCHEDULE = (
    "pretrain.epochs=4",
    "pretrain.iterations_per_epoch=25",
    "pretrain.validation_iterations=2",
    "pretrain.warmup_epochs=1",
    "finetune.epochs=8",
    "finetune.iterations_per_epoch=15",
    "finetune.validation_iterations=6",
    "finetune.warmup_epochs=1",
    "finetune.mirroring=false",
)
"""Settings that keep the demo to minutes; ``--set`` overrides them. Mirrored predictions take eight times as long."""
CORPUS_ID, CORPUS_NAME = 901, "DemoCorpus"
DATASET_ID, DATASET_NAME = 902, "DemoLabelled"
RECORD = "demo.json"
"""File that marks the folder as a demo's. It is written first, and again at the end with the results."""
SCRATCH, PRETEXT = "scratch", "mae"
STARTS = {PRETEXT: "after MAE", SCRATCH: "from scratch"}
SEEDS = 3
"""Trainings per start: the folds of its plan. With fewer no spread is seen."""


@dataclass
class DemoResult:
    """Dice by start and seed, seconds by stage, and files."""

    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    """nnU-Net's pseudo Dice on the test cases after each epoch; NaN if it has none."""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """Mean Dice of whole test cases after the last step."""
    seconds: dict[str, float] = field(default_factory=dict)
    steps_per_epoch: int = 0
    num_labels: int = 0
    """Labelled cases in a training."""
    masks: list[Path] = field(default_factory=list)
    """Masks of the test cases, by all trainings after pretraining together."""
    report: Path = Path()
    stages: Stages = field(default_factory=lambda: Stages(4 + SEEDS * len(STARTS)))

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
    block = override(MFMBlock(), schedule)  # refuses a wrong setting before anything is written
    source = demo_data.split_folder(data) if data else None
    if source is None:
        demo_data.find_template("t1")
    prepare_folder(folder, overwrite)
    if ignored := [name for name in workspace.FOLDERS if name in os.environ]:  # they contain the user's real data
        logger.info("%s: ignored, the demo uses its own folder", ", ".join(ignored))
    result = DemoResult(steps_per_epoch=block.finetune.iterations_per_epoch)
    with workspace.use_only(folder) as here, result.stages:
        with result.timed("data"):
            split = source or demo_data.split_template(folder / "scans")
            demo_data.write_corpus(split, folder / "corpus.csv")
            demo_data.write_dataset(split, here.raw / f"Dataset{DATASET_ID}_{DATASET_NAME}")
            demo_data.write_test_folder(split, folder / "test_images")
        folds = split.folds(SEEDS)
        result.num_labels = len(folds[0]["train"])
        counts = (len(split.train), SEEDS, result.num_labels, len(split.test))
        logger.info("%d images without labels; %d trainings per start, each with %d labels; %d to test", *counts)
        configuration = "2d" if split.is_2d else "3d_fullres"
        checkpoint = _pretrain(result, folder, configuration, schedule, device)
        _plan_labelled(result, folder, configuration, checkpoint, folds)
        settings = [setting for setting in schedule if not setting.startswith("pretrain.")]
        for seed, start in itertools.product(range(SEEDS), STARTS):
            result.stages.begin(f"Fine-tune {STARTS[start]}, seed {seed + 1} of {SEEDS}")
            with result.timed(f"train {start}"), _first_alone_speaks(seed):
                fold_folder = mfm_nnunet.train(
                    DATASET_ID, configuration, seed, plans_name=_plans_name(start),
                    pretrained_weights=checkpoint if start == PRETEXT else None,
                    settings=[*settings, f"seed={seed}"], device=device, workspace=folder,
                )  # fmt: skip
            read_training(result, start, fold_folder)
            logger.info("Dice of the test cases: %.3f", result.scores[start][-1])
        result.stages.begin(f"Predict with the {SEEDS} models {STARTS[PRETEXT]}")
        _predict(result, folder, split, configuration, device)
        result.stages.begin("Compare")
        with result.timed("report"):
            result.report = folder / FILE
            write_report(lambda: make_demo_report(result, split), result.report)
    curves = {
        start: [[None if dice != dice else dice for dice in curve] for curve in seeds]
        for start, seeds in result.curves.items()
    }
    results = {"seconds": result.seconds, "curves": curves, "scores": result.scores}
    _write_record(folder, {"schedule": schedule, **results})
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
        for name in ("scans", "test_images", "predictions", *own):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("corpus.csv", FILE):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, {})


def _pretrain(result: DemoResult, folder: Path, configuration: str, schedule: Sequence[str], device: str) -> Path:
    """Plan the images without labels, pretrain on them, and return the checkpoint."""
    result.stages.begin("Plan and preprocess the images without labels")
    with result.timed("plan"):
        images, only = folder / "corpus.csv", [configuration]
        (plan,) = mfm_nnunet.plan_and_preprocess(
            [CORPUS_ID], images=images, name=CORPUS_NAME, configurations=only, workspace=folder
        )
    result.stages.begin("Pretrain: MAE")
    with result.timed(f"pretrain {PRETEXT}"):
        return mfm_nnunet.pretrain(
            CORPUS_ID,
            configuration,
            plans_name=plan.file.stem,
            pretext=PRETEXT,
            settings=[setting for setting in schedule if not setting.startswith("finetune.")],
            device=device,
            workspace=folder,
        )


@contextlib.contextmanager
def _first_alone_speaks(number: int) -> Iterator[None]:
    """Hide all but warnings and the progress of what only repeats, with other numbers, what the first one printed."""
    package = logging.getLogger("mfm_nnunet")
    level = package.level
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        if number:
            package.setLevel(logging.WARNING)
            stack.callback(package.setLevel, level)
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


def _plans_name(start: str) -> str:
    """Return the name of a start's own plan: nnU-Net names result folders after the plan."""
    return f"mfmDemo{start.title()}Plans"


def _plan_labelled(
    result: DemoResult, folder: Path, configuration: str, checkpoint: Path, folds: Sequence[Mapping[str, Any]]
) -> None:
    """Make a plan per start. Only the names differ, so both share the preprocessed data."""
    result.stages.begin("Plan and preprocess the labelled images so that the checkpoint fits")
    with result.timed("plan"):
        for number, start in enumerate(STARTS):
            with _first_alone_speaks(number):
                (plan,) = mfm_nnunet.plan_and_preprocess(
                    [DATASET_ID],
                    configurations=[configuration],
                    like=checkpoint,
                    plans_name=_plans_name(start),
                    workspace=folder,
                )
    write_json(plan.file.parent / "splits_final.json", list(folds))


def read_training(result: DemoResult, start: str, fold_folder: Path) -> None:
    """Read the Dice that a training logged after each epoch, and that of its final validation on whole cases."""
    rows = read_lines(fold_folder / "log.jsonl")
    dice = [float("nan") if row["dice_mean"] is None else float(row["dice_mean"]) for row in rows]
    result.curves.setdefault(start, []).append(dice)
    summary = read_json(fold_folder / "validation" / "summary.json", "")
    result.scores.setdefault(start, []).append(float(summary["foreground_mean"]["Dice"]))


def _predict(result: DemoResult, folder: Path, split: Split, configuration: str, device: str) -> None:
    masks = folder / "predictions"
    with result.timed("predict"):
        mfm_nnunet.predict(
            folder / "test_images",
            masks,
            dataset=DATASET_ID,
            configuration=configuration,
            plans_name=_plans_name(PRETEXT),
            folds=range(SEEDS),
            report=False,  # the demo's own shows them
            device=device,
            workspace=folder,
        )
    result.masks = [inside(masks, f"{case.name}{split.dataset_json['file_ending']}") for case in split.test]


# What is above the spread of the seeds, and what is noise


def compare_starts(result: DemoResult) -> list[str]:
    """Say in plain words where a start is ahead by more than the spread of the seeds, and where it is not."""
    per_epoch = result.steps_per_epoch
    pretrained, scratch = (list(zip(*result.curves[start])) for start in (PRETEXT, SCRATCH))
    ahead, behind = (
        [number for number, (one, other) in enumerate(zip(*pair), start=1) if min(one) > max(other)]
        for pair in ((pretrained, scratch), (scratch, pretrained))
    )
    texts = []
    for epochs, better, worse in ((ahead, PRETEXT, SCRATCH), (behind, SCRATCH, PRETEXT)):
        if epochs:
            texts.append(
                f"Above the spread: after {_in_ranges(epochs, per_epoch)} steps, the worst training {STARTS[better]} "
                f"is better than the best one {STARTS[worse]}."
            )
    if not texts:
        texts = ["At no step do all trainings of one start beat all of the other: the difference is noise."]
    elif len(ahead) + len(behind) < len(scratch):
        texts.append("At all other steps the bands overlap: differences there are noise.")
    end = mean_dice(list(scratch[-1]))
    reached = next((number for number, dice in enumerate(pretrained, start=1) if mean_dice(list(dice)) >= end), None)
    goal = f"From scratch, {len(scratch) * per_epoch} steps lead to a Dice of {end:.2f}. After MAE"
    texts.append(f"{goal} this takes {reached * per_epoch} steps." if reached else f"{goal} it is not reached.")
    ends = [result.scores[start] for start in (PRETEXT, SCRATCH)]
    is_apart = min(ends[0]) > max(ends[1]) or min(ends[1]) > max(ends[0])
    verdict = "above the spread" if is_apart else "within the spread, so noise"
    difference = mean_dice(ends[0]) - mean_dice(ends[1])
    texts.append(f"At the end, on whole test cases, after MAE minus from scratch is {difference:+.3f} Dice: {verdict}.")
    return [*texts, "Of two equal starts, three trainings each lie apart by chance once in ten: trust a stretch of "
            "the curve, not a single step."]  # fmt: skip


def _in_ranges(epochs: Sequence[int], steps: int) -> str:
    """Format numbers of steps: ``5, 20 to 35``."""
    runs = itertools.groupby(enumerate(epochs), lambda item: item[1] - item[0])
    parts = [[epoch * steps for _, epoch in run] for _, run in runs]
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def list_scores(result: DemoResult) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of the table: Dice after some numbers of steps, mean and range of the seeds."""
    num_epochs = min(len(curve) for curves in result.curves.values() for curve in curves)
    epochs = sorted({max(1, num_epochs // part) for part in (8, 4, 2, 1)})
    columns = ["start", *(f"{epoch * result.steps_per_epoch} steps" for epoch in epochs), "whole cases at the end"]
    rows = []
    for start, title in STARTS.items():
        seeds = [[curve[epoch - 1] for curve in result.curves[start]] for epoch in epochs]
        rows.append([title, *map(_mean_and_range, [*seeds, result.scores[start]])])
    return columns, rows


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{mean_dice(list(values)):.2f} ({min(values):.2f} to {max(values):.2f})"


def format_result(result: DemoResult) -> str:
    """Format the comparison, the table and the times."""
    columns, rows = list_scores(result)
    widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [columns, *rows]]
    title = f"Mean Dice of {SEEDS} trainings (lowest to highest), each with {result.num_labels} labels"
    seconds = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    total = f"{sum(result.seconds.values()):.0f} s in all: {seconds}."
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:], "", *compare_starts(result), "", total])


GOOD = (
    "the band of a better start lies above the other one over several steps in a row. Bands that overlap show no "
    "difference. Minutes of pretraining need not help: with a larger corpus and more steps compare again, as here."
)


def make_demo_report(result: DemoResult, split: Split) -> Report:
    """Make the page of a demo: how fast each start learns, and the predicted masks."""
    dataset = DatasetJson.of(split.dataset_json)
    cases = [PredictedCase(case.name, case.images[0], mask, case.label) for case, mask in zip(split.test, result.masks)]
    facts, sections = describe_masks(cases, dataset.foreground, {}, dataset.ignore)
    means = {STARTS[start]: [mean_dice(list(dice)) for dice in zip(*curves)] for start, curves in result.curves.items()}
    bands = {
        STARTS[start]: [(min(dice), max(dice)) for dice in zip(*curves)] for start, curves in result.curves.items()
    }
    comparison, (columns, rows) = compare_starts(result), list_scores(result)
    curve = draw_curves(
        means, "Dice of the test cases", " ".join(comparison), bands=bands, steps=result.steps_per_epoch
    )
    about = (
        f"Both starts fine-tune the same network on the same labels: {SEEDS} trainings each, each with another "
        f"{result.num_labels} labelled images and another seed. Lines are means, bands reach from the lowest to the "
        "highest training. The Dice is nnU-Net's pseudo Dice, on random crops of the test cases. The masks below "
        f"are those of the {SEEDS} trainings {STARTS[PRETEXT]} together."
    )
    tables = [
        Table("Mean Dice (lowest to highest training)", columns, rows),
        Table("Time by stage", ("stage", "seconds"), [list(item) for item in result.seconds.items()], is_folded=True),
    ]
    verdict = Section("What is above the spread, and what is noise", comparison)
    speed = Section("How fast each start learns", [about], GOOD, pictures=[curve], tables=tables, parts=[verdict])
    subject = f"{comparison[0]} {len(split.train)} images without labels pretrained, {result.num_labels} had labels."
    facts = {"Minutes": round(sum(result.seconds.values()) / 60, 1), "Trainings": SEEDS * len(STARTS), **facts}
    return Report("Demo: does pretraining make training faster?", subject, facts, [speed, *sections])


def _write_record(folder: Path, content: Mapping[str, Any]) -> None:
    write_json(folder / RECORD, {"made_by": f"mfm_demo {mfm_nnunet.__version__}", **content})
