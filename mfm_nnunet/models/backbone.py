"""The network as pretext tasks see it: dense output, features, and restoring what is hidden.

``restore`` is the one place where convolutional and token networks differ: zero-fill for the former; token dropping or
mask tokens for the latter. The wrapped ``network`` is what is saved; what a backbone adds is for pretraining only.

Shapes: B batch, C channels, D H W voxels, d h w tokens per axis, T tokens, V visible tokens, E embedding, K outputs.
In 2D there is no D and no d.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.networks import encoder_names

Restoring = Literal["none", "drop", "replace"]
"""What becomes of hidden tokens: ``restore`` is not used; they never enter the encoder (MAE); a learnable mask token
takes their place (SimMIM). U-Nets see filled voxels in both cases."""


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

    family: ClassVar[str]

    def __init__(self, network: nn.Module, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        stem_weight = next(weight for weight in network.parameters() if weight.dim() > 3)
        self.num_inputs = int(stem_weight.shape[1])

    def geometry(self) -> Geometry:
        """What the settings of a pretext task must fit."""
        return Geometry(self.patch_size, self.mask_cell(), self.crop_cell())

    def freeze_decoder(self) -> None:
        """For tasks that train the encoder alone."""
        kept = encoder_names(self.network)
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(name in kept)

    def encoder_state(self) -> dict[str, Tensor]:
        """The part of the network's state dict that is the encoder, each tensor under the encoder's own names."""
        prefixes = tuple({f"{name.partition('.')[0]}." for name in encoder_names(self.network)})
        return {name: tensor for name, tensor in self.network.state_dict().items() if name.startswith(prefixes)}

    def recompute_activations(self) -> None:
        """From now on keep only what goes into a block and compute the rest again in the backward pass.

        Results are the same, drop path included; names and state dict too. Called once, before ``compile_blocks``.
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
        """From now on run each block compiled, in place, so names and state dict stay.

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
        """The modules that do nearly all of the work, each run once per forward pass, none inside another."""

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Dense outputs (B, K, D, H, W)."""
        return self.network(x_BCDHW)

    @abstractmethod
    def mask_cell(self) -> tuple[int, ...]:
        """Voxels per axis of the smallest block that can be hidden: masks must be constant within such blocks."""

    @abstractmethod
    def crop_cell(self) -> tuple[int, ...]:
        """Voxels per axis of which images for ``features`` must be multiples."""

    @abstractmethod
    def feature_widths(self) -> list[int]:
        """Channels of each of the maps that ``features`` gives."""

    @abstractmethod
    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """The encoder's feature maps (B, features, ...), fine to coarse, of a patch or of a smaller image."""

    @abstractmethod
    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        """Dense outputs (B, K, D, H, W) made from the voxels that are not hidden, and from nothing else.

        ``hidden_B1DHW`` is boolean. ``fill_value``, in normalised units, is what convolutions see at hidden places:
        0 is the mean of z-scored data.
        """


class ConvBackbone(AbstractBackbone):
    """U-Nets: hidden voxels are filled, skip connections kept (arXiv 2410.23132)."""

    family = "resenc"

    def __init__(self, network: Any, patch_size: tuple[int, ...]) -> None:
        super().__init__(network, patch_size)
        assert not network.decoder.deep_supervision, (
            "pretext tasks take one dense output: build without deep supervision"
        )
        # The coarser stages have output layers, so that weights fit with deep supervision too, but they are not used.
        network.decoder.seg_layers[:-1].requires_grad_(False)

    def blocks(self) -> list[nn.Module]:
        encoder: Any = self.network.encoder
        decoder: Any = self.network.decoder
        stems = [stem for stem in [getattr(encoder, "stem", None)] if stem is not None]
        return [*stems, *encoder.stages, *decoder.stages]

    def mask_cell(self) -> tuple[int, ...]:
        return (1,) * len(self.patch_size)

    def crop_cell(self) -> tuple[int, ...]:
        encoder: Any = self.network.encoder
        return tuple(math.prod(stride) for stride in zip(*encoder.strides))

    def feature_widths(self) -> list[int]:
        encoder: Any = self.network.encoder
        return list(encoder.output_channels)

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return self.network.encoder(x_BCDHW)  # type: ignore[operator]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        return self.network(x_BCDHW.masked_fill(hidden_B1DHW, fill_value))


class TokenBackbone(AbstractBackbone):
    """Primus: hidden tokens are dropped (MAE, arXiv 2111.06377, 2412.17041) or replaced (SimMIM, arXiv 2111.09886).

    It adds what they need beside the network: a learnable mask token and, for dropping, a token decoder of two Eva
    blocks with positions of its own, in front of the network's patch decoder.
    """

    family = "primus"

    def __init__(self, network: Any, patch_size: tuple[int, ...], restoring: Restoring) -> None:
        super().__init__(network, patch_size)
        assert getattr(network, "register_tokens", None) is None, "register tokens are not supported"
        assert network.eva.patch_drop is None, "tokens are dropped here, not by the network"
        self.token_grid: tuple[int, ...] = tuple(network.eva.rope.feat_shape)
        self.restoring = restoring
        if restoring != "none":
            self.mask_token = nn.Parameter(1e-6 * torch.randn(1, 1, network.eva.embed_dim))
        if restoring == "drop":
            self.token_decoder = _like(network.eva, self.token_grid, depth=2)

    def blocks(self) -> list[nn.Module]:
        network: Any = self.network
        own = [*self.token_decoder.blocks] if self.restoring == "drop" else []  # type: ignore[misc]
        return [network.down_projection, *network.eva.blocks, *own, *network.up_projection.decode[:-1]]

    def mask_cell(self) -> tuple[int, ...]:
        return tuple(size // tokens for size, tokens in zip(self.patch_size, self.token_grid))

    def crop_cell(self) -> tuple[int, ...]:
        return self.mask_cell()

    def feature_widths(self) -> list[int]:
        return [int(self.network.eva.embed_dim)]  # type: ignore[union-attr, arg-type]

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """One map. A smaller image gets the positions of the patch's centre: a patch of which the rest was dropped."""
        tokens_BTE = self._embed(x_BCDHW)
        grid = tuple(size // cell for size, cell in zip(x_BCDHW.shape[2:], self.mask_cell()))
        tokens_BTE = self._transform(
            tokens_BTE, self._central_places(grid).to(x_BCDHW.device).expand(len(tokens_BTE), -1)
        )
        return [tokens_BTE.transpose(1, 2).reshape(len(tokens_BTE), -1, *grid)]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        if self.restoring == "replace":
            return self._restore_replaced(x_BCDHW, hidden_B1DHW, fill_value)
        visible_BV = self.visible_tokens(hidden_B1DHW)
        # A stem with overlapping kernels would see its hidden neighbours; for a plain patch embedding nothing changes.
        tokens_BVE = self.encode(x_BCDHW.masked_fill(hidden_B1DHW, fill_value), visible_BV)
        batch, _, width = tokens_BVE.shape
        blank_BTE = self.mask_token.to(tokens_BVE.dtype).expand(batch, self.num_tokens, width)
        tokens_BTE = blank_BTE.scatter(1, visible_BV[..., None].expand_as(tokens_BVE), tokens_BVE)
        tokens_BTE, _ = self.token_decoder(tokens_BTE)
        return self.network.up_projection(self._as_grid(tokens_BTE))  # type: ignore[operator]

    def encode(self, x_BCDHW: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """The encoder's tokens (B, V, E) at the given places, or all of them (B, T, E).

        Absolute positions are added before the others are dropped; rotary positions are gathered for each sample, with
        an axis of their own for the heads: without it sample and head could be confused (which DNA does).
        """
        tokens_BTE = self._embed(x_BCDHW)
        if visible_BV is None:
            return self._transform(tokens_BTE)
        visible_BVE = visible_BV[..., None].expand(-1, -1, tokens_BTE.shape[2])
        return self._transform(tokens_BTE.gather(1, visible_BVE), visible_BV)

    def hidden_tokens(self, hidden_B1DHW: Tensor) -> Tensor:
        """Which tokens (B, T) are hidden. Asserts that none is partly hidden."""
        cells = [size for pair in zip(self.token_grid, self.mask_cell()) for size in pair]
        blocks = hidden_B1DHW[:, 0].reshape(-1, *cells)
        inside = tuple(range(2, blocks.dim(), 2))
        hidden_BT = blocks.any(dim=inside).flatten(1)
        assert bool((blocks.all(dim=inside).flatten(1) == hidden_BT).all()), "the mask cuts through tokens"
        return hidden_BT

    def visible_tokens(self, hidden_B1DHW: Tensor) -> Tensor:
        """Indices (B, V), ascending, of the tokens that are not hidden; axis 0 of the grid is the outermost.

        Asserts that every sample hides equally many.
        """
        hidden_BT = self.hidden_tokens(hidden_B1DHW)
        counts = hidden_BT.sum(dim=1).tolist()
        assert len(set(counts)) == 1, f"the samples hide different numbers of tokens: {counts}"
        return hidden_BT.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_tokens - counts[0]]

    def _restore_replaced(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float) -> Tensor:
        tokens_BTE = self._embed(x_BCDHW.masked_fill(hidden_B1DHW, fill_value))
        hidden_BT1 = self.hidden_tokens(hidden_B1DHW)[..., None]
        tokens_BTE = torch.where(hidden_BT1, self.mask_token.to(tokens_BTE.dtype), tokens_BTE)
        return self.network.up_projection(self._as_grid(self._transform(tokens_BTE)))  # type: ignore[operator]

    def _embed(self, x_BCDHW: Tensor) -> Tensor:
        """The stem's tokens (B, T, E), without positions."""
        return self.network.down_projection(x_BCDHW).flatten(2).transpose(1, 2)  # type: ignore[operator]

    def _transform(self, tokens_BVE: Tensor, places_BV: Tensor | None = None) -> Tensor:
        """Positions, blocks and norm for the tokens at these places of the patch; None: all of them in order."""
        eva: Any = self.network.eva
        rotary = eva.rope.get_embed()
        if places_BV is not None:
            rotary = rotary[places_BV][:, None]
        if eva.pos_embed is not None:
            positions = eva.pos_embed if places_BV is None else eva.pos_embed[0][places_BV]
            tokens_BVE = tokens_BVE + positions
        for block in eva.blocks:
            tokens_BVE = block(tokens_BVE, rope=rotary)
        return eva.norm(tokens_BVE)

    def _central_places(self, grid: tuple[int, ...]) -> Tensor:
        """Indices (1, V) of a block of tokens of this size in the middle of the patch's grid."""
        assert all(1 <= few <= many for few, many in zip(grid, self.token_grid)), f"{grid} is not in {self.token_grid}"
        lower = [(many - few) // 2 for few, many in zip(grid, self.token_grid)]
        index = torch.arange(self.num_tokens).reshape(self.token_grid)
        return index[tuple(slice(low, low + few) for low, few in zip(lower, grid))].reshape(1, -1)

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in a patch."""
        return int(torch.Size(self.token_grid).numel())

    def _as_grid(self, tokens_BTE: Tensor) -> Tensor:
        return tokens_BTE.transpose(1, 2).reshape(len(tokens_BTE), -1, *self.token_grid)


def make_backbone(network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
    """Wrap ``network``; ``restoring`` says how ``restore`` will be used, so that no weight is made in vain.

    New weights are drawn from torch's generator.
    """
    if hasattr(network, "eva"):
        return TokenBackbone(network, tuple(patch_size), restoring)
    return ConvBackbone(network, tuple(patch_size))


def _recomputed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **keywords)
    return checkpoint(forward, *arguments, use_reentrant=False, **keywords)


def _like(eva: Any, token_grid: tuple[int, ...], depth: int) -> nn.Module:
    """A fresh transformer of ``depth`` blocks as wide as ``eva``, without drop path."""
    from dynamic_network_architectures.building_blocks.eva import Eva

    block = eva.blocks[0]
    return Eva(
        embed_dim=eva.embed_dim,
        depth=depth,
        num_heads=block.attn.num_heads,
        ref_feat_shape=token_grid,
        init_values=None if block.gamma_1 is None else 0.1,
        scale_attn_inner=not isinstance(block.attn.norm, nn.Identity),
    )
