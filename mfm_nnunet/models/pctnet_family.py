"""Family of PCT-Net: sizing by nnU-Net's strides, parts of the network, weights of the paper's authors (MIS-FM)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
from mfm_nnunet.models.families import NetworkFamily, PlannedNetwork, Sizing, TrainingDefaults
from mfm_nnunet.models.layouts import Converted, ForeignLayout, Stated
from mfm_nnunet.models.sizing import (
    CPU_VOXELS,
    MIN_EDGE,
    cpu_batch,
    largest_patch,
    plan_largest,
    smaller_patches,
)

PCTNET = "mfm_nnunet.models.pctnet.PCTNet"
NUM_LEVELS = 5
"""Most levels, as published. Small images have fewer."""
WIDTHS = {"GPU": (24, 48, 128, 256, 512), "CPU": (8, 16, 32, 64, 128)}
HEADS = {"GPU": (4, 8, 16), "CPU": (1, 2, 4)}
"""A head has 32 channels."""
RATES = {"GPU": {"dropout": 0.2, "drop_path": 0.2}, "CPU": {"dropout": 0.0, "drop_path": 0.0}}
"""As published; the short schedules of CPUs do not overfit."""
MAX_VOXELS = {3: 128**3, 2: 512**2}
"""Largest patch; 64 x 128 x 128 is published."""
WINDOWS = {3: (6, 5, 4, 7), 2: (8, 7, 6, 5, 4)}
"""Windows per axis in order of preference; 6 is published. One that divides the map needs no padding."""

PUBLISHED_PATCH = (64, 128, 128)
PUBLISHED_WINDOW = 6
"""A table for a smaller window belongs to a map that was smaller, where the published code does not shift windows."""
STEM = re.compile(r"encoder\.(project|blocks\.[01]|downs\.[01])\.|decoder\.\w+\.[01]\.")
"""Names that differ between the paper's three resolution modes: levels 0 and 1, and the way to level 2."""


class PCTBackbone(AbstractBackbone):
    """PCT-Net with hidden voxels filled and skip connections kept, as for U-Nets (arXiv 2410.23132)."""

    def blocks(self) -> list[nn.Module]:
        return [*self.network.encoder.blocks, *self.network.decoder.blocks]

    def crop_cell(self) -> tuple[int, ...]:
        strides = [down[0].kernel_size for down in self.network.encoder.downs]
        return tuple(math.prod(along_axis) for along_axis in zip(*strides))

    def feature_widths(self) -> list[int]:
        merges = [merge[2].out_channels for merge in self.network.decoder.merges]
        return [*merges, self.network.encoder.downs[-1][1][2].out_channels]

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return self.network.encoder(x_BCDHW)

    def supervise_deeply(self) -> None:
        self.family.set_deep_supervision(self.network, True)
        self.network.decoder.requires_grad_(True)

    def outputs(self, x_BCDHW: Tensor) -> list[Tensor]:
        found = self.network(x_BCDHW)
        return found if isinstance(found, list) else [found]


class MISFMLayout(ForeignLayout):
    """Files of the paper's authors: three embeddings and heads, of which one was trained, around a shared pyramid."""

    class_name = PCTNET
    encoder = "pyramid_ct"
    first_block = r"convtrans_e2\.conv\."
    stem = "encoder.project."
    head = "decoder.heads."
    origin = "an assumption"
    keeps_names = False

    def __init__(self) -> None:
        self.keys = {}  # nnssl has no such network

    def renaming(self, encoder: str, stem: str | None) -> dict[str, str]:
        """Keep the file's names: :meth:`convert` gives ours, once it knows which embedding was trained."""
        above = encoder.removesuffix(self.encoder)
        return {f"{above}{part}.": f"{part}." for part in (self.encoder, "embeddings", "pred_heads")}

    def needs_conversion(self, class_name: str) -> bool:
        return True

    def convert(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], stated: Stated) -> Converted:
        mode = _trained_mode(weights)
        places = _our_names(mode)
        kept: dict[str, Tensor] = {}
        unused = dict(others)
        for name, tensor in weights.items():
            place = next((place for place in places if name.startswith(place)), None)
            if place is None or name.endswith("relative_position_index"):
                unused[name] = tensor
            elif name.endswith("relative_position_bias_table"):
                kept[places[place] + name[len(place) :]] = expand_table(tensor)
            else:
                kept[places[place] + name[len(place) :]] = tensor
        seen = stated.patch_size or PUBLISHED_PATCH
        notes = [
            f"embedding and head {mode} of 0, 1 and 2, the only ones that were trained",
            "position tables expanded: offsets that shared a row get one each",
            "batch norms and attention to padding are kept, as these weights were trained with them",
        ]
        if stated.patch_size is None:
            notes.append(f"patch: {' x '.join(map(str, seen))} voxels, as published; the file does not say")
        architecture = {"network_class_name": PCTNET, "arch_kwargs": _read_arguments(kept), "_kw_requires_import": []}
        return Converted(kept, architecture, seen, unused, notes)

    def nnssl_architecture(self, architecture: Mapping[str, Any]) -> str:
        return "PCT-Net"


class PCTFamily(NetworkFamily):
    """PCT-Net, with the strides and kernels of nnU-Net's U-Net for the same images."""

    name = "pctnet"
    title = "PCT-Net"
    classes = (PCTNET,)
    encoder = ("encoder.",)
    decoder = ("decoder.",)
    head = ("decoder.heads.",)
    rates: ClassVar = {"adamw": (1e-3, 1e-3)}
    supervises_all_outputs = True
    fewest_cells = 2
    """Instance normalisation is undefined if the coarsest map has one voxel."""
    layouts = (MISFMLayout(),)

    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        return [math.prod(along_axis) for along_axis in zip(*kwargs.get("strides", ()))] or None

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        stock, num_axes = sizing.stock["architecture"]["arch_kwargs"], len(sizing.spacing)
        strides, kernels = stock["strides"][:NUM_LEVELS], stock["kernel_sizes"][:NUM_LEVELS]
        cell = [math.prod(along_axis) for along_axis in zip(*strides)]

        def architecture(size: str, patch: Sequence[int]) -> dict[str, Any]:
            return pctnet_architecture(size, patch, strides, kernels)

        if sizing.memory_gb is None:
            patch = largest_patch(sizing.median_shape, sizing.spacing, cell, CPU_VOXELS[num_axes])
            return PlannedNetwork(architecture("CPU", patch), patch, cpu_batch(patch))
        largest = largest_patch(sizing.median_shape, sizing.spacing, cell, MAX_VOXELS[num_axes])
        trials = [
            (size, patch)
            for size, smallest_edge in (("GPU", 64), ("CPU", MIN_EDGE[num_axes]))
            for patch in (largest, *smaller_patches(largest, sizing.spacing, cell, smallest_edge))
        ]
        return plan_largest(sizing, trials, architecture, self.title)

    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        reason = "Adam at this rate as published, with decoupled weight decay"
        return TrainingDefaults("adamw", 1e-3, 1e-5, 12.0, reason, deep_supervision=True)

    def describe(self, architecture: Mapping[str, Any]) -> str:
        kwargs = architecture["arch_kwargs"]
        features, windows = kwargs["features_per_stage"], ", ".join("x".join(map(str, w)) for w in kwargs["windows"])
        return f"{self.title}, {len(features)} levels, {features[0]} to {features[-1]} features, windows {windows}"

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        return f"nnU-Net's strides and kernels; {super().reason(architecture, memory_gb)}"

    def takes_deep_supervision(self, class_name: str) -> bool:
        return True

    def has_pyramid(self, kwargs: Mapping[str, Any]) -> bool:
        return True

    def set_deep_supervision(self, network: Any, enabled: bool) -> None:
        network.decoder.deep_supervision = enabled

    def unused_outputs(self, network: Any) -> list[nn.Parameter]:
        decoder = network.decoder
        if decoder.deep_supervision:
            return []
        return [*decoder.activations[1:].parameters(), *decoder.heads[1:].parameters()]

    def layer_decay_problem(self) -> str:
        return ""

    def layers_after(self, name: str, network: Any) -> int:
        """Count a level as a layer: n - i for level i of n (0-based), 0 in the decoder."""
        found = re.match(r"encoder\.(blocks|downs)\.(\d+)\.", name)
        level = int(found[2]) + (found[1] == "downs") if found else 0
        return len(network.encoder.blocks) - level if name.startswith(self.encoder) else 0

    def adapted_layers(self, network: Any) -> list[nn.Linear]:
        """Return all linear layers of attention and MLP (arXiv 2106.09685)."""
        return [module for module in network.encoder.modules() if isinstance(module, nn.Linear)]

    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        return PCTBackbone(network, patch_size)

    def source_renaming(self, network: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[str], str]:
        """Give levels 0 and 1 no counterpart in a checkpoint with other strides there; the pyramid fits all the same.

        The paper's embeddings and heads of different resolution modes share nothing either.
        """
        ups = [f"decoder.ups.{level}.2.weight" for level in (0, 1)]  # whose kernels are the strides
        own = network.state_dict()
        if all(name not in weights or weights[name].shape[2:] == own[name].shape[2:] for name in ups):
            return lambda name: name
        return lambda name: f"{name} with other strides" if STEM.match(name) else name


def pctnet_architecture(
    size: str, patch: Sequence[int], strides: Sequence[Sequence[int]], kernels: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return a plan's ``architecture`` entry; ``size`` is CPU or GPU, windows divide the maps of ``patch``."""
    num_levels, edges = len(strides), list(patch)
    windows = []
    for stride in strides:
        edges = [edge // step for edge, step in zip(edges, stride)]
        windows.append([choose_window(edge, len(patch)) for edge in edges])
    kwargs = {
        "features_per_stage": list(WIDTHS[size][:num_levels]),
        "strides": [list(stride) for stride in strides],
        "kernel_sizes": [list(kernel) for kernel in kernels],
        "num_heads": list(HEADS[size][: num_levels - 2]),
        "windows": windows[2:],
        **RATES[size],
    }
    return {"network_class_name": PCTNET, "arch_kwargs": kwargs, "_kw_requires_import": []}


def choose_window(edge: int, num_axes: int) -> int:
    """Return the window along an axis of a map: all of a small one, else the best that divides it, else the best."""
    preferred = WINDOWS[num_axes]
    return edge if edge <= preferred[0] else next((w for w in preferred if edge % w == 0), preferred[0])


def expand_table(table_RH: Tensor) -> Tensor:
    """Give each offset (dz, dy, dx) its own row, with the value of the row that the published code reads for it.

    That code reads row (3w - 1) dz + (2w - 1) dy + dx for windows of w^3 places, so that offsets share rows. It is the
    same function with our index, and training can tell the offsets apart again.
    """
    edge = round(len(table_RH) ** (1 / 3))
    window = (edge + 1) // 2
    offsets = torch.arange(edge)
    rows = (3 * window - 1) * offsets[:, None, None] + edge * offsets[:, None] + offsets
    return table_RH[rows.flatten()]


def _trained_mode(weights: Mapping[str, Tensor]) -> int:
    """Return the resolution mode of a file: the embedding whose norms moved from their initial values."""
    scales = {mode: weights.get(f"embeddings.{mode}.conv0.conv_conv.0.weight") for mode in range(3)}
    there = {mode: scale for mode, scale in scales.items() if scale is not None}
    trained = [mode for mode, scale in there.items() if len(there) == 1 or not bool((scale == 1).all())]
    if len(trained) == 1:
        return trained[0]
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"it holds a PCT-Net with {len(there)} embeddings (resolution modes), and {len(trained)} of them look trained: "
        "which one to take is unknown. Remove the others (embeddings.MODE.* and pred_heads.MODE.*) from the file.",
    )


def _our_names(mode: int) -> dict[str, str]:
    """Return the map from prefixes in a file to ours."""
    embedding, head, pyramid = f"embeddings.{mode}.", f"pred_heads.{mode}.", "pyramid_ct."
    names = {f"{embedding}proj.": "encoder.project."}
    for level in (0, 1):
        names |= {
            f"{embedding}conv{level}.conv_conv.": f"encoder.blocks.{level}.",
            f"{head}conv{level}.conv_conv.": f"decoder.blocks.{level}.",
        }
    for level in (2, 3, 4):
        for letter, part in (("e", "encoder"), ("d", "decoder")):
            block = f"{pyramid}convtrans_{letter}{level}."
            names |= {
                f"{block}conv.conv_conv.": f"{part}.blocks.{level}.conv.",
                f"{block}trans.blocks.": f"{part}.blocks.{level}.attention.",
            }
    for level in range(4):
        place = head if level < 2 else pyramid
        output, up = f"{place}out_conv{level}.conv.", f"{place}up{level + 1}."
        names |= {
            f"{embedding if level < 2 else pyramid}down{level + 1}.conv.": f"encoder.downs.{level}.1.",
            f"{up}up.": f"decoder.ups.{level}.",
            f"{up}conv.": f"decoder.merges.{level}.",
            f"{output}0.": f"decoder.activations.{level}.0.",
            f"{output}1.": f"decoder.activations.{level}.1.",
            f"{output}2.": f"decoder.heads.{level}.",
        }
    return names


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the network's arguments off the shapes of its tensors, under our names."""

    def shape(name: str) -> list[int]:
        if name not in weights:
            raise MFMError(
                "E_MODEL_MISMATCH", f"its PCT-Net lacks the tensor that is '{name}' here: it is no whole network."
            )
        return [int(size) for size in weights[name].shape]

    tables = [shape(f"encoder.blocks.{level}.attention.0.attn.relative_position_bias_table") for level in (2, 3, 4)]
    windows = [(round(rows ** (1 / 3)) + 1) // 2 for rows, _ in tables]
    downs = [shape(f"encoder.downs.{level}.1.2.weight") for level in range(4)]
    first = shape("encoder.project.weight")
    return {
        "features_per_stage": [first[0], *(down[0] for down in downs)],
        "strides": [[1, 1, 1], *(shape(f"decoder.ups.{level}.2.weight")[2:] for level in range(4))],
        "kernel_sizes": [first[2:], *(down[2:] for down in downs)],
        "num_heads": [heads for _, heads in tables],
        "windows": [[window] * 3 for window in windows],
        **RATES["GPU"],
        "norm": "batch",
        "attends_to_padding": True,
        "unshifted": [level for level, window in zip((2, 3, 4), windows) if window < PUBLISHED_WINDOW],
    }
