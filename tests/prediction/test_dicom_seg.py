"""A DICOM folder becomes masks and DICOM segmentations; only these name the patient."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.data.dicom import find_series
from mfm_nnunet.errors import CasesFailedError, MFMError
from mfm_nnunet.jobs import predict
from mfm_nnunet.prediction.dicom_seg import write_segmentation
from tests.builders import dicom
from tests.builders.corpora import refusal
from tests.builders.tiny_model import REGIONS, dataset_json, save_model, tiny_plans, voxels_of

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
highdicom = pytest.importorskip("highdicom", reason="the extra 'dicom' is not installed")

OBLIQUE = np.array(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.5).GetMatrix()).reshape(3, 3)
AXES = {"axial": np.eye(3), "from below": np.diag([1, -1, -1]), "sagittal": np.eye(3)[:, [1, 2, 0]], "oblique": OBLIQUE}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plans = tiny_plans(spacing=(2.5, 1.25, 0.75))
    labels = {"background": 0, "liver": 1, "my tumour": 2}
    return save_model(tmp_path_factory.mktemp("results") / "model", plans, dataset_json(labels), mirror_axes=(1,))


def run(model: Path, source: Path, out: Path, **options: Any) -> predict.PredictReport:
    return predict.predict(source, out, model_folder=model, **{"device": "cpu", "step_size": 1.0, **options})


def texts_of(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".dcm"]
    return "".join(file.read_bytes().decode("latin-1") for file in files)


@pytest.mark.parametrize("name", AXES)
def test_from_dicom_to_dicom(name: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The segmentation has the voxels of the mask at the slices it names; the mask lies on the series."""
    series = dicom.slices(dicom.phantom((12, 20, 18)), AXES[name])
    dicom.write(tmp_path / "DOE^JOHN", series, reverse=name == "sagittal")
    with caplog.at_level("DEBUG"):
        (case,) = run(model, tmp_path / "DOE^JOHN", tmp_path / "out", dicom_seg=True).done
    mask = sitk.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz"))
    mask_DHW = sitk.GetArrayFromImage(mask)
    assert set(np.unique(mask_DHW)) == {0, 1, 2}
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "DOE^JOHN"))
    image = sitk.ReadImage(names)
    assert np.allclose(mask.GetDirection(), image.GetDirection(), atol=1e-6)
    assert np.allclose(mask.GetOrigin(), image.GetOrigin(), atol=1e-4)
    written = highdicom.seg.segread(tmp_path / "out" / f"{case}.dcm")
    uids = [pydicom.dcmread(file, stop_before_pixels=True).SOPInstanceUID for file in names]
    found = written.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    assert np.array_equal(found, mask_DHW)
    volume = written.get_volume(combine_segments=True)  # placed by positions, not by the UIDs of slices
    own = sitk.GetImageFromArray(np.asarray(volume.array).astype(np.uint8))
    own.SetSpacing([float(v) for v in volume.spacing[::-1]])
    own.SetOrigin([float(v) for v in volume.position])
    own.SetDirection(np.array(volume.direction)[:, ::-1].ravel().tolist())
    on_grid = sitk.Resample(own, mask, sitk.Transform(), sitk.sitkNearestNeighbor)
    assert np.array_equal(sitk.GetArrayFromImage(on_grid), mask_DHW)
    assert [segment.SegmentLabel for segment in written.SegmentSequence] == ["liver", "my tumour"]
    assert written.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert all("RecommendedDisplayCIELabValue" in segment for segment in written.SegmentSequence)
    assert written.SegmentSequence[0].SegmentAlgorithmName == "mfm_nnunet"
    assert (str(written.PatientName), written.StudyInstanceUID) == (dicom.PATIENT, series[0].StudyInstanceUID)
    everything = texts_of(tmp_path / "out") + caplog.text
    assert not [word for word in ("JOHN", "MRN", "WHO^", "ACC77") if word in everything]
    assert run(model, tmp_path / "DOE^JOHN", tmp_path / "out", dicom_seg=True, resume=True).skipped == [case]
    (tmp_path / "out" / f"{case}.dcm").unlink()
    assert run(model, tmp_path / "DOE^JOHN", tmp_path / "out", dicom_seg=True, resume=True).done == [case]


def test_read_by_itk(model: Path, tmp_path: Path) -> None:
    """GDCM reads the frames of the file, as many as slices with a segment."""
    dicom.write(tmp_path / "in", dicom.slices(dicom.phantom((12, 20, 18))))
    (case,) = run(model, tmp_path / "in", tmp_path / "out", dicom_seg=True).done
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / f"{case}.dcm")))
    mask = voxels_of(tmp_path / "out" / f"{case}.nii.gz")
    assert frames.astype(bool).sum() == np.count_nonzero(mask)


def test_regions_overlap(tmp_path: Path) -> None:
    """A region has the voxels of all its values; the order of the files does not matter."""
    mask = np.zeros((5, 8, 9), np.uint8)
    mask[1:4, 2:6, 2:7], mask[2:3, 3:5, 3:6], mask[2, 4, 4] = 1, 2, 3
    with find_series(_written(tmp_path / "in", mask.shape)) as (series,):
        labels = {name: value if isinstance(value, list) else [value] for name, value in REGIONS.items() if value}
        write_segmentation(mask, series.files, labels, "0" * 64, tmp_path / "x.dcm")
        uids = [pydicom.dcmread(file).SOPInstanceUID for file in series.files]
    written = highdicom.seg.segread(tmp_path / "x.dcm")
    for number, values in enumerate(labels.values(), start=1):
        found = written.get_pixels_by_source_instance(uids, [number], assert_missing_frames_are_empty=True)
        assert np.array_equal(found[..., 0], np.isin(mask, values))


def test_an_empty_mask(tmp_path: Path) -> None:
    with find_series(_written(tmp_path / "in", (4, 8, 9))) as (series,):
        write_segmentation(np.zeros((4, 8, 9), np.uint8), series.files, {"liver": [1]}, "0" * 64, tmp_path / "x.dcm")
    assert not highdicom.seg.segread(tmp_path / "x.dcm").pixel_array.any()


def _written(folder: Path, shape: tuple[int, ...]) -> Path:
    dicom.write(folder, dicom.slices(dicom.phantom(shape)), reverse=True)
    return folder


def test_a_folder_of_everything(model: Path, tmp_path: Path) -> None:
    """DICOM, NIfTI and NRRD side by side, and a bad series, which costs no other; also an archive and a file."""
    source = _written(tmp_path / "in" / "a", (12, 20, 18)).parent
    gap = dicom.slices(dicom.phantom((12, 20, 18)), study=2)
    dicom.write(source / "b", [*gap[:4], *gap[6:]])
    image = sitk.GetImageFromArray(dicom.phantom((12, 20, 18)))
    image.SetSpacing((0.75, 1.25, 2.5))
    for name in ("c.nrrd", "d_0000.nii.gz"):
        sitk.WriteImage(image, str(source / name))
    (source / "c.nrrd").rename(source / "c_0000.nrrd")
    with pytest.raises(CasesFailedError) as caught:
        run(model, source, tmp_path / "out", dicom_seg=True, key_file=tmp_path / "key.csv")
    assert [failure.code for failure in caught.value.failures] == ["E_DICOM_MISSING_SLICE"]
    (first,) = (file.stem for file in (tmp_path / "out").glob("*.dcm"))
    masks = {file.name.removesuffix(".nii.gz"): voxels_of(file) for file in (tmp_path / "out").glob("*.nii.gz")}
    assert sorted(masks) == ["c", first, "d"]
    assert np.array_equal(masks["c"], masks["d"])
    assert "SeriesInstanceUID" in (tmp_path / "key.csv").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "cases.jsonl").read_text().splitlines()]
    done = next(line for line in lines if line["status"] == "done" and line["case"] == first)
    assert sorted(done["input"])[0] == "slice_0000"
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in (source / "a").iterdir():
            archive.write(file, file.name)
    assert run(model, tmp_path / "x.zip", tmp_path / "out2").done == [first]
    assert np.array_equal(voxels_of(tmp_path / "out2" / f"{first}.nii.gz"), masks[first])
    one = sorted((source / "a").iterdir())[0]
    assert run(model, one, tmp_path / "out3").done == [first]


def test_refusals(model: Path, tmp_path: Path) -> None:
    source = _written(tmp_path / "in", (12, 20, 18))
    dicom.write(source / "b", dicom.slices(dicom.phantom((12, 20, 18)), series=2))
    refusal("E_DICOM_SERIES", lambda: run(model, source, tmp_path / "out"))
    image = sitk.GetImageFromArray(dicom.phantom((12, 20, 18)))
    sitk.WriteImage(image, str(tmp_path / "x.nrrd"))
    refusal("E_CONFIG", lambda: run(model, tmp_path / "x.nrrd", tmp_path / "out", dicom_seg=True))
    two = save_model(tmp_path / "m", tiny_plans(channels=2), dataset_json(channels=("T1", "T2")))
    refusal("E_CHANNELS", lambda: run(two, source, tmp_path / "out", series=["all"]))
    assert not (tmp_path / "out").exists()
    assert len(run(model, source, tmp_path / "out", series=["CT"]).done) == 2


def test_without_the_library(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(MFMError, match=r"pip install 'mfm_nnunet\[dicom\]'"):
        run(model, _written(tmp_path / "in", (4, 8, 9)), tmp_path / "out", dicom_seg=True)
