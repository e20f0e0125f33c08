"""What a person sees of a run: console progress with ETA, ``log.jsonl``, ``progress.png`` and example pictures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.checkpoint import atomic_write

SECONDS_BETWEEN_LINES = 20.0
SECONDS_BETWEEN_PLOTS = 60.0


class Progress:
    """Console progress: one line that renews itself on a terminal, plain lines every 20 seconds elsewhere.

    The first line appears after the first step, so the time left is known within a minute of the start.
    """

    def __init__(self, total_steps: int, first_step: int = 0, is_silent: bool = False) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self.is_silent = is_silent
        self.is_terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.last_line = -float("inf")

    def step(self, step: int, where: str, loss: float) -> None:
        """Report that ``step`` steps of all are done."""
        now = time.monotonic()
        if self.is_silent or now - self.last_line < (0.2 if self.is_terminal else SECONDS_BETWEEN_LINES):
            return
        self.last_line = now
        done = max(step - self.first_step, 1)
        seconds_per_step = (now - self.start) / done
        left = format_seconds(seconds_per_step * (self.total_steps - step))
        self._write(f"{where}  loss {loss:.4f}  {1 / max(seconds_per_step, 1e-9):.2f} steps/s  ETA {left}", "\r")

    def line(self, text: str) -> None:
        """One line that stays."""
        if not self.is_silent:
            self._write(text, "\n")

    def _write(self, text: str, end: str) -> None:
        if self.is_terminal:
            print(f"\r\x1b[2K{text}", end="" if end == "\r" else "\n", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def write_log(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    """``log.jsonl``: one line per epoch. It is derived from the saved state, so a resumed run has no double lines."""
    with atomic_write(file) as handle:
        handle.write("".join(json.dumps(dict(row)) + "\n" for row in history).encode())


def plot_progress(history: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """``progress.png``: training and validation loss, learning rate and epoch time over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    epochs = [row["epoch"] + 1 for row in history]
    upper.plot(epochs, [row["train_loss"] for row in history], color="tab:blue", label="training loss")
    upper.plot(epochs, [row["validation_loss"] for row in history], color="tab:orange", label="validation loss")
    upper.set(title=title, ylabel="loss")
    upper.grid(alpha=0.3)
    upper.legend()
    lower.plot(epochs, [row["learning_rate"] for row in history], color="tab:green")
    lower.set(xlabel="epoch", ylabel="learning rate")
    lower.grid(alpha=0.3)
    seconds = lower.twinx()
    seconds.plot(epochs, [row["seconds"] for row in history], color="tab:grey", linestyle=":")
    seconds.set_ylabel("seconds per epoch (dotted)")
    FigureCanvasAgg(figure)
    with atomic_write(file) as handle:
        figure.savefig(handle, format="png", dpi=100)


def plot_examples(volumes: Mapping[str, np.ndarray], file: Path, title: str) -> None:
    """A picture of what the task sees, hides and reconstructs.

    ``volumes`` are named arrays (C, D, H, W) or (C, H, W); the first channel is shown in the middle slice of each axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    slices = {name: _middle_slices(np.asarray(volume[0], np.float32)) for name, volume in volumes.items()}
    num_rows = max(len(planes) for planes in slices.values())
    figure = Figure(figsize=(2.6 * len(slices), 2.6 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, len(slices), squeeze=False)
    reference = np.asarray(next(iter(volumes.values()))[0], np.float32)
    limits = np.percentile(reference, [0.5, 99.5])
    for column, (name, planes) in enumerate(slices.items()):
        is_class_map = np.array_equal(volumes[name], np.round(volumes[name])) and volumes[name].max() < 64
        for row, plane in enumerate(planes):
            axis = axes[row, column]
            if is_class_map:
                axis.imshow(plane, cmap="viridis", interpolation="nearest")
            else:
                axis.imshow(plane, cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    FigureCanvasAgg(figure)
    with atomic_write(file) as handle:
        figure.savefig(handle, format="png", dpi=110)


def _middle_slices(volume: np.ndarray) -> list[np.ndarray]:
    if volume.ndim == 2:
        return [volume]
    return [np.take(volume, volume.shape[axis] // 2, axis) for axis in range(3)]
