"""A decoder that restores an image from an encoder's coarsest features alone, without skips (as in arXiv 2111.14791).

For tasks that train only the encoder: it is trained with them and never shipped. Nothing else than the coarsest map
reaches it, so what it restores the encoder must have kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.models.backbone import AbstractBackbone


class CoarseDecoder(nn.Module):
    """Convolutions of 3 voxels, each with instance norm, LeakyReLU and linear upsampling, back to the patch.

    Its widths and sizes are those of the encoder's maps in reverse order; where the finest map is coarser than the
    patch (tokens) it goes on by doubling the size and halving the width. Short axes of a token are doubled last.
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
        """(B, num_outputs, *patch_size) from the encoder's maps, fine to coarse; of all but the last only the size."""
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
