"""A tiny preprocessed labelled dataset, as preprocessing would leave it, with plans that train in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import save_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from mfm_nnunet.plans.schema import FinetuneSettings, MFMBlock, to_dict
from mfm_nnunet.workspace import Workspace

NAME = "Dataset007_Tiny"
SHAPE = (20, 24, 20)
RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
FINETUNE = FinetuneSettings(epochs=3, iterations_per_epoch=2, validation_iterations=1)


def resenc(dimensions: int = 3, features: tuple[int, ...] = (4, 8, 8)) -> dict[str, Any]:
    """The ``architecture`` of a small residual encoder U-Net."""
    stages = len(features)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions] * stages,
            "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
            "n_blocks_per_stage": [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def primus(patch: tuple[int, ...] = (16, 16, 16)) -> dict[str, Any]:
    """The ``architecture`` of a very small Primus, with drop path so that training draws random numbers."""
    kwargs = {"embed_dim": 24, "patch_embed_size": [8] * len(patch), "input_shape": list(patch)}
    kwargs |= {"eva_depth": 2, "eva_numheads": 2, "drop_path_rate": 0.5}
    return {
        "network_class_name": "mfm_nnunet.models.primus.PrimusSeg",
        "arch_kwargs": kwargs,
        "_kw_requires_import": [],
    }


def configuration(architecture: dict[str, Any], patch: tuple[int, ...] = (16, 16, 16)) -> dict[str, Any]:
    """A configuration of a plan, in nnU-Net's keys."""
    resample = {f"resampling_fn_{part}": "resample_data_or_seg_to_shape" for part in ("data", "seg", "probabilities")}
    return {
        "data_identifier": "mfm_tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(SHAPE),
        "spacing": [1.0] * len(patch),
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": architecture,
        "batch_dice": True,
        **resample,
        **{f"{name}_kwargs": {**RESAMPLING, "is_seg": name.endswith("_seg")} for name in resample},
    }


def plans(name: str = "mfmPlans", block: MFMBlock | None = None, **configurations: dict[str, Any]) -> dict[str, Any]:
    """A plan with the configurations 3d_fullres, 2d and primus."""
    content: dict[str, Any] = {
        "dataset_name": NAME,
        "plans_name": name,
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": list(SHAPE),
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": configuration(resenc()),
            "2d": configuration(resenc(2), (16, 16)),
            "primus": configuration(primus()),
            **configurations,
        },
        "experiment_planner_used": "ResEncUNetPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
    }
    if block is not None:
        content["mfm"] = to_dict(block)
    return content


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
