"""Balanced sampling: shares of groups, temperature, and settings that a corpus cannot follow."""

from __future__ import annotations

import pytest

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.crops import case_weights, describe_shares, group_shares, require_legal_balance
from mfm_nnunet.errors import MFMError


def case(name: str, modality: str, dataset: str, subject: str) -> Case:
    return Case(name, (), None, subject, modality, dataset)


CASES = [
    *(case(f"t1_{i}", "T1w", "brains", f"s{i // 2}") for i in range(6)),
    *(case(f"ct_{i}", "CT", "lungs", f"l{i}") for i in range(2)),
    case("t1_lungs", "T1w", "lungs", "l0"),
]


@pytest.mark.parametrize(
    ("kinds", "temperature", "expected"),
    [
        (("modality",), None, {("T1w",): 1 / 2, ("CT",): 1 / 2}),
        (("modality",), 1.0, {("T1w",): 7 / 9, ("CT",): 2 / 9}),
        (("modality",), 2.0, {("T1w",): 7**0.5 / (7**0.5 + 2**0.5), ("CT",): 2**0.5 / (7**0.5 + 2**0.5)}),
        (("dataset",), None, {("brains",): 1 / 2, ("lungs",): 1 / 2}),
        (
            ("modality", "dataset"),
            None,
            {("T1w", "brains"): 1 / 3, ("CT", "lungs"): 1 / 3, ("T1w", "lungs"): 1 / 3},
        ),
        (("subject",), None, {(subject,): 1 / 5 for subject in ("s0", "s1", "s2", "l0", "l1")}),
    ],
)
def test_shares(kinds: tuple[str, ...], temperature: float | None, expected: dict[tuple[str, ...], float]) -> None:
    assert group_shares(CASES, kinds, temperature)[1] == pytest.approx(expected)


def test_within_a_group_all_cases_are_alike_and_all_weights_add_up_to_one() -> None:
    weights = case_weights(CASES, ("modality",), None)
    assert weights["ct_0"] == weights["ct_1"] == pytest.approx(1 / 4)
    assert weights["t1_0"] == weights["t1_lungs"] == pytest.approx(1 / 14)
    assert sum(weights.values()) == pytest.approx(1)
    # Temperature 1 is no balance at all.
    assert list(case_weights(CASES, ("modality",), 1.0).values()) == pytest.approx([1 / 9] * 9)


def test_a_subject_with_many_scans_is_drawn_as_often_as_others() -> None:
    weights = case_weights(CASES, ("subject",), None)
    assert weights["t1_0"] + weights["t1_1"] == pytest.approx(weights["ct_1"])
    assert weights["ct_0"] + weights["t1_lungs"] == pytest.approx(weights["ct_1"])


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1e6])
def test_extreme_temperatures_neither_overflow_nor_vanish(temperature: float) -> None:
    cases = [case(f"a{i}", "T1w", "", "") for i in range(3000)] + [case("b", "CT", "", "")]
    shares = group_shares(cases, ("modality",), temperature)[1]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["T1w",] >= shares["CT",] > 0


def test_description_names_groups_but_no_subject() -> None:
    line = describe_shares(CASES, ("modality",), None)
    assert line == "balanced by modality, 2 groups: CT 50.0%, T1w 50.0%"
    line = describe_shares([*CASES, case("x", "", "lungs", "l9")], ("dataset", "modality"), 1.0)
    assert "4 groups: brains T1w 60.0%, lungs CT 20.0%" in line
    assert "lungs unknown modality 10.0%" in line
    line = describe_shares(CASES, ("subject", "modality"), None)
    assert line == "balanced by subject and modality, 6 groups: T1w 66.7%, CT 33.3%"
    assert describe_shares(CASES, ("subject",), None) == "balanced by subject, 5 groups: 20.00% to 20.00% each"


@pytest.mark.parametrize(
    ("kinds", "temperature", "words"),
    [
        (("modalty",), None, "Did you mean 'modality'"),
        (("scanner",), None, "subject"),
        (("modality",), 0.05, "must be at least 0.1"),
        (("modality",), -1.0, "must be at least 0.1"),
        ((), 2.0, "nothing to balance"),
    ],
)
def test_illegal_settings(kinds: tuple[str, ...], temperature: float | None, words: str) -> None:
    with pytest.raises(MFMError, match=words) as error:
        require_legal_balance(kinds, temperature, CASES)
    assert error.value.code == "E_CONFIG"
    assert "pretrain.balance" in error.value.message


def test_a_corpus_that_does_not_name_what_is_balanced() -> None:
    cases = [Case("a", ()), Case("b", ())]
    require_legal_balance(("subject",), None, cases)
    with pytest.raises(MFMError, match="names no modality"):
        require_legal_balance(("subject", "modality"), None, cases)
