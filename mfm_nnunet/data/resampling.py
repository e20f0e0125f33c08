"""Separable spline resampling: nnU-Net's result, many times faster.

Resizing by splines is linear and separable, so one small matrix per axis, prefilter and boundary included, is the whole
operator. nnU-Net evaluates 64 neighbours per voxel instead. Each voxel of a label map is decided among the labels of
the (at most) eight surrounding voxels, whatever the number of labels, with the tie rule of batchgenerators.

Images agree with ``nnunetv2.preprocessing.resampling.default_resampling`` up to rounding, label maps exactly. Shapes: C
channels, D H W voxels in the order of the plan.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.ndimage

MIXED_VOXELS_AT_ONCE = 1 << 18
"""Voxels between labels that are decided together; bounds the memory for label maps."""


def resample_image(
    x_CDHW: np.ndarray,
    new_shape: Sequence[int],
    current_spacing: Sequence[float],
    new_spacing: Sequence[float],
    is_seg: bool = False,
    order: int = 3,
    order_z: int = 0,
    force_separate_z: bool | None = None,
) -> np.ndarray:
    """Resample ``x_CDHW`` to ``new_shape`` (D, H, W).

    The spacings in mm decide whether slices are resampled separately. This is a drop-in for nnU-Net's
    ``resample_data_or_seg_to_shape``: the dtype is kept, values stay within the input's range, and an input that
    already has ``new_shape`` is returned unchanged. ``is_seg`` treats each channel as a label map. Cases outside the
    fast path (integer images, label maps of order above 1, label maps with an ``order_z``) are passed to nnU-Net's
    function.
    """
    from nnunetv2.preprocessing.resampling.default_resampling import (
        determine_do_sep_z_and_axis,
        resample_data_or_seg_to_shape,
    )

    x_CDHW, shape = np.asarray(x_CDHW), tuple(int(n) for n in new_shape)
    if x_CDHW.shape[1:] == shape:
        return x_CDHW
    separate, axis = determine_do_sep_z_and_axis(force_separate_z, current_spacing, new_spacing)
    axis = int(axis) if separate else None
    covered = order <= 1 and (axis is None or order_z == 0) if is_seg else x_CDHW.dtype.kind == "f"
    if not covered:
        return resample_data_or_seg_to_shape(
            x_CDHW, shape, current_spacing, new_spacing, is_seg, order, order_z, force_separate_z
        )
    result_CDHW = np.empty((len(x_CDHW), *shape), dtype=x_CDHW.dtype)
    for x_DHW, result_DHW in zip(x_CDHW, result_CDHW):
        if is_seg:
            result_DHW[...] = _resample_labels(x_DHW, shape, axis, order)
        else:
            result_DHW[...] = _resample_intensities(x_DHW, shape, axis, order, order_z)
    return result_CDHW


def resampling_function(name: str, kwargs: dict[str, Any]) -> Callable[..., np.ndarray]:
    """Return ``f(x_CDHW, new_shape, current_spacing, new_spacing)`` for a function name and its arguments in a plan.

    nnU-Net's default is replaced by :func:`resample_image`; any other name is nnU-Net's own function.
    """
    ours = {"is_seg", "order", "order_z", "force_separate_z"}
    if name == "resample_data_or_seg_to_shape" and set(kwargs) <= ours:
        # nnU-Net's own default is False; its plans always say None, which is the default here.
        return functools.partial(resample_image, **{"force_separate_z": False, **kwargs})
    from nnunetv2.preprocessing.resampling.utils import recursive_find_resampling_fn_by_name

    return functools.partial(recursive_find_resampling_fn_by_name(name), **kwargs)


@functools.lru_cache(64)
def axis_operator(n: int, m: int, order: int) -> np.ndarray:
    """Return the (m, n) matrix that resizes an axis of ``n`` voxels to ``m`` by splines of ``order`` (0 to 5)."""
    operator = scipy.ndimage.zoom(np.eye(n), (m / n, 1), order=order, mode="nearest", grid_mode=True)
    assert operator.shape == (m, n), f"resizing {n} to {m} voxels gave {operator.shape}"
    operator.setflags(write=False)
    return operator


def _resample_intensities(
    x_DHW: np.ndarray, shape: tuple[int, ...], axis: int | None, order: int, order_z: int
) -> np.ndarray:
    """Resample a channel; with ``axis``, in plane first, then between slices by ``order_z``."""
    # float32 would be twice as fast, but its rounding changes single voxels of masks compared with stock nnU-Net.
    x_DHW = np.ascontiguousarray(x_DHW, dtype=np.float64)
    if axis is None:
        return _resize(x_DHW, shape, order, clip_axes=(0, 1, 2))
    plane = tuple(x_DHW.shape[i] if i == axis else shape[i] for i in range(3))
    in_plane = tuple(i for i in range(3) if i != axis)
    if order_z > 0:
        return _resize(_resize(x_DHW, plane, order, in_plane), shape, order_z, clip_axes=())
    slices, places = np.unique(_slice_index(x_DHW.shape[axis], shape[axis]), return_inverse=True)
    plane = tuple(len(slices) if i == axis else shape[i] for i in range(3))
    x_DHW = _resize(np.take(x_DHW, slices, axis), plane, order, in_plane)
    return x_DHW if len(slices) == shape[axis] else np.take(x_DHW, places, axis)


def _resize(x_DHW: np.ndarray, shape: tuple[int, ...], order: int, clip_axes: tuple[int, ...]) -> np.ndarray:
    """Resize all axes, the largest reduction first, then clamp to the input's range over ``clip_axes``."""
    if order == 0:
        return x_DHW[np.ix_(*(_nearest(n, m) for n, m in zip(x_DHW.shape, shape)))]
    if x_DHW.shape == shape:
        return x_DHW
    low, high = (f(x_DHW, axis=clip_axes, keepdims=True) if clip_axes else None for f in (np.min, np.max))
    for axis in sorted(range(3), key=lambda i: shape[i] / x_DHW.shape[i]):
        if shape[axis] != x_DHW.shape[axis]:
            x_DHW = _apply(x_DHW, axis, shape[axis], order)
    return np.clip(x_DHW, low, high, out=x_DHW) if clip_axes else x_DHW


def _apply(x_DHW: np.ndarray, axis: int, m: int, order: int) -> np.ndarray:
    """Apply the operator of one axis in blocks of rows: its entries vanish a few dozen voxels off the diagonal."""
    before, n, after = int(np.prod(x_DHW.shape[:axis])), x_DHW.shape[axis], int(np.prod(x_DHW.shape[axis + 1 :]))
    flat = x_DHW.reshape(before, n, after)
    result = np.empty((before, m, after), dtype=x_DHW.dtype)
    for rows, columns, block in _operator_blocks(n, m, order, x_DHW.dtype.str):
        if after == 1:
            result[:, rows, 0] = flat[:, columns, 0] @ block.T
        else:
            np.matmul(block, flat[:, columns], out=result[:, rows])
    return result.reshape(*x_DHW.shape[:axis], m, *x_DHW.shape[axis + 1 :])


@functools.lru_cache(64)
def _operator_blocks(n: int, m: int, order: int, dtype: str) -> list[tuple[slice, slice, np.ndarray]]:
    """Cut the operator into (output rows, input columns, matrix); drop entries below the rounding of ``dtype``."""
    operator, rows_at_once = axis_operator(n, m, order), 64
    blocks = []
    for start in range(0, m, rows_at_once):
        rows = slice(start, min(start + rows_at_once, m))
        used = np.flatnonzero((np.abs(operator[rows]) > 0.01 * np.finfo(dtype).eps).any(0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        blocks.append((rows, columns, np.ascontiguousarray(operator[rows, columns], dtype=dtype)))
    return blocks


def _nearest(n: int, m: int) -> np.ndarray:
    """Return the index (m,) of the nearest of ``n`` voxels."""
    return axis_operator(n, m, 0).argmax(1)


def _slice_index(n: int, m: int) -> np.ndarray:
    """Return the index (m,) of the slice that nnU-Net picks out of ``n``; halves round up."""
    # Rounded step by step as in nnU-Net, so that ties fall the same way.
    position = (n / m) * (np.arange(m) + 0.5) - 0.5
    return np.clip(np.floor(position + 0.5).astype(int), 0, n - 1)


def _resample_labels(x_DHW: np.ndarray, shape: tuple[int, ...], axis: int | None, order: int) -> np.ndarray:
    """Resample a label map: order 0 takes the nearest voxel, order 1 the label with the largest interpolated share."""
    sizes = list(zip(x_DHW.shape, shape))
    nearest = [_nearest(n, m) for n, m in sizes]
    corners = [_linear(n, m) for n, m in sizes]
    if axis is not None:
        index = _slice_index(*sizes[axis])
        nearest[axis], corners[axis] = index, (index, index, np.ones(len(index)), np.zeros(len(index)))
    result_DHW = x_DHW[np.ix_(*nearest)]
    if order == 0:
        return result_DHW
    mixed = np.flatnonzero(_is_mixed(x_DHW, corners))
    for start in range(0, len(mixed), MIXED_VOXELS_AT_ONCE):
        some = mixed[start : start + MIXED_VOXELS_AT_ONCE]
        result_DHW.flat[some] = _vote(x_DHW, corners, np.unravel_index(some, shape), result_DHW.flat[some])
    return result_DHW


@functools.lru_cache(64)
def _linear(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return both neighbours and their weights, each (m,), read off the operator to share its rounding."""
    operator, rows = axis_operator(n, m, 1), np.arange(m)
    low = (operator != 0).argmax(1)
    high = np.minimum(low + 1, n - 1)
    return low, high, operator[rows, low], np.where(high > low, operator[rows, high], 0.0)


def _is_mixed(x_DHW: np.ndarray, corners: Sequence[tuple[np.ndarray, ...]]) -> np.ndarray:
    """Return where the voxels around an output voxel hold more than one label."""
    least = most = x_DHW
    for axis, (low, high, _, _) in enumerate(corners):
        least = np.minimum(np.take(least, low, axis), np.take(least, high, axis))
        most = np.maximum(np.take(most, low, axis), np.take(most, high, axis))
    return least != most


def _vote(
    x_DHW: np.ndarray, corners: Sequence[tuple[np.ndarray, ...]], at: tuple[np.ndarray, ...], nearest: np.ndarray
) -> np.ndarray:
    """Return the winning labels (V,) at the output voxels ``at``; ties go to the nearest label, then to the lowest."""
    labels, weights = map(list, zip(*_corner_labels(x_DHW, corners, at)))
    score = _share(nearest, labels, weights)
    winner = nearest.copy()
    # Above one half no other label can win or tie; the margin is far above the rounding of the sum of weights.
    open_ = np.flatnonzero(score <= 0.5 + 1e-6)
    labels, weights = [item[open_] for item in labels], [item[open_] for item in weights]
    best, best_label = score[open_], nearest[open_]
    is_nearest = np.ones(len(open_), dtype=bool)
    for candidate in labels:
        score = _share(candidate, labels, weights)
        better = (score > best) | ((score == best) & ~is_nearest & (candidate < best_label))
        is_nearest &= score <= best
        best, best_label = np.maximum(best, score), np.where(better, candidate, best_label)
    winner[open_] = best_label
    return winner


def _corner_labels(
    x_DHW: np.ndarray, corners: Sequence[tuple[np.ndarray, ...]], at: tuple[np.ndarray, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield label and weight (V,) of each surrounding voxel, last axis fastest: scipy's order of summation."""
    for bits in itertools.product((0, 1), repeat=3):
        index = tuple(corner[bit][place] for corner, bit, place in zip(corners, bits, at))
        weight = [corner[2 + bit][place] for corner, bit, place in zip(corners, bits, at)]
        yield x_DHW[index], weight[0] * weight[1] * weight[2]


def _share(candidate: np.ndarray, labels: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """Sum the interpolated share of ``candidate``, at most 1, in scipy's order, so that ties are exact ties."""
    score = np.zeros(len(candidate))
    for label, weight in zip(labels, weights):
        score += np.where(label == candidate, weight, 0.0)
    return np.minimum(score, 1.0)
