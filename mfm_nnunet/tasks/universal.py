"""Segmentation with partial labels: in each case only the classes of its dataset are annotated (arXiv 2007.03868).

Shapes: B batch, K outputs of the network, C channels of the target, D H W voxels (2D has no D). ``valid_BK`` is True
where the dataset of a case annotates an output; of a softmax, the first output is background and always valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mfm_nnunet.tasks.base import TaskOutput
from mfm_nnunet.tasks.segmentation import SegmentationTask

SMOOTH = 1e-5
"""nnU-Net's constant in numerator and denominator of the Dice."""
RARE = 0.01
"""Share of an epoch's crops below which a class is named in the log."""


def hide(logits_BKDHW: Tensor, valid_BK: Tensor, has_regions: bool, merge: bool = True) -> Tensor:
    """Return logits in which outputs that are not valid have no probability.

    With a softmax and ``merge``, their probability is added to that of the background (the marginal); without it, the
    other outputs share it, as if each dataset had a head of its own.
    """
    hidden = ~valid_BK.reshape(*valid_BK.shape, *[1] * (logits_BKDHW.ndim - 2))
    shown = logits_BKDHW.masked_fill(hidden, -torch.inf)
    if has_regions or not merge or valid_BK.all():
        return shown
    is_merged = hidden.clone()
    is_merged[:, 0] = True
    background = logits_BKDHW.masked_fill(~is_merged, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([background, shown[:, 1:]], 1)


class PartialLabelLoss(nn.Module):
    """Dice and cross entropy over the annotated classes; with all of them annotated it is nnU-Net's loss.

    ``expected`` is the mean number of annotated classes of a case. Sums over classes are divided by it, never by the
    number in a batch, so that a class keeps its weight however many others are present (MultiTalent, arXiv 2303.14444).
    ``weights`` are those of the outputs of deep supervision. See :func:`hide` for ``merge``.
    """

    def __init__(
        self,
        has_regions: bool,
        ignore_label: int | None,
        batch_dice: bool,
        expected: float,
        weights: Sequence[float] = (1.0,),
        merge: bool = True,
    ) -> None:
        super().__init__()
        self.has_regions, self.ignore_label, self.merge = has_regions, ignore_label, merge
        self._batch_dice, self._expected, self._weights = batch_dice, expected, tuple(weights)

    def forward(self, output: Any, target: Any, valid_BK: Tensor) -> Tensor:
        """Return the loss of logits (B, K, D, H, W) for a target (B, C, D, H, W), or of lists of both."""
        one = self._regions if self.has_regions else self._softmax
        if isinstance(output, Tensor):
            return one(output.float(), target, valid_BK)
        parts = [w * one(o.float(), t, valid_BK) for w, o, t in zip(self._weights, output, target) if w != 0]
        return torch.stack(parts).sum()

    def _softmax(self, logits_BKDHW: Tensor, target_B1DHW: Tensor, valid_BK: Tensor) -> Tensor:
        counts = torch.ones_like(target_B1DHW, dtype=torch.bool)
        if self.ignore_label is not None:
            counts = target_B1DHW != self.ignore_label
        label_B1DHW = torch.where(counts, target_B1DHW, 0).long()
        log_BKDHW = hide(logits_BKDHW, valid_BK, False, self.merge).log_softmax(1)
        entropy_B1DHW = -log_BKDHW.gather(1, label_B1DHW)
        entropy = torch.where(counts, entropy_B1DHW, 0).sum() / counts.sum().clamp_min(1)
        wanted_BKDHW = torch.zeros_like(log_BKDHW).scatter_(1, label_B1DHW, 1)
        return entropy + self._dice(log_BKDHW.exp()[:, 1:], wanted_BKDHW[:, 1:], counts, valid_BK[:, 1:])

    def _regions(self, logits_BKDHW: Tensor, target_BCDHW: Tensor, valid_BK: Tensor) -> Tensor:
        num, expected = logits_BKDHW.shape[1], self._expected
        wanted_BKDHW, counts = target_BCDHW[:, :num].float(), torch.ones_like(target_BCDHW[:, :1], dtype=torch.bool)
        if self.ignore_label is not None:
            counts = ~target_BCDHW[:, num:].bool()
            expected /= num  # as nnU-Net, which then sums over the regions
        entropy_BKDHW = binary_cross_entropy_with_logits(logits_BKDHW, wanted_BKDHW, reduction="none")
        valid = valid_BK.reshape(*valid_BK.shape, *[1] * (logits_BKDHW.ndim - 2))
        entropy = (entropy_BKDHW * (counts & valid)).sum() / counts.sum().clamp_min(1) / expected
        return entropy + self._dice(logits_BKDHW.sigmoid(), wanted_BKDHW, counts, valid_BK)

    def _dice(self, p_BKDHW: Tensor, wanted_BKDHW: Tensor, counts: Tensor, valid_BK: Tensor) -> Tensor:
        """Return the negative soft Dice; a class without a valid sample has the term 0, not 1."""
        axes, valid = tuple(range(2, p_BKDHW.ndim)), valid_BK.float()
        both, predicted, there = (
            (x * counts).sum(axes) * valid for x in (p_BKDHW * wanted_BKDHW, p_BKDHW, wanted_BKDHW)
        )
        if self._batch_dice:
            both, predicted, there = (x.sum(0, keepdim=True) for x in (both, predicted, there))
            valid = valid.mean(0, keepdim=True)
        dice = (2 * both + SMOOTH) / (there + predicted + SMOOTH).clamp_min(1e-8)
        return -(dice * valid).mean(0).sum() / self._expected


class UniversalTask(SegmentationTask):
    """Segment a union of datasets. ``valid`` has the annotated outputs of each dataset, by the start of case names."""

    name = "universal"

    def __init__(
        self, network: nn.Module, loss: PartialLabelLoss, valid: Mapping[str, Sequence[bool]], names: Sequence[str]
    ) -> None:
        super().__init__(network, loss, loss.has_regions, loss.ignore_label)
        self._partial_loss = loss
        self._valid = {key: torch.tensor(list(outputs)) for key, outputs in valid.items()}
        self._names, self._merge = tuple(names), loss.merge
        self._forget()

    def forward(self, batch: dict[str, Any]) -> TaskOutput:
        """Compute the loss; in eval mode also count voxels of the annotated classes of each case."""
        output, target = self._network(batch["data"]), batch["target"]
        valid_BK = torch.stack([self._valid[str(key).partition("_")[0]] for key in batch["keys"]]).to(
            batch["data"].device
        )
        loss = self._partial_loss(output, target, valid_BK)
        finest = (output[0], target[0]) if isinstance(target, list) else (output, target)
        if self.training:
            self._note(finest[1], valid_BK)
            return TaskOutput(loss)
        shown = hide(finest[0].float(), valid_BK, self._has_regions, self._merge)
        return TaskOutput(loss, self._count(shown, finest[1]))

    @torch.no_grad()
    def _note(self, target_BCDHW: Tensor, valid_BK: Tensor) -> None:
        """Count the crops that show each class, and the steps that train it."""
        if self._has_regions:
            there_BK = target_BCDHW[:, : len(self._names)].flatten(2).any(2)
        else:
            numbers = range(1, len(self._names) + 1)
            there_BK = torch.stack([(target_BCDHW == number).flatten(1).any(1) for number in numbers], 1)
            valid_BK = valid_BK[:, 1:]
        self._num_crops += len(target_BCDHW)
        self._crops_K += (there_BK & valid_BK).sum(0).cpu()
        self._steps_K += valid_BK.any(0).cpu()

    def _forget(self) -> None:
        self._num_crops = 0
        self._crops_K, self._steps_K = (torch.zeros(len(self._names), dtype=torch.long) for _ in range(2))

    def describe_epoch(self) -> list[str]:
        """Return lines on the classes that the steps since the last call trained, and name the rare ones."""
        counted = zip(self._names, self._steps_K.tolist(), self._crops_K.tolist())
        shown = [f"{name} {steps} ({crops})" for name, steps, crops in counted]
        lines = [f"steps per class (crops with it, of {self._num_crops}): {', '.join(shown)}"]
        rare = [name for name, crops in zip(self._names, self._crops_K.tolist()) if crops < RARE * self._num_crops]
        if rare:
            lines.append(f"in under {RARE:.0%} of the crops: {', '.join(rare)}")
        self._forget()
        return lines
