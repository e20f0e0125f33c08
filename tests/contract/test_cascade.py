"""Images that a patch sees little of get a low resolution and a cascade; both stages train and predict."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from mfm_nnunet import api
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.workspace import use
from tests.builders import crafted, synthetic

STAGES = ("3d_lowres", "3d_cascade_fullres")
CASES = ("case_0", "case_1")


@dataclass(frozen=True)
class Cascade:
    root: Path
    name: str
    plans: dict[str, Any]

    def model(self, stage: str) -> Path:
        return self.root / "nnUNet_results" / self.name / f"MFMTrainer__mfmPlans__{stage}"

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.name

    @property
    def test_images(self) -> Path:
        return self.root / "nnUNet_raw" / self.name / "imagesTs"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    """A plan for so little memory that a patch of 32^3 sees a twelfth of the image."""
    root = tmp_path_factory.mktemp("cascade")
    with use(root) as here:
        name = synthetic.write_dataset(here, num_cases=len(CASES), scale=3)
        (result,) = api.plan_and_preprocess([name], memory_gb=0.05, configurations=STAGES[1:], workspace=root)
        plans = json.loads(result.file.read_text())
        # Narrow networks and a few steps: what is tested is that the stages fit together.
        for configuration in (plans["configurations"][stage] for stage in ("3d_lowres", "3d_fullres")):
            kwargs = configuration["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [4, 8, 8, 8, 8, 8][: kwargs["n_stages"]]
        result.file.write_text(json.dumps(plans))
        synthetic.settings(result.file, epochs=1, iterations_per_epoch=4, validation_iterations=1)
    return Cascade(root, name, plans)


def test_plan_links_the_stages_as_nnunet_does(planned: Cascade) -> None:
    configurations = planned.plans["configurations"]
    assert set(configurations) == {"3d_lowres", "3d_fullres", "3d_cascade_fullres"}
    assert configurations["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    cascade = configurations["3d_cascade_fullres"]
    assert cascade == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    assert min(configurations["3d_lowres"]["spacing"]) > min(configurations["3d_fullres"]["spacing"])


def test_both_resolutions_are_preprocessed_and_never_mixed(planned: Cascade) -> None:
    low, full = (planned.plans["configurations"][c]["data_identifier"] for c in ("3d_lowres", "3d_fullres"))
    assert low != full
    shapes = [blosc2.open(str(planned.preprocessed / identifier / "case_0.b2nd")).shape for identifier in (low, full)]
    assert np.prod(shapes[0]) < np.prod(shapes[1])


@pytest.fixture(scope="module")
def trained(planned: Cascade) -> Cascade:
    """Both stages, trained on all cases, so that one run per stage predicts them all; without mirrored copies."""
    configure = MFMTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size

    def without_mirroring(self: MFMTrainer) -> Any:
        result = configure(self)
        self.inference_allowed_mirroring_axes = None
        return result

    name = "configure_rotation_dummyDA_mirroring_and_inital_patch_size"
    with pytest.MonkeyPatch.context() as patch, synthetic.in_this_process():
        patch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
        patch.setattr(MFMTrainer, name, without_mirroring)
        for stage in STAGES:
            api.train(planned.name, stage, "all", device="cpu", workspace=planned.root)
    return planned


def test_first_stage_predicts_for_the_next(trained: Cascade) -> None:
    """On the grid of the next stage's data, where its loader reads them."""
    full = trained.preprocessed / trained.plans["configurations"]["3d_fullres"]["data_identifier"]
    for case in CASES:
        mask = blosc2.open(str(trained.model("3d_lowres") / "predicted_next_stage" / STAGES[1] / f"{case}.b2nd"))
        assert mask.shape == blosc2.open(str(full / f"{case}.b2nd")).shape[1:]


def test_second_stage_sees_the_first_ones_classes(trained: Cascade) -> None:
    content = torch.load(trained.model(STAGES[1]) / "fold_all" / "checkpoint_final.pth", weights_only=True)
    assert content["network_weights"]["encoder.stem.convs.0.conv.weight"].shape[1] == 1 + 2
    assert (trained.model(STAGES[1]) / "fold_all" / "validation" / "summary.json").is_file()


def test_files_of_the_next_stage_run_no_code(trained: Cascade, tmp_path: Path) -> None:
    """The first stage's validation reads the sizes of the second one's images, the second stage reads its masks."""
    full = trained.plans["configurations"]["3d_fullres"]["data_identifier"]
    mask = trained.model(STAGES[0]) / "predicted_next_stage" / STAGES[1] / "case_0.b2nd"
    volume = crafted.volumes(tmp_path / "mark", tmp_path / "here")["a function"]
    crafted_pickle = crafted.pickles(tmp_path / "mark")["protocol 4"]
    for stage, file, write in (
        (STAGES[0], trained.preprocessed / full / "case_0.pkl", lambda file: file.write_bytes(crafted_pickle)),
        (STAGES[0], trained.preprocessed / full / "case_0.b2nd", volume),
        (STAGES[1], mask, volume),
    ):
        good = file.read_bytes()
        write(file)
        with pytest.raises(MFMError) as caught, synthetic.in_this_process():
            api.train(trained.name, stage, "all", only_validate=True, device="cpu", workspace=trained.root)
        file.write_bytes(good)
        assert (caught.value.code, caught.value.message.partition(":")[0]) == ("E_DATA_UNSAFE", str(file))
    assert not (tmp_path / "mark").exists()


def test_cascade_predicts_as_stock(trained: Cascade, tmp_path: Path) -> None:
    first = {"model_folder": trained.model(STAGES[0]), "device": "cpu", "workspace": trained.root}
    api.predict(trained.test_images, tmp_path / "first", **first)
    second = {**first, "model_folder": trained.model(STAGES[1]), "previous_stage": tmp_path / "first"}
    api.predict(trained.test_images, tmp_path / "second", **second)
    (previous,), (mask,) = (list((tmp_path / part).glob("*.nii.gz")) for part in ("first", "second"))
    with use(trained.root):
        stock = synthetic.predict_with_stock(
            trained.model(STAGES[1]),
            tuple(trained.test_images.iterdir()),
            synthetic.voxels_of(previous)[None].astype(np.float32),  # as stock's readers give it
        )
    assert len(np.unique(stock)) > 1
    assert np.array_equal(synthetic.voxels_of(mask), stock)
