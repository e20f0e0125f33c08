"""nnU-Net's loader with less work for the same crops: rotation and scale are drawn first, then only their box is read.

nnU-Net reads a crop about four times as large as the patch and samples it, although two of three crops are neither
rotated nor scaled. Random numbers are drawn in its order, so crops that are not rotated are equal bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from mfm_nnunet.data.volumes import read_box
from mfm_nnunet.data.warp import find_box, warp_image, warp_labels

HANDLED = {
    "random_crop": False,
    "p_elastic_deform": 0,
    "mode_image": "bilinear",
    "mode_seg": "bilinear",
    "padding_mode_image": "zeros",
    "border_mode_seg": "constant",
    "padding_value_seg": -1,
    "seg_tiebreak": "nearest",
    "align_corners": False,
}
"""Settings of the spatial transforms that are done here, which are nnU-Net's; all others are left to its loader."""


@dataclass(frozen=True)
class Spatial:
    """nnU-Net's spatial transform, and those that come after it."""

    transform: SpatialTransform
    rest: Sequence[BasicTransform]

    @classmethod
    def of(cls, transforms: Any) -> Spatial | None:
        """Split transforms; return None if they do not start with a spatial one of the kind done here."""
        steps = list(transforms.transforms) if type(transforms) is ComposeTransforms else []
        kinds = [type(step) for step in steps[:3]]
        if kinds == [Convert3DTo2DTransform, SpatialTransform, Convert2DTo3DTransform]:
            steps = [steps[1], *steps[3:]]
        if not steps or type(steps[0]) is not SpatialTransform:
            return None
        if any(getattr(steps[0], name, None) != value for name, value in HANDLED.items()):
            return None
        return cls(steps[0], steps[1:])

    def draw(self, size: Sequence[int]) -> np.ndarray | None:
        """Draw the matrix for a crop of ``size`` voxels as the transform does; None if it leaves the crop as it is."""
        drawer = copy.copy(self.transform)
        drawer.patch_size, drawer._grid_cache = (1,) * len(size), {}  # it samples a grid that is not needed
        return drawer.get_parameters(image=torch.empty((1, *size), device="meta"))["affine"]


class TightLoader(nnUNetDataLoader):
    """nnU-Net's loader, which reads no more voxels than the transformed crops need."""

    def generate_train_batch(self) -> dict[str, Any]:
        """Return nnU-Net's batch."""
        spatial = Spatial.of(self.transforms)
        if spatial is None:
            return super().generate_train_batch()
        keys = self.get_indices()
        with torch.no_grad():
            samples = [self._make_sample(key, self.get_do_oversample(j), spatial) for j, key in enumerate(keys)]
        images, targets = zip(*((sample["image"], sample["segmentation"]) for sample in samples))
        is_list = isinstance(targets[0], list)
        target = [torch.stack(scale) for scale in zip(*targets)] if is_list else torch.stack(targets)
        return {"data": torch.stack(images), "target": target, "keys": keys}

    def _make_sample(self, key: str, centred: bool, spatial: Spatial) -> dict[str, Any]:
        image, labels, previous, properties = self._data.load_case(key)
        lower, _ = self.get_bbox(image.shape[1:], centred, properties["class_locations"])
        crop = _Crop(lower, self.patch_size, self.final_patch_size, self.patch_size_was_2d)
        matrix = spatial.draw(crop.enlarged[-len(spatial.transform.patch_size) :].tolist())
        maps = [crop.read(labels, matrix, -1)]
        if previous is not None:
            maps.append(crop.read(previous, matrix, -1)[None])
        sample: dict[str, Any] = {
            "image": torch.from_numpy(crop.read(image, matrix, 0)),
            "segmentation": torch.from_numpy(np.concatenate(maps) if previous is not None else maps[0]),
        }
        for step in spatial.rest:
            sample = step(**sample)
        return sample


class _Crop:
    """A place in a case: the enlarged crop of nnU-Net, and the patch in its middle."""

    def __init__(self, lower: Sequence[int], enlarged: Sequence[int], size: Sequence[int], is_slice: bool) -> None:
        self._leading = (int(lower[0]),) if is_slice else ()
        first = len(self._leading)
        self._lower, self.enlarged, self._size = (np.asarray(values[first:], int) for values in (lower, enlarged, size))

    def read(self, volume: Any, matrix: np.ndarray | None, fill: int) -> np.ndarray:
        """Return the patch of a volume: an image if ``fill`` is 0, else label maps. Outside the volume is ``fill``."""
        dtype = np.int16 if fill else np.float32
        if matrix is None:
            first = self.enlarged // 2 - self._size // 2
            lower, size = (self._lower + first).tolist(), self._size.tolist()
            return read_box(volume, lower, size, self._leading, fill, dtype)
        axes = len(matrix)  # the last ones; with a flat patch, slices are transformed one by one
        size, enlarged = self._size[-axes:], self.enlarged[-axes:]
        offset = (enlarged - 1) / 2 - matrix @ (size - 1) / 2
        first, extent = find_box(matrix, offset, size.tolist())
        # nnU-Net's crop ends here, and the volume for it.
        start, stop = np.maximum(first, 0), np.minimum(first + extent, enlarged)
        lower, inside = self._lower.copy(), self._size.copy()
        lower[-axes:] += start
        inside[-axes:] = stop - start
        box = read_box(volume, lower.tolist(), inside.tolist(), self._leading, fill, dtype)
        stack = box.reshape(-1, *box.shape[-axes:])
        if (stop - start < extent).any():
            margins = [(0, 0), *zip(start - first, first + extent - stop)]
            stack = np.pad(stack, margins, constant_values=fill)
        warped = (warp_labels if fill else warp_image)(stack, matrix, offset - first, size.tolist())
        return warped.reshape(*box.shape[:-axes], *size)
