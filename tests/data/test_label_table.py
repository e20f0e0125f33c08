"""labels.csv: what is read, one error per fault, and folds that hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfm_nnunet.data.label_table import LabelTable, read_label_table
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError

CASES = ("a", "b", "c", "d")


def read(
    folder: Path, text: str, task: str = "classification", cases: Sequence[str] = CASES, **more: Any
) -> LabelTable:
    file = folder / "labels.csv"
    file.write_text(text, encoding="utf-8")
    return read_label_table(file, DatasetJson.of({"task": task, **more}), cases)


FAULTS = {
    "unknown case": ("E_NOT_FOUND", "case,label\na,x\nb,y\nc,x\nd,y\ne,x\n", "e"),
    "case twice": ("E_CONFIG", "case,label\na,x\na,x\nb,y\nc,x\nd,y\n", "a"),
    "case missing": ("E_NOT_FOUND", "case,label\na,x\nb,y\nc,x\n", "d"),
    "no column of cases": ("E_FORMAT", "name,label\na,x\n", "case"),
    "no column of labels": ("E_FORMAT", "case,class\na,x\nb,y\nc,x\nd,y\n", "label"),
    "one class": ("E_LABEL_VALUE", "case,label\na,x\nb,x\nc,x\nd,x\n", "x"),
    "a class of one": ("E_LABEL_VALUE", "case,label\na,x\nb,x\nc,x\nd,y\n", "y"),
    "letter case": ("E_LABEL_VALUE", "case,label\na,x\nb,X\nc,y\nd,y\n", "X"),
    "spaces": ("E_LABEL_VALUE", "case,label\na,x\nb,x \nc,y\nd,y\n", "x "),
    "numbers": ("E_LABEL_VALUE", "case,label\na,0.5\nb,1.5\nc,0.5\nd,1.5\n", "regression"),
    "subject in two folds": (
        "E_CONFIG", "case,label,subject,fold\na,x,s,0\nb,y,s,1\nc,x,t,0\nd,y,u,1\n", "'s'",
    ),
    "fold that is no number": ("E_CONFIG", "case,label,fold\na,x,first\nb,y,1\nc,x,0\nd,y,1\n", "first"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_one_error(fault: str, tmp_path: Path) -> None:
    code, text, word = FAULTS[fault]
    with pytest.raises(MFMError) as error:
        read(tmp_path, text)
    assert error.value.code == code
    assert "labels.csv" in error.value.message
    assert word in error.value.message


def test_other_tasks_have_faults_too(tmp_path: Path) -> None:
    for text, task, more in (
        ("case,label\na,1\nb,x\nc,2\nd,3\n", "regression", {}),
        ("case,label\na,1\nb,1\nc,1\nd,1\n", "regression", {}),
        ("case,p,q\na,0,1\nb,2,0\nc,1,1\nd,1,0\n", "multilabel", {"classes": ["p", "q"]}),
        ("case,label\na,p\nb,q\nc,p;q\nd,p\n", "multilabel", {}),
        ("case,label\na,x\nb,z\nc,x\nd,z\n", "classification", {"classes": ["x", "y"]}),
    ):
        with pytest.raises(MFMError) as error:
            read(tmp_path, text, task, **more)
        assert error.value.code == "E_LABEL_VALUE", text
    with pytest.raises(MFMError, match="E_NOT_FOUND  "):
        read_label_table(tmp_path / "none.csv", DatasetJson.of({"task": "classification"}), CASES)


def test_tables_of_other_programs(tmp_path: Path) -> None:
    expected = {"a": (0.0,), "b": (1.0,), "c": (0.0,), "d": (1.0,)}
    for text in (
        "image,label\na_0000.png,x\nb_0000.png,y\nc_0000.png,x\nd_0000.png,y\n",
        "image_path,label\nimages/a.nii.gz,x\n/b.nii.gz,y\nc.nii.gz,x\nC:\\scans\\d.nii.gz,y\n",
        "\ufeffcase;label;subject\na;x;1\nb;y;2\nc;x;3\nd;y;4\n",
    ):
        table = read(tmp_path, text)
        assert (table.classes, dict(table.targets)) == (("x", "y"), expected)


def test_order_of_classes_and_empty_cells(tmp_path: Path) -> None:
    table = read(tmp_path, "case,label\na,x\nb,y\nc,x\nd,y\ne,\n", cases="abcde", classes=["y", "x"])
    assert table.targets == {"a": (1.0,), "b": (0.0,), "c": (1.0,), "d": (0.0,)}


def test_two_forms_of_several_labels(tmp_path: Path) -> None:
    columns = read(tmp_path, "case,p,q,age\na,0,1,30\nb,1,0,40\nc,1,1,50\nd,0,0,60\n", "multilabel")
    sets = read(tmp_path, "case,label\na,q\nb,p\nc,p;q\nd,\n", "multilabel")
    assert columns.classes == sets.classes == ("p", "q")
    assert columns.targets == sets.targets
    text = "case,p,q\na,,1\nb,1,0\nc,1,1\nd,0,0\ne,0,\n"
    holes = read(tmp_path, text, "multilabel", cases="abcde", classes=["p", "q"])
    assert math.isnan(holes.targets["a"][0])
    assert holes.targets["a"][1] == 1
    assert np.isfinite(holes.class_weights(list("abcde"))).all()


def table_of(subjects: dict[str, str], labels: dict[str, float]) -> LabelTable:
    targets = {name: (value,) for name, value in labels.items()}
    return LabelTable("classification", ("x", "y"), targets, subjects, {})


@pytest.mark.parametrize("per_class", [1, 2, 3, 20])
def test_folds_never_share_a_subject_and_hold_every_class_where_they_can(per_class: int) -> None:
    names = [f"{kind}{subject:02d}_{scan}" for kind in "xy" for subject in range(per_class) for scan in range(2)]
    subjects, labels = {n: n[:3] for n in names}, {n: float(n[0] == "y") for n in names}
    splits = table_of(subjects, labels).make_splits(names, subjects)
    for split in splits:
        assert not {subjects[n] for n in split["train"]} & {subjects[n] for n in split["val"]}
        assert sorted(split["train"] + split["val"]) == sorted(names)
        assert split["val"]
        assert split["train"]
    assert sorted(name for split in splits for name in split["val"]) == sorted(names)
    assert len(splits) == min(5, 2 * per_class)
    if per_class >= 5:
        assert all({labels[name] for name in split["val"]} == {0.0, 1.0} for split in splits)


def test_the_folds_of_the_table_are_kept(tmp_path: Path) -> None:
    table = read(tmp_path, "case,label,fold\na,x,0\nb,y,0\nc,x,3\nd,y,3\n")
    assert [split["val"] for split in table.make_splits(CASES, table.subjects)] == [["a", "b"], ["c", "d"]]


def test_a_single_subject_cannot_be_held_out() -> None:
    table = table_of(dict.fromkeys(CASES, "s"), dict(zip(CASES, (0.0, 1.0, 0.0, 1.0))))
    with pytest.raises(MFMError, match="E_CONFIG  "):
        table.make_splits(CASES, table.subjects)


def test_without_subjects_similar_names_are_proposed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"p{subject}_{scan}" for subject in range(4) for scan in (1, 2)]
    with caplog.at_level(logging.WARNING):
        read(tmp_path, "case,label\n" + "".join(f"{n},{'xy'[i // 4]}\n" for i, n in enumerate(names)), cases=names)
    assert "p0_1 and p0_2" in caplog.text


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(("left", "right"), True), (("Left eye", "none"), True), (("bright", "dark"), False), (("cleft", "x"), False)],
)
def test_sides_in_names(classes: tuple[str, ...], expected: bool) -> None:
    assert LabelTable("classification", classes, {}, {}, {}).has_sides is expected
