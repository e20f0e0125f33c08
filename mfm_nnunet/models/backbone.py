"""Interface between networks and pretext tasks: dense output, encoder features, restoration of hidden voxels.

Each network family has its own final class. Only the wrapped ``network`` is saved; weights that a backbone adds are
used in pretraining only.

Shapes: B batch, C channels, D H W voxels, K outputs; in 2D there is no D.
"""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of

Restoring = Literal["none", "drop", "replace"]
"""Treatment of hidden tokens in ``restore``. none: ``restore`` is not used. drop: they never enter the encoder (MAE).
replace: a learnable mask token takes their place (SimMIM). Networks without tokens fill hidden voxels instead."""


@dataclass(frozen=True)
class Geometry:
    """Sizes in voxels per axis that constrain the settings of a pretext task."""

    patch_size: tuple[int, ...]
    mask_cell: tuple[int, ...]
    """Smallest block that can be hidden. Masks must be constant within each block."""
    crop_cell: tuple[int, ...]
    """Images for ``features`` must be multiples of this; with tokens, no larger than the patch."""


class AbstractBackbone(nn.Module, ABC):
    """Network of a plan, wrapped for pretext tasks by :func:`make_backbone`."""

    def __init__(self, network: Any, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        self.network: Any = network
        self.family = family_of(network)
        self.patch_size = patch_size
        for weight in self.family.unused_outputs(network):  # kept, so that checkpoints fit with deep supervision
            weight.requires_grad_(False)
        stem_weight = next(weight for weight in network.parameters() if weight.dim() > 3)
        self.num_inputs = int(stem_weight.shape[1])

    def geometry(self) -> Geometry:
        """Return the sizes that constrain the settings of a pretext task."""
        return Geometry(self.patch_size, self.mask_cell(), self.crop_cell())

    def freeze_decoder(self) -> None:
        """Freeze everything except the encoder."""
        kept = self.family.encoder_names(self.network)
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(name in kept)

    def encoder_state(self) -> dict[str, Tensor]:
        """Return the encoder's part of the state dict, without the names that the decoder registers for it."""
        names = self.family.encoder_names(self.network)
        prefixes = tuple(prefix for prefix in self.family.encoder if any(name.startswith(prefix) for name in names))
        return {name: tensor for name, tensor in self.network.state_dict().items() if name.startswith(prefixes)}

    def recompute_activations(self) -> None:
        """Enable activation checkpointing: keep only the inputs of each block and recompute the rest in backward.

        Results (including drop path), names and state dict do not change. Call once, before ``compile_blocks``.

        Raises MFMError (E_CONFIG) for batch norms, whose running statistics would be updated twice.
        """
        if any(getattr(module, "running_mean", None) is not None for module in self.network.modules()):
            raise MFMError(
                "E_CONFIG",
                "pretrain.activation_checkpointing=true: the plan's network has norms with running statistics, which "
                "would be updated twice. Leave it out, or plan a network with instance norms.",
            )
        for block in self.blocks():
            block.forward = functools.partial(_recomputed, block.forward)

    def compile_blocks(self) -> None:
        """Compile each block in place; names and state dict do not change.

        A block that cannot be compiled as a whole raises an error on its first run instead of falling back to eager.
        """
        blocks = self.blocks()
        # Blocks share code; each width, mode and gradient setting is one variant of it. torch's default limit is 8.
        enough = 8 * len(blocks)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, enough)
        torch._dynamo.config.accumulated_recompile_limit = max(
            torch._dynamo.config.accumulated_recompile_limit, 2 * enough
        )
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the modules that do nearly all the work. Each runs once per forward pass; none contains another."""

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Return dense outputs (B, K, D, H, W)."""
        return self.network(x_BCDHW)

    def supervise_deeply(self) -> None:
        """Train the coarser outputs too, if the network was published so."""

    def outputs(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return dense outputs, finest first; only one unless :meth:`supervise_deeply` added coarser ones."""
        return [self(x_BCDHW)]

    def mask_cell(self) -> tuple[int, ...]:
        """Return the size in voxels of the smallest block that can be hidden (1 without tokens)."""
        return (1,) * len(self.patch_size)

    @abstractmethod
    def crop_cell(self) -> tuple[int, ...]:
        """Return the size in voxels that images for ``features`` must be multiples of."""

    @abstractmethod
    def feature_widths(self) -> list[int]:
        """Return the number of channels of each map of ``features``."""

    @abstractmethod
    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return the encoder's maps (B, features, ...), fine to coarse, for a patch or a smaller image."""

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        """Return dense outputs (B, K, D, H, W) computed from visible voxels only.

        ``hidden_B1DHW`` is boolean. Convolutions see ``fill_value`` at hidden voxels, in normalised units: 0 is the
        mean of z-scored data. The default implementation fills the voxels.
        """
        return self.network(x_BCDHW.masked_fill(hidden_B1DHW, fill_value))


def make_backbone(network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
    """Wrap ``network`` for a task that uses ``restore`` as ``restoring`` says; only the weights it needs are added.

    New weights are drawn from torch's generator.
    """
    return family_of(network).backbone(network, tuple(patch_size), restoring)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    return checkpoint(forward, *arguments, use_reentrant=False, **keywords)


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Restore the training modes of a module and all its parts afterwards; frozen parts may differ from the whole."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, is_training in modes.items():
            part.training = is_training
