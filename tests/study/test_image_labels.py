"""Studies of datasets with labels of whole images: scores, stratified draws, the folder, commands and the table."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, r2_score, recall_score, roc_auc_score

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import write_csv
from mfm_nnunet.jobs.preflight import read_raw_dataset
from mfm_nnunet.study import report, run
from mfm_nnunet.study.cells import all_steps
from mfm_nnunet.study.design import Arm, Cell, draw_subset, draw_test, parse_arms, shuffle
from mfm_nnunet.study.evaluation import evaluate_cell, score_labels
from mfm_nnunet.study.folder import Study, begin_study, read_study, write_study_folder
from mfm_nnunet.study.summary import compare_paired, read_results, summarise_study
from mfm_nnunet.study_requests import StudyRequest
from tests.builders import small

CLASSES = ("ill", "odd", "well")


def drawn(seed: int, number: int = 40, classes: int = 3) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Targets (N, 1), probabilities with ties (N, K), and subjects of one to three cases."""
    rng = np.random.default_rng(seed)
    target = np.concatenate([np.arange(classes), rng.integers(classes, size=number - classes)])[:, None].astype(float)
    scores = rng.random((number, classes)) + 0.6 * (target == np.arange(classes))
    probabilities = np.round(scores / scores.sum(1, keepdims=True), 1)
    return target, probabilities, [f"s{value}" for value in np.sort(rng.integers(number // 2, size=number))]


def mean_over_subjects(values: np.ndarray, subjects: list[str]) -> float:
    names = np.array(subjects)
    return float(np.mean([values[names == name].mean() for name in np.unique(names)]))


@pytest.mark.parametrize("seed", range(3))
def test_means_are_scikit_learns_scores(seed: int) -> None:
    target, predicted, subjects = drawn(seed)
    found = score_labels("classification", CLASSES, target, predicted, subjects)
    one_hot = target == np.arange(3)
    means = {
        metric: [mean_over_subjects(found[name][metric], subjects) for name in CLASSES]
        for metric in ("auroc", "balanced_accuracy")
    }
    chosen = predicted.argmax(1)
    assert means["auroc"] == pytest.approx([roc_auc_score(*pair) for pair in zip(one_hot.T, predicted.T)])
    assert means["balanced_accuracy"] == pytest.approx(recall_score(target[:, 0], chosen, average=None))
    assert np.mean(means["balanced_accuracy"]) == pytest.approx(balanced_accuracy_score(target[:, 0], chosen))


def test_unknown_labels_of_several_classes_do_not_count() -> None:
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(2, size=(30, 2)).astype(float), rng.random((30, 2))
    target[:7, 0] = np.nan
    subjects = [f"s{row // 2}" for row in range(30)]
    found = score_labels("multilabel", ("a", "b"), target, predicted, subjects)
    known = np.isfinite(target[:, 0])
    of_a = {metric: mean_over_subjects(values, subjects) for metric, values in found["a"].items()}
    assert of_a["auroc"] == pytest.approx(roc_auc_score(target[known, 0], predicted[known, 0]))
    recall = balanced_accuracy_score(target[known, 0], predicted[known, 0] > 0.5)
    assert of_a["balanced_accuracy"] == pytest.approx(recall)
    assert set(score_labels("multilabel", ("a", "b"), target * [1, 0], predicted, subjects)) == {"a"}


def test_numbers_are_scored_by_their_explained_variance() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=(20, 1))
    predicted, subjects = target + rng.normal(size=(20, 1)) / 3, [f"s{row // 2}" for row in range(20)]
    values = score_labels("regression", ("prediction",), target, predicted, subjects)["number"]["r2"]
    assert mean_over_subjects(values, subjects) == pytest.approx(r2_score(target, predicted))


def test_the_variance_is_delongs() -> None:
    """Of the difference of two AUROCs, computed from placements by pairs."""
    rng = np.random.default_rng(0)
    target = np.repeat([0.0, 1.0], [12, 18])[:, None]
    both = [rng.normal(size=30) + shift * target[:, 0] for shift in (0.8, 1.5)]
    placements = []
    for score in both:
        pairs = (score[12:, None] > score[None, :12]).astype(float)
        placements.append((pairs.mean(1), pairs.mean(0)))
    (p1, q1), (p2, q2) = placements
    variance = np.var(p2 - p1, ddof=1) / 18 + np.var(q2 - q1, ddof=1) / 12
    subjects = [f"s{row}" for row in range(30)]
    values = [
        score_labels("classification", ("0", "1"), target, np.stack([-s, s], 1), subjects)["1"]["auroc"] for s in both
    ]
    difference = values[1] - values[0]
    assert difference.mean() == pytest.approx(p2.mean() - p1.mean())
    assert difference.var(ddof=1) / 30 == pytest.approx(variance, rel=0.06)
    from scipy.stats import norm

    compared = compare_paired(values[1], values[0], by_ranks=False)
    assert compared["p"] == pytest.approx(2 * norm.sf(difference.mean() / variance**0.5), rel=0.1)
    assert compare_paired(values[0], values[0], by_ranks=False)["p"] == 1


# Who trains


def test_draws_have_each_class_first_and_then_their_proportion() -> None:
    strata = {f"s{number:02d}": int(number >= 24) + int(number >= 36) for number in range(40)}  # 24, 12 and 4
    for seed in range(5):
        order = shuffle(strata, seed, strata)
        assert sorted(order) == sorted(strata)
        assert {strata[name] for name in order[:3]} == {0, 1, 2}
        assert Counter(strata[name] for name in order[:20]) == {0: 12, 1: 6, 2: 2}
    assert len({tuple(shuffle(strata, seed, strata)) for seed in range(5)}) == 5
    subjects = {name: name for name in strata}
    test = draw_test(subjects, "10", strata)
    assert sorted(Counter(strata[name] for name in test).values()) == [1, 3, 6]
    smaller, larger = (set(draw_subset(subjects, test, number, 1, (), strata)) for number in (6, 12))
    assert smaller < larger
    assert not larger & set(test)
    assert {strata[name] for name in smaller} == {0, 1, 2}


# The folder and the commands


def write_labels(root: Path) -> Path:
    """Ten cases of nine subjects, four of them ill, one without a label."""
    raw = small.write_raw(root)
    content = json.loads((raw / "dataset.json").read_text())
    content["task"] = "classification"
    (raw / "dataset.json").write_text(json.dumps({key: value for key, value in content.items() if key != "labels"}))
    rows = [[f"case{n}", "" if n == 9 else ("ill" if n < 4 else "well"), f"s{max(n, 1)}"] for n in range(10)]
    write_csv(raw / "labels.csv", ["case", "label", "subject"], rows)
    return raw


def begin(root: Path, **changes: object) -> tuple[Study, list[Cell]]:
    asked = {"labels": ("2", "4"), "seeds": 1, "test": "4", **changes}
    arms = {"scratch": Arm(), "probe": dataclasses.replace(small.arm(root), head="probe")}
    dataset = read_raw_dataset(root / "nnUNet_raw" / small.NAME)
    request = StudyRequest(small.NAME, "2d", arms=(), **asked)  # type: ignore[arg-type]
    study, cells = begin_study(root / "study", request, dataset, arms, "own", None)
    study = dataclasses.replace(study, library={"name": "mfm_nnunet", "version": "0"})
    write_study_folder(study, dataset)
    study.write()
    return study, cells


def test_the_pool_has_a_table_and_test_cases_have_targets(tmp_path: Path) -> None:
    write_labels(tmp_path)
    study, _ = begin(tmp_path)
    assert read_study(study.folder) == study
    assert len({study.question.subjects[case] for case in study.question.test}) == 4
    targets = {case: found.targets for case, found in study.test_cases.items()}
    assert {case: target == (0.0,) for case, target in targets.items()} == {case: case < "case4" for case in targets}
    assert {(0.0,), (1.0,)} == set(targets.values())
    raw = study.workspace / "nnUNet_raw" / small.NAME
    pool = read_raw_dataset(raw)
    assert pool.table is not None
    assert pool.table.classes == ("ill", "well")
    assert {case.name for case in pool.cases} == {f"case{n}" for n in range(9)} - set(targets)
    splits = json.loads((study.workspace / "nnUNet_preprocessed" / small.NAME / "splits_final.json").read_text())
    for split in splits:
        assert {pool.table.targets[case] for case in split["train"]} == {(0.0,), (1.0,)}
    with pytest.raises(MFMError, match=r"E_CONFIG  --labels 1: .*\(ill, well\)"):
        begin(tmp_path, labels=("1",))


def test_other_labels_are_another_question(tmp_path: Path) -> None:
    raw = write_labels(tmp_path)
    before = read_raw_dataset(raw).digest
    text = (raw / "labels.csv").read_text()
    (raw / "labels.csv").write_text(text.replace("case8,well", "case8,ill"))
    assert read_raw_dataset(raw).digest != before


def test_heads_are_part_of_the_commands(tmp_path: Path) -> None:
    write_labels(tmp_path)
    study, cells = begin(tmp_path)
    words = {cell.arm: [step.words for step in all_steps(study, cell, "cpu")] for cell in cells}
    for arm, head in (("scratch", "linear"), ("probe", "probe")):
        train, predict, _ = words[arm]
        assert train[train.index("--head") + 1] == head
        assert Path(predict[predict.index("-m") + 1]).name == f"MFMTrainer_{head}__mfmStudyPlans__2d"
    file = tmp_path / "mae.pth"
    arms = parse_arms([str(file), f"{file},head=probe", "attentive=scratch,head=attentive,finetune.epochs=3"])
    assert {name: (arm.head, arm.settings) for name, arm in arms.items()} == {
        "mae": ("", ()),
        "mae_probe": ("probe", ()),
        "attentive": ("attentive", ("finetune.epochs=3",)),
    }
    for wrong in ("scratch,head=prob", "scratch,head=probe,head=mil"):
        with pytest.raises(MFMError, match="E_CONFIG"):
            parse_arms([wrong])
    with pytest.raises(MFMError, match="E_CONFIG  head=probe"):
        run.check_head(small.record([1], 1, ["scratch"]).dataset, "probe")


def test_the_table_counts_labels(tmp_path: Path) -> None:
    """From predictions to table and picture; perfect ones have the score 1."""
    write_labels(tmp_path)
    study, cells = begin(tmp_path)
    for cell in cells:
        folder = study.cell_folder(cell)
        (folder / "masks").mkdir(parents=True)
        is_good = cell.arm == "probe" or cell.num_labels == 4
        rows = []
        for number, (case, found) in enumerate(study.test_cases.items()):
            ill = 0.9 if found.targets == (0.0,) else 0.1
            ill = ill if is_good or number else 1 - ill
            rows.append([case, ill, 1 - ill, "ill"])
        write_csv(folder / "masks" / "predictions.csv", ["case", "ill", "well", "label"], rows)
        evaluate_cell(study, folder)
    results = read_results(study.folder, cells)
    study = dataclasses.replace(study, results=summarise_study(study, results))
    lines = report.make_table(study).splitlines()
    titles = [line for line in lines if line.startswith("## ")]
    assert titles == ["## Balanced accuracy", "## AUROC", "## Each label", "## How to read this"]
    assert "| labels | start | ill, recall | ill, AUROC | well, recall | well, AUROC |" in lines
    rows_of = {row["arm"]: row for row in study.results["rows"] if row["labels"] == 2}
    assert rows_of["probe"]["auroc"]["mean"] == pytest.approx(1)
    assert rows_of["scratch"]["auroc"]["mean"] < 0.9
    assert rows_of["probe"]["auroc"]["labels_saved"]["needed"] == pytest.approx(4)
    assert "* Settings of probe alone: head probe." in lines
    report.plot(tmp_path / "study.png", study)
    assert (tmp_path / "study.png").stat().st_size > 1000
