"""The planner against nnU-Net's own, and what it adds: budgets, spacing modes, Primus, corpora, the block."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as stock
from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as presets
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import to_plain
from mfm_nnunet.jobs.plan import PlanResult, check_request, plan
from mfm_nnunet.planning import planner
from mfm_nnunet.planning.derive import format_table
from mfm_nnunet.planning.planner import MFMPlanner
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.settings import block_of
from tests.builders.tiny_data import ABDOMEN, BRAIN, HIPPOCAMPUS, XRAY, workspace_with, write_json

NAME = "Dataset004_Tiny"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a machine without GPU, wherever the tests run."""
    monkeypatch.setattr(planner, "_gpu_memory_gb", lambda: None)


def make(root: Path, data: dict[str, Any], **request: Any) -> PlanResult:
    """The plan for a data set of :mod:`tests.builders.tiny_data`."""
    options = {key: request.pop(key) for key in ("channels", "is_corpus", "relative_size") if key in request}
    with workspace_with(root, NAME, **data, **options) as here:
        wanted = PlanRequest([NAME], **request)
        return plan(here, NAME, wanted, check_request(wanted))


def build(plans: dict[str, Any], configuration: str, num_inputs: int = 1) -> torch.nn.Module:
    """The network as stock nnU-Net builds it for training."""
    manager = PlansManager(plans).get_configuration(configuration)
    return get_network_from_plans(
        manager.network_arch_class_name,
        manager.network_arch_init_kwargs,
        manager.network_arch_init_kwargs_req_import,
        num_inputs,
        3,
        deep_supervision=False,
    )


@pytest.mark.parametrize(
    ("memory_gb", "stock_planner", "data"),
    [
        (24, presets.nnUNetPlannerResEncL, XRAY),
        (40, presets.nnUNetPlannerResEncXL, ABDOMEN),
    ],
)
def test_the_plan_for_8_24_and_40_gb_is_nnunets(
    tmp_path: Path, memory_gb: float, stock_planner: type, data: dict[str, Any]
) -> None:
    ours = make(tmp_path, data, memory_gb=memory_gb).plans
    files = {"case00": {"images": ["unused.nrrd"]}}
    estimate = staticmethod(MFMPlanner.static_estimate_VRAM_usage)  # equal and fast, see the next test
    with (
        workspace_with(tmp_path, NAME, **data),
        mock.patch.object(stock, "get_filenames_of_train_images_and_targets", return_value=files),
        mock.patch.object(stock.ExperimentPlanner, "static_estimate_VRAM_usage", estimate),
    ):
        theirs = to_plain(stock_planner(NAME).plan_experiment())
    ignored = {"plans_name", "experiment_planner_used", "mfm", "configurations"}
    assert {k: v for k, v in ours.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}
    assert list(ours["configurations"]) == list(theirs["configurations"])
    for name, configuration in theirs["configurations"].items():
        expected = {key: value for key, value in configuration.items() if key != "data_identifier"}
        assert {k: v for k, v in ours["configurations"][name].items() if k != "data_identifier"} == expected


def test_the_size_estimate_without_weights_is_nnunets(tmp_path: Path) -> None:
    architecture = make(tmp_path, HIPPOCAMPUS).plans["configurations"]["3d_fullres"]["architecture"]
    arguments = [(40, 56, 40), 1, 3, *(architecture[k] for k in ("network_class_name", "arch_kwargs"))]
    arguments.append(architecture["_kw_requires_import"])
    ours = MFMPlanner.static_estimate_VRAM_usage(*arguments)
    assert ours == stock.ExperimentPlanner.static_estimate_VRAM_usage(*arguments)


def test_the_cpu_preset_sees_the_whole_hippocampus(tmp_path: Path) -> None:
    result = make(tmp_path, HIPPOCAMPUS)
    configuration = result.plans["configurations"]["3d_fullres"]
    assert result.file == tmp_path / "nnUNet_preprocessed" / NAME / "mfmPlans.json"
    assert configuration["patch_size"] == [40, 56, 40]
    assert configuration["batch_size"] == 2
    parameters = sum(p.numel() for p in build(result.plans, "3d_fullres").parameters())
    assert 1e6 < parameters < 3e6
    block = block_of(result.plans)
    assert (block.network, block.pretrain.optimizer, block.pretrain.gradient_clip) == ("resenc", "adamw", 12)
    assert block.pretrain.epochs * block.pretrain.iterations_per_epoch == 1000
    assert block.finetune.deep_supervision


@pytest.mark.parametrize(("data", "network"), [(BRAIN, "resenc"), (XRAY, "primus")])
def test_the_cpu_preset_stays_small(tmp_path: Path, data: dict[str, Any], network: str) -> None:
    plans = make(tmp_path, data, network=network, is_corpus=True).plans
    for name in ("2d", "3d_fullres"):
        if name in plans["configurations"]:
            patch = plans["configurations"][name]["patch_size"]
            assert torch.tensor(patch).prod() <= {2: 192 * 192 * 1.1, 3: 48 * 56 * 48 * 1.1}[len(patch)]
            assert sum(p.numel() for p in build(plans, name).parameters()) < 6e6


def test_primus_has_a_patch_of_whole_tokens_and_its_published_optimiser(tmp_path: Path) -> None:
    result = make(tmp_path, HIPPOCAMPUS, network="primus")
    assert result.file.name == "mfmPrimusPlans.json"
    for name, patch in (("3d_fullres", [40, 56, 40]), ("2d", [56, 40])):
        configuration = result.plans["configurations"][name]
        kwargs = configuration["architecture"]["arch_kwargs"]
        assert configuration["patch_size"] == kwargs["input_shape"] == patch
        assert kwargs["patch_embed_size"] == [8] * len(patch)
        assert configuration["architecture"]["_kw_requires_import"] == []
        assert build(result.plans, name)(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)
    block = block_of(result.plans)
    assert (block.network, block.finetune.optimizer, block.finetune.learning_rate) == ("primus", "adamw", 1e-3)
    assert (block.finetune.weight_decay, block.finetune.gradient_clip) == (5e-2, 1.0)
    assert not block.finetune.deep_supervision


def test_primus_is_the_published_one_in_the_published_budget(tmp_path: Path) -> None:
    plans = make(tmp_path, BRAIN, network="primus", memory_gb=24, configurations=("3d_fullres",)).plans
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [160, 160, 160]
    assert configuration["architecture"]["arch_kwargs"]["embed_dim"] == 864
    assert block_of(plans).pretrain.epochs == 1000


@pytest.mark.parametrize("network", ["resenc", "primus"])
def test_too_small_a_budget_is_refused_with_the_numbers(tmp_path: Path, network: str) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG .*leaves 0\.0\d+ GB.*needs 0\.0\d+ GB"):
        make(tmp_path, HIPPOCAMPUS, network=network, memory_gb=0.02)


def test_stock_planning_accepts_the_class_and_replanning_keeps_the_block(tmp_path: Path) -> None:
    with workspace_with(tmp_path, NAME, **HIPPOCAMPUS) as here:
        for _ in range(2):
            plans, name = plan_experiment_dataset(4, MFMPlanner)
            assert name == "mfmPlans"
            on_disk = json.loads((here.preprocessed / NAME / "mfmPlans.json").read_text())
            assert on_disk == plans
            assert "mfm" in on_disk


@pytest.mark.parametrize(("network", "spacing"), [("resenc", "median"), ("primus", "original")])
def test_every_name_resolves_in_stock_nnunet(tmp_path: Path, network: str, spacing: str) -> None:
    result = make(tmp_path, HIPPOCAMPUS, network=network, spacing=spacing)
    plans = json.loads(result.file.read_text())
    assert plans == result.plans
    manager = PlansManager(plans)
    assert manager.image_reader_writer_class.__name__ == "SimpleITKIO"
    assert manager.get_label_manager({"labels": {"background": 0, "a": 1}}).num_segmentation_heads == 2
    for name in plans["configurations"]:
        configuration = manager.get_configuration(name)
        assert configuration.preprocessor_class.__name__ == "DefaultPreprocessor"
        assert callable(configuration.resampling_fn_data)
        assert callable(configuration.resampling_fn_seg)
        assert callable(configuration.resampling_fn_probabilities)
        build(plans, name, num_inputs=3)


def test_a_labelled_data_set_has_nnunets_configurations(tmp_path: Path) -> None:
    everything = make(tmp_path, BRAIN).plans["configurations"]
    assert set(everything) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    # With more memory there is no need for a low resolution, and the one of the older plan does not come back.
    assert set(make(tmp_path, BRAIN, memory_gb=40).plans["configurations"]) == {"2d", "3d_fullres"}


def test_a_corpus_is_planned_without_labels_and_without_a_low_resolution(tmp_path: Path) -> None:
    plans = make(tmp_path, BRAIN, is_corpus=True).plans
    assert set(plans["configurations"]) == {"2d", "3d_fullres"}
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]


def test_only_ct_is_normalised_as_ct(tmp_path: Path) -> None:
    own = make(tmp_path, HIPPOCAMPUS, channels=("CT", "whatever"), relative_size=0.5).plans["configurations"]["2d"]
    assert own["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    assert own["use_mask_for_norm"] == [False, True]


def test_spacing_modes(tmp_path: Path) -> None:
    one = make(tmp_path, ABDOMEN, spacing="onemm", is_corpus=True).plans["configurations"]["3d_fullres"]
    assert one["spacing"] == [1, 1, 1]
    assert one["median_image_size_in_voxels"] == [256, 225, 256]
    explicit = make(tmp_path, ABDOMEN, spacing=(0.8, 3.0, 1.6), is_corpus=True).plans
    assert explicit["transpose_forward"] == [1, 0, 2]  # coarsest first
    assert explicit["configurations"]["3d_fullres"]["spacing"] == [3.0, 0.8, 1.6]
    with pytest.raises(MFMError, match="expected median, onemm, original or three lengths"):
        make(tmp_path, ABDOMEN, spacing=(1.0, 0.0, 1.0))


def test_original_spacing_resamples_nothing(tmp_path: Path) -> None:
    shapes = [[40, 60, 60], [40, 60, 60], [80, 120, 120]]
    data = {"shapes": shapes, "spacings": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]]}
    plans = make(tmp_path, data, spacing="original").plans
    own = plans["configurations"]["3d_fullres"]
    assert {own[f"resampling_fn_{kind}"] for kind in ("data", "seg", "probabilities")} == {"no_resampling_hack"}
    assert own["median_image_size_in_voxels"] == [40, 60, 60]
    assert own["spacing"] == [2, 2, 2]
    assert plans["original_median_spacing_after_transp"] == [2, 2, 2]
    assert "3d_lowres" not in plans["configurations"]


@pytest.mark.parametrize("spacing", ["original", (0.5, 2.0, 2.0)])
def test_2d_images_have_only_2d_and_keep_their_slices(tmp_path: Path, spacing: Any) -> None:
    plans = make(tmp_path, XRAY, spacing=spacing).plans
    assert set(plans["configurations"]) == {"2d"}
    assert plans["transpose_forward"] == [0, 1, 2]
    size = [256, 240] if spacing == (0.5, 2.0, 2.0) else [512, 480]
    assert plans["configurations"]["2d"]["median_image_size_in_voxels"] == size


@pytest.mark.parametrize(
    ("axis", "thickness", "network"), [(0, 0.1, "resenc"), (1, 30.0, "primus"), (2, 1.0, "resenc"), (2, 30.0, "resenc")]
)
def test_the_axis_of_one_voxel_is_the_slice_axis_whatever_its_spacing(
    tmp_path: Path, axis: int, thickness: float, network: str
) -> None:
    shape, spacing = np.insert([64, 60], axis, 1).tolist(), np.insert([2.0, 2.0], axis, thickness).tolist()
    others = np.insert([2.0, 2.0], axis, 7 * thickness).tolist()
    result = make(tmp_path, {"shapes": [shape] * 6, "spacings": [spacing] * 4 + [others] * 2}, network=network)
    assert set(result.plans["configurations"]) == {"2d"}
    assert result.plans["configurations"]["2d"]["median_image_size_in_voxels"] == [64, 60]
    assert result.plans["configurations"]["2d"]["patch_size"] == [64, 64]
    forward, backward = result.plans["transpose_forward"], result.plans["transpose_backward"]
    assert forward[0] == axis
    assert forward[1:] == sorted(forward[1:])
    assert [forward[other] for other in backward] == [0, 1, 2]
    assert "the axis of one voxel first" in format_table(result.decisions)


def test_single_slices_along_different_axes_are_refused_and_a_few_among_volumes_are_not(tmp_path: Path) -> None:
    flat, turned, volume = [1, 64, 60], [64, 1, 60], [30, 64, 60]
    with pytest.raises(MFMError, match=r"E_CONFIG .*4 along axis 0, 2 along axis 1"):
        make(tmp_path, {"shapes": [flat] * 4 + [turned] * 2, "spacings": [[1.0] * 3] * 6})
    data = {"shapes": [volume] * 4 + [flat, turned], "spacings": [[1.0] * 3] * 6}
    assert "3d_fullres" in make(tmp_path, data).plans["configurations"]


def test_planning_does_not_depend_on_the_number_of_augmentation_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workspace_with(tmp_path, NAME, **HIPPOCAMPUS) as here:
        monkeypatch.setitem(os.environ, "nnUNet_n_proc_DA", "0")
        threads = torch.get_num_threads()
        plan(here, NAME, PlanRequest([NAME], configurations=("2d",)))
        assert torch.get_num_threads() == threads


def test_a_missing_fingerprint_or_data_set_is_named(tmp_path: Path) -> None:
    with workspace_with(tmp_path, NAME, **HIPPOCAMPUS) as here:
        (here.preprocessed / NAME / "dataset_fingerprint.json").unlink()
        with pytest.raises(MFMError, match=r"E_NOT_FOUND .*dataset_fingerprint\.json"):
            plan(here, NAME, PlanRequest([NAME]))
        with pytest.raises(MFMError, match=r"E_NOT_FOUND .*dataset\.json"):
            plan(here, "Dataset099_None", PlanRequest([NAME]))


def test_wrong_requests_are_explained(tmp_path: Path) -> None:
    for request, message in (
        ({"network": "resnec"}, "Did you mean 'resenc'"),
        ({"memory_gb": -1.0}, "above 0"),
        ({"plans_name": "nnUNetPlans"}, "start with 'mfm'"),
        ({"plans_name": "mfm/../x"}, "letters"),
    ):
        with pytest.raises(MFMError, match=message) as caught:
            make(tmp_path, HIPPOCAMPUS, **request)
        assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("shape", "request_"),
    [
        ([7, 7, 7], {}),
        ([56, 56, 56], {"spacing": (8.0, 8.0, 8.0)}),
        ([5, 6, 7], {"memory_gb": 8, "configurations": ("3d_fullres",)}),
    ],
)
def test_images_too_small_for_two_stages_are_refused_with_the_numbers(
    tmp_path: Path, shape: list[int], request_: dict[str, Any]
) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG .*voxels.* finer --spacing"):
        make(tmp_path, {"shapes": [shape] * 4, "spacings": [[1.0] * 3] * 4}, **request_)
    assert not list(tmp_path.rglob("mfmPlans.json"))


@pytest.mark.parametrize("shape", [[8, 8, 8], [12, 6, 7]])
def test_what_is_planned_for_small_images_has_two_stages_and_can_be_built(tmp_path: Path, shape: list[int]) -> None:
    data = {"shapes": [shape] * 4, "spacings": [[1.0] * 3] * 4}
    plans = make(tmp_path, data, configurations=("3d_fullres",)).plans
    network = build(plans, "3d_fullres")
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    assert network(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)


def test_a_different_plan_of_the_same_name_replaces_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, HIPPOCAMPUS)
    with caplog.at_level(logging.WARNING, logger=planner.__name__):
        make(tmp_path, HIPPOCAMPUS)
        assert not caplog.records  # the same plan again
        result = make(tmp_path, HIPPOCAMPUS, configurations=("3d_fullres",), spacing="onemm", memory_gb=1)
    assert "configurations.3d_fullres.batch_size" in caplog.text
    assert "configurations.2d" not in caplog.text
    assert set(result.plans["configurations"]) == {"2d", "3d_fullres"}  # the other one is kept
    assert [d.name for d in result.decisions if d.name.endswith(": spacing")] == ["3d_fullres: spacing"]
    primus = make(tmp_path, HIPPOCAMPUS, network="primus", configurations=("3d_fullres",), plans_name="mfmPlans")
    assert set(primus.plans["configurations"]) == {"3d_fullres"}  # a plan has one network family


def test_what_is_no_plan_is_replaced_and_configurations_of_users_stay(tmp_path: Path) -> None:
    file = make(tmp_path, HIPPOCAMPUS).file
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_more"] = {"inherits_from": "3d_fullres", "batch_size": 4}
    write_json(file, plans)
    assert "3d_more" in make(tmp_path, HIPPOCAMPUS).plans["configurations"]
    file.write_text("not JSON")
    assert set(make(tmp_path, HIPPOCAMPUS).plans["configurations"]) == {"2d", "3d_fullres"}


def test_a_plan_holds_no_path_and_preprocessing_is_shared_by_equal_plans(tmp_path: Path) -> None:
    first = make(tmp_path, HIPPOCAMPUS)
    assert str(tmp_path) not in first.file.read_text()
    primus = make(tmp_path, HIPPOCAMPUS, network="primus").plans["configurations"]
    other = make(tmp_path, HIPPOCAMPUS, spacing=(1.0, 1.0, 2.0), plans_name="mfmC").plans["configurations"]
    for name, configuration in first.plans["configurations"].items():
        assert configuration["data_identifier"].startswith(f"mfm_{name}_")
        assert primus[name]["data_identifier"] == configuration["data_identifier"]
        assert other[name]["data_identifier"] != configuration["data_identifier"]


def test_the_table_names_each_decision_with_its_reason(tmp_path: Path) -> None:
    decisions = make(tmp_path, HIPPOCAMPUS, memory_gb=8).decisions
    names = [item.name.strip() for item in decisions]
    wanted = {"budget", "axis order", "channel 0", "3d_fullres: spacing", "2d: spacing", "pretraining", "fine-tuning"}
    assert wanted <= set(names)
    for name in ("patch", "batch size", "network", "parameters", "memory"):
        assert names.count(name) == 2
    assert all(item.value and item.reason for item in decisions)
    table = format_table(decisions, width=100)
    assert max(map(len, table.splitlines())) <= 100
    assert "8 GB" in table
    assert "covers the median image (36 x 50 x 35)" in " ".join(d.reason for d in decisions)


def test_the_plan_names_the_reader_of_the_fingerprint(tmp_path: Path) -> None:
    with workspace_with(tmp_path, NAME, **HIPPOCAMPUS) as here:
        file = here.preprocessed / NAME / "dataset_fingerprint.json"
        write_json(file, {**json.loads(file.read_text()), "mfm": {"reader": "NibabelIO"}})
        assert plan(here, NAME, PlanRequest([NAME])).plans["image_reader_writer"] == "NibabelIO"
