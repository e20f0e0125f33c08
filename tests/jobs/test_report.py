"""Reports of whole jobs: they say what is there, also after a failure, and never change a job's end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from mfm_nnunet.errors import CasesFailedError, MFMError, StoppedError
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.jobs import predict
from mfm_nnunet.jobs.report import VOLUMES, reported
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.reports import html
from mfm_nnunet.workspace import use
from tests.builders import tiny, tiny_run
from tests.builders.tiny_model import dataset_json, save_model, tiny_plans, write_scan
from tests.builders.training import pretrained_file, train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("results") / "model", tiny_plans(), dataset_json(), folds=(0, 1))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "patient_doe"
    folder.mkdir()
    for seed, name in enumerate("abc"):
        write_scan(folder / f"{name}_0000.nii.gz", seed, spacing=(0.7, 1.1, 1.0))
    return folder


def page_of(model: Path, scans: Path, out: Path, **options: Any) -> str:
    predict.predict(scans, out, model_folder=model, **{"device": "cpu", "step_size": 1.0, "folds": [0], **options})
    return (out / "report.html").read_text()


def test_prediction_without_and_with_references(model: Path, scans: Path, tmp_path: Path) -> None:
    page = page_of(model, scans, tmp_path / "out")
    assert all(f">{name}</th>" in page for name in "abc")
    assert page.count("<img ") == 9
    assert "Dice" not in page
    assert "doe" not in page
    (tmp_path / "references").mkdir()
    (tmp_path / "references" / "b.nii.gz").write_bytes((tmp_path / "out" / "b.nii.gz").read_bytes())
    page = page_of(model, scans, tmp_path / "again", references=tmp_path / "references")
    assert page.count("<img ") == 12
    assert "Mean Dice</dt><dd>1</dd>" in page


def test_no_report_is_written_on_request(model: Path, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict.predict(scans, out, model_folder=model, folds=[0], device="cpu", report=False)
    assert (out / "a.nii.gz").is_file()
    assert not (out / "report.html").exists()


def test_references_that_are_not_there(model: Path, scans: Path, tmp_path: Path) -> None:
    with pytest.raises(MFMError) as caught:
        page_of(model, scans, tmp_path / "out", references=tmp_path / "none")
    assert caught.value.code == "E_NOT_FOUND"
    assert not (tmp_path / "out").exists()


def test_a_failed_case_stands_with_reason_and_remedy(model: Path, scans: Path, tmp_path: Path) -> None:
    scan = nibabel.load(scans / "b_0000.nii.gz")
    voxels = np.asarray(scan.dataobj).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, scan.affine), scans / "b_0000.nii.gz")
    with pytest.raises(CasesFailedError):
        page_of(model, scans, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "E_NONFINITE: b_0000.nii.gz" in page
    assert "Cases failed</dt><dd>1<" in page
    assert page.count("<img ") == 6


def test_a_stopped_run_reports_what_is_there(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted: list[str] = []
    honest = Model.predict_logits

    def stop_at_second(self: Model, *arguments: Any, what: str, **options: Any) -> Any:
        predicted.append(what)
        if len(predicted) == 2:
            raise StoppedError(143, "stopped by SIGTERM")
        return honest(self, *arguments, what=what, **options)

    monkeypatch.setattr(Model, "predict_logits", stop_at_second)
    with pytest.raises(StoppedError):
        page_of(model, scans, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Ended early</dt><dd>stopped by SIGTERM" in page
    assert page.count("<img ") == 3
    assert page.count("<td>stopped</td>") == 2
    monkeypatch.undo()
    page = page_of(model, scans, tmp_path / "out", resume=True)
    assert "Ended early" not in page
    assert page.count("<img ") == 9


def test_an_error_in_the_report_costs_no_mask(
    model: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(report: html.Report) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr(html, "render", fail)
    report = predict.predict(scans, tmp_path / "out", model_folder=model, folds=[0], device="cpu")
    assert report.done == ["a", "b", "c"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "the results are complete. RuntimeError: broken" in warnings[0]


def test_folds_that_disagree_are_flagged(model: Path, scans: Path, tmp_path: Path) -> None:
    """The folds of this model have random weights of their own."""
    page = page_of(model, scans, tmp_path / "out", folds=[0, 1])
    lines = [json.loads(line) for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()]
    agreement = [line["agreement"] for line in lines if line["status"] == "done"]
    assert set(agreement[0]) <= {"a", "b"}
    assert all(0 <= dice < 0.7 for case in agreement for dice in case.values())
    assert "the folds disagree: a (Dice 0." in page


def test_parts_of_a_run_have_a_report_each(model: Path, scans: Path, tmp_path: Path) -> None:
    for part in (0, 1):
        predict.predict(scans, tmp_path / "out", model_folder=model, folds=[0], device="cpu", num_parts=2, part_id=part)
    pages = [(tmp_path / "out" / f"report_{part}of2.html").read_text() for part in (0, 1)]
    assert [page.count("<img ") for page in pages] == [6, 3]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fold that was trained from a checkpoint and validated."""
    root = tmp_path_factory.mktemp("trained")
    tiny.make(root, num_cases=12)
    with use(root) as here:
        return train(here, "finetune.epochs=2", pretrained_weights=pretrained_file(root))


def test_training_shows_curves_cases_weights_and_settings(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    history = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in history] == [0, 1]
    assert {"train_loss", "validation_loss", "learning_rate", "dice_mean", "dice_inner", "dice_outer"} <= set(
        history[0]
    )
    assert page.count("<svg ") == 2
    assert "Epochs</dt><dd>2 of 2<" in page
    masks = [file.name for file in (trained / "validation").glob("*.nii.gz")]
    assert masks
    assert all(f">{name.removesuffix('.nii.gz')}</th>" in page for name in masks)
    assert "of the encoder&#39;s parameters are from it" in page
    assert "finetune.learning_rate" in page
    assert "/home/" not in page
    summary = json.loads((trained / "validation" / "summary.json").read_text())
    assert f"Mean Dice</dt><dd>{summary['foreground_mean']['Dice']:.4g}<" in page


def test_training_keeps_the_volumes_of_its_masks(trained: Path) -> None:
    content = json.loads((trained / VOLUMES).read_text())
    assert content["unit"] == "ml"
    assert content["labels"]["inner"]["num_cases"] == content["num_cases"] > 5
    low, median, high = (content["labels"]["inner"]["quartiles"][k] for k in (0, 2, 4))
    assert 0.05 < low <= median <= high < 0.2, "balls of radius 3 mm have 0.11 ml"
    assert "subject" not in (trained / VOLUMES).read_text()


def test_a_training_that_ends_early_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make(tmp_path)

    def fail(self: MFMTrainer, save_probabilities: bool = False) -> None:
        raise RuntimeError("cannot read /home/doe/x.nii.gz")

    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", fail)
    with use(tmp_path) as here, pytest.raises(RuntimeError):
        train(here, "finetune.epochs=1")
    (file,) = tmp_path.rglob("report.html")
    page = file.read_text()
    assert "The run ended early: cannot read x.nii.gz" in page
    assert "not validated" in page
    assert "<svg " in page


@pytest.mark.parametrize("task", ["mae", "volume_fusion"])
def test_pretraining_shows_the_first_and_the_last_epoch(tmp_path: Path, task: str) -> None:
    final = tiny_run.run(tiny_run.prepare(tmp_path), task)
    page = (final.parent / "report.html").read_text()
    assert page.count("<img ") == 2
    assert page.count("<svg ") == 1
    assert "first epoch</figcaption>" in page
    assert "epoch 3</figcaption>" in page
    assert "Epochs</dt><dd>3 of 3<" in page
    assert str(tmp_path) not in page


def test_the_reason_of_an_early_end_is_reported_and_raised() -> None:
    seen: list[str] = []
    with pytest.raises(ValueError, match="one"), reported(seen.append):
        raise ValueError("one\ntwo")
    with reported(seen.append):
        pass
    assert seen == ["one", ""]
