"""Folds: nnU-Net's own for five and more cases, defined for fewer, subjects together, never a silent substitute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import Selection
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.splits import choose_split, ensure_splits, make_splits

CASES = [f"case{index}" for index in range(12)]


def chosen(
    cases: list[str], removed: list[str] | None = None, missing: list[str] | None = None, subjects: int = 12
) -> Selection:
    """What a dataset has now, and what else is preprocessed or is not."""
    found = [Case(name, (), None, f"s{CASES.index(name) % subjects}") for name in sorted(cases)]
    return Selection(found, removed or [], missing or [], Path("raw"))


@pytest.mark.parametrize("count", [5, 6, 12])
def test_five_and_more_cases_get_nnunets_folds(tmp_path: Path, count: int) -> None:
    expected = json.loads(json.dumps(generate_crossval_split(sorted(CASES[:count]), seed=12345, n_splits=5)))
    assert ensure_splits(tmp_path, CASES[:count][::-1]) == expected
    assert json.loads((tmp_path / "splits_final.json").read_text()) == expected


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_cases_are_left_out_one_by_one(count: int) -> None:
    folds = make_splits(CASES[:count], {})
    assert [fold["val"] for fold in folds] == [[case] for case in CASES[:count]]
    assert all(sorted(fold["train"] + fold["val"]) == CASES[:count] for fold in folds)


@pytest.mark.parametrize("num_subjects", [2, 6])
def test_cases_of_one_subject_stay_together(num_subjects: int) -> None:
    subjects = {case: f"s{index % num_subjects}" for index, case in enumerate(CASES)}
    folds = make_splits(CASES, subjects)
    assert len(folds) == min(5, num_subjects)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(CASES)
        assert not {subjects[c] for c in fold["train"]} & {subjects[c] for c in fold["val"]}
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(CASES)


def test_one_case_has_only_the_fold_all(tmp_path: Path) -> None:
    choose_split("all", tmp_path, chosen(CASES[:1]))
    with pytest.raises(MFMError, match="fold 'all'") as caught:
        choose_split(0, tmp_path, chosen(CASES[:1]))
    assert caught.value.code == "E_CONFIG"
    assert not (tmp_path / "splits_final.json").exists()


def test_one_subject_cannot_be_split() -> None:
    with pytest.raises(MFMError, match="one labelled subject"):
        make_splits(CASES, dict.fromkeys(CASES, "s1"))


@pytest.mark.parametrize("fold", [0, "all"])
def test_no_cases_is_an_error(tmp_path: Path, fold: int | str) -> None:
    with pytest.raises(MFMError, match="no labelled cases"):
        choose_split(fold, tmp_path, chosen([]))


def test_an_existing_file_is_used_and_kept(tmp_path: Path) -> None:
    mine = [{"train": CASES[:2], "val": CASES[2:3]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(mine))
    choose_split(0, tmp_path, chosen(CASES))
    assert json.loads((tmp_path / "splits_final.json").read_text()) == mine
    with pytest.raises(MFMError, match="folds 0 to 0"):
        choose_split(1, tmp_path, chosen(CASES))


def written(folder: Path, *folds: tuple[list[str], list[str]]) -> None:
    (folder / "splits_final.json").write_text(json.dumps([{"train": t, "val": v} for t, v in folds]))


def test_cases_of_one_subject_stay_together_in_the_file(tmp_path: Path) -> None:
    choose_split(1, tmp_path, chosen(CASES, subjects=2))
    splits = json.loads((tmp_path / "splits_final.json").read_text())
    assert [sorted(fold["val"]) for fold in splits] == [sorted(CASES[0::2]), sorted(CASES[1::2])]


def test_removed_cases_neither_train_nor_validate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In fold all, in folds that are made now, and in a file that names them."""
    selection = chosen(CASES[1:], removed=["case0"])
    everything = choose_split("all", tmp_path, selection)
    assert everything == {"train": sorted(CASES[1:]), "val": sorted(CASES[1:])}
    assert "case0" in caplog.text
    choose_split(0, tmp_path, selection)
    assert "case0" not in (tmp_path / "splits_final.json").read_text()
    written(tmp_path, (CASES[:6], CASES[6:]), (CASES[6:], CASES[:1]))
    caplog.clear()
    assert choose_split(0, tmp_path, selection) == {"train": CASES[1:6], "val": CASES[6:]}
    assert "fold 0 names 1 cases that are no longer in the dataset" in caplog.text
    with pytest.raises(MFMError, match="no cases under 'val'"):
        choose_split(1, tmp_path, selection)


def test_cases_that_are_not_preprocessed_are_refused_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model must not be trained on less than one believes; a file of folds says what is wanted."""
    selection = chosen(CASES[1:], missing=["case0"])
    for fold in ("all", 3):
        with pytest.raises(MFMError, match=r"case0.*mfm_plan_and_preprocess") as caught:
            choose_split(fold, tmp_path, selection)
        assert caught.value.code == "E_NOT_FOUND"
    assert not (tmp_path / "splits_final.json").exists()
    written(tmp_path, (CASES[1:6], CASES[6:10]))
    assert len(choose_split(0, tmp_path, selection)["train"]) == 5
    assert "3 cases of the dataset are in no fold" in caplog.text
    written(tmp_path, (CASES[:6], CASES[6:]))
    with pytest.raises(MFMError, match="not preprocessed: case0"):
        choose_split(0, tmp_path, selection)


def test_a_case_that_is_named_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, (["case1", "case2", "case1"], ["case2", "case3"]))
    assert choose_split(0, tmp_path, chosen(CASES)) == {"train": ["case1", "case2"], "val": ["case2", "case3"]}
    assert "more than once under 'train'" in caplog.text
    assert "1 cases train and validate, e.g. case2" in caplog.text
