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
from mfm_nnunet.data.volumes import mask_file

SOURCES = (
    ("Dataset004_Hippocampus", "T1w", 3),
    ("Dataset053_STSMR", "T1w", 2),
    ("Dataset052_STSCT", "CT", 2),
)
SPACING = (4.0, 4.0, 4.0)


def write_mask(image: Path, file: Path) -> Path:
    """Write a mask of the first fifth of the slices."""
    item = sitk.ReadImage(str(image))
    mask = np.zeros(item.GetSize()[::-1], np.uint8)
    mask[: max(1, len(mask) // 5)] = 1
    out = sitk.GetImageFromArray(mask)
    out.CopyInformation(item)
    sitk.WriteImage(out, str(file))
    return file


def make_table(shared_data: Path, folder: Path) -> Path:
    """A CSV of all scans; those of the first dataset have no masks. Patients of MR and CT are the same persons."""
    rows = []
    for dataset, modality, count in SOURCES:
        for image in sorted((shared_data / dataset / "imagesTr").glob("*.nii.gz"))[:count]:
            name = f"{modality}_{image.name[:-12]}"
            mask = "" if "Hippo" in dataset else write_mask(image, folder / f"{name}_face.nii.gz")
            rows.append((name, image, modality, dataset, image.name[:-12], mask))
    table = folder / "scans.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("case", "image", "modality", "dataset", "subject", "anonymisation_mask"))
        writer.writerows(rows)
    return table


def pretrain(workspace: Path, **changes: Any) -> Path:
    settings = (
        "pretrain.epochs=1",
        "pretrain.iterations_per_epoch=3",
        "pretrain.validation_iterations=1",
        "pretrain.warmup_epochs=0",
        "pretrain.balance_by=dataset,modality",
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
    masked = [file for file in volumes if mask_file(folder, file.stem).exists()]
    assert len(masked) == 4
    for file in masked:
        volume = blosc2.open(str(file), mode="r")[:]
        hidden = blosc2.open(str(mask_file(folder, file.stem)), mode="r")[:]
        assert hidden.shape == volume.shape
        assert 0.05 < hidden.mean() < 0.35
    with caplog.at_level(logging.INFO):
        checkpoint = pretrain(tmp_path / "ws")
    assert "balanced by dataset and modality, 3 groups: " in caplog.text
    assert "anonymised voxels of 4 cases are left out of the loss" in caplog.text
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
