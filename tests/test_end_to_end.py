"""The whole way through the four commands on real scans, as a user types them: 3D MR volumes and 2D X-rays.

Schedules are a few steps long: what is tested is that everything fits together, not how well it segments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

BIN = Path(sys.executable).parent
PRETRAIN = ("pretrain.epochs=2", "pretrain.iterations_per_epoch=3", "pretrain.validation_iterations=1")
FINETUNE = ("finetune.epochs=2", "finetune.iterations_per_epoch=4", "finetune.validation_iterations=1")


@dataclass(frozen=True)
class Site:
    """A workspace and a folder of test images."""

    folder: Path
    test_images: Path

    def run(self, command: str, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        line = [str(BIN / command), *map(str, words), "--workspace", str(self.folder)]
        done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False, timeout=280)
        assert done.returncode == expect, f"{' '.join(line)}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def model(self, dataset: str, plans: str, configuration: str = "3d_fullres") -> Path:
        return self.folder / "nnUNet_results" / dataset / f"MFMTrainer__{plans}__{configuration}"


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


def write_dataset(site: Site, name: str, source: Path, cases: list[str]) -> None:
    """A labelled dataset that refers to the scans where they are."""
    content = json.loads((source / "dataset.json").read_text())
    ending = content["file_ending"]
    content["numTraining"] = len(cases)
    content["dataset"] = {
        case: {
            "images": [str(source / "imagesTr" / f"{case}_0000{ending}")],
            "label": str(source / "labelsTr" / f"{case}{ending}"),
        }
        for case in cases
    }
    folder = site.folder / "nnUNet_raw" / name
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(content))


def link(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file)


@pytest.fixture(scope="module")
def volumes(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Hippocampus MR: eight scans as corpus, six labelled, three to test; planned, pretrained, planned to fit."""
    source = shared_data / "Dataset004_Hippocampus"
    images = sorted((source / "imagesTr").glob("*.nii.gz"))
    root = tmp_path_factory.mktemp("volumes")
    site = Site(root / "workspace", root / "test")
    link(images[:8], root / "scans")
    link(images[20:23], site.test_images)
    write_dataset(site, "Dataset004_Few", source, [file.name[: -len("_0000.nii.gz")] for file in images[10:16]])
    done = site.run("mfm_plan_and_preprocess", "-d", 701, "--images", root / "scans", "--name", "Scans")
    assert "patch" in done.stderr
    assert "million" in done.stderr or " M " in done.stderr
    site.run("mfm_pretrain", 701, "3d_fullres", "--set", *PRETRAIN)
    site.run("mfm_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "--like", pretrained(site), "-pl", "mfmLike")
    return site


def pretrained(site: Site) -> Path:
    run = "mfm_pretrain__mae__mfmPlans__3d_fullres"
    return site.folder / "nnUNet_results" / "Dataset701_Scans" / run / "checkpoint_final.pth"


@pytest.fixture(scope="module")
def model(volumes: Site) -> Path:
    """A model fine-tuned from MAE."""
    weights = pretrained(volumes)
    done = volumes.run(
        "mfm_train", 4, "3d_fullres", 0, "-p", "mfmLike", "-pretrained_weights", weights, "--set", *FINETUNE
    )
    assert "loaded" in done.stdout + done.stderr
    return volumes.model("Dataset004_Few", "mfmLike")


def test_transfer_is_reported_by_name(model: Path) -> None:
    report = json.loads((model / "fold_0" / "transfer.json").read_text())
    assert report["encoder_share"] == 1.0
    new = [entry["name"] for entry in report["new"]]
    assert new
    assert all("seg_layers" in name for name in new)


def test_checkpoint_is_plain_and_private(model: Path, volumes: Site) -> None:
    for file in (model / "fold_0" / "checkpoint_final.pth", pretrained(volumes)):
        torch.load(file, weights_only=True)
        content = file.read_bytes()
        assert b"hippocampus_" not in content
        assert str(volumes.folder).encode() not in content


def test_predict_agrees_with_stock_and_keeps_geometry(model: Path, volumes: Site, tmp_path: Path) -> None:
    ours, stock = tmp_path / "ours", tmp_path / "stock"
    volumes.run("mfm_predict", "-i", volumes.test_images, "-o", ours, "-m", model, "-f", 0)
    from mfm_nnunet.workspace import use

    with use(volumes.folder):
        variables = environment()
    command = [
        BIN / "nnUNetv2_predict_from_modelfolder", "-i", volumes.test_images, "-o", stock, "-m", model, "-f", "0",
        "-device", "cpu", "-npp", "1", "-nps", "1",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(file.name for file in ours.glob("*.nii.gz"))
    assert len(names) == 3
    for name in names:
        mask, reference = nibabel.load(ours / name), nibabel.load(stock / name)
        assert np.array_equal(np.asarray(mask.dataobj), np.asarray(reference.dataobj))
        source = nibabel.load(volumes.test_images / name.replace(".nii.gz", "_0000.nii.gz"))
        for field in ("srow_x", "srow_y", "srow_z", "qform_code", "sform_code", "pixdim", "quatern_b", "qoffset_x"):
            assert np.array_equal(mask.header[field], source.header[field]), field


@pytest.mark.long
@pytest.mark.timeout(900)
def test_scratch_on_primus(volumes: Site) -> None:
    """The other network family through the same commands, pretrained, fine-tuned and predicted."""
    volumes.run("mfm_plan_and_preprocess", "-d", 701, "-c", "3d_fullres", "--network", "primus")
    done = volumes.run("mfm_pretrain", 701, "3d_fullres", "-p", "mfmPrimusPlans", "--set", *PRETRAIN)
    weights = done.stdout.splitlines()[-1]
    volumes.run("mfm_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "--like", weights, "-pl", "mfmLikePrimus")
    volumes.run(
        "mfm_train", 4, "3d_fullres", 0, "-p", "mfmLikePrimus", "-pretrained_weights", weights, "--set", *FINETUNE
    )
    folder = volumes.model("Dataset004_Few", "mfmLikePrimus")
    report = json.loads((folder / "fold_0" / "transfer.json").read_text())
    assert report["encoder_share"] == 1.0
    assert any(entry["name"].startswith("up_projection") for entry in report["loaded"])
    volumes.run("mfm_predict", "-i", volumes.test_images, "-o", volumes.folder / "primus_masks", "-m", folder, "-f", 0,
                "--disable_tta")  # fmt: skip
    assert len(list((volumes.folder / "primus_masks").glob("*.nii.gz"))) == 3


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_dimensional_pictures(shared_data: Path, tmp_path: Path) -> None:
    """Chest X-rays: unlabelled PNG files as corpus, labelled ones to fine-tune, masks as PNG of the same size."""
    source = shared_data / "Dataset057_CXRLung"
    images = sorted((source / "imagesTr").glob("*.png"))
    site = Site(tmp_path / "workspace", tmp_path / "test")
    link(sorted((shared_data / "unlabelled" / "XRAY").glob("*.png"))[:8], tmp_path / "scans")
    link(images[8:10], site.test_images)
    write_dataset(site, "Dataset057_Few", source, [file.name[: -len("_0000.png")] for file in images[:6]])
    site.run("mfm_plan_and_preprocess", "-d", 702, "--images", tmp_path / "scans", "--name", "Xrays")
    for task in ("volume_fusion", "mae"):
        done = site.run("mfm_pretrain", "-d", 702, "-c", "2d", "--pretext", task, "--set", *PRETRAIN)
    weights = done.stdout.splitlines()[-1]
    site.run("mfm_plan_and_preprocess", "-d", 57, "-c", "2d", "--like", weights, "-pl", "mfmLike")
    site.run("mfm_train", "-d", 57, "-c", "2d", "-f", 0, "-p", "mfmLike", "-pretrained_weights", weights, "--set",
             *FINETUNE)  # fmt: skip
    site.run("mfm_predict", "-i", site.test_images, "-o", tmp_path / "out", "-d", 57, "-c", "2d", "-p", "mfmLike",
             "-f", 0)  # fmt: skip
    from PIL import Image

    for mask in (tmp_path / "out").glob("*.png"):
        with Image.open(mask) as one, Image.open(site.test_images / f"{mask.stem}_0000.png") as other:
            assert one.size == other.size
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
