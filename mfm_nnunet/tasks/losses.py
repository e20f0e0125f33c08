"""The losses of pretext tasks, computed in float32 whatever the precision of the network.

Shapes: B batch, C channels, K classes, D H W voxels; N and M embeddings of width E; in 2D there is no D.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mfm_nnunet.tasks.gather import gather_batch

SMOOTH = 1e-5
"""Added to both sides of the Dice fraction, so that a class absent from target and prediction counts as found."""


def masked_mse(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Mean squared error over the hidden voxels and all channels of each sample, averaged over the samples.

    Visible voxels get no gradient; a sample without hidden voxels counts as 0. Samples weigh the same however many
    voxels count in them, so that the mean over processes is the mean over the whole batch.
    """
    return _masked_mean((prediction_BCDHW.float() - target_BCDHW.float()).square(), hidden_B1DHW)


def masked_l1(prediction_BCDHW: Tensor, target_BCDHW: Tensor, hidden_B1DHW: Tensor) -> Tensor:
    """Mean absolute error, otherwise as :func:`masked_mse`."""
    return _masked_mean((prediction_BCDHW.float() - target_BCDHW.float()).abs(), hidden_B1DHW)


def _masked_mean(error_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
    counts_B = counted_B1DHW.flatten(1).sum(1) * error_BCDHW.shape[1]
    return (error_BCDHW.masked_fill(~counted_B1DHW, 0).flatten(1).sum(1) / counts_B.clamp(min=1)).mean()


def explained_variance(squared_error: Tensor, target_BCDHW: Tensor, counted_B1DHW: Tensor) -> Tensor:
    """Detached: 1 for a mean squared error of 0, 0 for that of guessing 0, the mean of z-scored images, everywhere."""
    guess = masked_mse(torch.zeros_like(target_BCDHW), target_BCDHW, counted_B1DHW)
    return 1 - squared_error.detach() / guess.clamp(min=1e-8)


def soft_dice(logits_BKDHW: Tensor, labels_BDHW: Tensor, over_batch: bool) -> Tensor:
    """Soft Dice, averaged over all classes (0 included); 1 is perfect.

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
    """Mean cross entropy over all voxels."""
    return functional.cross_entropy(logits_BKDHW.float(), labels_BDHW.long())


def nt_xent(first_NE: Tensor, second_NE: Tensor, temperature: float) -> Tensor:
    """NT-Xent (arXiv 2002.05709): row i of the two is a pair of views, all other 2N - 2 rows are its negatives.

    Cosine similarity; the mean over all 2N rows. With equal embeddings everywhere it is log(2N - 1).
    """
    similarity, partner = pair_similarity(first_NE, second_NE)
    return functional.cross_entropy(similarity / temperature, partner)


def pair_similarity(first_NE: Tensor, second_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (2N, 2N) of all rows of the two, first on top, and which row is the partner of each (2N,).

    A row's cosine with itself is -inf, so that it never counts.
    """
    rows, count = torch.cat([first_NE, second_NE]), len(first_NE)
    is_same = torch.eye(2 * count, dtype=torch.bool, device=rows.device)
    return cosines(rows, rows).masked_fill(is_same, -torch.inf), torch.arange(2 * count, device=rows.device).roll(count)


def cosines(first_NE: Tensor, second_ME: Tensor) -> Tensor:
    """Cosine of each row of the first with each of the second, (..., N, M), in float32 also under autocast."""
    with torch.autocast(first_NE.device.type, enabled=False):
        # An eps far above float32's own keeps the gradient of an embedding of zeros finite.
        first, second = (functional.normalize(x.float(), dim=-1, eps=1e-6) for x in (first_NE, second_ME))
        return first @ second.transpose(-2, -1)


def overlap_loss(cosine_BTN: Tensor, overlap_BTN: Tensor) -> Tensor:
    """VoCo's prediction loss (arXiv 2402.17300, as its authors' code): positive cosines are to be the overlaps.

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
    """VoCo's regulariser: base crops are to differ. The mean of relu(cosine) over the N (N - 1) / 2 pairs.

    For each sample, averaged over the samples.
    """
    count = cosine_BNN.shape[1]
    first, second = torch.triu_indices(count, count, offset=1, device=cosine_BNN.device)
    return cosine_BNN.float().relu()[:, first, second].mean()
