"""Who trains and who tests: nested, by subject, disjoint, the same for the same seed; what is impossible is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.study.splits import Cases, draw_test, label_counts, nested_subset, shuffled

SUBJECTS = {f"scan{number:02d}": f"person{number // 2}" for number in range(20)}
"""Ten people with two scans each."""


@pytest.fixture
def cases() -> Cases:
    return Cases.of(SUBJECTS)


@pytest.mark.parametrize("seed", range(5))
def test_subsets_are_nested_and_whole_subjects(cases: Cases, seed: int) -> None:
    pool = [subject for subject in cases.by_subject if subject != "person3"]
    subsets = [set(nested_subset(cases, pool, number, seed)) for number in range(1, 10)]
    for number, (smaller, larger) in enumerate(itertools.pairwise(subsets), start=1):
        assert smaller < larger
        assert len(smaller) == 2 * number
        assert len({SUBJECTS[case] for case in smaller}) == number
    assert subsets[-1] == {case for case, subject in SUBJECTS.items() if subject != "person3"}


def test_a_seed_always_draws_the_same_and_another_one_something_else(cases: Cases) -> None:
    pool = list(cases.by_subject)
    assert nested_subset(cases, pool, 3, 0) == nested_subset(cases, list(reversed(pool)), 3, 0)
    assert len({tuple(nested_subset(cases, pool, 3, seed)) for seed in range(5)}) > 1


def test_a_further_subject_moves_no_other() -> None:
    names = [f"p{number}" for number in range(12)]
    assert [name for name in shuffled([*names, "new"], 0) if name != "new"] == shuffled(names, 0)


@pytest.mark.parametrize(("wanted", "number"), [("20%", 2), ("1%", 1), ("3", 3), ("90%", 9)])
def test_test_split_by_share_or_number(cases: Cases, wanted: str, number: int) -> None:
    tested = draw_test(cases, wanted)
    assert len(tested) == number
    assert tested == draw_test(cases, wanted)
    assert set(tested) < set(draw_test(cases, "9")) or number == 9
    assert len(cases.names(tested)) == 2 * number


def test_test_split_from_a_file(cases: Cases, tmp_path: Path) -> None:
    file = tmp_path / "test.txt"
    file.write_text("scan04\n\n scan05 \n")
    assert draw_test(cases, str(file)) == ["person2"]
    for text, code, hint in (
        ("scan04\n", "E_CONFIG", "scan05 is of subject person2"),
        ("scan04\nscan05\nscann06\n", "E_CONFIG", "Did you mean 'scan06'?"),
        ("\n", "E_CONFIG", "empty"),
    ):
        file.write_text(text)
        with pytest.raises(MFMError, match=f"{code}.*{hint}".replace("?", r"\?")):
            draw_test(cases, str(file))
    with pytest.raises(MFMError, match="E_NOT_FOUND"):
        draw_test(cases, str(tmp_path / "none.txt"))


@pytest.mark.parametrize("wanted", ["0", "0%", "-1", "10", "100%", "101%", "x%", "-5%"])
def test_impossible_test_splits(cases: Cases, wanted: str) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG  --test"):
        draw_test(cases, wanted)


def test_numbers_of_labels() -> None:
    assert label_counts(["100%", "5", "10", "50%"], 34) == [5, 10, 17, 34]
    assert label_counts(["1%"], 34) == [1]


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        (["35"], "there are 34 subjects"),
        (["0"], "at least one label"),
        (["0%"], "at least one label"),
        (["200%"], "from 0% to 100%"),
        (["few"], "expected a number"),
        (["1.5"], "expected a number"),
        (["34", "100%"], "34 and 100% are both 34"),
        ([], "at least one number"),
    ],
)
def test_impossible_numbers_of_labels(wanted: list[str], hint: str) -> None:
    with pytest.raises(MFMError, match=f"E_CONFIG  --labels.*{hint}"):
        label_counts(wanted, 34)
