"""Layers after an encoder that are trained but not exported: pooling, projectors, a decoder without skips.

Shapes: B batch, V views per item, C channels, D H W voxels of a view, E embedding; in 2D there is no D.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.models.backbone import AbstractBackbone


def pool(features: Sequence[Tensor]) -> Tensor:
    """Average each map (B, features, ...) of an encoder over space and concatenate to (B, sum of features)."""
    return torch.cat([feature.float().flatten(2).mean(2) for feature in features], dim=1)


class Projector(nn.Sequential):
    """MLP whose hidden layers are linear, LayerNorm without affine parameters, and ReLU."""

    def __init__(self, widths: Sequence[int]) -> None:
        """Build the layers; ``widths``: inputs, hidden layers and outputs, e.g. (1120, 2048, 2048, 2048)."""
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), nn.LayerNorm(after, elementwise_affine=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


class CoarseDecoder(nn.Module):
    """Decoder that restores an image from an encoder's coarsest features, without skips (as in arXiv 2111.14791).

    A stage is a convolution of 3 voxels, instance norm, LeakyReLU and linear upsampling. Widths and sizes are those of
    the encoder's maps in reverse order. If the finest map is coarser than the patch (tokens), further stages double the
    size and halve the width; short axes of a token are doubled last.
    """

    def __init__(self, backbone: AbstractBackbone, num_outputs: int) -> None:
        super().__init__()
        self.patch_size = backbone.patch_size
        widths = list(reversed(backbone.feature_widths()))
        total_stride = max(backbone.crop_cell())
        self.num_doublings = max(0, total_stride.bit_length() - len(widths))
        widths += [max(1, widths[-1] // 2 ** (step + 1)) for step in range(self.num_doublings)]
        is_2d = len(self.patch_size) == 2
        self.mode = "bilinear" if is_2d else "trilinear"
        convolution = nn.Conv2d if is_2d else nn.Conv3d
        norm = nn.InstanceNorm2d if is_2d else nn.InstanceNorm3d
        self.stages = nn.ModuleList(
            nn.Sequential(
                convolution(before, after, 3, padding=1, bias=False), norm(after, affine=True), nn.LeakyReLU()
            )
            for before, after in itertools.pairwise(widths)
        )
        self.output = convolution(widths[-1], num_outputs, 3, padding=1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return (B, num_outputs, *patch_size). ``features`` are fine to coarse; only the last map's values count."""
        x = features[-1]
        for stage, size in zip(self.stages, self._sizes(features), strict=True):
            x = functional.interpolate(stage(x), size=size, mode=self.mode, align_corners=False)
        assert tuple(x.shape[2:]) == self.patch_size, f"{tuple(x.shape[2:])} is not {self.patch_size}"
        return self.output(x)

    def _sizes(self, features: Sequence[Tensor]) -> list[tuple[int, ...]]:
        finest = features[0].shape[2:]
        sizes = [tuple(feature.shape[2:]) for feature in reversed(features[:-1])]
        for step in reversed(range(self.num_doublings)):
            sizes.append(tuple(max(here, size // 2**step) for here, size in zip(finest, self.patch_size)))
        return sizes
