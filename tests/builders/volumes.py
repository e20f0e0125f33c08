"""Preprocessed volumes with their masks, and a transform that hands its crops on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np

from mfm_nnunet.data.crops import CropRequest, ItemTransform
from mfm_nnunet.data.volumes import mask_file


def write_mask(folder: Path, name: str, mask: np.ndarray) -> None:
    """Write a mask (1, D, H, W) beside the folder of the volumes, as preprocessing leaves it."""
    file = mask_file(folder, name)
    file.parent.mkdir(exist_ok=True)
    blosc2.asarray(mask.astype(np.uint8), urlpath=str(file))


def write_volume(folder: Path, name: str, volume: np.ndarray, anonymised: np.ndarray | None = None) -> Path:
    """Write a preprocessed volume (C, D, H, W), with its mask if there is one."""
    folder.mkdir(exist_ok=True)
    blosc2.asarray(volume.astype(np.float32), urlpath=str(folder / f"{name}.b2nd"))
    if anonymised is not None:
        write_mask(folder, name, anonymised)
    return folder / f"{name}.b2nd"


@dataclass(frozen=True)
class Keep(ItemTransform):
    """Hand on all crops, and where they are valid if that was given."""

    wanted: tuple[CropRequest, ...]

    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        return list(self.wanted)

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        item = {f"image{i}": crop for i, crop in enumerate(crops)}
        return {**item, "draw": np.float64(rng.random()), **{f"valid{i}": mask for i, mask in enumerate(valid or [])}}
