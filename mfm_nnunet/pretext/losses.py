"""The losses of pretext tasks, computed in float32 whatever the precision of the network.

Shapes: B batch, C channels, K classes, D H W voxels; in 2D there is no D.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5
"""Added to both sides of the Dice fraction, so that a class absent from target and prediction counts as found."""


def masked_mse(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Mean squared error over the hidden voxels and all channels of each sample, averaged over the samples.

    Visible voxels get no gradient; a sample without hidden voxels counts as 0. Samples weigh the same however many
    voxels count in them, so that the mean over processes is the mean over the whole batch.
    """
    error = (prediction_BCDHW.float() - target_BCDHW.float()).square().masked_fill(~hidden_B1DHW, 0)
    counts_B = hidden_B1DHW.flatten(1).sum(1) * target_BCDHW.shape[1]
    return (error.flatten(1).sum(1) / counts_B.clamp(min=1)).mean()


def soft_dice(logits_BKDHW: Tensor, labels_BDHW: Tensor, over_batch: bool) -> Tensor:
    """Soft Dice, averaged over all classes (0 included); 1 is perfect.

    ``over_batch``: sums run over the whole batch, else over each sample.
    """
    probabilities = logits_BKDHW.float().softmax(1)
    is_class = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, labels_BDHW.long()[:, None], True)
    axes = [axis for axis in range(probabilities.dim()) if axis != 1 and (over_batch or axis != 0)]
    common = (probabilities * is_class).sum(axes)
    return ((2 * common + SMOOTH) / (probabilities.sum(axes) + is_class.sum(axes) + SMOOTH)).mean()


def cross_entropy(logits_BKDHW: Tensor, labels_BDHW: Tensor) -> Tensor:
    """Mean cross entropy over all voxels."""
    return functional.cross_entropy(logits_BKDHW.float(), labels_BDHW.long())


def nt_xent(first_NE: Tensor, second_NE: Tensor, temperature: float) -> Tensor:
    """NT-Xent (arXiv 2002.05709): row i of the two is a pair of views, all other 2N - 2 rows are its negatives.

    Cosine similarity; the mean over all 2N rows. With equal embeddings everywhere it is log(2N - 1).
    """
    rows = functional.normalize(torch.cat([first_NE, second_NE]).float(), dim=1)
    count = len(first_NE)
    similarity = rows @ rows.T / temperature
    similarity = similarity.masked_fill(torch.eye(2 * count, dtype=torch.bool, device=rows.device), -torch.inf)
    partner = torch.arange(2 * count, device=rows.device).roll(count)
    return functional.cross_entropy(similarity, partner)
