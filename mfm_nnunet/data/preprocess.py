"""From files to what training reads: cropped, normalised, resampled volumes in nnU-Net's own file formats.

The arrays equal those of nnU-Net; the loop around them differs. Labels are
optional. One bad case costs no other. Each case appears whole and is then noted in a manifest, so a killed run goes on
where it was and a changed source is done again. Nothing that another plan uses is deleted.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask

from mfm_nnunet.data import storage
from mfm_nnunet.data.cases import check_case_name
from mfm_nnunet.data.loops import in_processes, in_threads, source_signature, unchanged, with_progress
from mfm_nnunet.data.resampling import resampling_function
from mfm_nnunet.data.sizes import Sizes, require_preprocessable
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, MFMError, about, nearest
from mfm_nnunet.files import inside, to_plain
from mfm_nnunet.images import reading
from mfm_nnunet.images.geometry import difference, geometry_of
from mfm_nnunet.plan import Plan, is_resampled, preprocessor_problem
from mfm_nnunet.plan_rules import CT

if TYPE_CHECKING:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    from mfm_nnunet.data.cases import Case

POOL_MIN_BYTES = 20_000_000
"""Source files below this size in all are done in this process: a started worker costs seconds of imports."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessReport:
    """Names of the cases done now and of those reused from an earlier run, and the cases that failed."""

    done: list[str]
    reused: list[str]
    failures: list[CaseFailure]


def preprocess_dataset(
    cases: Sequence[Case],
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    preprocessed_folder: Path,
    num_processes: int = 1,
) -> PreprocessReport:
    """Preprocess ``cases`` into ``preprocessed_folder/<data_identifier>/`` and say what was done, reused and refused.

    A case is reused when the manifest beside that folder shows it finished from the same sources with the same
    settings. Labels are copied to ``gt_segmentations/``; masks go beside the folder .
    Raises MFMError: E_CONFIG (unknown configuration, a foreign preprocessor), E_DISK_FULL (finished cases are kept; run
    again to go on).
    """
    if configuration not in plans["configurations"]:
        raise MFMError(
            "E_CONFIG",
            f"the plan has no configuration '{configuration}'. {nearest(configuration, plans['configurations'])}",
        )
    if problem := preprocessor_problem(plans, configuration):
        raise MFMError("E_CONFIG", f"{problem} Preprocess with the program that the plan is from, or plan here.")
    settings_hash = preprocessing_hash(plans, configuration, dataset_json)
    folder = inside(Path(preprocessed_folder), Plan.of(plans).configuration(configuration).data_identifier)
    with storage.full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    manifest = storage.Manifest.read(folder)
    reused = [case for case in cases if _is_finished(case, manifest, settings_hash)]
    names = {case.name for case in reused}
    todo = [case for case in cases if case.name not in names]
    _warn_of_others(folder, cases, manifest, settings_hash)
    failures: dict[str, CaseFailure] = {}
    with storage.staging_folder(folder.parent) as staging:
        job = Job(json.dumps(to_plain(plans)), configuration, json.dumps(to_plain(dataset_json)), folder, staging)
        for case in reused:
            job.copy_label(case)
        in_pool = _pool_pays(todo, num_processes)
        outcomes = in_processes(job, todo, num_processes) if in_pool else in_threads(job, todo, 1)
        # Closed before the staging folder goes: on an error workers are still writing there.
        with with_progress(outcomes, len(todo), f"preprocessing {configuration}") as counted:
            for case, outcome in counted:
                if isinstance(outcome, CaseFailure):
                    failures[case.name] = outcome
                else:
                    manifest.add(case.name, settings_hash, outcome)
    return PreprocessReport(
        done=[case.name for case in todo if case.name not in failures],
        reused=[case.name for case in reused],
        failures=[failures[case.name] for case in todo if case.name in failures],
    )


def preprocessing_hash(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> str:
    """sha256 over everything that the preprocessed arrays and properties depend on, apart from the files."""
    return Plan.of(plans).preprocessing_digest(configuration, DatasetJson.of(dataset_json))


@dataclass(frozen=True)
class Job:
    """What a worker needs to do a case; plan and dataset.json travel as text, so each worker parses them once."""

    plans: str
    configuration: str
    dataset_json: str
    folder: Path
    staging: Path

    def __call__(self, case: Case) -> list[list[Any]]:
        """Read, preprocess and store one case; returns the signature of its source files. Raises MFMError."""
        check_case_name(case.name)
        with unchanged(case) as signature:
            content, patch_size = self._prepared(case)
        self.copy_label(case)
        storage.write_case(self.staging, self.folder, case.name, content, patch_size)
        return signature

    def _prepared(self, case: Case) -> tuple[storage.Content, tuple[int, ...]]:
        """Read and preprocess one case; returns it with the patch that it is stored for."""
        plans_manager, configuration_manager = _managers(self.plans, self.configuration)
        dataset_json, reader = json.loads(self.dataset_json), plans_manager.plans["image_reader_writer"]
        image_CDHW, properties = reading.read_image(case.images, reader)
        label = None
        if case.label is not None:
            label, label_properties = reading.read_label(case.label, reader)
            reading.check_label(label, label_properties, image_CDHW, properties, dataset_json, case.name)
        mask = _read_mask(case, reader, image_CDHW, properties)
        with about(case.images[0]):
            data_CDHW, seg, properties = preprocess_case_npy(
                image_CDHW, properties, label, plans_manager, configuration_manager, dataset_json
            )
            if mask is not None:
                shape = data_CDHW.shape[1:]
                mask = preprocess_mask(mask, properties, shape, plans_manager, configuration_manager)
        return storage.Content(data_CDHW, seg, properties, mask), tuple(configuration_manager.patch_size)

    def copy_label(self, case: Case) -> None:
        """Put the label file of a labelled case into ``gt_segmentations``, where validation looks for it."""
        if case.label is not None:
            name = case.name + json.loads(self.dataset_json)["file_ending"]
            storage.copy_label(case.label, inside(self.folder.parent, "gt_segmentations", name), self.staging)


def _read_mask(
    case: Case, reader_name: str, image_CDHW: np.ndarray, properties: Mapping[str, Any]
) -> np.ndarray | None:
    """Return the mask of anonymised voxels, boolean (1, D, H, W), True where the file holds more than 0."""
    if case.anonymisation_mask is None:
        return None
    mask_1DHW, own = reading.read_mask(case.anonymisation_mask, reader_name)
    differs = difference(geometry_of(own), geometry_of(properties))
    if mask_1DHW.shape[1:] != image_CDHW.shape[1:]:
        differs = f"{mask_1DHW.shape[1:]} against {image_CDHW.shape[1:]} voxels"
    if differs:
        raise MFMError(
            "E_GEOMETRY",
            f"{case.anonymisation_mask}: the mask does not lie on the grid of its image {case.images[0]}: {differs}. "
            "Resample it to the image, or take it out of the source.",
        )
    return mask_1DHW


@functools.lru_cache(2)
def _managers(plans_text: str, configuration: str) -> tuple[PlansManager, ConfigurationManager]:
    """nnU-Net's views of a plan, on a copy of it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans_manager = PlansManager(json.loads(plans_text))
    return plans_manager, plans_manager.get_configuration(configuration)


def _is_finished(case: Case, manifest: storage.Manifest, settings_hash: str) -> bool:
    try:
        return manifest.holds(case.name, settings_hash, source_signature(case))
    except MFMError:
        # A source that cannot be read is reported when its turn comes.
        return False


def _pool_pays(cases: Sequence[Case], num_processes: int) -> bool:
    if num_processes <= 1 or len(cases) < 2:
        return False
    sizes = (file.stat().st_size for case in cases for file in case.images if file.is_file())
    return sum(sizes) >= POOL_MIN_BYTES


def _warn_of_others(folder: Path, cases: Sequence[Case], manifest: storage.Manifest, settings_hash: str) -> None:
    """Say which finished files do not belong to this run; they are never deleted."""
    names, stored = {case.name for case in cases}, storage.stored_cases(folder)
    strangers = sorted(stored - names)
    if strangers:
        log.warning("%s holds %d cases that the dataset has no more, e.g. %s", folder, len(strangers), strangers[0])
    other = [n for n in stored & names if manifest.entries.get(n, {}).get("hash") != settings_hash]
    if other:
        log.warning("%s: %d cases were made with other settings and are made again", folder, len(other))


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

    ``image_CDHW`` and ``label`` (1, D, H, W) come from the reader and are not changed; ``properties`` must hold the
    reader's ``spacing`` in mm. Returns data float32, label int8 or int16 with -1 outside the non-zero region (None
    without a label), and the properties with shapes, box and, for a label, ``class_locations``. ``require_size`` is
    called with the shapes before anything is resampled, and raises for a case that is too large.
    Raises MFMError: E_CHANNELS, E_DIM (a 2D image for a 3D configuration, slices across the plan's), E_LABEL_GEOMETRY,
    E_SPACING (an axis would vanish), E_TOO_LARGE.
    """
    _check_case(image_CDHW, label, configuration_manager)
    _refuse_flat(properties["spacing"], configuration_manager.spacing)
    order = plans_manager.transpose_forward
    _refuse_lines([image_CDHW.shape[1 + i] for i in order], configuration_manager.spacing)
    axes = [0, *(i + 1 for i in order)]
    spacing = [properties["spacing"][i] for i in order]
    transposed_CDHW = image_CDHW.transpose(axes)
    box = get_bbox_from_mask(_nonzero(transposed_CDHW))
    inside = (slice(None), *bounding_box_to_slice(box))
    data_CDHW = np.array(transposed_CDHW[inside], dtype=np.float32)
    seg = None if label is None else _signed(label.transpose(axes)[inside])
    if label is not None or any(configuration_manager.use_mask_for_norm):
        seg = _mark_outside(data_CDHW, seg)
    target = _target_spacing(configuration_manager, spacing)
    new_shape = _new_shape(data_CDHW.shape[1:], spacing, target)
    own_shape = data_CDHW.shape[1:]
    is_same = not is_resampled(configuration_manager.configuration)
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
    """A mask on the grid of its preprocessed image: boolean (1, D, H, W), nothing but inside and outside.

    ``mask_1DHW`` is on the grid of the file; ``properties`` are those that :func:`preprocess_case_npy` returned for its
    image and ``shape`` (D, H, W) is the shape of the data. Resampled as nnU-Net resamples label maps.
    """
    order = plans_manager.transpose_forward
    spacing = [properties["spacing"][i] for i in order]
    inside = (slice(None), *bounding_box_to_slice(properties["bbox_used_for_cropping"]))
    cropped_1DHW = mask_1DHW.transpose([0, *(i + 1 for i in order)])[inside].astype(np.int8)
    if not cropped_1DHW.any():
        return np.zeros((1, *shape), bool)  # resampling would only cost time
    resample = _resampler(configuration_manager, "resampling_fn_seg")
    return resample(cropped_1DHW, tuple(shape), spacing, _target_spacing(configuration_manager, spacing)) > 0


def _target_spacing(configuration_manager: ConfigurationManager, spacing: Sequence[float]) -> list[float]:
    """Spacing in mm of the preprocessed image; 2D configurations leave the distance between slices as it is."""
    target = list(configuration_manager.spacing)
    return [*spacing[: 3 - len(target)], *target]


def _check_case(image_CDHW: np.ndarray, label: np.ndarray | None, configuration_manager: ConfigurationManager) -> None:
    expected = len(configuration_manager.normalization_schemes)
    if len(image_CDHW) != expected:
        raise MFMError(
            "E_CHANNELS", f"the image has {len(image_CDHW)} channels, the plan expects {expected}. Check the files."
        )
    if label is not None and label.shape[1:] != image_CDHW.shape[1:]:
        raise MFMError(
            "E_LABEL_GEOMETRY",
            f"the label has {label.shape[1:]} voxels, the image {image_CDHW.shape[1:]}. They must be of one grid.",
        )


def _refuse_flat(spacing: Sequence[float], target: Sequence[float]) -> None:
    """nnU-Net's readers give the missing axis of a 2D image 999 times its spacing: in 3D it would become 999 slices."""
    if len(target) == 3 and spacing[0] >= 998 * max(spacing[1:]):
        raise MFMError("E_DIM", "the image is 2D, the plan's configuration is 3D. Use a 2D plan, or leave it out.")


def _refuse_lines(shape: Sequence[int], target: Sequence[float]) -> None:
    """Refuse a single slice that a 2D configuration would cut into lines; ``shape`` is in the plan's axis order."""
    if len(target) == 2 and shape[0] > 1 and min(shape[1:]) == 1:
        raise MFMError(
            "E_DIM",
            f"in the plan's axis order it has {' x '.join(map(str, shape))} voxels, so its single slice lies "
            "across those of the 2D plan, which would see lines. Save it with its axes in the order of the others.",
        )


def _nonzero(x_CDHW: np.ndarray) -> np.ndarray:
    """Where any channel is not zero."""
    mask_DHW = x_CDHW[0] != 0
    for channel in x_CDHW[1:]:
        mask_DHW |= channel != 0
    return mask_DHW


def _signed(label: np.ndarray) -> np.ndarray:
    """A copy of a label map whose dtype can hold its values and -1."""
    return np.array(label, dtype=np.int16 if label.max() <= np.iinfo(np.int16).max else np.int32)


def _mark_outside(data_CDHW: np.ndarray, seg: np.ndarray | None) -> np.ndarray:
    """The label map (zeros without one) with -1 where it is 0 outside the filled non-zero region, as in nnU-Net."""
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    if _nonzero(data_CDHW).all():
        return np.zeros((1, *data_CDHW.shape[1:]), dtype=np.int8) if seg is None else seg
    # The box is taken already, so this only fills holes and marks; holes in a box are those in the whole image.
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
    """Normalise each channel in place with nnU-Net's scheme."""
    intensities = plans_manager.foreground_intensity_properties_per_channel
    for c, scheme in enumerate(configuration_manager.normalization_schemes):
        known = intensities.get(str(c))
        if scheme == CT and not known:
            raise MFMError("E_CONFIG", f"the plan has no intensities of channel {c}, and {CT} needs them. Plan again.")
        normaliser = _normaliser_class(scheme)(
            use_mask_for_norm=configuration_manager.use_mask_for_norm[c], intensityproperties=known
        )
        data_CDHW[c] = normaliser.run(data_CDHW[c], None if seg is None else seg[0])


@functools.lru_cache(16)
def _normaliser_class(scheme: str) -> type[ImageNormalization]:
    """nnU-Net's class of that name; found once, because nnU-Net imports a whole package for every look."""
    from nnunetv2.preprocessing import normalization
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    found = recursive_find_python_class(normalization.__path__[0], scheme, normalization.__name__)
    if found is None:
        raise MFMError("E_CONFIG", f"the plan names the normalisation '{scheme}', which nnU-Net does not have.")
    return found


def _resampler(configuration_manager: ConfigurationManager, name: str) -> Callable[..., np.ndarray]:
    settings = configuration_manager.configuration
    return resampling_function(settings[name], settings[f"{name}_kwargs"])


def _class_locations(seg: np.ndarray, plans_manager: PlansManager, dataset_json: dict[str, Any]) -> dict[Any, Any]:
    """Voxels of each label or region, from which nnU-Net's loader draws foreground patches."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    manager = plans_manager.get_label_manager(dataset_json)
    wanted = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
    if manager.has_ignore_label:
        # Patches of sparsely annotated images come from where there is any annotation, background included.
        wanted.append([-1, *manager.all_labels])
    return DefaultPreprocessor._sample_foreground_locations(seg, wanted)
