"""Teachers, pseudo labels and students: every phase resumes exactly, folders to look at, corrections, bad input."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from mfm_nnunet.data.volumes import open_array
from mfm_nnunet.finetune.fold import FoldRun
from mfm_nnunet.finetune.pseudo_labels import Labelling
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.jobs import student as phases
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny
from tests.builders.training import Killed, refused, require_equal, state_of, train

LABELLED, VALIDATION = ["subject-00", "subject-01"], ["subject-02"]
UNLABELLED = ["subject-03", "subject-04", "subject-05"]
SHORT = ("semi.teachers=2", "finetune.epochs=2", "semi.finish=0.5", "finetune.learning_rate=0.05", "semi.drop=0.34")


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A fold with two labelled cases; the other three are the unlabelled images."""
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", lambda self, save_probabilities=False: None)
    made = tiny.make(tmp_path)
    tiny.add_raw(made)
    splits = [{"train": LABELLED, "val": VALIDATION}]
    (made.preprocessed / tiny.NAME / "splits_final.json").write_text(json.dumps(splits))
    with use(tmp_path) as here:
        yield here


def learn(here: Workspace, *settings: str, **options: Any) -> Path:
    return train(here, "semi.method=student", *SHORT, *settings, unlabelled=tiny.NAME, **options)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_a_run_leaves_what_a_person_looks_at_and_skips_what_is_done(few: Workspace) -> None:
    fold = learn(few)
    labels = fold / "pseudo_labels" / "round_1"
    rows = rows_of(labels / "pseudo_labels.csv")
    assert sorted(row["case"] for row in rows) == UNLABELLED
    agreements = [float(row["agreement of the teachers"]) for row in rows]
    assert agreements == sorted(agreements)
    assert [row["use"].partition(":")[0] for row in rows] == ["dropped", "kept", "kept"]
    assert {"inner [ml]", "outer [ml]"} <= set(rows[0])
    ranked = rows_of(labels / "next_to_label.csv")
    assert sorted(row["case"] for row in ranked) == UNLABELLED
    assert all(row["reason"] for row in ranked)
    for row in rows:
        mask = sitk.ReadImage(str(labels / f"{row['case']}.nii.gz"))
        scan = sitk.ReadImage(str(few.raw / tiny.NAME / "imagesTr" / f"{row['case']}_0000.nii.gz"))
        assert (mask.GetSize(), mask.GetOrigin()) == (scan.GetSize(), scan.GetOrigin())
        voxels = sitk.GetArrayFromImage(mask)
        soft = open_array(str(labels / "soft" / f"{row['case']}.b2nd"))[:]
        assert soft.dtype == np.uint8
        assert np.abs(soft.astype(int).sum(0) - 255).max() <= 2
        assert (soft.argmax(0) == voxels).mean() > 0.99  # equal but for ties of rounded values
        assert float(row["inner [ml]"]) == pytest.approx((voxels == 1).sum() / 1000, abs=1e-3)
    finished = {file: file.stat().st_mtime_ns for file in (fold / "teachers").rglob("checkpoint_final.pth")}
    assert len(finished) == 2
    for file in fold.glob("checkpoint_*"):
        file.unlink()
    before = (labels / "pseudo_labels.jsonl").read_text()
    learn(few, continue_training=True)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert (labels / "pseudo_labels.jsonl").read_text() == before


@pytest.mark.parametrize("configuration", ["2d", "primus"])
def test_other_networks(few: Workspace, configuration: str) -> None:
    assert (learn(few, configuration=configuration) / "checkpoint_final.pth").is_file()


@pytest.mark.long
def test_every_phase_of_two_rounds_resumes_exactly(few: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in a teacher, while labelling, in the first student, in the second labelling and in the second student."""
    whole = state_of(learn(few, "semi.rounds=2"))
    (few.results / tiny.NAME).rename(few.results / "whole")
    original, label, events = FoldRun.end_epoch, Labelling._label, [0]

    def kill_at_event(number: int) -> None:
        """Epochs and labelled images are the events."""
        events[0] += 1
        if events[0] == number:
            raise Killed

    for number in (2, 3, 3, 3, 3):
        events[0] = 0

        def end(self: FoldRun, *given: Any, number: int = number) -> list[str]:
            lines = original(self, *given)
            kill_at_event(number)
            return lines

        def stop(self: Labelling, *given: Any, number: int = number) -> Any:
            kill_at_event(number)
            return label(self, *given)

        monkeypatch.setattr(FoldRun, "end_epoch", end)
        monkeypatch.setattr(Labelling, "_label", stop)
        with pytest.raises(Killed):
            learn(few, "semi.rounds=2", continue_training=number != 2)
    monkeypatch.setattr(FoldRun, "end_epoch", original)
    monkeypatch.setattr(Labelling, "_label", label)
    resumed = learn(few, "semi.rounds=2", continue_training=True)
    require_equal(whole, state_of(resumed))
    assert (resumed / "rounds" / "1").is_dir()


def summarise(folder: Path, dice: float) -> None:
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    (folder / "validation" / "summary.json").write_text(json.dumps({"foreground_mean": {"Dice": dice}}))


def test_the_round_that_validates_best_is_the_result(
    few: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first student scores 0.8, all others 0.7: the fold gets the first, and says so."""

    def validate(self: MFMTrainer, save_probabilities: bool = False) -> None:
        summarise(Path(self.output_folder), 0.8 if "rounds" in self.output_folder else 0.7)

    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", validate)
    with caplog.at_level(logging.INFO):
        fold = learn(few, "semi.rounds=2")
    (first,) = (fold / "rounds").glob("1/*/*/fold_0")
    assert "round 1 0.800, round 2 0.700. The result is that of round 1: round 2 did not raise it" in caplog.text
    assert (fold / "checkpoint_final.pth").read_bytes() == (first / "checkpoint_final.pth").read_bytes()
    assert phases._validation_dice(fold) == 0.8
    assert phases._validation_dice(fold / "rounds" / "2") == 0.7
    assert (fold / "rounds" / "2" / "checkpoint_final.pth").read_bytes() != (
        first / "checkpoint_final.pth"
    ).read_bytes()
    assert json.loads((fold / "rounds.json").read_text()) == {"validation_dice": {"1": 0.8, "2": 0.7}, "result": 1}
    page = (fold / "report.html").read_text()
    assert "the student of round 1; curves" in page
    assert "What to label next" in page
    assert rows_of(fold / "pseudo_labels" / "round_2" / "next_to_label.csv")[0]["reason"] in page
    longer = ("semi.rounds=2", "finetune.epochs=3")
    refused("E_CONFIG", "round 1", lambda: learn(few, *longer, continue_training=True))


@pytest.mark.parametrize(
    ("first", "second", "result"), [(0.7, 0.7, 2), (0.6, 0.7, 2), (float("nan"), 0.7, 2), (0.8, 0.7, 1)]
)
def test_which_round_is_the_result(tmp_path: Path, first: float, second: float, result: int) -> None:
    earlier = tmp_path / "rounds" / "1" / "Dataset" / "model" / "fold_0"
    for folder, dice, content in ((earlier, first, b"1"), (tmp_path, second, b"2")):
        summarise(folder, dice)
        (folder / "checkpoint_final.pth").write_bytes(content)
    job: Any = SimpleNamespace(folder=tmp_path, request=SimpleNamespace(only_validate=False))
    for _ in range(2):  # also if it was interrupted before it said that it was done
        phases.keep_better_round(job)
        assert (tmp_path / "checkpoint_final.pth").read_bytes() == str(result).encode()
        assert json.loads((tmp_path / "rounds.json").read_text())["result"] == result
        (tmp_path / "rounds.json").unlink()


def test_several_processes_on_cpus_are_refused(few: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them. nnU-Net's trainer would take GPUs that are not there."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("E_CONFIG", "-num_gpus", lambda: learn(few))


def test_labels_alone_then_corrected_masks_are_given_back(few: Workspace, tmp_path: Path) -> None:
    folder = learn(few, "semi.rounds=0")
    assert not (few.results / tiny.NAME / "MFMTrainer__mfmPlans__3d_fullres").exists()
    mask = sitk.ReadImage(str(folder / "subject-03.nii.gz"))
    voxels = np.zeros_like(sitk.GetArrayFromImage(mask))
    voxels[5:9, 6:9, 4:9] = 2
    corrected = sitk.GetImageFromArray(voxels)
    corrected.CopyInformation(mask)
    sitk.WriteImage(corrected, str(folder / "subject-03.nii.gz"))
    fold = learn(few, "semi.drop=0.6", pseudo_labels=folder)
    assert not (fold / "teachers").exists()
    rows = {row["case"]: row["use"] for row in rows_of(folder / "pseudo_labels.csv")}
    assert rows["subject-03"].startswith("corrected")
    assert "subject-03" not in {row["case"] for row in rows_of(folder / "next_to_label.csv")}
    hard = open_array(str(fold / "corrected" / "subject-03.b2nd"))[:]
    assert set(np.unique(hard)) == {0, 255}
    assert np.array_equal(hard.argmax(0), voxels)
    longer = ("semi.drop=0.6", "finetune.epochs=3")
    refused("E_CONFIG", "--pseudo-labels", lambda: learn(few, *longer, continue_training=True))
    sitk.WriteImage(mask, str(folder / "subject-04.nii.gz"))
    again = {"continue_training": True, "pseudo_labels": folder}
    refused("E_CONFIG", "corrected meanwhile", lambda: learn(few, *longer, **again))


def test_bad_corrections_are_refused_by_name(few: Workspace, tmp_path: Path) -> None:
    folder = learn(few, "semi.rounds=0")
    mask = sitk.ReadImage(str(folder / "subject-04.nii.gz"))
    given = tmp_path / "given"
    given.mkdir()

    def give(image: sitk.Image, name: str = "subject-04.nii.gz") -> None:
        shutil.rmtree(given)
        shutil.copytree(folder, given)
        sitk.WriteImage(image, str(given / name))

    moved = sitk.Image(mask)
    moved.SetOrigin((5.0, 0.0, 0.0))
    give(moved)
    refused("E_LABEL_GEOMETRY", "subject-04", lambda: learn(few, pseudo_labels=given))
    give(mask + 7)
    refused("E_LABEL_VALUE", "subject-04", lambda: learn(few, pseudo_labels=given))
    only = tmp_path / "only"
    only.mkdir()
    sitk.WriteImage(mask, str(only / "someone.nii.gz"))
    refused("E_NOT_FOUND", "someone", lambda: learn(few, pseudo_labels=only))
    refused(
        "E_NOT_FOUND", "--pseudo-labels", lambda: learn(few, pseudo_labels=tmp_path / "nowhere", continue_training=True)
    )


def test_flags_of_a_student_belong_to_one(few: Workspace) -> None:
    refused("E_CONFIG", "--teachers", lambda: train(few, teachers=["model"]))


def test_a_teacher_that_predicts_nothing_is_refused(few: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Model, x: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = torch.zeros(3, *x.shape[1:]).half()
        logits[0] = 1
        return logits

    monkeypatch.setattr(Model, "predict_logits", nothing)
    refused("E_CONFIG", "teacher 1 of 2 predicts nothing", lambda: learn(few, "semi.rounds=0"))


def test_weak_and_unvalidated_teachers_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dice, words in ((0.4, "teach its mistakes"), (float("nan"), "never validated")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            phases._warn_of_weakness(tmp_path / "fold_0", dice)
        assert words in caplog.text
    caplog.clear()
    phases._warn_of_weakness(tmp_path / "fold_0", 0.8)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
