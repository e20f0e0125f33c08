"""Backbone for masked pretraining of Primus: hidden tokens are dropped (MAE) or replaced (SimMIM).

Shapes: B batch, C channels, D H W voxels, d h w tokens per axis, T tokens, V visible tokens, E embedding, K outputs.
In 2D there is no D and no d.
"""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone, Restoring


class TokenBackbone(AbstractBackbone):
    """Primus with hidden tokens dropped (MAE, arXiv 2111.06377, 2412.17041) or replaced (SimMIM, arXiv 2111.09886).

    Adds a learnable mask token. Dropping also adds a token decoder of two Eva blocks, with its own positions, in front
    of the network's patch decoder.
    """

    def __init__(self, network: Any, patch_size: tuple[int, ...], restoring: Restoring) -> None:
        super().__init__(network, patch_size)
        assert getattr(network, "register_tokens", None) is None, "register tokens are not supported"
        assert network.eva.patch_drop is None, "tokens are dropped here, not by the network"
        self.token_grid: tuple[int, ...] = tuple(network.eva.rope.feat_shape)
        self.num_tokens = int(torch.Size(self.token_grid).numel())
        self.restoring = restoring
        if restoring != "none":
            self.mask_token = nn.Parameter(1e-6 * torch.randn(1, 1, network.eva.embed_dim))
        if restoring == "drop":
            self.token_decoder: Any = _like(network.eva, self.token_grid, depth=2)

    def blocks(self) -> list[nn.Module]:
        network = self.network
        own = [*self.token_decoder.blocks] if self.restoring == "drop" else []
        return [network.down_projection, *network.eva.blocks, *own, *network.up_projection.decode[:-1]]

    def mask_cell(self) -> tuple[int, ...]:
        return tuple(size // tokens for size, tokens in zip(self.patch_size, self.token_grid))

    def crop_cell(self) -> tuple[int, ...]:
        return self.mask_cell()

    def feature_widths(self) -> list[int]:
        return [int(self.network.eva.embed_dim)]

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        """Return one map. A smaller image gets the positions at the patch's centre, as if the rest were dropped."""
        tokens_BTE = self._embed(x_BCDHW)
        grid = tuple(size // cell for size, cell in zip(x_BCDHW.shape[2:], self.mask_cell()))
        places_BV = self._central_places(grid).to(x_BCDHW.device).expand(len(tokens_BTE), -1)
        tokens_BTE = self._transform(tokens_BTE, places_BV)
        return [tokens_BTE.transpose(1, 2).reshape(len(tokens_BTE), -1, *grid)]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        # Stems with overlapping kernels would otherwise see hidden neighbours. A patch embedding is not affected.
        x_BCDHW = x_BCDHW.masked_fill(hidden_B1DHW, fill_value)
        if self.restoring == "replace":
            tokens_BTE, hidden_BT1 = self._embed(x_BCDHW), self.hidden_tokens(hidden_B1DHW)[..., None]
            tokens_BTE = torch.where(hidden_BT1, self.mask_token.to(tokens_BTE.dtype), tokens_BTE)
            return self._decode(self._transform(tokens_BTE))
        visible_BV = self.visible_tokens(hidden_B1DHW)
        tokens_BVE = self.encode(x_BCDHW, visible_BV)
        batch, _, width = tokens_BVE.shape
        blank_BTE = self.mask_token.to(tokens_BVE.dtype).expand(batch, self.num_tokens, width)
        tokens_BTE = blank_BTE.scatter(1, visible_BV[..., None].expand_as(tokens_BVE), tokens_BVE)
        return self._decode(self.token_decoder(tokens_BTE)[0])

    def encode(self, x_BCDHW: Tensor, visible_BV: Tensor | None = None) -> Tensor:
        """Return the encoder's tokens (B, V, E) at ``visible_BV``, or all of them (B, T, E).

        Absolute positions are added before dropping. Rotary positions are gathered per sample, with a separate axis
        for the heads; without it, sample and head get mixed up (as in DNA).
        """
        tokens_BTE = self._embed(x_BCDHW)
        if visible_BV is None:
            return self._transform(tokens_BTE)
        visible_BVE = visible_BV[..., None].expand(-1, -1, tokens_BTE.shape[2])
        return self._transform(tokens_BTE.gather(1, visible_BVE), visible_BV)

    def hidden_tokens(self, hidden_B1DHW: Tensor) -> Tensor:
        """Return a boolean mask (B, T) of hidden tokens. No token may be partly hidden."""
        cells = [size for pair in zip(self.token_grid, self.mask_cell()) for size in pair]
        blocks = hidden_B1DHW[:, 0].reshape(-1, *cells)
        inside = tuple(range(2, blocks.dim(), 2))
        hidden_BT = blocks.any(dim=inside).flatten(1)
        assert bool((blocks.all(dim=inside).flatten(1) == hidden_BT).all()), "the mask cuts through tokens"
        return hidden_BT

    def visible_tokens(self, hidden_B1DHW: Tensor) -> Tensor:
        """Return the ascending indices (B, V) of visible tokens; axis 0 of the grid is outermost.

        Every sample must hide the same number.
        """
        hidden_BT = self.hidden_tokens(hidden_B1DHW)
        counts = hidden_BT.sum(dim=1).tolist()
        assert len(set(counts)) == 1, f"the samples hide different numbers of tokens: {counts}"
        return hidden_BT.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_tokens - counts[0]]

    def _embed(self, x_BCDHW: Tensor) -> Tensor:
        """Return the stem's tokens (B, T, E), without positions."""
        return self.network.down_projection(x_BCDHW).flatten(2).transpose(1, 2)

    def _transform(self, tokens_BVE: Tensor, places_BV: Tensor | None = None) -> Tensor:
        """Apply positions, blocks and norm. ``places_BV`` are the tokens' indices in the patch; None: all, in order."""
        eva = self.network.eva
        rotary = eva.rope.get_embed()
        if places_BV is not None:
            rotary = rotary[places_BV][:, None]
        if eva.pos_embed is not None:
            tokens_BVE = tokens_BVE + (eva.pos_embed if places_BV is None else eva.pos_embed[0][places_BV])
        for block in eva.blocks:
            tokens_BVE = block(tokens_BVE, rope=rotary)
        return eva.norm(tokens_BVE)

    def _decode(self, tokens_BTE: Tensor) -> Tensor:
        grid_BEdhw = tokens_BTE.transpose(1, 2).reshape(len(tokens_BTE), -1, *self.token_grid)
        return self.network.up_projection(grid_BEdhw)

    def _central_places(self, grid: tuple[int, ...]) -> Tensor:
        """Return the indices (1, V) of a block of ``grid`` tokens in the centre of the patch."""
        assert all(1 <= few <= many for few, many in zip(grid, self.token_grid)), f"{grid} is not in {self.token_grid}"
        lower = [(many - few) // 2 for few, many in zip(grid, self.token_grid)]
        index = torch.arange(self.num_tokens).reshape(self.token_grid)
        return index[tuple(slice(low, low + few) for low, few in zip(lower, grid))].reshape(1, -1)


def _like(eva: Any, token_grid: tuple[int, ...], depth: int) -> nn.Module:
    """Build a transformer of ``depth`` blocks with the width of ``eva``, without drop path."""
    block = eva.blocks[0]
    return Eva(
        embed_dim=eva.embed_dim,
        depth=depth,
        num_heads=block.attn.num_heads,
        ref_feat_shape=token_grid,
        init_values=None if block.gamma_1 is None else 0.1,
        scale_attn_inner=not isinstance(block.attn.norm, nn.Identity),
    )
