"""A page is one file without network or script; foreign text stays text; an error costs one line and no result."""

from __future__ import annotations

import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mfm_nnunet.reports.html import (
    Report,
    Section,
    Table,
    draw_curves,
    embed_image,
    file_picture,
    flat_table,
    render,
    without_folders,
    write_report,
)
from mfm_nnunet.reports.progress import save_figure

EVIL = '<script>alert(1)</script><img src="http://x.example/a.png" onerror=alert(1)>"\' {{ 7*7 }} \x1b[2J \u202e'
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Collect tags with attributes, headings, and faults of nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_report(text: str = "plain") -> Report:
    from PIL import Image

    picture = embed_image(Image.fromarray(np.zeros((8, 9, 3), np.uint8)), f"alt {text}", text)
    curve = draw_curves(
        {text.replace("\x1b", ""): [1.0, None, 0.5], "b": [0.2, float("nan"), 0.1]}, "loss", f"curve {text}"
    )
    part = Section(text, pictures=[picture], legend=[(text, "#ff0000")], tables=[Table(text, (text,), [(text,)], True)])
    table = Table("numbers", ("case", "ml", text), [("a", 1.23456, None), (text, float("nan"), 7)])
    section = Section("Cases", [text], text, [text], [table], pictures=[curve], parts=[part])
    return Report(text, text, {text: text, "Dice": 0.87654}, [section])


def test_foreign_text_stays_text() -> None:
    text = render(a_report(EVIL))
    page = Page(text)
    assert page.open == []
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in text, "no template inside a value"
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_nothing_is_fetched() -> None:
    page = Page(render(a_report()))
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(value and value.startswith(("#", "data:")) for value in links)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)
    assert "script" not in str(policy)


def test_a_page_can_be_heard() -> None:
    """Headings without a gap, a language, a text for each picture, headers of rows and columns, all ids once."""
    page = Page(render(a_report()))
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels == [1, 2, 3]
    images = [attributes for tag, attributes in page.tags if tag == "img" or attributes.get("role") == "img"]
    assert len(images) == 2
    assert all(attributes.get("alt") or attributes.get("aria-label") for attributes in images)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    inside = [a["id"] for tag, a in page.tags if "id" in a and tag in ("section", "main", "h1", "h2", "h3")]
    assert len(inside) == len(set(inside))
    targets = [str(a["href"])[1:] for tag, a in page.tags if tag == "a"]
    assert set(targets) <= set(inside)


def test_numbers_are_short_and_missing_ones_are_dashes() -> None:
    text = render(a_report())
    assert '<td class="n">1.235</td><td>-</td>' in text
    assert '<td class="n">-</td><td class="n">7</td>' in text


def test_folders_are_left_out() -> None:
    text = "E_NIFTI: /home/doe/Müller_Anna/x 1/a_0000.nii.gz: cut off at 3/4 (C:\\patients\\b.nii)"
    assert without_folders("/data/a/b.nii.gz: broken") == "b.nii.gz: broken"
    assert "doe" not in without_folders(text)
    assert "3/4" in without_folders(text)
    assert flat_table("t", {"a": {"b": ["/data/doe/c.pth", 2]}}).rows == [("a.b", "['c.pth', 2]")]


def test_a_drawing_follows_the_colour_of_the_page() -> None:
    drawing = draw_curves({"$x$ <b>": [0.1, 0.2]}, "Dice", "alt", is_share=True).content
    assert "currentColor" in drawing
    assert "#0a0b0c" not in drawing
    assert "$x$ &lt;b&gt;" in drawing


def test_pictures_of_files_get_a_palette(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    figure.subplots().imshow(np.random.default_rng(0).random((90, 90)))
    save_figure(figure, tmp_path / "a.png", 100)
    picture = file_picture(tmp_path / "a.png", "alt")
    assert picture.size == (600, 400)
    assert len(picture.content) < 1.34 * (tmp_path / "a.png").stat().st_size


@pytest.mark.parametrize("error", [RuntimeError("x\ny"), MemoryError(), OSError(28, "full"), RecursionError("deep")])
def test_an_error_is_one_line_and_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    def make() -> Report:
        raise error

    with caplog.at_level(logging.INFO, "mfm_nnunet"):
        write_report(make, tmp_path / "report.html")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "\n" not in caplog.records[0].getMessage()
    assert "report.html" in caplog.records[0].getMessage()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_report(a_report, tmp_path / "none" / "report.html")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
