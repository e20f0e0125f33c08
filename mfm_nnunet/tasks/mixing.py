"""Mix crops, images and targets alike: boxes (CutMix), foreground (copy-paste), connected components (TumorCP).

All functions are pure: they return new tensors on the device of their inputs, and random numbers come from a generator
that they get.

Shapes: B batch, C channels, K channels of a target, D H W voxels (2D has no D). A target is a label map (K = 1), or a
map per region, with the ignored voxels as its last channel where there is an ignore label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

Box = tuple[slice, ...]
"""A slice per spatial axis."""


def draw_box(size: Sequence[int], share: float, rng: np.random.Generator) -> Box:
    """Draw a box inside a crop of ``size`` voxels; its sides are ``share`` of the crop's, at least one voxel."""
    sides = [max(1, round(share * length)) for length in size]
    starts = [int(rng.integers(length - side, endpoint=True)) for length, side in zip(size, sides)]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides))


def replace_box(mine: Tensor, theirs: Tensor, box: Box) -> Tensor:
    """Return ``mine`` with a box from ``theirs``, of any equal shapes that end in the spatial axes.

    Use it for whatever goes with a crop, e.g. weights per voxel.
    """
    mixed, inside = mine.clone(), _index(box)
    mixed[inside] = theirs[inside]
    return mixed


def mix_box(
    images_a: Tensor, targets_a: Tensor, images_b: Tensor, targets_b: Tensor, box: Box
) -> tuple[Tensor, Tensor]:
    """Return images and targets of ``a`` with a box from ``b`` (CutMix, arXiv 1905.04899; BCP, arXiv 2305.00673).

    Targets have full resolution; see :func:`downsample_targets`.
    """
    return replace_box(images_a, images_b, box), replace_box(targets_a, targets_b, box)


def paste(image_a: Tensor, target_a: Tensor, image_b: Tensor, target_b: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``a`` with the voxels of ``b`` where ``mask`` (D, H, W) is true (copy-paste, arXiv 2012.07177)."""
    return torch.where(mask, image_b, image_a), torch.where(mask, target_b, target_a)


def paste_component(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    mask_b: Tensor,
    places: Tensor,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Return ``a`` with one connected component of ``mask_b``, moved to a random place (TumorCP, MICCAI 2021).

    ``a`` and ``b`` are image (C, D, H, W) and target (K, D, H, W). The component, drawn from those that touch by faces,
    edges or corners, is centred on a voxel drawn from ``places`` (D, H, W), and moved inwards where it would leave the
    crop. Without a component or a place, ``a`` is returned unchanged.
    """
    mask = mask_b.cpu().numpy()
    parts, number = scipy.ndimage.label(mask, np.ones((3,) * mask.ndim))
    where = np.flatnonzero(places.cpu().numpy())
    if number == 0 or len(where) == 0:
        return a
    chosen = int(rng.integers(number))
    source = scipy.ndimage.find_objects(parts)[chosen]
    centre = np.unravel_index(where[rng.integers(len(where))], mask.shape)
    sides = [part.stop - part.start for part in source]
    starts = [int(np.clip(c - side // 2, 0, n - side)) for c, side, n in zip(centre, sides, mask.shape)]
    to = tuple(slice(start, start + side) for start, side in zip(starts, sides))
    part = torch.from_numpy(parts[source] == chosen + 1).to(mask_b.device)
    image, target = a[0].clone(), a[1].clone()
    here, there = _index(to), _index(source)
    image[here], target[here] = paste(image[here], target[here], b[0][there], b[1][there], part)
    return image, target


def _index(box: Box) -> Any:
    """Return the index of a box in a tensor that ends in the spatial axes."""
    return (..., *box)


def downsample_targets(target_BKDHW: Tensor, scales: Sequence[Sequence[float]]) -> list[Tensor]:
    """Return a target per scale of deep supervision, each by nearest neighbours, as nnU-Net's loaders make them."""
    whole, size = target_BKDHW.float(), target_BKDHW.shape[2:]
    found = []
    for scale in scales:
        smaller = [round(length * share) for length, share in zip(size, scale)]
        resized = torch.nn.functional.interpolate(whole, smaller, mode="nearest-exact").to(target_BKDHW.dtype)
        found.append(target_BKDHW if all(share == 1 for share in scale) else resized)
    return found


@dataclass(frozen=True)
class Mixing:
    """Mix each crop of a batch, with a probability, with another crop of it."""

    kind: Literal["cutmix", "copy_paste", "lesion_paste"]
    probability: float
    box: float
    """Sides of a box as a share of the crop's."""
    labels: tuple[int, ...]
    """Labels that are pasted: values of a label map, or channels of regions."""
    is_one_label: bool
    """Paste one of the labels, drawn from those in the other crop, instead of all."""
    hosts: tuple[int, ...]
    """The other labels: components go into them, or into the body if there are none."""
    has_regions: bool
    ignored: int | None
    """The ignore label of a label map, or the channel of ignored voxels."""

    def mix(self, images_BCDHW: Tensor, targets_BKDHW: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return a mixed batch of at least two crops; targets have full resolution.

        The other crop is the same number of places further in the batch for all, so each crop is used once at most.
        """
        images, targets, number = images_BCDHW.clone(), targets_BKDHW.clone(), len(images_BCDHW)
        distance, fires = int(rng.integers(1, number)), rng.random(number) < self.probability
        for crop in np.flatnonzero(fires):
            other = (crop + distance) % number
            a, b = (images_BCDHW[crop], targets_BKDHW[crop]), (images_BCDHW[other], targets_BKDHW[other])
            images[crop], targets[crop] = self._mix_pair(a, b, rng)
        return images, targets

    def _mix_pair(
        self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        if self.kind == "cutmix":
            return mix_box(*a, *b, draw_box(a[0].shape[1:], self.box, rng))
        labels = self._draw_labels(b[1], rng) if self.is_one_label else self.labels
        mask = self._find(b[1], labels)
        if self.kind == "copy_paste":
            return paste(*a, *b, mask)
        return paste_component(a, b, mask, self._find_places(*a), rng)

    def _draw_labels(self, target_KDHW: Tensor, rng: np.random.Generator) -> list[int]:
        """Return one of the labels that a target has, or none."""
        if self.has_regions:
            present = [label for label in self.labels if target_KDHW[label].any()]
        else:
            counts = torch.bincount(target_KDHW[0].flatten().long().clamp(min=0), minlength=max(self.labels) + 1)
            present = [label for label in self.labels if counts[label]]
        return [present[rng.integers(len(present))]] if present else []

    def _find(self, target_KDHW: Tensor, labels: Sequence[int]) -> Tensor:
        """Return where a target has one of the labels (D, H, W)."""
        if self.has_regions:
            return target_KDHW[list(labels)].bool().any(0)
        # Looked up, which takes one pass for any number of labels.
        table = torch.zeros(max(*labels, *self.labels, int(target_KDHW.max())) + 1, dtype=torch.bool)
        table[list(labels)] = True
        return table.to(target_KDHW.device)[target_KDHW[0].long().clamp(min=0)]

    def _find_places(self, image_CDHW: Tensor, target_KDHW: Tensor) -> Tensor:
        """Return where components may go (D, H, W): the hosts, else the body; never onto labels or ignored voxels.

        The body is what is brighter than the crop's mean in the first channel.
        """
        body = image_CDHW[0] > image_CDHW[0].mean()
        places = (self._find(target_KDHW, self.hosts) if self.hosts else body) & ~self._find(target_KDHW, self.labels)
        return places if self.ignored is None else places & ~self._find(target_KDHW, [self.ignored])
