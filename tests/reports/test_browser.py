"""A report in a browser: no message, no request, something to see, in light and dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mfm_nnunet.reports.html import Report, write_report
from mfm_nnunet.reports.runs import show_curves, show_settings
from mfm_nnunet.reports.segmentation import describe_masks
from tests.builders.browser import open_page
from tests.builders.masks import make_case

LABELS = {"anterior": (1,), "posterior <b>": (2,)}


def write_page(folder: Path) -> Path:
    facts, sections = describe_masks([make_case(folder, "a"), make_case(folder, "b", 4)], LABELS, {})
    history = [{"train_loss": 1 / (1 + epoch), "validation_loss": 1.1 / (1 + epoch)} for epoch in range(9)]
    curves = show_curves(history, "they fall.")
    write_report(lambda: Report("A", "B", facts, [curves, *sections, show_settings({"a": 1}, {})]), folder / "a.html")
    return folder / "a.html"


def test_a_page_asks_for_nothing_and_says_nothing(tmp_path: Path) -> None:
    file = write_page(tmp_path)
    light, dark = (open_page(file, tmp_path / f"dark {is_dark}", (1000, 2600), is_dark) for is_dark in (False, True))
    for visit in (light, dark):
        assert visit.console == []
        assert visit.num_requests == 0
    assert light.pixels.mean() > 180
    assert dark.pixels.mean() < 75
    for visit in (light, dark):
        colours = visit.pixels.reshape(-1, 3).astype(int)
        assert (np.ptp(colours, axis=1) > 60).mean() > 0.005, "no picture is seen"
        assert len(np.unique(colours, axis=0)) > 500


def test_a_narrow_page_does_not_leave_its_window(tmp_path: Path) -> None:
    """What is wider than a telephone scrolls by itself: the right edge of the page stays empty."""
    visit = open_page(write_page(tmp_path), tmp_path / "narrow", (500, 3000))
    edge = visit.pixels[:, -6:]
    assert (edge == visit.pixels[0, 0]).all()


def test_messages_and_requests_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "bait.html").write_text(
        "<!DOCTYPE html><img src='http://bait.invalid/a.png'><script>console.error('boo')</script>"
    )
    visit = open_page(tmp_path / "bait.html", tmp_path / "bait")
    assert visit.num_requests == 1
    assert "boo" in visit.console[0]
