"""Copy-paste mean teacher: averaged weights label unlabelled crops, which exchange boxes with labelled crops.

Of each pair, one crop is labelled outside of the box and pseudo-labelled inside, the other the reverse (bidirectional
copy-paste, arXiv 2305.00673). True and pseudo labels have a loss each, which ignores the voxels of the other.

Shapes: B batch, C channels, K classes or regions, D H W voxels (2D has no D).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor, nn

from mfm_nnunet.tasks.mixing import replace_box
from mfm_nnunet.tasks.pseudo_labels import PseudoLabelTask, finest


class MeanTeacherTask(PseudoLabelTask):
    """Learn from labelled and unlabelled crops that exchanged a box, ``unlabelled["box"]`` (axes, 2).

    ``averaged`` puts the teacher's weights into the network for the time of a block. ``partial_loss`` is the loss with
    an ignore label: ``ignored`` in a label map, or one more channel after the regions.
    """

    name = "mean_teacher"

    def __init__(
        self,
        network: nn.Module,
        partial_loss: Callable[[Any, Any], Tensor],
        ignored: int,
        averaged: Callable[[], contextlib.AbstractContextManager],
        keeps_largest: bool,
        *parts: Any,
    ) -> None:
        super().__init__(network, *parts)
        self._partial_loss, self._ignored = partial_loss, ignored
        self._averaged, self._keeps_largest = averaged, keeps_largest

    def losses(self, images: Tensor, target: Any, unlabelled: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the losses of true labels and of pseudo labels, in the same mixed crops."""
        with self._averaged():
            pseudo = self.label(unlabelled["weak"])
        true = finest(target)
        if self._keeps_largest:
            pseudo = largest_components(pseudo, self._has_regions)
        box = tuple(slice(low, high) for low, high in unlabelled["box"].tolist())
        other, is_pseudo = unlabelled["strong"], torch.zeros_like(true[:, :1], dtype=torch.bool)
        inside = replace_box(is_pseudo, ~is_pseudo, box)
        mixed = torch.cat([replace_box(images, other, box), replace_box(other, images, box)])
        where = torch.cat([inside, ~inside])
        output = self.network(mixed)
        only_true = self._ignore(torch.cat([true, true]), where)
        only_pseudo = self._ignore(torch.cat([pseudo, pseudo]).to(true.dtype), ~where)
        scales = target if isinstance(target, list) else only_true
        return (
            self._partial_loss(output, self.at_scales(only_true, scales)),
            self._partial_loss(output, self.at_scales(only_pseudo, scales)),
        )

    def _ignore(self, target: Tensor, where: Tensor) -> Tensor:
        """Return a target in which the voxels ``where`` (B, 1, D, H, W) do not count."""
        if not self._has_regions:
            return torch.where(where, torch.full_like(target, self._ignored), target)
        regions = target if self._ignore_label is None else target[:, :-1]
        other = (
            where.to(target.dtype) if self._ignore_label is None else (where | target[:, -1:].bool()).to(target.dtype)
        )
        return torch.cat([regions, other], 1)


def largest_components(labels: Tensor, has_regions: bool) -> Tensor:
    """Keep the largest component of each class of label maps (B, 1, D, H, W), or of each region (B, K, D, H, W)."""
    found = labels.cpu().numpy()
    kept = np.zeros_like(found)
    for crop, result in zip(found, kept):
        if has_regions:
            for region, new in zip(crop, result):
                new[...] = _largest(region)
        else:
            for label in np.unique(crop[crop > 0]):
                result[0][_largest(crop[0] == label)] = label
    return torch.from_numpy(kept).to(labels.device)


def _largest(mask: np.ndarray) -> np.ndarray:
    parts, number = scipy.ndimage.label(mask)
    return mask if number < 2 else parts == 1 + np.bincount(parts.flat)[1:].argmax()
