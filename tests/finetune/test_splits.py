"""Folds: nnU-Net's own for five and more cases, defined for fewer, subjects together, never a silent substitute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.splits import ensure_splits, make_splits, require_fold

CASES = [f"case{index}" for index in range(12)]


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
    require_fold("all", tmp_path, ["only"], None)
    with pytest.raises(MFMError, match="fold 'all'") as caught:
        require_fold(0, tmp_path, ["only"], None)
    assert caught.value.code == "E_CONFIG"
    assert not (tmp_path / "splits_final.json").exists()


def test_one_subject_cannot_be_split() -> None:
    with pytest.raises(MFMError, match="one labelled subject"):
        make_splits(CASES, dict.fromkeys(CASES, "s1"))


@pytest.mark.parametrize("fold", [0, "all"])
def test_no_cases_is_an_error(tmp_path: Path, fold: int | str) -> None:
    with pytest.raises(MFMError, match="no labelled cases"):
        require_fold(fold, tmp_path, [], None)


@pytest.mark.parametrize("fold", [5, -1, 17])
def test_a_fold_that_does_not_exist_is_refused(tmp_path: Path, fold: int) -> None:
    with pytest.raises(MFMError, match="folds 0 to 4") as caught:
        require_fold(fold, tmp_path, CASES, None)
    assert caught.value.code == "E_CONFIG"


def test_an_existing_file_is_used_and_kept(tmp_path: Path) -> None:
    mine = [{"train": CASES[:2], "val": CASES[2:3]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(mine))
    require_fold(0, tmp_path, CASES, None)
    assert json.loads((tmp_path / "splits_final.json").read_text()) == mine
    with pytest.raises(MFMError, match="folds 0 to 0"):
        require_fold(1, tmp_path, CASES, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"train": ["case0"], "val": ["stranger"]}]', "stranger"),
        ('[{"train": ["case0"], "val": []}]', "'val'"),
        ('{"fold": 1}', "not a list of folds"),
        ("[{", "not a list of folds"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "splits_final.json").write_text(content)
    with pytest.raises(MFMError, match=message):
        require_fold(0, tmp_path, CASES, None)


def test_subjects_come_from_the_raw_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfm_nnunet.data import corpus

    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "dataset.json").write_text("{}")
    cases = [corpus.Case(case, (), None, f"s{index // 6}") for index, case in enumerate(CASES)]
    monkeypatch.setattr(corpus, "load_cases", lambda folder: cases)
    require_fold(1, tmp_path, CASES, raw)
    splits = json.loads((tmp_path / "splits_final.json").read_text())
    assert [sorted(fold["val"]) for fold in splits] == [sorted(CASES[:6]), sorted(CASES[6:])]


def test_missing_raw_files_do_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mfm_nnunet.data import corpus

    def missing(folder: Path) -> None:
        raise MFMError("E_NOT_FOUND", "moved away")

    (tmp_path / "dataset.json").write_text("{}")
    monkeypatch.setattr(corpus, "load_cases", missing)
    require_fold(4, tmp_path, CASES, tmp_path)
