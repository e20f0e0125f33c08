"""Losses of pretext tasks, always computed in float32.

Losses that compare items need the embeddings of all processes (:func:`gather_batch`). Each process then computes the
loss of the whole batch. DistributedDataParallel averages the gradients, which gives the gradient of the whole batch.

Shapes: B batch, C channels, K classes, D H W voxels; N and M embeddings of width E; in 2D there is no D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5
"""Added to numerator and denominator of Dice, so that a class absent from target and prediction gets 1."""


def masked_mse(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Average the squared error over the hidden voxels and all channels of each sample, then over the samples.

    Visible voxels get no gradient; a sample without hidden voxels counts as 0. All samples have equal weight, so the
    mean over processes is the mean over the whole batch.
    """
    return _masked_mean((prediction_BCDHW.float() - target_BCDHW.float()).square(), hidden_B1DHW)


def masked_l1(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Average the absolute error as in :func:`masked_mse`."""
    return _masked_mean((prediction_BCDHW.float() - target_BCDHW.float()).abs(), hidden_B1DHW)


def _masked_mean(error_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
    counts_B = counted_B1DHW.flatten(1).sum(1) * error_BCDHW.shape[1]
    return (error_BCDHW.masked_fill(~counted_B1DHW, 0).flatten(1).sum(1) / counts_B.clamp(min=1)).mean()


def explained_variance(squared_error: Tensor, target_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
    """Compare with predicting 0, the mean of z-scored images: 1 for no error, 0 for an equal error. Detached."""
    guess = masked_mse(torch.zeros_like(target_BCDHW), target_BCDHW, counted_B1DHW)
    return 1 - squared_error.detach() / guess.clamp(min=1e-8)


def soft_dice(logits_BKDHW: Tensor, labels_BDHW: Tensor, over_batch: bool) -> Tensor:
    """Compute soft Dice, averaged over all classes including 0; 1 is perfect.

    ``labels_BDHW`` are classes, or shares of each class (B, K, D, H, W). ``over_batch``: sum over the whole batch of
    all processes, else per sample.
    """
    probabilities = logits_BKDHW.float().softmax(1)
    if labels_BDHW.is_floating_point():
        is_class = labels_BDHW
    else:
        is_class = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, labels_BDHW.long()[:, None], True)
    axes = [axis for axis in range(probabilities.dim()) if axis != 1 and (over_batch or axis != 0)]
    sums = torch.stack([(probabilities * is_class).sum(axes), probabilities.sum(axes), is_class.sum(axes)])
    if over_batch:
        sums = gather_batch(sums[None]).sum(0)
    common, predicted, wanted = sums
    return ((2 * common + SMOOTH) / (predicted + wanted + SMOOTH)).mean()


def cross_entropy(logits_BKDHW: Tensor, labels_BDHW: Tensor) -> Tensor:
    """Average the cross entropy over all voxels; ``labels_BDHW`` as in :func:`soft_dice`."""
    labels = labels_BDHW if labels_BDHW.is_floating_point() else labels_BDHW.long()
    return functional.cross_entropy(logits_BKDHW.float(), labels)


def class_shares(labels_BDHW: Tensor, num_classes: int, size: Sequence[int]) -> Tensor:
    """Return the share of each class (B, K, *size) in the voxels of a coarser grid."""
    is_class_BKDHW = functional.one_hot(labels_BDHW.long(), num_classes).movedim(-1, 1).float()
    pool: Any = functional.adaptive_avg_pool3d if len(size) == 3 else functional.adaptive_avg_pool2d
    return pool(is_class_BKDHW, tuple(size))


def halving_weights(num_outputs: int) -> list[float]:
    """Return the weights of deep supervision, finest output first: 1, 1/2, 1/4, ... over their sum."""
    weights = [0.5**level for level in range(num_outputs)]
    return [weight / sum(weights) for weight in weights]


def nt_xent(first_NE: Tensor, second_NE: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent (arXiv 2002.05709): rows i of both are a pair of views, the other 2N - 2 are negatives.

    Uses cosine similarity and averages over all 2N rows. If all embeddings are equal, the result is log(2N - 1).
    """
    similarity, partner = pair_similarity(first_NE, second_NE)
    return functional.cross_entropy(similarity / temperature, partner)


def pair_similarity(first_NE: Tensor, second_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines (2N, 2N) of all rows of both, first on top, and the index (2N,) of each row's partner.

    The cosine of a row with itself is -inf, so that it never counts.
    """
    rows, count = torch.cat([first_NE, second_NE]), len(first_NE)
    is_same = torch.eye(2 * count, dtype=torch.bool, device=rows.device)
    return cosines(rows, rows).masked_fill(is_same, -torch.inf), torch.arange(2 * count, device=rows.device).roll(count)


def cosines(first_NE: Tensor, second_ME: Tensor) -> Tensor:
    """Compute the cosines (..., N, M) of all rows of the first with all rows of the second, in float32."""
    with torch.autocast(first_NE.device.type, enabled=False):
        # A larger eps than the default keeps the gradient finite for zero embeddings.
        first, second = (functional.normalize(x.float(), dim=-1, eps=1e-6) for x in (first_NE, second_ME))
        return first @ second.transpose(-2, -1)


def overlap_loss(cosine_BTN: Tensor, overlap_BTN: Tensor) -> Tensor:
    """Compute VoCo's prediction loss (arXiv 2402.17300, as its authors' code): positive cosines predict overlaps.

    For T target and N base crops. Overlapping pairs: -log(1 - |overlap - s| + 1e-6) with s = relu(cosine), weighted by
    their overlap. Other pairs: mean of s squared. Both are computed per sample and averaged over samples.
    """
    # With TF32, cosines can be slightly above 1, which would give the logarithm of a negative number.
    guess, overlap = cosine_BTN.float().relu().clamp(max=1).flatten(1), overlap_BTN.float().flatten(1)
    near = (overlap * -(1 - (overlap - guess).abs() + 1e-6).log()).sum(1) / overlap.sum(1).clamp(min=1e-6)
    is_apart = overlap == 0
    apart = (guess.square() * is_apart).sum(1) / is_apart.sum(1).clamp(min=1)
    return (near + apart).mean()


def spread_loss(cosine_BNN: Tensor) -> Tensor:
    """Compute VoCo's regulariser, which makes base crops differ: mean of relu(cosine) over all pairs and samples."""
    count = cosine_BNN.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=cosine_BNN.device)
    return cosine_BNN.float().relu()[:, first, second].mean()


def gather_batch(x_BE: Tensor) -> Tensor:
    """Gather the rows of all processes in rank order; all must have the same number."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x_BE
    return _Gather.apply(x_BE)


class _Gather(torch.autograd.Function):
    """dist.all_gather with a gradient: the sum over all processes of the gradients for this process's rows."""

    @staticmethod
    def forward(context: Any, x_BE: Tensor) -> Tensor:
        parts = [torch.empty_like(x_BE) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_BE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
