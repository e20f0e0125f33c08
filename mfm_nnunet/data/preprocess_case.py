"""One case from the voxels of its file to the voxels that a network sees: crop, normalise, resample.

The arrays equal those of nnU-Net's ``DefaultPreprocessor.run_case_npy`` (label maps and properties exactly, images up
to rounding). Shapes: C channels, D H W voxels; as read from the file at first, then in the plan's axis order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask

from mfm_nnunet.data.resampling import resampling_function
from mfm_nnunet.data.sizes import Sizes, require_preprocessable
from mfm_nnunet.errors import MFMError
from mfm_nnunet.plan import is_resampled
from mfm_nnunet.plan_rules import CT

if TYPE_CHECKING:
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager


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
