"""Losses of pretext tasks, computed in float32 whatever the precision of the network.

Losses that compare each item with every other one need the embeddings of all processes (:func:`gather_batch`): each
process then computes the loss of the whole batch, and the mean of the gradients over the processes, which
DistributedDataParallel takes, is the whole batch's gradient.

Shapes: B batch, C channels, K classes, D H W voxels; N and M embeddings of width E; in 2D there is no D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

SMOOTH = 1e-5
"""Added to both sides of the Dice fraction, so that a class absent from target and prediction counts as found."""


def masked_mse(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Average the squared error over the hidden voxels and all channels of each sample, then over the samples.

    Visible voxels get no gradient; a sample without hidden voxels counts as 0. Samples weigh the same however many
    voxels count in them, so that the mean over processes is the mean over the whole batch.
    """
    return _masked_mean((prediction_BCDHW.float() - target_BCDHW.float()).square(), hidden_B1DHW)


def masked_l1(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Average the absolute error, otherwise as :func:`masked_mse`."""
    return _masked_mean((prediction_BCDHW.float() - target_BCDHW.float()).abs(), hidden_B1DHW)


def _masked_mean(error_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
    counts_B = counted_B1DHW.flatten(1).sum(1) * error_BCDHW.shape[1]
    return (error_BCDHW.masked_fill(~counted_B1DHW, 0).flatten(1).sum(1) / counts_B.clamp(min=1)).mean()


def explained_variance(squared_error: Tensor, target_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
    """Compare with guessing 0, the mean of z-scored images: 1 for no error, 0 for an error as large. Detached."""
    guess = masked_mse(torch.zeros_like(target_BCDHW), target_BCDHW, counted_B1DHW)
    return 1 - squared_error.detach() / guess.clamp(min=1e-8)


def soft_dice(logits_BKDHW: Tensor, labels_BDHW: Tensor, over_batch: bool) -> Tensor:
    """Compute soft Dice, averaged over all classes (0 included); 1 is perfect.

    ``over_batch``: sums run over the whole batch, that of all processes together, else over each sample.
    """
    probabilities = logits_BKDHW.float().softmax(1)
    is_class = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, labels_BDHW.long()[:, None], True)
    axes = [axis for axis in range(probabilities.dim()) if axis != 1 and (over_batch or axis != 0)]
    sums = torch.stack([(probabilities * is_class).sum(axes), probabilities.sum(axes), is_class.sum(axes)])
    if over_batch:
        sums = gather_batch(sums[None]).sum(0)
    common, predicted, wanted = sums
    return ((2 * common + SMOOTH) / (predicted + wanted + SMOOTH)).mean()


def cross_entropy(logits_BKDHW: Tensor, labels_BDHW: Tensor) -> Tensor:
    """Average the cross entropy over all voxels."""
    return functional.cross_entropy(logits_BKDHW.float(), labels_BDHW.long())


def nt_xent(first_NE: Tensor, second_NE: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent (arXiv 2002.05709): row i of the two is a pair of views, the other 2N - 2 are negatives.

    Cosine similarity; the mean over all 2N rows. With equal embeddings everywhere it is log(2N - 1).
    """
    similarity, partner = pair_similarity(first_NE, second_NE)
    return functional.cross_entropy(similarity / temperature, partner)


def pair_similarity(first_NE: Tensor, second_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines (2N, 2N) of all rows of the two, first on top, and the index of each row's partner (2N,).

    A row's cosine with itself is -inf, so that it never counts.
    """
    rows, count = torch.cat([first_NE, second_NE]), len(first_NE)
    is_same = torch.eye(2 * count, dtype=torch.bool, device=rows.device)
    return cosines(rows, rows).masked_fill(is_same, -torch.inf), torch.arange(2 * count, device=rows.device).roll(count)


def cosines(first_NE: Tensor, second_ME: Tensor) -> Tensor:
    """Compute the cosine of each row of the first with each of the second, (..., N, M), always in float32."""
    with torch.autocast(first_NE.device.type, enabled=False):
        # An eps far above float32's own keeps the gradient of an embedding of zeros finite.
        first, second = (functional.normalize(x.float(), dim=-1, eps=1e-6) for x in (first_NE, second_ME))
        return first @ second.transpose(-2, -1)


def overlap_loss(cosine_BTN: Tensor, overlap_BTN: Tensor) -> Tensor:
    """Compute VoCo's prediction loss (arXiv 2402.17300, as its authors' code): positive cosines predict overlaps.

    Of T target crops with N base crops. Overlapping pairs: -log(1 - |overlap - s| + 1e-6) with s = relu(cosine),
    weighted by their overlap; the others: the mean of s squared. Both for each sample, averaged over the samples.
    """
    # A GPU that multiplies in TF32 finds cosines just above 1, of which the logarithm is not a number.
    guess, overlap = cosine_BTN.float().relu().clamp(max=1).flatten(1), overlap_BTN.float().flatten(1)
    near = (overlap * -(1 - (overlap - guess).abs() + 1e-6).log()).sum(1) / overlap.sum(1).clamp(min=1e-6)
    is_apart = overlap == 0
    apart = (guess.square() * is_apart).sum(1) / is_apart.sum(1).clamp(min=1)
    return (near + apart).mean()


def spread_loss(cosine_BNN: Tensor) -> Tensor:
    """Compute VoCo's regulariser, which makes base crops differ: the mean of relu(cosine) over the N (N - 1) / 2 pairs.

    For each sample, averaged over the samples.
    """
    count = cosine_BNN.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=cosine_BNN.device)
    return cosine_BNN.float().relu()[:, first, second].mean()


def gather_batch(x_BE: Tensor) -> Tensor:
    """Gather the rows of all processes (each has equally many) in the order of the ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x_BE
    return _Gather.apply(x_BE)


class _Gather(torch.autograd.Function):
    """dist.all_gather with a gradient: the sum of the gradients that all processes have for this process's rows."""

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
