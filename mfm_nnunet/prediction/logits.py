"""Resample logits from the plan's grid and turn them into a mask on the image's grid.

The mask equals that of nnU-Net's ``convert_predicted_logits_to_segmentation_with_correct_shape`` voxel for voxel, but
classes are resampled one at a time, so memory does not grow with their number.

nnU-Net interpolates in float64 and rounds to half precision before it takes the argmax. Our separable interpolation
differs by 1e-15. This changes the rounding of values exactly between two half-precision numbers (about one in two
thousand). So voxels whose two best classes are that close are computed again with nnU-Net's interpolation. Legend: K
classes or regions; D H W voxels, in the plan's axis order until the mask is done.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from mfm_nnunet.data.resampling import resample_image

VOXELS_AT_ONCE = 1 << 20
"""Number of close voxels computed together; bounds the memory."""


def logits_to_mask(
    logits_KDHW: torch.Tensor,
    properties: dict,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
) -> np.ndarray:
    """Return the mask on the original image's grid, in the reader's axes; uint8, or uint16 for many labels.

    ``logits_KDHW`` are on the plan's grid (CPU, as returned by the predictor). ``properties`` come from preprocessing.
    """
    resampled = ResampledLogits(logits_KDHW, properties, plans_manager, configuration_manager)
    decide = _paint_regions if label_manager.has_regions else _argmax
    labels = decide(resampled, label_manager)
    return _uncrop(labels, properties).transpose(plans_manager.transpose_backward)


def logits_to_probabilities(
    logits_KDHW: torch.Tensor,
    properties: dict,
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    label_manager: LabelManager,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of :func:`logits_to_mask` and the probabilities (K, D, H, W) float32 on the same grid.

    All classes are resampled at once with nnU-Net's own function, so both equal stock nnU-Net's bit for bit. The mask
    is computed from the probabilities, as nnU-Net does when it saves them.
    """
    grid = _grid(properties, plans_manager, configuration_manager)
    resampled = configuration_manager.resampling_fn_probabilities(logits_KDHW.numpy(), *grid)
    probabilities = label_manager.apply_inference_nonlin(resampled)
    labels = label_manager.convert_probabilities_to_segmentation(probabilities).numpy().astype(_dtype(label_manager))
    mask = _uncrop(labels, properties).transpose(plans_manager.transpose_backward)
    probabilities = label_manager.revert_cropping_on_probabilities(
        probabilities, properties["bbox_used_for_cropping"], properties["shape_before_cropping"]
    ).numpy()
    return mask, probabilities.transpose([0, *(axis + 1 for axis in plans_manager.transpose_backward)])


class ResampledLogits:
    """Logits on the image's cropped grid, one class at a time, in float32 with nnU-Net's rounding to half precision."""

    def __init__(
        self,
        logits_KDHW: torch.Tensor,
        properties: dict,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
    ) -> None:
        self.logits_KDHW = logits_KDHW.numpy()
        self.grid = _grid(properties, plans_manager, configuration_manager)
        self.stock = configuration_manager.resampling_fn_probabilities
        settings = configuration_manager.configuration
        kwargs = dict(settings["resampling_fn_probabilities_kwargs"])
        separate = determine_do_sep_z_and_axis(kwargs.get("force_separate_z", False), *self.grid[1:])
        self.slice_axis: int | None = separate[1] if separate[0] else None
        self.kwargs = {"force_separate_z": False, **kwargs}
        is_linear = kwargs.get("order", 3) == 1 and not kwargs.get("is_seg", False) and kwargs.get("order_z", 0) == 0
        is_ours = settings["resampling_fn_probabilities"] == "resample_data_or_seg_to_shape" and is_linear
        is_same = self.logits_KDHW.shape[1:] == tuple(self.grid[0])
        self.is_fast = is_ours and not is_same and set(kwargs) <= {"is_seg", "order", "order_z", "force_separate_z"}
        """True if values may be off by one step of half precision; :meth:`exactly` gives nnU-Net's own."""

    def __len__(self) -> int:
        return len(self.logits_KDHW)

    def __getitem__(self, k: int) -> np.ndarray:
        """Return the logits (D, H, W) of class ``k``."""
        channel = self.logits_KDHW[k : k + 1]
        if not self.is_fast:
            return np.array(self.stock(channel, *self.grid)[0], np.float32)
        return self._rounded(resample_image(channel.astype(np.float64), *self.grid, **self.kwargs)[0])

    def exactly(self, k: int, at: tuple[np.ndarray, ...]) -> np.ndarray:
        """Return the logits (V,) of class ``k`` at the voxels ``at``, computed like nnU-Net."""
        sizes = zip(self.logits_KDHW.shape[1:], self.grid[0], at)
        neighbours = [_neighbours(n, m, index, axis == self.slice_axis) for axis, (n, m, index) in enumerate(sizes)]
        channel = self.logits_KDHW[k].astype(np.float64)
        values = np.zeros(len(at[0]))
        # Corners and products are in the order of SciPy's zoom, so the result is identical to the last bit.
        for corner in itertools.product(*neighbours):
            term = channel[tuple(index for index, _ in corner)]
            for _, weight in corner:
                term = term * weight
            values += term
        return self._rounded(values)

    def _rounded(self, values: np.ndarray) -> np.ndarray:
        return values.astype(self.logits_KDHW.dtype).astype(np.float32)


def _argmax(resampled: ResampledLogits, label_manager: LabelManager) -> np.ndarray:
    """Return the class with the largest logit; among equal ones the first, like np.argmax."""
    best = resampled[0]
    second = np.full_like(best, -np.inf)
    labels = np.zeros(best.shape, _dtype(label_manager))
    for k in range(1, len(resampled)):
        channel = resampled[k]
        if resampled.is_fast:
            np.maximum(second, np.minimum(best, channel), out=second)
        better = channel > best
        np.copyto(best, channel, where=better)
        labels[better] = k
    if resampled.is_fast:
        # Two steps of half precision, which has 2**10 steps per factor of two; 2**-24 is its smallest number.
        close = np.flatnonzero(best - second <= np.maximum(np.abs(best), np.abs(second)) * 2.0**-9 + 2.0**-23)
        for start in range(0, len(close), VOXELS_AT_ONCE):
            some = close[start : start + VOXELS_AT_ONCE]
            at = np.unravel_index(some, labels.shape)
            labels.flat[some] = np.stack([resampled.exactly(k, at) for k in range(len(resampled))]).argmax(0)
    return labels


def _paint_regions(resampled: ResampledLogits, label_manager: LabelManager) -> np.ndarray:
    """Paint the regions in ``regions_class_order``, each where its probability exceeds one half."""
    labels = np.zeros(resampled.grid[0], _dtype(label_manager))
    for k, label in enumerate(label_manager.regions_class_order):
        labels[(label_manager.apply_inference_nonlin(resampled[k]) > 0.5).numpy()] = label
    return labels


def _grid(
    properties: dict, plans_manager: PlansManager, configuration_manager: ConfigurationManager
) -> tuple[tuple[int, ...], list[float], list[float]]:
    """Return the shape of the cropped image, the spacing of the logits and the spacing of the image."""
    shape = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    spacing = [properties["spacing"][axis] for axis in plans_manager.transpose_forward]
    current = list(configuration_manager.spacing)
    # A 2d plan keeps the spacing between slices.
    return shape, current if len(current) == len(shape) else [spacing[0], *current], spacing


def _neighbours(n: int, m: int, index: np.ndarray, is_sliced: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return positions and weights on an axis of ``n`` voxels for interpolating voxels ``index`` (V,) of ``m``.

    Slices are picked and not interpolated; half goes to the upper one.
    """
    place = (index + 0.5) * (n / m) - 0.5
    low = np.floor(place + 0.5 if is_sliced else place)
    share = place - low
    corners = [(low, np.ones(len(index)))] if is_sliced else [(low, 1 - share), (low + 1, share)]
    return [(np.clip(position, 0, n - 1).astype(np.intp), weight) for position, weight in corners]


def _dtype(label_manager: LabelManager) -> type[np.unsignedinteger]:
    largest = max([*label_manager.all_labels, *(label_manager.regions_class_order or [])])
    return np.uint8 if len(label_manager.foreground_labels) < 255 and largest < 256 else np.uint16


def _uncrop(labels: np.ndarray, properties: dict) -> np.ndarray:
    whole = np.zeros(properties["shape_before_cropping"], labels.dtype)
    return insert_crop_into_image(whole, labels, properties["bbox_used_for_cropping"])
