"""Helpers to size a network: patches in whole cells, and the largest network within a memory budget.

Sizes are in voxels, spacings in mm, in the plan's axis order; budgets are in GB of 2**30 bytes.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import PlannedNetwork, Sizing
from mfm_nnunet.models.memory import estimate_training_memory
from mfm_nnunet.models.networks import build_architecture

CPU_VOXELS = {3: 48 * 56 * 48, 2: 192 * 192}
"""Largest patch of the CPU preset. A 3D ResEnc step with batch 2 is about 90 GFLOP, a second or so on two cores."""

MIN_EDGE = {3: 32, 2: 64}
"""Smallest useful patch edge, unless the image is smaller."""

BUDGET_SHARE = 0.85
"""The rest is for the loss, kernel workspaces and the driver."""

Trial = tuple[str, tuple[int, ...]]
"""Name of a size, and a patch size."""


def pad_to_multiple(size: float, multiple: int) -> int:
    """Return the smallest positive multiple of ``multiple`` that is at least ``size``."""
    return max(1, math.ceil(size / multiple)) * multiple


def largest_patch(
    median_shape: Sequence[float], spacing: Sequence[float], cell: int | Sequence[int], max_voxels: int
) -> tuple[int, ...]:
    """Return a patch of whole cells that covers the median image, cut to at most ``max_voxels``.

    ``cell`` is one size or one per axis. The longest axis in mm is cut first, so the patch becomes as cubic as the
    image allows.
    """
    cells = _per_axis(cell, len(median_shape))
    patch = tuple(pad_to_multiple(size, step) for size, step in zip(median_shape, cells))
    chain = [patch, *smaller_patches(patch, spacing, cells, cells)]
    return next((cut for cut in chain if math.prod(cut) <= max_voxels), chain[-1])


def smaller_patches(
    patch: tuple[int, ...], spacing: Sequence[float], cell: int | Sequence[int], min_edge: int | Sequence[int]
) -> list[tuple[int, ...]]:
    """Return ever smaller patches, each one cell shorter along the longest axis in mm, down to ``min_edge``."""
    result, cells, least = [], _per_axis(cell, len(patch)), _per_axis(min_edge, len(patch))
    while axes := [axis for axis, size in enumerate(patch) if size > max(least[axis], cells[axis])]:
        longest = max(axes, key=lambda axis: patch[axis] * spacing[axis])
        patch = tuple(size - cells[axis] * (axis == longest) for axis, size in enumerate(patch))
        result.append(patch)
    return result


def _per_axis(value: int | Sequence[int], num_axes: int) -> Sequence[int]:
    return (value,) * num_axes if isinstance(value, int) else value


def fit_budget(
    trials: Sequence[Trial], budget_gb: float, memory_bytes: Callable[[str, tuple[int, ...], int], int], title: str
) -> tuple[str, tuple[int, ...], int]:
    """Return the first trial that fits with batch 2, and the batch size that fills the budget.

    Trials of the same size must be sorted by falling memory. ``memory_bytes(size, patch, batch)`` is the memory of a
    training step. Raises MFMError (E_CONFIG) if not even the last trial fits.
    """
    budget = budget_gb * 2**30
    for _, group in itertools.groupby(trials, key=lambda trial: trial[0]):
        candidates = list(group)
        first = bisect.bisect_left(candidates, True, key=lambda trial: memory_bytes(trial[0], trial[1], 2) <= budget)
        if first < len(candidates):
            size, patch = candidates[first]
            two, three = (memory_bytes(size, patch, batch) for batch in (2, 3))
            return size, patch, 2 + int((budget - two) // (three - two))
    size, patch = trials[-1]
    raise too_little_memory(budget_gb, memory_bytes(size, patch, 2) / 2**30, title, patch)


def plan_largest(
    sizing: Sizing, trials: Sequence[Trial], architecture: Callable[[str, tuple[int, ...]], dict[str, Any]], title: str
) -> PlannedNetwork:
    """Plan the first network of ``trials`` that fits the budget; ``architecture(size, patch)`` is a plan's entry."""
    assert sizing.memory_gb is not None, "the CPU preset has no budget"

    @functools.cache
    def memory_bytes(size: str, patch: tuple[int, ...], batch: int) -> int:
        with torch.device("meta"):
            network = build_architecture(architecture(size, patch), sizing.num_inputs, sizing.num_outputs)
        shape = (batch, sizing.num_inputs, *patch)
        return estimate_training_memory(network, shape, "adamw", half=True).total

    size, patch, batch = fit_budget(trials, sizing.memory_gb * BUDGET_SHARE, memory_bytes, title)
    return PlannedNetwork(architecture(size, patch), patch, batch)


def cpu_batch(patch: Sequence[int]) -> int:
    """Return the batch size of the CPU preset; larger for small 2D patches."""
    return 2 if len(patch) == 3 else min(16, max(2, 4 * CPU_VOXELS[2] // math.prod(patch)))


def too_little_memory(memory_gb: float, needed_gb: float, network: str, patch: Sequence[int]) -> MFMError:
    """Return the error for a budget too small for the smallest network."""
    needed = math.ceil(needed_gb * 1000) / 1000
    edges = " x ".join(map(str, patch))
    return MFMError(
        "E_CONFIG",
        f"--memory-gb leaves {memory_gb:.3g} GB for the network, but the smallest {network} (patch {edges}, batch "
        f"size 2) needs {needed:.3g} GB. Give more, or leave --memory-gb out for the CPU preset.",
    )
