"""Consistency: the network labels an unlabelled crop, and learns these labels on a stronger view of it.

One network and no threshold, as published inside nnU-Net (nnFilterMatch): hard labels, trained on together with the
labelled batch. The stronger view is turned by multiples of 90 degrees and mirrored, or has other intensities.

Shapes: B batch, C channels, K classes or regions, D H W voxels (2D has no D).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfm_nnunet.tasks.pseudo_labels import PseudoLabelTask, split_output


class ConsistencyTask(PseudoLabelTask):
    """Learn own labels on stronger views. ``unlabelled["turns"]`` says how each was turned (:func:`turn`)."""

    name = "consistency"

    def losses(self, images: Tensor, target: Any, unlabelled: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the losses of the labelled crops and of the stronger views, which pass the network together."""
        labels = turn(self.label(unlabelled["weak"]), unlabelled["turns"])
        output = self.network(torch.cat([images, unlabelled["strong"]]))
        labelled, other = split_output(output, len(images))
        return self.loss(labelled, target), self.loss(other, self.at_scales(labels, target))


def turn(x_BCDHW: Tensor, turns: Tensor) -> Tensor:
    """Turn each crop by ``turns[:, 0]`` times 90 degrees in its last two axes, then mirror it.

    ``turns`` (B, 1 + axes) are whole numbers: the quarter turns, and 1 for each spatial axis to mirror.
    """
    result = []
    for x_CDHW, (quarters, *flips) in zip(x_BCDHW, turns.tolist()):
        axes = [axis + 1 for axis, flip in enumerate(flips) if flip]
        result.append(torch.flip(torch.rot90(x_CDHW, quarters, (-2, -1)), axes))
    return torch.stack(result)
