"""--like: the plan of a labelled data set that a pretrained checkpoint fits."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.plan import PlanResult, check_request, plan
from mfm_nnunet.modalities import WINDOW
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.unet import PLAIN
from mfm_nnunet.plan import Configuration, Plan
from mfm_nnunet.planning import like, planner
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.settings import block_of
from tests.builders.tiny_data import ABDOMEN, BRAIN, HIPPOCAMPUS, XRAY, pretrained_checkpoint, workspace_with

CORPUS, TARGET = "Dataset701_Corpus", "Dataset004_Tiny"
SMALL = {"shapes": [[20, 90, 20]] * 8, "spacings": [[1.0, 1.0, 1.0]] * 8}


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a machine without GPU, wherever the tests run."""
    monkeypatch.setattr(planner, "_gpu_memory_gb", lambda: None)


_PLANS: dict[str, dict[str, Any]] = {}


def corpus_plan(
    root: Path, data: dict[str, Any], channels: tuple[str, ...] = ("MRI",), **request: Any
) -> dict[str, Any]:
    """The plan of an unlabelled corpus, made once."""
    key = repr((data, channels, request))
    if key not in _PLANS:
        with workspace_with(root, CORPUS, **data, channels=channels, is_corpus=True) as here:
            _PLANS[key] = plan(here, CORPUS, PlanRequest([CORPUS], **request)).plans
    return copy.deepcopy(_PLANS[key])


def plan_like(
    root: Path, data: dict[str, Any], file: Path, channels: tuple[str, ...] = ("MRI",), **request: Any
) -> PlanResult:
    """The plan of a labelled data set like the checkpoint ``file``."""
    with workspace_with(root, TARGET, **data, channels=channels) as here:
        wanted = PlanRequest([TARGET], like=file, **request)
        return plan(here, TARGET, wanted, check_request(wanted))


@pytest.mark.parametrize("network", ["resenc", "primus"])
def test_the_checkpoints_network_spacing_and_axis_order_are_taken_over(tmp_path: Path, network: str) -> None:
    source = corpus_plan(tmp_path, ABDOMEN, network=network)
    file = pretrained_checkpoint(tmp_path / "checkpoint_final.pth", source, "3d_fullres")
    result = plan_like(tmp_path, BRAIN, file, channels=("MRI", "T2"))
    theirs, ours = source["configurations"]["3d_fullres"], result.plans["configurations"]["3d_fullres"]
    assert set(result.plans["configurations"]) == {"3d_fullres"}
    for key in ("spacing", "patch_size", "batch_size", "architecture", "resampling_fn_data_kwargs"):
        assert ours[key] == theirs[key], key
    assert result.plans["transpose_forward"] == source["transpose_forward"] == [1, 0, 2]
    assert result.plans["transpose_backward"] == [1, 0, 2]
    assert ours["median_image_size_in_voxels"] == [96, 194, 250]  # 240/2.5, 155/0.8, 200/0.8
    assert ours["normalization_schemes"] == ["ZScoreNormalization"] * 2
    block = block_of(result.plans)
    assert block.network == network
    assert block.source == {
        "name": "checkpoint_final.pth",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "pretext": "mae",
        "network": network,
    }
    assert result.file.name == {"resenc": "mfmLikePlans.json", "primus": "mfmLikePrimusPlans.json"}[network]
    assert str(tmp_path) not in result.file.read_text()
    assert "checkpoint_final.pth" in result.decisions[0].reason


PET = {"shapes": [[62, 39, 39]] * 6, "spacings": [[4.0, 5.0, 5.0]] * 5 + [[1.0, 1.0, 1.0]]}


def test_a_plan_that_fits_the_scans_badly_is_warned_of_with_the_ways_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = pretrained_checkpoint(tmp_path / "a.pth", corpus_plan(tmp_path, BRAIN), "3d_fullres")
    plan_like(tmp_path, PET, file)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    numbers = ("up to 100.0 voxels", "5 of 6 scans", "sees 1.3%", "(248 x 195 x 195)")
    for words in (*numbers, "--spacing", "finetune.transfer=adapt"):
        assert words in warning
    assert file.name in warning
    assert str(tmp_path) not in warning


@pytest.mark.parametrize(("spacing", "edge_mm"), [("median", 1.5), ("original", 5.0)])
def test_a_plan_that_fits_is_not_warned_of(
    tmp_path: Path, spacing: Any, edge_mm: float, caplog: pytest.LogCaptureFixture
) -> None:
    source = corpus_plan(tmp_path, HIPPOCAMPUS, spacing=spacing)
    small = {"shapes": [[64, 64, 64]] * 4, "spacings": [[edge_mm] * 3] * 4}
    plan_like(tmp_path, small, pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres"))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("network", ["resenc", "primus"])
def test_the_patch_shrinks_with_the_images_and_the_network_still_fits(tmp_path: Path, network: str) -> None:
    source = corpus_plan(tmp_path, BRAIN, network=network)
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")
    plans = plan_like(tmp_path, SMALL, file).plans
    theirs, patch = (
        source["configurations"]["3d_fullres"]["patch_size"],
        plans["configurations"]["3d_fullres"]["patch_size"],
    )
    assert patch == [24, theirs[1], 24]
    network_ = build_network(plans, "3d_fullres", 1, 3)
    assert network_(torch.zeros(2, 1, *patch)).shape == (2, 3, *patch)


def test_a_2d_checkpoint_plans_only_2d_and_says_nothing_about_the_slice_axis(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, ABDOMEN, configurations=("2d",))
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "2d")
    data = {"shapes": [[30, 200, 210]] * 4, "spacings": [[4.0, 0.5, 0.4]] * 4}
    plans = plan_like(tmp_path, data, file).plans
    own = plans["configurations"]["2d"]
    assert set(plans["configurations"]) == {"2d"}
    assert plans["transpose_forward"] == [1, 0, 2]
    assert own["spacing"] == [0.8, 0.8]
    assert own["median_image_size_in_voxels"] == [150, 105]  # 30 slices of 4 mm, 210 columns of 0.4 mm
    assert own["patch_size"] == [p if m > p else -(-m // 32) * 32 for p, m in zip([192, 192], [150, 105])]


def test_pictures_keep_their_slice_axis_and_cannot_be_planned_like_a_3d_checkpoint(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, ABDOMEN)
    in_2d = plan_like(tmp_path, XRAY, pretrained_checkpoint(tmp_path / "2.pth", source, "2d")).plans
    assert in_2d["transpose_forward"] == [0, 1, 2]
    assert in_2d["configurations"]["2d"]["median_image_size_in_voxels"] == [640, 600]
    with pytest.raises(MFMError, match=r"E_MODEL_MISMATCH .*pretrained in 3D"):
        plan_like(tmp_path, XRAY, pretrained_checkpoint(tmp_path / "3.pth", source, "3d_fullres"))


@pytest.mark.parametrize("spacing", ["as planned", None])
def test_without_resampling_each_data_set_keeps_its_spacing(spacing: Any, tmp_path: Path) -> None:
    """Plans of others may name no spacing, beside functions that resample."""
    source = corpus_plan(tmp_path, BRAIN, spacing="original" if spacing == "as planned" else "median")
    if spacing != "as planned":
        source["configurations"]["3d_fullres"]["spacing"] = spacing
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")
    own = plan_like(tmp_path, {"shapes": [[50, 60, 70]] * 3, "spacings": [[2.0, 2.0, 2.0]] * 3}, file).plans
    configuration = own["configurations"]["3d_fullres"]
    assert configuration["resampling_fn_data"] == configuration["resampling_fn_probabilities"] == "no_resampling_hack"
    assert configuration["spacing"] == [2, 2, 2]
    assert configuration["median_image_size_in_voxels"] == [50, 60, 70]


def test_ct_is_normalised_with_the_checkpoints_intensities(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, HIPPOCAMPUS, channels=("CT",))
    source["foreground_intensity_properties_per_channel"]["0"]["mean"] = 123.0
    plans = plan_like(tmp_path, HIPPOCAMPUS, pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")).plans
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["mean"] == 123.0


def test_ct_without_the_checkpoints_intensities_is_refused(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, HIPPOCAMPUS, channels=("CT",))
    source["foreground_intensity_properties_per_channel"] = {}
    with pytest.raises(MFMError, match=r"E_MODEL_MISMATCH .*a\.pth.*foreground_intensity_properties_per_channel"):
        plan_like(tmp_path, HIPPOCAMPUS, pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres"))


def test_channels_that_cannot_be_matched_are_refused(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, HIPPOCAMPUS, channels=("CT", "MRI"))
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")
    with pytest.raises(MFMError, match=r"E_MODEL_MISMATCH .*2 channels with different normalisations"):
        plan_like(tmp_path, HIPPOCAMPUS, file)


def test_requests_that_contradict_the_checkpoint_are_refused(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, HIPPOCAMPUS)
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")
    for request, message in (
        ({"spacing": "onemm"}, "the checkpoint decides"),
        ({"network": "primus"}, "is a ResEnc"),
        ({"configurations": ("2d",)}, "no configuration '2d'"),
    ):
        with pytest.raises(MFMError, match=message) as caught:
            plan_like(tmp_path, HIPPOCAMPUS, file, **request)
        assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("patch", "strides", "image", "expected"),
    [
        ([40, 56, 40], [1, 2, 2, 2], [100, 100, 100], [40, 56, 40]),
        ([64, 64, 64], [1, 2, 2, 2], [36, 100, 64], [40, 64, 64]),
        ([64, 64, 64], [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [3, 5, 70], [4, 8, 64]),
        ([64, 64, 64], [1, 2, 2, 2], [5, 6, 7], [16, 16, 16]),  # one coarsest voxel cannot be normalised
        ([8, 8, 8], [1, 2, 2, 2], [5, 6, 7], [8, 8, 8]),  # but the checkpoint's patch is never exceeded
    ],
)
def test_patches_like_the_checkpoints(patch: list[int], strides: Any, image: list[int], expected: list[int]) -> None:
    assert like.like_patch(patch, {"network_class_name": PLAIN, "arch_kwargs": {"strides": strides}}, image) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mfmPlans", "mfmLikePlans"),
        ("mfmPrimusPlans", "mfmLikePrimusPlans"),
        ("mfmLikePlans", "mfmLikePlans"),
        ("mfm_big", "mfmLike_bigPlans"),
        ("../../x", "mfmLikexPlans"),
    ],
)
def test_names_of_plans_like_a_checkpoint(name: str, expected: str) -> None:
    source = like.Template(Plan.of({"plans_name": name}), Configuration("", {}), {})
    assert source.plans_name == expected


@pytest.mark.parametrize(
    ("channel", "modality", "scheme"),
    [("CT", None, WINDOW), ("MRI", None, "ZScoreNormalization"), ("image", "PET", WINDOW)],
)
def test_a_dataset_gets_the_normalisation_of_its_modality(
    tmp_path: Path, channel: str, modality: str | None, scheme: str
) -> None:
    """The plan is stock nnU-Net's: CT has the corpus' window, PET, which the corpus did not have, its own."""
    source = corpus_plan(tmp_path, HIPPOCAMPUS)
    window = {"mean": 0, "std": 300, "percentile_00_5": -900, "percentile_99_5": 900}
    source["mfm"]["modalities"] = {
        "ct": {"scheme": WINDOW, "intensities": {"0": window}},
        "mr": {"scheme": "ZScoreNormalization"},
    }
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")
    result = plan_like(tmp_path, HIPPOCAMPUS, file, channels=(channel,), modality=modality)
    assert result.plans["configurations"]["3d_fullres"]["normalization_schemes"] == [scheme]
    assert result.plans["mfm"]["modalities"] is None
    own = corpus_plan(tmp_path, HIPPOCAMPUS)["foreground_intensity_properties_per_channel"]["0"]["percentile_00_5"]
    intensities = result.plans["foreground_intensity_properties_per_channel"]["0"]
    assert intensities["percentile_00_5"] == (-900 if channel == "CT" else own)


def test_an_unknown_modality_needs_the_flag(tmp_path: Path) -> None:
    source = corpus_plan(tmp_path, HIPPOCAMPUS)
    source["mfm"]["modalities"] = {"mr": {"scheme": "ZScoreNormalization"}}
    file = pretrained_checkpoint(tmp_path / "a.pth", source, "3d_fullres")
    with pytest.raises(MFMError, match="--modality") as caught:
        plan_like(tmp_path, HIPPOCAMPUS, file, channels=("image",))
    assert caught.value.code == "E_CONFIG"
