"""Folders of images and masks, tables and DICOM become datasets that plan and preprocess, in place where possible."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.data.corpus import load_cases
from mfm_nnunet.errors import CasesFailedError, MFMError
from mfm_nnunet.jobs.plan import plan_and_preprocess
from tests.builders import dicom
from tests.builders.corpora import refusal


def plan(root: Path, images: Path, **options: Any) -> Path:
    """Register and preprocess a dataset; return its raw folder."""
    options = {
        "num_processes": 1,
        "memory_gb": 1.0,
        "configurations": ["3d_fullres"],
        "workspace": root / "w",
        "images": images,
        **options,
    }
    plan_and_preprocess([61], **options)
    (folder,) = (root / "w" / "nnUNet_raw").iterdir()
    return folder


def volume(file: Path, seed: int = 0, value: int = 0) -> Path:
    """A scan, or with ``value`` a mask of one box."""
    rng = np.random.default_rng(seed)
    voxels = rng.normal(100, 20, (12, 16, 16)).astype(np.float32)
    if value:
        voxels = np.zeros(voxels.shape, np.uint8)
        voxels[3:9, 4:12, 2 + seed : 9] = value
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.5, 2.0))
    image.SetOrigin((5.0, -3.0, 2.0))
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


def test_plain_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Formats and endings may differ; masks of 0 and 255 are written anew, nothing else is copied."""
    for seed, (scan, mask) in enumerate([("a_0000.nii.gz", "a_seg.nrrd"), ("b_0000.nrrd", "b.mha")]):
        volume(tmp_path / "CT" / scan, seed)
        volume(tmp_path / "masks" / mask, seed, 255)
    with caplog.at_level("INFO"):
        folder = plan(tmp_path, tmp_path / "CT", labels=tmp_path / "masks", label_names=["255=liver"])
    content = json.loads((folder / "dataset.json").read_text())
    assert folder.name == "Dataset061_Labelled"
    assert (content["labels"], content["channel_names"]) == ({"background": 0, "liver": 1}, {"0": "CT"})
    assert content["dataset"]["a"]["images"] == [str(tmp_path / "CT" / "a_0000.nii.gz")]
    assert content["dataset"]["a"]["label"] == "labelsTr/a.nrrd"
    assert sorted(path.name for path in folder.rglob("*")) == ["a.nrrd", "b.mha", "dataset.json", "labelsTr"]
    for name, file in (("a", "a_seg.nrrd"), ("b", "b.mha")):
        old, new = (
            sitk.ReadImage(str(f)) for f in (tmp_path / "masks" / file, folder / content["dataset"][name]["label"])
        )
        assert np.array_equal(sitk.GetArrayFromImage(old) // 255, sitk.GetArrayFromImage(new))
        assert (old.GetOrigin(), old.GetSpacing()) == (new.GetOrigin(), new.GetSpacing())
    assert "255 -> 1" in caplog.text
    assert len(list((tmp_path / "w" / "nnUNet_preprocessed").rglob("[ab]_seg.b2nd"))) == 2
    refusal("E_EXISTS", plan, tmp_path, tmp_path / "CT")
    plan(tmp_path, tmp_path / "CT", labels=tmp_path / "masks")
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "label_1": 1}


def test_masks_on_another_grid(tmp_path: Path) -> None:
    volume(tmp_path / "images" / "a.nii.gz")
    volume(tmp_path / "images" / "b.nii.gz")
    volume(tmp_path / "masks" / "a.nii.gz", value=1)
    image = sitk.ReadImage(str(volume(tmp_path / "masks" / "b.nii.gz", value=1)))
    sitk.WriteImage(image[1:], str(tmp_path / "masks" / "b.nii.gz"))
    with pytest.raises(MFMError, match=r"(?s)E_LABEL_GEOMETRY.*b: "):
        plan(tmp_path, tmp_path / "images", labels=tmp_path / "masks")
    image.SetOrigin((9.0, -3.0, 2.0))
    sitk.WriteImage(image, str(tmp_path / "masks" / "b.nii.gz"))
    with pytest.raises(MFMError, match=r"(?s)E_LABEL_GEOMETRY.*origin"):
        plan(tmp_path, tmp_path / "images", labels=tmp_path / "masks")


def test_a_table(tmp_path: Path) -> None:
    """With subjects and modalities as of a corpus; classes in a column 'label' are no masks."""
    rows = ["image;label;case;subject;modality"]
    for number in range(2):
        volume(tmp_path / f"x{number}.nii.gz", number)
        volume(tmp_path / f"y{number}.nii.gz", number, 1)
        rows.append(f"x{number}.nii.gz;y{number}.nii.gz;c{number};anna;CT")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    folder = plan(tmp_path, tmp_path / "t.csv", preprocess=False)
    assert [(case.name, case.subject, case.modality) for case in load_cases(folder)] == [
        ("c0", "anna", "CT"),
        ("c1", "anna", "CT"),
    ]
    (tmp_path / "t.csv").write_text("\n".join([*rows, "x0.nii.gz;;d;bert;CT"]))
    with pytest.raises(MFMError, match=r"(?s)E_NOT_FOUND.*label is empty"):
        plan(tmp_path, tmp_path / "t.csv")


@pytest.mark.parametrize("options", [{"slices": []}, {"colour": "grey"}])
def test_options_of_corpora(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MFMError, match="E_CONFIG"):
        plan(tmp_path, tmp_path, labels=tmp_path, **options)


# DICOM


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two patients with a CT each, and a series with a gap."""
    pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
    root = tmp_path / "export"
    for number in (1, 2):
        series = dicom.slices(dicom.phantom((14, 24, 20), number), study=number, patient=f"MRN{number}")
        dicom.write(root / f"DOE^JOHN{number}", series)
    gap = dicom.slices(dicom.phantom((14, 24, 20)), study=3, patient="MRN3")
    dicom.write(root / "gap", [*gap[:5], *gap[7:]])
    return root


def texts_of(folder: Path) -> str:
    return "".join(file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("packed", [False, True])
def test_a_corpus_of_series(packed: bool, tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two series are planned and preprocessed, one is refused by name; no person is named in any file."""
    source = tree
    if packed:
        source = tmp_path / "x.zip"
        with zipfile.ZipFile(source, "w") as content:
            for file in (file for file in tree.rglob("*") if file.is_file()):
                content.write(file, str(file.relative_to(tree)))
    with caplog.at_level("INFO"), pytest.raises(CasesFailedError) as caught:
        plan(tmp_path, source)
    assert [failure.code for failure in caught.value.failures] == ["E_DICOM_MISSING_SLICE"]
    (folder,) = (tmp_path / "w" / "nnUNet_raw").iterdir()
    assert json.loads((folder / "dataset.json").read_text())["channel_names"] == {"0": "CT"}
    cases = load_cases(folder)
    assert [case.modality for case in cases] == ["CT", "CT"]
    assert len({case.subject for case in cases}) == 2
    assert len(list((tmp_path / "w" / "nnUNet_preprocessed").rglob("ct_*.b2nd"))) == 2
    everything = texts_of(tmp_path / "w") + caplog.text + str(caught.value)
    assert not [word for word in ("DOE", "JOHN", "MRN", "WHO^", "ACC77") if word in everything]
    before = {case.images[0]: case.images[0].stat().st_mtime_ns for case in cases}
    with pytest.raises(CasesFailedError):
        plan(tmp_path, source)
    assert {case.images[0]: case.images[0].stat().st_mtime_ns for case in load_cases(folder)} == before


def test_masks_of_series(tree: Path, tmp_path: Path) -> None:
    """A mask is called after the folder of its series, or after the series; patients stay together."""
    refusal("E_DICOM_MISSING_SLICE", lambda: plan(tmp_path, tree, labels=tree))
    for file in (tree / "gap").iterdir():
        file.unlink()
    (tmp_path / "masks").mkdir()
    refusal("E_NOT_FOUND", lambda: plan(tmp_path, tree, labels=tmp_path / "masks"))
    for number in (1, 2):
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tree / f"DOE^JOHN{number}"))
        mask = sitk.ReadImage(names) > 0
        sitk.WriteImage(mask, str(tmp_path / "masks" / f"doe^john{number}_seg.nii.gz"))
    folder = plan(tmp_path, tree, labels=tmp_path / "masks", label_names=["1=liver"])
    assert (folder / "imagesTr").is_dir()
    cases = load_cases(folder)
    assert [case.name[:3] for case in cases] == ["ct_", "ct_"]
    assert not [word for word in ("DOE", "doe^", "MRN") if word in (folder / "dataset.json").read_text()]
    image, label = (nibabel.load(file) for file in (cases[0].images[0], cases[0].label))
    assert np.array_equal(image.get_fdata() > 0, label.get_fdata() > 0)
    refusal("E_NOT_FOUND", lambda: plan(tmp_path, tree, labels=tmp_path / "masks", series=["MR"]))
