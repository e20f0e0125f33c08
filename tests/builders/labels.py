"""A tiny preprocessed dataset with a label per image, and scans to predict: class 1 has a bright ball."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK as sitk

from mfm_nnunet import workspace
from mfm_nnunet.jobs import train
from mfm_nnunet.requests import TrainRequest
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny
from tests.builders.architectures import primus, resenc

NAME = "Dataset701_Labels"
PATCHES = {"2d": (16, 16), "3d_fullres": (16, 16, 16)}
SHAPES = ((10, 14, 16), (20, 18, 24))
"""Smaller and larger than the patch."""
NUM_CASES = 12
SETTINGS = ("finetune.epochs=2", "finetune.iterations_per_epoch=3", "finetune.batch_size=2", "num_workers=0")


def image(number: int) -> np.ndarray:
    """The voxels (D, H, W) of a case."""
    rng = np.random.default_rng(number)
    voxels = rng.normal(size=SHAPES[number % 2]).astype(np.float32)
    grid = np.stack(np.meshgrid(*(np.arange(size) - size / 2 for size in voxels.shape), indexing="ij"))
    if label(number):
        voxels[np.sqrt((grid**2).sum(0)) < 4] += 4
    return voxels


def label(number: int) -> int:
    return number // 2 % 2


def rows(labels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return dict(labels or {f"case{n:02d}": ("healthy", "ill")[label(n)] for n in range(NUM_CASES)})


def prepare(
    folder: Path,
    family: str = "resenc",
    task: str = "classification",
    labels: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> Workspace:
    """Preprocessed volumes, a plan and labels.csv, as planning and preprocessing leave them."""
    with workspace.use(folder) as here:
        base = here.preprocessed / NAME
        data = base / "mfm_tiny"
        data.mkdir(parents=True, exist_ok=True)
        networks = {
            name: tiny.configuration(resenc(len(patch), (4, 8, 8)) if family == "resenc" else primus(patch, 24), patch)
            for name, patch in PATCHES.items()
        }
        plans = tiny.plans(**networks)
        del plans["configurations"]["primus"]
        plans |= {"dataset_name": NAME, "mfm": {"network": family, "finetune": {"optimizer": "adamw"}}}
        dataset: dict[str, Any] = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "task": task}
        dataset |= {"classes": list(classes)} if classes else {}
        (base / "mfmPlans.json").write_text(json.dumps(plans))
        (base / "dataset.json").write_text(json.dumps(dataset))
        table = "".join(f"{case},{value},p{case[-2:]}\n" for case, value in rows(labels).items())
        (base / "labels.csv").write_text(f"case,label,subject\n{table}")
        for number in range(NUM_CASES):
            voxels = image(number)
            voxels = (voxels - voxels.mean()) / voxels.std()
            blosc2.asarray(voxels[None], urlpath=str(data / f"case{number:02d}.b2nd"), mode="w")
        return here


def write_scans(folder: Path, numbers: Sequence[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        sitk.WriteImage(sitk.GetImageFromArray(image(number)), str(folder / f"case{number:02d}_0000.nii.gz"))
    return folder


def run(root: Path, configuration: str = "3d_fullres", *settings: str, **changes: Any) -> Path:
    """Train fold 0 and return its folder."""
    options = {"device": "cpu", "workspace": root, "settings": (*SETTINGS, *settings), **changes}
    return train.train(NAME, configuration, options.pop("fold", 0), **options)


def request(configuration: str = "3d_fullres", **changes: Any) -> TrainRequest:
    return TrainRequest(NAME, configuration, 0, **changes)
