"""Draw overlays of segmentations: predicted labels as fill, reference as line, errors in colours of their own.

Legend: H W pixels of a slice, Y X pixels of a panel, 3 red, green, blue.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfm_nnunet.reports.views import OrientedImage, Plane, choose_planes

COLOURS = ("#ff5a4d", "#2fb6ff", "#ffd23f", "#5ddb6b", "#c77dff", "#ff9f1c", "#2ec4b6", "#f72585")
"""Colours of the first labels; the others get :func:`palette`'s."""
ERRORS = {
    "predicted, not in the reference (false positive)": "#ff8c1a",
    "in the reference, not predicted (false negative)": "#3d9bff",
    "another label than in the reference": "#e648e6",
    "as in the reference": "#63c174",
}
PANEL = 360
"""Longer side of a panel in pixels."""
_INK, _PAPER = (232, 232, 232), (20, 22, 26)
_FILL = 0.42


@dataclass(frozen=True)
class Labels:
    """Names and values of labels, and the colour (3) of each value; a value in several regions has the last one's."""

    values: Mapping[str, tuple[int, ...]]

    def colour(self, name: str) -> tuple[int, int, int]:
        """Return the colour of a label; it depends on the label's place in the table alone."""
        red, green, blue = palette(len(self.values))[list(self.values).index(name)]
        return int(red), int(green), int(blue)

    def table(self, num_values: int) -> np.ndarray:
        """Return the colour of each value, (num_values, 3) uint8."""
        table = np.full((num_values, 3), 128, np.uint8)
        for name, values in self.values.items():
            table[[value for value in values if value < num_values]] = self.colour(name)
        return table

    def present(self, *slices: np.ndarray | None) -> list[str]:
        """List the labels in any of the slices."""
        found = {int(value) for slice_HW in slices if slice_HW is not None for value in np.unique(slice_HW)}
        return [name for name, values in self.values.items() if found & set(values)]


@functools.lru_cache
def palette(number: int) -> np.ndarray:
    """Return colours (number, 3) that differ as much as possible: :data:`COLOURS`, then the farthest from those before.

    Dark and grey colours, which look like tissue, are left out. More than 300 labels repeat them.
    """
    chosen = [np.array([int(code[start : start + 2], 16) for start in (1, 3, 5)]) for code in COLOURS]
    steps = np.arange(0, 256, 36)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    candidates = candidates[(candidates.sum(1) > 250) & (np.ptp(candidates, axis=1) > 70)]
    nearest = np.min([np.abs(candidates - colour).sum(1) for colour in chosen], 0)
    for _ in range(len(chosen), min(number, len(candidates))):
        chosen.append(candidates[nearest.argmax()])
        nearest = np.minimum(nearest, np.abs(candidates - chosen[-1]).sum(1))
    return np.stack([chosen[place % len(chosen)] for place in range(number)]).astype(np.uint8)


@dataclass(frozen=True)
class Scan:
    """An image with its mask and its reference, if any, all on one grid."""

    image: OrientedImage
    mask: np.ndarray | None = None
    reference: np.ndarray | None = None

    def planes(self) -> list[Plane]:
        """Choose the planes to show: through the reference if it has labels, else through the mask."""
        masks = [labels > 0 for labels in (self.reference, self.mask) if labels is not None and labels.any()]
        return choose_planes(self.image.voxels.shape, masks[0] if masks else None)


def draw_labels(scan: Scan, plane: Plane, labels: Labels) -> Any:
    """Draw a panel: the slice, the mask as fill and the reference as line."""
    base_YX3, grid = _draw_slice(scan.image, plane)
    highest = max([int(other.max()) for other in (scan.mask, scan.reference) if other is not None], default=0)
    table = labels.table(highest + 1)
    if scan.mask is not None:
        mask_YX = grid.enlarge(plane.cut(scan.mask))
        _blend(base_YX3, mask_YX > 0, table[mask_YX])
    if scan.reference is not None:
        reference_YX = grid.enlarge(plane.cut(scan.reference))
        edge_YX = _edges(reference_YX)
        base_YX3[edge_YX] = table[reference_YX[edge_YX]]
    return _finish(base_YX3, plane, grid)


def draw_errors(scan: Scan, plane: Plane) -> Any:
    """Draw a panel: the slice, with false positives, false negatives, exchanged and correct labels."""
    assert scan.mask is not None
    assert scan.reference is not None
    base_YX3, grid = _draw_slice(scan.image, plane)
    mask, reference = (grid.enlarge(plane.cut(labels)) for labels in (scan.mask, scan.reference))
    places = (
        (mask > 0) & (reference == 0),
        (mask == 0) & (reference > 0),
        (mask > 0) & (reference > 0) & (mask != reference),
        (mask > 0) & (mask == reference),
    )
    for number, (place_YX, code) in enumerate(zip(places, ERRORS.values())):
        _blend(base_YX3, place_YX, np.array(_rgb(code)), 0.75 if number < 3 else 0.4)
    return _finish(base_YX3, plane, grid)


def draw_image(image: OrientedImage, plane: Plane) -> Any:
    """Draw a panel of the slice alone."""
    base_YX3, grid = _draw_slice(image, plane, dimmed=False)
    return _finish(base_YX3, plane, grid)


@dataclass(frozen=True)
class _Grid:
    """Size of a panel, and of its pixels: ``step`` in mm, or in pixels of the image."""

    size: tuple[int, int]
    step: float
    has_mm: bool

    def enlarge(self, labels_HW: np.ndarray) -> np.ndarray:
        """Enlarge a slice of labels to the panel."""
        rows, columns = ((np.arange(new) * old // new).clip(0, old - 1) for new, old in zip(self.size, labels_HW.shape))
        return labels_HW[np.ix_(rows, columns)]


def _draw_slice(image: OrientedImage, plane: Plane, dimmed: bool = True) -> tuple[np.ndarray, _Grid]:
    """Return the grey slice (Y, X, 3), dimmed such that colours stand out on bright tissue too, and its grid."""
    from PIL import Image

    slice_HW = np.nan_to_num(plane.cut(image.voxels).astype(np.float32))
    height, width = (size * count for size, count in zip(plane.pixel(image.spacing), slice_HW.shape))
    extents = [size * count for size, count in zip(image.spacing, image.voxels.shape)]
    step = max(extents) / PANEL  # the same in all planes
    grid = _Grid((max(1, round(height / step)), max(1, round(width / step))), step, image.has_mm)
    low, high = np.percentile(slice_HW, [1, 99])
    brightest = low + max((1.35 if dimmed else 1) * (high - low), 1e-6)
    grey = Image.fromarray((np.clip((slice_HW - low) / (brightest - low), 0, 1) * 255).astype(np.uint8))
    enlarged = np.asarray(grey.resize(grid.size[::-1], Image.Resampling.BICUBIC))
    return np.repeat(enlarged[..., None], 3, 2), grid


def _blend(base_YX3: np.ndarray, place_YX: np.ndarray, colour: np.ndarray, share: float = _FILL) -> None:
    wanted = colour[place_YX] if colour.ndim == 3 else colour
    base_YX3[place_YX] = (1 - share) * base_YX3[place_YX] + share * wanted


def _edges(labels_YX: np.ndarray) -> np.ndarray:
    """Find the pixels inside a label that lie within two pixels of another label or of the background."""
    edge_YX = np.zeros(labels_YX.shape, bool)
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        for distance in (1, 2):
            edge_YX |= np.roll(labels_YX, shift * distance, axis) != labels_YX
    edge_YX[[0, -1], :] = edge_YX[:, [0, -1]] = False  # the border of the image is no border of a label
    return edge_YX & (labels_YX > 0)


def _finish(base_YX3: np.ndarray, plane: Plane, grid: _Grid) -> Any:
    """Add the letters of the orientation and a scale bar."""
    from PIL import Image, ImageDraw

    panel = Image.fromarray(base_YX3)
    draw = ImageDraw.Draw(panel)
    rows, columns = grid.size
    places = ((4, rows / 2, "lm"), (columns - 5, rows / 2, "rm"), (columns / 2, 4, "mt"), (columns / 2, rows - 5, "mb"))
    for letter, (x, y, anchor) in zip(plane.letters, places):
        _write(draw, (x, y), letter, anchor)
    length = _round_length(0.3 * columns * grid.step)
    x, y = 6, rows - 9
    pixels = length / grid.step
    draw.rectangle((x - 1, y - 1, x + pixels + 1, y + 3), fill=_PAPER)
    draw.rectangle((x, y, x + pixels, y + 2), fill=_INK)
    _write(draw, (x, y - 5), f"{length:g} {'mm' if grid.has_mm else 'px'}", "lb")
    return panel


def _round_length(limit: float) -> float:
    """Return the largest of 1, 2, 5, 10, 20, ... up to ``limit``."""
    power = 10.0 ** np.floor(np.log10(limit))
    return float(max(step for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9)) * power)


def _write(draw: Any, place: tuple[float, float], text: str, anchor: str) -> None:
    box = draw.textbbox(place, text, font=_font(), anchor=anchor)
    draw.rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), fill=_PAPER)
    draw.text(place, text, _INK, font=_font(), anchor=anchor)


@functools.lru_cache
def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(14)


def _rgb(code: str) -> tuple[int, ...]:
    return tuple(int(code[start : start + 2], 16) for start in (1, 3, 5))
