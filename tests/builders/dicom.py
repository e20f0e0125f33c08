"""Synthetic DICOM series, written with pydicom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CT, MR, PET, DX = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("2", "4", "128", "1.1"))
EXPLICIT, IMPLICIT, BIG_ENDIAN, RLE, JPEG2000 = (f"1.2.840.10008.1.2{end}" for end in (".1", "", ".2", ".5", ".4.90"))
PATIENT = "DOE^JOHN"
NUMBER = "MRN0012345"
Change = Callable[[list[Any]], None]


def uid(*parts: object) -> str:
    """A UID made from any parts, the same each time."""
    import pydicom

    return pydicom.uid.generate_uid(entropy_srcs=[str(part) for part in parts])


def phantom(shape_DHW: Sequence[int] = (6, 8, 10), seed: int = 0) -> np.ndarray:
    """Whole numbers from -1000 to 1000, different everywhere."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape_DHW).astype(np.int16)


def slices(
    voxels_DHW: np.ndarray,
    direction: np.ndarray | None = None,
    *,
    spacing: Sequence[float] = (0.75, 1.25, 2.5),
    origin: Sequence[float] = (-31.5, 12.25, 7.125),
    series: object = 1,
    study: object = 1,
    patient: str = NUMBER,
    modality: str = "CT",
    sop_class: str = CT,
    slope: float = 1,
    intercept: float = -1024,
) -> list[Any]:
    """Data sets of a series on a grid of ``spacing`` (x, y, z); the columns of ``direction`` are its axes."""
    import pydicom

    axes = np.eye(3) if direction is None else direction
    result = []
    for number, pixels_HW in enumerate(voxels_DHW):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = EXPLICIT
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = sop_class
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid("slice", study, series, number)
        data.StudyInstanceUID, data.SeriesInstanceUID = uid("study", study), uid("series", study, series)
        data.FrameOfReferenceUID = uid("frame", study)
        data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = PATIENT, patient, "19500101", "M"
        data.StudyID, data.AccessionNumber, data.ReferringPhysicianName = "1", "ACC77", "WHO^DOCTOR"
        data.StudyDate = data.SeriesDate = data.AcquisitionDate = "20240102"
        data.StudyTime = data.SeriesTime = data.AcquisitionTime = "100000"
        data.Modality, data.SeriesNumber, data.InstanceNumber = modality, 1, number + 1
        data.Manufacturer, data.ImageType = "maker", ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns = pixels_HW.shape
        data.ImageOrientationPatient = [*map(float, axes[:, 0]), *map(float, axes[:, 1])]
        data.ImagePositionPatient = [float(v) for v in np.asarray(origin) + number * spacing[2] * axes[:, 2]]
        data.PixelSpacing, data.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
        data.PixelData = np.round((pixels_HW - intercept) / slope).astype("<i2").tobytes()
        result.append(data)
    return result


def as_pet(series: Sequence[Any], dose: float = 3e8, weight: float | None = 70.0) -> None:
    """Add what SUV needs: injected an hour before, F-18."""
    import pydicom

    for data in series:
        data.Units, data.DecayCorrection, data.PatientWeight = "BQML", "START", weight
        source = pydicom.Dataset()
        source.RadionuclideTotalDose, source.RadionuclideHalfLife = dose, 6586.2
        source.RadiopharmaceuticalStartTime = "090000.00"
        data.RadiopharmaceuticalInformationSequence = [source]


def write(folder: Path, series: Sequence[Any], ending: str = "", reverse: bool = False) -> list[Path]:
    """Write the files of a series, by default without an ending, in an order that says nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, data in enumerate(reversed(series) if reverse else series):
        file = folder / f"IM{(number * 7) % 1000:04d}{ending}"
        data.save_as(file, enforce_file_format=True)
        files.append(file)
    return files
