"""What follows from what: pure functions from fingerprint and memory budget to the numbers of a plan.

Nothing here reads a file or looks at the machine. Sizes are in voxels, spacings in mm, both in the plan's axis order
(after ``transpose_forward``) unless a name says otherwise; budgets are in GB of 2**30 bytes.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.settings import PUBLISHED_RATES, FinetuneSettings, PretrainSettings

NETWORKS = {"resenc": ("resenc", 1), "primus": ("primus", 1), "primus_v2": ("primus", 2), "primus_v3": ("primus", 3)}
"""What can be asked for: family of the network, which the plan's block names, and version, in its architecture."""

TOKEN = 8
"""Edge of a Primus token in voxels (arXiv 2503.01835)."""

SMALL_NETWORK_BELOW_GB = 6.0
"""Below, nnU-Net's ResEnc (up to 140 M parameters, 2 GB before the first voxel) leaves too little for a patch."""

RESENC_PRESETS = ((8.0, 680e6, 135e6), (24.0, 2100e6, 380e6), (40.0, 3600e6, 560e6))
"""nnU-Net's ResEnc M, L and XL: GB, and the feature-map numbers per sample that fit in 3D and in 2D."""

CPU_VOXELS = {3: 48 * 56 * 48, 2: 192 * 192}
"""Largest patch of the CPU preset: about 90 GFLOP for a ResEnc step of batch 2 in 3D, a second or so on two cores."""

MAX_PRIMUS_VOXELS = {3: 160**3, 2: 1024**2}
"""Largest Primus patch: 160^3 is the published one (8,000 tokens)."""

MIN_EDGE = {3: 32, 2: 64}
"""Below this patch edge (or the image's own) a network sees too little to be worth planning."""

PRIMUS_BUDGET_SHARE = 0.85
"""The rest is for the loss, the kernels' workspaces and what the driver takes."""


@dataclass(frozen=True)
class ResEncPreset:
    """How large a ResEnc U-Net may be: its widths, and the feature-map numbers per sample that fit at a batch size."""

    name: Literal["CPU", "small", "standard"]
    base_features: int
    max_features: dict[int, int]
    blocks: tuple[int, ...]
    reference: dict[int, float]
    """Feature-map numbers (nnU-Net's ``compute_conv_feature_map_size``) per sample, by number of axes."""
    reference_batch: dict[int, int]
    max_batch: dict[int, int]


def resenc_preset(memory_gb: float | None) -> ResEncPreset:
    """The ResEnc U-Net for a budget in GB of GPU memory; None is the CPU preset.

    8, 24 and 40 GB are nnU-Net's presets M, L and XL exactly; between them the allowed feature maps grow linearly.
    """
    small_blocks = (1,) + (2,) * 12
    if memory_gb is None:
        reference = {3: 15.5e6, 2: 7.0e6}
        return ResEncPreset("CPU", 16, {3: 128, 2: 128}, small_blocks, reference, {3: 2, 2: 4}, {3: 2, 2: 16})
    budgets, in_3d, in_2d = ((0.0, *column) for column in zip(*RESENC_PRESETS))
    if memory_gb > budgets[-1]:
        scale = memory_gb / budgets[-1]
        reference = {3: in_3d[-1] * scale, 2: in_2d[-1] * scale}
    else:
        reference = {3: float(np.interp(memory_gb, budgets, in_3d)), 2: float(np.interp(memory_gb, budgets, in_2d))}
    unlimited = {3: 10**6, 2: 10**6}
    if memory_gb < SMALL_NETWORK_BELOW_GB:
        return ResEncPreset("small", 16, {3: 128, 2: 128}, small_blocks, reference, {3: 2, 2: 12}, unlimited)
    blocks = (1, 3, 4) + (6,) * 10
    return ResEncPreset("standard", 32, {3: 320, 2: 512}, blocks, reference, {3: 2, 2: 12}, unlimited)


def pad_to_multiple(size: float, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size`` and not zero."""
    return max(1, math.ceil(size / multiple)) * multiple


def times(values: Sequence[float], unit: str = "") -> str:
    """Return sizes or spacings as text, e.g. "32 x 40 x 32" or "1 x 0.8 x 0.8 mm"."""
    return " x ".join(f"{value:.4g}" for value in values) + unit


def slices_first(slice_axis: int) -> list[int]:
    """Return the axis order in which the slice axis is first and the others keep theirs."""
    return [slice_axis, *(axis for axis in range(3) if axis != slice_axis)]


def network_of(family: str, architecture: Mapping[str, Any]) -> str:
    """The key of NETWORKS for a family and the ``architecture`` entry of a plan's configuration."""
    of_dna = re.search(r"\.PrimusV([23])$", str(architecture.get("network_class_name")))
    version = int(of_dna[1]) if of_dna else architecture.get("arch_kwargs", {}).get("version", 1)
    return next((name for name, value in NETWORKS.items() if value == (family, version)), family)


def token_patch(median_shape: Sequence[float], spacing: Sequence[float], max_voxels: int) -> tuple[int, ...]:
    """The largest patch of whole tokens that covers the median image or holds at most ``max_voxels``.

    It is cut where it is longest in mm, so it becomes as cubic as the image allows; each axis is a multiple of 8.
    """
    patch = tuple(pad_to_multiple(size, TOKEN) for size in median_shape)
    chain = [patch, *_smaller_patches(patch, spacing, TOKEN)]
    return next((cut for cut in chain if math.prod(cut) <= max_voxels), chain[-1])


def size_primus(
    median_shape: Sequence[float],
    spacing: Sequence[float],
    budget_bytes: float,
    memory_bytes: Callable[[str, tuple[int, ...], int], int],
) -> tuple[str, tuple[int, ...], int]:
    """(size, patch, batch size) of the Primus that makes the most of a budget in bytes.

    ``memory_bytes(size, patch, batch)`` says what a training step takes. The patch comes first, as large as the image
    or the published one allows; then the largest of L, M, B, S that fits with batch 2; if not even S does, the patch
    shrinks for it down to 64 per axis and then for the CPU size down to 32 (64 in 2D). What is left goes to the batch.

    Raises MFMError (E_CONFIG) with the numbers when the smallest network does not fit.
    """
    largest = token_patch(median_shape, spacing, MAX_PRIMUS_VOXELS[len(median_shape)])
    trials = [(size, largest) for size in ("L", "M", "B", "S")]
    trials += [("S", patch) for patch in _smaller_patches(largest, spacing, 64)]
    trials += [("CPU", patch) for patch in [largest, *_smaller_patches(largest, spacing, MIN_EDGE[len(median_shape)])]]
    for _, group in itertools.groupby(trials, key=lambda trial: trial[0]):
        candidates = list(group)  # of one size, so what they take falls from first to last
        first = bisect.bisect_left(
            candidates, True, key=lambda trial: memory_bytes(trial[0], trial[1], 2) <= budget_bytes
        )
        if first < len(candidates):
            size, patch = candidates[first]
            two, three = (memory_bytes(size, patch, batch) for batch in (2, 3))
            return size, patch, 2 + int((budget_bytes - two) // (three - two))
    size, patch = trials[-1]
    raise too_little_memory(budget_bytes / 2**30, memory_bytes(size, patch, 2) / 2**30, "Primus", patch)


def cpu_primus(median_shape: Sequence[float], spacing: Sequence[float]) -> tuple[str, tuple[int, ...], int]:
    """(size, patch, batch size) of the CPU preset's Primus; in 2D small images are taken several at a time."""
    patch = token_patch(median_shape, spacing, CPU_VOXELS[len(median_shape)])
    fitting = 4 * CPU_VOXELS[2] // math.prod(patch)
    return "CPU", patch, 2 if len(patch) == 3 else min(16, max(2, fitting))


def too_little_memory(memory_gb: float, needed_gb: float, network: str, patch: Sequence[int]) -> MFMError:
    """The error of a budget that not even the smallest network fits into."""
    needed = math.ceil(needed_gb * 1000) / 1000
    edges = " x ".join(map(str, patch))
    return MFMError(
        "E_CONFIG",
        f"--memory-gb leaves {memory_gb:.3g} GB for the network, and the smallest {network} (patch {edges}, batch "
        f"size 2) needs {needed:.3g} GB. Give more, or leave --memory-gb out for the CPU preset.",
    )


def settings_for(network: str, is_cpu: bool, batch_size: int) -> tuple[PretrainSettings, FinetuneSettings]:
    """How a network of this family is trained: published optimisers, and a schedule of minutes on the CPU.

    ResEnc: nnU-Net's SGD on GPUs; on the short CPU schedules AdamW, because SGD with momentum 0.99 spends the first
    half of a thousand steps on predicting background. Primus: AdamW as in arXiv 2503.01835, on the short CPU schedules
    with a higher rate, for the same reason. On GPUs the rate of fine-tuning is left open: from a checkpoint it is the
    published tenth (ResEnc) or third (Primus) of that from scratch, and scratch on the same plan is a fair baseline.
    Short CPU schedules need the full rate to get anywhere.
    """
    is_primus = network == "primus"
    optimizer: Literal["sgd", "adamw"] = "adamw" if is_primus or is_cpu else "sgd"
    rate, decay, clip = PUBLISHED_RATES[network, optimizer][0], *((5e-2, 1.0) if is_primus else (3e-5, 12.0))
    if is_cpu:
        rate, decay = 1e-3, (decay if is_primus else 1e-2)
    epochs, iterations, validation = (20, 50, 5) if is_cpu else (1000, 250, 50)
    pretrain = PretrainSettings(
        epochs=epochs,
        iterations_per_epoch=iterations,
        validation_iterations=validation,
        batch_size=batch_size,
        learning_rate=rate,
        optimizer=optimizer,
        weight_decay=decay,
        gradient_clip=clip,
    )
    finetune = FinetuneSettings(
        epochs=epochs,
        iterations_per_epoch=iterations,
        validation_iterations=validation,
        learning_rate=rate if is_cpu else None,
        optimizer=optimizer,
        weight_decay=decay,
        gradient_clip=clip,
        deep_supervision=not is_primus,
    )
    return pretrain, finetune


def select_configurations(
    configurations: Mapping[str, dict[str, Any]], wanted: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """The ``wanted`` configurations and those that they inherit from or continue (None: all of them).

    Raises MFMError (E_CONFIG) for a name that this data set has no configuration of.
    """
    if wanted is None:
        return dict(configurations)
    kept: set[str] = set()
    queue = list(wanted)
    while queue:
        name = queue.pop()
        if name not in configurations:
            raise MFMError(
                "E_CONFIG", f"no configuration '{name}' can be planned for this data. {nearest(name, configurations)}"
            )
        kept.add(name)
        links = (configurations[name].get(key) for key in ("inherits_from", "previous_stage"))
        queue += [link for link in links if link and link not in kept]
    result = {name: dict(value) for name, value in configurations.items() if name in kept}
    for value in result.values():
        if value.get("next_stage") not in (None, *kept):
            del value["next_stage"]  # nnU-Net looks the next stage up after training and stops when it is missing.
    return result


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two plans, sorted; a missing key counts as different."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [prefix]
    missing = object()
    names = sorted({*old, *new})
    pairs = [(old.get(n, missing), new.get(n, missing), f"{prefix}.{n}" if prefix else str(n)) for n in names]
    return [key for before, after, name in pairs for key in changed_keys(before, after, name)]


def _smaller_patches(patch: tuple[int, ...], spacing: Sequence[float], min_edge: int) -> list[tuple[int, ...]]:
    """``patch`` cut again and again by one token where it is longest in mm, down to ``min_edge`` along each axis."""
    result = []
    while axes := [axis for axis, size in enumerate(patch) if size > min_edge]:
        longest = max(axes, key=lambda axis: patch[axis] * spacing[axis])
        patch = tuple(size - TOKEN * (axis == longest) for axis, size in enumerate(patch))
        result.append(patch)
    return result
