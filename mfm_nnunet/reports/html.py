"""Reports as one HTML file: sections of text, tables and pictures, in plain data, rendered by a template.

A file needs no network and runs no script; its content security policy forbids both. Texts of users and files are
escaped. A report never costs a result: see :func:`write_report`.
"""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mfm_nnunet.files import atomic_write, shown
from mfm_nnunet.terminal import escaped
from mfm_nnunet.version import __version__

logger = logging.getLogger(__name__)

FILE = "report.html"
QUALITY = 86
"""Quality of JPEG pictures."""
_INK = "#0a0b0c"
"""Colour that stands for the page's text in drawings; it follows light, dark and print."""
_FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])+")


@dataclass(frozen=True)
class Picture:
    """A picture with its description for those who do not see it; ``content`` is a data URI, or a drawing (SVG)."""

    content: str
    alt: str
    caption: str = ""
    is_drawing: bool = False
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels, so that the page does not jump."""


@dataclass(frozen=True)
class Table:
    """A table; the first column names its rows. ``is_folded`` hides it behind its title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    is_folded: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a report. ``good`` says how it looks if all is well; ``flags`` are what needs attention."""

    title: str
    texts: Sequence[str] = ()
    good: str = ""
    flags: Sequence[str] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[tuple[str, str]] = ()
    """Names and colours (#rrggbb) in the pictures."""
    pictures: Sequence[Picture] = ()
    parts: Sequence[Section] = ()


@dataclass(frozen=True)
class Report:
    """A report: its title, a sentence on its subject, main facts by name, and sections."""

    title: str
    subject: str
    facts: Mapping[str, Any]
    sections: Sequence[Section]
    contains: str = "names of cases, pictures of patients and measures of their organs"
    """Warning that the page must not leave the house."""
    versions: Mapping[str, Any] = field(default_factory=lambda: package_versions())


def write_report(make: Callable[[], Report], file: Path) -> None:
    """Write the report that ``make`` returns. An error in it costs one warning line and nothing else."""
    try:
        text = render(make())
        with atomic_write(file) as handle:
            handle.write(shown(text).encode())
        logger.info("report: %s", file)
    except Exception as error:  # whatever it is: the result of the job is already there
        reason = (str(error).splitlines() or [""])[0][:300]
        logger.warning("%s was not written; the results are complete. %s: %s", file, type(error).__name__, reason)
        logger.debug("the report failed", exc_info=True)


def render(report: Report) -> str:
    """Return the HTML page of a report."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mfm_nnunet", "reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_finalise,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(report=report)


def _finalise(value: Any) -> Any:
    """Escape control characters in texts; write numbers briefly, and a dash for none."""
    if isinstance(value, float):
        return "-" if value != value else format_number(value)
    if value is None:
        return "-"
    return escaped(value) if type(value) is str else value


def format_number(value: float) -> str:
    """Format a number with four digits, and without an exponent if it is large."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def package_versions() -> dict[str, str]:
    """Return the versions that decide results."""
    names = ("nnunetv2", "torch", "numpy")
    return {"mfm_nnunet": __version__, **{name: version(name) for name in names}}


def without_folders(text: str) -> str:
    """Shorten paths in a message to the names of files: folders may name people."""
    return _FOLDERS.sub("", text)


def flat_table(title: str, values: Mapping[str, Any]) -> Table:
    """Return a folded table of nested settings, one value a row, without folders."""
    rows: list[tuple[str, str]] = []

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                add(f"{prefix}.{name}" if prefix else str(name), item)
        else:
            rows.append((prefix, without_folders(str(value))[:400]))

    add("", values)
    return Table(title, ("setting", "value"), rows, is_folded=True)


def embed_image(image: Any, alt: str, caption: str = "") -> Picture:
    """Embed a Pillow image as JPEG."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY, subsampling=0)
    return Picture(_data_uri(stream.getvalue(), "jpeg"), alt, caption, size=image.size)


def file_picture(file: Path, alt: str, caption: str = "", colours: int = 128) -> Picture:
    """Embed a PNG that a job wrote, with a palette of ``colours``."""
    from PIL import Image

    with Image.open(file) as image:
        reduced = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        stream = io.BytesIO()
        reduced.save(stream, "PNG", optimize=True)
        return Picture(_data_uri(stream.getvalue(), "png"), alt, caption, size=image.size)


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def draw_curves(
    series: Mapping[str, Sequence[float | None]],
    ylabel: str,
    alt: str,
    is_share: bool = False,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    steps: int = 0,
) -> Picture:
    """Draw values per epoch as lines, one for each name; None and NaN leave gaps. ``is_share``: from 0 to 1.

    ``bands`` are limits around some lines. With ``steps`` per epoch the axis counts these.
    """
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours = ("#3b82f6", "#e8743b", "#19a979", "#b05cc7", "#c99a06", "#d6409f", "#0e9aa7", "#8a94a0")
    ours = {"svg.fonttype": "none", "svg.hashsalt": ylabel, "font.family": "sans-serif"}
    with style.context(["default", ours]):  # nnU-Net changes the style of the whole process
        figure = Figure(figsize=(7, 2.9), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(series.items()):
            points = [float("nan") if value is None else float(value) for value in values]
            marker = "o" if len(points) <= 20 else None
            label = escaped(name).replace("$", r"\$").replace("_", " ")
            places, colour = (
                [(steps or 1) * (epoch + 1) for epoch in range(len(points))],
                colours[number % len(colours)],
            )
            axes.plot(places, points, marker=marker, markersize=4, label=label, color=colour)
            if bands and name in bands:
                low, high = zip(*bands[name])
                axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel("steps" if steps else "epoch", color=_INK)
        axes.set_ylabel(ylabel, color=_INK)
        if is_share:
            axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.tick_params(colors=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(_INK)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, labelcolor=_INK, ncols=min(4, len(series)))
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
    return Picture(re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL), alt, is_drawing=True)
