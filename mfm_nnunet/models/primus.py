"""Primus, a plain transformer for segmentation (arXiv 2503.01835), with a constructor that plans can call.

It has a patch embedding, Eva blocks with absolute and rotary positions, and a patch decoder, in 3D and 2D. The encoder
and the names in the state dict (``down_projection``, ``eva``, ``up_projection``) are those of
dynamic-network-architectures (DNA), so OpenMind's encoder weights fit. Tokens are flattened axis 0 outermost
(DNA >= 0.4.3). Versions 2 and 3 replace the patch embedding by residual convolutions. These use DNA's blocks, with the
names and widths of its PrimusV2 and PrimusV3, whose own stems support only 3D and tokens of 8 voxels.

Shapes: B batch, C channels, D H W voxels, d h w tokens per axis, T = d h w tokens, E embedding, K outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd, PatchEmbed
from dynamic_network_architectures.building_blocks.residual import StackedResidualBlocks
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError

PRIMUS_SIZES: dict[str, dict[str, int]] = {
    "CPU": {"embed_dim": 192, "eva_depth": 4, "eva_numheads": 4},
    "S": {"embed_dim": 396, "eva_depth": 12, "eva_numheads": 6},
    "B": {"embed_dim": 792, "eva_depth": 12, "eva_numheads": 12},
    "M": {"embed_dim": 864, "eva_depth": 16, "eva_numheads": 12},
    "L": {"embed_dim": 1056, "eva_depth": 24, "eva_numheads": 16},
}
"""Sizes of the paper, plus CPU (2 M parameters), which trains in minutes on two cores. For 2D see primus_kwargs."""

CPU_STEM_FEATURES = {2: (16, 16, 32, 64), 3: (16, 32, 64, 128)}
"""Stem widths of versions 2 and 3 for size CPU. The published stems would be most of that network."""

REFERENCE_OUTPUTS = 5
"""Number of outputs for which DNA's patch decoder has the same widths as ours."""

STEM_INPUTS = tuple(
    f"down_projection.stem.blocks.0.{name}"
    for name in ("conv1.conv", "conv1.all_modules.0", "skip.0.conv", "skip.0.all_modules.0")
)
"""First convolutions of versions 2 and 3, under both names of each."""

STEM_FEATURES: dict[int, tuple[int, ...]] = {2: (32, 32, 64, 128, 256, 512), 3: (32, 64, 256, 1024, 1024, 1024)}
"""Published widths by version: at full size, then after each halving; extended for tokens above 8 voxels."""

SKIP_SCALE = 1e-5
"""Initial scale of V3's skip projections, which contribute almost nothing at the start of training."""

NEGATIVE_SLOPE = 1e-2
"""Slope assumed by the He initialisation, as in nnU-Net."""


def primus_kwargs(size: str, num_axes: int, version: int = 1) -> dict[str, Any]:
    """Return width, depth and heads of ``size``, and the stem's arguments for versions above 1.

    In 2D, rotary positions need a head width that is a multiple of 4. S, B and L (66) get the next larger number of
    heads that fits.
    """
    kwargs: dict[str, Any] = dict(PRIMUS_SIZES[size])
    while not _heads_fit(kwargs["embed_dim"], kwargs["eva_numheads"], num_axes):
        kwargs["eva_numheads"] += 1
    if version > 1:
        kwargs["version"] = version
        if size == "CPU":
            kwargs["stem_features"] = list(CPU_STEM_FEATURES[version])
    return kwargs


@dataclass(frozen=True)
class PrimusOptions:
    """Options of Primus. The defaults are those of Primus-M in the paper."""

    drop_path_rate: float = 0.2
    """Rate at the last block, in train mode; it grows linearly with depth."""
    init_values: float | None = 0.1
    """Initial layer scale; None: no layer scale."""
    scale_attn_inner: bool = True
    """Normalise the inner attention."""
    deep_supervision: bool = False
    """Ignored; nnU-Net passes it, but there are no coarser outputs to supervise."""
    version: int = 1
    """2 and 3 have a convolutional stem."""
    stem_features: Sequence[int] | None = None
    """Widths of the convolutional stem; None: as published."""


class PrimusSeg(nn.Module):
    """Primus for segmentation and dense pretext tasks: (B, C, *input_shape) -> (B, K, *input_shape).

    ``patch_embed_size`` is the token size in voxels, a power of two per axis. ``input_shape`` is the patch, each axis a
    multiple of the token. ``options`` are the fields of :class:`PrimusOptions`.

    Raises MFMError (E_CONFIG) for inconsistent sizes.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        embed_dim: int,
        patch_embed_size: Sequence[int],
        input_shape: Sequence[int],
        eva_depth: int,
        eva_numheads: int,
        **options: Any,
    ) -> None:
        super().__init__()
        own = PrimusOptions(**options)
        version, stem_features = own.version, own.stem_features
        _check_sizes(embed_dim, eva_numheads, patch_embed_size, input_shape)
        _check_stem(version, stem_features, patch_embed_size, input_shape)
        self.input_shape = tuple(input_shape)
        self.patch_embed_size = tuple(patch_embed_size)
        self.key_to_encoder = "eva"
        self.key_to_stem = "down_projection"
        self.keys_to_in_proj = ("down_projection.proj",) if version == 1 else STEM_INPUTS
        self.key_to_lpe = "eva.pos_embed"
        self.down_projection = _stem(version, stem_features, patch_embed_size, input_channels, embed_dim)
        self.up_projection = PatchDecoder(patch_embed_size, embed_dim, num_classes)
        self.eva = Eva(
            embed_dim=embed_dim,
            depth=eva_depth,
            num_heads=eva_numheads,
            ref_feat_shape=tuple(size // token for size, token in zip(input_shape, patch_embed_size)),
            drop_path_rate=own.drop_path_rate,
            init_values=own.init_values,
            scale_attn_inner=own.scale_attn_inner,
        )
        # The class has no ``initialize``, so nnU-Net's factory does not repeat this. Eva and the decoder did their own.
        self.down_projection.apply(InitWeights_He(NEGATIVE_SLOPE))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Return dense outputs (B, K, D, H, W). The input must match ``input_shape``: positions are learned for it."""
        assert tuple(x_BCDHW.shape[2:]) == self.input_shape, f"{tuple(x_BCDHW.shape)} is not {self.input_shape}"
        grid_BEdhw = self.down_projection(x_BCDHW)
        tokens_BTE, _ = self.eva(grid_BEdhw.flatten(2).transpose(1, 2))
        return self.up_projection(tokens_BTE.transpose(1, 2).reshape(grid_BEdhw.shape))


class ConvStem(nn.Module):
    """Convolutional stem (B, C, D, H, W) -> (B, E, d, h, w): residual blocks at full size and per halving, then 1x1x1.

    The product of ``strides`` is the token size. Version 3 adds linear projections of every finer map to the tokens,
    each with a learned scale.
    """

    def __init__(
        self,
        input_channels: int,
        embed_dim: int,
        strides: Sequence[Sequence[int]],
        features: Sequence[int],
        version: int,
    ) -> None:
        assert len(features) == len(strides) + 1, "one width for the full size and one per stage"
        super().__init__()
        conv: Any = nn.Conv3d if len(strides[0]) == 3 else nn.Conv2d
        self.stem = _residual_block(conv, input_channels, features[0], 1, version)
        self.stages = nn.ModuleList(
            _residual_block(conv, before, after, list(stride), version)
            for (before, after), stride in zip(itertools.pairwise(features), strides)
        )
        self.final_proj = conv(features[-1], embed_dim, 1)
        self.add_skips = version == 3
        if self.add_skips:
            remaining = [[math.prod(axis) for axis in zip(*strides[stage:])] for stage in range(len(strides))]
            self.proj_to_tokens = nn.ModuleList(
                conv(width, embed_dim, size, size) for width, size in zip(features, remaining)
            )
            self.scale_proj_to_tokens = nn.ParameterList(
                nn.Parameter(torch.tensor(SKIP_SCALE)) for _ in self.proj_to_tokens
            )

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Return the tokens as a grid (B, E, d, h, w)."""
        maps = [self.stem(x_BCDHW)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        tokens = self.final_proj(maps[-1])
        if self.add_skips:
            for projection, scale, finer in zip(self.proj_to_tokens, self.scale_proj_to_tokens, maps):
                tokens = tokens + scale * projection(finer)
        return tokens


def _residual_block(conv: Any, before: int, after: int, stride: Any, version: int) -> nn.Module:
    return StackedResidualBlocks(
        1,
        conv,
        before,
        after,
        kernel_size=3,
        initial_stride=stride,
        # As published, only the block at full size has biases.
        conv_bias=stride == 1,
        norm_op=nn.InstanceNorm3d if conv is nn.Conv3d else nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.ReLU if version == 2 else nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


class PatchDecoder(nn.Module):
    """Transposed convolutions from tokens to voxels, each but the last followed by a norm and GELU.

    DNA's decoder derives its inner widths from the number of outputs (864-112-16-1 but 864-192-48-5), so a pretrained
    decoder does not fit another head. Ours always has DNA's widths for REFERENCE_OUTPUTS = 5, which is Volume Fusion or
    a segmentation of four structures, and wide enough for more. Only the last layer, ``decode.{n-1}``, is the head.
    """

    def __init__(self, patch_embed_size: Sequence[int], embed_dim: int, num_outputs: int) -> None:
        super().__init__()
        strides = _doublings(patch_embed_size)
        widths = decoder_widths(embed_dim, len(strides))
        conv: Any = nn.ConvTranspose3d if len(patch_embed_size) == 3 else nn.ConvTranspose2d
        layers: list[nn.Module] = [
            nn.Sequential(conv(before, after, stride, stride), LayerNormNd(after), nn.GELU())
            for before, after, stride in zip(widths, widths[1:], strides)
        ]
        self.decode = nn.Sequential(*layers, conv(widths[-1], num_outputs, strides[-1], strides[-1]))
        self.apply(_init_transposed)

    def forward(self, grid_BEdhw: Tensor) -> Tensor:
        """Map tokens (B, E, d, h, w) to voxels (B, K, D, H, W)."""
        return self.decode(grid_BEdhw)


def decoder_widths(embed_dim: int, num_stages: int) -> list[int]:
    """Return the input width of each decoder layer: a geometric series from ``embed_dim`` down, in multiples of 8."""
    ratio = (embed_dim / (2 * REFERENCE_OUTPUTS)) ** (1 / num_stages)
    return [embed_dim] + [max(8, round(embed_dim / ratio**stage / 8) * 8) for stage in range(1, num_stages)]


def _doublings(patch_embed_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Return strides whose product is the token size, coarsest first; short axes are doubled last, as in DNA."""
    doublings = [2 ** (stage + 1) for stage in reversed(range(int(math.log2(max(patch_embed_size)))))]
    return [tuple(2 if size % doubling == 0 else 1 for size in patch_embed_size) for doubling in doublings]


def _stem(
    version: int, features: Sequence[int] | None, token: Sequence[int], input_channels: int, embed_dim: int
) -> nn.Module:
    if version == 1:
        return PatchEmbed(tuple(token), input_channels, embed_dim)
    strides = _doublings(token)[::-1]
    features = features or STEM_FEATURES[version][: len(strides) + 1]
    return ConvStem(input_channels, embed_dim, strides, features, version)


def _init_transposed(module: nn.Module) -> None:
    # torch computes out_channels x kernel as the fan-in of a transposed convolution. Here kernel == stride, so each
    # voxel sums one tap over the input channels. With torch's fan-in, a head with one output starts 2 to 3 times too
    # large.
    if isinstance(module, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (1 + NEGATIVE_SLOPE**2) / module.in_channels))
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _heads_fit(embed_dim: int, num_heads: int, num_axes: int) -> bool:
    # A head is split evenly over the axes, and each share into sine and cosine pairs.
    return embed_dim % (num_heads * 2 * num_axes) == 0


def _check_stem(version: int, features: Sequence[int] | None, token: Sequence[int], patch: Sequence[int]) -> None:
    num_stages, problem = len(_doublings(token)), ""
    if version not in (1, *STEM_FEATURES):
        problem = "version must be 1, 2 or 3"
    elif version == 1 and features is not None:
        problem = "version 1 has no stem_features"
    elif features is not None and (len(features) != num_stages + 1 or min(features) < 1):
        problem = f"with these tokens stem_features needs {num_stages + 1} widths, at least 1 each"
    elif version > 1 and features is None and len(STEM_FEATURES[version]) <= num_stages:
        problem = "there are no published stem_features for tokens so large"
    elif version > 1 and tuple(patch) == tuple(token):
        problem = "the norms of its stem need more than one token"
    if problem:
        raise _misfit(f"version={version}, stem_features={features}", token, patch, problem)


def _check_sizes(embed_dim: int, num_heads: int, token: Sequence[int], patch: Sequence[int]) -> None:
    problem = ""
    if len(token) not in (2, 3) or len(patch) != len(token):
        problem = "patch_embed_size and input_shape need 2 or 3 axes each"
    elif any(size < 1 or size & (size - 1) for size in token) or max(token) < 2:
        problem = "patch_embed_size needs powers of two, at least one of them above 1"
    elif any(size < 1 or size % cell for size, cell in zip(patch, token)):
        problem = "each axis of input_shape must be a multiple of the token's"
    elif num_heads < 1 or not _heads_fit(embed_dim, num_heads, len(token)):
        problem = f"embed_dim must be a multiple of {2 * len(token)} x eva_numheads in {len(token)}D"
    if problem:
        raise _misfit(f"embed_dim={embed_dim}, eva_numheads={num_heads}", token, patch, problem)


def _misfit(arguments: str, token: Sequence[int], patch: Sequence[int], problem: str) -> MFMError:
    return MFMError(
        "E_CONFIG",
        f"Primus with {arguments}, patch_embed_size={tuple(token)}, input_shape={tuple(patch)}: {problem}. Change "
        "these in the plan's architecture, or plan again.",
    )
