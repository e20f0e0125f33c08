"""A foreign checkpoint, planned like, fine-tuned and used to predict, all through the API, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from mfm_nnunet import api, checkpoint
from mfm_nnunet.interchange import foreign as foreign_files
from mfm_nnunet.interchange.read import convert, read_checkpoint
from tests.builders import foreign, synthetic

NAME = f"Dataset{synthetic.NUMBER:03d}_Channels"
SETTINGS = (
    "finetune.epochs=1", "finetune.iterations_per_epoch=1", "finetune.validation_iterations=1", "num_workers=0",
)  # fmt: skip
CUBIC, FLAT = (16, 16, 16), (8, 16, 16)
QUICK = [("primus", 1, CUBIC)]


def write_dataset(workspace: Path, num_channels: int) -> None:
    """The synthetic balls with several channels."""
    folder = workspace / "nnUNet_raw" / NAME
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / part).mkdir(parents=True)
    for case in range(5):
        image, label = synthetic._voxels(np.random.default_rng(case), 1)
        place = "imagesTs" if case == 4 else "imagesTr"
        for channel in range(num_channels):
            synthetic._write(image + channel, folder / place / f"case_{case}_{channel:04d}.nii.gz")
        if case < 4:
            synthetic._write(label, folder / "labelsTr" / f"case_{case}.nii.gz")
    channels = {str(channel): "MRI" for channel in range(num_channels)}
    content = {"channel_names": channels, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, **synthetic.KINDS["classes"]}))


def foreign_file(family: str, patch: tuple[int, ...], folder: Path) -> Path:
    if family == "primus":
        network, name, trainer = foreign.primus(patch), "PrimusM", "SimMIMEvaTrainer"
        if patch == CUBIC:
            trainer = "BaseEvaMAETrainer"
    else:
        network, name, trainer = foreign.unet(), "ResEncL", "BaseMAETrainer"
    content = foreign.full(network.state_dict(), foreign.adaptation_plan(name, patch), trainer)
    return foreign.Released(content, network, patch).write(folder)


def count_readings(file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count from now on how often ``file`` is loaded and hashed."""
    counts = {"load": 0, "sha256": 0}

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(path: Any) -> Any:
            counts[name] += Path(path) == file
            return original(path)

        monkeypatch.setattr(module, name, counting)

    count(checkpoint, "load")
    count(foreign_files, "sha256")
    return counts


@pytest.mark.parametrize(
    ("family", "num_channels", "patch"),
    [
        pytest.param(family, channels, patch, marks=() if (family, channels, patch) in QUICK else pytest.mark.long)
        for family in ("resenc", "primus")
        for channels in (1, 3)
        for patch in (CUBIC, FLAT)
    ],
)
def test_from_a_foreign_file_to_masks(
    family: str, num_channels: int, patch: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path, num_channels)
    file = foreign_file(family, patch, tmp_path / "foreign")
    if num_channels == 3:  # imported first, else as it is
        convert(file, tmp_path / "imported.pth", "pth", licence="cc-by-4.0")
        file = tmp_path / "imported.pth"
    (planned,) = api.plan_and_preprocess([NAME], like=file, workspace=tmp_path, num_processes=1)
    assert planned.plans["configurations"]["3d_fullres"]["patch_size"] == list(patch)
    read = count_readings(file, monkeypatch)
    fold = api.train(
        NAME, "3d_fullres", "all", plans_name=planned.plans["plans_name"], pretrained_weights=file, settings=SETTINGS,
        workspace=tmp_path, device="cpu",
    )  # fmt: skip
    assert read == {"load": 1, "sha256": 1}, "large files take minutes to load, and to hash"
    report = json.loads((fold / "transfer.json").read_text())
    assert report["encoder_share"] == 1.0
    assert [entry["how"].partition(":")[0] for entry in report["adapted"]] == ["1 -> 3 input channels"] * (
        num_channels == 3
    )
    images = tmp_path / "nnUNet_raw" / NAME / "imagesTs"
    api.predict(images, tmp_path / "masks", model_folder=fold.parent, folds=["all"], device="cpu", workspace=tmp_path)
    mask = nibabel.load(tmp_path / "masks" / "case_4.nii.gz")
    image = nibabel.load(images / "case_4_0000.nii.gz")
    assert mask.shape == image.shape
    assert np.array_equal(mask.affine, image.affine)
    model = read_checkpoint(fold / "checkpoint_final.pth").mfm
    assert model["citations"] == foreign.CITATIONS
    assert model.get("licence") == ("cc-by-4.0" if num_channels == 3 else None)
    assert foreign.SUBJECT.encode() not in (fold / "checkpoint_final.pth").read_bytes()
