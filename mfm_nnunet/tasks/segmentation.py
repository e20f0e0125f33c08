"""Segmentation task with nnU-Net's network and loss, and the counts for its pseudo Dice.

Shapes: B batch, K classes or regions, C channels, D H W voxels (2D has no D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mfm_nnunet.tasks.base import Task, TaskOutput


class SegmentationTask(Task):
    """Predict label maps, or regions that may overlap.

    ``loss`` compares the output of ``network`` with ``batch["target"]``. With deep supervision both are lists, full
    resolution first. ``ignore_label`` marks voxels that do not count; with regions it is the last channel of the
    target.
    """

    name = "segmentation"

    def __init__(
        self, network: nn.Module, loss: Callable[[Any, Any], Tensor], has_regions: bool, ignore_label: int | None
    ) -> None:
        super().__init__()
        self._network = network
        self.loss = loss
        self._has_regions = has_regions
        self._ignore_label = ignore_label

    @property
    def network(self) -> nn.Module:
        """nnU-Net's network, including wrappers."""
        return self._network

    def forward(self, batch: dict[str, Any]) -> TaskOutput:
        """Compute the loss; in eval mode also count right and wrong voxels per foreground class or region."""
        output, target = self._network(batch["data"]), batch["target"]
        loss = self.loss(output, target)
        if self.training:
            return TaskOutput(loss)
        finest = (output[0], target[0]) if isinstance(target, list) else (output, target)
        return TaskOutput(loss, self._count(*finest))

    def summarise(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the mean loss and the Dice over all voxels of the validation (nnU-Net's pseudo Dice).

        The Dice is NaN for a class that is neither in the targets nor predicted.
        """
        hits, excess, missed = (values[name].sum(0) for name in ("hits", "excess", "missed"))
        dice = 2 * hits / (2 * hits + excess + missed)
        return {"loss": np.mean(values["loss"].numpy()), "dice": list(dice.numpy())}

    def describe_epoch(self) -> list[str]:
        """Return lines for the log on what the steps of an epoch trained."""
        return []

    def _count(self, output_BKDHW: Tensor, target_BCDHW: Tensor) -> dict[str, Tensor]:
        counts: Tensor | bool = True
        if self._has_regions:
            predicted, wanted = torch.sigmoid(output_BKDHW) > 0.5, target_BCDHW.bool()
            if self._ignore_label is not None:
                wanted, counts = wanted[:, :-1], ~wanted[:, -1:]
        else:
            shape = (1, -1, *[1] * (output_BKDHW.dim() - 2))
            foreground = torch.arange(1, output_BKDHW.shape[1], device=output_BKDHW.device).reshape(shape)
            predicted, wanted = output_BKDHW.argmax(1, keepdim=True) == foreground, target_BCDHW == foreground
            if self._ignore_label is not None:
                counts = target_BCDHW != self._ignore_label
        maps = {"hits": predicted & wanted, "excess": predicted & ~wanted, "missed": ~predicted & wanted}
        axes = [0, *range(2, output_BKDHW.dim())]
        return {name: (voxels & counts).sum(axes) for name, voxels in maps.items()}
