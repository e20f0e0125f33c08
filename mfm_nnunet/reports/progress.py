"""Show progress on the console, as bars or lines; write ``log.jsonl``, ``progress.png`` and pictures of examples."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet import terminal
from mfm_nnunet.files import atomic_write

SECONDS_BETWEEN_LINES = 15.0
"""Seconds between two progress lines of a part of the work, where there is no terminal."""
SECONDS_BETWEEN_PLOTS = 60.0
REFRESHES_PER_SECOND = 4
_LABEL_COLOURS = ("purple", "green", "red", "brown", "pink", "olive", "cyan", "grey")
logger = logging.getLogger(__name__)


class Track:
    """A part of the work in progress. Call it after each of its ``total`` units, with a note to show beside them."""

    def __init__(self, what: str, total: int, unit: str, first: int) -> None:
        self.what, self.total, self.unit, self.first = what, total, unit, first
        self.done, self.note = first, ""
        self.show: Callable[[], None] = lambda: None
        self._start = self._last = time.monotonic()

    def __call__(self, note: str = "") -> None:
        self.done, self.note, self._last = min(self.done + 1, self.total), note, time.monotonic()
        self.show()

    def left(self) -> str:
        """Return the time left by the mean time of the units so far, h:mm:ss; empty before the first is done."""
        num_done = self.done - self.first
        if not num_done:
            return ""
        seconds = (self._last - self._start) / num_done * (self.total - self.done)
        return format_seconds(max(0.0, seconds - (time.monotonic() - self._last)))

    def line(self) -> str:
        """Describe the progress in a line without control characters."""
        if not self.total:
            return f"{self.what}: {format_seconds(time.monotonic() - self._start)} so far"
        left = self.left()
        parts = (f"{self.done} of {self.total} {self.unit}", left and f"about {left} left", self.note)
        return f"{self.what}: {', '.join(filter(None, parts))}"


@contextlib.contextmanager
def track(
    what: str, total: int = 0, unit: str = "cases", first: int = 0, *, is_silent: bool = False, lines: bool = True
) -> Iterator[Track]:
    """Show the progress of a part of the work: a bar with the time left on a terminal, else a line every 15 seconds.

    ``total`` is 0 for work without units; ``first`` units were done before. Parts may be nested. Steps of a training
    report the first one at once. ``lines`` is False if the caller prints a line per unit.
    """
    part = Track(what, total, unit, first)
    if is_silent or logger.level > logging.INFO:  # --disable_progress_bar
        yield part
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars.shown(part):
            yield part
    elif lines:
        with _lines(part):
            yield part
    else:
        yield part


@contextlib.contextmanager
def _lines(part: Track) -> Iterator[None]:
    """Print a line on ``part`` every ``SECONDS_BETWEEN_LINES``, from a thread: a long unit is not silent either."""
    is_over, has_begun = threading.Event(), threading.Event()

    def speak() -> None:
        if part.unit == "steps" and has_begun.wait(SECONDS_BETWEEN_LINES) and not is_over.is_set():
            say(part.line())
        while not is_over.wait(SECONDS_BETWEEN_LINES):
            say(part.line())

    part.show = has_begun.set
    speaker = threading.Thread(target=speak, daemon=True, name="progress")
    speaker.start()
    try:
        yield
    finally:
        is_over.set()
        has_begun.set()
        speaker.join()


class _Bars:
    """The bars of this process on its terminal: the only live display. It exists while a part is shown."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._unfinished = ""

    @contextlib.contextmanager
    def shown(self, part: Track) -> Iterator[None]:
        """Show the bar of a part, below those of the parts around it."""
        is_first, bar = self._progress is None, None
        bars = self._progress = self._progress or _make_progress()
        with terminal.written_above(self._write_above) if is_first else contextlib.nullcontext():
            try:
                if is_first:
                    bars.start()
                title, values = f"{_stage}{terminal.one_message(part.what)}", {"note": "", "part": part}
                bar = bars.add_task(title, total=part.total or None, completed=part.done, **values)
                part.show = functools.partial(self._update, bar, part)
                yield
            finally:
                if bar is not None:
                    bars.remove_task(bar)
                if is_first:
                    self._write_above("\n" if self._unfinished else "")
                    self._progress = None
                    bars.stop()

    def _update(self, bar: Any, part: Track) -> None:
        self._progress.update(bar, completed=part.done, note=part.note)

    def _write_above(self, text: str) -> None:
        """Write whole lines above the bars, which are drawn anew below them."""
        from rich.text import Text

        lines, has_line, self._unfinished = (self._unfinished + text).rpartition("\n")
        if has_line and self._progress is not None:
            self._progress.console.print(Text(lines), soft_wrap=True)
        elif has_line:
            terminal.raw(sys.stderr).write(f"{lines}\n")


def _make_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Screen(Console):
        def show_cursor(self, show: bool = True) -> bool:  # a command that is killed would leave it hidden
            return False

    class Amount(ProgressColumn):
        def render(self, task: Any) -> Text:
            if task.total is None:
                return Text(f"{format_seconds(task.elapsed or 0)} so far")
            part = task.fields["part"]
            left = part.left()
            return Text(f"{part.done}/{part.total} {part.unit}" + (left and f"  {left} left"))

    is_command = terminal.is_escaped(sys.stderr)  # else nothing passes through written_above
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        BarColumn(None, table_column=Column(ratio=1)),
        Amount(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True)),
        console=Screen(file=terminal.raw(sys.stderr), force_jupyter=False), transient=True, expand=True,
        refresh_per_second=REFRESHES_PER_SECOND, redirect_stdout=not is_command, redirect_stderr=not is_command,
    )  # fmt: skip


_bars = _Bars()
_stage = ""
"""Number of the current stage, before the title of each bar."""


class Stages:
    """Numbered stages of a long job; a context manager. Each begins with a line: ``== 3 of 8  Pretrain: MAE``."""

    def __init__(self, total: int) -> None:
        self.total, self.number = total, 0

    def begin(self, title: str) -> None:
        """Begin the next stage."""
        global _stage
        self.number += 1
        _stage = f"[{self.number} of {self.total}] "
        logger.info("\n== %d of %d  %s", self.number, self.total, title)

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *error: object) -> None:
        global _stage
        _stage = ""


def say(text: str) -> None:
    """Print a line on the progress of the work."""
    print(terminal.one_message(text), file=sys.stderr, flush=True)


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


def plot_watch(history: Sequence[Mapping[str, Any]], names: Sequence[str], file: Path) -> None:
    """Draw how a network does on unlabelled images: Dice, confident share and weight, and the share of each class."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] + 1 for row in history]
    upper.plot(
        epochs, [row["dice"] for row in history], color="black", label="pseudo Dice on labelled validation crops"
    )
    upper.plot(epochs, [row["confident"] for row in history], color="tab:blue", label="share of confident voxels")
    weights = upper.twinx()
    weights.plot(epochs, [row["weight"] for row in history], color="tab:grey", linestyle=":", label="weight (right)")
    weights.set(ylabel="weight of unlabelled images", ylim=(0, None))
    upper.set(title="training with unlabelled images", ylim=(0, 1.02))
    upper.legend(handles=[*upper.lines, *weights.lines], loc="lower right")
    for number, name in enumerate(names):
        shares = [100 * row["volume"][number] or math.nan for row in history]
        lower.plot(epochs, shares, color=f"tab:{_LABEL_COLOURS[number % len(_LABEL_COLOURS)]}", label=name)
    lower.set(xlabel="epoch", ylabel="predicted share of the unlabelled images in %")
    lower.set_yscale("log")
    lower.legend(loc="best")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
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
