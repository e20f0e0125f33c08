"""Encoders that timm has weights of, trained on natural images, with a decoder; in 2D, and in 3D slice by slice.

Legend: B batch, C channels, D H W voxels, N slices (B x D in 3D, B in 2D), E features, h w places of a map, K outputs.
In 2D there is no D.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import is_model_pretrained
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.depth import Depth, make_depth

MOST_MAPS = 4
"""Maps that a plain ViT gives, of evenly spaced blocks: 3, 6, 9 and 12 of 12, as UNETR (arXiv 2103.10504)."""
ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
"""Arguments with which encoders take images of any size, where they have them. Positions are then resampled."""


@dataclass(frozen=True)
class EncoderFacts:
    """Properties of an encoder of timm, the same for all sizes of images."""

    indices: tuple[int, ...]
    """Blocks of a plain ViT, else stages, whose maps are used."""
    widths: tuple[int, ...]
    """Features of these maps, fine to coarse."""
    reductions: tuple[int, ...]
    """Voxels per place of these maps, along an axis."""
    modules: tuple[str, ...]
    """Names of the modules that compute these maps."""
    options: dict[str, Any]
    """Arguments of timm's function that builds it."""

    @property
    def is_plain(self) -> bool:
        """True for a ViT, whose maps have one size."""
        return len(set(self.reductions)) == 1

    @property
    def step(self) -> int:
        """Number of which the sides of an image must be multiples."""
        return self.reductions[-1]


@functools.cache
def encoder_facts(name: str) -> EncoderFacts:
    """Return the properties of timm's encoder ``name``, e.g. ``vit_small_patch14_dinov2.lvd142m``.

    Nothing is downloaded. Raises MFMError (E_CONFIG) for a name that timm does not have, or an encoder without maps.
    """
    if not timm.is_model(name) or ("." in name and not is_model_pretrained(name)):
        known = timm.list_models(pretrained="." in name)
        raise MFMError("E_CONFIG", f"timm:{name}: timm {timm.__version__} has no such model. {nearest(name, known)}")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    info = [dict(entry) for entry in getattr(model, "feature_info", [])]
    reductions = [int(entry["reduction"]) for entry in info]
    is_plain = len(set(reductions)) == 1
    if not hasattr(model, "forward_intermediates") or not (is_plain or reductions == _halvings(reductions)):
        raise MFMError(
            "E_CONFIG",
            f"timm:{name}: this model gives no maps of half the size each, or of one size. Use a ViT, or an encoder "
            "with stages such as Swin, ConvNeXt, EfficientNet or Hiera.",
        )
    chosen = range(len(info))
    if is_plain:
        number = min(MOST_MAPS, max(1, len(_factors(reductions[0])) - 1))
        chosen = sorted({max(0, len(info) * (map_ + 1) // number - 1) for map_ in range(number)})  # type: ignore[assignment]
    names = {name for cls in type(model).__mro__ for name in inspect.signature(cls.__init__).parameters}  # type: ignore[misc]
    return EncoderFacts(
        tuple(chosen),
        tuple(int(info[index]["num_chs"]) for index in chosen),
        tuple(reductions[index] for index in chosen),
        tuple(str(info[index]["module"]) for index in chosen),
        {option: value for option, value in ANY_SIZE.items() if option in names},
    )


def _halvings(reductions: Sequence[int]) -> list[int]:
    return [reductions[0] * 2**number for number in range(len(reductions))] if reductions else [0]


def _factors(step: int) -> list[int]:
    """Return the voxels per place of the decoder's levels: 1, 2, 4 ... and the encoder's coarsest map."""
    return [2**level for level in range(step.bit_length()) if 2**level < step] + [step]


def level_strides(name: str, num_axes: int) -> list[list[int]]:
    """Return the strides of the decoder's levels, finest first, as nnU-Net derives deep supervision from them.

    Slices keep their number. Between the last levels of a ViT with patches of 14 voxels it is not a whole number; the
    coarsest level is not supervised, so that stride is never used.
    """
    number = len(_factors(encoder_facts(name).step))
    return [[1] * num_axes] + [[1] * (num_axes - 2) + [2, 2] for _ in range(number - 1)]


@dataclass(frozen=True)
class NaturalSizes:
    """Arguments of :class:`NaturalUNet`."""

    encoder: str
    """Name in timm."""
    strides: Sequence[Sequence[int]]
    """Of the decoder's levels, see :func:`level_strides`."""
    features: Sequence[int]
    """Channels of the decoder's levels, finest first."""
    intensities: Sequence[Sequence[float]]
    """Black and white of each image channel, in the plan's normalisation: 0 and 1 of a natural image."""
    mean: Sequence[float]
    """Mean of each image channel that the encoder was trained with, between black (0) and white (1)."""
    deviation: Sequence[float]
    depth: str = "slices"
    """slices, adapters or inflated (:mod:`mfm_nnunet.models.depth`); in 2D without meaning."""
    depth_stride: int = 1
    """inflated: slices that a token covers."""
    num_slices: int = 1
    """inflated: slices of the patch, for their positions."""


class NaturalUNet(nn.Module):
    """(B, C, D, H, W) -> (B, K, D, H, W), or with deep supervision a list of such, finest first.

    ``sizes`` are the fields of :class:`NaturalSizes`. The encoder's tensors have timm's names after ``encoder.``.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, **sizes: Any) -> None:
        super().__init__()
        own = NaturalSizes(**sizes)
        self.sizes, self.facts, self.num_axes = own, encoder_facts(own.encoder), len(own.strides[0])
        self.deep_supervision = deep_supervision
        self.rescaling = Rescaling(input_channels, own)
        factors, convolution = _factors(self.facts.step), (nn.Conv3d if self.num_axes == 3 else nn.Conv2d)
        if not len(own.strides) == len(own.features) == len(factors):
            raise ValueError(f"strides and features need one entry for each of the {len(factors)} levels")
        self.stem = Stem(input_channels, own.features, convolution)
        self.encoder: Any = make_encoder(own.encoder, input_channels)
        self.depth: Depth | None = None
        if self.num_axes == 3:
            self.depth = make_depth(self.encoder, self.facts, own.depth, own.depth_stride, own.num_slices)
        self.decoder = PyramidDecoder(self.facts, factors, own.features, convolution)
        self.heads = nn.ModuleList(convolution(width, num_classes, 1) for width in own.features[:-1])

    def forward(self, x_BCDHW: Tensor) -> Any:
        x_BCDHW = self.rescaling(x_BCDHW)
        levels = self.decoder(self.stem(x_BCDHW), self.maps(x_BCDHW))
        if self.deep_supervision:
            return [head(level) for head, level in zip(self.heads, levels)]
        return self.heads[0](levels[0])

    def encode(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return the encoder's maps (B, E, d, h, w), fine to coarse, of an image in the plan's normalisation."""
        return self.maps(self.rescaling(x_BCDHW))

    def maps(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return the encoder's maps of an image in the encoder's own units."""
        if self.depth is None:
            return self._maps_of_slices(x_BCDHW)
        return self.depth(self._maps_of_slices, x_BCDHW)

    def _maps_of_slices(self, x_NCHW: Tensor) -> list[Tensor]:
        return self.encoder.forward_intermediates(
            x_NCHW, indices=list(self.facts.indices), norm=has_norm(self.encoder, self.facts), intermediates_only=True
        )


def make_encoder(name: str, num_inputs: int) -> Any:
    """Build an encoder of timm with random weights and without the parts behind its last map. Nothing is downloaded."""
    facts = encoder_facts(name)
    model: Any = timm.create_model(name, pretrained=False, num_classes=0, in_chans=num_inputs, **facts.options)
    model.prune_intermediate_layers(list(facts.indices), prune_norm=not has_norm(model, facts), prune_head=True)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.keeps_statistics = True
    return model


def has_norm(encoder: Any, facts: EncoderFacts) -> bool:
    """Return whether an encoder has one norm for all its maps, as plain ViTs have; SAM's is part of its neck."""
    return facts.is_plain and hasattr(encoder, "norm")


class Rescaling(nn.Module):
    """From the plan's normalisation to the values that the encoder was trained with; linear, nothing is clipped.

    Channels behind the last one of the plan are treated like it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, num_inputs: int, sizes: NaturalSizes) -> None:
        super().__init__()
        rows = list(zip(sizes.intensities, sizes.mean, sizes.deviation))
        rows += rows[-1:] * (num_inputs - len(rows))
        scale = [1 / ((white - black) * deviation) for (black, white), _, deviation in rows[:num_inputs]]
        shift = [(-black / (white - black) - mean) / deviation for (black, white), mean, deviation in rows[:num_inputs]]
        shape = (1, num_inputs, *([1] * len(sizes.strides[0])))
        self.register_buffer("scale", torch.tensor(scale).reshape(shape), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).reshape(shape), persistent=False)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        return x_BCDHW * self.scale + self.shift


class Stem(nn.Module):
    """Edges that tokens lose: features at full and at half resolution."""

    def __init__(self, num_inputs: int, features: Sequence[int], convolution: Any) -> None:
        super().__init__()
        self.full = _block(num_inputs, features[0], convolution)
        stride = (1, 2, 2) if convolution is nn.Conv3d else 2
        self.halved = _block(features[0], features[1], convolution, stride)

    def forward(self, x_BCDHW: Tensor) -> list[Tensor]:
        full = self.full(x_BCDHW)
        return [full, self.halved(full)]


class PyramidDecoder(nn.Module):
    """U-Net over the maps of the stem and the encoder; a ViT's maps are enlarged to its levels (arXiv 2103.10504)."""

    def __init__(self, facts: EncoderFacts, factors: Sequence[int], features: Sequence[int], convolution: Any) -> None:
        super().__init__()
        self.factors = list(factors)
        last, number = len(factors) - 1, len(facts.widths)
        levels = [last - number + 1 + index for index in range(number)]
        if not facts.is_plain:
            levels = [self.factors.index(reduction) for reduction in facts.reductions]
        self.levels = levels
        self.laterals = nn.ModuleList(
            convolution(width, features[level], 1) for width, level in zip(facts.widths, levels)
        )
        self.blocks = nn.ModuleList(
            _block(features[level + 1] + features[level] * ((level < 2) + (level in levels)), features[level],
                   convolution)
            for level in range(last)
        )  # fmt: skip

    def forward(self, stem: list[Tensor], maps: list[Tensor]) -> list[Tensor]:
        """Return the features of all levels but the coarsest, finest first."""
        depth, (height, width) = stem[0].shape[2:-2], stem[0].shape[-2:]
        skips: list[list[Tensor]] = [[stem[0]], [stem[1]], *([] for _ in self.factors[2:])]
        for level, lateral, map_ in zip(self.levels, self.laterals, maps):
            factor = self.factors[level]
            size = (*depth, round(height / factor), round(width / factor))
            skips[level].append(_resize_map(lateral(map_), size))
        found: list[Tensor] = []
        x_BCDHW = torch.cat(skips.pop(), 1)
        for block, skip in zip(reversed(self.blocks), reversed(skips)):
            size = (*depth, *self._size_of(len(skips) - len(found) - 1, height, width))
            x_BCDHW = block(torch.cat([_resize_map(x_BCDHW, size), *skip], 1))
            found.append(x_BCDHW)
        return found[::-1]

    def _size_of(self, level: int, height: int, width: int) -> tuple[int, int]:
        return round(height / self.factors[level]), round(width / self.factors[level])


def _resize_map(x_BCDHW: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x_BCDHW.shape[2:]) == size:
        return x_BCDHW
    return functional.interpolate(x_BCDHW, size=size, mode="trilinear" if len(size) == 3 else "bilinear")


def _block(before: int, after: int, convolution: Any, stride: Any = 1) -> nn.Sequential:
    norm: Any = nn.InstanceNorm3d if convolution is nn.Conv3d else nn.InstanceNorm2d
    layers: list[nn.Module] = []
    for inputs, step in ((before, stride), (after, 1)):
        layers += [convolution(inputs, after, 3, step, 1), norm(after, affine=True), nn.LeakyReLU()]
    return nn.Sequential(*layers)
