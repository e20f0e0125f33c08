"""Data, plans and models go both ways: what stock nnU-Net made works here, what we make works in stock nnU-Net."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    ResEncUNetPlanner,
)
from nnunetv2.run.run_training import run_training as stock_run_training
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mfm_nnunet import api, checkpoint
from mfm_nnunet.workspace import use
from tests.builders import synthetic
from tests.builders.tiny import run_training

CPU = torch.device("cpu")
FINETUNE = ("finetune.epochs=1", "finetune.iterations_per_epoch=4", "finetune.validation_iterations=1", "num_workers=0")
ALLOWED_IN_STOCK_FILES = {"numpy.dtype", "numpy.dtypes.Float32DType", "numpy.dtypes.Float64DType"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)


@dataclass(frozen=True)
class Dataset:
    root: Path
    name: str

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.name

    @property
    def test_images(self) -> Path:
        return self.root / "nnUNet_raw" / self.name / "imagesTs"

    def mask_of(self, model_folder: Path, output: Path) -> np.ndarray:
        """What mfm predict makes of the test image."""
        api.predict(self.test_images, output, model_folder=model_folder, device="cpu", workspace=self.root)
        (file,) = output.glob("*.nii.gz")
        return synthetic.voxels_of(file)

    def mask_of_stock(self, model_folder: Path) -> np.ndarray:
        with use(self.root):
            return synthetic.predict_with_stock(model_folder, tuple(self.test_images.iterdir()))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("interchange")
    with use(root) as here:
        return Dataset(root, synthetic.write_dataset(here))


@pytest.fixture(scope="module")
def planned(dataset: Dataset) -> Dataset:
    """Planned and preprocessed by us."""
    with use(dataset.root):
        api.plan_and_preprocess([dataset.name], workspace=dataset.root)
        synthetic.settings(
            dataset.preprocessed / "mfmPlans.json", epochs=1, iterations_per_epoch=6, validation_iterations=1
        )
    return dataset


# From stock to us


@pytest.mark.parametrize("planner", [ExperimentPlanner, ResEncUNetPlanner])
def test_stock_plan_and_data_train_and_predict_here(
    dataset: Dataset, planner: type[ExperimentPlanner], tmp_path: Path
) -> None:
    configuration = "3d_fullres" if planner is ResEncUNetPlanner else "2d"
    with use(dataset.root) as here:
        plans = synthetic.plan_with_stock(here, dataset.name, planner)
        synthetic.preprocess_with_stock(here, dataset.name, plans, configuration)
        fold = run_training(
            here, dataset.name, configuration, 0, plans_name=plans["plans_name"], overrides=FINETUNE, device="cpu"
        )
    mask = dataset.mask_of(fold.parent, tmp_path / "masks")
    assert len(np.unique(mask)) > 1
    assert np.array_equal(mask, dataset.mask_of_stock(fold.parent))


# From us to stock


@pytest.fixture(scope="module")
def stock_model(planned: Dataset) -> Path:
    """A model that a stock trainer trained on our plan and data."""
    start = nnUNetTrainer.on_train_start

    def short(self: nnUNetTrainer) -> None:
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 4, 1
        start(self)

    with pytest.MonkeyPatch.context() as patch, synthetic.in_this_process():
        patch.setenv("nnUNet_n_proc_DA", "0")  # stock reads and augments in this process
        patch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
        patch.setattr(nnUNetTrainer, "on_train_start", short)
        with use(planned.root) as here:
            stock_run_training(planned.name, "3d_fullres", "0", "nnUNetTrainer_1epoch", "mfmPlans", device=CPU)
    return here.results / planned.name / "nnUNetTrainer_1epoch__mfmPlans__3d_fullres" / "fold_0"


def test_stock_checkpoint_needs_no_more_than_our_list(stock_model: Path) -> None:
    """We load stock's files with weights_only; what they hold besides tensors must stay data."""
    unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(stock_model / "checkpoint_final.pth"))
    scalars = {name for name in unsafe if name.endswith("multiarray.scalar")}
    assert scalars, "nothing left to allow: the list can go"
    assert unsafe - scalars <= ALLOWED_IN_STOCK_FILES
    assert checkpoint.load(stock_model / "checkpoint_final.pth")["trainer_name"] == "nnUNetTrainer_1epoch"


def test_stock_model_predicts_here(planned: Dataset, stock_model: Path, tmp_path: Path) -> None:
    mask = planned.mask_of(stock_model.parent, tmp_path / "masks")
    assert len(np.unique(mask)) > 1
    assert np.array_equal(mask, planned.mask_of_stock(stock_model.parent))


@pytest.fixture(scope="module")
def our_model(planned: Dataset) -> Path:
    """A model of MFMTrainer, trained by stock's function behind nnUNetv2_train, which finds it by name."""
    with pytest.MonkeyPatch.context() as patch, use(planned.root) as here, synthetic.in_this_process():
        patch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
        stock_run_training(planned.name, "3d_fullres", "0", "MFMTrainer", "mfmPlans", device=CPU)
    return here.results / planned.name / "MFMTrainer__mfmPlans__3d_fullres" / "fold_0"


def test_stock_command_trains_our_trainer_by_name(our_model: Path) -> None:
    content = torch.load(our_model / "checkpoint_final.pth", weights_only=True)
    assert content["mfm"]["finetune"]["iterations_per_epoch"] == 6
    assert content["current_epoch"] == 1
    assert (our_model / "validation" / "summary.json").is_file()


def test_stock_command_continues_our_run(planned: Dataset, our_model: Path) -> None:
    """A finished run is validated again and its weights stay."""
    before = checkpoint.load(our_model / "checkpoint_final.pth")["network_weights"]
    (our_model / "validation" / "summary.json").unlink()
    with use(planned.root), synthetic.in_this_process():
        stock_run_training(
            planned.name, "3d_fullres", "0", "MFMTrainer", "mfmPlans", continue_training=True, device=CPU
        )
    after = checkpoint.load(our_model / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (our_model / "validation" / "summary.json").is_file()


def test_stock_chooses_among_our_models(planned: Dataset, our_model: Path, stock_model: Path) -> None:
    models = [{"plans": "mfmPlans", "configuration": "3d_fullres", "trainer": t.parent.name.partition("__")[0]}
              for t in (our_model, stock_model)]  # fmt: skip
    with use(planned.root), synthetic.in_this_process():
        find_best_configuration(planned.name, tuple(models), allow_ensembling=False, num_processes=1, folds=(0,))
    report = json.loads((our_model.parents[1] / "inference_information.json").read_text())
    assert set(report["all_results"]) == {our_model.parent.name, stock_model.parent.name}
    assert len(list(our_model.parents[1].glob("*/crossval_results_folds_0/postprocessing.pkl"))) == 1


# Side by side


def test_neither_touches_the_others_data(planned: Dataset) -> None:
    """Stock deletes the folder that it is about to fill; ours is another. And we delete nothing."""
    with use(planned.root) as here:
        plans = synthetic.plan_with_stock(here, planned.name)
        folder = synthetic.preprocess_with_stock(here, planned.name, plans, "3d_fullres")
        (ours,) = planned.preprocessed.glob("mfm_3d_fullres_*/")
        assert ours != folder
        before = contents(ours)
        synthetic.preprocess_with_stock(here, planned.name, plans, "3d_fullres")
        assert contents(ours) == before
        of_stock = contents(folder)
        for file in ours.iterdir():
            file.unlink()
        api.plan_and_preprocess([planned.name], workspace=planned.root)
        assert contents(folder) == of_stock
        assert contents(ours) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}
