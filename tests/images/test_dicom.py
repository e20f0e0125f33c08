"""DICOM series: exact voxels and geometry, refusals by name, and never a person's name."""

from __future__ import annotations

import copy
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.data.dicom import Series, find_series
from mfm_nnunet.errors import MFMError
from mfm_nnunet.images.reading import read_image, read_series
from tests.builders import dicom

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")

ROTATIONS = [
    matrix
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
    if np.linalg.det(matrix := np.eye(3)[:, order] * signs) > 0
]
TILTED = np.array(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.5).GetMatrix()).reshape(3, 3)


def one(folder: Path) -> Series:
    with find_series(folder) as found:
        (series,) = found
        return series


def read(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    series = one(folder)
    assert series.failure is None, series.failure
    return read_series(series.name, series.files, "SimpleITKIO")


@pytest.mark.parametrize("number", range(25))
def test_orientations_are_exact(number: int, tmp_path: Path) -> None:
    """All 24 and an oblique one, in any order of files, with and without endings, as ITK's own series reader says."""
    voxels, axes = dicom.phantom(seed=number), [*ROTATIONS, TILTED][number]
    files = dicom.write(tmp_path / "p", dicom.slices(voxels, axes), ".dcm" * (number % 2), reverse=number % 3 == 0)
    image_CDHW, properties = read(tmp_path)
    assert np.array_equal(image_CDHW[0], voxels)
    itk = properties["sitk_stuff"]
    assert itk["spacing"] == pytest.approx((0.75, 1.25, 2.5), abs=1e-9)
    assert itk["origin"] == pytest.approx((-31.5, 12.25, 7.125), abs=1e-9)
    assert np.allclose(np.reshape(itk["direction"], (3, 3)), axes, atol=1e-9)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(files[0].parent))
    other = sitk.ReadImage(names)
    assert np.array_equal(sitk.GetArrayFromImage(other), voxels)
    assert np.allclose(other.GetDirection(), itk["direction"], atol=1e-6)


def test_converted_by_dcm2niix(tmp_path: Path) -> None:
    """The voxel at each place in the patient is the one that dcm2niix puts there."""
    program = shutil.which("dcm2niix") or shutil.which("dcm2niix", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("dcm2niix is not installed")
    for number, axes in enumerate((ROTATIONS[0], ROTATIONS[7], TILTED)):
        folder, out = tmp_path / f"in{number}", tmp_path / f"out{number}"
        out.mkdir()
        dicom.write(folder, dicom.slices(dicom.phantom((6, 8, 10)), axes, series=number))
        subprocess.run([program, "-z", "y", "-o", out, folder], check=True, capture_output=True)
        (file,) = out.glob("*.nii.gz")
        image_CDHW, properties = read(folder)
        ours = sitk.GetImageFromArray(image_CDHW[0])
        for name, value in properties["sitk_stuff"].items():
            getattr(ours, f"Set{name.capitalize()}")(value)
        theirs = sitk.ReadImage(str(file), sitk.sitkFloat32)
        on_grid = sitk.Resample(theirs, ours, sitk.Transform(), sitk.sitkNearestNeighbor, -9999)
        assert np.array_equal(sitk.GetArrayFromImage(on_grid), image_CDHW[0])


@pytest.mark.parametrize("syntax", [dicom.IMPLICIT, dicom.BIG_ENDIAN, dicom.RLE])
@pytest.mark.parametrize("modality", ["CT", "MR", "DX"])
def test_storage_and_rescaling(syntax: str, modality: str, tmp_path: Path) -> None:
    voxels = dicom.phantom()
    kind = {"CT": dicom.CT, "MR": dicom.MR, "DX": dicom.DX}[modality]
    series = dicom.slices(2 * voxels, modality=modality, sop_class=kind, slope=2, intercept=-1024)
    for data in series:
        if syntax == dicom.RLE:
            data.compress(dicom.RLE)
        elif syntax == dicom.BIG_ENDIAN:
            data.PixelData = np.frombuffer(data.PixelData, "<i2").astype(">i2").tobytes()
            data.file_meta.TransferSyntaxUID = syntax
        else:
            data.file_meta.TransferSyntaxUID = syntax
    for number, data in enumerate(series):
        (tmp_path / "x").mkdir(exist_ok=True)
        little = syntax != dicom.BIG_ENDIAN
        pydicom.dcmwrite(
            tmp_path / "x" / str(number), data, implicit_vr=syntax == dicom.IMPLICIT, little_endian=little,
            enforce_file_format=True,
        )  # fmt: skip
    assert np.array_equal(read(tmp_path)[0][0], 2 * voxels)


def test_suv_by_body_weight(tmp_path: Path) -> None:
    """300 MBq of F-18, an hour before the scan, 70 kg; each slice has a slope of its own."""
    series = []
    expected = []
    for number in range(4):
        values = np.abs(dicom.phantom((4, 8, 10), seed=number))[number]
        series += [dicom.slices(np.repeat(values[None], 4, 0), modality="PT", sop_class=dicom.PET, slope=number + 1,
                                intercept=0)[number]]  # fmt: skip
        expected.append(np.round(values / (number + 1)) * (number + 1))
    dicom.as_pet(series)
    dicom.write(tmp_path, series)
    factor = 70_000 / (3e8 * 2 ** (-3600 / 6586.2))
    assert np.allclose(read(tmp_path)[0][0], np.array(expected) * factor, rtol=1e-6)


def test_inverted_pictures(tmp_path: Path) -> None:
    """An X-ray without a place is a picture of two axes; MONOCHROME1 becomes bright where it is dense."""
    series = dicom.slices(np.abs(dicom.phantom((2, 8, 10))), modality="DX", sop_class=dicom.DX, intercept=0)
    for data in series:
        data.PhotometricInterpretation, data.BitsStored, data.HighBit, data.PixelRepresentation = (
            "MONOCHROME1",
            12,
            11,
            0,
        )
        del data.ImagePositionPatient, data.ImageOrientationPatient
    dicom.write(tmp_path, series)
    with find_series(tmp_path) as found:
        assert len(found) == 2
        arrays = [read_series(item.name, item.files, "SimpleITKIO") for item in found]
    stored = [4095 - np.frombuffer(data.PixelData, "<u2").reshape(8, 10) for data in series]
    assert {array[0, 0].tobytes() for array, _ in arrays} == {x.astype(np.float32).tobytes() for x in stored}
    assert [len(properties["sitk_stuff"]["spacing"]) for _, properties in arrays] == [2, 2]


# Refusals


def tilt(series: list[Any]) -> None:
    for number, data in enumerate(series):
        data.ImagePositionPatient = [-31.5, 12.25 + 0.3 * number, 7.125 + 2.5 * number]


def double(series: list[Any]) -> None:
    series.append(copy.deepcopy(series[2]))
    series[-1].SOPInstanceUID = dicom.uid("again")


def copied(series: list[Any]) -> None:
    series.append(copy.deepcopy(series[2]))


def echoes(series: list[Any]) -> None:
    for data in [*series]:
        other = copy.deepcopy(data)
        other.SOPInstanceUID, other.EchoTime = dicom.uid(data.SOPInstanceUID, 2), 80
        data.EchoTime = 20
        series.append(other)


def set_all(**values: Any) -> dicom.Change:
    def change(series: list[Any]) -> None:
        for data in series:
            for name, value in values.items():
                setattr(data, name, value)

    return change


def set_one(number: int, **values: Any) -> dicom.Change:
    return lambda series: set_all(**values)([series[number]])


def syntax(uid: str) -> dicom.Change:
    def change(series: list[Any]) -> None:
        for data in series:
            data.file_meta.TransferSyntaxUID = uid

    return change


REFUSED = {
    "a gap": ("E_DICOM_MISSING_SLICE", "slices 3 and 4", lambda series: series.pop(3)),
    "two gaps": ("E_DICOM_MISSING_SLICE", "about 2 slices", lambda series: [series.pop(6), series.pop(2)]),
    "doubled": ("E_DICOM_SERIES", "doubled", double),
    "copied": ("E_DICOM_SERIES", "twice", copied),
    "echoes": ("E_DICOM_SERIES", "echo times", echoes),
    "tilt": ("E_GEOMETRY", "6.8 degrees", tilt),
    "uneven": ("E_GEOMETRY", "mm apart", set_one(3, ImagePositionPatient=[-31.5, 12.25, 15.125])),
    "turned": ("E_DICOM_SERIES", "directions", set_one(3, ImageOrientationPatient=[0, 1, 0, 0, 0, 1])),
    "of another size": ("E_DICOM_SERIES", "sizes", set_one(3, Rows=4)),
    "no place": ("E_DICOM_SERIES", "sizes", set_one(3, PixelSpacing=[2, 2])),
    "no pixel size": ("E_SPACING", "PixelSpacing", set_all(PixelSpacing=None)),
    "several frames": ("E_DIM", "multi-frame", set_all(NumberOfFrames=2)),
    "colours": ("E_DATATYPE", "colours", set_all(SamplesPerPixel=3, PhotometricInterpretation="RGB")),
    "HTJ2K": ("E_FORMAT", "1.2.840.10008.1.2.4.201", syntax("1.2.840.10008.1.2.4.201")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_volume(name: str, tmp_path: Path) -> None:
    code, words, change = REFUSED[name]
    series = dicom.slices(dicom.phantom((8, 8, 10)))
    change(series)  # type: ignore[operator]
    compressed = name == "HTJ2K"
    if compressed:
        for data in series:
            data.PixelData = pydicom.encaps.encapsulate([b"\0" * 20])
    dicom.write(tmp_path / "DOE^JOHN", series)
    failure = one(tmp_path).failure
    assert failure is not None
    assert (failure.code, words in failure.reason) == (code, True), failure
    assert "DOE" not in failure.reason


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def shortened(file: Path) -> None:
    data = pydicom.dcmread(file)
    data.PixelData = data.PixelData[:-40]
    data.save_as(file)


@pytest.mark.parametrize("damage", [cut_off, shortened])
def test_cut_off_pixels(damage: Any, tmp_path: Path) -> None:
    files = dicom.write(tmp_path / "DOE^JOHN", dicom.slices(dicom.phantom()))
    damage(files[2])
    series = one(tmp_path)
    with pytest.raises(MFMError, match="E_SHORT_DATA") as caught:
        read_series(series.name, series.files, "SimpleITKIO")
    assert "DOE" not in str(caught.value)


@pytest.mark.parametrize("missing", ["PatientWeight", "DecayCorrection", "Units", "SeriesTime"])
def test_pet_without_what_suv_needs(missing: str, tmp_path: Path) -> None:
    series = dicom.slices(np.abs(dicom.phantom()), modality="PT", sop_class=dicom.PET, intercept=0)
    dicom.as_pet(series)
    for data in series:
        delattr(data, missing)
    dicom.write(tmp_path, series)
    found = one(tmp_path)
    with pytest.raises(MFMError, match=r"E_HEADER.*SUV"):
        read_series(found.name, found.files, "SimpleITKIO")


def test_a_flat_picture_is_read_for_a_dataset_of_pictures_only(tmp_path: Path) -> None:
    """The form of the properties is that of the plan's reader; a volume is refused."""
    from PIL import Image

    Image.fromarray(np.arange(80, dtype=np.uint8).reshape(8, 10)).save(tmp_path / "a.png")
    image = sitk.GetImageFromArray(np.arange(80, dtype=np.uint8).reshape(8, 10))
    sitk.WriteImage(image, str(tmp_path / "b.mha"))
    sitk.WriteImage(sitk.GetImageFromArray(dicom.phantom()), str(tmp_path / "c.mha"))
    as_picture, properties = read_image([tmp_path / "b.mha"], "NaturalImage2DIO")
    assert np.array_equal(as_picture, read_image([tmp_path / "a.png"], "NaturalImage2DIO")[0])
    assert properties == {"spacing": (999, 1, 1)}
    with pytest.raises(MFMError, match="E_DIM"):
        read_image([tmp_path / "c.mha"], "NaturalImage2DIO")
    with pytest.raises(MFMError, match="E_SPACING"):
        read_image([tmp_path / "a.png"], "SimpleITKIO")
    with pytest.raises(MFMError, match="E_FORMAT"):
        read_image([tmp_path / "c.mha"], "NibabelIOWithReorient")
