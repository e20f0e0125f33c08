"""The request for a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class PlanRequest:
    """What the user asks of a plan; everything else is derived.

    ``memory_gb`` is GPU memory (None: this machine's GPU, or the CPU preset without one); ``spacing`` a mode or mm in
    nnU-Net's axis order, before transposing; ``like`` a pretrained checkpoint that the plan must fit.
    """

    network: str = "resenc"
    memory_gb: float | None = None
    spacing: Literal["median", "onemm", "original"] | tuple[float, float, float] = "median"
    plans_name: str | None = None
    like: Path | None = None
    configurations: tuple[str, ...] | None = None
