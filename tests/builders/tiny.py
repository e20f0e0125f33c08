"""A tiny preprocessed labelled dataset, as preprocessing would leave it, with plans that train in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from mfm_nnunet.jobs import train
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, to_dict
from mfm_nnunet.workspace import Workspace
from tests.builders.architectures import primus, resenc
from tests.builders.plans import plan_configuration, plan_of

NAME = "Dataset007_Tiny"
SHAPE = (20, 24, 20)
FINETUNE = FinetuneSettings(epochs=3, iterations_per_epoch=2, validation_iterations=1)


def drop_path_primus(patch: tuple[int, ...] = (16, 16, 16)) -> dict[str, Any]:
    """The ``architecture`` of a very small Primus, with drop path so that training draws random numbers."""
    return primus(patch, embed_dim=24, drop_path_rate=0.5)


def configuration(architecture: dict[str, Any], patch: tuple[int, ...] = (16, 16, 16)) -> dict[str, Any]:
    """A configuration of the plan."""
    return plan_configuration(architecture, patch, order=1, batch_dice=True)


def plans(name: str = "mfmPlans", block: MFMBlock | None = None, **configurations: dict[str, Any]) -> dict[str, Any]:
    """A plan with the configurations 3d_fullres, 2d and primus."""
    own = {
        "3d_fullres": configuration(resenc()),
        "2d": configuration(resenc(2), (16, 16)),
        "primus": configuration(drop_path_primus()),
    }
    about = {"dataset_name": NAME, "plans_name": name, "experiment_planner_used": "ResEncUNetPlanner"}
    content = plan_of({**own, **configurations}, {"mean": 0.0, "std": 1.0}, **about)
    return content if block is None else {**content, "mfm": to_dict(block)}


def make(root: Path, num_cases: int = 6, block: MFMBlock | None = None) -> Workspace:
    """Write the dataset and its plan into a workspace under ``root``."""
    workspace = Workspace(root / "nnUNet_raw", root / "nnUNet_preprocessed", root / "nnUNet_results")
    base = workspace.preprocessed / NAME
    for folder in (base / "mfm_tiny", base / "gt_segmentations", workspace.raw, workspace.results):
        folder.mkdir(parents=True)
    block = block or MFMBlock(finetune=FINETUNE, num_workers=0)
    (base / "mfmPlans.json").write_text(json.dumps(plans(block=block)))
    dataset_json = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "inner": 1, "outer": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        "training": [{"image": "/home/somebody/subject-42.nii.gz"}],
    }
    (base / "dataset.json").write_text(json.dumps(dataset_json))
    fingerprint = {"spacings": [[1, 1, 1]] * num_cases, "mfm": {"failures": [["subject-42", "E_FORMAT", "broken"]]}}
    (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    for index in range(num_cases):
        _write_case(base, f"subject-{index:02d}", np.random.default_rng(index))
    return workspace


def run_training(
    here: Workspace, dataset: str, configuration: str, fold: int | str, *, overrides: Sequence[str] = (), **options: Any
) -> Path:
    """Train a fold in a workspace that is already in use."""
    return train.train(dataset, configuration, fold, settings=overrides, workspace=here.root, **options)


def _write_case(base: Path, name: str, rng: np.random.Generator) -> None:
    centre = rng.uniform(8, 12, 3)
    distance = np.sqrt(
        sum((axis - c) ** 2 for axis, c in zip(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), centre))
    )
    label = np.where(distance < 3, 1, np.where(distance < 6, 2, 0)).astype(np.int16)
    image = (rng.normal(0, 0.3, SHAPE) + label).astype(np.float32)
    locations = {value: np.argwhere(label[None] == value) for value in (1, 2)}
    properties = {
        "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)},
        "spacing": [1.0, 1.0, 1.0],
        "shape_before_cropping": SHAPE,
        "bbox_used_for_cropping": [[0, extent] for extent in SHAPE],
        "shape_after_cropping_and_before_resampling": SHAPE,
        "class_locations": locations,
    }
    target = str(base / "mfm_tiny" / name)
    nnUNetDatasetBlosc2.save_case(image[None], label[None], properties, target, (1, *SHAPE), (1, 8, 8, 8))
    save_pickle(properties, target + ".pkl")
    sitk.WriteImage(sitk.GetImageFromArray(label.astype(np.uint8)), str(base / "gt_segmentations" / f"{name}.nii.gz"))


def add_raw(workspace: Workspace, num_cases: int = 6) -> None:
    """Write raw images and labels on the grid of the preprocessed ones, for what reads the scans again."""
    base, raw = workspace.preprocessed / NAME, workspace.raw / NAME
    for folder in (raw / "imagesTr", raw / "labelsTr"):
        folder.mkdir(parents=True)
    content = json.loads((base / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps({key: content[key] for key in content if key != "training"}))
    for index in range(num_cases):
        name, rng = f"subject-{index:02d}", np.random.default_rng(index)
        image = sitk.GetImageFromArray(rng.normal(5, 1, SHAPE).astype(np.float32))
        sitk.WriteImage(image, str(raw / "imagesTr" / f"{name}_0000.nii.gz"))
        (raw / "labelsTr" / f"{name}.nii.gz").write_bytes((base / "gt_segmentations" / f"{name}.nii.gz").read_bytes())
