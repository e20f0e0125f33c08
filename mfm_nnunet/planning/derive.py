"""Derive all sizes of a plan from fingerprint and memory budget, each with its reason.

1. Budget: ``--memory-gb``, the GPU's memory, or the CPU preset (:func:`choose_budget`).
2. Axis order and spacing: nnU-Net's rule, a mode, or the checkpoint's (:class:`mfm_nnunet.planning.planner.MFMPlanner`,
   :func:`explain_spacing`).
3. Patch, 4. network, 5. batch size: nnU-Net's search within :func:`resenc_preset` for U-Nets, the family's
   ``plan_network`` for others (:func:`explain_patch`, :func:`explain_batch`).
6. Schedules (:func:`settings_for`).

All functions are pure: they read no files and do not query the machine. Sizes are in voxels and spacings in mm, in the
plan's axis order (after ``transpose_forward``) unless a name says otherwise. Budgets are in GB of 2**30 bytes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.families import NetworkFamily, family_named
from mfm_nnunet.models.memory import MemoryEstimate
from mfm_nnunet.plan import INTENSITIES, Configuration
from mfm_nnunet.plan_rules import PERCENTILES
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, PretrainSettings, resolved_warmup

SMALL_NETWORK_BELOW_GB = 6.0
"""Below this, nnU-Net's ResEnc (up to 140 M parameters, 2 GB before the first voxel) leaves too little for a patch."""
RESENC_PRESETS = ((8.0, 680e6, 135e6), (24.0, 2100e6, 380e6), (40.0, 3600e6, 560e6))
"""nnU-Net's ResEnc M, L and XL: GB, and feature-map values per sample that fit in 3D and in 2D."""
MIN_IMAGE_EDGE = 4
"""Edge in voxels of a cube with the volume of the smallest median image that can be planned."""
MIN_STAGES = 2
"""A U-Net with one stage has no decoder and no output."""
MEASURED = "a real step on a CPU took 0.9 to 1.9 times this"
"""Accuracy of the memory estimate, see ``tests/benchmarks/memory_estimate.py``."""
CHECKPOINTS = "the checkpoint's"
"""Reason for values copied from a checkpoint."""


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


@dataclass(frozen=True)
class Budget:
    """GPU memory for training in GB; None: the CPU preset."""

    memory_gb: float | None
    reason: str

    def __str__(self) -> str:
        return "CPU preset" if self.memory_gb is None else f"{self.memory_gb:g} GB"


def choose_budget(asked_for: float | None, gpu: float | None) -> Budget:
    """Choose the requested memory, else the GPU's, else the CPU preset."""
    presets = "nnU-Net's ResEnc M, L and XL are 8, 24 and 40 GB"
    if asked_for is not None:
        return Budget(asked_for, f"--memory-gb; {presets}")
    if gpu is not None:
        return Budget(gpu, f"memory of this machine's GPU; {presets}")
    return Budget(None, "no GPU and no --memory-gb: a small network that trains in minutes on two cores")


def slices_first(slice_axis: int) -> list[int]:
    """Return the axis order with the slice axis first and the others in their original order."""
    return [slice_axis, *(axis for axis in range(3) if axis != slice_axis)]


def find_slice_axis(shapes: np.ndarray, dataset_name: str) -> int | None:
    """Return the axis along which most images have one voxel, whatever the spacing; None for volumes.

    ``shapes`` is (cases, 3), before transposing. Raises MFMError (E_CONFIG) if single slices lie along different axes:
    a plan has one axis order, so some images would be cut into lines.
    """
    flat = shapes[(shapes == 1).any(1)]
    if 2 * len(flat) <= len(shapes):
        return None
    counts = (flat == 1).sum(0)
    axis = int(counts.argmax())
    if counts[axis] < len(flat):
        where = ", ".join(f"{count} along axis {number}" for number, count in enumerate(counts) if count)
        raise MFMError(
            "E_CONFIG",
            f"{dataset_name}: {len(flat)} of {len(shapes)} images have a single slice, but not along one axis "
            f"({where}; counted in the order of the image reader). Save them all with the slice along the same axis.",
        )
    return axis


def explain_spacing(own: Configuration, mode: str | Sequence[float], num_cases: int, is_like: bool) -> str:
    """Explain the spacing of a configuration; ``mode`` is the requested one."""
    if not own.is_resampled:
        return f"median, for orientation only: images are not resampled{', like the checkpoint' * is_like}"
    if is_like:
        return CHECKPOINTS
    if own.name == "3d_lowres":
        return "coarser, until the patch sees a quarter of the median image"
    if mode == "median":
        return f"median of {num_cases} cases (nnU-Net's rule: a finer one along a very coarse axis)"
    return "--spacing onemm: one millimetre" if mode == "onemm" else "--spacing, as asked for"


BY_PERCENTILES = (
    "no common scale such as SUV: each image clipped to its own 0.5 and 99.5 percentiles, then mean 0, std 1. Predict "
    "with mfm_predict: stock nnU-Net has no such rule, and stops"
)


def explain_normalisation(own: Configuration, channel: int, name: str, is_like: bool) -> str:
    """Explain the normalisation of the channel ``name``."""
    reasons = {
        "CTNormalization": f"'{name}' has a fixed scale: clip to the foreground's 0.5 and 99.5 percentiles, then mean "
        "0, std 1",
        "ZScoreNormalization": f"'{name}' has no fixed intensity scale: each image to mean 0, std 1",
        PERCENTILES: BY_PERCENTILES,
    }
    other = f"nnU-Net's rule for a channel named '{name}'"
    reason = CHECKPOINTS if is_like else reasons.get(own.normalization_schemes[channel], other)
    if own.values["use_mask_for_norm"][channel]:
        reason += "; over the non-zero region, because cropping to it removes more than a quarter"
    return reason


def explain_patch(own: Configuration, unit: str, is_like: bool) -> str:
    """Explain the patch size; ``unit`` describes the multiples that the network needs."""
    patch, image = own.patch_size, own.values["median_image_size_in_voxels"]
    if all(p >= s for p, s in zip(patch, image)):
        return f"covers the median image ({times(image)}), padded to {unit}"
    share = math.prod(min(1.0, p / s) for p, s in zip(patch, image))
    origin = CHECKPOINTS if is_like else "as large as the budget allows"
    return f"{origin}, in {unit}; sees {share:.0%} of the median image ({times(image)})"


def explain_batch(budget: Budget, is_like: bool) -> str:
    """Explain the choice of the batch size."""
    if is_like:
        return CHECKPOINTS
    is_cpu = budget.memory_gb is None
    return "as many as one step may take, at least 2" if is_cpu else "fills the budget, at least 2, at most the dataset"


def explain_memory(memory: MemoryEstimate, is_half: bool) -> Decision:
    """State the estimated memory of a training step."""
    fixed = memory.weights + memory.gradients + memory.optimizer
    return Decision(
        "  memory",
        f"about {memory.total / 2**30:.2f} GB",
        f"a training step in {'mixed precision' if is_half else 'float32'}: activations "
        f"{memory.activations / 2**30:.2f}, buffers {memory.working / 2**30:.2f}, weights with gradients and optimizer "
        f"{fixed / 2**30:.2f} GB; {MEASURED}",
    )


@dataclass(frozen=True)
class ResEncPreset:
    """Limits for a ResEnc U-Net: widths, and feature-map values per sample that fit at a batch size."""

    name: Literal["CPU", "small", "standard"]
    base_features: int
    max_features: dict[int, int]
    blocks: tuple[int, ...]
    reference: dict[int, float]
    """Feature-map values per sample (nnU-Net's ``compute_conv_feature_map_size``) by number of axes."""
    reference_batch: dict[int, int]
    max_batch: dict[int, int]


def resenc_preset(memory_gb: float | None) -> ResEncPreset:
    """Return the limits for a budget in GB of GPU memory; None: the CPU preset.

    8, 24 and 40 GB are exactly nnU-Net's presets M, L and XL; in between, feature-map values are interpolated.
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


def require_voxels(spacing: Sequence[float], median_shape: Sequence[float]) -> None:
    """Raise MFMError (E_CONFIG) if the median image is too small for any network at this spacing."""
    if min(median_shape) < 1 or math.prod(median_shape) < MIN_IMAGE_EDGE ** len(median_shape):
        raise MFMError(
            "E_CONFIG",
            f"at a spacing of {times(spacing)} mm the median image has only {times(median_shape)} voxels. Give a finer "
            "--spacing, and check that the spacing in the images is right.",
        )


def require_two_stages(configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise MFMError (E_CONFIG) for a U-Net without decoder, which stock plans for images below 8 voxels."""
    for name, configuration in configurations.items():
        num_stages = configuration.get("architecture", {}).get("arch_kwargs", {}).get("n_stages", MIN_STAGES)
        if num_stages < MIN_STAGES:
            raise MFMError(
                "E_CONFIG",
                f"{name}: the median image of {times(configuration['median_image_size_in_voxels'])} voxels (at "
                f"{times(configuration['spacing'])} mm) leaves the network {num_stages} stage, and a U-Net needs "
                f"{MIN_STAGES}: at least 8 voxels along two axes, or 12 along one. Give a finer --spacing, check that "
                "the spacing in the images is right, or plan other configurations only (-c).",
            )


def settings_for(network: str, is_cpu: bool, batch_size: int) -> tuple[PretrainSettings, FinetuneSettings]:
    """Return the settings for this family: its optimiser, and on the CPU a schedule of minutes.

    On GPUs the fine-tuning rate is left open. From a checkpoint it is the published tenth or third of the rate from
    scratch, so training from scratch with the same plan is a fair baseline. Short CPU schedules need the full rate.
    """
    defaults = family_named(network).defaults(is_cpu)
    epochs, iterations, validation = (20, 50, 5) if is_cpu else (1000, 250, 50)
    shared: dict[str, Any] = {
        "epochs": epochs,
        "iterations_per_epoch": iterations,
        "validation_iterations": validation,
        **{name: getattr(defaults, name) for name in ("optimizer", "weight_decay", "gradient_clip")},
    }
    finetune_rate = defaults.learning_rate if is_cpu else None
    return (
        PretrainSettings(**shared, batch_size=batch_size, learning_rate=defaults.learning_rate),
        FinetuneSettings(
            **shared,
            learning_rate=finetune_rate,
            deep_supervision=defaults.deep_supervision,
            train=defaults.train,
        ),
    )


def for_classifier(settings: FinetuneSettings, family: NetworkFamily, is_cpu: bool) -> FinetuneSettings:
    """Return the settings of a classifier: AdamW as published for them, and on GPUs a tenth of the epochs."""
    changes: dict[str, Any] = {} if is_cpu else {"epochs": 100}
    if "adamw" in family.rates:
        changes |= {"optimizer": "adamw", "weight_decay": 1e-2, "learning_rate": None}
    return replace(settings, deep_supervision=False, compile=False, **changes)


def select_configurations(
    configurations: Mapping[str, dict[str, Any]], wanted: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Return the ``wanted`` configurations and those they inherit from or continue (None: all)."""
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
            del value["next_stage"]  # nnU-Net looks up the next stage after training and fails if it is missing
    return result


def fit_to_intensities(plans: Mapping[str, Any], family: NetworkFamily) -> None:
    """Fit the networks of a plan to its normalisation, in place."""
    for own in plans["configurations"].values():
        if "architecture" in own:
            own["architecture"] = family.with_intensities(
                own["architecture"], own["normalization_schemes"], plans[INTENSITIES]
            )


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the sorted dotted names of keys that differ between two plans, including missing keys."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [] if old == new else [prefix]
    missing = object()
    names = sorted({*old, *new})
    pairs = [(old.get(n, missing), new.get(n, missing), f"{prefix}.{n}" if prefix else str(n)) for n in names]
    return [key for before, after, name in pairs for key in changed_keys(before, after, name)]


def explain_schedules(block: MFMBlock, budget: Budget) -> list[Decision]:
    """List the schedules of pretraining and fine-tuning with their reasons."""
    is_cpu = budget.memory_gb is None
    length = "minutes on two cores" if is_cpu else "as nnU-Net and the published pretraining"
    family = family_named(block.network)
    decisions = []
    for name, settings in (("pretraining", block.pretrain), ("fine-tuning", block.finetune)):
        if settings.learning_rate is None:
            scratch, pretrained = family.rates[settings.optimizer]
            rate = f"{pretrained:g} from a checkpoint, {scratch:g} from scratch"
        else:
            rate = f"{settings.learning_rate:g}"
        warmup = resolved_warmup(settings.warmup_epochs, settings.epochs)
        decisions += [
            Decision(
                name,
                f"{settings.epochs} epochs of {settings.iterations_per_epoch} steps",
                f"{length}; {warmup} epochs of warm-up; change it with --set",
            ),
            Decision(
                "  optimizer",
                f"{settings.optimizer} {rate}",
                f"{family.defaults(is_cpu).reason}: weight decay {settings.weight_decay:g}, clip "
                f"{settings.gradient_clip:g}",
            ),
        ]
    return decisions
