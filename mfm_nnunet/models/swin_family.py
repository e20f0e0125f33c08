"""Family of Swin U-Nets: strides, windows and sizes, masked pretraining, weights in VISION-MAE's layout.

Shapes: B batch, C channels, D H W voxels, d h w tokens, E embedding, K outputs; in 2D there is no D and no d.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
from mfm_nnunet.models.families import NetworkFamily, PlannedNetwork, Sizing, TrainingDefaults
from mfm_nnunet.models.layouts import Converted, ForeignLayout, NnsslName, Stated
from mfm_nnunet.models.sizing import MIN_EDGE, Trial, cpu_batch, plan_largest
from mfm_nnunet.models.swin import PatchEmbedding, PatchExpanding, PatchMerging, channels_first, resize_table
from mfm_nnunet.models.windows import SwinBlock

SWIN = "mfm_nnunet.models.swin.SwinUNet"
HEADS = {96: [3, 6, 12, 24], 48: [3, 6, 12, 24], 32: [1, 2, 4, 8]}
"""Heads of the four stages by the channels of the first: as published, half of it, and the size for CPUs."""
CPU_WIDTH = 32
NUM_STAGES = 4
TOKEN = 4
"""Edge of a token in voxels, as published; 2 in volumes of less than SMALL_VOLUME voxels along each axis."""
SMALL_VOLUME = 96
SMALLEST_WINDOW = {2: 4, 3: 3}
LARGEST_WINDOW = {2: 8, 3: 6}
"""Sides of planned windows, in tokens; a map that is smaller is one window."""
MAX_WINDOW_TOKENS = 512
"""Attention costs memory by the square of it."""
MAX_VOXELS = {3: 160**3, 2: 1024**2}
MAX_CPU_VOXELS = {3: 64**3, 2: 192**2}
"""Of the CPU preset. A 3D step with batch 2 is about 90 GFLOP, as one of its U-Nets."""
TABLE = "relative_position_bias_table"


class SwinBackbone(AbstractBackbone):
    """Swin U-Net with a learned token in the place of hidden ones, right after the patch embedding.

    So hidden voxels reach nothing, the skip connections included. Both kinds of restoring mean the same: windows need
    whole maps, so no token is dropped (arXiv 2402.01034, 2111.09886).
    """

    def __init__(self, network: Any, patch_size: tuple[int, ...], restoring: Restoring) -> None:
        super().__init__(network, patch_size)
        if restoring != "none":
            self.mask_token = nn.Parameter(0.02 * torch.randn(network.encoder.patch_embed.proj.out_channels))

    def blocks(self) -> list[nn.Module]:
        kinds = (PatchEmbedding, SwinBlock, PatchMerging, PatchExpanding)
        return [module for module in self.network.modules() if isinstance(module, kinds)]

    def mask_cell(self) -> tuple[int, ...]:
        """Return the voxels of 4 tokens along each axis that is merged twice, which is 4 x 4 tokens in 2D."""
        return self._token_after(2)

    def crop_cell(self) -> tuple[int, ...]:
        return self._token_after(len(self.feature_widths()) - 1)

    def feature_widths(self) -> list[int]:
        width = int(self.network.encoder.patch_embed.proj.out_channels)
        return [width * 2**stage for stage in range(len(self.network.encoder.layers))]

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        encoder = self.network.encoder
        _, outputs = encoder(encoder.patch_embed(x_BCDHW))
        return [channels_first(x_BdhwC, len(self.patch_size)) for x_BdhwC in outputs]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        """Return dense outputs (B, K, D, H, W); a token with any hidden voxel is hidden, and nothing is filled."""
        encoder = self.network.encoder
        hidden_B1DHW = hidden_B1DHW if len(self.patch_size) == 3 else hidden_B1DHW[:, :, None]
        hidden_Bdhw1 = nn.functional.max_pool3d(hidden_B1DHW.float(), self.network.stem).movedim(1, -1) > 0
        tokens_BdhwE = encoder.patch_embed(x_BCDHW)
        tokens_BdhwE = torch.where(hidden_Bdhw1, self.mask_token.to(tokens_BdhwE.dtype), tokens_BdhwE)
        return self.network.decode(encoder(tokens_BdhwE))

    def _token_after(self, mergings: int) -> tuple[int, ...]:
        merged = [module.strides for module in self.network.encoder.modules() if isinstance(module, PatchMerging)]
        sizes = tuple(math.prod(along) for along in zip(self.network.stem, *merged[:mergings]))
        return sizes[-len(self.patch_size) :]


class SwinLayout(ForeignLayout):
    """The 2D Swin networks of VISION-MAE (arXiv 2402.01034): of each the encoder.

    The decoders' names are not published, so they are reported as unused.
    """

    class_name = SWIN
    encoder = "layers"
    first_block = r"0\.blocks\.0\.attn\."
    stem = "encoder.patch_embed."
    head = "head."
    origin = "an assumption"

    def __init__(self) -> None:
        self.keys = {}

    def renaming(self, encoder: str, stem: str | None) -> dict[str, str]:
        root = encoder.rpartition(".")[0]
        above = f"{root}." if root else ""
        return {f"{encoder}.": "encoder.layers.", f"{stem or above + 'patch_embed'}.": self.stem}

    def needs_conversion(self, class_name: str) -> bool:
        return class_name != SWIN

    def convert(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], stated: Stated) -> Converted:
        buffers = [name for name in weights if name.endswith((".relative_position_index", ".attn_mask"))]
        kept = {name: tensor for name, tensor in weights.items() if name not in buffers}
        embedding = kept.get(f"{self.stem}proj.weight")
        if embedding is None or embedding.ndim != 4:
            raise MFMError(
                "E_MODEL_MISMATCH",
                "beside its Swin blocks there is no patch embedding of 2D images ('patch_embed.proj.weight'): only "
                "the 2D networks of VISION-MAE are read from other programs.",
            )
        tables = _first_tables(kept)
        window = (math.isqrt(tables[0].shape[0]) + 1) // 2
        kwargs = {
            "embed_dim": int(embedding.shape[0]),
            "depths": [_depth(kept, stage) for stage in range(len(tables))],
            "num_heads": [int(table.shape[1]) for table in tables],
            "stem": [int(size) for size in embedding.shape[2:]],
            "merging": [[2, 2]] * (len(tables) - 1),
            "window": [window, window],
            "always_shift": True,
        }
        patch = stated.patch_size or tuple(size * 2 ** (len(tables) - 1) * window for size in embedding.shape[2:])
        notes = ["windows are shifted in the last stage too, as in the file's network"]
        if stated.patch_size is None:
            notes.append(
                f"patch: {patch[0]} x {patch[1]}, so that its window covers the last map; the file does not say"
            )
        architecture = {"network_class_name": SWIN, "arch_kwargs": kwargs, "_kw_requires_import": []}
        return Converted(kept, architecture, patch, dict(others), notes)

    def nnssl_architecture(self, architecture: Mapping[str, Any]) -> NnsslName | str:
        return "a Swin U-Net"


class SwinFamily(NetworkFamily):
    """Swin U-Nets in 2D and 3D."""

    name = "swin"
    title = "Swin U-Net"
    classes = (SWIN,)
    encoder = ("encoder.",)
    decoder = ("decoder.", "head.")
    head = ("head.",)
    rates: ClassVar = {"adamw": (1e-3, 1e-3)}
    hides = "tokens"
    fewest_cells = 2
    """Instance norms that pretext tasks put behind it are undefined on one token."""
    layouts = (SwinLayout(),)

    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        if not {"stem", "merging", "window"} <= set(kwargs):
            return None
        return [math.prod(along_axis) for along_axis in zip(kwargs["stem"], *kwargs["merging"])]

    def patch_problem(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> str:
        problem, steps = super().patch_problem(kwargs, patch_size), self.steps(kwargs, len(patch_size))
        if steps is None or len(steps) != len(patch_size):
            return problem
        window = " x ".join(map(str, kwargs["window"]))
        if math.prod(kwargs["window"]) > MAX_WINDOW_TOKENS:
            return f"its windows of {window} tokens are too large: at most {MAX_WINDOW_TOKENS} tokens are compared"
        legal = self.legal_patch(kwargs, patch_size)
        if legal == list(patch_size):
            return ""
        problem = problem or f"windows of {window} tokens do not divide all of its maps"
        return f"{problem}; the next legal size is {' x '.join(map(str, legal))}"

    def legal_patch(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> list[int]:
        """Return the patch with each axis enlarged until the window divides all maps, but for those smaller than it."""
        legal = []
        for size, window, *along in zip(patch_size, kwargs["window"], kwargs["stem"], *kwargs["merging"]):
            edge = step = math.prod(along)
            while edge < size or not divides(window, map_sizes(edge, along)):
                edge += step
            legal.append(edge)
        return legal

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        """Choose strides by spacing, then the patch, the channels and the batch size by memory.

        1. Make the patch as large as the image, at most MAX_VOXELS.
        2. Take 96 channels, else 48, and then smaller patches, else 32 channels.
        """
        strides = plan_strides(sizing.median_shape, sizing.spacing)
        patches = list(legal_patches(sizing.median_shape, sizing.spacing, strides))
        limits = MAX_CPU_VOXELS if sizing.memory_gb is None else MAX_VOXELS
        patches = [patch for patch in patches if math.prod(patch) <= limits[len(patch)]] or patches[-1:]
        if sizing.memory_gb is None:
            return PlannedNetwork(swin_architecture(CPU_WIDTH, strides, patches[0]), patches[0], cpu_batch(patches[0]))
        trials: list[Trial] = [("96", patches[0])]
        trials += [(size, patch) for size in ("48", "32") for patch in patches]
        return plan_largest(
            sizing, trials, lambda size, patch: swin_architecture(int(size), strides, patch), self.title
        )

    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        return TrainingDefaults("adamw", 1e-3, 5e-2, 1.0, "as published for VISION-MAE, with clipping")

    def describe(self, architecture: Mapping[str, Any]) -> str:
        kwargs = architecture["arch_kwargs"]
        width, stages = kwargs["embed_dim"], len(kwargs["depths"])
        return (
            f"{self.title}, {stages} stages of {width} to {width * 2 ** (stages - 1)} channels, tokens of "
            f"{' x '.join(map(str, kwargs['stem']))} voxels, windows of {' x '.join(map(str, kwargs['window']))} tokens"
        )

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        if memory_gb is None:
            return "the size for CPUs; windows divide all maps"
        return f"the largest of {', '.join(map(str, HEADS))} channels in the budget; windows divide all maps"

    def patch_unit(self) -> str:
        return "sizes whose maps are divided by windows"

    def layer_decay_problem(self) -> str:
        return ""

    def layers_after(self, name: str, network: Any) -> int:
        """Return n - i for block i of n (0-based) and the merging behind it, n + 1 for the patch embedding, else 0."""
        depths = [len(layer["blocks"]) for layer in network.encoder.layers]
        if place := re.match(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name):
            stage = int(place[1])
            block = depths[stage] - 1 if place[2] is None else int(place[2])
            return sum(depths[stage:]) - block
        return sum(depths) + 1 if name.startswith("encoder.") else 0

    def adapted_layers(self, network: Any) -> list[nn.Linear]:
        """Return ``attn.qkv`` and ``attn.proj`` of the encoder's blocks (arXiv 2106.09685)."""
        blocks = [module for module in network.encoder.modules() if isinstance(module, SwinBlock)]
        return [layer for block in blocks for layer in (block.attn.qkv, block.attn.proj)]

    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        return SwinBackbone(network, patch_size, restoring)

    def resize_positions(
        self, name: str, value: Tensor, network: Any, source_patch_size: Sequence[int] | None
    ) -> tuple[Tensor, str] | None:
        """Convert the position table of another window, whose sides must be equal to be known."""
        if not name.endswith(TABLE) or value.shape == network.get_parameter(name).shape:
            return None
        layer: Any = network.get_submodule(name.rpartition(".")[0])
        wanted = layer.window[-network.num_axes :]
        side = round(value.shape[0] ** (1 / len(wanted)))
        if side ** len(wanted) != value.shape[0] or value.shape[1:] != network.get_parameter(name).shape[1:]:
            return None
        have = [(side + 1) // 2] * len(wanted)
        how = f"positions of windows of {' x '.join(map(str, have))} tokens converted to {' x '.join(map(str, wanted))}"
        return resize_table(value, have, wanted), how


def plan_strides(shape: Sequence[float], spacing: Sequence[float]) -> list[tuple[int, ...]]:
    """Return the strides of the stem and of each merging, by axis.

    Tokens become as cubic as the spacing allows, in mm. An axis is merged where the image has at least four of its
    tokens (fewer only if it has so few along every axis), and they are at most twice as long as the shortest of those.
    """
    token = TOKEN if len(shape) == 2 or max(shape) >= SMALL_VOLUME else TOKEN // 2
    strides = [[_stem_stride(token, mm / min(spacing))] for mm in spacing]
    tokens_mm = [mm * own[0] for mm, own in zip(spacing, strides)]
    grid = [size / own[0] for size, own in zip(shape, strides)]
    for _ in range(NUM_STAGES - 1):
        large = [axis for axis, size in enumerate(grid) if size >= min(4, max(grid) / 2)]
        shortest = min(tokens_mm[axis] for axis in large)
        merged = [axis for axis in large if tokens_mm[axis] <= 2 * shortest]
        for axis, own in enumerate(strides):
            own.append(2 if axis in merged else 1)
            tokens_mm[axis] *= own[-1]
            grid[axis] /= own[-1]
    return [tuple(own) for own in strides]


def _stem_stride(token: int, coarser: float) -> int:
    """Halve the tokens of an axis ``coarser`` than the finest until they are at most 1.5 times as long in mm."""
    stride = token
    while stride > 1 and stride * coarser > 1.5 * token:
        stride //= 2
    return stride


def map_sizes(edge: int, strides: Sequence[int]) -> list[int]:
    """Return the tokens of each stage along an axis of ``edge`` voxels."""
    return [edge // stride for stride in itertools.accumulate(strides, lambda a, b: a * b)]


def divides(window: int, tokens: Sequence[int]) -> bool:
    """Return whether a window divides the maps of all stages, but for those smaller than it, along one axis."""
    return all(size % window == 0 or size < window for size in tokens)


def common_window(tokens: Sequence[int], num_axes: int) -> int | None:
    """Return the largest window that divides the maps of all stages along one axis; None if there is none."""
    largest, smallest = (min(limits[num_axes], tokens[0]) for limits in (LARGEST_WINDOW, SMALLEST_WINDOW))
    return next((side for side in range(largest, smallest - 1, -1) if divides(side, tokens)), None)


def legal_patches(
    shape: Sequence[float], spacing: Sequence[float], strides: Sequence[Sequence[int]]
) -> Iterator[tuple[int, ...]]:
    """Yield patches whose maps a window divides, from one that covers the image to the smallest useful.

    The longest axis in mm is cut first.
    """
    choices = []
    for size, along in zip(shape, strides):
        step = math.prod(along)
        edges = (step * cells for cells in itertools.count(1))
        legal = (edge for edge in edges if common_window(map_sizes(edge, along), len(shape)))
        smallest = min(MIN_EDGE[len(shape)], size)
        fitting: list[int] = []
        while not fitting or fitting[-1] < size:
            fitting.append(next(legal))
        choices.append([edge for edge in fitting if edge >= smallest])
    while True:
        patch = tuple(edges[-1] for edges in choices)
        yield patch
        axes = [axis for axis, edges in enumerate(choices) if len(edges) > 1]
        if not axes:
            return
        choices[max(axes, key=lambda axis: patch[axis] * spacing[axis])].pop()


def swin_architecture(width: int, strides: Sequence[Sequence[int]], patch: Sequence[int]) -> dict[str, Any]:
    """Return a plan's ``architecture`` entry; ``width`` is a key of HEADS, ``strides`` those of each axis."""
    kwargs: dict[str, Any] = {
        "embed_dim": width,
        "depths": [2] * NUM_STAGES,
        "num_heads": HEADS[width],
        "stem": [along[0] for along in strides],
        "merging": [list(row) for row in zip(*(along[1:] for along in strides))],
        "window": [common_window(map_sizes(edge, along), len(patch)) for edge, along in zip(patch, strides)],
    }
    if len(patch) == 3:
        kwargs["voxel_dim"] = width // 4
    return {"network_class_name": SWIN, "arch_kwargs": kwargs, "_kw_requires_import": []}


def _first_tables(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the position table of the first block of each stage."""
    tables: list[Tensor] = []
    while (table := weights.get(f"encoder.layers.{len(tables)}.blocks.0.attn.{TABLE}")) is not None:
        tables.append(table)
    side = math.isqrt(tables[0].shape[0]) if tables else 0
    if not tables or side % 2 == 0 or any(table.shape[0] != side**2 for table in tables):
        raise MFMError(
            "E_MODEL_MISMATCH",
            "its position tables are missing, or not of one square window: it is no network of VISION-MAE.",
        )
    return tables


def _depth(weights: Mapping[str, Tensor], stage: int) -> int:
    names = (re.match(rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.", name) for name in weights)
    return 1 + max(int(name[1]) for name in names if name)
