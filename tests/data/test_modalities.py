"""Each kind of image is recognised and normalised by its own rule, from the corpus to stock nnU-Net's plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

import mfm_nnunet
from mfm_nnunet.errors import MFMError
from mfm_nnunet.modalities import kind_of, kind_of_channel, kind_of_folder
from mfm_nnunet.plan import Plan
from mfm_nnunet.plan_rules import plan_problem


def test_kinds() -> None:
    words = {
        "CT": "ct",
        "T1w": "mr",
        "chest X-ray": "xray",
        "PET": "pet",
        "PET/CT": "petct",
        "fundus": "fundus",
        "": "",
    }
    assert {word: kind_of(word) for word in words} == words
    assert [kind_of_channel(name) for name in ("MR T1", "CT", "channel0")] == ["mr", "ct", ""]
    assert [kind_of_folder(name) for name in ("x-ray", "MRI", "US", "ct_old", "Ultrasound")] == [
        *("xray", "mr", "us", "", "us")
    ]


def write(file: Path, seed: int, mean: float, deviation: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).normal(mean, deviation, (16, 18, 20)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file))


def plan(folder: Path, number: int = 701, **options: Any) -> Path:
    (result,) = mfm_nnunet.plan_and_preprocess([number], workspace=folder / "ws", num_processes=1, **options)
    return result.file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(2):
        write(folder / f"scans/CT/c{number}.nii.gz", number, -200 + 600 * number, 50)
        write(folder / f"scans/MRI/m{number}.nii.gz", number, 1000 + 1000 * number, 100)
        write(folder / f"scans/PET/p{number}.nii.gz", number, 5 + number, 1)
    return plan(folder, images=folder / "scans").parents[3]


def test_each_kind_has_its_own_normalisation(corpus: Path) -> None:
    file = corpus / "ws/nnUNet_preprocessed/Dataset701_Corpus/mfmPlans.json"
    content = json.loads(file.read_text())
    rules = content["mfm"]["modalities"]
    assert {kind: rule["scheme"] for kind, rule in rules.items()} == {
        "ct": "CTNormalization",
        "mr": "ZScoreNormalization",
        "pet": "CTNormalization",
    }
    window = rules["ct"]["intensities"]["0"]
    assert window["percentile_00_5"] < -250
    assert window["percentile_99_5"] > 450
    data = file.parent / content["configurations"]["3d_fullres"]["data_identifier"]
    means = {file.stem: float(blosc2.open(str(file))[:].mean()) for file in data.glob("*.b2nd")}
    assert abs(means["m0"]) < 1e-4
    assert abs(means["m1"]) < 1e-4
    assert means["c0"] == pytest.approx(-means["c1"], abs=0.05)
    assert means["c0"] < -0.9


def test_a_plan_for_one_kind_is_stock(corpus: Path) -> None:
    mixed = Plan.read(corpus / "ws/nnUNet_preprocessed/Dataset701_Corpus/mfmPlans.json", "")
    own = mixed.for_modality("CT")
    assert own.configuration("3d_fullres").normalization_schemes == ("CTNormalization",)
    assert own.content["foreground_intensity_properties_per_channel"] == mixed.modalities["ct"]["intensities"]
    assert not own.modalities
    assert not plan_problem(own.content)
    assert mixed.for_modality("US").configuration("3d_fullres").normalization_schemes == ("ZScoreNormalization",)
    with pytest.raises(MFMError, match="--modality") as refused:
        mixed.for_modality("")
    assert refused.value.code == "E_CONFIG"


def test_an_unknown_modality_is_refused_until_it_is_given(tmp_path: Path) -> None:
    for number, name in enumerate(("CT/a", "MR/b", "other/c")):
        write(tmp_path / f"scans/{name}.nii.gz", number, 100, 20)
    with pytest.raises(MFMError, match=r"c\.nii\.gz.*--modality") as refused:
        plan(tmp_path, images=tmp_path / "scans")
    assert refused.value.code == "E_CONFIG"
    file = plan(tmp_path, images=tmp_path / "scans", modality="US", preprocess=False)
    assert set(json.loads(file.read_text())["mfm"]["modalities"]) == {"ct", "mr", "us"}
    entries = json.loads((tmp_path / "ws/nnUNet_raw/Dataset701_Corpus/corpus.json").read_text())["cases"]
    assert [entry["modality"] for entry in entries] == ["ct", "mr", "US"]


def test_damaged_tables_are_refused(corpus: Path) -> None:
    content = json.loads((corpus / "ws/nnUNet_preprocessed/Dataset701_Corpus/mfmPlans.json").read_text())
    for table in ([], {"ct": 3}, {"ct": {"scheme": "Mine"}}, {"ct": {"scheme": "CTNormalization", "intensities": {}}}):
        content["mfm"]["modalities"] = table
        assert "mfm.modalities" in plan_problem(content)


def test_the_report_names_each_kind_and_the_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("CT/a", "MR/b", "MR/c")):
        write(tmp_path / f"scans/{name}.nii.gz", number, 100, 20)
    (tmp_path / "scans/CT/broken.nii.gz").write_bytes((tmp_path / "scans/CT/a.nii.gz").read_bytes()[:400])
    with pytest.raises(MFMError, match="broken"):
        plan(tmp_path, images=tmp_path / "scans", preprocess=False)
    folder = tmp_path / "ws/nnUNet_preprocessed/Dataset701_Corpus"
    report = json.loads((folder / "corpus_report.json").read_text())
    assert {kind: own["images"] for kind, own in report["modalities"].items()} == {"ct": 1, "mr": 2}
    assert report["modalities"]["mr"]["size_voxels"]["median"] == [16, 18, 20]
    assert [refused["case"] for refused in report["refused"]] == ["broken"]
    assert (folder / "corpus_report.png").read_bytes().startswith(b"\x89PNG")
