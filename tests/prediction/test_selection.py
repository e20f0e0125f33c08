"""Some classes of a model: the same masks as with all of them, where the rule of training says so, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.predict import predict
from mfm_nnunet.prediction.model import load_model
from mfm_nnunet.prediction.selection import choose_outputs
from tests.builders import tiny_model

FOUR = {"background": 0, "a": 1, "b": 2, "c": 3}


def model_folder(folder: Path, labels: dict[str, Any]) -> Path:
    return tiny_model.save_model(folder, tiny_model.tiny_plans(), tiny_model.dataset_json(labels))


def masks(folder: Path, model: Path, **options: Any) -> np.ndarray:
    scans = folder / "in"
    scans.mkdir(exist_ok=True)
    tiny_model.write_scan(scans / "scan_0000.nii.gz")
    out = folder / f"out_{len(list(folder.iterdir()))}"
    predict(scans, out, model_folder=model, device="cpu", **options)
    return np.asarray(nibabel.load(out / "scan.nii.gz").dataobj)  # type: ignore[attr-defined]


@pytest.mark.parametrize("labels", [FOUR, tiny_model.REGIONS], ids=["labels", "regions"])
def test_all_classes_are_the_model_itself(tmp_path: Path, labels: dict[str, Any]) -> None:
    model = model_folder(tmp_path / "model", labels)
    names = [name for name in labels if name != "background"]
    whole = masks(tmp_path, model)
    assert len(np.unique(whole)) == 4
    np.testing.assert_array_equal(masks(tmp_path, model, classes=names[::-1]), whole)


def test_the_rest_of_a_softmax_is_background(tmp_path: Path) -> None:
    """The mask is the largest of the class and of all others together, and the class keeps its value."""
    model = load_model(model_folder(tmp_path / "model", FOUR), device="cpu")
    chosen = choose_outputs(model, ["c"], None)
    assert chosen.selection is not None
    x = torch.randn(1, 4, 8, 8, 8)
    merged = chosen.selection(x)
    torch.testing.assert_close(merged.softmax(1)[:, 1], x.softmax(1)[:, 3])
    found = masks(tmp_path, tmp_path / "model", classes=["c"])
    assert set(np.unique(found)) == {0, 3}
    image = torch.randn(1, 16, 16, 16)
    assert len(chosen.predict_logits(image)) == 2, "memory follows the selection"
    assert len(model.predict_logits(image)) == 4


def test_a_region_is_as_in_the_whole_model(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", tiny_model.REGIONS)
    model = load_model(folder, device="cpu")
    image = torch.randn(1, 16, 16, 16)
    whole = model.predict_logits(image)
    for place, name in enumerate(("whole", "core", "tip")):
        chosen = choose_outputs(model, [name], None)
        assert torch.equal(chosen.predict_logits(image), whole[place : place + 1])
        assert set(np.unique(masks(tmp_path, folder, classes=[name]))) == {0, place + 1}


def test_probabilities_are_those_of_the_selection(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", FOUR)
    found = masks(tmp_path, folder, classes=["b", "c"], save_probabilities=True)
    (file,) = tmp_path.glob("out_*/scan.npz")
    assert len(np.load(file)["probabilities"]) == 3
    assert set(np.unique(found)) <= {0, 2, 3}


@pytest.mark.parametrize("classes", [["d"], ["a", "a"], ["background"]])
def test_unknown_and_doubled_names_are_refused(tmp_path: Path, classes: list[str]) -> None:
    folder = model_folder(tmp_path / "model", FOUR)
    with pytest.raises(MFMError, match="--classes"):
        masks(tmp_path, folder, classes=classes)


def test_a_model_of_one_dataset_has_no_other(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", FOUR)
    with pytest.raises(MFMError, match="--classes-of 4"):
        masks(tmp_path, folder, classes_of=4)


def test_a_selection_is_part_of_what_made_a_mask(tmp_path: Path) -> None:
    """Resuming with other classes would mix two kinds of masks."""
    folder = model_folder(tmp_path / "model", FOUR)
    masks(tmp_path, folder, classes=["a"])
    (out,) = tmp_path.glob("out_*")
    with pytest.raises(MFMError):
        predict(tmp_path / "in", out, model_folder=folder, device="cpu", classes=["b"], resume=True)
    report = predict(tmp_path / "in", out, model_folder=folder, device="cpu", classes=["a"], resume=True)
    assert report.skipped == ["scan"]
