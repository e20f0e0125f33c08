"""DICOM series in folders and archives: found by content, named without a name, chosen and converted."""

from __future__ import annotations

import copy
import csv
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.data import dicom as module
from mfm_nnunet.data.dicom import convert_series, find_series, require_choice, write_key
from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import decoder
from tests.builders import dicom

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A patient with a CT, a PET, a localizer and a report; another with a CT. Names of folders are names of people."""
    root = tmp_path / "export"
    dicom.write(root / dicom.PATIENT / "a", dicom.slices(dicom.phantom(), study=1, series="ct"))
    pet = dicom.slices(np.abs(dicom.phantom()), study=1, series="pet", modality="PT", sop_class=dicom.PET, intercept=0)
    dicom.as_pet(pet)
    dicom.write(root / dicom.PATIENT / "a", pet, ".pet")
    scout = dicom.slices(dicom.phantom((1, 9, 9)), study=1, series="scout")
    scout[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dicom.write(root / dicom.PATIENT / "scout", scout)
    report = dicom.slices(dicom.phantom((1, 9, 9)), study=1, series="sr", modality="SR")
    dicom.write(root / dicom.PATIENT / "report", report, ".dcm")
    dicom.write(root / "ROE^JANE", dicom.slices(dicom.phantom(seed=3), study=2, patient="2"), ".IMA")
    (root / "notes.txt").write_text("no DICOM")
    (root / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    return root


def test_series_are_found_and_named(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), find_series(tree) as found:
        assert [item.modality for item in found] == ["CT", "CT", "PET"]
        names = [item.name for item in found]
        assert [item.failure for item in found] == [None] * 3
        first, _, pet = sorted(found, key=lambda item: (item.modality, item.study))
        assert len({item.subject for item in found}) == 2
        assert len({item.study for item in found}) == 2
        assert pet.subject in names
    assert "1 SR" in caplog.text
    assert not [
        word for word in ("DOE", "ROE", "MRN", "JOHN") if word in caplog.text + repr([*names, first.description])
    ]
    other = tree.rename(tree.with_name("moved"))
    with find_series(other) as again:
        assert [item.name for item in again] == names


def test_an_archive_holds_the_same_series(tree: Path, tmp_path: Path) -> None:
    """Names in it lead nowhere: the files are unpacked under numbers, and removed at the end."""
    archive = tmp_path / "export.zip"
    with zipfile.ZipFile(archive, "w") as content:
        for number, file in enumerate(file for file in tree.rglob("*") if file.is_file()):
            content.write(file, f"../../../{number}/{file.name}")
    with find_series(tree) as found:
        names = [item.name for item in found]
    with find_series(archive) as packed:
        assert [item.name for item in packed] == names
        places = {file.parent for item in packed for file in item.files}
        assert len(places) == 1
        (place,) = places
        assert place.stat().st_mode & 0o077 == 0
    assert not place.exists()
    assert not (tmp_path.parent / "0").exists()


def test_archives_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb, damaged, none = (tmp_path / name for name in ("bomb.zip", "damaged.zip", "none.zip"))
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("a", b"\0" * 128 + b"DICM" + b"\0" * 50_000_000)
    with zipfile.ZipFile(none, "w") as content:
        content.writestr("a", b"nothing")
    damaged.write_bytes(none.read_bytes().replace(b"nothing", b"nothinG"))
    with pytest.raises(MFMError, match="E_TOO_LARGE"), find_series(bomb):
        pass
    with pytest.raises(MFMError, match="E_FORMAT"), find_series(damaged):
        pass
    with find_series(none) as found:
        assert found == []
    monkeypatch.setattr(module, "MOST_ENTRIES", 0)
    with pytest.raises(MFMError, match="E_TOO_LARGE"), find_series(none):
        pass


def test_the_choice(tree: Path) -> None:
    with find_series(tree) as found:
        names = [item.name for item in found]
        with pytest.raises(MFMError, match="E_DICOM_SERIES") as caught:
            require_choice(found, ())
        assert sum(name in caught.value.message for name in names) == 2
        require_choice(found, ("all",))
    for choice, expected in ((("PET",), names[2:]), ((names[0], "pet"), [names[0], names[2]]), (("all",), names)):
        with find_series(tree, choice) as found:
            assert [item.name for item in found] == expected
    with pytest.raises(MFMError, match="E_NOT_FOUND") as caught, find_series(tree, ["MR"]):
        pass
    assert names[0] in caught.value.message


def test_the_key_is_written_on_request(tree: Path, tmp_path: Path) -> None:
    with find_series(tree) as found:
        write_key(tmp_path / "key.csv", found, tree)
    with open(tmp_path / "key.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["SeriesInstanceUID"] for row in rows} == {dicom.uid("series", 1, "ct"), dicom.uid("series", 1, "pet"),
                                                          dicom.uid("series", 2, 1)}  # fmt: skip
    assert all(Path(row["folder"]).is_dir() for row in rows)


def test_conversion_keeps_voxels_and_place_and_nothing_else(tmp_path: Path) -> None:
    voxels, axes = dicom.phantom(), np.eye(3)[:, [1, 2, 0]]
    dicom.write(tmp_path / dicom.PATIENT, dicom.slices(voxels, axes))
    with find_series(tmp_path) as (series,):
        file = convert_series(series, tmp_path / "out" / f"{series.name}.nii.gz")
        before = file.stat().st_mtime_ns
        convert_series(series, file)
        assert file.stat().st_mtime_ns == before
    image = sitk.ReadImage(str(file))
    assert np.array_equal(sitk.GetArrayFromImage(image), voxels)
    assert image.GetPixelID() == sitk.sitkInt16
    assert np.allclose(image.GetDirection(), axes.ravel(), atol=1e-6)
    assert np.allclose(image.GetOrigin(), (-31.5, 12.25, 7.125), atol=1e-5)
    texts = [image.GetMetaData(key) for key in image.GetMetaDataKeys()]
    assert not [text for text in texts if "DOE" in text or "MRN" in text]


def test_a_file_that_ends_the_child_costs_no_other(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    call, bad = decoder.call, sorted((tree / "ROE^JANE").iterdir())[0]

    def crash(file: Path, request: dict, *arguments: object) -> decoder.Reply:
        if str(bad) in request.get("files", ()):
            raise MFMError("E_READER_CRASH", "as GDCM might")
        return call(file, request, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "call", crash)
    with find_series(tree) as found:
        assert len(found) == 3
    assert "1 DICOM files have no readable header" in caplog.text


def test_damaged_headers_are_left_out(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 500)
    (tree / "y.dcm").write_bytes(b"old")
    with find_series(tree) as found:
        assert len(found) == 3
    assert "no readable header" in caplog.text
    assert "1 files end as DICOM" in caplog.text


def test_copies_of_a_series_in_two_folders_are_doubled(tmp_path: Path) -> None:
    series = dicom.slices(dicom.phantom())
    dicom.write(tmp_path / "a", series)
    dicom.write(tmp_path / "b", copy.deepcopy(series))
    with find_series(tmp_path) as (found,):
        assert found.failure is not None
        assert found.failure.code == "E_DICOM_SERIES"


def test_without_the_library(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(MFMError, match=r"E_NOT_FOUND.*pip install 'mfm_nnunet\[dicom\]'"), find_series(tree):
        pass
    with find_series(tree / "notes.txt") as found:
        assert found == []
