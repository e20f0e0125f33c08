"""Statistics and the summary of results made by hand, the table line by line, and the picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.reports.html import render
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, to_dict
from mfm_nnunet.study import report, summary
from mfm_nnunet.study.design import Cell
from mfm_nnunet.study.folder import Study
from mfm_nnunet.study.summary import compare_paired, correct_by_holm, labels_needed, labels_needed_interval
from tests.builders.small import record, result, results

CURVE = {5: 0.5, 10: 0.7, 20: 0.6, 40: 0.9}
STUDY = record([5, 10, 20], 2, ["scratch", "mae"])
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


def summarised(study: Study, found: Mapping[Cell, Any], *failures: CaseFailure) -> Study:
    return dataclasses.replace(study, results=summary.summarise_study(study, found, failures))


def row(study: Study, num_labels: int, arm: str) -> dict[str, Any]:
    return next(row for row in study.results["rows"] if (row["labels"], row["arm"]) == (num_labels, arm))


@pytest.fixture
def found() -> Study:
    return summarised(STUDY, RESULTS)


def test_paired_comparison() -> None:
    theirs = np.linspace(0.5, 0.8, 8)
    compared = compare_paired(theirs + [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, -0.001], theirs)
    assert compared["difference"] == pytest.approx(0.279 / 8)
    assert (compared["better"], compared["cases"]) == (7, 8)
    # All ranks but the smallest are positive: 2 of the 2^8 sign patterns on either side are as extreme.
    assert compared["p"] == pytest.approx(4 / 2**8)
    low, high = compared["interval"]
    assert 0 < low < 0.279 / 8 < high < 0.07
    same = compare_paired(theirs, theirs)
    assert same == {"difference": 0.0, "interval": [0.0, 0.0], "better": 0, "cases": 8, "p": 1.0}


def test_holm() -> None:
    rows = [{"p": 0.04}, {"p": 0.01}, {"p": 0.03}, {"p": 0.9}]
    correct_by_holm(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.09, 0.04, 0.09, 0.9])
    rows = [{"p": 0.6}, {"p": 0.7}]
    correct_by_holm(rows)
    assert [row["p_holm"] for row in rows] == [1.0, 1.0]
    correct_by_holm([])


@pytest.mark.parametrize(
    ("score", "needed"),
    [
        (0.4, 5),  # nothing is extrapolated: at most 5
        (0.6, math.sqrt(50)),  # half the way from 5 to 10 on the logarithm
        (0.7, 10),
        (0.8, math.sqrt(20 * 40)),  # the setback at 20 costs nothing: there the best so far is 0.7
        (0.9, 40),
        (0.9001, math.inf),
    ],
)
def test_labels_needed(score: float, needed: float) -> None:
    assert labels_needed(CURVE, score) == pytest.approx(needed)
    assert labels_needed({8: 0.9}, score) == (8 if score <= 0.9 else math.inf)


def test_interval_of_labels_needed() -> None:
    hard = np.linspace(-0.2, 0.2, 10)
    curve = {number: score + hard for number, score in CURVE.items()}
    # What makes a case hard is in both, so the interval has no width.
    assert labels_needed_interval(curve, 0.6 + hard) == pytest.approx((math.sqrt(50), math.sqrt(50)))
    interval = labels_needed_interval(curve, 0.88 + hard * np.array([1, -1] * 5))
    assert interval is not None
    assert 10 < interval[0] < 40
    assert interval[1] == math.inf


def test_means_and_comparison(found: Study) -> None:
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
    assert json.loads(json.dumps(found.results, allow_nan=False)) == found.results


def test_labels_saved(found: Study) -> None:
    halfway = row(found, 5, "mae")["dice"]["labels_saved"]
    assert halfway["needed"] == pytest.approx(math.sqrt(50))
    assert halfway["saved"] == pytest.approx(math.sqrt(50) - 5)
    assert row(found, 10, "mae")["dice"]["labels_saved"]["needed"] == 5
    never = row(found, 20, "mae")["dice"]["labels_saved"]
    assert (never["needed"], never["saved"]) == (None, None)


def test_lines_of_the_table(found: Study) -> None:
    """Names are cells of the table; a setting that is given twice is there once."""
    settings = ("finetune.validation_iterations=1", "finetune.epochs=9", "finetune.validation_iterations=1")
    names = {"inner": "in|ner <b>", "outer": "outer"}
    renamed = {
        cell: {
            **of_cell,
            "scores": {case: {names[n]: v for n, v in of.items()} for case, of in of_cell["scores"].items()},
            "in_reference": {case: [*names.values()] for case in of_cell["scores"]},
        }
        for cell, of_cell in RESULTS.items()
    }
    question = dataclasses.replace(STUDY.question, settings=settings)
    lines = report.make_table(summarised(dataclasses.replace(STUDY, question=question), renamed)).splitlines()
    assert lines[0] == "# Label efficiency: Dataset004_Small, 3d_fullres"
    assert lines[2] == "Test cases: 4. Finished cells: 12 of 12."
    expected = """\
| labels | start | seeds | Dice | against scratch | 95 % | cases better | seeds better | p | scratch needs | \
saved | min |
|---|---|---|---|---|---|---|---|---|---|---|---|
| 5 | scratch | 2 | 0.5000 ± 0.0283 |  |  |  |  |  |  |  | 1.5 |
| 5 | mae | 2 | 0.6000 ± 0.0283 | +0.1000 | - | 4 of 4 | 2 of 2 | 0.38 | 7.1 | +2.1 | 1.5 |
| 10 | scratch | 2 | 0.7000 ± 0.0283 |  |  |  |  |  |  |  | 1.5 |
| 10 | mae | 2 | 0.4900 ± 0.0141 | -0.2100 | - | 0 of 4 | 0 of 2 | 0.38 | at most 5 | -5 or less | 1.5 |
| 20 | scratch | 2 | 0.8000 ± 0.0283 |  |  |  |  |  |  |  | 1.5 |
| 20 | mae | 2 | 0.8500 ± 0.0141 | +0.0500 | - | 4 of 4 | 2 of 2 | 0.38 | more than 20 | more than 0 | 1.5 |
"""
    start = lines.index(expected.splitlines()[0])
    assert expected.splitlines() == lines[start : start + 8]
    assert "| 5 | mae | 0.5500 | 0.6000 | 0.6500 | 0.7000 |" in lines
    assert any(line.startswith(r"| labels | start | in\|ner &lt;b>, Dice |") for line in lines)
    assert any("surface-distance 0.1" in line for line in lines)
    assert "* Settings of all: finetune.validation_iterations=1, finetune.epochs=9." in lines
    assert "## Failed" not in lines


@pytest.mark.parametrize(("num_cases", "seeds"), [(5, 1), (5, 3), (6, 2)])
def test_studies_that_are_too_small(num_cases: int, seeds: int) -> None:
    """Intervals of few cases would be far too narrow, and one seed is no comparison of ways to train."""
    spread = np.linspace(-0.1, 0.1, num_cases)
    done = {
        Cell(5, seed, arm): result([*(mean + spread * (1 + seed))])
        for arm, mean in (("scratch", 0.5), ("mae", 0.6))
        for seed in range(seeds)
    }
    study = summarised(record([5], seeds, ["scratch", "mae"], num_cases), done)
    of_mae = row(study, 5, "mae")["dice"]
    assert (of_mae["against_scratch"]["interval"] is None) == (num_cases < 6)
    assert (of_mae["labels_saved"]["interval"] is None) == (num_cases < 6)
    text = report.make_table(study)
    assert (f"There are no 95 % intervals: {num_cases} test cases are too few" in text) == (num_cases < 6)
    assert (f"With {seeds} seed" in text) == (seeds < 3)
    assert " | more than 5 | more than 0 |" in text


@pytest.mark.parametrize(("unit", "shown"), [("mm", "1 mm"), ("pixels", "1 pixel")])
def test_pictures_have_no_millimetres(unit: str, shown: str) -> None:
    study = summarised(STUDY, {cell: {**found, "length_unit": unit} for cell, found in RESULTS.items()})
    assert f"## Normalised surface distance (NSD) within {shown}\n" in report.make_table(study)


def test_the_curve_of_scratch_may_be_shorter_than_the_table(found: Study) -> None:
    """Later calls asked for other numbers of labels, without scratch."""
    cell = Cell(40, 0, "mae")
    grown = dataclasses.replace(STUDY, asked=(*STUDY.asked, cell))
    grown = summarised(grown, {**RESULTS, cell: RESULTS[Cell(20, 0, "mae")]})
    assert (grown.results["num_finished"], grown.results["num_cells"]) == (13, 13)
    assert row(grown, 5, "mae")["dice"]["labels_saved"] == row(found, 5, "mae")["dice"]["labels_saved"]
    (line,) = [line for line in report.make_table(grown).splitlines() if line.startswith("| 40 | mae | 1 | 0.8400")]
    assert line.endswith("| more than 20 | more than -20 | 1.5 |")


def test_a_study_that_is_not_finished(tmp_path: Path) -> None:
    """Missing cells are missing rows; comparisons take the seeds that both have, labels saved those that all have."""
    nothing = summarised(STUDY, {})
    assert nothing.results["rows"] == []
    assert "Finished cells: 0 of 12." in report.make_table(nothing)
    report.plot(tmp_path / "study.png", nothing)
    some = {cell: found for cell, found in RESULTS.items() if cell != Cell(20, 1, "scratch") and cell.arm == "scratch"}
    some[Cell(5, 1, "mae")] = RESULTS[Cell(5, 1, "mae")]
    study = summarised(STUDY, some, CaseFailure("mae, 5 labels, seed 0", "E_OOM", "not enough memory"))
    assert [(row["labels"], row["arm"]) for row in study.results["rows"]] == [
        *((5, "scratch"), (5, "mae"), (10, "scratch"), (20, "scratch"))
    ]
    dice = row(study, 5, "mae")["dice"]
    assert dice["against_scratch"]["seeds_compared"] == [1]
    assert dice["spread"] is None
    assert "labels_saved" not in dice
    text = report.make_table(study)
    assert "Finished cells: 6 of 12." in text
    assert "* mae, 5 labels, seed 0: E_OOM  not enough memory" in text
    assert "nan" not in text


def test_a_study_without_scratch_compares_nothing() -> None:
    study = summarised(record([5], 1, ["mae"]), results({("mae", 5): [0.6]}))
    assert not {"against_scratch", "labels_saved"} & set(row(study, 5, "mae")["dice"])
    assert "| 5 | mae | 1 | 0.6000 |  |  |  |  |  |  |  | 1.5 |" in report.make_table(study).splitlines()


def test_settings_that_each_start_was_trained_with(tmp_path: Path) -> None:
    """Open settings are resolved by start, so starts may differ without a word of --set."""
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
        (fold / "settings.json").write_text(json.dumps({"settings": to_dict(MFMBlock(finetune=settings))}))
    study = summarised(STUDY, summary.read_results(tmp_path, list(RESULTS)))
    lines = report.make_table(study).splitlines()
    same = "finetune.epochs=16, finetune.warmup_epochs=2"
    assert f"* scratch was trained with finetune.learning_rate=0.01, {same}, finetune.layer_decay=1.0." in lines
    decay = "finetune.layer_decay=1.0 (5, 10 labels) and 0.75 (20 labels)"
    line = f"* mae was trained with finetune.learning_rate=0.001, {same}, finetune.parts=encoder_decoder, {decay}."
    assert line in lines
    differing = "finetune.learning_rate, finetune.layer_decay"
    assert f"* So the starts differ not only in their weights, but also in {differing}." in lines


ABSENT = {"dice": None, "nsd": None}
WRONG = {"dice": 0, "nsd": 0}


def test_the_references_alone_decide_what_is_averaged() -> None:
    """The first reference lacks one label, the second all: what is predicted there is counted beside the scores."""
    cells = {Cell(5, seed, arm): result([0.5, 0.7, 0.6]) for seed in (0, 1) for arm in ("scratch", "mae")}
    for cell, of_cell in cells.items():
        of_cell["in_reference"] = {"case0": ["inner"], "case1": [], "case2": ["inner", "outer"]}
        of_cell["scores"]["case0"]["outer"] = WRONG if cell.arm == "mae" else ABSENT
        of_cell["scores"]["case1"] = {"inner": ABSENT, "outer": WRONG if cell == Cell(5, 1, "mae") else ABSENT}
    study = summarised(record([5], 2, ["scratch", "mae"], 3), cells)
    for arm in ("scratch", "mae"):
        dice = row(study, 5, arm)["dice"]
        assert dice["per_seed"] == pytest.approx([(0.45 + 0.6) / 2] * 2)
        assert dice["per_label"] == pytest.approx({"inner": (0.45 + 0.55) / 2, "outer": 0.65})
    compared = row(study, 5, "mae")["dice"]["against_scratch"]
    assert (compared["difference"], compared["cases"]) == (0, 2)
    assert row(study, 5, "mae")["false_positives"] == {
        "inner": {"predicted": 0, "cases": 2},
        "outer": {"predicted": 3, "cases": 4},
    }
    lines = report.make_table(study).splitlines()
    assert any(line.startswith("1 test cases have no label in their reference") for line in lines)
    columns = "| labels | start | inner, Dice | inner, NSD | outer, Dice | outer, NSD | inner, false positives | outer,"
    assert any(line.startswith(columns) for line in lines)
    assert any(line.startswith("| 5 | mae |") and "| 0 of 2 | 3 of 4 |" in line for line in lines)


def test_results_of_different_labels_are_refused() -> None:
    first, second = result([0.5, 0.7]), result([0.5, 0.7])
    second["scores"]["case0"]["more"] = WRONG
    with pytest.raises(MFMError, match="E_FORMAT"):
        summarised(record([5], 2, ["scratch"], 2), {Cell(5, 0, "scratch"): first, Cell(5, 1, "scratch"): second})


@pytest.mark.parametrize(
    "change",
    [
        {"scores": 3},
        {"scores": {"case0": {"inner": {"dice": 0.5}}}},
        {"scores": {"case0": {"inner": {"dice": "0.5", "nsd": 0.5}}}},
        {"in_reference": {"case0": 3}},
        {"in_reference": {}},
        {"seconds": {"training": "long"}},
    ],
)
def test_damaged_results(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result([0.5])))
    assert summary.read_result(tmp_path) == result([0.5])
    (tmp_path / "result.json").write_text(json.dumps({**result([0.5]), **change}))
    with pytest.raises(MFMError, match=r"E_FORMAT.*result\.json"):
        summary.read_result(tmp_path)


def test_no_reference_holds_a_label(tmp_path: Path) -> None:
    cells = {Cell(5, seed, arm): result([0.5, 0.7]) for seed in (0, 1) for arm in ("scratch", "mae")}
    for of_cell in cells.values():
        of_cell["scores"] = {case: dict.fromkeys(("inner", "outer"), ABSENT) for case in of_cell["scores"]}
        of_cell["in_reference"] = {case: [] for case in of_cell["scores"]}
    study = summarised(record([5], 2, ["scratch", "mae"], 2), cells)
    assert json.loads(json.dumps(study.results, allow_nan=False)) == study.results
    text = report.make_table(study)
    assert "2 test cases have no label in their reference, so they have no scores. Test on other cases." in text
    assert "| 5 | mae | 2 | - |" in text
    assert "nan" not in text
    report.plot(tmp_path / "study.png", study)


def test_scans_of_one_subject_are_one_observation() -> None:
    """Four subjects, two of them with two scans: each counts once."""
    study = record([5], 1, ["scratch", "mae"], 6)
    question = dataclasses.replace(study.question, subjects={f"case{n}": "aabbcd"[n] for n in range(6)})
    cells = {
        Cell(5, 0, "scratch"): result([0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        Cell(5, 0, "mae"): result([0.7, 0.5, 0.7, 0.3, 0.5, 0.6]),
    }
    study = summarised(dataclasses.replace(study, question=question), cells)
    dice = row(study, 5, "mae")["dice"]
    assert dice["mean"] == pytest.approx((0.6 + 0.5 + 0.5 + 0.6) / 4)
    compared = dice["against_scratch"]
    assert compared["difference"] == pytest.approx(0.05)
    assert (compared["better"], compared["subjects"], compared["cases"]) == (2, 4, 6)
    assert compared["p"] == pytest.approx(compare_paired(np.array([0.6, 0.5, 0.5, 0.6]), np.full(4, 0.5))["p"])
    text = report.make_table(study)
    assert "Test cases: 6, of 4 subjects. Finished" in text
    assert "| subjects better |" in text
    assert "| 2 of 4 |" in text
    assert "bootstrap over subjects" in text


@pytest.mark.parametrize("num_labels", [1, 3])
def test_the_picture(tmp_path: Path, num_labels: int) -> None:
    report.plot(tmp_path / "study.png", summarised(record([5, 10, 20][:num_labels], 2, ["scratch", "mae"]), RESULTS))
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "study.png")))[..., :3].astype(int)
    assert min(pixels.shape[:2]) > 400
    is_blue = (pixels[..., 2] - pixels[..., 0] > 100).mean()
    assert is_blue > 0.0002, "the line of the second arm was not drawn"


def test_the_page_has_the_tables_and_the_picture(tmp_path: Path) -> None:
    study = summarised(STUDY, RESULTS, CaseFailure("scratch, 20 labels", "E_OOM", "killed in /home/doe/a.log"))
    report.plot(tmp_path / "study.png", study)
    page = render(report.make_page(study, tmp_path / "study.png"))
    assert page.count("<img ") == 1
    rows = [line for line in report.make_table(study).splitlines() if line.startswith("| 5 | mae | 2 |")]
    assert len(rows) == 2
    for cell in rows[0].split(" | ")[3:8]:
        assert f">{cell}</td>" in page
    assert "Finished cells</dt><dd>12 of 12<" in page
    assert "killed in a.log" in page
    assert "Wilcoxon" in page
