"""Family of Primus: sizing, parts of the network, conversion of weights from other programs.

Legend: T tokens, E embedding, H heads, h width of a head.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
from mfm_nnunet.models.families import NetworkFamily, PlannedNetwork, Sizing, TrainingDefaults
from mfm_nnunet.models.layouts import Converted, ForeignLayout, NnsslName, Stated
from mfm_nnunet.models.primus import PRIMUS_SIZES, decoder_widths, primus_kwargs
from mfm_nnunet.models.sizing import (
    CPU_VOXELS,
    MIN_EDGE,
    Trial,
    cpu_batch,
    largest_patch,
    plan_largest,
    smaller_patches,
)
from mfm_nnunet.models.tokens import TokenBackbone

PRIMUS = "mfm_nnunet.models.primus.PrimusSeg"
_DNA = "dynamic_network_architectures.architectures.primus."
TOKEN = 8
"""Edge of a token in voxels (arXiv 2503.01835)."""
MAX_VOXELS = {3: 160**3, 2: 1024**2}
"""Largest patch: 160^3 is published (8,000 tokens)."""
VARIANTS = {"primus": 1, "primus_v2": 2, "primus_v3": 3}
NNSSL_NAMES_MEAN = {"version": 1, "init_values": 0.1, "scale_attn_inner": True}
"""Arguments implied by nnssl's Primus names, besides the size."""

LOADING_CODE = """\
import json
{imports}
from dynamic_network_architectures.architectures.primus import Primus

mfm = json.load(open("config.json"))["mfm"]
kwargs = mfm["plans"]["configurations"][mfm["configuration"]]["architecture"]["arch_kwargs"]
kwargs = {{"init_values": 0.1, "scale_attn_inner": True, **kwargs, "input_shape": mfm["patch_size"]}}
network = Primus(mfm["num_inputs"], num_classes=mfm["num_outputs"], **kwargs)
weights = {weights}
encoder = {{name: weights[name] for name in weights if name.startswith(("down_projection.", "eva."))}}
missing, unexpected = network.load_state_dict(encoder, strict=False)
assert not unexpected
"""
ABOUT_LOADING = (
    "It needs dynamic-network-architectures 0.4.3 or newer, which flattens tokens axis 0 outermost (w h d), as these "
    "weights do.\nStem and transformer fit; the patch decoder is that of mfm_nnunet, whose widths do not depend on "
    "the number of outputs."
)


class PrimusLayout(ForeignLayout):
    """Primus version 1 of nnssl and nnU-Net. A decoder with other widths than ours is left out."""

    class_name = PRIMUS
    encoder = "eva"
    first_block = r"blocks\.0\.attn\."
    stem = "down_projection."
    head = "up_projection."
    has_token_order = True

    def __init__(self) -> None:
        self.keys = {
            "key_to_encoder": "eva",
            "key_to_stem": "down_projection",
            "keys_to_in_proj": ["down_projection.proj"],
            "key_to_lpe": "eva.pos_embed",
        }

    def renaming(self, encoder: str, stem: str | None) -> dict[str, str]:
        root = encoder.rpartition(".")[0]
        above = f"{root}." if root else ""
        return {
            f"{encoder}.": "eva.",
            f"{stem or above + 'down_projection'}.": "down_projection.",
            f"{above}up_projection.": "up_projection.",
        }

    def needs_conversion(self, class_name: str) -> bool:
        return class_name != PRIMUS

    def convert(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], stated: Stated) -> Converted:
        if stated.token_order is None:
            raise MFMError(
                "E_MODEL_MISMATCH",
                "this Primus does not say in which order its tokens are flattened, and a wrong guess would "
                "exchange two axes silently. If you know it: mfm_checkpoint import FILE -o NEW.pth --token-order "
                "whd, or hwd (nnssl's SimMIM, and dynamic-network-architectures 0.4.3 and newer, which nnU-Net 2.8.1 "
                "needs: whd; nnssl's other tasks, and that package before 0.4.3: hwd).",
            )
        embedding = weights.get("down_projection.proj.weight")
        if embedding is None:
            raise MFMError(
                "E_MODEL_MISMATCH",
                "there is no 'down_projection.proj.weight' beside the transformer, so it is not a Primus of version 1, "
                "the only one that is read from other programs.",
            )
        token = [int(size) for size in embedding.shape[2:]]
        notes: list[str] = []
        grid = _foreign_grid(weights, token, stated.patch_size, notes)
        seen = tuple(cells * size for cells, size in zip(grid, token))
        heads = _num_heads(int(embedding.shape[0]), stated, notes)
        kwargs = {
            "embed_dim": int(embedding.shape[0]),
            "patch_embed_size": token,
            "input_shape": list(seen),
            "eva_depth": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("eva.blocks.")),
            "eva_numheads": heads,
            # The initial layer scale does not matter here, only whether the network has one.
            "init_values": 0.1 if "eva.blocks.0.gamma_1" in weights else None,
            "scale_attn_inner": "eva.blocks.0.attn.norm.weight" in weights,
        }
        kept, left_out = dict(weights), dict(others)
        if stated.token_order == "hwd":
            kept = put_axis_0_outermost(kept, grid, heads)
            notes.append("token order repaired: axis 1 was outermost")
        if not _decoder_fits(kept, kwargs):
            left_out |= {name: kept.pop(name) for name in list(kept) if name.startswith(self.head)}
        architecture = {"network_class_name": PRIMUS, "arch_kwargs": kwargs, "_kw_requires_import": []}
        return Converted(kept, architecture, seen, left_out, notes)

    def nnssl_architecture(self, architecture: Mapping[str, Any]) -> NnsslName | str:
        kwargs = architecture["arch_kwargs"]
        wanted = {key: kwargs[key] for key in ("embed_dim", "eva_depth", "eva_numheads")}
        size = next((name for name, values in PRIMUS_SIZES.items() if name != "CPU" and values == wanted), None)
        others = {key: kwargs.get(key, value) for key, value in NNSSL_NAMES_MEAN.items()}
        if others["init_values"] is not None:  # the initial layer scale cannot be read from weights
            others["init_values"] = NNSSL_NAMES_MEAN["init_values"]
        if size is None or list(kwargs["patch_embed_size"]) != [8, 8, 8] or others != NNSSL_NAMES_MEAN:
            return f"a Primus with {wanted | others}, tokens {kwargs['patch_embed_size']}"
        return f"Primus{size}", None, None


class PrimusFamily(NetworkFamily):
    """All versions of Primus, ours and those of dynamic-network-architectures."""

    name = "primus"
    title = "Primus"
    classes = (PRIMUS, f"{_DNA}Primus", f"{_DNA}PrimusV2", f"{_DNA}PrimusV3")
    encoder = ("down_projection.", "eva.")
    decoder = ("up_projection.",)
    rates: ClassVar = {"adamw": (3e-4, 1e-4)}
    hides = "tokens"
    layouts = (PrimusLayout(),)

    def variant(self, architecture: Mapping[str, Any]) -> str:
        of_dna = re.search(r"\.PrimusV([23])$", str(architecture.get("network_class_name")))
        version = int(of_dna[1]) if of_dna else architecture.get("arch_kwargs", {}).get("version", 1)
        return next((name for name, number in VARIANTS.items() if number == version), self.name)

    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        return [int(size) for size in kwargs.get("patch_embed_size", ())] or None

    def patch_problem(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> str:
        if problem := super().patch_problem(kwargs, patch_size):
            return problem
        if "input_shape" in kwargs and list(kwargs["input_shape"]) != list(patch_size):
            return f"the network's input_shape is {' x '.join(map(str, kwargs['input_shape']))}"
        return ""

    def with_patch(self, architecture: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
        kwargs = architecture["arch_kwargs"]
        changed = {"input_shape": [int(size) for size in patch_size]} if "input_shape" in kwargs else {}
        return {**architecture, "arch_kwargs": {**kwargs, **changed}}

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        """Choose size, patch and batch size for the budget.

        1. Make the patch as large as the image, at most MAX_VOXELS.
        2. Take the largest of L, M, B, S that fits with batch 2.
        3. If S does not fit, shrink the patch to 64 per axis, then use the CPU size with at least 32 (64 in 2D).
        4. Spend the rest of the budget on the batch.
        """
        version = VARIANTS[sizing.variant]
        if sizing.memory_gb is None:
            patch = largest_patch(sizing.median_shape, sizing.spacing, TOKEN, CPU_VOXELS[len(sizing.spacing)])
            return PlannedNetwork(primus_architecture("CPU", patch, version), patch, cpu_batch(patch))
        return plan_largest(
            sizing,
            size_trials(sizing.median_shape, sizing.spacing),
            lambda size, patch: primus_architecture(size, patch, version),
            self.title,
        )

    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        """Return AdamW as published (arXiv 2503.01835), with a higher rate for short CPU schedules."""
        rate = 1e-3 if is_cpu else self.rates["adamw"][0]
        return TrainingDefaults("adamw", rate, 5e-2, 1.0, "as published for Primus")

    def describe(self, architecture: Mapping[str, Any]) -> str:
        kwargs = architecture["arch_kwargs"]
        version = f" V{kwargs['version']}" if kwargs.get("version", 1) > 1 else ""
        sizes = f"{kwargs['embed_dim']} wide, {kwargs['eva_depth']} deep, {kwargs['eva_numheads']} heads"
        return f"{self.title}{version} {sizes}"

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        kwargs = architecture["arch_kwargs"]
        num_tokens = math.prod(n // t for n, t in zip(kwargs["input_shape"], kwargs["patch_embed_size"]))
        largest = "the largest of the sizes CPU, S, B, M, L in the budget"
        return f"{num_tokens} tokens; {'the size for CPUs' if memory_gb is None else largest}"

    def patch_unit(self) -> str:
        return f"whole tokens of {TOKEN} voxels, at most 160^3 (1024^2)"

    def takes_deep_supervision(self, class_name: str) -> bool:
        return class_name == PRIMUS

    def layer_decay_problem(self) -> str:
        return ""

    def layers_after(self, name: str, network: Any) -> int:
        """Return n - i for block i of n (0-based), n + 1 for patch embedding and positions, else 0 (arXiv 2106.08254).

        The last norm and the decoder have 0.
        """
        depth = len(network.eva.blocks)
        if block := re.match(r"eva\.blocks\.(\d+)\.", name):
            return depth - int(block[1])
        return depth + 1 if name.startswith(("down_projection.", "eva.pos_embed")) else 0

    def adapted_layers(self, network: Any) -> list[nn.Linear]:
        """Return all linear layers of attention and MLP (arXiv 2106.09685)."""
        return [module for module in network.eva.blocks.modules() if isinstance(module, nn.Linear)]

    def head_names(self, network: Any) -> set[str]:
        last = f"up_projection.decode.{len(network.up_projection.decode) - 1}."
        return {name for name, _ in network.named_parameters() if name.startswith(last)}

    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        return TokenBackbone(network, patch_size, restoring)

    def resize_positions(
        self, name: str, value: Tensor, network: nn.Module, source_patch_size: Sequence[int] | None
    ) -> tuple[Tensor, str] | None:
        """Interpolate token positions to the network's grid (trilinear; bilinear in 2D; corners not aligned)."""
        table = network.get_parameter(name) if name == "eva.pos_embed" else None
        if table is None or value.shape[::2] != table.shape[::2]:
            return None
        token = _token_size(network)
        planned = tuple(size // step for size, step in zip(source_patch_size or (), token))
        rope = getattr(network.get_submodule("eva"), "rope", None)
        own = tuple(int(size) for size in getattr(rope, "feat_shape", None) or ())
        old, new = _token_grid(value.shape[1], planned, len(token)), _token_grid(table.shape[1], own, len(token))
        if old is None or new is None or old == new:
            return None
        grid = value.detach().float().transpose(1, 2).reshape(1, value.shape[2], *old)
        mode = {2: "bilinear", 3: "trilinear"}[len(old)]
        resized = nn.functional.interpolate(grid, size=new, mode=mode, align_corners=False)
        how = f"positions interpolated from {old} to {new} tokens"
        return resized.reshape(1, value.shape[2], -1).transpose(1, 2), how

    def loading_code(self, architecture: Mapping[str, Any], num_axes: int) -> tuple[str, str] | None:
        is_known = architecture["arch_kwargs"].get("version", 1) == 1 and num_axes == 3
        return (LOADING_CODE, ABOUT_LOADING) if is_known and architecture["network_class_name"] == PRIMUS else None


def primus_architecture(size: str, patch: Sequence[int], version: int = 1) -> dict[str, Any]:
    """Return a plan's ``architecture`` entry; ``size`` is a key of PRIMUS_SIZES."""
    kwargs = {
        **primus_kwargs(size, len(patch), version),
        "patch_embed_size": [TOKEN] * len(patch),
        "input_shape": [int(edge) for edge in patch],
        "drop_path_rate": 0.2,
        "init_values": 0.1,
        "scale_attn_inner": True,
    }
    return {"network_class_name": PRIMUS, "arch_kwargs": kwargs, "_kw_requires_import": []}


def size_trials(median_shape: Sequence[float], spacing: Sequence[float]) -> list[Trial]:
    """Return sizes and patches in order of preference."""
    num_axes = len(median_shape)
    largest = largest_patch(median_shape, spacing, TOKEN, MAX_VOXELS[num_axes])
    trials = [(size, largest) for size in ("L", "M", "B", "S")]
    trials += [("S", patch) for patch in smaller_patches(largest, spacing, TOKEN, 64)]
    smallest = [largest, *smaller_patches(largest, spacing, TOKEN, MIN_EDGE[num_axes])]
    return trials + [("CPU", patch) for patch in smallest]


def put_axis_0_outermost(weights: Mapping[str, Tensor], grid: Sequence[int], num_heads: int) -> dict[str, Tensor]:
    """Convert weights from tokens flattened axis 1 outermost to axis 0 outermost. ``grid`` is tokens per axis.

    dynamic-network-architectures up to 0.4.2 and nnssl flatten (h w d), later versions (w h d). In the old order the
    token at (i, j, k) has the table row and rotary angles of (j, i, k). So this swaps the rows of the position table
    and, in every head, the thirds of the query and key channels that rotate with the first two axes. The network
    computes the same function (up to rounding). Applying the conversion twice restores the weights.

    Raises MFMError (E_MODEL_MISMATCH) if the first two axes of the grid differ: no weights in the new order can
    reproduce the positions of the old one.
    """
    if len(grid) != 3 or grid[0] != grid[1]:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"its tokens are flattened axis 1 outermost on a grid of {' x '.join(map(str, grid))}: that can be "
            "repaired exactly only where the first two axes are equal. Use a checkpoint pretrained on such a patch.",
        )
    return {name: _reorder(name, tensor, grid, num_heads) for name, tensor in weights.items()}


def _reorder(name: str, tensor: Tensor, grid: Sequence[int], num_heads: int) -> Tensor:
    if name == "eva.pos_embed":
        first = tensor.shape[1] - math.prod(grid)  # register tokens stay in front
        table = tensor[:, first:].reshape(1, *grid, -1).transpose(1, 2).flatten(1, 3)
        return torch.cat([tensor[:, :first], table], dim=1)
    if re.search(r"\.attn\.[qk]_proj\.(weight|bias)$", name):
        heads = tensor.reshape(num_heads, 3, tensor.shape[0] // num_heads // 3, *tensor.shape[1:])
        return heads[:, [1, 0, 2]].reshape(tensor.shape)
    return tensor


def _token_size(network: Any) -> tuple[int, ...]:
    """Return the token size in voxels, for our networks and DNA's, whose stems halve the image in each stage."""
    own, stem = getattr(network, "patch_embed_size", None), network.down_projection
    if own is not None:
        return tuple(own)
    if hasattr(stem, "proj"):
        return tuple(stem.proj.weight.shape[2:])
    return (2 ** len(stem.stages),) * (stem.final_proj.weight.ndim - 2)


def _token_grid(num_tokens: int, expected: tuple[int, ...], num_axes: int) -> tuple[int, ...] | None:
    """Return ``expected`` if it has ``num_tokens``, else a cube (crops may be smaller than the plan's patch)."""
    cube = (round(num_tokens ** (1 / num_axes)),) * num_axes
    return next((grid for grid in (expected, cube) if len(grid) == num_axes and math.prod(grid) == num_tokens), None)


def _foreign_grid(
    weights: Mapping[str, Tensor], token: Sequence[int], patch: Sequence[int] | None, notes: list[str]
) -> tuple[int, ...]:
    """Return the tokens per axis: as planned if this matches the rows of the position table, else a cube."""
    table = weights.get("eva.pos_embed")
    if table is None:
        raise MFMError("E_MODEL_MISMATCH", "its transformer has no 'eva.pos_embed', so it is not a Primus.")
    rows = table.shape[1]
    grid = _token_grid(rows, tuple(size // step for size, step in zip(patch or (), token)), len(token))
    if grid is None:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"its position table has {rows} rows, which are neither a cube nor the tokens of the patch "
            f"{'that its plan names' if patch else '(no plan names one)'}: the positions of the tokens are unknown.",
        )
    if patch is not None and (len(patch) != len(token) or grid != tuple(n // t for n, t in zip(patch, token))):
        notes.append(
            f"positions: {rows} rows are a cube of {grid[0]} tokens per axis, not the plan's patch of "
            f"{' x '.join(map(str, patch))} voxels; the table is right where crops were pretrained on"
        )
    return grid


def _num_heads(embed_dim: int, stated: Stated, notes: list[str]) -> int:
    published = PRIMUS_SIZES.get((stated.class_name or "").removeprefix("Primus"))
    if (heads := stated.arch_kwargs.get("eva_numheads") or stated.arch_kwargs.get("num_heads")) is not None:
        return int(heads)
    if published is not None:
        return published["eva_numheads"]
    for size, values in PRIMUS_SIZES.items():
        if values["embed_dim"] == embed_dim:
            notes.append(f"heads: {values['eva_numheads']}, those of the size {size} of this width")
            return values["eva_numheads"]
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"a transformer of width {embed_dim} is not a published size, and the file does not say how many heads "
        "it has, so its attention cannot be rebuilt.",
    )


def _decoder_fits(weights: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the patch decoder has our widths. DNA's depend on the number of outputs and match for five."""
    layers = sorted(name for name in weights if name.startswith("up_projection.decode.") and name.endswith(".0.weight"))
    widths = decoder_widths(kwargs["embed_dim"], int(math.log2(max(kwargs["patch_embed_size"]))))
    return [tuple(weights[name].shape[:2]) for name in layers] == list(itertools.pairwise(widths))
