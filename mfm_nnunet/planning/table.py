"""Why a plan is what it is: one line per decision, with its reason, for people to read."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.models.families import families_by_class, family_named
from mfm_nnunet.models.memory import MemoryEstimate, estimate_training_memory, num_parameters
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import NO_RESAMPLING
from mfm_nnunet.planning.derive import times
from mfm_nnunet.settings import MFMBlock, block_of, resolved_warmup

MEASURED = "a real step on a CPU took 0.9 to 1.9 times this"
"""How good the estimate is, see ``tests/benchmarks/memory_estimate.py``."""


@dataclass(frozen=True)
class Decision:
    """One thing that a plan decides."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Circumstances:
    """What the reasons need and the plan does not say: the budget, the request, the number of cases, and
    which of its configurations were planned now (others may be kept from an older plan of that name)."""

    memory_gb: float | None
    memory_was_given: bool
    spacing: str | Sequence[float]
    num_cases: int
    planned: tuple[str, ...]
    slice_axis: int | None = None
    """The axis along which 2D images have one voxel."""


def format_table(decisions: Sequence[Decision], width: int = 120) -> str:
    """The decisions as a table of three columns; long reasons are wrapped."""
    names = max([len(item.name) for item in decisions] + [8])
    values = min(max([len(item.value) for item in decisions] + [5]), 46)
    columns = (names, values, max(width - names - values - 4, 30))
    lines = []
    for cells in (("decision", "value", "reason"), *((d.name, d.value, d.reason) for d in decisions)):
        wrapped = [textwrap.wrap(cell, size) or [""] for cell, size in zip(cells, columns)]
        for row in range(max(map(len, wrapped))):
            texts = [cell[row] if row < len(cell) else "" for cell in wrapped]
            lines.append("  ".join(text.ljust(size) for text, size in zip(texts, columns)).rstrip())
        if cells[0] == "decision":
            lines.append("  ".join("-" * size for size in columns))
    return "\n".join(lines)


def decisions_for(plans: dict[str, Any], dataset_json: Mapping[str, Any], why: Circumstances) -> list[Decision]:
    """Each decision of ``plans`` and its reason: of the data set, of each planned configuration, of the schedules."""
    block = block_of(plans)
    decisions = [_budget(block, why), _axis_order(plans, block, why)]
    planned = {name: plans["configurations"][name] for name in why.planned}
    first = next(value for value in planned.values() if "normalization_schemes" in value)
    for index, name in enumerate(channel_names(dataset_json).values()):
        decisions.append(_normalisation(index, str(name), first, block))
    for name, configuration in planned.items():
        if "architecture" in configuration:
            decisions += _configuration(name, plans, dataset_json, block, why)
        else:
            link = f"as {configuration.get('inherits_from')}, with the result of the previous stage as further input"
            decisions.append(Decision(name, str(configuration.get("inherits_from")), link))
    return decisions + _schedules(block, why)


def channel_names(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Channel number -> name; old data sets call the key ``modality``."""
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def _budget(block: MFMBlock, why: Circumstances) -> Decision:
    if block.source:
        text = (
            f"planned like {block.source['name']} ({block.source['pretext']}), whose network and patch are taken over"
        )
        return Decision("budget", "the checkpoint's", text)
    if why.memory_gb is None:
        return Decision(
            "budget", "CPU preset", "no GPU and no --memory-gb: a small network that trains in minutes on two cores"
        )
    origin = "--memory-gb" if why.memory_was_given else "memory of this machine's GPU"
    return Decision("budget", f"{why.memory_gb:g} GB", f"{origin}; nnU-Net's ResEnc M, L and XL are 8, 24 and 40 GB")


def _axis_order(plans: Mapping[str, Any], block: MFMBlock, why: Circumstances) -> Decision:
    reason = "the checkpoint's" if block.source else "axis of the coarsest spacing first"
    if why.slice_axis is not None:
        reason = "the axis of one voxel first: images of a single slice"
    return Decision("axis order", " ".join(map(str, plans["transpose_forward"])), reason)


def _normalisation(index: int, name: str, configuration: Mapping[str, Any], block: MFMBlock) -> Decision:
    scheme = configuration["normalization_schemes"][index]
    if block.source:
        reason = "the checkpoint's"
    elif scheme == "CTNormalization":
        reason = f"'{name}' has a fixed scale: clip to the foreground's 0.5 and 99.5 percentiles, then mean 0, std 1"
    elif scheme == "ZScoreNormalization":
        reason = f"'{name}' has no fixed intensity scale: each image to mean 0, std 1"
    else:
        reason = f"what nnU-Net does with a channel named '{name}'"
    if configuration["use_mask_for_norm"][index]:
        reason += "; over the non-zero region, because cropping to it removes more than a quarter"
    return Decision(f"channel {index}", scheme, reason)


def _configuration(
    name: str, plans: dict[str, Any], dataset_json: Mapping[str, Any], block: MFMBlock, why: Circumstances
) -> list[Decision]:
    own = plans["configurations"][name]
    manager = PlansManager(plans)
    num_inputs = determine_num_input_channels(manager, manager.get_configuration(name), dict(dataset_json))
    num_outputs = manager.get_label_manager(dict(dataset_json)).num_segmentation_heads
    with torch.device("meta"):
        network = build_network(plans, name, num_inputs, num_outputs, deep_supervision=block.finetune.deep_supervision)
    half = why.memory_gb is not None
    shape = (own["batch_size"], num_inputs, *own["patch_size"])
    memory = estimate_training_memory(network, shape, block.finetune.optimizer, half)
    return [
        Decision(f"{name}: spacing", times(own["spacing"], " mm"), _why_spacing(name, own, block, why)),
        Decision("  patch", times(own["patch_size"]), _why_patch(own, block)),
        Decision("  batch size", str(own["batch_size"]), _why_batch(own, block, why)),
        Decision("  network", *_network(own, why, block)),
        Decision(
            "  parameters", f"{num_parameters(network) / 1e6:.1f} M", f"{num_inputs} input, {num_outputs} outputs"
        ),
        _memory(memory, half),
    ]


def _why_spacing(name: str, own: Mapping[str, Any], block: MFMBlock, why: Circumstances) -> str:
    if own["resampling_fn_data"] == NO_RESAMPLING:
        return "median, for orientation only: images are not resampled" + (
            ", like the checkpoint's" * bool(block.source)
        )
    if block.source:
        return "the checkpoint's"
    if name == "3d_lowres":
        return "coarser, until the patch sees a quarter of the median image"
    if why.spacing == "median":
        return f"median of {why.num_cases} cases (nnU-Net's rule: a finer one along a very coarse axis)"
    return "--spacing onemm: one millimetre" if why.spacing == "onemm" else "--spacing, as asked for"


def _why_patch(own: Mapping[str, Any], block: MFMBlock) -> str:
    patch, image = own["patch_size"], own["median_image_size_in_voxels"]
    multiple = family_named(block.network).patch_unit()
    if all(p >= s for p, s in zip(patch, image)):
        return f"covers the median image ({times(image)}), padded to {multiple}"
    share = math.prod(min(1.0, p / s) for p, s in zip(patch, image))
    origin = "the checkpoint's" if block.source else "as large as the budget allows"
    return f"{origin}, in {multiple}; sees {share:.0%} of the median image ({times(image)})"


def _why_batch(own: Mapping[str, Any], block: MFMBlock, why: Circumstances) -> str:
    if block.source:
        return "the checkpoint's"
    if why.memory_gb is None:
        return "as many as one step may take, at least 2"
    return "fills the budget, at least 2, not more than the data set"


def _network(own: Mapping[str, Any], why: Circumstances, block: MFMBlock) -> tuple[str, str]:
    architecture = own["architecture"]
    family = families_by_class()[architecture["network_class_name"]]
    reason = "the checkpoint's" if block.source else family.reason(architecture, why.memory_gb)
    return family.describe(architecture), reason


def _memory(memory: MemoryEstimate, half: bool) -> Decision:
    fixed = memory.weights + memory.gradients + memory.optimizer
    precision = "mixed precision" if half else "float32"
    return Decision(
        "  memory",
        f"about {memory.total / 2**30:.2f} GB",
        f"a training step in {precision}: activations {memory.activations / 2**30:.2f}, buffers "
        f"{memory.working / 2**30:.2f}, weights with gradients and optimizer {fixed / 2**30:.2f} GB; {MEASURED}",
    )


def _open_rate(network: str, optimizer: str) -> str:
    scratch, pretrained = family_named(network).rates[optimizer]
    return f"{pretrained:g} from a checkpoint, {scratch:g} from scratch"


def _schedules(block: MFMBlock, why: Circumstances) -> list[Decision]:
    length = "minutes on two cores" if why.memory_gb is None else "as nnU-Net and the published pretraining"
    family = family_named(block.network).defaults(why.memory_gb is None).reason
    decisions = []
    for name, settings in (("pretraining", block.pretrain), ("fine-tuning", block.finetune)):
        steps = f"{settings.epochs} epochs of {settings.iterations_per_epoch}"
        warmup = resolved_warmup(settings.warmup_epochs, settings.epochs)
        rate = settings.learning_rate
        value = f"{settings.optimizer} " + (
            f"{rate:g}" if rate is not None else _open_rate(block.network, settings.optimizer)
        )
        reason = f"{family}: weight decay {settings.weight_decay:g}, clip {settings.gradient_clip:g}"
        decisions += [
            Decision(name, steps, f"{length}; {warmup} epochs of warm-up; change it with --set"),
            Decision("  optimizer", value, reason),
        ]
    return decisions
