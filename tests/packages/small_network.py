"""A small convolutional network, and the family that tells mfm_nnunet about it.

Shapes: B batch, C channels, D H W voxels, K outputs; in 2D there is no D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
from mfm_nnunet.models.families import NetworkFamily, PlannedNetwork, Sizing, TrainingDefaults
from mfm_nnunet.models.sizing import CPU_VOXELS, MIN_EDGE, cpu_batch, largest_patch, plan_largest, smaller_patches

WIDTHS = {"large": [32, 64, 128, 256], "small": [8, 16, 32]}
"""Channels of the stages; each stage halves the image."""


class SmallNet(nn.Module):
    """(B, C, D, H, W) -> (B, K, D, H, W): a convolution per stage, and sums on the way back."""

    def __init__(self, input_channels: int, num_classes: int, widths: Sequence[int], num_axes: int) -> None:
        super().__init__()
        conv: Any = nn.Conv3d if num_axes == 3 else nn.Conv2d
        self.encoder = nn.ModuleList(
            _block(conv, before, after, stride=1 if stage == 0 else 2)
            for stage, (before, after) in enumerate(pairwise([input_channels, *widths]))
        )
        self.decoder = nn.ModuleList(_block(conv, deep, fine, stride=1) for fine, deep in pairwise(widths))
        self.head = conv(widths[0], num_classes, 1)

    def encode(self, x_BCDHW: Tensor) -> list[Tensor]:
        maps = [x_BCDHW]
        for stage in self.encoder:
            maps.append(stage(maps[-1]))
        return maps[1:]

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        *skips, coarse = self.encode(x_BCDHW)
        for block, skip in zip(reversed(self.decoder), reversed(skips)):
            coarse = skip + nn.functional.interpolate(block(coarse), size=skip.shape[2:])
        return self.head(coarse)


def _block(conv: Any, before: int, after: int, stride: int) -> nn.Module:
    norm = nn.InstanceNorm3d if conv is nn.Conv3d else nn.InstanceNorm2d
    return nn.Sequential(conv(before, after, 3, stride, 1), norm(after, affine=True), nn.LeakyReLU())


class SmallBackbone(AbstractBackbone):
    """Hidden voxels are filled, which is what the base class does."""

    def blocks(self) -> list[nn.Module]:
        return [*self.network.encoder, *self.network.decoder]

    def crop_cell(self) -> tuple[int, ...]:
        return (2 ** (len(self.network.encoder) - 1),) * len(self.patch_size)

    def feature_widths(self) -> list[int]:
        return [stage[0].out_channels for stage in self.network.encoder]

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return self.network.encode(x_BCDHW)


class SmallFamily(NetworkFamily):
    """Sized by two tables of widths."""

    name = "small"
    title = "small network"
    classes = ("small_network.SmallNet",)
    encoder = ("encoder.",)
    decoder = ("decoder.", "head.")
    head = ("head.",)
    rates: ClassVar = {"adamw": (1e-3, 3e-4)}

    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int]:
        return [2 ** (len(kwargs["widths"]) - 1)] * num_axes

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        num_axes, cell = len(sizing.spacing), 8
        patch = largest_patch(sizing.median_shape, sizing.spacing, cell, CPU_VOXELS[num_axes])
        if sizing.memory_gb is None:
            return PlannedNetwork(architecture("small", num_axes), patch, cpu_batch(patch))
        smaller = smaller_patches(patch, sizing.spacing, cell, MIN_EDGE[num_axes])
        trials = [("large", patch), ("small", patch), *(("small", cut) for cut in smaller)]
        return plan_largest(sizing, trials, lambda size, patch: architecture(size, num_axes), self.title)

    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        return TrainingDefaults("adamw", 1e-3, weight_decay=1e-2, gradient_clip=12.0, reason="as tried on two datasets")

    def describe(self, architecture: Mapping[str, Any]) -> str:
        return f"{self.title} of widths {', '.join(map(str, architecture['arch_kwargs']['widths']))}"

    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        return SmallBackbone(network, patch_size)


def architecture(size: str, num_axes: int) -> dict[str, Any]:
    """Return the ``architecture`` entry of a plan."""
    kwargs = {"widths": WIDTHS[size], "num_axes": num_axes}
    return {"network_class_name": SmallFamily.classes[0], "arch_kwargs": kwargs, "_kw_requires_import": []}
