"""Overlays: labels, lines and errors where they are, colours that differ, panels with letters and a scale bar."""

from __future__ import annotations

import numpy as np
import pytest

from mfm_nnunet.reports import overlays
from mfm_nnunet.reports.overlays import Labels, Scan, draw_errors, draw_labels, palette
from mfm_nnunet.reports.views import OrientedImage, Plane


def scan(shape: tuple[int, ...] = (40, 40), spacing: tuple[float, ...] = (1, 1), has_mm: bool = True) -> Scan:
    """A grey image; the mask is to the left, the reference to the right, and both in the middle."""
    mask, reference = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    mask[..., 10:30, 5:25], reference[..., 10:30, 15:35] = 1, 1
    reference[..., 10:15, 15:25] = 2
    return Scan(OrientedImage(np.full(shape, 50, np.float32), spacing, has_mm), mask, reference)


def colour_at(panel: np.ndarray, row: float, column: float, shape: tuple[int, int] = (40, 40)) -> np.ndarray:
    return panel[int((row + 0.5) * panel.shape[0] / shape[0]), int((column + 0.5) * panel.shape[1] / shape[1])]


def nearest_error(colour: np.ndarray) -> int:
    codes = [np.array(overlays._rgb(code)) for code in overlays.ERRORS.values()]
    return int(np.argmin([np.abs(colour.astype(int) - code).sum() for code in codes]))


def test_errors_have_their_own_colours() -> None:
    panel = np.asarray(draw_errors(scan(), Plane(-1)))
    places = {"false positive": (20, 10), "false negative": (20, 30), "exchanged": (12, 20), "correct": (20, 20)}
    assert [nearest_error(colour_at(panel, *place)) for place in places.values()] == [0, 1, 2, 3]
    outside = colour_at(panel, 5, 10)
    assert np.ptp(outside) == 0, "grey where there is neither"


def test_labels_are_filled_and_the_reference_is_a_line() -> None:
    table = Labels({"one": (1,), "two": (2,)})
    panel = np.asarray(draw_labels(scan(), Plane(-1), table)).astype(int)
    inside, edge = colour_at(panel, 20, 10), panel[panel.shape[0] // 2, int(34.9 * panel.shape[1] / 40)]
    assert inside[0] > inside[2] + 30, "red fill"
    assert tuple(edge) == table.colour("one")
    assert np.ptp(colour_at(panel, 20, 30)) == 0, "no fill where nothing was predicted"


def test_a_region_inside_another_has_its_own_colour() -> None:
    table = Labels({"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)})
    colours = table.table(4)
    assert [tuple(colour) for colour in colours[1:]] == [table.colour(name) for name in table.values]
    assert table.present(np.array([[0, 3]])) == ["whole", "core", "enhancing"]


@pytest.mark.parametrize("number", [8, 41, 104])
def test_colours_of_many_labels_differ(number: int) -> None:
    colours = palette(number).astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(number, dtype=int)
    assert distances.min() >= 36
    assert np.ptp(colours, axis=1).min() > 60, "grey looks like tissue"
    np.testing.assert_array_equal(colours, palette(130)[:number])


@pytest.mark.parametrize(("spacing", "has_mm", "text"), [((0.5, 0.5), True, "5 mm"), ((1, 1), False, "10 px")])
def test_scale_bar_is_a_round_length(
    spacing: tuple[float, ...], has_mm: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(overlays, "_write", lambda draw, place, text, anchor: written.append(text))
    panel = np.asarray(draw_labels(scan(spacing=spacing, has_mm=has_mm), Plane(-1), Labels({"one": (1,)})))
    assert written == [text]
    length = float(text.split()[0]) / (spacing[0] if has_mm else 1) / 40 * panel.shape[1]
    row = panel[panel.shape[0] - 8]
    assert (row == 232).all(-1).sum() == pytest.approx(length, abs=2)


def test_letters_and_proportions(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(overlays, "_write", lambda draw, place, text, anchor: written.append(text))
    seen = scan((10, 40, 40), (3, 1, 1))
    panels = [draw_labels(seen, plane, Labels({"one": (1,)})) for plane in seen.planes()]
    assert [panel.size for panel in panels] == [(360, 360), (360, 270), (360, 270)]
    assert [letter for letter in written if len(letter) == 1] == [*"RLAP", *"RLSI", *"APSI"]
