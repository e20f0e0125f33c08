"""Small labelled datasets with every kind of label, and what stock nnU-Net makes of them, all in this process."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.data.corpus import load_cases
from mfm_nnunet.images.reading import read_image
from mfm_nnunet.workspace import Workspace

NUMBER = 31
SHAPE_ZYX = (22, 26, 24)
SPACING_XYZ = (1.5, 1.0, 1.0)
"""The coarsest axis is the last of the array, so plans transpose."""

KINDS: dict[str, dict[str, Any]] = {
    "classes": {"labels": {"background": 0, "shell": 1, "core": 2}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
    "ignore": {"labels": {"background": 0, "shell": 1, "core": 2, "ignore": 3}},
    "regions_ignore": {
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
    },
}
"""What dataset.json says of its labels; in all of them voxels are 0, 1 (shell), 2 (core), and 3 where not annotated."""


def write_dataset(here: Workspace, kind: str = "classes", num_cases: int = 5, scale: int = 1) -> str:
    """A raw dataset of a ball in a shell, each axis ``scale`` times the usual size; returns its name."""
    name = f"Dataset{NUMBER:03d}_{kind}"
    folder = here.raw / name
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for index in range(num_cases + 1):
        image, label = _voxels(np.random.default_rng(index), scale)
        if "ignore" in KINDS[kind]["labels"]:
            label[: SHAPE_ZYX[0] * scale // 2] = 3
        is_test = index == num_cases
        _write(image, folder / ("imagesTs" if is_test else "imagesTr") / f"case_{index}_0000.nii.gz")
        if not is_test:
            _write(label, folder / "labelsTr" / f"case_{index}.nii.gz")
    # With the map of files stock nnU-Net starts no processes to find them.
    files = {
        f"case_{index}": {
            "images": [str(folder / "imagesTr" / f"case_{index}_0000.nii.gz")],
            "label": str(folder / "labelsTr" / f"case_{index}.nii.gz"),
        }
        for index in range(num_cases)
    }
    content = {"channel_names": {"0": "MRI"}, "numTraining": num_cases, "file_ending": ".nii.gz", "dataset": files}
    (folder / "dataset.json").write_text(json.dumps({**content, **KINDS[kind]}))
    return name


def _voxels(rng: np.random.Generator, scale: int) -> tuple[np.ndarray, np.ndarray]:
    shape = [size * scale for size in SHAPE_ZYX]
    axes = np.meshgrid(*(np.arange(size) / scale for size in shape), indexing="ij")
    distance = np.sqrt(sum((axis - rng.uniform(10, 13)) ** 2 for axis in axes))
    label = np.where(distance < 4, 2, np.where(distance < 7, 1, 0)).astype(np.uint8)
    return (100 + 40 * label + rng.normal(0, 8, shape)).astype(np.float32), label


def _write(voxels_ZYX: np.ndarray, file: Path) -> None:
    image = sitk.GetImageFromArray(voxels_ZYX)
    image.SetSpacing(SPACING_XYZ)
    image.SetOrigin((-20.0, 7.5, 30.25))
    sitk.WriteImage(image, str(file))


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """nnU-Net's pools of spawned processes as threads: a started process takes longer than the work itself."""
    pools = SimpleNamespace(Pool=ThreadPool)
    with (
        mock.patch.object(multiprocessing, "get_context", return_value=pools),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


def plan_with_stock(here: Workspace, name: str, planner: type[ExperimentPlanner] = ExperimentPlanner) -> dict[str, Any]:
    """Fingerprint and plan of stock nnU-Net."""
    with in_this_process():
        extractor = DatasetFingerprintExtractor(name, 1)
        extractor.num_foreground_voxels_for_intensitystats = 1e5
        extractor.run()
        plans, _ = plan_experiment_dataset(name, planner)  # type: ignore[arg-type]
    return plans


def preprocess_with_stock(here: Workspace, name: str, plans: dict[str, Any], configuration: str) -> Path:
    """Preprocess with stock nnU-Net; returns the folder of the data."""
    folder = here.preprocessed / name
    dataset_json = json.loads((folder / "dataset.json").read_text())
    with in_this_process():
        DefaultPreprocessor().run(name, configuration, plans["plans_name"], num_processes=1)
    for case in load_cases(here.raw / name):
        assert case.label is not None
        (folder / "gt_segmentations").mkdir(exist_ok=True)
        shutil.copyfile(case.label, folder / "gt_segmentations" / f"{case.name}{dataset_json['file_ending']}")
    return folder / PlansManager(plans).get_configuration(configuration).data_identifier


def predict_with_stock(
    model_folder: Path, images: tuple[Path, ...], mask_of_previous_stage: np.ndarray | None = None
) -> np.ndarray:
    """The mask that stock nnU-Net predicts on the CPU, axes as its reader gives them."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        # Stock's own search for folds finds numbered ones only.
        folds = ("all",) if (model_folder / "fold_all").is_dir() else None
        predictor.initialize_from_trained_model_folder(str(model_folder), folds)
        image, properties = read_image(images, predictor.plans_manager.plans["image_reader_writer"])
        return predictor.predict_single_npy_array(image, properties, mask_of_previous_stage)


def voxels_of(mask: Path) -> np.ndarray:
    """The voxels of a mask, axes as nnU-Net's reader gives them."""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))


def settings(plans_file: Path, **finetune: Any) -> None:
    """Give a plan of ours a short schedule."""
    plans = json.loads(plans_file.read_text())
    plans["mfm"]["finetune"].update(finetune)
    plans["mfm"]["num_workers"] = 0
    plans_file.write_text(json.dumps(plans))
