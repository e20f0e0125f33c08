"""MFMPlanner: nnU-Net's ResEnc planner with a memory budget, Primus, corpora without labels, and our block."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as stock
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from mfm_nnunet import checkpoint
from mfm_nnunet.data import corpus
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import parse_json, to_plain
from mfm_nnunet.models.memory import training_memory_bytes
from mfm_nnunet.models.primus import PrimusSeg, primus_kwargs
from mfm_nnunet.plan import Plan, read_plans
from mfm_nnunet.planning import derive, like
from mfm_nnunet.planning.fingerprint import choose_reader
from mfm_nnunet.planning.table import channel_names
from mfm_nnunet.settings import MFMBlock, to_dict

logger = logging.getLogger(__name__)

STOCK_CONFIGURATIONS = {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
PRIMUS_CLASS = "mfm_nnunet.models.primus.PrimusSeg"
MIN_IMAGE_EDGE = 4
"""Voxels along an edge of a cube as large as the smallest median image that is planned for."""
MIN_STAGES = 2
"""A U-Net of one stage has no decoder, and so no output."""


class MFMPlanner(ResEncUNetPlanner):
    """nnU-Net's ResEnc planner for any budget, data without labels, three spacing modes, Primus and checkpoints.

    The constructor is the stock one, so ``plan_experiment_dataset(id, MFMPlanner)`` works too; what it cannot say is
    set on the attributes below it. ``gpu_memory_target_in_gb=None`` takes this machine's GPU, else the CPU preset.

    Raises MFMError (E_NOT_FOUND) without dataset.json or fingerprint.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "mfmPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        name = stock.maybe_convert_to_dataset_name(dataset_name_or_id)
        raw = Path(str(stock.nnUNet_raw)) / name
        fingerprint_file = Path(str(stock.nnUNet_preprocessed)) / name / "dataset_fingerprint.json"
        _require_file(raw / "dataset.json", "Register the images, or check the data set's folder.")
        _require_file(fingerprint_file, f"Run mfm_plan_and_preprocess -d {name}, which makes it first.")
        self.is_corpus = corpus.is_corpus(raw)
        self.memory_gb = gpu_memory_target_in_gb if gpu_memory_target_in_gb is not None else _gpu_memory_gb()
        self.cases = corpus.load_cases(raw)
        files = {
            case.name: {"images": [str(file) for file in case.images], "label": str(case.label) if case.label else None}
            for case in self.cases
        }
        # Stock lists imagesTr, which a corpus does not have, with twelve processes; everything else it does is wanted.
        # It reads JSON as UTF-8 without a byte order mark.
        with (
            mock.patch.object(stock, "get_filenames_of_train_images_and_targets", return_value=files),
            mock.patch.object(stock, "load_json", side_effect=lambda file: parse_json(Path(file).read_bytes())),
        ):
            super().__init__(name, 8, preprocessor_name, plans_name, overwrite_target_spacing, suppress_transpose)
        self.dataset_json: dict[str, Any] = corpus.read_dataset_json(raw)  # as we understand it, not as it is written
        self.dataset_json.setdefault("numTraining", len(files))
        self.plans_file = fingerprint_file.with_name(f"{plans_name}.json")
        self.plans: dict[str, Any] | None = None
        self.dataset_fingerprint: dict[str, Any] = self.dataset_fingerprint
        self.network: Literal["resenc", "primus"] = "resenc"
        self.version = 1
        self.is_original_spacing = False
        self.wanted: tuple[str, ...] | None = None
        self.planned: tuple[str, ...] = ()
        self.source: like.Source | None = None
        shapes = np.array(self.dataset_fingerprint["shapes_after_crop"])
        if not len(shapes):
            raise MFMError("E_EMPTY", f"{fingerprint_file}: the fingerprint has no cases. Make it again.")
        self.slice_axis = _slice_axis(shapes, self.dataset_name)
        self._memory: dict[tuple[str, tuple[int, ...], int], int] = {}
        self._apply(derive.resenc_preset(self.memory_gb))

    def plan_experiment(self) -> dict[str, Any]:
        """Plan all configurations, write the plan file and return the plan. Stock's prints go to the debug log."""
        if self.is_corpus or self.is_original_spacing or self.network == "primus" or self.source:
            self.lowres_creation_threshold = 0  # a low resolution needs labels, resampling and a network of its own
        if self.network == "primus" or self.source:
            self._apply(_without_limit(self.preset))  # stock's U-Net is thrown away, so it need not be fitted
        measured = self.dataset_fingerprint
        target = [float(value) for value in self.determine_fullres_target_spacing()]
        fixed = [axis for axis in range(3) if self.is_original_spacing or axis == self.slice_axis]
        if fixed:
            # Sizes must stay what they are; stock scales them by case spacing / target spacing.
            spacings = [
                [target[axis] if axis in fixed else own[axis] for axis in range(3)] for own in measured["spacings"]
            ]
            self.dataset_fingerprint = {**measured, "spacings": spacings}
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                super().plan_experiment()
        finally:
            self.dataset_fingerprint = measured
            logger.debug("%s", output.getvalue())
        assert self.plans is not None
        return self.plans

    def determine_reader_writer(self) -> Any:
        """Return the reader class that the fingerprint's images were read with; stock tries each on the first image."""
        known = self.dataset_fingerprint.get("mfm", {}).get("reader")
        return recursive_find_reader_writer_by_name(known or choose_reader(self.cases, self.dataset_json))

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: Any,
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Any,
    ) -> float:
        """Stock's number, from a network without weights: it depends on shapes alone."""
        with torch.device("meta"):
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        return float(network.compute_conv_feature_map_size(patch_size))

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """Target spacing in mm before transposing. The slice axis of 2D images has no spacing to speak of and stays."""
        target = super().determine_fullres_target_spacing().astype(float)
        if self.source:
            axes = like.like_axes(self.source.mfm, self.slice_axis)
            target = np.array(like.like_spacing(self.source.mfm, target, axes))
        if self.slice_axis is not None:
            target[self.slice_axis] = np.median(np.array(self.dataset_fingerprint["spacings"])[:, self.slice_axis])
        return target

    def determine_transpose(self) -> Any:
        """Return the axis order: the slice axis of 2D images first, else the checkpoint's, else the coarsest first."""
        if self.slice_axis is not None:
            forward = derive.slices_first(self.slice_axis)
        elif self.source:
            forward = like.like_axes(self.source.mfm, None)
        else:
            return super().determine_transpose()
        return forward, [forward.index(axis) for axis in range(3)]

    def determine_resampling(self, *args: Any, **kwargs: Any) -> Any:
        """nnU-Net's splines, or nothing at all."""
        if not self.is_original_spacing:
            return super().determine_resampling(*args, **kwargs)
        return no_resampling_hack, {}, no_resampling_hack, {}

    def determine_segmentation_softmax_export_fn(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`determine_resampling`, for the way back."""
        if not self.is_original_spacing:
            return super().determine_segmentation_softmax_export_fn(*args, **kwargs)
        return no_resampling_hack, {}

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """nnU-Net's configuration within the budget, with Primus in place of the U-Net where that is asked for."""
        _require_voxels(spacing, median_shape)
        arguments = (spacing, median_shape, data_identifier, approximate_n_voxels_dataset)
        if self.network == "resenc" and not self.source:
            self._require_memory(*arguments)
        configuration = super().get_plans_for_configuration(*arguments, _cache)
        name = "2d" if len(spacing) == 2 else "3d_fullres"
        if self.network == "primus" and not self.source and (self.wanted is None or name in self.wanted):
            size, patch, batch = self._size_primus(spacing, median_shape)
            configuration["architecture"] = primus_architecture(size, patch, self.version)
            configuration["patch_size"] = patch
            whole_dataset = round(approximate_n_voxels_dataset / math.prod(patch))
            configuration["batch_size"] = max(2, min(batch, whole_dataset))
        limit = self.preset.max_batch[len(spacing)]
        configuration["batch_size"] = int(min(configuration["batch_size"], limit))
        return configuration

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Make stock's plan ours (checkpoint, wanted configurations, identifiers, block) and write it atomically."""
        plans = to_plain(plans)
        axes = plans["transpose_forward"]
        spacings = np.array(self.dataset_fingerprint["spacings"])[:, axes]
        plans["original_median_spacing_after_transp"] = [float(value) for value in np.median(spacings, 0)]
        if self.source:
            plans = self._like(plans)
        plans["configurations"] = derive.select_configurations(plans["configurations"], self.wanted)
        _require_two_stages(plans["configurations"])
        for name, configuration in plans["configurations"].items():
            if "data_identifier" in configuration:
                dataset = DatasetJson.of(self.dataset_json)
                configuration["data_identifier"] = Plan.of(plans).make_data_identifier(name, dataset)
        plans["mfm"] = to_dict(self._block(plans))
        self.planned = tuple(plans["configurations"])
        if self.plans_file.is_file():
            self._merge(plans)
        with checkpoint.atomic_write(self.plans_file) as file:
            file.write(json.dumps(plans, indent=4).encode())
        self.plans = plans

    def _like(self, plans: dict[str, Any]) -> dict[str, Any]:
        assert self.source is not None
        name = self.source.configuration
        if name not in plans["configurations"]:
            raise MFMError(
                "E_MODEL_MISMATCH",
                f"{self.source.entry['name']} was pretrained in 3D and {self.dataset_name} has only 2D images. "
                "Use a checkpoint pretrained with the configuration 2d.",
            )
        median_shape = plans["configurations"][name]["median_image_size_in_voxels"]
        return like.plan_like(plans, median_shape, self.source.mfm, name)

    def _block(self, plans: Mapping[str, Any]) -> MFMBlock:
        configurations = plans["configurations"]
        main = configurations["3d_fullres" if "3d_fullres" in configurations else next(iter(configurations))]
        is_cpu = self.memory_gb is None
        pretrain, finetune = derive.settings_for(self.network, is_cpu, main["batch_size"])
        return MFMBlock(pretrain, finetune, self.source.entry if self.source else None, network=self.network)

    def _merge(self, plans: dict[str, Any]) -> None:
        """Keep configurations of the file on disk that are not planned now, and say what changes."""
        try:
            old = read_plans(self.plans_file, "")
            configurations = dict(old["configurations"])
        except MFMError:
            logger.warning("%s is no plan and is replaced", self.plans_file)
            return
        # Asked for everything, stock decides whether there is a 3d_lowres; one of an older plan must not come back.
        ours = STOCK_CONFIGURATIONS if self.wanted is None else set(plans["configurations"])
        others = {name: value for name, value in configurations.items() if name not in ours}
        shared = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
        same_network = _networks(old) == _networks(plans)
        if same_network and all(old.get(key) == plans[key] for key in shared):
            plans["configurations"].update(others)
        changed = derive.changed_keys(old, plans)
        if changed:
            logger.warning(
                "%s is replaced by a plan that differs in %s. Finished models keep their own copy of the plan; "
                "unfinished trainings do not fit the new one. To keep both plans, give another name with -pl.",
                self.plans_file.name,
                ", ".join(changed),
            )

    def _apply(self, preset: derive.ResEncPreset) -> None:
        self.preset = preset
        self.UNet_base_num_features = preset.base_features
        self.UNet_max_features_2d, self.UNet_max_features_3d = preset.max_features[2], preset.max_features[3]
        self.UNet_blocks_per_stage_encoder = preset.blocks
        self.UNet_reference_val_2d, self.UNet_reference_val_3d = preset.reference[2], preset.reference[3]
        self.UNet_reference_val_corresp_bs_2d = preset.reference_batch[2]
        self.UNet_reference_val_corresp_bs_3d = preset.reference_batch[3]
        # The references are for the budget already; stock scales them by the ratio of these two.
        self.UNet_vram_target_GB = self.UNet_reference_val_corresp_GB = 8
        self.max_dataset_covered = 1  # as in nnU-Net's presets M, L and XL

    def _require_memory(self, spacing: Any, median_shape: Any, identifier: str, num_voxels: float) -> None:
        """Refuse a budget in which stock would shrink the patch below any use, or to nothing."""
        if self.preset.name == "CPU":
            return
        num_axes = len(spacing)
        small_shape = np.minimum(median_shape, derive.MIN_EDGE[num_axes])
        estimates: dict[str, float] = {}
        self._apply(_without_limit(self.preset))
        smallest = super().get_plans_for_configuration(spacing, small_shape, identifier, num_voxels, estimates)
        self._apply(derive.resenc_preset(self.memory_gb))
        share = min(estimates.values()) / self.preset.reference[num_axes]
        if share > 1:
            assert self.memory_gb is not None
            needed_gb = share * self.memory_gb
            raise derive.too_little_memory(self.memory_gb, needed_gb, "ResEnc U-Net", smallest["patch_size"])

    def _size_primus(self, spacing: Any, median_shape: Any) -> tuple[str, tuple[int, ...], int]:
        if self.memory_gb is None:
            return derive.cpu_primus(median_shape, spacing)
        budget = self.memory_gb * 2**30 * derive.PRIMUS_BUDGET_SHARE
        return derive.size_primus(median_shape, spacing, budget, self._primus_memory)

    def _primus_memory(self, size: str, patch: tuple[int, ...], batch: int) -> int:
        key = (size, patch, batch)
        if key not in self._memory:
            num_inputs, num_outputs = len(channel_names(self.dataset_json)), len(self.dataset_json["labels"])
            with torch.device("meta"):
                kwargs = primus_architecture(size, patch, self.version)["arch_kwargs"]
                network = PrimusSeg(input_channels=num_inputs, num_classes=num_outputs, **kwargs)
            self._memory[key] = training_memory_bytes(network, (batch, num_inputs, *patch), "adamw", half=True)
        return self._memory[key]


def primus_architecture(size: str, patch: Sequence[int], version: int = 1) -> dict[str, Any]:
    """The ``architecture`` entry of a plan for a Primus of this size (a key of PRIMUS_SIZES), patch and version."""
    kwargs = {
        **primus_kwargs(size, len(patch), version),
        "patch_embed_size": [derive.TOKEN] * len(patch),
        "input_shape": [int(edge) for edge in patch],
        "drop_path_rate": 0.2,
        "init_values": 0.1,
        "scale_attn_inner": True,
    }
    return {"network_class_name": PRIMUS_CLASS, "arch_kwargs": kwargs, "_kw_requires_import": []}


def _networks(plans: Mapping[str, Any]) -> set[str]:
    """The networks (keys of NETWORKS) of a plan's configurations: of one family and, with Primus, of one version."""
    family = str(plans.get("mfm", {}).get("network"))
    configurations = [value for value in plans["configurations"].values() if isinstance(value, dict)]
    architectures = [value.get("architecture") for value in configurations]
    return {derive.network_of(family, architecture) for architecture in architectures if architecture}


def _slice_axis(shapes: np.ndarray, dataset_name: str) -> int | None:
    """Return the axis along which most images have one voxel, whatever its spacing; None for volumes.

    ``shapes`` is (cases, 3), before transposing. Raises MFMError (E_CONFIG) when images of one slice lie along
    different axes: one plan has one axis order, so the others would be cut into lines.
    """
    flat = shapes[(shapes == 1).any(1)]
    if 2 * len(flat) <= len(shapes):
        return None
    counts = (flat == 1).sum(0)
    axis = int(counts.argmax())
    if counts[axis] < len(flat):
        where = ", ".join(f"{count} along axis {number}" for number, count in enumerate(counts) if count)
        raise MFMError(
            "E_CONFIG",
            f"{dataset_name}: {len(flat)} of {len(shapes)} images have a single slice, but not along one axis "
            f"({where}; counted in the order of the image reader). Save them all with the slice along the same axis.",
        )
    return axis


def _require_voxels(spacing: Sequence[float], median_shape: Sequence[float]) -> None:
    """Refuse a spacing at which the median image is too small for any network."""
    if min(median_shape) < 1 or math.prod(median_shape) < MIN_IMAGE_EDGE ** len(median_shape):
        raise MFMError(
            "E_CONFIG",
            f"at a spacing of {derive.times(spacing)} mm the median image has only {derive.times(median_shape)} "
            "voxels. Give a finer --spacing, and check that the spacing in the images is right.",
        )


def _require_two_stages(configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a U-Net without a decoder, which is what stock plans for images of less than 8 voxels along each axis."""
    for name, configuration in configurations.items():
        num_stages = configuration.get("architecture", {}).get("arch_kwargs", {}).get("n_stages", MIN_STAGES)
        if num_stages < MIN_STAGES:
            raise MFMError(
                "E_CONFIG",
                f"{name}: the median image of {derive.times(configuration['median_image_size_in_voxels'])} voxels (at "
                f"{derive.times(configuration['spacing'])} mm) leaves the network {num_stages} stage, and a U-Net "
                f"needs {MIN_STAGES}: at least 8 voxels along two axes, or 12 along one. Give a finer --spacing, check "
                "that the spacing in the images is right, or plan other configurations only (-c).",
            )


def _without_limit(preset: derive.ResEncPreset) -> derive.ResEncPreset:
    return dataclasses.replace(preset, reference={2: 1e30, 3: 1e30})


def _require_file(file: Path, what_to_do: str) -> None:
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{file}: no such file. {what_to_do}")


def _gpu_memory_gb() -> float | None:
    """Memory of the first GPU in whole GB; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return float(round(torch.cuda.get_device_properties(0).total_memory / 2**30))
