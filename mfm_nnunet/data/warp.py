"""Affine resampling of images and label maps: the output at ``p`` is the input at ``matrix @ p + offset``.

It works in blocks that fit into the cache of one core. Images are sampled by torch's sampler for two dimensions, which
is vectorised, unlike that for three: the slices of a volume, one below the other, are one tall picture, and the slices
on both sides of a point are its channels. Label maps are looked up, and labels are weighed only in cells that have
several of them, so the cost does not depend on the number of labels.

Legend: C channels, D H W voxels (2D has no D). Coordinates are voxels of the input, whose first voxel is at 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

Order = Literal[1, 3]
"""Of the spline: linear, or cubic."""

BLOCK = {2: 256, 3: 40}
"""Voxels of a block of the output per axis, in 2D and 3D."""
MIXED = np.int16(-(2**15))
"""Marks cells whose corners have several labels."""
CHUNK = 8192
"""Points whose labels are weighed at a time."""
POLE = math.sqrt(3) - 2
"""Of the recursive filter that makes the coefficients of a cubic spline."""


def find_box(matrix: np.ndarray, offset: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower corner and the size of the box of voxels that an output of ``size`` voxels needs (order 1)."""
    lower, upper = _bounds(matrix, size) + offset
    first = np.floor(lower - 1e-3).astype(int)
    return first, np.floor(upper + 1e-3).astype(int) + 2 - first


def warp_image(
    image_CDHW: np.ndarray, matrix: np.ndarray, offset: np.ndarray, size: Sequence[int], order: Order = 1
) -> np.ndarray:
    """Return the transformed image (C, *size), float32. Order 3 needs two voxels more on each side than order 1."""
    image = torch.from_numpy(image_CDHW if order == 1 else _spline_coefficients(image_CDHW))
    out = torch.empty((len(image), *size))
    for block, inner, points in _blocks(matrix, offset, size, image.shape[1:], order):
        if len(size) == 2:
            rows, columns = inner
            picture = image[None, :, rows, columns]
            out[:, block[0], block[1]] = _sample_picture(picture, points[0], points[1], order)
            continue
        for channel, target in zip(image, out):
            _sample_volume(channel[inner].contiguous(), points, order, target[block])
    return out.numpy()


def _sample_volume(volume_DHW: Tensor, points: Tensor, order: Order, out: Tensor) -> None:
    """Sample a contiguous volume at points (3, *out.shape)."""
    (depth, height, width), taps = volume_DHW.shape, order + 1
    picture = volume_DHW.as_strided((1, taps, (depth - order) * height, width), (0, height * width, width, 1))
    slices = points[0].floor()
    rows = torch.add(points[1], slices - order // 2 if order == 3 else slices, alpha=height)
    sampled = _sample_picture(picture, rows.flatten(0, 1), points[2].flatten(0, 1), order).view(taps, *out.shape)
    fraction = slices.neg_().add_(points[0])
    if order == 1:
        torch.lerp(sampled[0], sampled[1], fraction, out=out)
    else:
        out.copy_(_weighted_sum(_cubic_weights(fraction), sampled))


def _sample_picture(picture_BCHW: Tensor, rows: Tensor, columns: Tensor, order: Order) -> Tensor:
    """Sample all channels of a picture at the same points; return (C, *points)."""
    grid = torch.empty((1, *rows.shape, 2))
    height, width = picture_BCHW.shape[2:]

    def sample(rows: Tensor, columns: Tensor) -> Tensor:
        torch.add(_START, columns, alpha=2 / (width - 1), out=grid[0, ..., 0])
        torch.add(_START, rows, alpha=2 / (height - 1), out=grid[0, ..., 1])
        return grid_sample(picture_BCHW, grid, align_corners=True)[0]

    if order == 1:
        return sample(rows, columns)
    # A cubic spline is a sum of two linear interpolations per axis (GPU Gems 2, chapter 20).
    pairs = list(itertools.product(_pairs(rows), _pairs(columns)))
    return _weighted_sum(
        (of_row * of_column for (of_row, _), (of_column, _) in pairs),
        (sample(row, column) for (_, row), (_, column) in pairs),
    )


_START = torch.tensor(-1.0)
"""Coordinate of the first voxel in torch's grids; the last one is at 1."""


def _weighted_sum(weights: Iterable[Tensor], values: Iterable[Tensor]) -> Tensor:
    weight, value = next(pairs := zip(weights, values))
    total = weight * value
    for weight, value in pairs:
        total.addcmul_(weight, value)
    return total


def _pairs(points: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return weight and place of the two linear interpolations."""
    whole = points.floor()
    first, second, third, fourth = _cubic_weights(points - whole)
    low, high = first + second, third + fourth
    return [(low, whole - 1 + second / low), (high, whole + 1 + fourth / high)]


def _cubic_weights(fraction: Tensor) -> list[Tensor]:
    """Return the weights of the four voxels around a point at ``fraction`` between the second and the third."""
    rest, square = 1 - fraction, fraction * fraction
    last = square * fraction / 6
    first = rest * rest * rest / 6
    second = 2 / 3 - square + 3 * last
    return [first, second, 1 - first - second - last, last]


def _spline_coefficients(image_CDHW: np.ndarray) -> np.ndarray:
    """Return the coefficients of the cubic spline through the voxels of an image, which is mirrored at its border."""
    out = image_CDHW.copy()
    for axis in range(1, out.ndim):
        lines = np.moveaxis(out, axis, 0)
        last = len(lines) - 1
        if last == 0:
            continue
        lines *= 6
        for k in range(1, min(16, 2 * last)):  # beyond, the mirrored voxels have no weight in single precision
            lines[0] += POLE**k * lines[last - abs(last - k)]
        for k in range(1, last + 1):
            lines[k] += POLE * lines[k - 1]
        lines[last] = POLE / (POLE**2 - 1) * (lines[last] + POLE * lines[last - 1])
        for k in range(last - 1, -1, -1):
            lines[k] = POLE * (lines[k + 1] - lines[k])
    return out


def warp_labels(labels_CDHW: np.ndarray, matrix: np.ndarray, offset: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the transformed label maps (C, *size), int16: at each point the label with the largest linear weight.

    Weights are rounded, and ties settled by the nearest voxel or else the lower label, as in batchgeneratorsv2.
    """
    labels = np.ascontiguousarray(labels_CDHW, np.int16)
    out = np.empty((len(labels), *size), np.int16)
    strides = np.array(labels[0].strides, np.int32) // labels.itemsize
    cells = _find_cells(labels).reshape(len(labels), -1)
    for block, inner, points in _blocks(matrix, offset, size, labels.shape[1:], 1):
        first = int(strides @ [part.start for part in inner])
        whole = points.floor_().int().numpy()
        places = sum((axis * stride for axis, stride in zip(whole[1:], strides[1:].tolist())), whole[0] * strides[0])
        for of_channel, target in zip(cells, out):
            target[block] = of_channel[first:].take(places)
    for values, target in zip(labels.reshape(len(labels), -1), out.reshape(len(out), -1)):
        mixed = np.flatnonzero(target == MIXED)
        for part in np.array_split(mixed, math.ceil(len(mixed) / CHUNK)) if len(mixed) else ():
            positions = np.stack(np.unravel_index(part, size))
            target[part] = _vote(values, matrix @ positions + np.reshape(offset, (-1, 1)), strides)
    return out


def _find_cells(labels_CDHW: np.ndarray) -> np.ndarray:
    """Return at each voxel the label of the cell of which it is the lowest corner, or MIXED."""
    lowest, highest = labels_CDHW.copy(), labels_CDHW.copy()
    for axis in range(1, lowest.ndim):
        for array, choose in ((lowest, np.minimum), (highest, np.maximum)):
            lines = np.moveaxis(array, axis, 0)
            choose(lines[:-1], lines[1:], out=lines[:-1])
    lowest[lowest != highest] = MIXED
    return lowest


def _vote(labels: np.ndarray, points: np.ndarray, strides: np.ndarray) -> np.ndarray:
    """Return the label with the largest weight at points (axes, N)."""
    whole = np.floor(points)
    places, fractions = strides @ whole.astype(int), (points - whole).astype(np.float32)
    corners = np.array([*itertools.product((0, 1), repeat=len(strides))])
    found = labels.take(places + (corners @ strides)[:, None])
    weights = np.full((1, len(places)), 1000, np.float32)
    for fraction in fractions[::-1]:
        weights = np.concatenate([weights * (1 - fraction), weights * fraction])
    nearest = labels.take(places + strides @ (fractions > 0.5))
    winner, best, of_nearest = nearest.copy(), np.full(len(places), -1, np.float32), np.zeros(len(places), np.float32)
    label, left = found.min(0), np.arange(len(places))
    while len(left):
        score = ((found == label) * weights).sum(0).astype(np.float16).astype(np.float32)
        is_nearest, wins = label == nearest[left], score > best[left]
        of_nearest[left[is_nearest]] = score[is_nearest]
        winner[left[wins]], best[left[wins]] = label[wins], score[wins]
        label = np.where(found > label, found, _NO_LABEL).min(0)
        more = np.flatnonzero(label < _NO_LABEL)
        left, label, found, weights = left[more], label[more], found.take(more, 1), weights.take(more, 1)
    return np.where(of_nearest == best, nearest, winner)


_NO_LABEL = np.int16(2**15 - 1)


Slices = tuple[slice, ...]


def _blocks(
    matrix: np.ndarray, offset: np.ndarray, size: Sequence[int], box: Sequence[int], order: Order
) -> Iterator[tuple[Slices, Slices, Tensor]]:
    """Yield blocks of an output: its voxels, the voxels of the box that they need, and points (axes, *) in these."""
    matrix, most = np.asarray(matrix, float), BLOCK[len(size)]
    step = [math.ceil(length / math.ceil(length / most)) for length in size]
    base = torch.from_numpy(np.tensordot(matrix, np.indices(step), 1).astype(np.float32))
    lower, upper = _bounds(matrix, step)
    sides = np.minimum(np.ceil(upper - lower + 2e-3).astype(int) + order + 1, box)
    starts = np.array([*itertools.product(*(range(0, length, part) for length, part in zip(size, step)))])
    corners = starts @ matrix.T + offset
    firsts = np.clip(np.floor(corners + lower - 1e-3).astype(int) - order // 2, 0, box - sides)
    shifts = torch.from_numpy((corners - firsts).astype(np.float32)).view(len(starts), -1, *(1 for _ in size))
    for start, stop, first, last, shift in zip(starts, np.minimum(starts + step, size), firsts, firsts + sides, shifts):
        cut = base[(slice(None), *map(slice, stop - start))]
        yield tuple(map(slice, start, stop)), tuple(map(slice, first, last)), cut + shift


def _bounds(matrix: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the lowest and the highest coordinates (2, axes) of points of an output, without the offset."""
    ends = np.asarray(matrix) * (np.asarray(size) - 1)
    return np.stack([np.minimum(ends, 0).sum(1), np.maximum(ends, 0).sum(1)])
