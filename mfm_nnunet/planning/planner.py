"""MFMPlanner: nnU-Net's ResEnc planner extended by memory budgets, other networks, and unlabelled corpora."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as stock
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.preprocessing.resampling.no_resampling import no_resampling_hack
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.data import corpus
from mfm_nnunet.data.class_table import union_of
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import parse_json, to_plain, write_json
from mfm_nnunet.modalities import kind_of
from mfm_nnunet.models.families import NetworkFamily, Sizing, family_named, family_of_architecture
from mfm_nnunet.models.memory import estimate_training_memory, num_parameters
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.sizing import MIN_EDGE, too_little_memory
from mfm_nnunet.plan import CORPUS_SETTINGS, INTENSITIES, Plan
from mfm_nnunet.planning import derive, like, mixed, universal
from mfm_nnunet.planning.derive import Decision, times
from mfm_nnunet.planning.fingerprint import choose_reader
from mfm_nnunet.settings import MFMBlock, to_dict

logger = logging.getLogger(__name__)

STOCK_CONFIGURATIONS = {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}


class MFMPlanner(ResEncUNetPlanner):
    """nnU-Net's ResEnc planner for any budget, data without labels, three spacing modes, Primus and checkpoints.

    The constructor has the stock signature, so ``plan_experiment_dataset(id, MFMPlanner)`` works too. Further options
    are set as attributes. ``gpu_memory_target_in_gb=None`` uses this machine's GPU, else the CPU preset.

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
        _require_file(raw / "dataset.json", "Register the images, or check the dataset's folder.")
        _require_file(fingerprint_file, f"Run mfm_plan_and_preprocess -d {name}, which makes it first.")
        self.budget = derive.choose_budget(gpu_memory_target_in_gb, _gpu_memory_gb())
        # Stock lists imagesTr only to choose a reader. A corpus has no imagesTr, and the reader is chosen below.
        # Stock reads JSON as UTF-8 without a byte order mark.
        with _replaced_in_stock(
            get_filenames_of_train_images_and_targets=lambda *_, **__: {},
            load_json=lambda file: parse_json(Path(file).read_bytes()),
        ):
            super().__init__(name, 8, preprocessor_name, plans_name, overwrite_target_spacing, suppress_transpose)
        self.dataset_json: dict[str, Any] = corpus.read_dataset_json(raw)  # normalised, unlike the file
        self.is_corpus, self.union = corpus.is_corpus(raw), union_of(self.dataset_json)
        self.is_mixed = self.is_corpus or bool(self.union or self.dataset_fingerprint.get("mfm", {}).get("modalities"))
        self.dataset_json.setdefault("numTraining", len(self.dataset_fingerprint["spacings"]))
        self.plans_file = fingerprint_file.with_name(f"{plans_name}.json")
        self.plans: dict[str, Any] | None = None
        self.dataset_fingerprint: dict[str, Any] = self.dataset_fingerprint
        self.variant = "resenc"
        self.family: NetworkFamily = family_named(self.variant)
        self.spacing: str | Sequence[float] = "median"
        self.wanted: tuple[str, ...] | None = None
        self.planned: tuple[str, ...] = ()
        self.source: like.Template | None = None
        self.modality, self.pet = "", ""
        shapes = np.array(self.dataset_fingerprint["shapes_after_crop"])
        if not len(shapes):
            raise MFMError("E_EMPTY", f"{fingerprint_file}: the fingerprint has no cases. Make it again.")
        self.settings: dict[str, Any] = self.dataset_json.get("mfm", {}) if self.is_corpus else {}
        self._is_sliced = "slices" in self.settings
        self.slice_axis = 0 if self._is_sliced else derive.find_slice_axis(shapes, self.dataset_name)
        self._apply(derive.resenc_preset(self.budget.memory_gb))

    @property
    def has_masks(self) -> bool:
        """False for a dataset whose images have labels as a whole."""
        return DatasetJson.of(self.dataset_json).task == "segmentation"

    @property
    def is_original_spacing(self) -> bool:
        """True if images are not resampled."""
        return not self.source.trained.is_resampled if self.source else self.spacing == "original"

    def plan_experiment(self) -> dict[str, Any]:
        """Plan all configurations, write the plan file and return the plan. Stock's output goes to the debug log."""
        is_stock = self.family.is_sized_by_nnunet and not self.source
        if self.is_mixed or not self.has_masks or self.is_original_spacing or not is_stock:
            self.lowres_creation_threshold = (
                0  # a low resolution needs labels of one dataset, resampling, stock's U-Net
            )
        if not is_stock:
            self._apply(_without_limit(self.preset))  # stock's U-Net is discarded, so it need not fit the budget
        measured = self.dataset_fingerprint
        target = [float(value) for value in self.determine_fullres_target_spacing()]
        fixed = [axis for axis in range(3) if self.is_original_spacing or axis == self.slice_axis]
        if fixed:
            # Sizes along these axes must not change, but stock scales them by case spacing / target spacing.
            spacings = [
                [target[axis] if axis in fixed else own[axis] for axis in range(3)] for own in measured["spacings"]
            ]
            self.dataset_fingerprint = {**measured, "spacings": spacings}
        if self._is_sliced:
            self.dataset_fingerprint = mixed.as_slices(measured, target, not self.is_original_spacing)
            self.dataset_json["numTraining"] = mixed.count_slices(measured, self.settings["slices"]["every"])
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
        """Return the reader class used for the fingerprint; stock would try each reader on the first image."""
        known = self.dataset_fingerprint.get("mfm", {}).get("reader")
        if not known:  # stock nnU-Net made the fingerprint
            raw = Path(str(stock.nnUNet_raw)) / self.dataset_name
            known = choose_reader(corpus.load_cases(raw), self.dataset_json)
        return recursive_find_reader_writer_by_name(known)

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: Any,
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict[str, Any],
        arch_kwargs_req_import: Any,
    ) -> float:
        """Compute stock's estimate on the meta device: it depends only on shapes."""
        with torch.device("meta"):
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        return float(network.compute_conv_feature_map_size(patch_size))

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """Return the target spacing in mm before transposing; the slice axis of 2D images keeps its median."""
        target: Any = super().determine_fullres_target_spacing().astype(float)
        if self._is_sliced and self.overwrite_target_spacing is None:
            target = mixed.spacing_of_volumes(self.dataset_fingerprint["spacings"])
        if self.source:
            target = np.array(self.source.spacing(target, self.slice_axis))
        if self.slice_axis is not None:
            target[self.slice_axis] = np.median(np.array(self.dataset_fingerprint["spacings"])[:, self.slice_axis])
        return target

    def determine_transpose(self) -> Any:
        """Return the axis order and its inverse."""
        forward, _ = self._choose_axis_order()
        if forward is None:
            return super().determine_transpose()
        return forward, [forward.index(axis) for axis in range(3)]

    def _choose_axis_order(self) -> tuple[list[int] | None, str]:
        """Return the axis order (None: nnU-Net's) and the reason."""
        if self.slice_axis is not None:
            return derive.slices_first(self.slice_axis), "the axis of one voxel first: images of a single slice"
        if self.source:
            return self.source.axes, derive.CHECKPOINTS
        return None, "axis of the coarsest spacing first"

    def determine_resampling(self, *args: Any, **kwargs: Any) -> Any:
        """Return nnU-Net's resampling, or none."""
        if not self.is_original_spacing:
            return super().determine_resampling(*args, **kwargs)
        return no_resampling_hack, {}, no_resampling_hack, {}

    def determine_segmentation_softmax_export_fn(self, *args: Any, **kwargs: Any) -> Any:
        """Return nnU-Net's resampling of predictions, or none."""
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
        """Return nnU-Net's configuration within the budget; other families replace the U-Net by their network."""
        derive.require_voxels(spacing, median_shape)
        arguments = (spacing, median_shape, data_identifier, approximate_n_voxels_dataset)
        if self.family.is_sized_by_nnunet and not self.source:
            self._require_memory(*arguments)
        configuration = super().get_plans_for_configuration(*arguments, _cache)
        name = "2d" if len(spacing) == 2 else "3d_fullres"
        is_wanted = self.wanted is None or name in self.wanted
        if is_wanted and not self.family.is_sized_by_nnunet and not self.source:
            planned = self.family.plan_network(self._sizing(spacing, median_shape, configuration))
            configuration["architecture"] = planned.architecture
            configuration["patch_size"] = planned.patch_size
            whole_dataset = round(approximate_n_voxels_dataset / math.prod(planned.patch_size))
            configuration["batch_size"] = max(2, min(planned.batch_size, whole_dataset))
        limit = self.preset.max_batch[len(spacing)]
        configuration["batch_size"] = int(min(configuration["batch_size"], limit))
        return configuration

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Extend stock's plan (checkpoint, wanted configurations, identifiers, our block) and write it atomically."""
        plans = to_plain(plans)
        spacings = np.array(self.dataset_fingerprint["spacings"])[:, plans["transpose_forward"]]
        plans["original_median_spacing_after_transp"] = [float(value) for value in np.median(spacings, 0)]
        if self.source:
            plans = self._like(plans, self.source)
        elif self.modality and not self.is_mixed:
            plans = mixed.normalise_by(plans, kind_of(self.modality), self.pet)
        plans["configurations"] = derive.select_configurations(plans["configurations"], self.wanted)
        if not self.source:
            derive.fit_to_intensities(plans, self.family)
        derive.require_two_stages(plans["configurations"])
        dataset = DatasetJson.of(self.dataset_json)
        plans["mfm"] = to_dict(self._block(plans))
        if self.pet and "pet" not in (plans["mfm"].get("modalities") or {kind_of(self.modality)}):
            raise MFMError("E_CONFIG", f"--pet {self.pet}: no image is known to be PET. Add --modality PET.")
        for name, configuration in plans["configurations"].items():
            if "data_identifier" in configuration:
                configuration["data_identifier"] = Plan.of(plans).make_data_identifier(name, dataset)
        if self.union:
            universal.require_spacings(self.union, self.dataset_fingerprint, Plan.of(plans))
        self.planned = tuple(plans["configurations"])
        if self.plans_file.is_file():
            self._merge(plans)
        write_json(self.plans_file, plans, indent=4)
        self.plans = plans

    def _like(self, plans: dict[str, Any], source: like.Template) -> dict[str, Any]:
        if source.configuration not in plans["configurations"]:
            raise MFMError(
                "E_MODEL_MISMATCH",
                f"{source.entry['name']} was pretrained in 3D and {self.dataset_name} has only 2D images. "
                "Use a checkpoint pretrained with the configuration 2d.",
            )
        if not (self.is_mixed and source.plan.modalities):
            source = mixed.for_dataset(source, self.modality, self.dataset_json, plans[INTENSITIES])
        return like.plan_like(plans, source)

    def _block(self, plans: Mapping[str, Any]) -> MFMBlock:
        configurations = plans["configurations"]
        main = configurations["3d_fullres" if "3d_fullres" in configurations else next(iter(configurations))]
        is_cpu = self.budget.memory_gb is None
        pretrain, finetune = derive.settings_for(self.family.name, is_cpu, main["batch_size"])
        if not self.has_masks:
            finetune = derive.for_classifier(finetune, self.family, is_cpu)
        return MFMBlock(
            pretrain,
            finetune,
            self.source.entry if self.source else None,
            modalities=mixed.modalities_of(self.dataset_fingerprint, self.source, self.is_mixed, self.pet),
            corpus={name: self.settings[name] for name in CORPUS_SETTINGS if name in self.settings} or None,
            universal=dict(self.union) if self.union else None,
            network=self.family.name,
        )

    def _merge(self, plans: dict[str, Any]) -> None:
        """Keep other configurations of an existing plan file, and warn about changes."""
        try:
            old = Plan.read(self.plans_file, "").content
        except MFMError:
            logger.warning("%s is not a plan and is replaced", self.plans_file)
            return
        # If everything is planned, stock decides whether there is a 3d_lowres. Drop that of an older plan.
        ours = STOCK_CONFIGURATIONS if self.wanted is None else set(plans["configurations"])
        others = {name: value for name, value in old["configurations"].items() if name not in ours}
        shared = ("transpose_forward", "image_reader_writer", INTENSITIES)
        if like.networks_of(old) == like.networks_of(plans) and all(old.get(key) == plans[key] for key in shared):
            plans["configurations"].update(others)
        if changed := derive.changed_keys(old, plans):
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
        # Stock scales the references by the ratio of these two, but they already match the budget.
        self.UNet_vram_target_GB = self.UNet_reference_val_corresp_GB = 8
        self.max_dataset_covered = 1  # as in nnU-Net's presets M, L and XL

    def _require_memory(self, spacing: Any, median_shape: Any, identifier: str, num_voxels: float) -> None:
        """Refuse a budget for which stock would shrink the patch below a useful size."""
        if self.preset.name == "CPU":
            return
        num_axes = len(spacing)
        small_shape = np.minimum(median_shape, MIN_EDGE[num_axes])
        estimates: dict[str, float] = {}
        self._apply(_without_limit(self.preset))
        smallest = super().get_plans_for_configuration(spacing, small_shape, identifier, num_voxels, estimates)
        self._apply(derive.resenc_preset(self.budget.memory_gb))
        share = min(estimates.values()) / self.preset.reference[num_axes]
        if share > 1:
            assert self.budget.memory_gb is not None
            needed_gb = share * self.budget.memory_gb
            raise too_little_memory(self.budget.memory_gb, needed_gb, "ResEnc U-Net", smallest["patch_size"])

    def _sizing(self, spacing: Any, median_shape: Any, stock: Mapping[str, Any]) -> Sizing:
        return Sizing(
            self.variant,
            tuple(map(float, median_shape)),
            tuple(map(float, spacing)),
            self.budget.memory_gb,
            num_inputs=len(DatasetJson.of(self.dataset_json).channels),
            num_outputs=len(self.dataset_json["labels"]),
            stock=stock,
        )

    def explain(self, own: Plan) -> list[Decision]:
        """List the decisions of the last plan with their reasons."""
        budget: tuple[str, str] = (str(self.budget), self.budget.reason)
        if self.source:
            entry = self.source.entry
            text = f"planned like {entry['name']} ({entry['pretext']}), with its network and patch"
            budget = (derive.CHECKPOINTS, text)
        axes = " ".join(map(str, own.content["transpose_forward"]))
        decisions = [Decision("budget", *budget), Decision("axis order", axes, self._choose_axis_order()[1])]
        first = own.configuration(self.planned[0])
        for channel, name in enumerate(DatasetJson.of(self.dataset_json).channels):
            reason = derive.explain_normalisation(first, channel, name, bool(self.source))
            decisions.append(Decision(f"channel {channel}", first.normalization_schemes[channel], reason))
        if own.modalities:
            decisions[-len(first.normalization_schemes) :] = mixed.explain_modalities(own.modalities)
        for name in self.planned:
            decisions += self._explain_configuration(own, name)
        return decisions + derive.explain_schedules(own.mfm, self.budget)

    def _explain_configuration(self, plan: Plan, name: str) -> list[Decision]:
        own = plan.configuration(name)
        if parent := own.values.get("inherits_from"):
            reason = f"as {parent}, with the result of the previous stage as further input"
            return [Decision(name, parent, reason)]
        manager = PlansManager(plan.content)
        num_inputs = determine_num_input_channels(manager, manager.get_configuration(name), self.dataset_json)
        num_outputs = manager.get_label_manager(self.dataset_json).num_segmentation_heads
        finetune, is_half, is_like = plan.mfm.finetune, self.budget.memory_gb is not None, bool(self.source)
        with torch.device("meta"):
            network = build_network(
                plan.content, name, num_inputs, num_outputs, deep_supervision=finetune.deep_supervision
            )
        shape = (own.batch_size, num_inputs, *own.patch_size)
        memory = estimate_training_memory(network, shape, finetune.optimizer, is_half)
        family = family_of_architecture(own.architecture)
        why_network = derive.CHECKPOINTS if is_like else family.reason(own.architecture, self.budget.memory_gb)
        num_cases = len(self.dataset_fingerprint["spacings"])
        why_spacing = derive.explain_spacing(own, self.spacing, num_cases, is_like)
        return [
            Decision(f"{name}: spacing", times(own.values["spacing"], " mm"), why_spacing),
            Decision("  patch", times(own.patch_size), derive.explain_patch(own, self.family.patch_unit(), is_like)),
            Decision("  batch size", str(own.batch_size), derive.explain_batch(self.budget, is_like)),
            Decision("  network", family.describe(own.architecture), why_network),
            Decision(
                "  parameters",
                f"{num_parameters(network) / 1e6:.1f} M",
                f"channels: {num_inputs} in, {num_outputs} out",
            ),
            derive.explain_memory(memory, is_half),
        ]


@contextlib.contextmanager
def _replaced_in_stock(**functions: Any) -> Iterator[None]:
    """Temporarily replace functions in the module of nnU-Net's default planner."""
    before = {name: getattr(stock, name) for name in functions}
    vars(stock).update(functions)
    try:
        yield
    finally:
        vars(stock).update(before)


def _without_limit(preset: derive.ResEncPreset) -> derive.ResEncPreset:
    return dataclasses.replace(preset, reference={2: 1e30, 3: 1e30})


def _require_file(file: Path, what_to_do: str) -> None:
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{file}: no such file. {what_to_do}")


def _gpu_memory_gb() -> float | None:
    if not torch.cuda.is_available():
        return None
    return float(round(torch.cuda.get_device_properties(0).total_memory / 2**30))
