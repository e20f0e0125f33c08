"""Model folders with a network of a few thousand random weights, and scans of a few thousand voxels."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.models.networks import build_network
from tests.builders.architectures import resenc
from tests.builders.plans import SPLINE, plan_configuration, plan_of

THREE_LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}


def dataset_json(
    labels: Mapping[str, Any] = THREE_LABELS, channels: Sequence[str] = ("MR",), file_ending: str = ".nii.gz"
) -> dict[str, Any]:
    result = {
        "channel_names": {str(k): name for k, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": 5,
        "file_ending": file_ending,
    }
    if any(isinstance(value, list) for value in labels.values()):
        result["regions_class_order"] = [1, 2, 3]
    return result


def tiny_plans(
    dimensions: int = 3,
    *,
    reader: str = "SimpleITKIO",
    channels: int = 1,
    transpose: Sequence[int] = (0, 1, 2),
    spacing: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    probabilities: tuple[str, dict[str, Any]] = (SPLINE, {"is_seg": False, "order": 1, "order_z": 0}),
) -> dict[str, Any]:
    """A stock plan with one configuration, ``3d_fullres`` or ``2d``."""
    name, kwargs = probabilities
    kwargs = {**kwargs, "force_separate_z": None} if name != "no_resampling_hack" else {}
    configuration = plan_configuration(
        resenc(dimensions, (4, 8)),
        patch_size or [16] * dimensions,
        channels,
        spacing=list(spacing or [1.0] * dimensions),
        resampling_fn_probabilities=name,
        resampling_fn_probabilities_kwargs=kwargs,
    )
    intensities = {"max": 9.0, "mean": 1.0, "median": 1.0, "min": -9.0, "std": 1.0}
    intensities |= {"percentile_00_5": -3.0, "percentile_99_5": 3.0}
    configurations = {"3d_fullres" if dimensions == 3 else "2d": configuration}
    return plan_of(configurations, intensities, channels, transpose, image_reader_writer=reader)


def save_model(
    folder: Path,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    *,
    folds: Sequence[int | str] = (0,),
    trainer: str = "nnUNetTrainer",
    mirror_axes: tuple[int, ...] | None = None,
    checkpoint_name: str = "checkpoint_final.pth",
) -> Path:
    """Write a model folder as a training leaves it; the weights are random and different in each fold."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    configuration = next(iter(plans["configurations"]))
    manager = PlansManager(copy.deepcopy(plans))
    num_inputs = determine_num_input_channels(manager, configuration, dataset)
    num_outputs = manager.get_label_manager(dataset).num_segmentation_heads
    for seed, fold in enumerate(folds):
        torch.manual_seed(seed)
        network = build_network(plans, configuration, num_inputs, num_outputs, deep_supervision=True)
        _make_every_class_win_somewhere(network, (1, num_inputs, *plans["configurations"][configuration]["patch_size"]))
        checkpoint = {
            "network_weights": network.state_dict(),
            "trainer_name": trainer,
            "init_args": {"configuration": configuration, "fold": fold, "plans": plans, "dataset_json": dataset},
            "inference_allowed_mirroring_axes": mirror_axes,
            "optimizer_state": {},
        }
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(checkpoint, folder / f"fold_{fold}" / checkpoint_name)
    return folder


@torch.no_grad()
def _make_every_class_win_somewhere(network: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """Random weights, with outputs of mean 0 and standard deviation 4 in every class."""
    for parameter in network.parameters():
        parameter.copy_(0.3 * torch.randn_like(parameter))
    logits = network(torch.randn(shape))[0]
    axes = [0, *range(2, logits.ndim)]
    last = network.decoder.seg_layers[-1]
    scale = 4 / logits.std(axes)
    last.weight.mul_(scale.reshape(-1, *[1] * (last.weight.ndim - 1)))
    last.bias.copy_((last.bias - logits.mean(axes)) * scale)


def stock_predictor(
    model_folder: Path, folds: Sequence[int | str] = (0,), *, step_size: float = 0.5, mirroring: bool = True
) -> nnUNetPredictor:
    """nnU-Net's own predictor with the same model, on the CPU."""
    predictor = nnUNetPredictor(
        tile_step_size=step_size, use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model_folder), tuple(folds))
    return predictor


def write_scan(
    file: Path, seed: int = 0, shape_XYZ: Sequence[int] = (22, 19, 17), spacing: Sequence[float] = (1.0, 1.0, 1.0)
) -> Path:
    """A scan of smooth noise with a border of zeros, oblique and off the origin."""
    rng = np.random.default_rng(seed)
    voxels = np.zeros(shape_XYZ, np.float32)
    inner = tuple(slice(2, size - 1) for size in shape_XYZ)
    voxels[inner] = 100 + 20 * rng.standard_normal(voxels[inner].shape).cumsum(0)
    if file.name.endswith((".nii", ".nii.gz")):
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = [-31.5, 12.25, 7.125]
        nibabel.save(nibabel.Nifti1Image(voxels, affine), file)
    else:
        image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
        image.SetSpacing(tuple(map(float, spacing)))
        image.SetOrigin((-31.5, 12.25, 7.125))
        sitk.WriteImage(image, str(file))
    return file


def voxels_of(file: Path) -> np.ndarray:
    """The voxel values of a mask (X, Y, Z)."""
    if file.name.endswith((".nii", ".nii.gz")):
        return np.asarray(nibabel.load(file).dataobj)  # type: ignore[attr-defined]
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
