"""SparK in 3D (S3D): an encoder that computes only at visible places (arXiv 2301.03580, 2410.23132).

Hidden: 75 % of the cells of a regular grid, as in MAE for U-Nets. But hidden places stay empty in every layer of the
encoder, and norms use only visible places. Before the decoder, hidden places of each feature map get a learnable token;
coarser maps also get a convolution. Target and loss are those of MAE. For networks with tokens use MAE instead.

Sparse convolutions on dense tensors: the output of a convolution (including bias) is set to 0 at inactive places.
Instance norms take their statistics from active places. Layers are not replaced, so names, sharing and weights stay the
same. The network behaves as usual unless it is called through :class:`SparseEncoder`.

Legend: B batch, C channels, D H W places of a feature map; in 2D there is no D.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.tasks.masks import MaskedRestoration


class SparK(MaskedRestoration):
    """Restore hidden voxels through the network's own decoder; only the first convolution sees ``fill_value``."""

    name = "spark3d"

    def __init__(self, config: Any, backbone: AbstractBackbone) -> None:
        super().__init__(config, backbone)
        self._encode = SparseEncoder(backbone.network.encoder)
        # The finest map has no convolution, which would cost as much as all others together.
        self.densify = nn.ModuleList(
            Densify(width, len(backbone.patch_size), has_convolution=level > 0)
            for level, width in enumerate(backbone.feature_widths())
        )

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
        maps = self._encode(x_BCDHW.masked_fill(hidden_B1DHW, self.config.fill_value), hidden_B1DHW)
        inactive = [self._encode.inactive(tuple(sparse_map.shape[2:])) for sparse_map in maps]
        dense_maps = [densify(*pair) for densify, pair in zip(self.densify, zip(maps, inactive))]
        return self.backbone.network.decoder(dense_maps)


class SparseEncoder:
    """Sparse calls of a U-Net's encoder; all other calls of the encoder are dense.

    Hooks on the layers read the mask of the batch from this object. The mask is kept until the next call of the
    encoder, because activation checkpointing recomputes stages in the backward pass with the same mask.

    Raises MFMError (E_CONFIG) if the encoder has layers without a sparse form.
    """

    def __init__(self, encoder: nn.Module) -> None:
        _require_known_layers(encoder)
        self._encoder = encoder
        self._announced_B1DHW: Tensor | None = None
        self._inactive: dict[tuple[int, ...], Tensor] = {}
        encoder.register_forward_pre_hook(self._begin)
        for layer in encoder.modules():
            if isinstance(layer, _ConvNd):
                layer.register_forward_hook(self._after_convolution)
            elif isinstance(layer, _InstanceNorm):
                layer.forward = partial(self._normalise, layer, layer.forward)  # type: ignore[method-assign]

    def __call__(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor) -> list[Tensor]:
        """Compute the feature maps (B, C, D, H, W), fine to coarse, with 0 at inactive places.

        ``hidden_B1DHW`` is boolean. The first convolution sees the values of ``x_BCDHW`` at hidden neighbours.
        """
        self._announced_B1DHW = hidden_B1DHW
        return self._encoder(x_BCDHW)

    def inactive(self, size: tuple[int, ...]) -> Tensor:
        """Return the boolean mask (B, 1, *size) of inactive places in a feature map of the last call.

        A place is active if any voxel under it is visible. Strides may differ between axes.
        """
        assert self._inactive, "the last call of the encoder was not a sparse one"
        return self._inactive[size]

    def _begin(self, encoder: Any, inputs: Any) -> None:
        """Shrink the mask to all resolutions in advance, because compiled layers must not write shared state."""
        hidden_B1DHW, self._announced_B1DHW = self._announced_B1DHW, None
        self._inactive = {}
        if hidden_B1DHW is not None:
            whole = tuple(hidden_B1DHW.shape[2:])
            strides = itertools.accumulate(encoder.strides, lambda one, other: list(map(math.prod, zip(one, other))))
            sizes = {whole, *(tuple(n // step for n, step in zip(whole, stride)) for stride in strides)}
            self._inactive = {size: shrink_hidden(hidden_B1DHW, size) for size in sizes}

    def _after_convolution(self, layer: nn.Module, inputs: Any, output_BCDHW: Tensor) -> Tensor:
        if not self._inactive:
            return output_BCDHW
        # In place: a convolution does not need its output in the backward pass.
        return output_BCDHW.masked_fill_(self._inactive[tuple(output_BCDHW.shape[2:])], 0)

    def _normalise(self, layer: _InstanceNorm, dense_forward: Callable[[Tensor], Tensor], x_BCDHW: Tensor) -> Tensor:
        if not self._inactive:
            return dense_forward(x_BCDHW)
        inactive_B1DHW = self._inactive[tuple(x_BCDHW.shape[2:])]
        return masked_instance_norm(x_BCDHW, inactive_B1DHW, layer.weight, layer.bias, layer.eps)


class Densify(nn.Module):
    """Convert a sparse feature map to a dense one: norm, learnable token at inactive places, convolution."""

    def __init__(self, num_channels: int, num_axes: int, has_convolution: bool) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, num_channels, *[1] * num_axes))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[num_axes]
        self.convolution = convolution(num_channels, num_channels, 3, padding=1) if has_convolution else nn.Identity()

    def forward(self, x_BCDHW: Tensor, inactive_B1DHW: Tensor) -> Tensor:
        """Fill the inactive places; the shape is unchanged."""
        normed_BCDHW = masked_instance_norm(x_BCDHW, inactive_B1DHW)
        return self.convolution(torch.where(inactive_B1DHW, self.mask_token.to(normed_BCDHW.dtype), normed_BCDHW))


def shrink_hidden(hidden_B1DHW: Tensor, size: tuple[int, ...]) -> Tensor:
    """Shrink a mask to a coarser resolution (B, 1, *size): True if all voxels under a place are hidden.

    Pooling in the skips of residual blocks then gives 0 at inactive places. A sample with a visible voxel has an active
    place at every resolution.
    """
    steps = [whole // part for whole, part in zip(hidden_B1DHW.shape[2:], size)]
    assert hidden_B1DHW.shape[2:] == tuple(map(math.prod, zip(size, steps))), f"{size} does not divide the mask"
    blocks = hidden_B1DHW.reshape(*hidden_B1DHW.shape[:2], *(number for pair in zip(size, steps) for number in pair))
    return blocks.all(dim=tuple(range(3, blocks.dim(), 2)))


def masked_instance_norm(
    x_BCDHW: Tensor,
    inactive_B1DHW: Tensor,
    weight_C: Tensor | None = None,
    bias_C: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the active places of each sample; inactive places become 0.

    Uses masked sums, in at least float32, because the number of active places differs between samples and indexing
    would synchronise with the device.
    """
    x = x_BCDHW.to(torch.promote_types(x_BCDHW.dtype, torch.float32))
    axes = tuple(range(2, x.dim()))
    counts = (~inactive_B1DHW).sum(axes, keepdim=True).clamp(min=1)
    mean = x.masked_fill(inactive_B1DHW, 0).sum(axes, keepdim=True) / counts
    centred = (x - mean).masked_fill(inactive_B1DHW, 0)
    scale = (centred.square().sum(axes, keepdim=True) / counts + eps).rsqrt()
    if weight_C is not None:
        scale = scale * weight_C.reshape(-1, *[1] * len(axes))
    normed = centred * scale
    if bias_C is not None:
        normed = (normed + bias_C.reshape(-1, *[1] * len(axes))).masked_fill(inactive_B1DHW, 0)
    return normed.to(x_BCDHW.dtype)


def _require_known_layers(encoder: nn.Module) -> None:
    """Refuse layers with parameters or buffers, except convolutions, plain instance norms and PReLU."""
    for layer in encoder.modules():
        has_state = not any(layer.children()) and any(True for _ in (*layer.parameters(), *layer.buffers()))
        is_norm = isinstance(layer, _InstanceNorm) and not layer.track_running_stats
        if has_state and not (is_norm or isinstance(layer, (_ConvNd, nn.PReLU))):
            raise MFMError(
                "E_CONFIG",
                f"spark3d works on encoders of convolutions and instance norms without running statistics; the plan's "
                f"network has {type(layer).__name__} layers. Choose another pretext task or plan again.",
            )
