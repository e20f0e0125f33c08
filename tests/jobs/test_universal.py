"""One model for several datasets: planning, training, prediction, and adding a dataset."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from mfm_nnunet import checkpoint, workspace
from mfm_nnunet.data.class_table import FILE, key_of
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.universal import UnionLoader
from mfm_nnunet.jobs.plan import plan_and_preprocess
from mfm_nnunet.jobs.predict import predict
from mfm_nnunet.jobs.train import train
from mfm_nnunet.prediction.model import load_model
from tests.builders import tiny_model, unions
from tests.builders.site import edit_json
from tests.builders.unions import SETTINGS, UNION

HEAD = "decoder.seg_layers.0.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a union of two datasets that was planned, confirmed and trained."""
    workspace = tmp_path_factory.mktemp("union")
    for number in (4, 53):
        unions.write_dataset(workspace, number, names=f"p{number}_")
    unions.plan_union(workspace, 4, 53)
    unions.confirm(workspace)
    unions.train_union(workspace)
    return workspace


def model_of(workspace: Path, name: str = UNION) -> Path:
    return workspace / "nnUNet_results" / name / "MFMTrainer__mfmPlans__3d_fullres"


def voxels(file: Path) -> np.ndarray:
    return np.asarray(nibabel.load(file).dataobj)  # type: ignore[attr-defined]


def test_the_union_is_an_ordinary_dataset_of_links(trained: Path) -> None:
    folder = trained / "nnUNet_raw" / UNION
    images = sorted((folder / "imagesTr").iterdir())
    assert len(images) == 10
    assert all(file.is_symlink() and file.exists() for file in images)
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "shell": 1, "core": 2}
    assert (folder / "labelsTr" / "004_p4_0.nii.gz").is_symlink(), "its values are the union's"
    source = voxels(trained / "nnUNet_raw" / "Dataset053_Some" / "labelsTr" / "p53_0.nii.gz")
    np.testing.assert_array_equal(voxels(folder / "labelsTr" / "053_p53_0.nii.gz"), 2 * source)
    splits = json.loads((trained / "nnUNet_preprocessed" / UNION / "splits_final.json").read_text())
    assert [len(split["val"]) for split in splits] == [2] * 5
    for split in splits:
        assert {key_of(case) for case in split["val"]} == {"004", "053"}


def test_a_second_planning_reuses_everything(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = trained / "nnUNet_raw" / UNION / "labelsTr" / "053_p53_0.nii.gz"
    before = written.stat()
    with caplog.at_level(logging.INFO):
        plan_and_preprocess([900], configurations=["3d_fullres"], plans_name="mfmAgain", workspace=trained)
    assert written.stat().st_ino == before.st_ino
    assert "0 cases preprocessed, 10 reused" in caplog.text


def test_the_log_counts_steps_per_class_and_scores_datasets(trained: Path) -> None:
    fold = model_of(trained) / "fold_0"
    (log,) = fold.glob("training_log*")
    assert "steps per class (crops with it, of 4): shell 2" in log.read_text()
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert set(summary["dice_per_dataset"]["Dataset053_Some"]) <= {"core"}
    for result in summary["metric_per_case"]:
        is_hidden = Path(result["reference_file"]).name.startswith("053")
        assert np.isnan(result["metrics"]["1"]["Dice"]) == is_hidden, "shell is not annotated in 053"


def test_stock_nnunet_predicts_the_same_masks(trained: Path, tmp_path: Path) -> None:
    images, model = tmp_path / "in", model_of(trained)
    images.mkdir()
    os.symlink(trained / "nnUNet_raw" / "Dataset004_Some" / "imagesTr" / "p4_0_0000.nii.gz", images / "a_0000.nii.gz")
    predict(images, tmp_path / "ours", model_folder=model, device="cpu")
    predict(images, tmp_path / "all", model_folder=model, device="cpu", classes=["core", "shell"])
    predict(images, tmp_path / "of", model_folder=model, device="cpu", classes_of=53)
    with workspace.use(trained):  # nnU-Net finds our trainer
        tiny_model.stock_predictor(model).predict_from_files(
            str(images), str(tmp_path / "stock"), num_processes_preprocessing=1, num_processes_segmentation_export=1
        )
    whole = voxels(tmp_path / "ours" / "a.nii.gz")
    np.testing.assert_array_equal(voxels(tmp_path / "stock" / "a.nii.gz"), whole)
    np.testing.assert_array_equal(voxels(tmp_path / "all" / "a.nii.gz"), whole)
    assert set(np.unique(voxels(tmp_path / "of" / "a.nii.gz"))) <= {0, 2}
    with pytest.raises(MFMError, match="E_CONFIG"):
        predict(images, tmp_path / "no", model_folder=model, device="cpu", classes_of=58)


def test_its_weights_are_a_pretrained_checkpoint(trained: Path) -> None:
    weights = model_of(trained) / "fold_0" / "checkpoint_final.pth"
    plan_and_preprocess([53], like=weights, workspace=trained, num_processes=1)
    folder = train(
        53, "3d_fullres", 0, plans_name="mfmLikePlans", pretrained_weights=weights, settings=SETTINGS,
        workspace=trained, device="cpu",
    )  # fmt: skip
    report = json.loads((folder / "transfer.json").read_text())
    assert report["encoder_share"] == 1
    assert report["pretext"] in (None, "supervised")


def test_rehearsal_keeps_channels_and_reports_old_classes(trained: Path) -> None:
    """With nothing but the outputs trained, the logits of old classes stay bit for bit."""
    unions.write_dataset(trained, 58, names="p58_")
    old = model_of(trained)
    unions.plan_union(trained, 4, 53, 58, number=901, add_to=old)
    name = "Dataset901_Universal"
    unions.confirm(trained, name)
    weights = old / "fold_0" / "checkpoint_final.pth"
    options: dict[str, Any] = {"plans_name": "mfmLikePlans", "pretrained_weights": weights}
    folder = unions.train_union(trained, 901, "finetune.train=head", **options)
    content = json.loads((folder.parent / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "shell": 1, "core": 2, "ball": 3}
    scores = json.loads((folder / "old_classes.json").read_text())
    assert set(scores["Dataset004_Some"]) <= {"shell", "core"}
    for found in scores["Dataset004_Some"].values():
        assert not found["pseudo_labels"]
    start = checkpoint.load_weights(weights)["network_weights"]
    last = checkpoint.load_weights(folder / "checkpoint_final.pth")["network_weights"]
    for tensor_name, tensor in last.items():
        number = len(start[tensor_name])
        assert torch.equal(tensor[:number], start[tensor_name]), tensor_name
        assert len(tensor) == number + (".seg_layers." in tensor_name)
    before, after = load_model(old, device="cpu"), load_model(folder.parent, device="cpu")
    image = torch.randn(1, 16, 16, 16)
    torch.testing.assert_close(after.predict_logits(image)[:3], before.predict_logits(image), atol=2e-3, rtol=0)
    assert not torch.equal(last[HEAD][3:], torch.zeros_like(last[HEAD][3:])), "the new class learned"


def test_without_the_old_data_the_old_model_labels_the_new(trained: Path) -> None:
    unions.write_dataset(trained, 58, names="p58_")
    unions.plan_union(trained, 58, number=902, add_to=model_of(trained))
    folder = trained / "nnUNet_raw" / "Dataset902_Universal"
    content = json.loads((folder / FILE).read_text())
    assert content["datasets"]["058"]["pseudo"] == ["shell", "core"]
    own = voxels(trained / "nnUNet_raw" / "Dataset058_Some" / "labelsTr" / "p58_0.nii.gz")
    pseudo = voxels(folder / "pseudo_labels" / "Dataset058_Some" / "p58_0.nii.gz")
    np.testing.assert_array_equal(voxels(folder / "labelsTr" / "058_p58_0.nii.gz"), np.where(own > 0, 3, pseudo))
    unions.confirm(trained, "Dataset902_Universal")
    weights = model_of(trained) / "fold_0" / "checkpoint_final.pth"
    result = unions.train_union(trained, 902, plans_name="mfmLikePlans", pretrained_weights=weights)
    scores = json.loads((result / "old_classes.json").read_text())
    assert all(found["pseudo_labels"] for found in scores["Dataset058_Some"].values())


def test_other_weights_do_not_extend(trained: Path) -> None:
    """The scores and channels of old classes would mean nothing."""
    unions.write_dataset(trained, 58, names="p58_")
    unions.plan_union(trained, 58, number=903, add_to=model_of(trained))
    unions.confirm(trained, "Dataset903_Universal")
    single = trained / "nnUNet_results" / "Dataset053_Some"
    if not single.is_dir():
        test_its_weights_are_a_pretrained_checkpoint(trained)
    (weights,) = single.glob("*/fold_0/checkpoint_final.pth")
    with pytest.raises(MFMError, match="E_MODEL_MISMATCH"):
        unions.train_union(trained, 903, plans_name="mfmLikePlans", pretrained_weights=weights)


def test_overlapping_classes_train_with_sigmoids(tmp_path: Path) -> None:
    unions.write_dataset(tmp_path, 4, {"whole": [1, 2], "core": 2}, names="a")
    unions.write_dataset(tmp_path, 53, names="b")
    unions.plan_union(tmp_path, 4, 53)
    unions.confirm(tmp_path)
    folder = unions.train_union(tmp_path)
    content = json.loads((folder.parent / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "whole": [1, 3], "core": [2, 3]}
    images, out = tmp_path / "nnUNet_raw" / "Dataset053_Some" / "imagesTr", tmp_path / "out"
    predict(images, out, model_folder=folder.parent, device="cpu", classes_of="Dataset053_Some")
    assert len(list(out.glob("b*.nii.gz"))) == 5


def test_kinds_of_images_have_their_own_normalisation(tmp_path: Path) -> None:
    """A CT gets its window and an MR its own scale; prediction must be told which it is, unless the classes say so."""
    unions.write_dataset(tmp_path, 4, names="a")
    unions.write_dataset(tmp_path, 58, channel="CT", names="b")
    result = unions.plan_union(tmp_path, 4, 58)
    rules = json.loads(result.file.read_text())["mfm"]["modalities"]
    assert {kind: rule["scheme"] for kind, rule in rules.items()} == {
        "ct": "CTNormalization", "mr": "ZScoreNormalization",
    }  # fmt: skip
    unions.confirm(tmp_path)
    folder = unions.train_union(tmp_path)
    images = tmp_path / "nnUNet_raw" / "Dataset058_Some" / "imagesTr"
    with pytest.raises(MFMError, match="--classes-of"):
        predict(images, tmp_path / "no", model_folder=folder.parent, device="cpu")
    predict(images, tmp_path / "of", model_folder=folder.parent, device="cpu", classes_of=58)
    predict(images, tmp_path / "named", model_folder=folder.parent, device="cpu", classes=["ball"])
    for case in range(5):
        name = f"b{case}.nii.gz"
        np.testing.assert_array_equal(voxels(tmp_path / "of" / name), voxels(tmp_path / "named" / name))
    plans = json.loads((tmp_path / "of" / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]


def test_every_batch_is_from_several_datasets_drawn_by_the_root_of_their_size() -> None:
    class Data:
        identifiers = [f"004_{n}" for n in range(100)] + [f"053_{n}" for n in range(4)] + ["058_0"]

    loader: Any = UnionLoader.__new__(UnionLoader)
    loader.batch_size, loader._data = 3, Data()
    loader._group(0.5, Data.identifiers)
    np.random.seed(0)
    batches = [loader.get_indices() for _ in range(2000)]
    assert all(len({key_of(case) for case in batch}) > 1 for batch in batches)
    third = [key_of(case) for batch in batches for case in batch]
    shares = {key: third.count(key) / len(third) for key in ("004", "053", "058")}
    assert 0.5 < shares["004"] < 10 / 13, "10, 2 and 1, less what the second draw takes from the first"
    assert shares["053"] == pytest.approx(2 * shares["058"], rel=0.25)
    firsts = [key_of(batch[0]) for batch in batches]
    assert firsts.count("004") / len(firsts) == pytest.approx(shares["004"], abs=0.05), "in any order"


def refuse(workspace: Path, code: str, *datasets: Any, **options: Any) -> str:
    with pytest.raises(MFMError) as caught:
        plan_and_preprocess([options.pop("number", 900)], universal=datasets, workspace=workspace, **options)
    assert caught.value.code == code, caught.value
    return caught.value.message


def test_datasets_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    unions.write_dataset(tmp_path, 4, names="a", num_cases=2)
    unions.write_dataset(tmp_path, 53, names="b", num_cases=2, num_channels=2)
    unions.write_dataset(tmp_path, 58, names="c", num_cases=2, spacing=20.0)
    assert "Dataset053_Some" in refuse(tmp_path, "E_CHANNELS", 4, 53)
    assert "--spacing" in refuse(tmp_path, "E_SPACING", 4, 58)
    assert "twice" in refuse(tmp_path, "E_CONFIG", 4, 4, number=901)
    assert "77" in refuse(tmp_path, "E_NOT_FOUND", 4, 77, number=902)
    refuse(tmp_path, "E_CONFIG", 900, number=903)
    refuse(tmp_path, "E_EXISTS", 53, number=900)
    refuse(tmp_path, "E_EXISTS", 53, number=4)
    edit_json(
        tmp_path / "nnUNet_raw" / "Dataset053_Some" / "dataset.json", lambda content: content.update(file_ending=".nii")
    )
    for file in (tmp_path / "nnUNet_raw" / "Dataset053_Some").rglob("*.nii.gz"):
        file.rename(file.with_suffix(""))
    unions.write_dataset(tmp_path, 4, names="a", num_cases=2, num_channels=2)
    refuse(tmp_path, "E_FORMAT", 4, 53, number=904)


def test_a_patient_of_two_datasets_stays_in_one_fold(tmp_path: Path) -> None:
    for number in (4, 53):
        unions.write_dataset(tmp_path, number, names="STS_")
    unions.plan_union(tmp_path, 4, 53, preprocess=False)
    base = tmp_path / "nnUNet_preprocessed"
    splits = json.loads((base / UNION / "splits_final.json").read_text())
    for split in splits:
        sides = [{case.partition("_")[2] for case in split[part]} for part in ("train", "val")]
        assert not sides[0] & sides[1]
    own = [{"train": [f"STS_{n}" for n in range(5) if n != k], "val": [f"STS_{k}"]} for k in range(5)]
    for number, folds in ((4, own), (53, own[::-1])):
        (base / f"Dataset{number:03d}_Some").mkdir()
        (base / f"Dataset{number:03d}_Some" / "splits_final.json").write_text(json.dumps(folds))
    assert "STS_" in refuse(tmp_path, "E_CONFIG", 4, 53)
    unions.confirm(tmp_path, same_patients=False)
    (base / UNION / "splits_final.json").unlink()
    unions.plan_union(tmp_path, 4, 53, preprocess=False)
    splits = json.loads((base / UNION / "splits_final.json").read_text())
    assert [split["val"] for split in splits] == [[f"004_STS_{k}", f"053_STS_{4 - k}"] for k in range(5)]


def test_an_unconfirmed_or_changed_table_is_not_trained(tmp_path: Path) -> None:
    for number in (4, 53):
        unions.write_dataset(tmp_path, number, names=f"p{number}_")
    unions.plan_union(tmp_path, 4, 53)
    with pytest.raises(MFMError, match="core"):
        unions.train_union(tmp_path)
    unions.confirm(tmp_path, exclusive=False)
    with pytest.raises(MFMError, match="-d 900"):
        unions.train_union(tmp_path)
    assert not list(model_of(tmp_path).rglob("*.pth"))
    unions.confirm(tmp_path, exclusive=True)
    with pytest.raises(MFMError, match="num_gpus"):
        unions.train_union(tmp_path, num_gpus=2)
