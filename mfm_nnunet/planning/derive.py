"""What follows from what: pure functions from fingerprint and memory budget to the numbers of a plan.

Nothing here reads a file or looks at the machine. Sizes are in voxels, spacings in mm, both in the plan's axis order
(after ``transpose_forward``) unless a name says otherwise; budgets are in GB of 2**30 bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.families import family_named
from mfm_nnunet.settings import FinetuneSettings, PretrainSettings

SMALL_NETWORK_BELOW_GB = 6.0
"""Below, nnU-Net's ResEnc (up to 140 M parameters, 2 GB before the first voxel) leaves too little for a patch."""

RESENC_PRESETS = ((8.0, 680e6, 135e6), (24.0, 2100e6, 380e6), (40.0, 3600e6, 560e6))
"""nnU-Net's ResEnc M, L and XL: GB, and the feature-map numbers per sample that fit in 3D and in 2D."""


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


def times(values: Sequence[float], unit: str = "") -> str:
    """Return sizes or spacings as text, e.g. "32 x 40 x 32" or "1 x 0.8 x 0.8 mm"."""
    return " x ".join(f"{value:.4g}" for value in values) + unit


def slices_first(slice_axis: int) -> list[int]:
    """Return the axis order in which the slice axis is first and the others keep theirs."""
    return [slice_axis, *(axis for axis in range(3) if axis != slice_axis)]


def settings_for(network: str, is_cpu: bool, batch_size: int) -> tuple[PretrainSettings, FinetuneSettings]:
    """Return how a network of this family is trained: the family's optimiser, and a schedule of minutes on the CPU.

    On GPUs the rate of fine-tuning is left open: from a checkpoint it is the published tenth or third of that from
    scratch, and scratch on the same plan is a fair baseline. Short CPU schedules need the full rate to get anywhere.
    """
    defaults = family_named(network).defaults(is_cpu)
    epochs, iterations, validation = (20, 50, 5) if is_cpu else (1000, 250, 50)
    pretrain = PretrainSettings(
        epochs=epochs,
        iterations_per_epoch=iterations,
        validation_iterations=validation,
        batch_size=batch_size,
        learning_rate=defaults.learning_rate,
        optimizer=defaults.optimizer,
        weight_decay=defaults.weight_decay,
        gradient_clip=defaults.gradient_clip,
    )
    finetune = FinetuneSettings(
        epochs=epochs,
        iterations_per_epoch=iterations,
        validation_iterations=validation,
        learning_rate=defaults.learning_rate if is_cpu else None,
        optimizer=defaults.optimizer,
        weight_decay=defaults.weight_decay,
        gradient_clip=defaults.gradient_clip,
        deep_supervision=defaults.deep_supervision,
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
