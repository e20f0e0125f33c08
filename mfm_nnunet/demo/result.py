"""What the demo found: its arms, Dice and times as a table, and an overlay picture per test case."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_nnunet.demo.data import Split
from mfm_nnunet.files import inside
from mfm_nnunet.metrics import dice, foreground_labels, ignore_label, mean_dice
from mfm_nnunet.reports.overlays import draw_overlay


@dataclass(frozen=True)
class Arm:
    """One way to start the fine-tuning."""

    key: str
    title: str
    pretext: str | None
    plans_name: str


ARMS = (
    Arm("scratch", "from scratch", None, "mfmDemoScratchPlans"),
    Arm("mae", "MAE", "mae", "mfmDemoMaePlans"),
    Arm("volume_fusion", "Volume Fusion", "volume_fusion", "mfmDemoVolumeFusionPlans"),
)


@dataclass
class DemoResult:
    """Dice per arm, label and test case, seconds per stage, and where the files are."""

    dice: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    """The folder of masks by arm."""
    masks: list[Path] = field(default_factory=list)
    overlays: list[Path] = field(default_factory=list)

    def mean(self, arm: str, label: str | None = None) -> float:
        """Mean Dice of an arm over the test cases: of one label, or the mean over the labels."""
        if label is None:
            return mean_dice([self.mean(arm, name) for name in self.dice[arm]])
        return mean_dice(list(self.dice[arm][label].values()))

    def dice_or_none(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """As ``dice``, for JSON: None where neither reference nor prediction has the label."""
        return {
            arm: {
                label: {case: None if score != score else score for case, score in cases.items()}
                for label, cases in labels.items()
            }
            for arm, labels in self.dice.items()
        }

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds that the block takes to ``stage``."""
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


def compare(result: DemoResult, split: Split, folder: Path) -> None:
    """Fill in the Dice of every arm on every test case, and draw one overlay per case into ``folder``."""
    labels, ignore = foreground_labels(split.dataset_json), ignore_label(split.dataset_json)
    ending = split.dataset_json["file_ending"]
    folder.mkdir(exist_ok=True)
    result.dice = {arm.key: {label: {} for label in labels} for arm in ARMS}
    for case in split.test:
        assert case.label is not None
        reference, predictions = _read_mask(case.label), {}
        for arm in ARMS:
            file = inside(result.folders[arm.key], f"{case.name}{ending}")
            result.masks.append(file)
            mask = _read_mask(file)
            for label, values in labels.items():
                result.dice[arm.key][label][case.name] = dice(reference, mask, values, ignore)
            score = mean_dice([result.dice[arm.key][label][case.name] for label in labels])
            predictions[f"{arm.title}, Dice {score:.2f}"] = file
        overlay = inside(folder, f"{case.name}.png")
        title = f"{case.name}: predicted and reference labels"
        draw_overlay(overlay, title, case.images[0], case.label, predictions, labels)
        result.overlays.append(overlay)


def format_result(result: DemoResult) -> str:
    """The table: Dice per label and arm, and times."""
    scores = result.dice[ARMS[0].key]
    num_cases = len(next(iter(scores.values())))
    rows = [["start", *scores, "mean", "pretraining", "fine-tuning", "predicting"]]
    for arm in ARMS:
        values = [f"{result.mean(arm.key, label):.3f}" for label in [*scores, None]]
        times = [result.seconds.get(f"{stage} {arm.key}") for stage in ("pretrain", "train", "predict")]
        rows.append([arm.title, *values, *("-" if time_ is None else f"{time_:.0f} s" for time_ in times)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    others = ", ".join(f"{name} {result.seconds[name]:.0f} s" for name in ("data", "plan", "pictures"))
    total = f"In all {sum(result.seconds.values()):.0f} s ({others}, and what the table says)."
    return "\n".join([f"Mean Dice over {num_cases} test cases", lines[0], "-" * len(lines[0]), *lines[1:], total])


def _read_mask(file: Path) -> Any:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
