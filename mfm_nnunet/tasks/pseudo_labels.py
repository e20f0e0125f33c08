"""Base of segmentation tasks that also learn from unlabelled crops, whose labels the network or its average makes.

A batch holds ``unlabelled`` in the steps that use unlabelled crops, and in validation: ``weak``, the crops that are
labelled (B, C, D, H, W); ``strong``, what the network learns them on; and ``weight``. Without it a step is that of
:class:`SegmentationTask`, bit for bit.

Shapes: B batch, K classes or regions, C channels, D H W voxels (2D has no D).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mfm_nnunet.models.backbone import modes_kept
from mfm_nnunet.tasks.base import TaskOutput
from mfm_nnunet.tasks.mixing import downsample_targets
from mfm_nnunet.tasks.segmentation import SegmentationTask

CONFIDENT = 0.95
"""Probability from which a voxel counts as confident (arXiv 2208.09910)."""


class PseudoLabelTask(SegmentationTask):
    """Add a loss on unlabelled crops; in validation also measure what the network says about some of them.

    The measures are ``confident``, the share of voxels with a probability of at least CONFIDENT, and ``volume``, the
    share of voxels of each foreground class or region.
    """

    def forward(self, batch: dict[str, Any]) -> TaskOutput:
        """Compute the loss of a batch, whose labels must not come from its unlabelled crops."""
        unlabelled = batch.get("unlabelled")
        if unlabelled is None:
            return super().forward(batch)
        if self.training:
            labelled, other = self.losses(batch["data"], batch["target"], unlabelled)
            weight = unlabelled["weight"]
            return TaskOutput((labelled + weight * other) / (1 + weight))
        output = super().forward(batch)
        measures, pictures = self._measure(unlabelled["weak"])
        return TaskOutput(output.loss, {**output.metrics, **measures}, pictures)

    @abstractmethod
    def losses(self, images: Tensor, target: Any, unlabelled: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the losses of true labels and of pseudo labels."""

    def summarise(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the summary of the labelled crops, and the means of the measures of the unlabelled ones."""
        summary = super().summarise(values)
        if "confident" in values:
            summary["confident"] = values["confident"].mean().item()
            summary["volume"] = values["volume"].mean(0).tolist()
        return summary

    @torch.no_grad()
    def label(self, images: Tensor) -> Tensor:
        """Return hard labels as a target of full resolution: a label map, or a map per region (and none ignored)."""
        with modes_kept(self.network):
            self.network.eval()
            return self._harden(finest(self.network(images)))

    def at_scales(self, target: Tensor, like: Any) -> Any:
        """Return a target in the form and the types of ``like``, by nearest neighbours, as nnU-Net's loaders do."""
        if not isinstance(like, list):
            return target.to(like.dtype)
        scales = [[small / whole for small, whole in zip(one.shape[2:], target.shape[2:])] for one in like]
        return [one.to(other.dtype) for one, other in zip(downsample_targets(target, scales), like)]

    def _harden(self, output_BKDHW: Tensor) -> Tensor:
        if not self._has_regions:
            return output_BKDHW.argmax(1, keepdim=True)
        regions = output_BKDHW > 0
        if self._ignore_label is None:
            return regions
        return torch.cat([regions, torch.zeros_like(regions[:, :1])], 1)

    def _measure(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        output = finest(self.network(images)).float()
        hard, axes = self._harden(output), [0, *range(2, output.dim())]
        if self._has_regions:
            probability = torch.sigmoid(output)
            sure, maps = torch.maximum(probability, 1 - probability), hard[:, : output.shape[1]]
        else:
            sure = torch.softmax(output, 1).amax(1)
            shape = (1, -1, *[1] * (output.dim() - 2))
            maps = hard == torch.arange(1, output.shape[1], device=output.device).reshape(shape)
        measures = {"confident": (sure >= CONFIDENT).float().mean(), "volume": maps.float().mean(axes)}
        return measures, {"unlabelled crop": images[0].float(), "predicted labels": hard[0].float()}


def finest(output: Any) -> Any:
    """Return the full resolution of an output or target with or without deep supervision."""
    return output[0] if isinstance(output, list) else output


def split_output(output: Any, first: int) -> tuple[Any, Any]:
    """Split an output, at each scale, into the first crops and the others."""
    if not isinstance(output, list):
        return output[:first], output[first:]
    return [scale[:first] for scale in output], [scale[first:] for scale in output]
