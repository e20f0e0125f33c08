"""Preprocess images for training: crop, normalise and resample volumes, stored in nnU-Net's own file formats.

The arrays equal those of nnU-Net's ``DefaultPreprocessor`` (label maps and properties exactly, images up to rounding);
the loop around it differs. Labels are optional. A bad case does not affect other cases. Each image is decoded once for
all configurations. Cases are written atomically and then recorded in a manifest, so a killed run resumes, and cases
with changed sources are redone. Files used by other plans are never deleted.

Shapes: C channels, D H W voxels; first in the order of the file, then in the plan's axis order.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask

from mfm_nnunet.data import storage
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loops import attempt, in_processes, in_threads, source_signature, unchanged, with_progress
from mfm_nnunet.data.resampling import resampling_function
from mfm_nnunet.data.sizes import Sizes, require_preprocessable
from mfm_nnunet.data.slices import as_in_corpus, at_natural_size, choose_slices, reader_of
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, MFMError, about
from mfm_nnunet.files import inside, report_full_disk, to_plain
from mfm_nnunet.images import reading
from mfm_nnunet.modalities import Z_SCORE, kind_of, kind_of_channel
from mfm_nnunet.plan import Configuration, Plan
from mfm_nnunet.plan_rules import CT, PERCENTILES

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

POOL_MIN_BYTES = 20_000_000
"""Smaller sources (all files together) are processed in this process: starting a worker costs seconds of imports."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessReport:
    """Names of the cases done now, of those reused from an earlier run, and of those that failed."""

    done: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failures: list[CaseFailure] = field(default_factory=list)


def preprocess_dataset(
    cases: Sequence[Case],
    plans: dict[str, Any],
    configurations: Sequence[str],
    dataset_json: dict[str, Any],
    preprocessed_folder: Path,
    num_processes: int = 1,
    part: tuple[int, int] = (0, 1),
) -> dict[str, PreprocessReport]:
    """Preprocess ``cases`` into ``preprocessed_folder/<data_identifier>/`` and report each configuration.

    ``part`` (i, n) is every n-th case from the i-th on; other commands do the rest. A case is reused if the manifest
    beside that folder lists it with the same sources and settings. Labels are copied to ``gt_segmentations/``. Raises
    MFMError: E_CONFIG (unknown configuration, a foreign preprocessor), E_DISK_FULL (finished cases are kept; run again
    to resume).
    """
    plan, dataset = Plan.of(plans), DatasetJson.of(dataset_json)
    suffix = f"_{part[0]}of{part[1]}" if part[1] > 1 else ""
    targets = {name: _Target.find(plan, name, dataset, preprocessed_folder, suffix) for name in configurations}
    groups: dict[tuple[str, ...], list[Case]] = {}
    for target in targets.values():
        target.warn_of_others(cases)
    for case in cases[part[0] :: part[1]]:
        missing = tuple(name for name, target in targets.items() if not target.holds(case))
        groups.setdefault(missing, []).append(case)
    prefix = f"{storage.STAGING_PREFIX}{f'{suffix[1:]}_' if suffix else ''}"
    storage.remove_dead_stages(preprocessed_folder, prefix)
    with storage.staging(preprocessed_folder, prefix) as stage:
        folders = {name: target.folder for name, target in targets.items()}
        job = PreprocessJob(json.dumps(to_plain(plans)), json.dumps(to_plain(dataset_json)), folders, stage)
        for case in groups.pop((), []):
            job.copy_label(case)
        for missing, todo in groups.items():
            own = replace(job, folders={name: folders[name] for name in missing})
            _preprocess_all(own, todo, [targets[name] for name in missing], num_processes)
    for target in targets.values():
        target.report.done.sort()
        target.report.failures.sort(key=lambda failure: failure.case)
    return {name: target.report for name, target in targets.items()}


@dataclass(frozen=True)
class _Target:
    """Output of one configuration: its folder, the digest of its settings, and the finished cases."""

    configuration: str
    folder: Path
    digest: str
    manifest: storage.Manifest
    is_by_modality: bool
    report: PreprocessReport = field(default_factory=PreprocessReport)

    @classmethod
    def find(cls, plan: Plan, name: str, dataset: DatasetJson, preprocessed_folder: Path, part: str) -> _Target:
        configuration = plan.configuration(name)
        if problem := configuration.preprocessor_problem:
            raise MFMError("E_CONFIG", f"{problem} Preprocess with the program that made the plan, or plan here.")
        folder = inside(preprocessed_folder, configuration.data_identifier)
        with report_full_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        manifest = storage.Manifest.read(folder, part)
        return cls(name, folder, plan.preprocessing_digest(name, dataset), manifest, bool(plan.modalities))

    def sources(self, case: Case, signature: list[list[Any]]) -> list[list[Any]]:
        """Return the signature of a case's files, and its modality if that decides the normalisation."""
        return [*signature, [0, 0, f"modality {kind_of(case.modality)}"]] if self.is_by_modality else signature

    def holds(self, case: Case) -> bool:
        """Return whether a case is finished, and report it as reused. Unreadable sources fail later, in their turn."""
        try:
            is_finished = self.manifest.holds(case.name, self.digest, self.sources(case, source_signature(case)))
        except MFMError:
            return False
        if is_finished:
            self.report.reused.append(case.name)
        return is_finished

    def warn_of_others(self, cases: Sequence[Case]) -> None:
        """Warn about finished files of other datasets or settings; they are never deleted."""
        names, stored = {case.name for case in cases}, storage.stored_cases(self.folder)
        if strangers := sorted(stored - names):
            text = "%s holds %d cases that are no longer in the dataset, e.g. %s"
            log.warning(text, self.folder, len(strangers), strangers[0])
        entries = self.manifest.entries
        if other := [name for name in stored & names if entries.get(name, {}).get("hash") != self.digest]:
            log.warning("%s: %d cases were made with other settings and are made again", self.folder, len(other))


def _preprocess_all(job: PreprocessJob, cases: Sequence[Case], targets: Sequence[_Target], num_processes: int) -> None:
    in_pool = _pool_pays(cases, num_processes)
    outcomes = in_processes(job, cases, num_processes) if in_pool else in_threads(job, cases, 1)
    # Close before the staging folder is removed: after an error, workers still write there.
    with with_progress(outcomes, len(cases), f"preprocessing {', '.join(job.folders)}") as counted:
        for case, outcome in counted:
            for target in targets:
                result = outcome if isinstance(outcome, CaseFailure) else outcome[target.configuration]
                if isinstance(result, CaseFailure):
                    target.report.failures.append(result)
                else:
                    target.manifest.add(case.name, target.digest, target.sources(case, result))
                    target.report.done.append(case.name)


def _pool_pays(cases: Sequence[Case], num_processes: int) -> bool:
    if num_processes <= 1 or len(cases) < 2:
        return False
    return sum(file.stat().st_size for case in cases for file in case.images if file.is_file()) >= POOL_MIN_BYTES


class _Scan(NamedTuple):
    image_CDHW: np.ndarray
    properties: dict[str, Any]
    label: np.ndarray | None
    mask_1DHW: np.ndarray | None


@dataclass(frozen=True)
class PreprocessJob:
    """Work of a preprocessing worker. Plan and dataset.json are text, so each worker parses them once."""

    plans: str
    dataset_json: str
    folders: dict[str, Path]
    """Folder of each configuration."""
    stage: Path

    def __call__(self, case: Case) -> dict[str, list[list[Any]] | CaseFailure]:
        """Read a case once, then preprocess and store it for each configuration; return its source signature."""
        with unchanged(case) as signature:
            scan = self._read(case)
        self.copy_label(case)
        return {
            name: failure or signature
            for name in self.folders
            for failure in [attempt(functools.partial(self._write, scan, name), case)]
        }

    def copy_label(self, case: Case) -> None:
        """Copy the label file of a labelled case into ``gt_segmentations``, where validation expects it."""
        if case.label is not None:
            name = case.name + json.loads(self.dataset_json)["file_ending"]
            folder = next(iter(self.folders.values())).parent
            storage.copy_label(case.label, inside(folder, "gt_segmentations", name), self.stage)

    def _read(self, case: Case) -> _Scan:
        settings = self._corpus_settings(case)
        reader = reader_of(case, json.loads(self.plans)["image_reader_writer"], settings)
        image_CDHW, properties = reading.read_image(case.images, reader)
        label = None
        if case.label is not None:
            label, label_properties = reading.read_label(case.label, reader)
            dataset_json = json.loads(self.dataset_json)
            reading.check_label(label, label_properties, image_CDHW, properties, dataset_json, case.name)
        mask_1DHW = None
        if case.anonymisation_mask is not None:
            mask_1DHW, own = reading.read_mask(case.anonymisation_mask, reader)
            reading.check_mask(mask_1DHW, own, image_CDHW, properties, case.anonymisation_mask)
            mask_1DHW, _ = as_in_corpus(mask_1DHW, properties, case, {**settings, "colour": None})
        if settings:
            image_CDHW, properties = as_in_corpus(image_CDHW, properties, case, settings)
        return _Scan(image_CDHW, properties, label, mask_1DHW)

    def _corpus_settings(self, case: Case) -> dict[str, Any]:
        return json.loads(self.dataset_json).get("mfm", {}) if case.label is None else {}

    def _write(self, scan: _Scan, configuration: str, case: Case) -> None:
        channel = DatasetJson.of(json.loads(self.dataset_json)).channels[0]
        modality = case.modality or (kind_of_channel(channel) if case.label is not None else "")
        with about(case.images[0]):
            plans_manager, configuration_manager = _managers(self.plans, configuration, kind_of(modality))
            settings = self._corpus_settings(case)
            if "slices" in settings:
                scan = scan._replace(properties=at_natural_size(scan.properties, configuration_manager.spacing))
            data_CDHW, seg, properties = preprocess_case_npy(
                *scan[:3], plans_manager, configuration_manager, json.loads(self.dataset_json)
            )
            mask = scan.mask_1DHW
            if mask is not None:
                mask = preprocess_mask(mask, properties, data_CDHW.shape[1:], plans_manager, configuration_manager)
            if "slices" in settings:
                chosen = choose_slices(scan.image_CDHW, properties["bbox_used_for_cropping"][0], settings)
                data_CDHW, mask = data_CDHW[:, chosen], None if mask is None else mask[:, chosen]
        content = storage.Content(data_CDHW, seg, properties, mask)
        patch_size = tuple(configuration_manager.patch_size)
        storage.store_case(self.stage, self.folders[configuration], case.name, content, patch_size)


@functools.lru_cache(32)
def _managers(plans_text: str, configuration: str, kind: str) -> tuple[PlansManager, ConfigurationManager]:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans_manager = PlansManager(dict(Plan.of(json.loads(plans_text)).for_modality(kind).content))
    return plans_manager, plans_manager.get_configuration(configuration)


def preprocess_case_npy(
    image_CDHW: np.ndarray,
    properties: dict[str, Any],
    label: np.ndarray | None,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    dataset_json: dict[str, Any],
    require_size: Callable[[Sizes], None] = require_preprocessable,
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """Transpose, crop to the non-zero box, normalise and resample one case, as ``DefaultPreprocessor.run_case_npy``.

    ``image_CDHW`` and ``label`` (1, D, H, W) come from the reader and are not modified; ``properties`` must contain the
    reader's ``spacing`` in mm. Returns the data (float32), the label (int8 or int16, -1 outside the non-zero region;
    None without a label), and the properties with shapes, box and, for a label, ``class_locations``. ``require_size``
    is called with the shapes before resampling, and raises for a case that is too large.
    """
    order = plans_manager.transpose_forward
    _check_case(image_CDHW, properties["spacing"], order, configuration_manager)
    axes = [0, *(i + 1 for i in order)]
    spacing = [properties["spacing"][i] for i in order]
    transposed_CDHW = image_CDHW.transpose(axes)
    box = get_bbox_from_mask(find_nonzero(transposed_CDHW))
    inside = (slice(None), *bounding_box_to_slice(box))
    data_CDHW = np.array(transposed_CDHW[inside], dtype=np.float32)
    seg = None if label is None else _signed(label.transpose(axes)[inside])
    if label is not None or any(configuration_manager.use_mask_for_norm):
        seg = _mark_outside(data_CDHW, seg)
    target = _target_spacing(configuration_manager, spacing)
    new_shape = _new_shape(data_CDHW.shape[1:], spacing, target)
    own_shape = data_CDHW.shape[1:]
    is_same = not Configuration("", configuration_manager.configuration).is_resampled
    shapes = transposed_CDHW.shape[1:], own_shape, own_shape if is_same else new_shape
    require_size(Sizes(len(data_CDHW), *shapes, tuple(spacing), tuple(target)))
    properties = {
        **properties,
        "shape_before_cropping": transposed_CDHW.shape[1:],
        "bbox_used_for_cropping": box,
        "shape_after_cropping_and_before_resampling": data_CDHW.shape[1:],
    }
    _normalise(data_CDHW, seg, plans_manager, configuration_manager)
    resample = _resampler(configuration_manager, "resampling_fn_data")
    data_CDHW = resample(data_CDHW, new_shape, spacing, target)
    if label is None:
        return data_CDHW, None, properties
    seg = _resampler(configuration_manager, "resampling_fn_seg")(seg, new_shape, spacing, target)
    properties["class_locations"] = _class_locations(seg, plans_manager, dataset_json)
    return data_CDHW, seg.astype(np.int16 if seg.max() > 127 else np.int8), properties


def preprocess_mask(
    mask_1DHW: np.ndarray,
    properties: dict[str, Any],
    shape: Sequence[int],
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> np.ndarray:
    """Crop and resample a mask to the grid of its preprocessed image; boolean (1, D, H, W), as for label maps.

    ``mask_1DHW`` is on the grid of the file. ``properties`` are those that :func:`preprocess_case_npy` returned for its
    image; ``shape`` (D, H, W) is that of the data.
    """
    order = plans_manager.transpose_forward
    spacing = [properties["spacing"][i] for i in order]
    inside = (slice(None), *bounding_box_to_slice(properties["bbox_used_for_cropping"]))
    cropped_1DHW = mask_1DHW.transpose([0, *(i + 1 for i in order)])[inside].astype(np.int8)
    if not cropped_1DHW.any():
        return np.zeros((1, *shape), bool)  # resampling zeros would only cost time
    resample = _resampler(configuration_manager, "resampling_fn_seg")
    return resample(cropped_1DHW, tuple(shape), spacing, _target_spacing(configuration_manager, spacing)) > 0


def _target_spacing(configuration_manager: ConfigurationManager, spacing: Sequence[float]) -> list[float]:
    """Return the spacing in mm of the preprocessed image; 2D configurations keep the slice distance."""
    target = list(configuration_manager.spacing)
    return [*spacing[: 3 - len(target)], *target]


def _check_case(
    image_CDHW: np.ndarray, spacing: Sequence[float], order: Sequence[int], configuration_manager: ConfigurationManager
) -> None:
    """Refuse a case that does not fit the plan. ``spacing`` is the file's, ``order`` the plan's order of axes."""
    expected, num_axes = len(configuration_manager.normalization_schemes), len(configuration_manager.spacing)
    if len(image_CDHW) != expected:
        text = f"the image has {len(image_CDHW)} channels, the plan expects {expected}. Check the files."
        raise MFMError("E_CHANNELS", text)
    # nnU-Net's readers set the missing spacing of a 2D image to 999 times the others: in 3D it becomes 999 slices.
    if num_axes == 3 and spacing[0] >= 998 * max(spacing[1:]):
        raise MFMError("E_DIM", "the image is 2D, the plan's configuration is 3D. Use a 2D plan, or leave it out.")
    shape = [image_CDHW.shape[1 + i] for i in order]
    if num_axes == 2 and shape[0] > 1 and min(shape[1:]) == 1:
        raise MFMError(
            "E_DIM",
            f"in the plan's axis order it has {' x '.join(map(str, shape))} voxels, so its single slice is "
            "along another axis than in the 2D plan. Save it with its axes in the order of the others.",
        )


def find_nonzero(x_CDHW: np.ndarray) -> np.ndarray:
    """Return a mask (D, H, W) of the voxels where any channel is not zero."""
    mask_DHW = x_CDHW[0] != 0
    for channel in x_CDHW[1:]:
        mask_DHW |= channel != 0
    return mask_DHW


def _signed(label: np.ndarray) -> np.ndarray:
    """Copy a label map to a dtype that can hold its values and -1."""
    return np.array(label, dtype=np.int16 if label.max() <= np.iinfo(np.int16).max else np.int32)


def _mark_outside(data_CDHW: np.ndarray, seg: np.ndarray | None) -> np.ndarray:
    """Set label 0 to -1 outside the filled non-zero region, as nnU-Net; without a label map, start from zeros."""
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    if find_nonzero(data_CDHW).all():
        return np.zeros((1, *data_CDHW.shape[1:]), dtype=np.int8) if seg is None else seg
    # The image is already cropped, so this only fills holes and marks. A box has the same holes as the whole image.
    return crop_to_nonzero(data_CDHW, seg)[1]


def _new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    new_shape = tuple(int(n) for n in compute_new_shape(shape, spacing, target))
    if min(new_shape) < 1:
        raise MFMError(
            "E_SPACING",
            f"{tuple(shape)} voxels of {tuple(spacing)} mm become {new_shape} voxels of {tuple(target)} mm: "
            "an axis vanishes. Check the spacing in the file, or plan with a finer one.",
        )
    return new_shape


def _normalise(
    data_CDHW: np.ndarray,
    seg: np.ndarray | None,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
) -> None:
    from nnunetv2.preprocessing.normalization import default_normalization_schemes

    intensities = plans_manager.foreground_intensity_properties_per_channel
    for c, scheme in enumerate(configuration_manager.normalization_schemes):
        known = intensities.get(str(c))
        if scheme == PERCENTILES and (own := data_CDHW[c][data_CDHW[c] != 0]).size:
            np.clip(data_CDHW[c], *np.percentile(own, (0.5, 99.5)), out=data_CDHW[c])
        if scheme == CT and not known:
            raise MFMError("E_CONFIG", f"the plan has no intensities of channel {c}, and {CT} needs them. Plan again.")
        normaliser = getattr(default_normalization_schemes, Z_SCORE if scheme == PERCENTILES else scheme)(
            use_mask_for_norm=configuration_manager.use_mask_for_norm[c], intensityproperties=known
        )
        data_CDHW[c] = normaliser.run(data_CDHW[c], None if seg is None else seg[0])


def _resampler(configuration_manager: ConfigurationManager, name: str) -> Callable[..., np.ndarray]:
    settings = configuration_manager.configuration
    return resampling_function(settings[name], settings[f"{name}_kwargs"])


def _class_locations(seg: np.ndarray, plans_manager: PlansManager, dataset_json: dict[str, Any]) -> dict[Any, Any]:
    """Sample voxels of each label or region, from which nnU-Net's loader draws foreground patches."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    manager = plans_manager.get_label_manager(dataset_json)
    wanted = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
    if manager.has_ignore_label:
        # In sparsely annotated images, patches may come from any annotated voxel, background included.
        wanted.append([-1, *manager.all_labels])
    return DefaultPreprocessor._sample_foreground_locations(seg, wanted)
