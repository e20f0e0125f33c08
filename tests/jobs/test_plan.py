"""A corpus is registered, planned and preprocessed as what its source says it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import mfm_nnunet


@pytest.mark.parametrize(
    ("modalities", "scheme"), [(("CT", "ct"), "CTNormalization"), (("CT", "MR"), "ZScoreNormalization")]
)
def test_a_corpus_of_ct_alone_is_normalised_as_ct(tmp_path: Path, modalities: tuple[str, ...], scheme: str) -> None:
    with open(tmp_path / "scans.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "modality"))
        for number, modality in enumerate(modalities):
            voxels = np.random.default_rng(number).normal(-500, 300, (16, 18, 20)).astype(np.float32)
            sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / f"{number}.nii.gz"))
            writer.writerow((f"{number}.nii.gz", modality))
    (plan,) = mfm_nnunet.plan_and_preprocess(
        [701], images=tmp_path / "scans.csv", workspace=tmp_path / "ws", num_processes=1, preprocess=False
    )
    configuration = json.loads(plan.file.read_text())["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == [scheme]
