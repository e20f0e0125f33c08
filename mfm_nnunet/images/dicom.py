"""Read a DICOM series as one volume: headers by pydicom, voxels by GDCM, compared with the bytes of the files.

Reading runs in a child process (:mod:`mfm_nnunet.images.decode`). Values are Hounsfield units for CT, SUV by body
weight for PET, rescaled values otherwise. Lengths in mm, coordinates are DICOM's (to the left, back and head).
A message names no file and no person: folders of hospitals are often called after patients.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from mfm_nnunet.device import require_memory
from mfm_nnunet.errors import MFMError
from mfm_nnunet.images.geometry import ANGLE_TOLERANCE, DIRECTION_TOLERANCE, show_numbers

NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2")
"""Transfer syntaxes without compression of the pixels."""
COMPRESSED = (
    *(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91)),
    "1.2.840.10008.1.2.5",
)
"""Transfer syntaxes that GDCM decodes: JPEG, JPEG-LS, JPEG 2000, RLE."""
NO_IMAGES = frozenset(("SEG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "REG", "DOC", "AU", "ECG"))
"""Modalities of objects that are no scans."""
STEP_TOLERANCE = 0.02
"""Relative difference of two distances between slices that counts as rounding."""
_TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "PatientName"),
    *("Modality", "ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness"),
    *("AcquisitionNumber", "TemporalPositionIdentifier", "EchoTime", "DiffusionBValue", "TriggerTime"),
]
_ONE_VOLUME = {
    "TemporalPositionIdentifier": "points in time", "EchoTime": "echo times", "DiffusionBValue": "b-values",
    "TriggerTime": "trigger times", "AcquisitionNumber": "acquisitions",
}  # fmt: skip
_NEEDED = "PatientWeight, RadionuclideTotalDose, RadionuclideHalfLife, DecayCorrection, the times of injection and scan"
_INSTALL = "Run: pip install 'mfm_nnunet[dicom]'"
Header = Mapping[str, Any]
"""Plain values of one file; see :func:`try_headers`."""


@dataclass(frozen=True)
class Arrangement:
    """Place of a series in space: the order of its files along the slice axis, and SimpleITK's geometry (x, y, z)."""

    order: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    """Row by row; two axes for a picture without a position, such as an X-ray."""


def load_pydicom() -> Any:
    """Import pydicom; raise MFMError (E_NOT_FOUND) with the command that installs it."""
    try:
        import pydicom
    except ImportError as error:
        raise MFMError("E_NOT_FOUND", f"DICOM needs the package pydicom, which is not installed. {_INSTALL}") from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # a warning would print the value
    return pydicom


def try_headers(files: Sequence[str]) -> list[dict[str, Any] | None]:
    """Return plain values of the header of each file; None if it is no DICOM or cannot be parsed.

    ``patient`` is a digest, to group series; it must not be stored, as short numbers could be found by trying all.
    """
    return [_try_header(file) for file in files]


def _try_header(file: str) -> dict[str, Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = load_pydicom().dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
            return _plain_values(data) if "SOPInstanceUID" in data else None
        except MFMError:
            raise
        except Exception:  # a damaged header can raise anything
            return None


def _plain_values(data: Any) -> dict[str, Any]:
    def numbers(name: str) -> list[float] | None:
        value = data.get(name)
        return [float(item) for item in value] if value else None

    def text(name: str) -> str:
        return str(data.get(name) or "")

    patient = text("PatientID") + "\0" + text("PatientName")
    return {
        "series": text("SeriesInstanceUID") or text("SOPInstanceUID"),
        "study": text("StudyInstanceUID"),
        "instance": text("SOPInstanceUID"),
        "patient": hashlib.sha256((patient.strip("\0") or text("StudyInstanceUID")).encode()).hexdigest(),
        "modality": text("Modality").upper(),
        "syntax": str(data.file_meta.get("TransferSyntaxUID") or ""),
        "is_localizer": "LOCALIZER" in [str(word).upper() for word in data.get("ImageType") or ()],
        "rows": int(data.get("Rows") or 0),
        "columns": int(data.get("Columns") or 0),
        "frames": int(data.get("NumberOfFrames") or 1),
        "samples": int(data.get("SamplesPerPixel") or 1),
        "photometric": text("PhotometricInterpretation"),
        "position": numbers("ImagePositionPatient"),
        "orientation": numbers("ImageOrientationPatient"),
        "spacing": numbers("PixelSpacing") or numbers("ImagerPixelSpacing"),
        "thickness": float(data.get("SliceThickness") or 0),
        **{name: text(name) for name in _ONE_VOLUME},
    }


def is_scan(header: Header) -> bool:
    """Return whether a file holds pixels of a scan, and not a segmentation, a report or a localizer."""
    return header["rows"] * header["columns"] > 0 and header["modality"] not in NO_IMAGES and not header["is_localizer"]


def arrange(headers: Sequence[Header]) -> Arrangement:
    """Sort the slices of a series along their normal, and return its geometry.

    Raises MFMError: E_DIM (several frames in a file), E_DATATYPE (colours), E_FORMAT (a compression that is not read),
    E_DICOM_SERIES (slices of different sizes or directions, doubled ones, several volumes), E_DICOM_MISSING_SLICE,
    E_GEOMETRY (gantry tilt, uneven distances), E_SPACING (no pixel size).
    """
    first = headers[0]
    for header in headers:
        _require_readable(header)
    for name, what in (("rows", "sizes"), ("columns", "sizes"), ("spacing", "pixel sizes"), ("modality", "modalities")):
        if any(header[name] != first[name] for header in headers):
            raise _series_error(f"its slices have different {what}")
    if len({header["instance"] for header in headers}) < len(headers):
        raise _series_error("the same slice is there twice (SOPInstanceUID)", "Remove the copies.")
    if first["position"] is None or first["orientation"] is None:
        return _picture(headers)
    if any(header["position"] is None or header["orientation"] is None for header in headers):
        raise _series_error("some of its slices have no position")
    if first["spacing"] is None:
        raise MFMError("E_SPACING", "the series has no PixelSpacing, so its size is unknown. Export it again.")
    return _place_stack(headers)


def _picture(headers: Sequence[Header]) -> Arrangement:
    """Return the geometry of a picture without a position; without a pixel size, a pixel counts as 1 mm."""
    if len(headers) > 1:
        raise _series_error(f"it has {len(headers)} pictures without positions (ImagePositionPatient)")
    rows_mm, columns_mm = headers[0]["spacing"] or (1.0, 1.0)
    return Arrangement((0,), (columns_mm, rows_mm), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))


def _place_stack(headers: Sequence[Header]) -> Arrangement:
    first = headers[0]
    axes = np.array([header["orientation"] for header in headers])
    if axes.shape[1:] != (6,) or not np.all(np.abs(axes - axes[0]) <= DIRECTION_TOLERANCE):
        raise _series_error("its slices have different directions", "Give one stack of parallel slices.")
    x, y = axes[0].reshape(2, 3)
    normal = np.cross(x, y)
    if abs(float(x @ y)) > ANGLE_TOLERANCE or abs(float(np.linalg.norm(normal)) - 1) > ANGLE_TOLERANCE:
        raise MFMError("E_GEOMETRY", "the axes of its slices are not perpendicular. Export the series again.")
    positions = np.array([header["position"] for header in headers])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    rows_mm, columns_mm = first["spacing"]
    step = _step(along[order], [headers[index] for index in order])
    way = positions[order[-1]] - positions[order[0]]
    if (length := float(np.linalg.norm(way))) and float(way @ normal) < length * math.cos(2 * ANGLE_TOLERANCE):
        degrees = math.degrees(math.acos(min(float(way @ normal) / length, 1.0)))
        raise MFMError(
            "E_GEOMETRY",
            f"its slices are tilted by {degrees:.1f} degrees against their axis (gantry tilt), so they are no box. "
            "Convert the series with dcm2niix, which resamples it: pip install dcm2niix.",
        )
    direction = np.stack([x, y, normal], axis=1)
    return Arrangement(
        tuple(int(index) for index in order),
        (columns_mm, rows_mm, step or first["thickness"] or 1.0),
        tuple(float(value) for value in positions[order[0]]),
        tuple(float(value) for value in direction.ravel()),
    )


def _step(along: np.ndarray, headers: Sequence[Header]) -> float:
    """Return the distance of neighbouring slices in mm, 0 for a single slice; refuse doubled and missing ones."""
    if len(along) == 1:
        return 0.0
    steps = np.diff(along)
    step = float(np.median(steps))
    if float(steps.min()) < 1e-3:
        others = [what for name, what in _ONE_VOLUME.items() if len({header[name] for header in headers}) > 1]
        number = int(np.count_nonzero(steps < 1e-3))
        reason = f"{number} of its {len(along)} slices are at the place of another"
        if others:
            raise _series_error(f"{reason}, because it holds several {others[0]}", "Split it into single volumes.")
        raise _series_error(f"{reason} (doubled slices)", "Remove the copies.")
    if gaps := np.flatnonzero(steps > 1.5 * step).tolist():
        missing = sum(round(float(steps[index]) / step) - 1 for index in gaps)
        where = f"between slices {gaps[0] + 1} and {gaps[0] + 2} of {len(along)}"
        raise MFMError(
            "E_DICOM_MISSING_SLICE",
            f"about {missing} slices are missing, e.g. {where}, which are {steps[gaps[0]]:.4g} mm apart and the others "
            f"{step:.4g} mm. Export the series again.",
        )
    if float(np.abs(steps - step).max()) > max(STEP_TOLERANCE * step, 2e-3):
        raise MFMError(
            "E_GEOMETRY",
            f"its slices are {steps.min():.4g} to {steps.max():.4g} mm apart, so they are no regular grid. Convert the "
            "series with dcm2niix, which resamples it: pip install dcm2niix.",
        )
    return float(along[-1] - along[0]) / (len(along) - 1)


def _require_readable(header: Header) -> None:
    if header["frames"] > 1:
        raise MFMError(
            "E_DIM",
            f"a file of the series holds {header['frames']} frames (multi-frame DICOM), which is not read. Convert it "
            "with dcm2niix (pip install dcm2niix), or export single slices.",
        )
    if header["samples"] != 1:
        raise MFMError("E_DATATYPE", "its pixels are colours. Save the picture as PNG, or export grey values.")
    if header["syntax"] not in (*NATIVE, *COMPRESSED):
        raise MFMError(
            "E_FORMAT",
            f"its pixels have a compression that is not read (transfer syntax {header['syntax'][:64] or 'not named'}). "
            "Export it without compression.",
        )


def _series_error(reason: str, advice: str = "Export each stack of slices as a series of its own.") -> MFMError:
    return MFMError("E_DICOM_SERIES", f"the series is no single volume: {reason}. {advice}")


def read_volume(files: Sequence[str], headers: Sequence[Header]) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the files of a series as (1, D, H, W) float32, with the properties of nnU-Net's SimpleITKIO.

    Raises MFMError as :func:`arrange`, and E_SHORT_DATA (cut off), E_FORMAT (readers disagree, a damaged file),
    E_HEADER (PET without what SUV needs).
    """
    place = arrange(headers)
    shape = (len(files), headers[0]["rows"], headers[0]["columns"])
    voxels_DHW = np.empty(shape, np.float32)
    for slice_HW, index in zip(voxels_DHW, place.order):
        data = _read_whole(files[index])
        factor = _suv_factor(data, headers[index]["modality"])
        slice_HW[...] = _read_pixels(files[index], data, headers[index]) * factor
    spacing = [*place.spacing[::-1]]
    if len(spacing) == 2:  # as nnU-Net's reader does
        spacing = [999 * max(spacing), *spacing]
    itk = {"spacing": place.spacing, "origin": place.origin, "direction": place.direction}
    return voxels_DHW[None], {"sitk_stuff": itk, "spacing": spacing}


def read_headers(files: Sequence[str]) -> list[dict[str, Any]]:
    """Read the headers of all files of a series. Raises MFMError (E_FORMAT) if one has none."""
    headers = [header for header in try_headers(files) if header is not None]
    if len(headers) < len(files):
        raise MFMError(
            "E_FORMAT", f"{len(files) - len(headers)} of its files have no readable header. Copy them again."
        )
    return headers


def count_voxels(headers: Sequence[Header]) -> int:
    """Return the number of voxels of a series. Raises MFMError (E_TOO_LARGE) if they do not fit into memory."""
    number = sum(header["rows"] * header["columns"] for header in headers)
    require_memory(4 * number, "reading the series", "Crop it.")
    return number


def _read_whole(file: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return load_pydicom().dcmread(file)
        except Exception as error:
            reason = type(error).__name__
            raise MFMError(
                "E_SHORT_DATA", f"a file of the series cannot be read whole ({reason}). Copy it again."
            ) from error


def _read_pixels(file: str, data: Any, header: Header) -> np.ndarray:
    """Return the rescaled values (H, W) that GDCM decodes."""
    import SimpleITK as sitk

    if "PixelData" not in data:
        raise MFMError("E_SHORT_DATA", "a file of the series has no pixels. Copy it again.")
    expected_HW = _expected_values(data, header) if header["syntax"] in NATIVE else None
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    reader.SetOutputPixelType(sitk.sitkFloat64)
    try:
        values_HW = sitk.GetArrayFromImage(reader.Execute()).reshape(header["rows"], header["columns"])
    except (RuntimeError, ValueError) as error:
        raise MFMError("E_FORMAT", "a file of the series cannot be decoded by GDCM. Export it again.") from error
    if expected_HW is not None and not np.allclose(values_HW, expected_HW, rtol=1e-6, atol=1e-3):
        raise MFMError(
            "E_FORMAT", "GDCM reads other pixels than a file of the series has. Convert the series with dcm2niix."
        )
    return values_HW


def _expected_values(data: Any, header: Header) -> np.ndarray:
    """Return the rescaled values (H, W) in the bytes of an uncompressed file; MONOCHROME1 is inverted."""
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    values_HW = _stored_values(data, header)
    if header["photometric"] == "MONOCHROME1":
        values_HW = (-1 if int(data.PixelRepresentation) else (1 << int(data.BitsStored)) - 1) - values_HW
    return values_HW * slope + intercept


def _stored_values(data: Any, header: Header) -> np.ndarray:
    """Return the numbers (H, W) in the bytes of an uncompressed file, without unused high bits."""
    allocated, stored = int(data.BitsAllocated), int(data.BitsStored)
    count = header["rows"] * header["columns"]
    if allocated not in (8, 16, 32):
        raise MFMError("E_DATATYPE", f"its pixels have {allocated} bits, which is not read. Export it again.")
    if len(data.PixelData) < count * allocated // 8:
        raise MFMError("E_SHORT_DATA", "the pixels of a slice are cut off. Copy the series again.")
    order = ">" if header["syntax"] == NATIVE[-1] else "<"
    kind = np.dtype(f"{order}{'i' if int(data.PixelRepresentation) else 'u'}{allocated // 8}")
    values = np.frombuffer(data.PixelData, kind, count).astype(kind.newbyteorder("="))
    spare = allocated - stored if int(data.get("HighBit", stored - 1)) == stored - 1 else 0
    return ((values << spare) >> spare).reshape(header["rows"], header["columns"]).astype(float)


# PET


def _suv_factor(data: Any, modality: str) -> float:
    """Return the factor from stored PET values to SUV by body weight; 1 for other modalities.

    SUV = activity per ml * body weight in g / dose at the reference time. The dose decays from the injection to the
    start of the scan (DecayCorrection START), or is corrected to the injection (ADMIN). Raises MFMError (E_HEADER)
    naming the field that is missing. Definition: QIBA's vendor-neutral SUV computation.
    """
    if modality != "PT" or (units := str(data.get("Units", ""))) == "GML":
        return 1.0
    if units != "BQML":
        raise _no_suv(f"its Units are '{units[:16]}', and must be BQML or GML")
    try:
        source = data.RadiopharmaceuticalInformationSequence[0]
        dose, weight = float(source.RadionuclideTotalDose), float(data.PatientWeight)
        half_life, correction = float(source.RadionuclideHalfLife), str(data.DecayCorrection)
        if not 1e6 <= dose <= 1e11 or not 0 < weight < 500 or not half_life > 0:
            raise _no_suv(f"dose {dose:g} Bq, weight {weight:g} kg or half-life {half_life:g} s is impossible")
        if correction not in ("START", "ADMIN"):
            raise _no_suv(f"its DecayCorrection is '{correction[:16]}', and must be START or ADMIN")
        seconds = _seconds_to_scan(data, source) if correction == "START" else 0.0
        return 1000 * weight / (dose * 2 ** (-seconds / half_life))
    except MFMError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise _no_suv(f"one of these is missing: {_NEEDED}") from error


def _seconds_to_scan(data: Any, source: Any) -> float:
    """Return the seconds from injection to the start of the scan, which the values are corrected to."""
    day = str(data.SeriesDate)
    scan, acquired = (_moment(day + str(data[name].value)) for name in ("SeriesTime", "AcquisitionTime"))
    if scan > acquired and str(data.get("AcquisitionDate", day)) == day:
        raise _no_suv("SeriesTime is after AcquisitionTime, so the start of the scan is unknown")
    if given := data.get("RadiopharmaceuticalStartDateTime") or source.get("RadiopharmaceuticalStartDateTime"):
        injected = _moment(str(given))
    else:
        injected = _moment(day + str(source.RadiopharmaceuticalStartTime))
        injected -= timedelta(days=1) if injected > scan else timedelta()
    seconds = (scan - injected).total_seconds()
    if not 0 <= seconds < 86_400:
        raise _no_suv(f"the scan begins {seconds:.0f} s after the injection")
    return seconds


def _moment(text: str) -> datetime:
    digits = text.partition("+")[0].partition("-")[0]
    whole, _, part = digits.partition(".")
    return datetime.strptime(whole[:14].ljust(14, "0"), "%Y%m%d%H%M%S") + timedelta(seconds=float(f"0.{part or 0}"))


def _no_suv(reason: str) -> MFMError:
    return MFMError(
        "E_HEADER",
        f"the PET series cannot be converted to SUV: {reason}. Export it with these fields, or give it as NIfTI.",
    )


def describe(headers: Sequence[Header], place: Arrangement) -> str:
    """Return size and voxel size of a series for a list, e.g. ``CT 512 x 512 x 90, 0.98 x 0.98 x 3.27 mm``."""
    size = " x ".join(str(number) for number in (headers[0]["columns"], headers[0]["rows"], len(headers)))
    return f"{headers[0]['modality']} {size}, {show_numbers(np.array(place.spacing))} mm"
