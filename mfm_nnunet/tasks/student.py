"""Student: learn from labelled crops, and from crops that teachers labelled with probabilities (soft targets).

The soft loss is nnU-Net's cross-entropy plus soft Dice, with a weight per voxel. For targets of 0 and 1 and weights of
1 (0 where the ignore label is) it equals nnU-Net's own.

Shapes: B batch, C channels, K classes or regions, D H W voxels (2D has no D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.tasks.losses import SMOOTH, gather_batch
from mfm_nnunet.tasks.mixing import replace_box
from mfm_nnunet.tasks.pseudo_labels import PseudoLabelTask, finest, split_output


@dataclass(frozen=True)
class SoftTargets:
    """Settings of the loss on soft targets, and the weight of each voxel."""

    has_regions: bool
    has_ignore: bool
    """Targets have a last channel, 1 where a voxel does not count."""
    over_batch: bool
    """Dice is computed over the batch (nnU-Net's batch_dice), else per crop."""
    sure: float
    unsure: float
    """Weight of voxels whose probabilities are all below ``sure``; with regions, of those where any region's is."""

    def split(self, target_BKDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return a target's probabilities (B, K, D, H, W) and the weights of its voxels (B, 1, D, H, W)."""
        soft = target_BKDHW[:, :-1] if self.has_ignore else target_BKDHW
        confidence = torch.maximum(soft, 1 - soft).amin(1, True) if self.has_regions else soft.amax(1, True)
        weight = torch.where(confidence >= self.sure, 1.0, self.unsure)
        return soft, weight * (target_BKDHW[:, -1:] <= 0.5) if self.has_ignore else weight

    def loss(self, logits_BKDHW: Tensor, target_BKDHW: Tensor, weight_B1DHW: Tensor) -> Tensor:
        """Return cross-entropy plus negative soft Dice, without the background class, in float32."""
        logits, axes = logits_BKDHW.float(), list(range(2, logits_BKDHW.dim()))
        count = weight_B1DHW.sum().clamp(min=1e-8)
        if self.has_regions:
            probability, first = torch.sigmoid(logits), 0
            error = functional.binary_cross_entropy_with_logits(logits, target_BKDHW, reduction="none")
            # nnU-Net sums over the regions if there is an ignore label, and averages otherwise.
            count = count if self.has_ignore else count * logits.shape[1]
        else:
            probability, first = torch.softmax(logits, 1), 1
            error = -(target_BKDHW * functional.log_softmax(logits, 1)).sum(1, True)
        predicted, wanted = probability[:, first:] * weight_B1DHW, target_BKDHW[:, first:]
        sums = torch.stack(
            [(predicted * wanted).sum(axes), predicted.sum(axes), (wanted * weight_B1DHW).sum(axes)], dim=1
        )
        if self.over_batch:
            sums = gather_batch(sums).sum(0, keepdim=True)
        common, total, present = sums.unbind(1)
        dice = (2 * common + SMOOTH) / (total + present + SMOOTH).clamp(min=1e-8)
        return (error * weight_B1DHW).sum() / count - dice.mean()

    def soften(self, target: Tensor, num_classes: int) -> Tensor:
        """Return true labels, a label map or a map per region (and one of ignored voxels), as soft targets."""
        if self.has_regions:
            return target.float()
        labels = target[:, 0].long()
        ignored = labels >= num_classes
        soft = functional.one_hot(labels.masked_fill(ignored, 0), num_classes).movedim(-1, 1).float()
        return torch.cat([soft, ignored[:, None].float()], 1) if self.has_ignore else soft


class StudentTask(PseudoLabelTask):
    """Learn soft labels of unlabelled crops. ``unlabelled`` holds "strong" crops, "soft" targets and "boxes".

    ``boxes`` (B, axes, 2) are first and last places of a box that comes from a labelled crop; zeros for none.
    """

    name = "student"

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        has_regions: bool,
        ignore_label: int | None,
        soft: SoftTargets,
    ) -> None:
        super().__init__(network, loss, has_regions, ignore_label)
        self._soft = soft
        self._scales = tuple(getattr(loss, "weight_factors", None) or (1.0,))

    def losses(self, images: Tensor, target: Any, unlabelled: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the losses of the labelled and of the pseudo-labelled crops, which pass the network together."""
        crops, soft = self._paste(images, finest(target), unlabelled)
        labelled, other = split_output(self.network(torch.cat([images, crops])), len(images))
        return self.loss(labelled, target), self.soft_loss(other, soft)

    def soft_loss(self, output: Any, target_BKDHW: Tensor) -> Tensor:
        """Return the loss over all scales of deep supervision; targets are reduced as by nnU-Net's loaders."""
        total = torch.zeros((), device=target_BKDHW.device)
        for scale, logits in zip(self._scales, output if isinstance(output, list) else [output]):
            if scale != 0:
                resized = functional.interpolate(target_BKDHW, logits.shape[2:], mode="nearest-exact")
                total = total + float(scale) * self._soft.loss(logits, *self._soft.split(resized))
        return total

    def _paste(self, images: Tensor, target: Tensor, unlabelled: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the pseudo-labelled crops and targets with boxes from labelled ones (CutMix, arXiv 1905.04899)."""
        crops, soft = unlabelled["strong"].clone(), unlabelled["soft"].clone()
        true = self._soft.soften(target, soft.shape[1] - self._soft.has_ignore)
        for number, places in enumerate(unlabelled["boxes"].tolist()):
            box, other = tuple(slice(*ends) for ends in places), number % len(images)
            crops[number] = replace_box(crops[number], images[other], box)
            soft[number] = replace_box(soft[number], true[other], box)
        return crops, soft
