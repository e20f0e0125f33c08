"""Who trains and who tests: nested, by subject, disjoint, the same for the same seed; and how arms are named."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange.read import sha256
from mfm_nnunet.study.design import (
    SCRATCH,
    Arm,
    count_labels,
    draw_subset,
    draw_test,
    parse_arms,
    read_order,
    shuffle,
)

SUBJECTS = {f"scan{number:02d}": f"person{number // 2}" for number in range(20)}
"""Ten people with two scans each."""


def test_subsets_are_nested_and_whole_subjects() -> None:
    test = {"scan06", "scan07"}
    for seed in range(5):
        subsets = [set(draw_subset(SUBJECTS, test, number, seed)) for number in range(1, 10)]
        for number, (smaller, larger) in enumerate(itertools.pairwise(subsets), start=1):
            assert smaller < larger
            assert len(smaller) == 2 * number
            assert len({SUBJECTS[case] for case in smaller}) == number
        assert subsets[-1] == set(SUBJECTS) - test


def test_a_seed_always_draws_the_same_and_another_one_something_else() -> None:
    turned = dict(reversed(SUBJECTS.items()))
    assert draw_subset(SUBJECTS, (), 3, 0) == draw_subset(turned, (), 3, 0)
    assert len({tuple(draw_subset(SUBJECTS, (), 3, seed)) for seed in range(5)}) > 1


def test_a_further_subject_moves_no_other() -> None:
    names = [f"p{number}" for number in range(12)]
    assert [name for name in shuffle([*names, "new"], 0) if name != "new"] == shuffle(names, 0)
    # On every computer, and in every version: studies continue with the subsets that they began with.
    assert shuffle(["a", "b", "c", "d", "e"], 0) == ["d", "a", "c", "b", "e"]


@pytest.mark.parametrize(("wanted", "number"), [("20%", 2), ("1%", 1), ("3", 3), ("90%", 9)])
def test_test_split_by_share_or_number(wanted: str, number: int) -> None:
    tested = draw_test(SUBJECTS, wanted)
    assert len(tested) == 2 * number
    assert len({SUBJECTS[case] for case in tested}) == number
    assert tested == draw_test(SUBJECTS, wanted)
    assert set(tested) <= set(draw_test(SUBJECTS, "9"))


def test_test_split_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "test.txt"
    file.write_text("scan04\n\n scan05 \n")
    assert draw_test(SUBJECTS, str(file)) == ["scan04", "scan05"]
    for text, hint in (("scan04\n", "scan05"), ("scan04\nscan05\nscann06\n", "'scan06'"), ("\n", "empty")):
        file.write_text(text)
        with pytest.raises(MFMError, match=f"E_CONFIG.*{hint}"):
            draw_test(SUBJECTS, str(file))
    with pytest.raises(MFMError, match="E_NOT_FOUND"):
        draw_test(SUBJECTS, str(tmp_path / "none.txt"))


@pytest.mark.parametrize("wanted", ["0", "0%", "-1", "10", "100%", "101%", "x%", "-5%"])
def test_impossible_test_splits(wanted: str) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG  --test"):
        draw_test(SUBJECTS, wanted)


def test_numbers_of_labels() -> None:
    assert count_labels(["100%", "5", "10", "50%"], 34) == [5, 10, 17, 34]
    assert count_labels(["1%"], 34) == [1]


@pytest.mark.parametrize("wanted", [["35"], ["0"], ["0%"], ["200%"], ["few"], ["1.5"], ["34", "100%"], []])
def test_impossible_numbers_of_labels(wanted: list[str]) -> None:
    with pytest.raises(MFMError, match="E_CONFIG  --labels"):
        count_labels(wanted, 34)


def test_names_of_arms(tmp_path: Path) -> None:
    run = tmp_path / "mfm_pretrain__mae__mfmPlans__3d_fullres__seed 1"
    run.mkdir()
    files = [run / "checkpoint_final.pth", tmp_path / "open mind.pth", tmp_path / "a=b.pth"]
    for file in files:
        file.touch()
    arms = parse_arms(["scratch", f"x={files[0]}", *map(str, files[1:])])
    assert {name: arm.file for name, arm in arms.items()} == {
        SCRATCH: None,
        "x": str(files[0]),
        "open_mind": str(files[1]),
        "a_b": str(files[2]),
    }
    assert list(arms) == ["scratch", "x", "open_mind", "a_b"]
    run = run.rename(tmp_path / "mfm_pretrain__mae__mfmPlans__3d_fullres__seed1")
    assert list(parse_arms([str(run / files[0].name)])) == ["mae_seed1"]


def test_arms_with_settings_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "vf.pth"
    file.touch()
    words = ["scratch,finetune.learning_rate=1e-2", f"enc={file},finetune.parts=encoder,finetune.ema_decay=0.9"]
    assert parse_arms(words) == {
        "scratch": Arm(settings=("finetune.learning_rate=1e-2",)),
        "enc": Arm(str(file), sha256(file), ("finetune.parts=encoder", "finetune.ema_decay=0.9")),
    }


def test_scratch_may_be_named_and_compared_with_itself(tmp_path: Path) -> None:
    file = tmp_path / "mae.pth"
    file.touch()
    words = ["scratch", "scratch,finetune.mix=cutmix,finetune.mix_box=0.5", "long=scratch,finetune.epochs=9", str(file)]
    arms = parse_arms([*words, f"{file},finetune.parts=encoder"])
    assert list(arms) == ["scratch", "scratch_mix-cutmix_mix_box-0.5", "long", "mae", "mae_parts-encoder"]
    assert arms["long"] == Arm(settings=("finetune.epochs=9",))
    assert [arms[name].file for name in arms] == [None, None, None, str(file), str(file)]
    for twice in (["scratch", "scratch"], ["scratch", "mae=scratch", str(file)], [*words, words[1]]):
        with pytest.raises(MFMError, match=r"E_CONFIG.*NAME=CHECKPOINT"):
            parse_arms(twice)


def test_the_first_seed_may_follow_an_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "order.txt"
    file.write_text("person7\nscan02\nunheard\nperson7\nperson3\n")
    order = read_order(file, SUBJECTS)
    assert order == ["person7", "person1", "person3"]
    assert "unheard" in caplog.text
    test = {"scan06", "scan07"}  # person3
    first = [draw_subset(SUBJECTS, test, number, 0, order) for number in (1, 2, 5)]
    assert first[0] == ["scan14", "scan15"]
    assert first[1] == ["scan02", "scan03", "scan14", "scan15"]
    assert set(first[1]) < set(first[2])
    assert not set(first[2]) & test
    assert draw_subset(SUBJECTS, test, 3, 1, order) == draw_subset(SUBJECTS, test, 3, 1)
    assert read_order(None, SUBJECTS) == []
    for text, code in (("\n", "E_CONFIG"), ("persn7\n", "E_CONFIG.*person7"), (None, "E_NOT_FOUND")):
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(MFMError, match=f"{code}"):
            read_order(file, SUBJECTS)
