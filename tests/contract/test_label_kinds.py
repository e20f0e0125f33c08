"""All kinds of labels through plan, preprocessing, one epoch and prediction, with the masks of stock nnU-Net."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from mfm_nnunet import api
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.workspace import use
from tests.builders import synthetic
from tests.builders.training import first_batches

FINETUNE = ("finetune.epochs=1", "finetune.iterations_per_epoch=8", "finetune.validation_iterations=1", "num_workers=0")
OUTPUTS = {"classes": 3, "regions": 2, "ignore": 3, "regions_ignore": 2}


@dataclass(frozen=True)
class Trained:
    kind: str
    root: Path
    name: str
    fold: Path

    @property
    def data(self) -> Path:
        (folder,) = (self.root / "nnUNet_preprocessed" / self.name).glob("mfm_3d_fullres_*/")
        return folder


@pytest.fixture(scope="module", params=list(synthetic.KINDS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A dataset with one kind of labels, planned, preprocessed and trained for an epoch."""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch, use(root) as here:
        patch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
        name = synthetic.write_dataset(here, request.param)
        api.plan_and_preprocess([name], configurations=["3d_fullres"], workspace=root)
        fold = api.train(name, "3d_fullres", 0, settings=FINETUNE, device="cpu", workspace=root)
    return Trained(request.param, root, name, fold)


def test_foreground_is_listed_as_the_loader_looks_it_up(trained: Trained) -> None:
    """Regions are tuples; with an ignore label everything annotated is an entry of its own."""
    properties = pickle.loads((trained.data / "case_0.pkl").read_bytes())
    expected: set[object] = {(1, 2), (2,)} if "regions" in trained.kind else {1, 2}
    found = set(properties["class_locations"])
    assert expected <= found
    assert len(found - expected) == (1 if "ignore" in trained.kind else 0)


def test_what_is_not_annotated_has_no_influence_on_the_loss(trained: Trained) -> None:
    with use(trained.root):
        plans = json.loads((trained.fold.parent / "plans.json").read_text())
        dataset_json = json.loads((trained.fold.parent / "dataset.json").read_text())
        trainer = MFMTrainer({**plans, "continue_training": True}, "3d_fullres", 0, dataset_json, torch.device("cpu"))
        trainer.initialize()
        batch = next(first_batches(trainer))
    target = batch["target"]
    with torch.no_grad():
        outputs = trainer.network(batch["data"])
        ignored = [t[:, -1:] > 0 if "regions" in trained.kind else t == 3 for t in target]
        changed = [torch.where(mask, -5 * out, out) for mask, out in zip(ignored, outputs)]
        elsewhere = [torch.where(mask, out, -5 * out) for mask, out in zip(ignored, outputs)]
        before, after, other = (float(trainer.loss(o, target)) for o in (outputs, changed, elsewhere))
    if "ignore" in trained.kind:
        assert ignored[0].any()
        assert after == before
    assert other != before


def test_validation_measures_each_class_or_region(trained: Trained) -> None:
    summary = json.loads((trained.fold / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == ({"(1, 2)", "(2,)"} if "regions" in trained.kind else {"1", "2"})
    (case,) = summary["metric_per_case"]
    (metrics, *_) = case["metrics"].values()
    num_voxels = metrics["TP"] + metrics["FP"] + metrics["FN"] + metrics["TN"]
    share = num_voxels / np.prod(synthetic.SHAPE_ZYX)
    assert share == (0.5 if "ignore" in trained.kind else 1.0)


def test_masks_are_those_of_stock(trained: Trained, tmp_path: Path) -> None:
    images = trained.root / "nnUNet_raw" / trained.name / "imagesTs"
    with use(trained.root):
        api.predict(images, tmp_path / "out", model_folder=trained.fold.parent, device="cpu", workspace=trained.root)
        stock = synthetic.predict_with_stock(trained.fold.parent, tuple(images.iterdir()))
    (file,) = (tmp_path / "out").glob("*.nii.gz")
    mask = synthetic.voxels_of(file)
    assert set(np.unique(mask)) <= {0, 1, 2}
    assert len(np.unique(mask)) > 1, "a mask of nothing proves nothing"
    assert np.array_equal(mask, stock)
