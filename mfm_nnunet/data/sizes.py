"""Estimate the memory of a case on the plan's grid from shapes, before anything is resampled.

A 65 kB file whose header says 20 mm becomes half a billion voxels for a model of 1 mm. The sums below follow the arrays
that the modules ``data.preprocess``, ``prediction.model`` and ``prediction.export`` hold at the same time;
``tests/prediction/test_sizes.py`` compares them with the peak of a real process. Libraries, weights, and a second case
prepared in the background need memory on top, so a refused case is certain to fail. Legend: C channels, K classes;
voxels as D H W in the plan's axis order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from mfm_nnunet.device import require_memory
from mfm_nnunet.errors import MFMError

MAX_GROWTH = 1000
"""Limit of voxels after resampling per voxel of the file: 10 mm cubes that become 1 mm cubes."""
GROWTH_MATTERS_FROM = 1 << 24
"""Number of voxels after resampling (256^3) below which any growth is cheap."""
MAX_WINDOWS = 100_000
"""Limit of sliding-window positions per case; a whole-body CT at 1 mm has about 1,000 with a patch of 128^3."""


@dataclass(frozen=True)
class Sizes:
    """Shapes of a case before cropping, after cropping and after resampling, and its spacings in mm."""

    num_channels: int
    whole: tuple[int, ...]
    cropped: tuple[int, ...]
    resampled: tuple[int, ...]
    spacing: tuple[float, ...]
    target_spacing: tuple[float, ...]


def require_preprocessable(sizes: Sizes) -> None:
    """Raise MFMError (E_TOO_LARGE) if a case cannot be preprocessed in the available memory."""
    before, after = math.prod(sizes.cropped), math.prod(sizes.resampled)
    if after > MAX_GROWTH * before and after > GROWTH_MATTERS_FROM:
        raise MFMError("E_TOO_LARGE", f"{_becomes(sizes)}: {after / before:.0f} for each voxel of the file. {_ADVICE}")
    require_memory(preprocessing_bytes(sizes), f"{_becomes(sizes)}, which", _ADVICE)


def require_predictable(
    sizes: Sizes, num_classes: int, num_windows: int, *, num_folds: int = 1, probabilities: bool = False
) -> None:
    """Raise MFMError (E_TOO_LARGE) if a case cannot be predicted in the available memory and acceptable time."""
    require_preprocessable(sizes)
    if num_windows > MAX_WINDOWS:
        raise MFMError(
            "E_TOO_LARGE",
            f"{_becomes(sizes)}: the network would process {num_windows:,} windows, which takes days; the "
            f"maximum is {MAX_WINDOWS:,}. {_ADVICE}",
        )
    require_memory(prediction_bytes(sizes, num_classes, num_folds, probabilities), f"{_becomes(sizes)}, which", _ADVICE)


def preprocessing_bytes(sizes: Sizes) -> int:
    """Return the peak memory of a case, in bytes, while it is cropped, normalised and resampled."""
    whole, cropped, resampled = (math.prod(shape) for shape in (sizes.whole, sizes.cropped, sizes.resampled))
    read = 4 * sizes.num_channels * (whole + cropped)
    if sizes.cropped == sizes.resampled:
        return read + 4 * cropped  # a copy of one channel, to normalise it
    results = 4 * sizes.num_channels * resampled
    return read + max(results + 8 * (cropped + resampled), results - 4 * resampled + _spline_bytes(sizes))


def prediction_bytes(sizes: Sizes, num_classes: int, num_folds: int = 1, probabilities: bool = False) -> int:
    """Return the peak memory of a case, in bytes, while it is preprocessed, predicted and resampled back."""
    cropped, resampled = math.prod(sizes.cropped), math.prod(sizes.resampled)
    image = 4 * sizes.num_channels * resampled
    logits = 2 * num_classes * resampled
    # The window sums of a fold beside the sum over folds, and the weights of the windows.
    sliding = image + logits * min(num_folds, 2) + 2 * resampled
    if sizes.cropped == sizes.resampled:
        back = 9 * cropped  # labels and the logits of two classes, float32
    elif probabilities:
        back = max(8 * num_classes * resampled, 10 * num_classes * cropped)  # all classes at once
    else:
        back = max(8 * resampled + 17 * cropped, 33 * cropped)  # a class in float64, then the close ones are compared
    return max(preprocessing_bytes(sizes), sliding, image + logits + back)


def count_windows(shape: Sequence[int], patch_size: Sequence[int], step_size: float) -> int:
    """Return the number of sliding-window positions; a 2D patch visits each slice of the first axis."""
    slices = math.prod(shape[: len(shape) - len(patch_size)])
    return slices * math.prod(
        math.ceil(max(size - patch, 0) / (patch * step_size)) + 1
        for size, patch in zip(shape[-len(patch_size) :], patch_size)
    )


def sliding_windows(shape: Sequence[int], patch_size: tuple[int, ...], step_size: float) -> list[tuple[Any, ...]]:
    """Return the index of each window, in nnU-Net's order; a 2D patch visits each slice of the first axis."""
    steps = compute_steps_for_sliding_window(tuple(shape[-len(patch_size) :]), patch_size, step_size)
    slices = [[slice(start, start + size) for start in starts] for starts, size in zip(steps, patch_size)]
    leading = [range(size) for size in shape[: len(shape) - len(patch_size)]]
    return list(itertools.product(*leading, *slices))


_ADVICE = "Check the voxel size in its header and crop the image, or take a plan or model with larger voxels."


def _spline_bytes(sizes: Sizes) -> int:
    """Return the float64 bytes for resizing one channel axis by axis, the largest reduction first."""
    shape, peak = list(sizes.cropped), 0
    original = before = math.prod(shape)
    for axis in sorted(range(3), key=lambda i: sizes.resampled[i] / sizes.cropped[i]):
        shape[axis] = sizes.resampled[axis]
        after = math.prod(shape)
        peak = max(peak, (original if before != original else 0) + before + after)
        before = after
    return 8 * peak


def _becomes(sizes: Sizes) -> str:
    """Describe the resampling of a case, as the beginning of a sentence."""
    if sizes.cropped == sizes.resampled:
        return f"it has {_by(sizes.cropped)} voxels"
    return (
        f"its {_by(sizes.cropped)} voxels of {_by(sizes.spacing)} mm become {_by(sizes.resampled)} of "
        f"{_by(sizes.target_spacing)} mm"
    )


def _by(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.4g}" if value < 1000 else f"{value:.0f}" for value in values)
