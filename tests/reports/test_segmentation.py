"""The report on masks: all cases in the table, the worst first, pictures of the first, and no case costs another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mfm_nnunet.reports import segmentation
from mfm_nnunet.reports.html import Report, Section, render
from mfm_nnunet.reports.measures import measure, summarise_volumes
from mfm_nnunet.reports.segmentation import MOST_PICTURED, PredictedCase, describe_masks
from mfm_nnunet.reports.views import OrientedImage
from tests.builders.masks import make_case

LABELS = {"anterior": (1,), "posterior": (2,)}


def pictures_of(section: Section) -> int:
    return len(section.pictures) + sum(map(pictures_of, section.parts))


def test_the_worst_come_first(tmp_path: Path) -> None:
    cases = [make_case(tmp_path, "good"), make_case(tmp_path, "bad", 6), make_case(tmp_path, "middle", 3)]
    cases += [PredictedCase("failed", status="failed", reason="E_NONFINITE: NaN. Export it again.")]
    facts, (table, shown) = describe_masks(cases, LABELS, {})
    assert [row[0] for row in table.tables[0].rows] == ["failed", "bad", "middle", "good"]
    assert "Export it again." in table.tables[0].rows[0][-1]
    assert [part.title for part in shown.parts] == ["bad", "middle", "good"]
    assert (facts["Cases"], facts["Cases failed"], facts["Cases to look at"]) == (4, 1, 1)
    assert facts["Mean Dice"] == pytest.approx(np.mean([0.4, 0.7, 1]))
    assert pictures_of(shown) == 3 * 6, "three planes of labels and of errors"


def test_without_references_there_are_no_errors(tmp_path: Path) -> None:
    case = replace(make_case(tmp_path, "a"), reference=None)
    facts, (table, shown) = describe_masks([case], LABELS, {})
    assert "Mean Dice" not in facts
    assert "Dice" not in table.tables[0].columns
    assert pictures_of(shown) == 3
    assert not shown.legend


def test_flat_images_have_one_picture(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", shape=(30, 40))
    _, (table, shown) = describe_masks([case], LABELS, {})
    assert "anterior [pixels]" in table.tables[0].columns
    assert table.tables[0].rows[0][2] == 60
    assert pictures_of(shown) == 2


def test_outliers_come_first_and_have_a_reason(tmp_path: Path) -> None:
    names = [f"c{number:02d}" for number in range(MOST_PICTURED + 3)]
    cases = [replace(make_case(tmp_path, name), reference=None) for name in names]
    usual = [measure(OrientedImage(np.kron([[[1, 2]]], np.ones((1, 8, 40 + k))).astype(np.uint8), (3, 1, 1)), LABELS)
             for k in range(20)]  # fmt: skip
    training = summarise_volumes(usual)
    tiny = np.zeros((40, 30, 12), np.uint8)
    tiny[20, 15, 6] = 1
    nibabel.save(nibabel.Nifti1Image(tiny, np.diag([1, 1, 3, 1])), str(cases[-1].mask))
    _, (table, shown) = describe_masks(cases, LABELS, training)
    assert table.tables[0].rows[0][0] == names[-1]
    assert "unusually small: anterior" in table.tables[0].rows[0][-1]
    assert "not found" in table.tables[0].rows[0][-1]
    assert len(table.tables[0].rows) == len(cases)
    assert len(shown.parts) == MOST_PICTURED


@pytest.mark.parametrize("damage", ["no mask", "cut mask", "no image", "reference on another grid"])
def test_a_bad_file_costs_one_case(tmp_path: Path, damage: str) -> None:
    cases = [make_case(tmp_path, "a"), make_case(tmp_path, "b")]
    assert cases[0].mask
    assert cases[0].image
    assert cases[0].reference
    if damage == "no mask":
        cases[0].mask.unlink()
    elif damage == "cut mask":
        cases[0].mask.write_bytes(cases[0].mask.read_bytes()[:60])
    elif damage == "no image":
        cases[0].image.unlink()
    else:
        nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.eye(4)), cases[0].reference)
    _, (table, shown) = describe_masks(cases, LABELS, {})
    assert sorted(row[0] for row in table.tables[0].rows) == ["a", "b"]
    assert "b" in [part.title for part in shown.parts]
    flags = next(row[-1] for row in table.tables[0].rows if row[0] == "a")
    assert {"no mask": "cannot be read", "cut mask": "cannot be read", "no image": "-",
            "reference on another grid": "another grid"}[damage] in flags  # fmt: skip


def test_104_labels(tmp_path: Path) -> None:
    """Volumes by case are folded, and legends name only what is seen."""
    case = make_case(tmp_path, "a")
    labels = {f"organ {value}": (value,) for value in range(1, 105)}
    _, sections = describe_masks([case], labels, {})
    table, shown = sections
    assert len(table.tables[0].columns) < 8
    assert [name for name, _ in shown.parts[0].legend] == ["organ 1", "organ 2"]
    assert [row[0] for row in shown.parts[0].tables[0].rows] == ["organ 1", "organ 2"]
    assert len(table.tables[1].rows) == 104
    assert table.tables[1].is_folded
    assert "organ 104" in render(Report("t", "s", {}, sections))


def test_fifty_cases_stay_small(tmp_path: Path) -> None:
    case = make_case(tmp_path, "a", 3, shape=(60, 64, 64))
    cases = [replace(case, name=f"case {number}") for number in range(50)]
    page = render(Report("t", "s", {}, describe_masks(cases, LABELS, {})[1]))
    assert len(page) < 15e6 * segmentation.MOST_PICTURED / 50
    assert all(f"case {number}<" in page for number in range(50))
