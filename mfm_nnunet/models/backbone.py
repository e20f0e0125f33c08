"""The network as pretext tasks see it: dense output, features, and restoring what is hidden.

``restore`` is the one place where convolutional and token networks differ: zero-fill for the former, true token
dropping for the latter. The wrapped ``network`` is what is saved; what a backbone adds is needed for pretraining only.

Shapes: B batch, C channels, D H W voxels, d h w tokens per axis, T tokens, V visible tokens, E embedding, K outputs.
In 2D there is no D and no d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class AbstractBackbone(nn.Module, ABC):
    """A network built from a plan, wrapped for pretext tasks. Made by :func:`make_backbone`."""

    family: ClassVar[str]

    def __init__(self, network: nn.Module, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.patch_size = patch_size
        stem_weight = next(weight for weight in network.parameters() if weight.dim() > 3)
        self.num_inputs = int(stem_weight.shape[1])

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Dense outputs (B, K, D, H, W)."""
        return self.network(x_BCDHW)

    @abstractmethod
    def mask_cell(self) -> tuple[int, ...]:
        """Voxels per axis of the smallest block that can be hidden: masks must be constant within such blocks."""

    @abstractmethod
    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """The encoder's feature maps (B, features, ...), fine to coarse."""

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

    def mask_cell(self) -> tuple[int, ...]:
        return (1,) * len(self.patch_size)

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return self.network.encoder(x_BCDHW)  # type: ignore[operator]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        return self.network(x_BCDHW.masked_fill(hidden_B1DHW, fill_value))


class TokenBackbone(AbstractBackbone):
    """Primus: hidden tokens never enter the encoder (arXiv 2111.06377, 2412.17041).

    For ``restores`` it adds what masked autoencoders need beside the network: a learnable mask token and a token
    decoder of two Eva blocks with positions of its own, in front of the network's patch decoder.
    """

    family = "primus"

    def __init__(self, network: Any, patch_size: tuple[int, ...], restores: bool) -> None:
        super().__init__(network, patch_size)
        assert getattr(network, "register_tokens", None) is None, "register tokens are not supported"
        assert network.eva.patch_drop is None, "tokens are dropped here, not by the network"
        self.token_grid: tuple[int, ...] = tuple(network.eva.rope.feat_shape)
        if restores:
            self.mask_token = nn.Parameter(1e-6 * torch.randn(1, 1, network.eva.embed_dim))
            self.token_decoder = _like(network.eva, self.token_grid, depth=2)

    def mask_cell(self) -> tuple[int, ...]:
        return tuple(size // tokens for size, tokens in zip(self.patch_size, self.token_grid))

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return [self._as_grid(self.encode(x_BCDHW))]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
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
        eva: Any = self.network.eva
        tokens = self.network.down_projection(x_BCDHW).flatten(2).transpose(1, 2)  # type: ignore[operator]
        if eva.pos_embed is not None:
            tokens = tokens + eva.pos_embed
        rotary = eva.rope.get_embed()
        if visible_BV is not None:
            tokens = tokens.gather(1, visible_BV[..., None].expand(-1, -1, tokens.shape[2]))
            rotary = rotary[visible_BV][:, None]
        for block in eva.blocks:
            tokens = block(tokens, rope=rotary)
        return eva.norm(tokens)

    def visible_tokens(self, hidden_B1DHW: Tensor) -> Tensor:
        """Indices (B, V), ascending, of the tokens that are not hidden; axis 0 of the grid is the outermost.

        Asserts that no token is partly hidden and that every sample hides equally many.
        """
        cells = [size for pair in zip(self.token_grid, self.mask_cell()) for size in pair]
        blocks = hidden_B1DHW[:, 0].reshape(-1, *cells)
        inside = tuple(range(2, blocks.dim(), 2))
        hidden_BT = blocks.any(dim=inside).flatten(1)
        assert bool((blocks.all(dim=inside).flatten(1) == hidden_BT).all()), "the mask cuts through tokens"
        counts = hidden_BT.sum(dim=1).tolist()
        assert len(set(counts)) == 1, f"the samples hide different numbers of tokens: {counts}"
        return hidden_BT.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_tokens - counts[0]]

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens in a patch."""
        return int(torch.Size(self.token_grid).numel())

    def _as_grid(self, tokens_BTE: Tensor) -> Tensor:
        return tokens_BTE.transpose(1, 2).reshape(len(tokens_BTE), -1, *self.token_grid)


def make_backbone(network: nn.Module, patch_size: tuple[int, ...], restores: bool) -> AbstractBackbone:
    """Wrap ``network``; ``restores`` says whether ``restore`` will be used, so that no weight is made in vain.

    New weights are drawn from torch's generator.
    """
    if hasattr(network, "eva"):
        return TokenBackbone(network, tuple(patch_size), restores)
    return ConvBackbone(network, tuple(patch_size))


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
