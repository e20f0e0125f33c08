"""The report: numbers from results made by hand, lines of the table as they are, and a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, to_dict
from mfm_nnunet.study import report, summary
from mfm_nnunet.study.design import Cell
from mfm_nnunet.study.statistics import compare_paired
from tests.builders.small import record, result, results

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


def test_a_setting_that_is_given_twice_is_told_once(found: dict[str, Any]) -> None:
    settings = ["finetune.validation_iterations=1", "finetune.epochs=9", "finetune.validation_iterations=1"]
    question = {**RECORD["question"], "settings": settings}
    lines = report.table({**RECORD, "question": question}, found).splitlines()
    assert "* Settings of all: finetune.validation_iterations=1, finetune.epochs=9." in lines


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
| 5 | mae | 2 | 0.6000 ± 0.0283 | +0.1000 | - | 4 of 4 | 2 of 2 | 0.38 | 7.1 | +2.1 |
| 10 | scratch | 2 | 0.7000 ± 0.0283 |  |  |  |  |  |  |  |
| 10 | mae | 2 | 0.4900 ± 0.0141 | -0.2100 | - | 0 of 4 | 0 of 2 | 0.38 | at most 5 | -5 or less |
| 20 | scratch | 2 | 0.8000 ± 0.0283 |  |  |  |  |  |  |  |
| 20 | mae | 2 | 0.8500 ± 0.0141 | +0.0500 | - | 4 of 4 | 2 of 2 | 0.38 | more than 20 | more than 0 |
"""
    start = lines.index(expected.splitlines()[0])
    assert expected.splitlines() == lines[start : start + 8]
    assert "| 5 | mae | 0.5500 | 0.6000 | 0.6500 | 0.7000 | 1.5 |" in lines
    assert any("surface-distance 0.1" in line for line in lines)
    assert "## Failed" not in lines


@pytest.mark.parametrize("num_cases", [5, 6])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_what_is_too_few_to_tell(num_cases: int, seeds: int) -> None:
    """Intervals of few cases would be far too narrow, and one seed is no comparison of ways to train."""
    means = np.linspace(-0.1, 0.1, num_cases)
    done = {
        Cell(5, seed, arm): result([*(mean + means * (1 + seed))])
        for arm, mean in (("scratch", 0.5), ("mae", 0.6))
        for seed in range(seeds)
    }
    asked = record([5], seeds, ["scratch", "mae"], num_cases)
    found = summary.summarise(asked, done)
    of_mae = row(found, 5, "mae")["dice"]
    assert (of_mae["against_scratch"]["interval"] is None) == (num_cases < 6)
    assert (of_mae["labels_saved"]["interval"] is None) == (num_cases < 6)
    text = report.table(asked, found)
    assert (f"There are no 95 % intervals: {num_cases} test cases are too few" in text) == (num_cases < 6)
    assert (f"With {seeds} seed" in text) == (seeds < 3)
    assert " | more than 5 | more than 0 |" in text


@pytest.mark.parametrize(("unit", "shown"), [("mm", "1 mm"), ("pixels", "1 pixel"), (None, "1 mm")])
def test_pictures_have_no_millimetres(unit: str | None, shown: str) -> None:
    said = {} if unit is None else {"length_unit": unit}  # older results do not tell
    found = summary.summarise(RECORD, {cell: {**found, **said} for cell, found in RESULTS.items()})
    assert f"## Normalised surface distance (NSD) within {shown}\n" in report.table(RECORD, found)


def test_names_of_structures_are_cells_of_the_table() -> None:
    names = {"inner": "in|ner <b>", "outer": "outer"}
    renamed = {
        cell: {**found, "scores": {case: {names[n]: v for n, v in of.items()} for case, of in found["scores"].items()}}
        for cell, found in RESULTS.items()
    }
    text = report.table(RECORD, summary.summarise(RECORD, renamed))
    assert r"in\|ner &lt;b>, Dice" in text


def test_the_curve_of_scratch_may_be_shorter_than_the_table(found: dict[str, Any]) -> None:
    """Later calls asked for other numbers of labels, without scratch."""
    more, cell = record([5, 10, 20, 40], 2, ["scratch", "mae"]), Cell(40, 0, "mae")
    more["asked"] = [*({"arm": c.arm, "num_labels": c.num_labels, "seed": c.seed} for c in (*RESULTS, cell))]
    grown = summary.summarise(more, {**RESULTS, cell: RESULTS[Cell(20, 0, "mae")]})
    assert (grown["num_finished"], grown["num_cells"]) == (13, 13)
    assert row(grown, 5, "mae")["dice"]["labels_saved"] == row(found, 5, "mae")["dice"]["labels_saved"]
    (line,) = [line for line in report.table(more, grown).splitlines() if line.startswith("| 40 | mae | 1 | 0.8400")]
    assert line.endswith("| more than 20 | more than -20 |")


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


def test_what_each_start_was_really_trained_with(tmp_path: Path) -> None:
    """As the trainings wrote it: open settings are resolved by start, so starts may differ without a word of --set."""
    for cell, of_cell in RESULTS.items():
        folder = tmp_path / "cells" / cell.folder_name
        fold = folder / "results" / "Dataset004_Small" / "MFMTrainer__mfmStudyPlans__3d_fullres" / "fold_3"
        fold.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(of_cell))
        checkpoint, parts = ({"name": "a.pth"}, "encoder_decoder") if cell.arm == "mae" else (None, "auto")
        settings = FinetuneSettings(
            learning_rate=1e-3 if checkpoint else 1e-2,
            epochs=16,
            warmup_epochs=2,
            layer_decay=0.75 if (cell.arm, cell.num_labels) == ("mae", 20) else 1.0,
            parts=parts,  # type: ignore[arg-type]
            checkpoint=checkpoint,
        )
        content = {"settings": to_dict(MFMBlock(finetune=settings))}
        (fold / "settings.json").write_text(json.dumps(content))
    found = summary.summarise(RECORD, summary.read_results(tmp_path, list(RESULTS)))
    lines = report.table(RECORD, found).splitlines()
    same = "finetune.epochs=16, finetune.warmup_epochs=2"
    assert f"* scratch was trained with finetune.learning_rate=0.01, {same}, finetune.layer_decay=1.0." in lines
    decay = "finetune.layer_decay=1.0 (5, 10 labels) and 0.75 (20 labels)"
    line = f"* mae was trained with finetune.learning_rate=0.001, {same}, finetune.parts=encoder_decoder, {decay}."
    assert line in lines
    differing = "finetune.learning_rate, finetune.layer_decay"
    assert f"* So the starts differ not only in their weights, but in {differing}." in lines


ABSENT = {"dice": None, "nsd": None}
WRONG = {"dice": 0, "nsd": 0}


def test_the_references_alone_decide_what_is_averaged() -> None:
    """The first reference lacks one label, the second all: what is predicted there is counted beside the scores."""
    asked = record([5], 2, ["scratch", "mae"], 3)
    cells = {Cell(5, seed, arm): result([0.5, 0.7, 0.6]) for seed in (0, 1) for arm in ("scratch", "mae")}
    for cell, of_cell in cells.items():
        of_cell["in_reference"] = {"case0": ["inner"], "case1": [], "case2": ["inner", "outer"]}
        of_cell["scores"]["case0"]["outer"] = WRONG if cell.arm == "mae" else ABSENT
        of_cell["scores"]["case1"] = {"inner": ABSENT, "outer": WRONG if cell == Cell(5, 1, "mae") else ABSENT}
    found = summary.summarise(asked, cells)
    for arm in ("scratch", "mae"):
        dice = row(found, 5, arm)["dice"]
        assert dice["per_seed"] == pytest.approx([(0.45 + 0.6) / 2] * 2)
        assert dice["per_label"] == pytest.approx({"inner": (0.45 + 0.55) / 2, "outer": 0.65})
    compared = row(found, 5, "mae")["dice"]["against_scratch"]
    assert (compared["difference"], compared["cases"]) == (0, 2)
    assert row(found, 5, "mae")["false_positives"] == {
        "inner": {"predicted": 0, "cases": 2},
        "outer": {"predicted": 3, "cases": 4},
    }
    lines = report.table(asked, found).splitlines()
    assert "The references of 1 test cases hold no label, so these cases have no scores." in lines
    columns = "| labels | start | inner, Dice | inner, NSD | outer, Dice | outer, NSD | inner, false positives | outer,"
    assert any(line.startswith(columns) for line in lines)
    assert any(line.startswith("| 5 | mae |") and "| 0 of 2 | 3 of 4 |" in line for line in lines)


def test_results_that_do_not_tell_what_the_references_hold() -> None:
    """They were written by earlier versions: a label without a score in any cell is not in the reference."""
    first, second = result([0.5, 0.7]), result([0.5, 0.7])
    first["scores"]["case0"]["outer"], second["scores"]["case0"]["outer"] = ABSENT, WRONG
    both = {Cell(5, 0, "scratch"): first, Cell(5, 1, "scratch"): second}
    (only,) = summary.summarise(record([5], 2, ["scratch"], 2), both)["rows"]
    assert only["dice"]["per_seed"] == pytest.approx([(0.45 + 0.7) / 2] * 2)
    assert only["false_positives"] == {"outer": {"predicted": 1, "cases": 2}}
    second["scores"]["case0"]["more"] = WRONG
    with pytest.raises(MFMError, match=r"E_FORMAT.*different cases or labels"):
        summary.summarise(record([5], 2, ["scratch"], 2), both)


def test_no_reference_holds_a_label(tmp_path: Path) -> None:
    asked = record([5], 2, ["scratch", "mae"], 2)
    cells = {Cell(5, seed, arm): result([0.5, 0.7]) for seed in (0, 1) for arm in ("scratch", "mae")}
    for of_cell in cells.values():
        of_cell["scores"] = {case: dict.fromkeys(("inner", "outer"), ABSENT) for case in of_cell["scores"]}
    found = summary.summarise(asked, cells)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = report.table(asked, found)
    assert "No reference of a test case holds any label" in text
    assert "| 5 | mae | 2 | - |" in text
    assert "nan" not in text
    report.plot(tmp_path / "study.png", asked, found)


def test_scans_of_one_subject_are_one_observation() -> None:
    """Four subjects, two of them with two scans: each counts once."""
    asked = record([5], 1, ["scratch", "mae"], 6)
    asked["question"]["subjects"] = {f"case{number}": "aabbcd"[number] for number in range(6)}
    cells = {
        Cell(5, 0, "scratch"): result([0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        Cell(5, 0, "mae"): result([0.7, 0.5, 0.7, 0.3, 0.5, 0.6]),
    }
    found = summary.summarise(asked, cells)
    dice = row(found, 5, "mae")["dice"]
    assert dice["mean"] == pytest.approx((0.6 + 0.5 + 0.5 + 0.6) / 4)
    compared = dice["against_scratch"]
    assert compared["difference"] == pytest.approx(0.05)
    assert (compared["better"], compared["subjects"], compared["cases"]) == (2, 4, 6)
    assert compared["p"] == pytest.approx(compare_paired(np.array([0.6, 0.5, 0.5, 0.6]), np.full(4, 0.5))["p"])
    text = report.table(asked, found)
    assert "Test cases: 6, of 4 subjects. Finished" in text
    assert "| subjects better |" in text
    assert "| 2 of 4 |" in text
    assert "bootstrap over subjects" in text


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_picture(tmp_path: Path, found: dict[str, Any], num_labels: int) -> None:
    shown = record([5, 10, 20][:num_labels], 2, ["scratch", "mae"])
    report.plot(tmp_path / "study.png", shown, summary.summarise(shown, RESULTS))
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "study.png")))[..., :3].astype(int)
    assert min(pixels.shape[:2]) > 400
    is_blue = (pixels[..., 2] - pixels[..., 0] > 100).mean()
    assert is_blue > 0.0002, "the line of the second arm was not drawn"
