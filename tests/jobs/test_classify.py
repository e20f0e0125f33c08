"""Classifiers of whole images, from a plan to probabilities, on tiny data and on real X-rays."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfm_nnunet import checkpoint, metrics
from mfm_nnunet.errors import MFMError, StoppedError
from mfm_nnunet.finetune import classification
from mfm_nnunet.finetune.pretrained import has_decoder, transfer
from mfm_nnunet.interchange.read import read_checkpoint
from mfm_nnunet.jobs.plan import plan_and_preprocess
from mfm_nnunet.jobs.predict import predict
from mfm_nnunet.jobs.train import train
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.study.run import read_labelled
from mfm_nnunet.terminal import one_message
from tests.builders import labels


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "DRAWS", 20)


def table(file: Path) -> dict[str, dict[str, str]]:
    with open(file, newline="") as handle:
        return {row["case"]: row for row in csv.DictReader(handle)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    content = checkpoint.load(folder / "checkpoint_final.pth")
    return {**content["network_weights"], **content["head_weights"]}


@pytest.mark.parametrize("family", ["resenc", "primus"])
@pytest.mark.parametrize(("configuration", "head"), [("2d", "linear"), ("3d_fullres", "linear"), ("2d", "mil"),
                                                     ("3d_fullres", "attentive"), ("3d_fullres", "mil"),
                                                     ("3d_fullres", "probe")])  # fmt: skip
def test_training_and_prediction_agree(tmp_path: Path, family: str, configuration: str, head: str) -> None:
    """Predicting the scans of the validation cases gives what validation said, calibrated by its temperature."""
    labels.prepare(tmp_path, family)
    folder = labels.run(tmp_path, configuration, head=head)
    result = json.loads((folder / "metrics.json").read_text())
    validation = table(folder / "predictions.csv")
    assert {"auroc", "brier", "ece", "confusion_matrix", "temperature"} <= set(result)
    assert (folder / "reliability.png").is_file()
    numbers = sorted(int(case[-2:]) for case in validation)
    report = predict(
        labels.write_scans(tmp_path / "in", numbers), tmp_path / "out", model_folder=folder.parent, device="cpu"
    )
    assert report.table is not None
    page = (folder / "report.html").read_text()
    assert page.count("<img ") == 1, "the reliability"
    assert f'auroc</th><td class="n">{result["auroc"]["value"]:.4g}</td>' in page
    assert all(f">{case}</th>" in (tmp_path / "out" / "report.html").read_text() for case in validation)
    predicted = table(report.table)
    for case, row in validation.items():
        stated = np.log([float(row["healthy"]), float(row["ill"])]) / result["temperature"]
        expected = np.exp(stated) / np.exp(stated).sum()
        assert float(predicted[case]["ill"]) == pytest.approx(expected[1], abs=2e-3)
        assert predicted[case]["label"] == ("healthy", "ill")[int(expected.argmax())]
        assert predicted[case]["calibrated"] == "yes"


def test_the_probe_tells_the_bright_ball(tmp_path: Path) -> None:
    labels.prepare(tmp_path)
    folder = labels.run(tmp_path, head="probe")
    result = json.loads((folder / "metrics.json").read_text())
    assert result["auroc"]["value"] == 1
    assert set(result["probe"]) == {"c", "inner_score", "knn_10_auroc", "knn_20_auroc"}


def test_features_are_computed_once_and_do_not_depend_on_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    labels.prepare(tmp_path)
    first = labels.run(tmp_path, "2d", head="probe")
    with caplog.at_level(logging.INFO):
        labels.run(tmp_path, "2d", head="probe", fold=1)
    assert "0 computed now, 12 from before" in caplog.text
    (file,) = first.parent.glob("features_*.npz")
    before = dict(np.load(file))
    file.unlink()
    monkeypatch.setattr(classification.Classifier, "AT_ONCE", 3)
    labels.run(tmp_path, "2d", head="probe", fold=2)
    after = dict(np.load(file))
    assert all(np.allclose(after[name], before[name], atol=1e-5) for name in before)


@pytest.mark.parametrize("settings", [(), ("finetune.ema_decay=0.9",)])
def test_a_run_that_was_stopped_ends_in_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    for name in ("whole", "stopped"):
        labels.prepare(tmp_path / name, "primus")
    whole = labels.run(tmp_path / "whole", "2d", *settings)
    begin_step = classification.ClassificationRun.begin_step

    def stop(run: Any, step: int) -> None:
        if step == 4:
            run.save_early()
            raise StoppedError(143, "stopped")
        begin_step(run, step)

    monkeypatch.setattr(classification.ClassificationRun, "begin_step", stop)
    with pytest.raises(StoppedError):
        labels.run(tmp_path / "stopped", "2d", *settings)
    monkeypatch.undo()
    stopped = labels.run(tmp_path / "stopped", "2d", *settings, continue_training=True)
    one, other = weights(whole), weights(stopped)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [(folder / "log.jsonl").read_text() for folder in (whole, stopped)]
    assert [row.partition('"seconds"')[0] for row in rows[0].splitlines()] == [
        row.partition('"seconds"')[0] for row in rows[1].splitlines()
    ]


def test_weights_go_from_classifier_to_classifier_and_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    labels.prepare(tmp_path)
    first = labels.run(tmp_path, head="linear")
    content = checkpoint.load(first / "checkpoint_final.pth")
    content["mfm"]["licence"] = "CC-BY-SA-4.0"
    checkpoint.save(content, first / "checkpoint_final.pth")
    with caplog.at_level("INFO"):
        folder = labels.run(tmp_path, "3d_fullres", "finetune.train=head", head="attentive",
                            pretrained_weights=first / "checkpoint_final.pth")  # fmt: skip
    shown = next(record.getMessage() for record in caplog.records if "weights from" in record.getMessage())
    assert one_message(shown) == shown, "its lines are lines, and no escaped breaks"
    report = json.loads((folder / "transfer.json").read_text())
    assert report["encoder_share"] == 1
    assert checkpoint.load(folder / "checkpoint_final.pth")["mfm"]["licence"] == "CC-BY-SA-4.0"
    trained, source = weights(folder), checkpoint.load(first / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(trained[name], source[name]) for name in source)


def test_the_folds_are_pooled_when_all_are_there(tmp_path: Path) -> None:
    labels.prepare(tmp_path)
    for fold in range(5):
        folder = labels.run(tmp_path, "2d", head="probe", fold=fold)
        file = folder.parent / "crossvalidation.json"
        assert file.is_file() == (fold == 4)
    result = json.loads(file.read_text())
    assert result["num_cases"] == labels.NUM_CASES
    assert 0 <= result["brier"]["mean_over_folds"] <= 1


def test_a_classifier_is_a_pretrained_checkpoint_of_segmentation(tmp_path: Path) -> None:
    here = labels.prepare(tmp_path)
    reading = read_checkpoint(labels.run(tmp_path, head="linear") / "checkpoint_final.pth")
    plans = json.loads((here.preprocessed / labels.NAME / "mfmPlans.json").read_text())
    network = build_network(plans, "3d_fullres", 1, 3)
    assert transfer(reading, network, "encoder").encoder_share == 1
    assert reading.origin["pretext"] == "classification"
    assert not has_decoder(reading, network)


def test_adapters_are_merged(tmp_path: Path) -> None:
    labels.prepare(tmp_path, "primus")
    first = labels.run(tmp_path, "2d")
    folder = labels.run(tmp_path, "2d", "finetune.train=lora", head="mil",
                        pretrained_weights=first / "checkpoint_final.pth")  # fmt: skip
    assert weights(folder).keys() >= checkpoint.load(first / "checkpoint_final.pth")["network_weights"].keys()


def test_the_order_of_the_classes_survives(tmp_path: Path) -> None:
    labels.prepare(tmp_path, classes=["ill", "healthy"])
    folder = labels.run(tmp_path, "2d", head="probe")
    assert list(table(folder / "predictions.csv")["case00" if "case00" in table(folder / "predictions.csv") else
                next(iter(table(folder / "predictions.csv")))])[1:] == ["ill", "healthy"]  # fmt: skip
    assert json.loads((folder.parent / "dataset.json").read_text())["classes"] == ["ill", "healthy"]
    assert checkpoint.load(folder / "checkpoint_final.pth")["mfm"]["classes"] == ["ill", "healthy"]


def test_several_labels_and_numbers(tmp_path: Path) -> None:
    sets = {f"case{n:02d}": ";".join(["ball"] * labels.label(n) + ["odd"] * (n % 2)) for n in range(labels.NUM_CASES)}
    labels.prepare(tmp_path / "sets", task="multilabel", labels=sets)
    for head in ("linear", "probe"):
        folder = labels.run(tmp_path / "sets", "2d", head=head)
        assert set(json.loads((folder / "metrics.json").read_text())["per_class"]) == {"ball", "odd"}
    numbers = {f"case{n:02d}": 100 + 10 * labels.label(n) + n / 100 for n in range(labels.NUM_CASES)}
    labels.prepare(tmp_path / "numbers", task="regression", labels=numbers)
    for head in ("linear", "probe"):
        folder = labels.run(tmp_path / "numbers", "2d", head=head)
        assert {"mae", "r2", "bias"} <= set(json.loads((folder / "metrics.json").read_text()))
        found = predict(labels.write_scans(tmp_path / "in", [0, 2]), tmp_path / head, model_folder=folder.parent,
                        device="cpu").table  # fmt: skip
        assert found is not None
        assert all(80 < float(row["prediction"]) < 130 for row in table(found).values())
    assert json.loads((folder / "metrics.json").read_text())["r2"]["value"] > 0.5


def test_sides_are_not_mirrored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sides = {f"case{n:02d}": ("left", "right")[labels.label(n)] for n in range(labels.NUM_CASES)}
    labels.prepare(tmp_path, labels=sides)
    folder = labels.run(tmp_path, "2d")
    assert json.loads((folder / "settings.json").read_text())["settings"]["finetune"]["mirroring"] is False
    assert not any("Mirror" in repr(part) for part in classification.make_transforms((16, 16), False).transforms)


def test_no_temperature_is_fitted_to_cases_that_trained(tmp_path: Path) -> None:
    """As in a study, whose folds validate on one of their training cases."""
    here = labels.prepare(tmp_path)
    names = [*labels.rows()]
    split = {"train": names, "val": names[:1]}
    (here.preprocessed / labels.NAME / "splits_final.json").write_text(json.dumps([split]))
    folder = labels.run(tmp_path, "2d", head="probe")
    assert checkpoint.load(folder / "checkpoint_final.pth")["mfm"]["temperature"] is None


def test_refusals(tmp_path: Path) -> None:
    here = labels.prepare(tmp_path)
    labels.run(tmp_path, "2d", head="probe")
    for code, options in (
        ("E_EXISTS", {"head": "probe"}),
        ("E_NOT_FOUND", {"head": "linear", "continue_training": True}),
        ("E_CONFIG", {"head": "linear", "settings": ("finetune.train=decoder",)}),
        ("E_CONFIG", {"head": "linear", "settings": ("finetune.mix=cutmix",)}),
        ("E_CONFIG", {"head": "linear", "settings": ("finetune.train=head",)}),
        ("E_CONFIG", {"head": "linear", "num_gpus": 2}),
        ("E_CONFIG", {"head": "forest"}),
    ):
        with pytest.raises(MFMError) as error:
            train(labels.NAME, "2d", 0, workspace=tmp_path, **{"device": "auto", **options})
        assert error.value.code == code, options
    file = here.preprocessed / labels.NAME / "dataset.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "task": "clasification"}))
    with pytest.raises(MFMError) as error:
        labels.run(tmp_path, "2d", head="linear")
    assert error.value.code == "E_FORMAT"
    assert "clasification" in error.value.message


def test_a_study_reads_the_labelled_cases(tmp_path: Path) -> None:
    here = labels.prepare(tmp_path)
    raw = here.raw / labels.NAME
    labels.write_scans(raw / "imagesTr", range(labels.NUM_CASES))
    for name in ("dataset.json", "labels.csv"):
        (raw / name).write_text((here.preprocessed / labels.NAME / name).read_text())
    found = read_labelled(here, labels.NAME)
    assert found.table is not None
    assert len(found.cases) == len(found.table.targets) == labels.NUM_CASES
    text = (raw / "labels.csv").read_text()
    (raw / "labels.csv").write_text(text.replace("case00,healthy", "case00,"))
    assert len(read_labelled(here, labels.NAME).cases) == labels.NUM_CASES - 1


def xray_dataset(shared_data: Path, workspace: Path, most: int | None = None) -> str:
    """Write a raw dataset of real X-rays, normal or abnormal by the last digit of the name; return its name."""
    files = [*(shared_data / "Dataset057_CXRLung" / "imagesTr").glob("*.png"),
             *(shared_data / "unlabelled" / "XRAY").rglob("*.png")]  # fmt: skip
    if not files:
        pytest.skip(f"no X-rays in {shared_data}")
    name = "Dataset090_Xray"
    raw = workspace / "nnUNet_raw" / name
    (raw / "imagesTr").mkdir(parents=True)
    rows = []
    for file in sorted(files, key=lambda file: file.name)[:: 1 if most is None else len(files) // most]:
        case = file.stem.removesuffix("_0000")
        os.symlink(file, raw / "imagesTr" / f"{case}_0000.png")
        rows.append(f"{case},{'abnormal' if case.endswith('1') else 'normal'},{case}\n")
    (raw / "labels.csv").write_text("case,label,subject\n" + "".join(rows))
    content = {"channel_names": {"0": "xray"}, "file_ending": ".png", "task": "classification",
               "classes": ["normal", "abnormal"]}  # fmt: skip
    (raw / "dataset.json").write_text(json.dumps(content))
    return name


def test_real_xrays_from_plan_to_probabilities(tmp_path: Path, shared_data: Path) -> None:
    name = xray_dataset(shared_data, tmp_path, most=20)
    (result,) = plan_and_preprocess([name], configurations=["2d"], workspace=tmp_path, num_processes=1)
    assert result.plans["mfm"]["finetune"]["optimizer"] == "adamw"
    raw = tmp_path / "nnUNet_raw"
    raw.rename(tmp_path / "moved")  # labels and subjects are kept with the data
    folder = train(name, "2d", 0, head="probe", device="cpu", workspace=tmp_path)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["num_cases"] == found["num_subjects"]
    assert found["auroc"]["value"] is not None
    images = tmp_path / "moved" / name / "imagesTr"
    report = predict(images, tmp_path / "out", model_folder=folder.parent, device="cpu")
    assert report.table is not None
    assert len(table(report.table)) == len(list(images.iterdir()))


def test_planning_reads_the_table_first(tmp_path: Path, shared_data: Path) -> None:
    name = xray_dataset(shared_data, tmp_path, most=6)
    file = tmp_path / "nnUNet_raw" / name / "labels.csv"
    file.write_text(file.read_text() + "nobody,normal,nobody\n")
    with pytest.raises(MFMError) as error:
        plan_and_preprocess([name], configurations=["2d"], workspace=tmp_path)
    assert error.value.code == "E_NOT_FOUND"
    assert "nobody" in error.value.message
