"""Report on a run: console progress with ETA, ``log.jsonl``, ``progress.png`` and example pictures."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.files import atomic_write
from mfm_nnunet.reports.views import Plane, reorient

SECONDS_BETWEEN_LINES = 20.0
SECONDS_BETWEEN_PLOTS = 60.0
_LABEL_COLOURS = ("purple", "green", "red", "brown", "pink", "olive", "cyan", "grey")


class Progress:
    """Console progress: a single rewritten line on a terminal, else a new line every 20 seconds.

    The first line appears after the first step, so an ETA is available early.
    """

    def __init__(self, total_steps: int, first_step: int = 0, is_silent: bool = False) -> None:
        self.total_steps = total_steps
        self.first_step = first_step
        self.is_silent = is_silent
        self.is_terminal = sys.stderr.isatty()
        self.start = time.monotonic()
        self.last_line = -float("inf")

    def step(self, step: int, where: str, loss: float) -> None:
        """Report that ``step`` steps are done."""
        now = time.monotonic()
        if self.is_silent or now - self.last_line < (0.2 if self.is_terminal else SECONDS_BETWEEN_LINES):
            return
        self.last_line = now
        done = max(step - self.first_step, 1)
        seconds_per_step = (now - self.start) / done
        left = format_seconds(seconds_per_step * (self.total_steps - step))
        self._write(f"{where}  loss {loss:.4f}  {1 / max(seconds_per_step, 1e-9):.2f} steps/s  ETA {left}", "\r")

    def line(self, text: str) -> None:
        """Print a line that is not overwritten."""
        if not self.is_silent:
            self._write(text, "\n")

    def _write(self, text: str, end: str) -> None:
        if self.is_terminal:
            print(f"\r\x1b[2K{text}", end="" if end == "\r" else "\n", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def write_log(history: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write ``log.jsonl``, one line per epoch. It is rewritten whole, so a resumed run has no duplicate lines."""
    with atomic_write(file) as handle:
        handle.write("".join(json.dumps(dict(row)) + "\n" for row in history).encode())


def save_figure(figure: Any, file: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with atomic_write(file) as handle:
        figure.savefig(handle, format="png", dpi=dpi)


def plot_progress(history: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """Draw ``progress.png``: losses, Dice of the probe, learning rate and time per epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    epochs = [row["epoch"] + 1 for row in history]
    upper.plot(epochs, [row["train_loss"] for row in history], color="tab:blue", label="training loss")
    upper.plot(epochs, [row["validation_loss"] for row in history], color="tab:orange", label="validation loss")
    upper.set(title=title, ylabel="loss")
    upper.grid(alpha=0.3)
    lines = [*upper.lines, *_plot_probe(upper.twinx, history)]
    figure.legend(handles=lines, loc="outside lower center", ncols=5)
    lower.plot(epochs, [row["learning_rate"] for row in history], color="tab:green")
    lower.set(xlabel="epoch", ylabel="learning rate")
    lower.grid(alpha=0.3)
    seconds = lower.twinx()
    seconds.plot(epochs, [row["seconds"] for row in history], color="tab:grey", linestyle=":")
    seconds.set_ylabel("s per epoch (dotted)")
    save_figure(figure, file, dpi=100)


def plot_reliability(bins: Sequence[np.ndarray], file: Path, title: str) -> None:
    """Draw the share of hits against the stated probability, with the number of predictions per bin below."""
    from matplotlib.figure import Figure

    stated, shares, counts = bins
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="tab:grey", linestyle=":")
    upper.plot(stated[counts > 0], shares[counts > 0], color="tab:blue", marker="o")
    upper.set(title=title, ylabel="share that is right", ylim=(-0.02, 1.02))
    edges = np.linspace(0, 1, len(counts) + 1)
    lower.bar(edges[:-1], counts, 1 / len(counts), align="edge", color="tab:blue", edgecolor="white")
    lower.set(xlabel="probability stated", ylabel="cases", xlim=(0, 1))
    save_figure(figure, file, dpi=100)


def plot_agreement(truth: np.ndarray, predicted: np.ndarray, file: Path, title: str) -> None:
    """Draw predicted against true numbers, and Bland and Altman's differences."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(truth, predicted, "o", color="tab:blue", markersize=4)
    left.axline((float(truth.mean()), float(truth.mean())), slope=1, color="tab:grey", linestyle=":")
    left.set(title=title, xlabel="truth", ylabel="prediction")
    difference = predicted - truth
    right.plot((predicted + truth) / 2, difference, "o", color="tab:blue", markersize=4)
    for share in (-1.96, 0, 1.96):
        right.axhline(
            difference.mean() + share * difference.std(), color="tab:grey", linestyle="-" if not share else ":"
        )
    right.set(xlabel="mean of both", ylabel="prediction - truth")
    save_figure(figure, file, dpi=100)


def _plot_probe(new_axis: Callable[[], Any], history: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Plot the Dice of the probe (mean and first labels) on a separate axis; return the lines."""
    rows = [row for row in history if row.get("probe_dice") is not None]
    if not rows:
        return []
    axis, epochs = new_axis(), [row["epoch"] + 1 for row in rows]
    names = [name for name in rows[0] if name.startswith("probe_dice_")]
    for name, colour in zip(names if len(names) > 1 else (), _LABEL_COLOURS):
        values = [math.nan if row[name] is None else row[name] for row in rows]
        style = {"color": f"tab:{colour}", "linestyle": "--", "marker": ".", "linewidth": 1}
        axis.plot(epochs, values, label=f"probe: {name.removeprefix('probe_dice_')}", **style)
    axis.plot(epochs, [row["probe_dice"] for row in rows], color="black", marker="o", label="probe: mean Dice")
    axis.set(ylabel="Dice of the probe", ylim=(0, 1))
    return list(axis.lines)


@dataclass(frozen=True)
class Frame:
    """Position of a task's pictures: directions (e.g. ``SPL``) and lengths of the axes; letters unless mirrored."""

    directions: str
    spacing: tuple[float, ...]
    has_letters: bool = True


def plot_examples(
    volumes: Mapping[str, np.ndarray],
    file: Path,
    title: str,
    slice_axes: Sequence[int] = (0, 1, 2),
    frame: Frame | None = None,
) -> None:
    """Draw example volumes of a task: one column per volume, one row per axis of ``slice_axes``.

    ``volumes`` are named arrays (C, D, H, W) or (C, H, W). The first channel is shown in the slice of each axis that
    shows most: the same for all volumes. With a ``frame``, rows are planes of the body with true proportions; without,
    axes of the array. Images use the grey scale of the first one. Class maps share a colour scale, and so do tables
    (one voxel deep, shown once).
    """
    from matplotlib.figure import Figure

    shown = {name: np.asarray(volume[0], np.float32) for name, volume in volumes.items()}
    rows = _choose_rows(next(iter(shown.values())), slice_axes, frame)
    planes = {name: _cut_rows(volume, rows, frame) for name, volume in shown.items()}
    num_rows = max(map(len, planes.values()))
    widths = [min(4.0, max(0.5, first.shape[1] / first.shape[0])) for first, *_ in planes.values()]
    figure = Figure(figsize=(2.6 * sum(widths), 2.6 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, len(planes), squeeze=False, width_ratios=widths)
    colours = _colours(shown)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for column, name in enumerate(planes):
        axes[0, column].set_title(name, fontsize=10)
        for row, slice_HW in enumerate(planes[name]):
            plane, aspect = rows[row]
            is_plane = frame is not None and not _is_table(shown[name])
            options = {**colours[name], "aspect": aspect if is_plane else 1}
            axes[row, column].imshow(slice_HW, interpolation="nearest", **options)
            if is_plane and column == 0 and plane.name:
                axes[row, 0].set_ylabel(plane.name.partition(",")[0], fontsize=10)
            if is_plane and frame and frame.has_letters:
                _write_letters(axes[row, column], plane.letters)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, file, dpi=110)


def _choose_rows(volume: np.ndarray, slice_axes: Sequence[int], frame: Frame | None) -> list[tuple[Plane, float]]:
    """Choose a slice along each axis, near the middle and with most contrast, and its height by width of a pixel."""
    if volume.ndim == 2 and frame is None:
        return [(Plane(-1), 1.0)]
    if _is_table(volume):
        return [(Plane(axis, 0, 1), 1.0) for axis in slice_axes]
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    if frame is not None:
        volume, spacing = _turn(volume, frame)
    rows = []
    for axis in [volume.shape.index(1)] if 1 in volume.shape else slice_axes:
        size = volume.shape[axis]
        middle = range(size // 4, max(size // 4 + 1, size - size // 4))
        index = max(middle, key=lambda place: float(volume.take(place, axis).std()))
        height, width = Plane(axis).pixel(spacing)
        rows.append((Plane(axis, index, size), height / width))
    return rows


def _turn(volume: np.ndarray, frame: Frame) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return a volume, or a slice of one, with the axes (S, P, L), and its spacing."""
    return reorient(volume if volume.ndim == 3 else volume[None], frame.directions, frame.spacing)


def _cut_rows(volume: np.ndarray, rows: Sequence[tuple[Plane, float]], frame: Frame | None) -> list[np.ndarray]:
    if _is_table(volume):
        return [volume[0]]
    if frame is not None:
        turned, _ = _turn(volume, frame)
        return [plane.cut(turned) for plane, _ in rows]
    if volume.ndim == 2:
        return [volume]
    return [volume.take(min(plane.index, volume.shape[plane.axis] - 1), plane.axis) for plane, _ in rows]


def _write_letters(axis: Any, letters: str) -> None:
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"),
              (0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, (x, y, horizontal, vertical) in zip(letters, places):
        box = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1.0}
        axis.text(
            x, y, letter, transform=axis.transAxes, ha=horizontal, va=vertical, color="white", fontsize=7, bbox=box
        )


def _is_table(volume: np.ndarray) -> bool:
    return volume.ndim == 3 and volume.shape[0] == 1


def _is_class_map(volume: np.ndarray) -> bool:
    return not _is_table(volume) and volume.max() < 64 and np.array_equal(volume, np.round(volume))


def _colours(shown: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Choose ``imshow`` options so that equal values look equal in all volumes of a kind."""
    kinds = {n: "table" if _is_table(v) else "classes" if _is_class_map(v) else "image" for n, v in shown.items()}
    styles: dict[str, dict[str, Any]] = {}
    for kind in set(kinds.values()):
        same = [shown[name] for name in shown if kinds[name] == kind]
        if kind == "image":
            low, high = np.percentile(same[0], [0.5, 99.5])
        else:
            low, high = min(volume.min() for volume in same), max(volume.max() for volume in same)
        styles[kind] = {"cmap": "gray" if kind == "image" else "viridis", "vmin": float(low), "vmax": float(high)}
    return {name: styles[kind] for name, kind in kinds.items()}
