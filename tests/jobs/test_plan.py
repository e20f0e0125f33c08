"""A corpus is registered, planned and preprocessed as what its source says it is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

import mfm_nnunet
from mfm_nnunet.errors import MFMError
from tests.builders.preprocessing import make_dataset, make_plans, run


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


def corpus(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for number in range(count):
        voxels = np.random.default_rng(number).normal(size=(16, 18, 20 + number)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(folder / f"scan{number}.nii.gz"))
    return folder


def files_of(workspace: Path) -> dict[str, bytes]:
    """The preprocessed arrays and properties, by name."""
    found = (workspace / "nnUNet_preprocessed").rglob("*")
    return {file.name: file.read_bytes() for file in found if file.suffix in (".b2nd", ".pkl")}


def test_commands_that_share_the_cases_do_what_one_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scans = corpus(tmp_path / "scans")
    (whole,) = mfm_nnunet.plan_and_preprocess([701], images=scans, workspace=tmp_path / "whole", num_processes=1)
    shared: dict[str, Any] = {"workspace": tmp_path / "shared", "num_processes": 1}
    (planned,) = mfm_nnunet.plan_and_preprocess([701], images=scans, preprocess=False, **shared)
    before = planned.file.read_bytes()
    with caplog.at_level("INFO"):
        for part in (2, 0):
            (result,) = mfm_nnunet.plan_and_preprocess([701], num_parts=3, part_id=part, **shared)
            assert result.plans == whole.plans
    assert (
        caplog.text.count("1 cases preprocessed, 0 reused") + caplog.text.count("2 cases preprocessed, 0 reused") == 2
    )
    caplog.clear()
    with caplog.at_level("INFO"):  # part 1 was lost: it is done alone, or by a command for all
        mfm_nnunet.plan_and_preprocess([701], num_parts=3, part_id=0, **shared)
        assert "0 cases preprocessed, 2 reused" in caplog.text
        mfm_nnunet.plan_and_preprocess([701], **shared)
        assert "2 cases preprocessed, 3 reused" in caplog.text
    assert planned.file.read_bytes() == before
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "whole")


def test_parts_need_a_plan_that_fits(tmp_path: Path) -> None:
    scans = corpus(tmp_path / "scans", 2)
    for options in ({"images": scans}, {"preprocess": False}):
        with pytest.raises(MFMError, match=r"E_CONFIG.*Plan once, with --no_pp"):
            mfm_nnunet.plan_and_preprocess([701], num_parts=2, workspace=tmp_path / "ws", **options)
    with pytest.raises(MFMError, match=r"E_CONFIG.*parts are numbered from 0"):
        mfm_nnunet.plan_and_preprocess([701], num_parts=2, part_id=2, workspace=tmp_path / "ws")
    (plan,) = mfm_nnunet.plan_and_preprocess([701], images=scans, preprocess=False, workspace=tmp_path / "ws")
    fingerprint = plan.file.with_name("dataset_fingerprint.json")
    fingerprint.rename(tmp_path / "away.json")
    with pytest.raises(MFMError, match=r"E_NOT_FOUND.*was not planned.*-d 701 --no_pp"):
        mfm_nnunet.plan_and_preprocess([701], num_parts=2, workspace=tmp_path / "ws")
    (tmp_path / "away.json").rename(fingerprint)
    voxels = sitk.GetImageFromArray(np.random.default_rng(9).normal(size=(16, 18, 30)).astype(np.float32))
    sitk.WriteImage(voxels, str(scans / "scan1.nii.gz"))
    with pytest.raises(MFMError, match=r"E_NOT_FOUND.*has changed since"):
        mfm_nnunet.plan_and_preprocess([701], num_parts=2, workspace=tmp_path / "ws")


def test_the_newest_record_of_a_case_counts(tmp_path: Path) -> None:
    cases, out = make_dataset(tmp_path / "raw", 3), tmp_path / "out"
    other = make_plans(spacing=[1.1, 1.0, 1.0])
    run(cases, out)
    for part in (0, 1):
        run(cases, out, other, part=(part, 2))
    assert run(cases, out, other).reused == ["case0", "case1", "case2"]
    assert run(cases, out, part=(0, 2)).done == ["case0", "case2"]
    assert run(cases, out, other).done == ["case0", "case2"]
