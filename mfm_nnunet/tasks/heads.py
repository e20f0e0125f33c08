"""What pretext tasks put behind an encoder: pooled features and projectors. Trained with the task, never shipped.

Shapes: B batch, V views per item, C channels, D H W voxels of a view, E embedding; in 2D there is no D.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mfm_nnunet.models.backbone import AbstractBackbone


def pool(features: Sequence[Tensor]) -> Tensor:
    """Global average of each of an encoder's maps (B, features, ...), side by side: (B, sum of features)."""
    return torch.cat([feature.float().flatten(2).mean(2) for feature in features], dim=1)


class Projector(nn.Sequential):
    """An MLP with normalised hidden layers: each is a linear map, a norm over its own features and a ReLU."""

    def __init__(self, widths: Sequence[int]) -> None:
        """``widths``: inputs, hidden layers and outputs, e.g. (1120, 2048, 2048, 2048)."""
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), nn.LayerNorm(after, elementwise_affine=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-2], widths[-1]))


def make_projector(backbone: AbstractBackbone, width: int) -> Projector:
    """A projector of two hidden layers behind the pooled features of ``backbone``; all layers have ``width``."""
    return Projector((sum(backbone.feature_widths()), width, width, width))


def embed_views(backbone: AbstractBackbone, projector: Projector, views_BVCDHW: Tensor) -> Tensor:
    """The embeddings (B, V, E) of all views, float32. The encoder sees the B V views as one batch."""
    features = backbone.features(views_BVCDHW.flatten(0, 1))
    # Untrained, views differ by less than the precision of bf16, so what follows the encoder is float32.
    with torch.autocast(views_BVCDHW.device.type, enabled=False):
        return projector(pool(features)).unflatten(0, views_BVCDHW.shape[:2])
