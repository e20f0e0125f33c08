"""Two small labelled datasets, a union of them, and a network so small that training takes a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data.class_table import FILE
from mfm_nnunet.jobs.plan import PlanResult, plan_and_preprocess
from mfm_nnunet.jobs.train import train
from tests.builders.architectures import resenc
from tests.builders.site import SHAPE, edit_json, write_json, write_volume

UNION = "Dataset900_Universal"
SETTINGS = ("finetune.epochs=1", "finetune.iterations_per_epoch=2", "finetune.validation_iterations=1", "num_workers=0")
LABELS = {4: {"shell": 1, "core": 2}, 53: {"core": 1}, 58: {"ball": 1}}
"""Classes of the datasets. All images are noisy spheres in spheres."""


def write_dataset(
    workspace: Path,
    number: int,
    labels: Mapping[str, Any] | None = None,
    channel: str = "MRI",
    num_channels: int = 1,
    spacing: float = 1.0,
    names: str = "case",
    num_cases: int = 5,
) -> Path:
    """Write a labelled dataset; values of label maps: 1 in the outer sphere, and 2 in the inner one if it has two."""
    labels = LABELS[number] if labels is None else labels
    folder = workspace / "nnUNet_raw" / f"Dataset{number:03d}_Some"
    grid = np.meshgrid(*(np.arange(size) - size / 2 for size in SHAPE), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in grid))
    highest = max(max(value) if isinstance(value, list) else value for value in labels.values())
    for case in range(num_cases):
        rng = np.random.default_rng([number, case])
        label = np.where(radius < 4, highest, np.where(radius < 7, 1, 0)).astype(np.uint8)
        affine = np.diag([spacing, spacing, spacing, 1])
        for index in range(num_channels):
            image = (100 + 30 * label + 5 * rng.standard_normal(SHAPE)).astype(np.float32)
            write_volume(folder / "imagesTr" / f"{names}{case}_{index:04d}.nii.gz", image, affine)
        write_volume(folder / "labelsTr" / f"{names}{case}.nii.gz", label, affine)
    content = {
        "channel_names": {str(index): channel for index in range(num_channels)},
        "labels": {"background": 0, **labels}, "numTraining": num_cases, "file_ending": ".nii.gz",
    }  # fmt: skip
    if any(isinstance(value, list) for value in labels.values()):
        content["regions_class_order"] = list(range(1, len(labels) + 1))
    write_json(folder / "dataset.json", content)
    return folder


def plan_union(workspace: Path, *datasets: int, number: int = 900, **options: Any) -> PlanResult:
    """Plan a union, with a very small network unless it is to be like a model."""
    options = {"configurations": ["3d_fullres"], "num_processes": 1, **options}
    (result,) = plan_and_preprocess([number], universal=datasets or None, workspace=workspace, **options)

    def shrink(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"] |= {"architecture": resenc(), "patch_size": [16, 16, 16]}

    if "add_to" not in options:
        edit_json(result.file, shrink)
    return result


def confirm(workspace: Path, name: str = UNION, **changes: Any) -> None:
    edit_json(workspace / "nnUNet_raw" / name / FILE, lambda content: content.update(confirmed=True, **changes))


def train_union(workspace: Path, number: int = 900, *settings: str, **options: Any) -> Path:
    all_settings = (*SETTINGS, *settings)
    return train(number, "3d_fullres", 0, settings=all_settings, workspace=workspace, device="cpu", **options)
