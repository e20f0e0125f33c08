"""A network of another package: one file and one entry, and every command works on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel
import small_network
import torch

from mfm_nnunet import api, checkpoint
from mfm_nnunet.interchange.read import read_checkpoint
from mfm_nnunet.models.families import Sizing, family_named, network_names
from mfm_nnunet.settings import block_of
from mfm_nnunet.workspace import use_only
from tests import PACKAGES
from tests.builders import synthetic
from tests.builders.tiny_plans import tiny_network

PAGE = Path(__file__).parents[2] / "documentation" / "how_to" / "add_a_network.md"
SHORT = ["epochs=1", "iterations_per_epoch=1", "validation_iterations=1"]


def test_the_page_shows_these_very_files() -> None:
    blocks = re.findall(r"^```(?:python|toml|ini)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert Path(small_network.__file__).read_text() in blocks
    (entry,) = [block for block in blocks if "mfm_nnunet.networks" in block]
    name, module = re.findall(r'^(\w+) = "?(\w+)"?$', entry, re.MULTILINE)[0]
    assert (
        f"[mfm_nnunet.networks]\n{name} = {module}\n"
        == next(PACKAGES.glob("small_network-*.dist-info/entry_points.txt")).read_text()
    )
    assert name in network_names()


def test_it_is_sized_for_a_budget() -> None:
    family = family_named("small")
    widths = []
    for memory_gb in (8.0, 0.1):
        sizing = Sizing("small", (60.0, 60.0, 60.0), (1.0, 1.0, 1.0), memory_gb, 1, 2, stock={})
        planned = family.plan_network(sizing)
        assert all(edge % 8 == 0 for edge in planned.patch_size)
        widths.append(planned.architecture["arch_kwargs"]["widths"])
    assert widths == [small_network.WIDTHS["large"], small_network.WIDTHS["small"]]


def test_from_plan_to_masks_and_back_from_a_foreign_file(tmp_path: Path) -> None:
    with use_only(tmp_path) as here:
        name = synthetic.write_dataset(here)
    (planned,) = api.plan_and_preprocess([name], network="small", configurations=["3d_fullres"], workspace=tmp_path)
    assert planned.file.name == "mfmSmallPlans.json"
    assert block_of(planned.plans).network == "small"
    assert any("small network of widths" in decision.value for decision in planned.decisions)

    pretrained = api.pretrain(
        name, "3d_fullres", plans_name="mfmSmallPlans", pretext="mae", device="cpu", workspace=tmp_path,
        settings=[f"pretrain.{item}" for item in SHORT] + ["num_workers=0"],
    )  # fmt: skip
    assert "small network of widths" in api.describe_checkpoint(pretrained, verify=True)
    (liked,) = api.plan_and_preprocess([name], like=pretrained, workspace=tmp_path)
    assert liked.file.name == "mfmLikeSmallPlans.json"

    fold = api.train(
        name, "3d_fullres", "all", plans_name="mfmLikeSmallPlans", pretrained_weights=pretrained, device="cpu",
        workspace=tmp_path, settings=[f"finetune.{item}" for item in SHORT] + ["num_workers=0"],
    )  # fmt: skip
    report = json.loads((fold / "transfer.json").read_text())
    assert report["encoder_share"] == 1.0
    assert {entry["name"] for entry in report["new"]} == {"head.weight", "head.bias"}

    images = here.raw / name / "imagesTr"
    api.predict(images, tmp_path / "masks", model_folder=fold.parent, folds=["all"], device="cpu", workspace=tmp_path)
    mask = next((tmp_path / "masks").glob("*.nii.gz"))
    assert nibabel.load(mask).shape == nibabel.load(images / mask.name.replace(".nii", "_0000.nii")).shape

    # Imported as a supervised model of nnU-Net, then exported as a folder for a hub.
    reading = read_checkpoint(fold / "checkpoint_final.pth")
    assert (reading.layout, reading.mfm["plans"]["mfm"]["network"]) == ("nnU-Net", "small")
    api.convert_checkpoint(fold / "checkpoint_final.pth", tmp_path / "hub", layout="folder")
    assert "small network of widths" in (tmp_path / "hub" / "README.md").read_text()
    again = read_checkpoint(tmp_path / "hub").content["network_weights"]
    own = checkpoint.load(fold / "checkpoint_final.pth")["network_weights"]
    assert all(torch.equal(again[key], own[key]) for key in own)


def test_adapters_and_layer_decay_are_refused_with_a_reason() -> None:
    family = family_named("small")
    assert family.adapted_layers(tiny_network("small", (16, 16, 16))) == []
    assert family.layer_decay_problem()
