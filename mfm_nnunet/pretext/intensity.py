"""Operations on single crops that pretext tasks share: resizing, contrast, blur, noise. NumPy, drawn from a generator.

Legend: C channels, D H W voxels; in 2D there is no D. All arrays are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

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
"""Probability per crop of each step of :func:`jitter`, in this order, as in OpenMind's Volume Fusion."""


def resize_linear(x_CDHW: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Linear resizing to ``size`` voxels per axis; first and last voxels stay where they are (as scipy's zoom)."""
    for axis, (before, after) in enumerate(zip(x_CDHW.shape[1:], size), start=1):
        if before != after:
            position = np.linspace(0, before - 1, after)
            lower = np.minimum(position.astype(int), max(before - 2, 0))
            weight = (position - lower).astype(np.float32).reshape(-1, *[1] * (x_CDHW.ndim - 1 - axis))
            first = x_CDHW.take(lower, axis)
            x_CDHW = first + weight * (x_CDHW.take(np.minimum(lower + 1, before - 1), axis) - first)
    return x_CDHW


def map_percentiles(x_CDHW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Each channel to [0, 1]: below percentile ``low`` to [0, 0.1), up to ``high`` to [0.1, 0.9], above to (0.9, 1].

    A constant channel becomes 0. One that is constant between the percentiles (air with a rim of tissue) has no middle
    to stretch and is mapped from its minimum and maximum.
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
    """Gamma correction of each channel on its own range, which stays as it was."""
    axes = tuple(range(1, x_CDHW.ndim))
    minimum = x_CDHW.min(axes, keepdims=True)
    extent = x_CDHW.max(axes, keepdims=True) - minimum
    return ((x_CDHW - minimum) / np.maximum(extent, 1e-6)) ** np.float32(exponent) * extent + minimum


def standardise(x_CDHW: np.ndarray) -> np.ndarray:
    """Each channel to mean 0 and standard deviation 1; a constant one to 0."""
    axes = tuple(range(1, x_CDHW.ndim))
    centred = x_CDHW - x_CDHW.mean(axes, keepdims=True)
    return centred / np.maximum(centred.std(axes, keepdims=True), 1e-6)


def jitter(x_CDHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """nnU-Net's intensity augmentation with the probabilities of JITTER, for normalised images.

    Strengths are drawn for each channel. Changes ``x_CDHW`` in place and returns it.
    """
    fires = dict(zip(JITTER, rng.random(len(JITTER)) < list(JITTER.values())))
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
    """Nearest neighbour down, cubic up."""
    coarse = [max(1, round(size * scale)) for size in x.shape]
    down = [np.minimum((np.arange(n) + 0.5) * size / n, size - 1).astype(int) for n, size in zip(coarse, x.shape)]
    factors = [size / n for n, size in zip(coarse, x.shape)]
    return scipy.ndimage.zoom(x[np.ix_(*down)], factors, order=3, mode="nearest", grid_mode=True)


def _gamma_keeping_moments(x: np.ndarray, exponent: float) -> np.ndarray:
    corrected = apply_gamma(x[None], exponent)[0]
    return (corrected - corrected.mean()) / max(corrected.std(), 1e-6) * x.std() + x.mean()
