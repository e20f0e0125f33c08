"""A plan's encoder with a head for whole images. Heads: ``linear``, ``attentive``, ``mil`` and ``probe``.

Legend: B batch, N views of a case, C channels, D H W voxels, E features, T positions, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone

PREFIX = "classifier."
"""Prefix of the head's weights among those of a classifier."""
DROPOUT = 0.2
QUERIES = 8
"""Most queries of the attentive head; each pools a share of the features."""
HIDDEN = 128
"""Width of the attention over views."""


class AttentivePooling(nn.Module):
    """Pool positions with learned queries, each for its share of the features (arXiv 2506.10178)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        number = next(count for count in range(QUERIES, 0, -1) if width % count == 0)
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.empty(number, width))
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Return (B, E)."""
        scores_BTQ = self.norm(x_BTE) @ self.queries.T * self.queries.shape[1] ** -0.5
        shares_BTQE = x_BTE.unflatten(2, (len(self.queries), -1))
        return (scores_BTQ.softmax(1).unsqueeze(3) * shares_BTQE).sum(1).flatten(1)


class GatedAttention(nn.Module):
    """Weight the views of a case (arXiv 1802.04712)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1)

    def forward(self, z_BNE: Tensor) -> Tensor:
        """Return (B, E)."""
        scores_BN1 = self.score(self.value(z_BNE).tanh() * self.gate(z_BNE).sigmoid())
        return (scores_BN1.softmax(1) * z_BNE).sum(1)


class Head(nn.Module):
    """Pool the positions of each view, then the views, and classify linearly.

    All heads average the positions of the coarsest map, and the views, with these exceptions: ``attentive`` pools
    positions by attention, ``mil`` views. ``probe`` averages the maps of all stages.
    """

    def __init__(self, kind: str, widths: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        self.kind = kind
        width = sum(widths) if kind == "probe" else widths[-1]
        self.positions = AttentivePooling(width) if kind == "attentive" else None
        self.views = GatedAttention(width) if kind == "mil" else None
        self.dropout = nn.Dropout(DROPOUT)
        self.output = nn.Linear(width, num_outputs)

    def embed(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the embedding (B, E) of each view, from the encoder's maps, fine to coarse."""
        used = maps if self.kind == "probe" else maps[-1:]
        flat = [feature.float().flatten(2) for feature in used]
        if self.positions is not None:
            return self.positions(flat[0].transpose(1, 2))
        return torch.cat([feature_BET.mean(2) for feature_BET in flat], dim=1)

    def forward(self, z_BNE: Tensor) -> Tensor:
        """Return the outputs (B, K) for the embeddings of all views."""
        z_BE = z_BNE.mean(1) if self.views is None else self.views(z_BNE)
        return self.output(self.dropout(z_BE))


class Classifier(nn.Module):
    """The encoder of a network and a head. The decoder is not used."""

    AT_ONCE = 8
    """Views per forward pass in :meth:`embed_views`."""

    def __init__(self, backbone: AbstractBackbone, kind: str, num_outputs: int) -> None:
        super().__init__()
        backbone.freeze_decoder()
        self.backbone = backbone
        self.head = Head(kind, backbone.feature_widths(), num_outputs)

    def forward(self, x_BNCDHW: Tensor) -> Tensor:
        """Return the outputs (B, K), float32, for N views of each case."""
        x_MCDHW = x_BNCDHW.flatten(0, 1)
        z_ME = self._embed(x_MCDHW) if torch.is_grad_enabled() else self.embed_views(x_MCDHW)
        with torch.autocast(z_ME.device.type, enabled=False):
            return self.head(z_ME.unflatten(0, x_BNCDHW.shape[:2]))

    @torch.no_grad()
    def embed_views(self, x_NCDHW: Tensor) -> Tensor:
        """Return the embeddings (N, E) of views, a few at a time, on the network's device."""
        device = next(self.parameters()).device
        return torch.cat([self._embed(part.to(device)) for part in x_NCDHW.split(self.AT_ONCE)])

    def _embed(self, x_NCDHW: Tensor) -> Tensor:
        return self.head.embed(self.backbone.features(x_NCDHW)).float()

    def weights(self) -> dict[str, Tensor]:
        """Return the weights under their names in files: those of the network, and the head's after a prefix."""
        head = {f"{PREFIX}{name}": tensor for name, tensor in self.head.state_dict().items()}
        return {**self.backbone.encoder_state(), **head}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load :meth:`weights`; also the module's own state dict."""
        if any(name.startswith("backbone.") for name in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        head = {name.removeprefix(PREFIX): value for name, value in state_dict.items() if name.startswith(PREFIX)}
        self.head.load_state_dict(head, strict, assign)
        encoder = {name: value for name, value in state_dict.items() if not name.startswith(PREFIX)}
        missing = set(self.backbone.encoder_state()) - set(encoder)
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are missing, e.g. {min(missing)}")
        found = self.backbone.network.load_state_dict(encoder, strict=False)
        if found.unexpected_keys:
            raise RuntimeError(f"unexpected tensors, e.g. {found.unexpected_keys[0]}")
        return found
