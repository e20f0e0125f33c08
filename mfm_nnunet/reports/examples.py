"""Draw what a pretext task saw, hid and gave back, in the planes of the body and with true proportions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.reports.progress import save_figure
from mfm_nnunet.reports.views import Plane, reorient


@dataclass(frozen=True)
class Frame:
    """Position of a task's pictures: directions (e.g. ``SPL``) and lengths of the axes; letters unless mirrored."""

    directions: str
    spacing: tuple[float, ...]
    has_letters: bool = True


def plot_examples(
    volumes: Mapping[str, np.ndarray],
    file: Path,
    title: str,
    slice_axes: Sequence[int] = (0, 1, 2),
    frame: Frame | None = None,
) -> None:
    """Draw example volumes of a task: one column per volume, one row per axis of ``slice_axes``.

    ``volumes`` are named arrays (C, D, H, W) or (C, H, W). The first channel is shown in the slice of each axis that
    shows most: the same for all volumes. With a ``frame``, rows are planes of the body with true proportions; without,
    axes of the array. Images use the grey scale of the first one. Class maps share a colour scale, and so do tables
    (one voxel deep, shown once).
    """
    from matplotlib.figure import Figure

    shown = {name: np.asarray(volume[0], np.float32) for name, volume in volumes.items()}
    rows = _choose_rows(next(iter(shown.values())), slice_axes, frame)
    planes = {name: _cut_rows(volume, rows, frame) for name, volume in shown.items()}
    num_rows = max(map(len, planes.values()))
    widths = [min(4.0, max(0.5, first.shape[1] / first.shape[0])) for first, *_ in planes.values()]
    figure = Figure(figsize=(2.6 * sum(widths), 2.6 * num_rows + 0.5), layout="constrained")
    axes = figure.subplots(num_rows, len(planes), squeeze=False, width_ratios=widths)
    colours = _colours(shown)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for column, name in enumerate(planes):
        axes[0, column].set_title(name, fontsize=10)
        for row, slice_HW in enumerate(planes[name]):
            plane, aspect = rows[row]
            is_plane = frame is not None and not _is_table(shown[name])
            options = {**colours[name], "aspect": aspect if is_plane else 1}
            axes[row, column].imshow(slice_HW, interpolation="nearest", **options)
            if is_plane and column == 0 and plane.name:
                axes[row, 0].set_ylabel(plane.name.partition(",")[0], fontsize=10)
            if is_plane and frame and frame.has_letters:
                _write_letters(axes[row, column], plane.letters)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, file, dpi=110)


def _choose_rows(volume: np.ndarray, slice_axes: Sequence[int], frame: Frame | None) -> list[tuple[Plane, float]]:
    """Choose a slice along each axis, near the middle and with most contrast, and its height by width of a pixel."""
    if volume.ndim == 2 and frame is None:
        return [(Plane(-1), 1.0)]
    if _is_table(volume):
        return [(Plane(axis, 0, 1), 1.0) for axis in slice_axes]
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)
    if frame is not None:
        volume, spacing = _turn(volume, frame)
    rows = []
    for axis in [volume.shape.index(1)] if 1 in volume.shape else slice_axes:
        size = volume.shape[axis]
        middle = range(size // 4, max(size // 4 + 1, size - size // 4))
        index = max(middle, key=lambda place: float(volume.take(place, axis).std()))
        height, width = Plane(axis).pixel(spacing)
        rows.append((Plane(axis, index, size), height / width))
    return rows


def _turn(volume: np.ndarray, frame: Frame) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return a volume, or a slice of one, with the axes (S, P, L), and its spacing."""
    return reorient(volume if volume.ndim == 3 else volume[None], frame.directions, frame.spacing)


def _cut_rows(volume: np.ndarray, rows: Sequence[tuple[Plane, float]], frame: Frame | None) -> list[np.ndarray]:
    if _is_table(volume):
        return [volume[0]]
    if frame is not None:
        turned, _ = _turn(volume, frame)
        return [plane.cut(turned) for plane, _ in rows]
    if volume.ndim == 2:
        return [volume]
    return [volume.take(min(plane.index, volume.shape[plane.axis] - 1), plane.axis) for plane, _ in rows]


def _write_letters(axis: Any, letters: str) -> None:
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"),
              (0.5, 0.02, "center", "bottom"))  # fmt: skip
    for letter, (x, y, horizontal, vertical) in zip(letters, places):
        box = {"facecolor": "black", "edgecolor": "none", "alpha": 0.6, "pad": 1.0}
        axis.text(
            x, y, letter, transform=axis.transAxes, ha=horizontal, va=vertical, color="white", fontsize=7, bbox=box
        )


def _is_table(volume: np.ndarray) -> bool:
    return volume.ndim == 3 and volume.shape[0] == 1


def _is_class_map(volume: np.ndarray) -> bool:
    return not _is_table(volume) and volume.max() < 64 and np.array_equal(volume, np.round(volume))


def _colours(shown: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Choose ``imshow`` options so that equal values look equal in all volumes of a kind."""
    kinds = {n: "table" if _is_table(v) else "classes" if _is_class_map(v) else "image" for n, v in shown.items()}
    styles: dict[str, dict[str, Any]] = {}
    for kind in set(kinds.values()):
        same = [shown[name] for name in shown if kinds[name] == kind]
        if kind == "image":
            low, high = np.percentile(same[0], [0.5, 99.5])
        else:
            low, high = min(volume.min() for volume in same), max(volume.max() for volume in same)
        styles[kind] = {"cmap": "gray" if kind == "image" else "viridis", "vmin": float(low), "vmax": float(high)}
    return {name: styles[kind] for name, kind in kinds.items()}
