"""Format the decisions of a plan as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple


class Decision(NamedTuple):
    """One decision of a plan with its reason."""

    name: str
    value: str
    reason: str


def format_table(decisions: Sequence[Decision], width: int = 120) -> str:
    """Format decisions as a table of three columns with wrapped text."""
    names = max([len(item.name) for item in decisions] + [8])
    values = min(max([len(item.value) for item in decisions] + [5]), 46)
    columns = (names, values, max(width - names - values - 4, 30))
    lines = []
    for cells in (("decision", "value", "reason"), *decisions):
        wrapped = [textwrap.wrap(cell, size) or [""] for cell, size in zip(cells, columns)]
        for row in range(max(map(len, wrapped))):
            texts = [cell[row] if row < len(cell) else "" for cell in wrapped]
            lines.append("  ".join(text.ljust(size) for text, size in zip(texts, columns)).rstrip())
        if cells[0] == "decision":
            lines.append("  ".join("-" * size for size in columns))
    return "\n".join(lines)


def times(values: Sequence[float], unit: str = "") -> str:
    """Format sizes or spacings, e.g. "32 x 40 x 32" or "1 x 0.8 x 0.8 mm"."""
    return " x ".join(f"{value:.4g}" for value in values) + unit
