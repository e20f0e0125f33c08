"""Watch a training with unlabelled images: one row per epoch, warnings in plain words, and a stop after a collapse.

A network that teaches itself can teach itself mistakes. Its loss then falls while its masks get worse, so the loss
tells nothing; these rows do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np

from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.reports.examples import plot_examples
from mfm_nnunet.reports.progress import plot_watch

LOG, PLOT, EXAMPLES = "unlabelled.jsonl", "unlabelled.png", "unlabelled_examples.png"
WEAK_DICE = 0.6
"""Pseudo Dice below which pseudo labels are expected to teach mistakes."""
DRIFT = 3.0
"""Change of a class's share of the unlabelled voxels, as a factor, that is warned of."""
COLLAPSE_DICE = 0.5
COLLAPSE_VOLUME = 10.0
COLLAPSE_CONFIDENT = 0.999
COLLAPSE_EPOCHS = 3
"""A collapse: in so many epochs in a row the pseudo Dice is below COLLAPSE_DICE of the best one before, and the
foreground on unlabelled crops is COLLAPSE_VOLUME times smaller or larger than with labels alone, or the share of
confident voxels is at least COLLAPSE_CONFIDENT."""

Row = dict[str, Any]


@dataclass
class Watch:
    """The rows of a run, for classes or regions of these names."""

    names: Sequence[str]
    history: list[Row] = field(default_factory=list)

    @classmethod
    def of(cls, dataset: DatasetJson) -> Watch:
        """Make the watch of a dataset; nnU-Net sorts labels by value, and regions as dataset.json does."""
        foreground = dataset.foreground
        return cls(list(foreground) if dataset.has_regions else sorted(foreground, key=lambda name: foreground[name]))

    def add(self, epoch: int, weight: float, results: Mapping[str, Any]) -> list[str]:
        """Add the results of an epoch, whose last step used this weight; return lines for the log."""
        dice = [value for value in results["validation_dice"] if np.isfinite(value)]
        row: Row = {
            "epoch": epoch,
            "weight": weight,
            "dice": float(np.mean(dice)) if dice else 0.0,
            "confident": float(results["validation_confident"]),
            "volume": [float(value) for value in results["validation_volume"]],
        }
        self.history = [*(old for old in self.history if old["epoch"] < epoch), row]
        shares = ", ".join(f"{name} {share:.2%}" for name, share in zip(self.names, row["volume"]))
        line = f"unlabelled: weight {weight:.3f}  confident {row['confident']:.1%}  {shares}"
        return [line, *(f"WARNING: {warning}" for warning in find_warnings(self.history, self.names))]

    def draw(self, folder: Path, pictures: Mapping[str, Any] | None) -> None:
        """Draw the rows and an example into the run folder."""
        with matplotlib.style.context("default"):  # nnU-Net's progress.png leaves letters two and a half times as large
            plot_watch(self.history, self.names, folder / PLOT)
            if pictures:
                shown = {name: volume.cpu().numpy() for name, volume in pictures.items()}
                plot_examples(shown, folder / EXAMPLES, "an unlabelled crop, and what the network says about it")

    def require_no_collapse(self, folder: Path) -> None:
        """Raise MFMError (E_COLLAPSED) if the last epochs are a collapse."""
        if not has_collapsed(self.history):
            return
        row, best = self.history[-1], max(row["dice"] for row in self.history)
        raise MFMError(
            "E_COLLAPSED",
            f"{folder}: the network collapsed on its own labels: its pseudo Dice fell from {best:.3f} to "
            f"{row['dice']:.3f}, and on unlabelled crops it predicts {sum(row['volume']):.2%} foreground. "
            "checkpoint_best.pth holds the best weights. Move the folder away and train again with labels alone for "
            "longer (a larger semi.start), a smaller semi.weight, or more labelled cases.",
        )


def find_warnings(history: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Return warnings about the last epoch; one that the epoch before gave is not repeated."""
    before = _conditions(history[:-1], names)
    return [text for name, text in _conditions(history, names).items() if name not in before]


def has_collapsed(history: Sequence[Row]) -> bool:
    """Return whether the last epochs are a collapse."""
    last = history[-COLLAPSE_EPOCHS:]
    if len(last) < COLLAPSE_EPOCHS or not all(row["weight"] > 0 for row in last):
        return False
    before = history[:-COLLAPSE_EPOCHS]
    best, usual = max((row["dice"] for row in before), default=0.0), sum(_usual_volume(history))
    return all(row["dice"] < COLLAPSE_DICE * best and _is_extreme(row, usual) for row in last)


def _is_extreme(row: Row, usual: float) -> bool:
    volume = sum(row["volume"])
    has_moved = usual > 0 and not usual / COLLAPSE_VOLUME <= volume <= usual * COLLAPSE_VOLUME
    return has_moved or row["confident"] >= COLLAPSE_CONFIDENT


def _usual_volume(history: Sequence[Row]) -> list[float]:
    """Return the share of each class with labels alone, in the last epoch of them; of the first epoch without any."""
    alone = [row for row in history if row["weight"] == 0]
    return (alone[-1] if alone else history[0])["volume"]


def _conditions(history: Sequence[Row], names: Sequence[str]) -> dict[str, str]:
    """Describe what is wrong in the last epoch, by a name for each thing."""
    if not history or history[-1]["weight"] == 0:
        return {}
    row, usual = history[-1], _usual_volume(history)
    if not any(row["volume"]):
        return {
            "nothing": "the network predicts nothing on the unlabelled images, so it teaches itself that there is "
            "nothing. Train longer on labels alone (a larger semi.start), or check that these images are like the "
            "labelled ones."
        }
    found = {}
    alone = [other["dice"] for other in history if other["weight"] == 0]
    if alone and alone[-1] < WEAK_DICE:
        found["weak"] = (
            f"with labels alone the pseudo Dice was {alone[-1]:.2f}. Below {WEAK_DICE} pseudo labels teach mistakes: "
            "train longer on labels alone (semi.start), and compare with the same training without --unlabelled."
        )
    for name, share, before in zip(names, row["volume"], usual):
        if before and not before / DRIFT <= share <= before * DRIFT:
            found[name] = (
                f"'{name}' takes {share:.2%} of the unlabelled images; with labels alone it took {before:.2%}. Look at "
                f"{EXAMPLES}: if the labels are wrong, lower semi.weight."
            )
    return found
