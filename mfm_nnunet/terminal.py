"""Output for terminals, logs and reports, with control characters escaped.

File names and file contents are untrusted. A name may contain sequences that move the cursor, recolour or retitle a
terminal, change the direction of the text, or break the line and imitate a message. Bytes that are not UTF-8 cannot be
printed at all.
"""

from __future__ import annotations

import contextlib
import html
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters except tab and line feed, direction marks, line breaks, and bytes that are not UTF-8."""
_STRAY_BREAK = re.compile(r"\n(?!  |\Z)")
_PROGRESS = re.compile(r"\r(\x1b\[2K)?|\n*(\x1b\[A)+\Z")
"""Start of a write that redraws a line or moves up to one: progress bars, never names."""


def escaped(text: str) -> str:
    """Escape each control character of ``text`` as Python writes it, e.g. ``\\x1b``."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_message(text: str) -> str:
    """Escape an error or a log line as :func:`escaped`, and line breaks of names as ``\\n``.

    Multi-line messages indent all lines but the first, so any other line break is part of a name.
    """
    return _STRAY_BREAK.sub(r"\\n", escaped(text))


def in_markdown(text: str) -> str:
    """Escape foreign text for a line or cell of Markdown: no HTML, links, table borders or line breaks."""
    line = re.sub(r"\s*\n\s*", " ", escaped(text))
    return line.replace("<", "&lt;").replace("|", "\\|").replace("](", "]\\(")


class Rows(list[Any]):
    """A list that notebooks show as a table; its items are dicts or dataclasses, or have tables of their own."""

    def _repr_html_(self) -> str:
        """Return one table, or the tables of the items one below the other."""
        if any(hasattr(item, "_repr_html_") for item in self):
            return "".join(item._repr_html_() for item in self)
        rows = [dict(item) if isinstance(item, Mapping) else vars(item) for item in self]
        return html_table(list(rows[0]) if rows else ["nothing"], [list(row.values()) for row in rows])


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table for a notebook, with every cell escaped."""
    cells = [[html.escape(escaped(str(cell))) for cell in row] for row in (header, *rows)]
    first, *others = cells
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in first)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in others]
    return f"<table>{''.join(lines)}</table>"


def print_path(path: Path) -> None:
    """Print a path to stdout: raw bytes for a program that reads it, escaped on a terminal."""
    stream = raw(sys.stdout)
    buffer = getattr(stream, "buffer", None)
    if buffer is None or stream.isatty():
        sys.stdout.write(f"{path}\n")
        return
    stream.flush()
    buffer.write(os.fsencode(path) + os.linesep.encode())
    buffer.flush()


def is_escaped(stream: Any) -> bool:
    """Return whether a stream escapes what is written to it."""
    return isinstance(stream, _Escaping)


def raw(stream: Any) -> Any:
    """Return the stream behind one that escapes, for those who draw on a terminal."""
    return stream.stream if isinstance(stream, _Escaping) else stream


@contextlib.contextmanager
def written_above(write: Callable[[str], None]) -> Iterator[None]:
    """Give ``write`` what this process writes to a terminal through :func:`escaped_streams`, to put it above bars."""
    _Escaping.above, before = (os.getpid(), write), _Escaping.above
    try:
        yield
    finally:
        _Escaping.above = before


@contextlib.contextmanager
def escaped_streams() -> Iterator[None]:
    """Escape everything that Python prints in this process, including libraries."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", _Escaping(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def configure_logging() -> None:
    """Log plain messages to stderr: ours from INFO, those of libraries from WARNING."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mfm_nnunet").setLevel(logging.INFO)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        is_ours = record.name.partition(".")[0] == "mfm_nnunet"
        has_lines = "\n" in str(record.msg) or record.exc_info
        return one_message(text) if is_ours and not has_lines else escaped(text)


class _Escaping:
    """Text stream that escapes everything written to it."""

    above: tuple[int, Callable[[str], None]] | None = None
    """The process that draws bars, and how it writes above them; forked children write directly."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        begin = _PROGRESS.match(text)
        kept = begin.end() if begin else 0
        if self.above is not None and self.above[0] == os.getpid() and self.stream.isatty():
            self.above[1](escaped(text[kept:]))
        else:
            self.stream.write(text[:kept] + escaped(text[kept:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
