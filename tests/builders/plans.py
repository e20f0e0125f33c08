"""Plans in nnU-Net's format, with every key that stock nnU-Net and mfm_nnunet read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SPLINE = "resample_data_or_seg_to_shape"


def plan_configuration(
    architecture: Mapping[str, Any], patch_size: Sequence[int], channels: int = 1, order: int = 3, **changes: Any
) -> dict[str, Any]:
    """A configuration of a plan; ``order`` is the spline's for images, ``changes`` are other keys."""
    resampling: dict[str, Any] = {}
    for part, part_order in (("data", order), ("seg", 1), ("probabilities", 1)):
        kwargs = {"is_seg": part == "seg", "order": part_order, "order_z": 0, "force_separate_z": None}
        resampling |= {f"resampling_fn_{part}": SPLINE, f"resampling_fn_{part}_kwargs": kwargs}
    return {
        "data_identifier": "mfm_tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch_size),
        "median_image_size_in_voxels": [20.0] * len(patch_size),
        "spacing": [1.0] * len(patch_size),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "architecture": dict(architecture),
        "batch_dice": False,
        **resampling,
        **changes,
    }


def plan_of(
    configurations: Mapping[str, Any],
    intensities: Mapping[str, float],
    channels: int = 1,
    transpose: Sequence[int] = (0, 1, 2),
    **changes: Any,
) -> dict[str, Any]:
    """A plan with these configurations; ``intensities`` are those of every channel, ``changes`` are other keys."""
    return {
        "dataset_name": "Dataset999_Tiny",
        "plans_name": "mfmPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": [int(axis) for axis in np.argsort(transpose)],
        "configurations": dict(configurations),
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): dict(intensities) for c in range(channels)},
        **changes,
    }
