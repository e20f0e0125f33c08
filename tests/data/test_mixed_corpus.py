"""Real scans of two modalities from three datasets in one corpus, with masks, from a table to pretrained weights."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet import api
from mfm_nnunet.checkpoint import load
from mfm_nnunet.data.volumes import anatomy_of, mask_file

SOURCES = (
    ("Dataset004_Hippocampus", "T1w", 3),
    ("Dataset053_STSMR", "T1w", 2),
    ("Dataset052_STSCT", "CT", 2),
)
SPACING = (4.0, 4.0, 4.0)


def write_masks(image: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Anatomy: the brightest tenth of the voxels; anonymised: the first fifth of the slices."""
    item = sitk.ReadImage(str(image))
    array = sitk.GetArrayFromImage(item)
    anatomy = array >= np.percentile(array, 90)
    anonymised = np.zeros(array.shape, bool)
    anonymised[: max(1, len(array) // 5)] = True
    files = []
    for kind, mask in (("brain", anatomy), ("face", anonymised)):
        out = sitk.GetImageFromArray(mask.astype(np.uint8))
        out.CopyInformation(item)
        files.append(folder / f"{name}_{kind}.nii.gz")
        sitk.WriteImage(out, str(files[-1]))
    return files[0], files[1]


def make_table(shared_data: Path, folder: Path) -> Path:
    """A CSV of all scans; those of the first dataset have no masks. Patients of MR and CT are the same persons."""
    rows = []
    for dataset, modality, count in SOURCES:
        for image in sorted((shared_data / dataset / "imagesTr").glob("*.nii.gz"))[:count]:
            name = f"{modality}_{image.name[:-12]}"
            masks = ("", "") if "Hippo" in dataset else write_masks(image, folder, name)
            rows.append((name, image, modality, dataset, image.name[:-12], *masks))
    table = folder / "scans.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "image", "modality", "dataset", "subject", "anatomy_mask", "anonymisation_mask"))
        writer.writerows(rows)
    return table


def pretrain(workspace: Path, **changes: Any) -> Path:
    settings = (
        "pretrain.epochs=1",
        "pretrain.iterations_per_epoch=3",
        "pretrain.validation_iterations=1",
        "pretrain.warmup_epochs=0",
        "pretrain.balance_by=dataset,modality",
        "pretrain.balance_temperature=2",
        "pretrain.anatomy_fraction=0.5",
        "pretrain.validation_fraction=0.2",
        "num_workers=0",
    )
    return api.pretrain(701, "3d_fullres", settings=settings, device="cpu", workspace=workspace, **changes)


def test_a_mixed_corpus_from_a_table_to_weights(
    shared_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = make_table(shared_data, tmp_path)
    (plan,) = api.plan_and_preprocess(
        [701], images=table, name="Mixed", spacing=SPACING, num_processes=1, workspace=tmp_path / "ws"
    )
    assert plan.file.is_file()
    identifier = json.loads(plan.file.read_text())["configurations"]["3d_fullres"]["data_identifier"]
    folder = tmp_path / "ws" / "nnUNet_preprocessed" / "Dataset701_Mixed" / identifier
    volumes = sorted(folder.glob("*.b2nd"))
    assert len(volumes) == 7
    masked = [file for file in volumes if mask_file(folder, "anonymised", file.stem).exists()]
    assert len(masked) == 4
    for file in masked:
        volume = blosc2.open(str(file), mode="r")[:]
        hidden = blosc2.open(str(mask_file(folder, "anonymised", file.stem)), mode="r")[:]
        assert hidden.shape == volume.shape
        assert 0.05 < hidden.mean() < 0.35
        points = anatomy_of(str(file))
        # Anatomy is what is bright, in the preprocessed volume as well.
        assert volume[0][tuple(points.T)].mean() > np.percentile(volume, 80)
    with caplog.at_level(logging.INFO):
        checkpoint = pretrain(tmp_path / "ws")
    assert "balanced by dataset and modality, 3 groups: " in caplog.text
    assert "anonymised voxels of 4 cases are left out of the loss" in caplog.text
    assert "50% of the crops of 4 cases are centred on anatomy" in caplog.text
    content = load(checkpoint)
    # Patients that were scanned twice are one subject.
    assert content["mfm"]["corpus"]["num_cases"] == 7
    assert content["mfm"]["corpus"]["num_subjects"] == 5
    (row,) = [json.loads(line) for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert np.isfinite(row["train_loss"])
    assert b"STS_" not in checkpoint.read_bytes()

    # The run can be continued where only the preprocessed data are: subjects and modalities are known there too.
    shutil.rmtree(tmp_path / "ws" / "nnUNet_raw")
    for file in tmp_path.glob("*.nii.gz"):  # the masks; the scans are not ours to remove, and nothing refers to them
        file.unlink()
    checkpoint.unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert load(pretrain(tmp_path / "ws", continue_training=True))["mfm"]["corpus"] == content["mfm"]["corpus"]
    assert "continuing at step 3 of 3" in caplog.text
