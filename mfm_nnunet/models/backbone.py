"""The network as pretext tasks see it: dense output, features, and restoration of what is hidden.

Each family of networks has its own final class. The wrapped ``network`` is saved; weights that a backbone adds are for
pretraining only.

Shapes: B batch, C channels, D H W voxels, K outputs; in 2D there is no D.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of

Restoring = Literal["none", "drop", "replace"]
"""Treatment of hidden tokens: ``restore`` is not used; they never enter the encoder (MAE); a learnable mask token takes
their place (SimMIM). Networks without tokens see filled voxels in both cases."""


@dataclass(frozen=True)
class Geometry:
    """Sizes in voxels per axis that the settings of a pretext task must fit."""

    patch_size: tuple[int, ...]
    mask_cell: tuple[int, ...]
    """The smallest block that can be hidden: masks must be constant within such blocks."""
    crop_cell: tuple[int, ...]
    """Images for ``features`` must be multiples of it, up to the patch for networks with tokens."""


class AbstractBackbone(nn.Module, ABC):
    """A network built from a plan, wrapped for pretext tasks. Made by :func:`make_backbone`."""

    def __init__(self, network: Any, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        self.network: Any = network
        self.family = family_of(network)
        self.patch_size = patch_size
        for weight in self.family.unused_outputs(network):  # there, so that weights fit with deep supervision too
            weight.requires_grad_(False)
        stem_weight = next(weight for weight in network.parameters() if weight.dim() > 3)
        self.num_inputs = int(stem_weight.shape[1])

    def geometry(self) -> Geometry:
        """Return the sizes that the settings of a pretext task must fit."""
        return Geometry(self.patch_size, self.mask_cell(), self.crop_cell())

    def freeze_decoder(self) -> None:
        """Train the encoder alone."""
        kept = self.family.encoder_names(self.network)
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(name in kept)

    def encoder_state(self) -> dict[str, Tensor]:
        """Return the encoder's part of the network's state dict, each tensor under the encoder's own names."""
        names = self.family.encoder_names(self.network)
        prefixes = tuple(prefix for prefix in self.family.encoder if any(name.startswith(prefix) for name in names))
        return {name: tensor for name, tensor in self.network.state_dict().items() if name.startswith(prefixes)}

    def recompute_activations(self) -> None:
        """Keep only the inputs of blocks from now on, and compute the rest again in the backward pass.

        Results are the same, drop path included; names and state dict too. Call it once, before ``compile_blocks``.

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
        """Run each block compiled from now on, in place, so names and state dict stay.

        A block that cannot be compiled as a whole raises an error when it first runs; it is never left out.
        """
        blocks = self.blocks()
        # Blocks share their code, and each width, mode and gradient setting is a variant of it; torch gives up after 8.
        enough = 8 * len(blocks)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, enough)
        torch._dynamo.config.accumulated_recompile_limit = max(
            torch._dynamo.config.accumulated_recompile_limit, 2 * enough
        )
        for block in blocks:
            block.compile(fullgraph=True, dynamic=False)

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the modules that do nearly all of the work, each run once per forward pass, none inside another."""

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Return dense outputs (B, K, D, H, W)."""
        return self.network(x_BCDHW)

    def mask_cell(self) -> tuple[int, ...]:
        """Return the voxels per axis of the smallest block that can be hidden: one voxel where they are filled."""
        return (1,) * len(self.patch_size)

    @abstractmethod
    def crop_cell(self) -> tuple[int, ...]:
        """Return the voxels per axis of which images for ``features`` must be multiples."""

    @abstractmethod
    def feature_widths(self) -> list[int]:
        """Return the channels of each of the maps of ``features``."""

    @abstractmethod
    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return the encoder's maps (B, features, ...), fine to coarse, of a patch or of a smaller image."""

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        """Return dense outputs (B, K, D, H, W) made from the voxels that are not hidden, and from nothing else.

        ``hidden_B1DHW`` is boolean. Convolutions see ``fill_value``, in normalised units, at hidden places: 0 is the
        mean of z-scored data. The default fills them.
        """
        return self.network(x_BCDHW.masked_fill(hidden_B1DHW, fill_value))


def make_backbone(network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
    """Wrap ``network``; ``restoring`` is how ``restore`` will be used, so that no weight is made in vain.

    New weights are drawn from torch's generator.
    """
    return family_of(network).backbone(network, tuple(patch_size), restoring)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    return checkpoint(forward, *arguments, use_reentrant=False, **keywords)
