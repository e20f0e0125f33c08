"""The report: numbers from results made by hand, lines of the table as they are, and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

from mfm_nnunet.errors import CaseFailure
from mfm_nnunet.study import report, summary
from mfm_nnunet.study.design import Cell
from tests.study.small import record, result, results

RECORD = record([5, 10, 20], 2, ["scratch", "mae"])
RESULTS = results(
    {
        ("scratch", 5): [0.48, 0.52],
        ("scratch", 10): [0.68, 0.72],
        ("scratch", 20): [0.78, 0.82],
        ("mae", 5): [0.58, 0.62],
        ("mae", 10): [0.48, 0.50],
        ("mae", 20): [0.84, 0.86],
    }
)


@pytest.fixture
def found() -> dict[str, Any]:
    return summary.summarise(RECORD, RESULTS)


def row(found: dict[str, Any], num_labels: int, arm: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if (row["labels"], row["arm"]) == (num_labels, arm))


def test_means_and_comparison(found: dict[str, Any]) -> None:
    dice = row(found, 5, "mae")["dice"]
    assert dice["mean"] == pytest.approx(0.6)
    assert dice["spread"] == pytest.approx(math.sqrt(2) * 0.02)
    assert dice["per_label"] == pytest.approx({"inner": 0.55, "outer": 0.65})
    assert row(found, 5, "mae")["nsd"]["mean"] == pytest.approx(0.65)
    compared = dice["against_scratch"]
    assert compared["difference"] == pytest.approx(0.1)
    assert (compared["better"], compared["cases"]) == (4, 4)
    assert (compared["seeds_better"], compared["seeds_compared"]) == (2, [0, 1])
    assert compared["p"] == pytest.approx(0.125)
    assert compared["p_holm"] == pytest.approx(0.375)
    assert "against_scratch" not in row(found, 5, "scratch")["dice"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_labels_saved(found: dict[str, Any]) -> None:
    halfway = row(found, 5, "mae")["dice"]["labels_saved"]
    assert halfway["needed"] == pytest.approx(math.sqrt(50))
    assert halfway["saved"] == pytest.approx(math.sqrt(50) - 5)
    assert row(found, 10, "mae")["dice"]["labels_saved"]["needed"] == 5
    never = row(found, 20, "mae")["dice"]["labels_saved"]
    assert (never["needed"], never["saved"]) == (None, None)


def test_lines_of_the_table(found: dict[str, Any]) -> None:
    lines = report.table(RECORD, found).splitlines()
    assert lines[0] == "# Label efficiency: Dataset004_Small, 3d_fullres"
    assert lines[2] == "Test cases: 4. Finished cells: 12 of 12."
    expected = """\
| labels | start | seeds | Dice | against scratch | 95 % | cases better | seeds better | p | scratch needs | saved |
|---|---|---|---|---|---|---|---|---|---|---|
| 5 | scratch | 2 | 0.5000 ± 0.0283 |  |  |  |  |  |  |  |
| 5 | mae | 2 | 0.6000 ± 0.0283 | +0.1000 | +0.1000 to +0.1000 | 4 of 4 | 2 of 2 | 0.38 | 7.1 | +2.1 |
| 10 | scratch | 2 | 0.7000 ± 0.0283 |  |  |  |  |  |  |  |
| 10 | mae | 2 | 0.4900 ± 0.0141 | -0.2100 | -0.2100 to -0.2100 | 0 of 4 | 0 of 2 | 0.38 | at most 5 | -5 or less |
| 20 | scratch | 2 | 0.8000 ± 0.0283 |  |  |  |  |  |  |  |
| 20 | mae | 2 | 0.8500 ± 0.0141 | +0.0500 | +0.0500 to +0.0500 | 4 of 4 | 2 of 2 | 0.38 | more than 20 | more than 0 |
"""
    assert expected.splitlines() == lines[6:14]
    assert "| 5 | mae | 0.5500 | 0.6000 | 0.6500 | 0.7000 | 1.5 |" in lines
    assert any("surface-distance 0.1" in line for line in lines)
    assert "## Failed" not in lines


def test_a_study_that_is_not_finished() -> None:
    """Missing cells are missing rows; comparisons take the seeds that both have, labels saved those that all have."""
    some = {cell: found for cell, found in RESULTS.items() if cell != Cell(20, 1, "scratch") and cell.arm == "scratch"}
    some[Cell(5, 1, "mae")] = RESULTS[Cell(5, 1, "mae")]
    found = summary.summarise(RECORD, some, [CaseFailure("mae, 5 labels, seed 0", "E_OOM", "not enough memory")])
    assert [(row["labels"], row["arm"]) for row in found["rows"]] == [
        *((5, "scratch"), (5, "mae"), (10, "scratch"), (20, "scratch"))
    ]
    dice = row(found, 5, "mae")["dice"]
    assert dice["against_scratch"]["seeds_compared"] == [1]
    assert dice["spread"] is None
    assert "labels_saved" not in dice
    text = report.table(RECORD, found)
    assert "Finished cells: 6 of 12." in text
    assert "* mae, 5 labels, seed 0: E_OOM  not enough memory" in text
    assert "nan" not in text


def test_nothing_is_finished_yet(tmp_path: Path) -> None:
    found = summary.summarise(RECORD, {})
    assert found["rows"] == []
    assert "Finished cells: 0 of 12." in report.table(RECORD, found)
    report.plot(tmp_path / "study.png", RECORD, found)


def test_a_study_without_scratch_compares_nothing() -> None:
    alone = record([5], 1, ["mae"])
    found = summary.summarise(alone, results({("mae", 5): [0.6]}))
    assert not {"against_scratch", "labels_saved"} & set(found["rows"][0]["dice"])
    assert "| 5 | mae | 1 | 0.6000 |  |  |  |  |  |  |  |" in report.table(alone, found).splitlines()


def test_labels_that_no_case_has_are_left_out() -> None:
    """The first case lacks one label, the second all, and what one seed lacks another may have."""
    first, second = result([0.5, 0.7]), result([0.5, 0.7])
    first["scores"]["case0"]["outer"] = {"dice": None, "nsd": None}
    for label in ("inner", "outer"):
        first["scores"]["case1"][label] = {"dice": None, "nsd": None}
    assert summary.case_scores(first, "dice").tolist() == pytest.approx([0.45, math.nan], nan_ok=True)
    both = {Cell(5, 0, "scratch"): first, Cell(5, 1, "scratch"): second}
    dice = summary.summarise(record([5], 2, ["scratch"], 2), both)["rows"][0]["dice"]
    assert dice["per_seed"] == pytest.approx([0.45, 0.6])
    assert dice["per_label"] == pytest.approx({"inner": (0.45 + 0.55) / 2, "outer": 0.65})


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_picture(tmp_path: Path, found: dict[str, Any], num_labels: int) -> None:
    shown = record([5, 10, 20][:num_labels], 2, ["scratch", "mae"])
    report.plot(tmp_path / "study.png", shown, summary.summarise(shown, RESULTS))
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "study.png")))[..., :3].astype(int)
    assert min(pixels.shape[:2]) > 400
    is_blue = (pixels[..., 2] - pixels[..., 0] > 100).mean()
    assert is_blue > 0.0002, "the line of the second arm was not drawn"
