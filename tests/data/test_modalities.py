"""Each kind of image is recognised and normalised by its own rule, from the corpus to stock nnU-Net's plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import mfm_nnunet
from mfm_nnunet.data.storage import Manifest
from mfm_nnunet.data.unlabelled import Labelled, _test_volumes
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.modalities import kind_of, kind_of_channel, kind_of_folder
from mfm_nnunet.plan import Plan
from mfm_nnunet.plan_rules import plan_problem
from mfm_nnunet.workspace import use
from tests.builders import unions
from tests.builders.architectures import resenc
from tests.builders.site import edit_json
from tests.builders.unions import SETTINGS


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


def pet_plan(folder: Path, *units: float, **options: Any) -> dict[str, Any]:
    for number, unit in enumerate(units):
        write(folder / f"scans/PET/p{number}.nii.gz", number, 5 * unit, unit)
    return dict(json.loads(plan(folder, images=folder / "scans", modality="PET", **options).read_text()))


def test_pet_in_other_units_is_normalised_by_percentiles_of_each_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        content = pet_plan(tmp_path, 900, 5000)
    assert content["mfm"]["modalities"] == {"pet": {"scheme": "PercentileNormalization"}}
    assert "no common scale such as SUV" in caplog.text
    assert not plan_problem(content)
    one = PlansManager(dict(Plan.of(content).for_modality("pet").content)).get_configuration("3d_fullres")
    with pytest.raises(RuntimeError, match="PercentileNormalization"):  # stock stops, and uses no other rule
        DefaultPreprocessor()._normalize(np.ones((1, 2, 2, 2)), np.ones((1, 2, 2, 2)), one, {"0": {}})
    identifier = content["configurations"]["3d_fullres"]["data_identifier"]
    data = tmp_path / "ws/nnUNet_preprocessed/Dataset701_Corpus" / identifier
    for number in range(2):
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"scans/PET/p{number}.nii.gz")))
        clipped = np.clip(voxels, *np.percentile(voxels, (0.5, 99.5)))
        expected = (clipped - clipped.mean()) / clipped.std()
        stored = blosc2.open(str(data / f"p{number}.b2nd"))[:][0]
        np.testing.assert_allclose(np.sort(stored, axis=None), np.sort(expected, axis=None), atol=1e-3)


def test_the_scale_of_pet_is_found_or_given(tmp_path: Path) -> None:
    assert pet_plan(tmp_path / "a", 1, 1.5, preprocess=False)["mfm"]["modalities"]["pet"]["scheme"] == "CTNormalization"
    mixed = pet_plan(tmp_path / "b", 1, 1.5, preprocess=False, pet="percentile")
    assert mixed["mfm"]["modalities"]["pet"]["scheme"] == "PercentileNormalization"
    window = pet_plan(tmp_path / "c", 900, preprocess=False, pet="suv")["mfm"]["modalities"]["pet"]
    assert window["intensities"]["0"]["percentile_99_5"] > 4500
    write(tmp_path / "d/scans/MR/m.nii.gz", 1, 100, 20)
    with pytest.raises(MFMError, match=r"--pet suv.*--modality PET"):
        plan(tmp_path / "d", images=tmp_path / "d/scans", preprocess=False, pet="suv")


def mixed_dataset(root: Path, kinds: list[str], number: int = 4) -> Path:
    folder = unions.write_dataset(root, number, channel="image", names="p")
    rows = [f"p{case},p{case},{kind}" for case, kind in enumerate(kinds)]
    (folder / "subjects.csv").write_text("case,subject,modality\n" + "\n".join(rows) + "\n")
    return folder


def plan_labelled(root: Path, **options: Any) -> Path:
    (result,) = mfm_nnunet.plan_and_preprocess(
        [4], configurations=["3d_fullres"], workspace=root, num_processes=1, **options
    )
    return result.file


def test_a_labelled_dataset_of_several_modalities(tmp_path: Path) -> None:
    """Each case is normalised as its kind, from planning to the mask; prediction needs to know the kind."""
    folder = mixed_dataset(tmp_path, ["CT", "MR", "PET", "T1w", "CT"])
    file = plan_labelled(tmp_path, pet="percentile")

    def shrink(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"] |= {"architecture": resenc(), "patch_size": [16, 16, 16]}

    edit_json(file, shrink)
    content = json.loads(file.read_text())
    rules = {kind: rule["scheme"] for kind, rule in content["mfm"]["modalities"].items()}
    assert rules == {"ct": "CTNormalization", "mr": "ZScoreNormalization", "pet": "PercentileNormalization"}
    data = file.parent / content["configurations"]["3d_fullres"]["data_identifier"]
    means = {name: float(blosc2.open(str(data / f"p{name}.b2nd"))[:].mean()) for name in range(5)}
    assert abs(means[1]) < 1e-4
    assert abs(means[0]) > 0.1, "the window of the CT is that of its organs, which are brighter"
    run = mfm_nnunet.train(4, "3d_fullres", 0, settings=SETTINGS, workspace=tmp_path, device="cpu")
    images, model = folder / "imagesTr", run.parent
    with pytest.raises(MFMError, match=r"--modality: ct or mr or pet") as refused:
        mfm_nnunet.predict(images, tmp_path / "no", model_folder=model, device="cpu")
    assert refused.value.code == "E_CONFIG"
    with pytest.raises(MFMError, match=r"--modality US: this model normalises by ct, mr, pet"):
        mfm_nnunet.predict(images, tmp_path / "no", model_folder=model, device="cpu", modality="US")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "p2_0000.nii.gz").symlink_to(images / "p2_0000.nii.gz")
    mfm_nnunet.predict(tmp_path / "one", tmp_path / "out", model_folder=model, device="cpu", modality="PET")
    plans = json.loads((tmp_path / "out" / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["PercentileNormalization"]
    settings = json.loads((tmp_path / "out" / "predict_from_raw_data_args.json").read_text())["settings"]
    assert settings["modality"] == "pet"
    with pytest.raises(MFMError, match="one modality"):
        mfm_nnunet.run_study(4, "3d_fullres", labels=[2], arms=["scratch"], workspace=tmp_path, device="cpu")


def test_a_corrected_modality_makes_its_case_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mixed_dataset(tmp_path, ["CT", "MR", "CT", "MR", "CT"])
    file = plan_labelled(tmp_path)
    mixed_dataset(tmp_path, ["CT", "MR", "CT", "MR", "CT"])
    folder = tmp_path / "nnUNet_raw/Dataset004_Some"
    table = folder / "subjects.csv"
    plan_labelled(tmp_path)
    table.write_text(table.read_text().replace("p1,p1,MR", "p1,p1,T2w"))
    with caplog.at_level("INFO"):
        plan_labelled(tmp_path)
    assert "0 cases preprocessed, 5 reused" in caplog.text, "another word for the same kind"
    table.write_text(table.read_text().replace("p1,p1,T2w", "p1,p1,US"))
    caplog.clear()
    with caplog.at_level("INFO"):
        plan_labelled(tmp_path)
    identifier = json.loads(file.read_text())["configurations"]["3d_fullres"]["data_identifier"]
    sources = Manifest.read(file.parent / identifier).entries["p1"]["sources"]
    assert sources[-1] == [0, 0, "modality us"]


def test_modalities_of_labelled_cases_are_refused_by_name(tmp_path: Path) -> None:
    mixed_dataset(tmp_path, ["CT", "MR", "", "MR", "CT"])
    with pytest.raises(MFMError, match=r"case p2 has no modality.*subjects\.csv") as refused:
        plan_labelled(tmp_path)
    assert refused.value.code == "E_CONFIG"
    mixed_dataset(tmp_path, ["CT", "MR", "CT", "MR", "CT"])
    with pytest.raises(MFMError, match="--modality: each case"):
        plan_labelled(tmp_path, modality="CT")
    unions.write_dataset(tmp_path, 53)
    with pytest.raises(MFMError, match="several modalities"):
        mfm_nnunet.plan_and_preprocess([900], universal=[4, 53], workspace=tmp_path)
    mixed_dataset(tmp_path, ["MR", "US", "MR", "US", "MR"])
    assert not json.loads(plan_labelled(tmp_path).read_text())["mfm"].get("modalities"), "all are normalised one by one"


def test_test_images_of_unknown_modality_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No mask, no row of subjects.csv: they cannot be normalised, so nobody knows if a corpus holds them."""
    folder = mixed_dataset(tmp_path, ["CT", "MR", "CT", "MR", "CT"])
    file = plan_labelled(tmp_path, preprocess=False)
    (folder / "imagesTs").mkdir()
    (folder / "imagesTs" / "t_0000.nii.gz").symlink_to(folder / "imagesTr" / "p0_0000.nii.gz")
    dataset = DatasetJson.read(folder / "dataset.json", "")
    with use(tmp_path) as here:
        assert not _test_volumes(here, Labelled(Plan.read(file, ""), "3d_fullres", dataset, [], [], []))
    assert "1 of 1 test images are not compared" in caplog.text
    assert "modality" in caplog.text


def test_one_model_takes_the_modality_only_if_it_needs_it(tmp_path: Path) -> None:
    folder = unions.write_dataset(tmp_path, 4)
    edit_json(
        plan_labelled(tmp_path),
        lambda plans: plans["configurations"]["3d_fullres"].update(architecture=resenc(), patch_size=[16, 16, 16]),
    )
    run = mfm_nnunet.train(4, "3d_fullres", 0, settings=SETTINGS, workspace=tmp_path, device="cpu")
    with pytest.raises(MFMError, match=r"--modality MR.*leave it out"):
        mfm_nnunet.predict(folder / "imagesTr", tmp_path / "o", model_folder=run.parent, device="cpu", modality="MR")
