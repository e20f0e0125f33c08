"""What tasks that restore hidden voxels share: an item with its mask, and loss, metric and pictures of a step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.tasks.base import CropRequest, ItemTransform, TaskOutput
from mfm_nnunet.tasks.losses import explained_variance, masked_l1, masked_mse
from mfm_nnunet.tasks.masks import MaskRatio, draw_hidden


@dataclass(frozen=True)
class MaskingTransform(ItemTransform):
    """Adds the mask: ``image`` (C, D, H, W) float32 and ``hidden`` (1, D, H, W) bool."""

    patch_size: tuple[int, ...]
    cell_size: tuple[int, ...]
    mask_ratio: MaskRatio
    """Share of the cells that are hidden, or the limits between which it is drawn for each item."""

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return [CropRequest(self.patch_size)]

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        ratio = rng.uniform(*self.mask_ratio) if isinstance(self.mask_ratio, tuple) else self.mask_ratio
        hidden = draw_hidden(self.patch_size, self.cell_size, ratio, rng)
        return {"image": crops[0], "hidden": hidden, **({"valid": valid[0]} if valid else {})}


def restoration_output(
    batch: dict[str, Tensor], restored_BCDHW: Tensor, fill_value: float, with_pictures: bool, is_l1: bool = False
) -> TaskOutput:
    """Mean squared (or absolute) error on the hidden voxels of a batch of :class:`MaskingTransform`, if they are valid.

    ``fill_value`` is what the pictures show at hidden voxels.
    """
    image_BCDHW, hidden_B1DHW = batch["image"], batch["hidden"]
    counted_B1DHW = hidden_B1DHW & batch["valid"] if "valid" in batch else hidden_B1DHW
    squared_error = masked_mse(restored_BCDHW, image_BCDHW, counted_B1DHW)
    loss = masked_l1(restored_BCDHW, image_BCDHW, counted_B1DHW) if is_l1 else squared_error
    explained = explained_variance(squared_error, image_BCDHW, counted_B1DHW)
    pictures = None
    if with_pictures:
        image, hidden = image_BCDHW[0].float(), hidden_B1DHW[0]
        pictures = {
            "image": image,
            "visible": image.masked_fill(hidden, fill_value),
            "restored": torch.where(hidden, restored_BCDHW[0].detach().float(), image),
        }
    return TaskOutput(loss, {"explained_variance": explained}, pictures)
