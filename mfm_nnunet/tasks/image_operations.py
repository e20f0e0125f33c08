"""Operations on crops shared by pretext tasks: resizing, contrast, noise, rotation, boxes. NumPy, seeded.

Legend: C channels, D H W voxels; in 2D there is no D. All images are float32. A plane is a pair of image axes, empty
for no rotation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import scipy.ndimage

JITTER = {
    "noise": 0.1,
    "blur": 0.2,
    "brightness": 0.15,
    "contrast": 0.15,
    "low resolution": 0.25,
    "inverted gamma": 0.1,
    "gamma": 0.3,
}
"""Probability per crop of each step of :func:`jitter`, in order of application, as in OpenMind's Volume Fusion."""


def resize_linear(x_CDHW: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize linearly to ``size`` voxels per axis; first and last voxels stay in place, as in scipy's zoom."""
    for axis, (before, after) in enumerate(zip(x_CDHW.shape[1:], size), start=1):
        if before != after:
            position = np.linspace(0, before - 1, after)
            lower = np.minimum(position.astype(int), max(before - 2, 0))
            weight = (position - lower).astype(np.float32).reshape(-1, *[1] * (x_CDHW.ndim - 1 - axis))
            first = x_CDHW.take(lower, axis)
            x_CDHW = first + weight * (x_CDHW.take(np.minimum(lower + 1, before - 1), axis) - first)
    return x_CDHW


def map_percentiles(x_CDHW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map each channel to [0, 1]: below percentile ``low`` to [0, 0.1), up to ``high`` to [0.1, 0.9], then to (0.9, 1].

    A constant channel becomes 0. A channel that is constant between the percentiles (air with a rim of tissue) is
    mapped linearly from its minimum and maximum.
    """
    return np.stack([_map_percentiles(channel, low, high) for channel in x_CDHW])


def _map_percentiles(x: np.ndarray, low: float, high: float) -> np.ndarray:
    minimum, lower, upper, maximum = np.percentile(x, [0, low, high, 100]).astype(np.float32)
    if maximum - minimum < 1e-6:
        return np.zeros_like(x)
    if upper - lower < 1e-6:
        return (x - minimum) / (maximum - minimum)
    mapped = 0.1 + 0.8 * (x - lower) / (upper - lower)
    is_low, is_high = x < lower, x > upper
    mapped[is_low] = 0.1 * (x[is_low] - minimum) / (lower - minimum)
    mapped[is_high] = 0.9 + 0.1 * (x[is_high] - upper) / (maximum - upper)
    return mapped.astype(np.float32)


def apply_gamma(x_CDHW: np.ndarray, exponent: float) -> np.ndarray:
    """Apply gamma correction to each channel, keeping its range."""
    axes = tuple(range(1, x_CDHW.ndim))
    minimum = x_CDHW.min(axes, keepdims=True)
    extent = x_CDHW.max(axes, keepdims=True) - minimum
    return ((x_CDHW - minimum) / np.maximum(extent, 1e-6)) ** np.float32(exponent) * extent + minimum


def standardise(x_CDHW: np.ndarray) -> np.ndarray:
    """Scale each channel to mean 0 and standard deviation 1; constant channels become 0."""
    axes = tuple(range(1, x_CDHW.ndim))
    centred = x_CDHW - x_CDHW.mean(axes, keepdims=True)
    return centred / np.maximum(centred.std(axes, keepdims=True), 1e-6)


def jitter(x_CDHW: np.ndarray, rng: np.random.Generator, chances: Mapping[str, float] = JITTER) -> np.ndarray:
    """Apply nnU-Net's intensity augmentation to a normalised image; ``chances`` has the keys and order of JITTER.

    Strengths are drawn per channel. Changes ``x_CDHW`` in place and returns it.
    """
    fires = dict(zip(chances, rng.random(len(chances)) < list(chances.values())))
    for channel in x_CDHW:
        if fires["noise"]:
            channel += rng.uniform(0, 0.1) * rng.standard_normal(channel.shape, np.float32)
        if fires["blur"]:
            channel[...] = scipy.ndimage.gaussian_filter(channel, rng.uniform(0.5, 1))
        if fires["brightness"]:
            channel *= rng.uniform(0.75, 1.25)
        if fires["contrast"]:
            mean, minimum, maximum = channel.mean(), channel.min(), channel.max()
            channel[...] = ((channel - mean) * rng.uniform(0.75, 1.25) + mean).clip(minimum, maximum)
        if fires["low resolution"]:
            channel[...] = _lower_resolution(channel, rng.uniform(0.5, 1))
        if fires["inverted gamma"]:
            channel[...] = -_gamma_keeping_moments(-channel, rng.uniform(0.7, 1.5))
        if fires["gamma"]:
            channel[...] = _gamma_keeping_moments(channel, rng.uniform(0.7, 1.5))
    return x_CDHW


def _lower_resolution(x: np.ndarray, scale: float) -> np.ndarray:
    """Downsample with nearest neighbours and upsample with cubic splines."""
    coarse = [max(1, round(size * scale)) for size in x.shape]
    down = [np.minimum((np.arange(n) + 0.5) * size / n, size - 1).astype(int) for n, size in zip(coarse, x.shape)]
    factors = [size / n for n, size in zip(coarse, x.shape)]
    return scipy.ndimage.zoom(x[np.ix_(*down)], factors, order=3, mode="nearest", grid_mode=True)


def _gamma_keeping_moments(x: np.ndarray, exponent: float) -> np.ndarray:
    corrected = apply_gamma(x[None], exponent)[0]
    return (corrected - corrected.mean()) / max(corrected.std(), 1e-6) * x.std() + x.mean()


UNIT_KNOTS = (0.0, 0.005, 0.995, 1.0)
"""Positions in [0, 1] of the percentiles 0, 0.5, 99.5 and 100; each tail gets its share of voxels."""

CURVE_POINTS = 1024


def intensity_knots(x_DHW: np.ndarray) -> np.ndarray:
    """Measure the intensities (4,) of one channel at UNIT_KNOTS. Interpolation gives an invertible map to [0, 1].

    Outliers do not compress the other values and are not cut off. If nearly all voxels are equal (air with a rim of
    tissue), the map is linear from minimum to maximum.
    """
    knots = np.percentile(x_DHW, [100 * knot for knot in UNIT_KNOTS])
    is_flat = knots[2] - knots[1] < 1e-6
    return knots[0] + np.asarray(UNIT_KNOTS) * (knots[3] - knots[0]) if is_flat else knots


def draw_curve(rng: np.random.Generator) -> np.ndarray:
    """Draw an intensity curve of [0, 1] at CURVE_POINTS equal steps (Models Genesis, arXiv 2004.07882).

    This is a rising cubic Bezier curve from (0, 0) to (1, 1) with two control points drawn from the unit square. With
    probability 0.5 it is reversed, from (0, 1) to (1, 0), which inverts the contrast.
    """
    points, falls = rng.random((2, 2)), rng.random() < 0.5
    t = np.linspace(0, 1, CURVE_POINTS)
    weights = np.stack([3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    x, y = np.concatenate([points.T, np.ones((2, 1))], axis=1) @ weights
    return np.interp(t, x, y[::-1] if falls else y)


def apply_curve(x_DHW: np.ndarray, knots: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Apply a curve of :func:`draw_curve` to one channel between its ``knots``, keeping its range."""
    position = np.interp(x_DHW, knots, UNIT_KNOTS) * (len(curve) - 1)
    # With equal steps no search is needed, which is several times faster than np.interp.
    lower = np.minimum(position.astype(np.int32), len(curve) - 2)
    bent = curve[lower] + (position - lower) * np.diff(curve)[lower]
    return np.interp(bent, UNIT_KNOTS, knots).astype(np.float32)


TURNS = 4
"""Number of rotations: 0, 90, 180 and 270 degrees."""


def rotation_plane(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Choose the last two axes if they have equal length (1 and 2 in 3D, as published), else the last such pair."""
    last = len(patch_size) - 1
    pairs = [(first, second) for second in range(last, 0, -1) for first in range(second - 1, -1, -1)]
    return next((pair for pair in pairs if patch_size[pair[0]] == patch_size[pair[1]]), ())


def rotate(x_CDHW: np.ndarray, turns: int, plane: Sequence[int]) -> np.ndarray:
    """Rotate an image by ``turns`` times 90 degrees in ``plane``; unchanged if the plane is empty."""
    if not plane:
        return x_CDHW
    return np.rot90(x_CDHW, turns, axes=(plane[0] + 1, plane[1] + 1))


def cut_out(
    view_CDHW: np.ndarray, budget: float, box_range: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Fill boxes of a view in place with Gaussian noise, scaled to the range of each channel."""
    axes = tuple(range(1, view_CDHW.ndim))
    lowest, highest = view_CDHW.min(axes, keepdims=True), view_CDHW.max(axes, keepdims=True)
    for box in draw_share(view_CDHW.shape[1:], budget, box_range, rng):
        noise = rng.standard_normal(view_CDHW[(slice(None), *box)].shape, np.float32)
        low, extent = noise.min(axes, keepdims=True), np.ptp(noise, axes, keepdims=True)
        # A box of one voxel has no range and gets the middle of the image's range.
        share = np.where(extent > 0, (noise - low) / np.maximum(extent, 1e-6), 0.5)
        view_CDHW[(slice(None), *box)] = lowest + share * (highest - lowest)
    return view_CDHW


def mix_in(
    view_CDHW: np.ndarray,
    other_CDHW: np.ndarray,
    budget: float,
    box_range: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Replace boxes of a view in place by the same region of another image."""
    for box in draw_share(view_CDHW.shape[1:], budget, box_range, rng):
        view_CDHW[(slice(None), *box)] = other_CDHW[(slice(None), *box)]
    return view_CDHW


def draw_share(
    patch_size: Sequence[int], budget: float, box_range: tuple[float, float], rng: np.random.Generator
) -> Iterator[tuple[slice, ...]]:
    """Draw boxes, cut at the border, until their total volume reaches a share of the patch drawn up to ``budget``.

    As in the original, the last box may exceed the share, and overlaps count twice.
    """
    left = rng.uniform(0, budget) * math.prod(patch_size)
    limits = [[max(1, int(side * size)) for side in box_range] for size in patch_size]
    while left > 0:
        starts = [int(rng.integers(size - low, endpoint=True)) for size, (low, _) in zip(patch_size, limits)]
        sides = [int(rng.integers(low, high, endpoint=True)) for low, high in limits]
        box = tuple(slice(start, min(start + side, size)) for start, side, size in zip(starts, sides, patch_size))
        left -= math.prod(part.stop - part.start for part in box)
        yield box


def is_square(plane: Sequence[int], patch_size: Sequence[int]) -> bool:
    """Return whether ``plane`` is two different axes of equal length."""
    is_pair = len(plane) == len(set(plane)) == 2 and all(0 <= axis < len(patch_size) for axis in plane)
    return is_pair and patch_size[plane[0]] == patch_size[plane[1]]
