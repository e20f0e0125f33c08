"""Draw overlays of segmentations: image, predicted labels as fill, reference as contour.

3D images are shown in three planes through the largest cross-section of the reference, with true proportions and in
radiological view (the patient's left is on the right). 2D images are shown as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.reports.progress import save_figure

COLOURS = ("#ff5a4d", "#2fb6ff", "#ffd23f", "#5ddb6b", "#c77dff", "#ff9f1c", "#2ec4b6", "#f72585")
_INK, _PAPER = "#e8e8e8", "#14161a"
_INCHES_PER_PANEL = 3.0
_PLANES = (("axial", ("R", "L", "A", "P")), ("coronal", ("R", "L", "S", "I")), ("sagittal", ("A", "P", "S", "I")))
"""Name of the plane, and letters at the left, right, top and bottom edge, by the axis that is cut."""
_EDGES = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"), (0.5, 0.98, "center", "top"),
          (0.5, 0.02, "center", "bottom"))  # fmt: skip


@dataclass(frozen=True)
class _View:
    """One plane: image (rows from the top), reference, one mask per prediction, and height / width of a pixel."""

    title: str
    letters: tuple[str, ...]
    image: np.ndarray
    reference: np.ndarray
    masks: list[np.ndarray]
    aspect: float


def draw_overlay(
    file: Path,
    title: str,
    image: Path,
    reference: Path,
    predictions: Mapping[str, Path],
    labels: Mapping[str, tuple[int, ...]],
) -> None:
    """Write a PNG with one row per prediction (2D: one column), titled by the keys, e.g. ``MAE, Dice 0.81``.

    ``labels`` maps names to values; colours follow the order of the mapping. Raises RuntimeError (SimpleITK) for a
    file that is not an image.
    """
    pixels, spacing = _read_image(image, is_label=False)
    volumes = [_read_image(path, is_label=True)[0] for path in (reference, *predictions.values())]
    if pixels.ndim == 2:
        views = [_View("", (), pixels, volumes[0], volumes[1:], spacing[0] / spacing[1])]
        panels = [[(name, views[0], number) for number, name in enumerate(predictions)]]
    else:
        views = [_cut(axis, pixels, volumes, spacing) for axis in range(3)]
        panels = [[(name, view, number) for view in views] for number, name in enumerate(predictions)]
    _draw(file, title, panels, labels)


def largest_cross_section(mask: np.ndarray, axis: int) -> int:
    """Find the slice along ``axis`` with most voxels of ``mask``, or one nearer to the middle with nearly as many."""
    counts, middle = mask.sum(axis=tuple(other for other in range(mask.ndim) if other != axis)), mask.shape[axis] // 2
    large = np.flatnonzero(counts >= 0.9 * counts.max())
    return int(large[np.abs(large - middle).argmin()])


def _read_image(path: Path, is_label: bool) -> tuple[np.ndarray, tuple[float, ...]]:
    """Read an image (D, H, W), axes towards superior, posterior, left, or (H, W), and its spacing in mm."""
    import SimpleITK as sitk

    image = sitk.ReadImage(str(path))
    if image.GetDimension() == 3 and 1 in image.GetSize():
        image = image[tuple(0 if size == 1 else slice(None) for size in image.GetSize())]
    if image.GetDimension() == 3:
        image = sitk.DICOMOrient(image, "LPS")
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = array[..., 0] if is_label else array.mean(-1)
    return array.astype(np.int64 if is_label else np.float32), tuple(image.GetSpacing()[::-1])


def _cut(axis: int, image: np.ndarray, volumes: Sequence[np.ndarray], spacing: Sequence[float]) -> _View:
    """Cut the view across ``axis``; ``volumes`` are the reference and the masks."""
    where = largest_cross_section(volumes[0] > 0, axis)
    name, letters = _PLANES[axis]
    planes = [np.take(volume, where, axis) for volume in (image, *volumes)]
    if axis != 0:
        planes = [plane[::-1] for plane in planes]  # superior is up
    height, width = (size for other, size in enumerate(spacing) if other != axis)
    title = f"{name}, slice {where + 1} of {image.shape[axis]}"
    return _View(title, letters, planes[0], planes[1], planes[2:], height / width)


def _draw(
    file: Path, title: str, panels: list[list[tuple[str, _View, int]]], labels: Mapping[str, tuple[int, ...]]
) -> None:
    from matplotlib.figure import Figure

    num_rows, num_columns = len(panels), len(panels[0])
    size = (_INCHES_PER_PANEL * num_columns + 0.4, _INCHES_PER_PANEL * num_rows + 1.1)
    figure = Figure(figsize=size, layout="constrained", facecolor=_PAPER)
    axes: Any = figure.subplots(num_rows, num_columns, squeeze=False)
    for row, column in np.ndindex(num_rows, num_columns):
        name, view, number = panels[row][column]
        axis = axes[row, column]
        _draw_panel(axis, view, view.masks[number], labels)
        is_3d = bool(view.title)
        if row == 0:
            axis.set_title(view.title if is_3d else name, color=_INK, fontsize=10)
        if column == 0 and is_3d:
            axis.set_ylabel(name, color=_INK, fontsize=10)
    _draw_legend(figure, labels, max_columns=num_columns)
    figure.suptitle(title, color=_INK, fontsize=12)
    save_figure(figure, file, dpi=110)


def _draw_panel(axis: Any, view: _View, mask: np.ndarray, labels: Mapping[str, tuple[int, ...]]) -> None:
    low, high = np.percentile(view.image, [1, 99])
    image_options = {"aspect": view.aspect, "interpolation": "nearest"}
    brightest = low + max(1.35 * (high - low), 1e-6)  # dimmed, so that the colours stand out on bright tissue too
    axis.imshow(view.image, cmap="gray", vmin=low, vmax=brightest, **image_options)
    fill = np.zeros((*mask.shape, 4), np.float32)
    for number, values in enumerate(labels.values()):
        fill[np.isin(mask, values)] = _rgba(number, 0.4)
    axis.imshow(fill, **image_options)
    for number, values in enumerate(labels.values()):
        is_label = np.isin(view.reference, values)
        if is_label.any() and not is_label.all() and min(is_label.shape) > 1:
            axis.contour(is_label.astype(float), levels=[0.5], colors=[_colour(number)], linewidths=1.3)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    for letter, (x, y, horizontal, vertical) in zip(view.letters, _EDGES):
        box = {"facecolor": _PAPER, "edgecolor": "none", "alpha": 0.6, "pad": 1.5}
        axis.text(x, y, letter, transform=axis.transAxes, ha=horizontal, va=vertical, color=_INK, fontsize=8, bbox=box)


def _draw_legend(figure: Any, labels: Mapping[str, tuple[int, ...]], max_columns: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Any] = []
    for number, text in enumerate(name.replace("_", " ") for name in labels):
        entries.append(Patch(facecolor=_colour(number), alpha=0.6, label=f"{text}, predicted"))
        entries.append(Line2D([], [], color=_colour(number), label=f"{text}, reference"))
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=min(len(labels), max_columns),
        fontsize=9,
        labelcolor=_INK,
        facecolor=_PAPER,
        edgecolor="none",
    )


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _rgba(number: int, alpha: float) -> tuple[float, float, float, float]:
    code = _colour(number)
    red, green, blue = (int(code[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red, green, blue, alpha
