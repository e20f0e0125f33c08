"""Find the DICOM series of a folder tree, a zip archive or a file, and name them without naming a patient.

A series is called after its modality and a hash of its SeriesInstanceUID, so it has the same name wherever it is found.
Nothing that could identify a person is written, except into a key file that the user asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from mfm_nnunet.data.cases import Case
from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.files import atomic_write, ending_of, write_csv
from mfm_nnunet.images import decoder, dicom
from mfm_nnunet.images.geometry import properties_for
from mfm_nnunet.images.reading import read_series

ENDINGS = (".dcm", ".ima", ".dicom")
FILES_AT_ONCE = 64
"""Number of headers that a child process reads per request."""
MOST_ENTRIES = 200_000
MOST_RATIO = 200
"""Limits of a zip archive: its files, and how much larger than the archive they may be."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Series:
    """One series: its files in the order of their slices, or the reason why it is not read."""

    name: str
    uid: str
    study: str
    subject: str
    """Name of the patient's first series."""
    modality: str
    """``CT``, ``MR``, ``PET`` and so on."""
    files: tuple[Path, ...]
    description: str
    failure: CaseFailure | None = None

    @property
    def case(self) -> Case:
        """The series as a case without a file of its own."""
        return Case(self.name, (Path(self.name),), None, self.subject, self.modality, slices=self.files)


@contextlib.contextmanager
def find_series(source: Path, choice: Sequence[str] = ()) -> Iterator[list[Series]]:
    """Yield the series below ``source``, a folder, a zip archive or one file, sorted by name; empty without DICOM.

    ``choice`` selects modalities or names. The content of an archive is unpacked into a private folder, which is
    removed at the end. Raises MFMError: E_NOT_FOUND (pydicom missing, no series of the choice), E_TOO_LARGE and
    E_FORMAT (archives).
    """
    source = Path(os.path.abspath(os.path.expanduser(source)))
    with contextlib.ExitStack() as stack:
        if source.is_file() and zipfile.is_zipfile(source):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mfm_dicom_")))
            _unpack_archive(source, folder)
            files = sorted(folder.iterdir())
        else:
            files = _dicom_files(source)
        series = _group_series(files) if files else []
        yield _chosen(source, series, choice)


def _dicom_files(source: Path) -> list[Path]:
    """Return the DICOM files below ``source``, and warn of those that only have the ending."""
    found: list[Path] = []
    without: list[Path] = []
    for file in _all_files(source):
        if is_dicom(file):
            found.append(file)
        elif file.suffix.lower() in ENDINGS:
            without.append(file)
    if without:
        _log.warning("%d files end as DICOM but lack its mark (DICM), so they are left out", len(without))
    if found:
        dicom.load_pydicom()
    return found


def is_dicom(file: Path) -> bool:
    """Return whether a file has DICOM's mark; pipes and devices are not opened, images of known endings neither."""
    try:
        if ending_of(file) or not file.is_file():
            return False
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _all_files(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith(".") and name != "DICOMDIR")


def _unpack_archive(archive: Path, folder: Path) -> None:
    """Unpack the DICOM files of an archive under numbers as names, so that no name in it can lead elsewhere."""
    try:
        with zipfile.ZipFile(archive) as content:
            entries = [entry for entry in content.infolist() if not entry.is_dir()]
            room = min(archive.stat().st_size * MOST_RATIO, shutil.disk_usage(folder).free // 2)
            if len(entries) > MOST_ENTRIES or sum(entry.file_size for entry in entries) > room:
                raise MFMError(
                    "E_TOO_LARGE", f"{archive}: it unpacks to more than is safe or fits. Unpack it yourself."
                )
            for number, entry in enumerate(entries):
                with content.open(entry) as stream:
                    start = stream.read(132)
                    if start[128:] != b"DICM" or Path(entry.filename).name == "DICOMDIR":
                        continue
                    with open(folder / f"{number:06d}", "xb") as file:
                        file.write(start)
                        room = _copy(stream, file, room, archive)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise MFMError("E_FORMAT", f"{archive}: the archive is damaged or encrypted. Unpack it yourself.") from error


def _copy(stream: Iterator[bytes] | zipfile.ZipExtFile, file: object, room: int, archive: Path) -> int:
    """Copy a stream and return the bytes that may still follow; the sizes that an archive declares may be wrong."""
    while block := stream.read(1 << 20):  # type: ignore[union-attr]
        room -= len(block)
        if room < 0:
            raise MFMError("E_TOO_LARGE", f"{archive}: it unpacks to more than it declares. Do not trust this archive.")
        file.write(block)  # type: ignore[attr-defined]
    return room


def _group_series(files: Sequence[Path]) -> list[Series]:
    """Read all headers and return the series of scans, with a message about everything else."""
    headers = _read_headers(files)
    unread = headers.count(None)
    if unread:
        _log.warning("%d DICOM files have no readable header and are left out. Copy them again.", unread)
    pairs = [(file, header) for file, header in zip(files, headers) if header is not None]
    others = Counter(header["modality"] or "?" for _, header in pairs if not dicom.is_scan(header))
    if others:
        listing = ", ".join(f"{count} {modality}" for modality, count in sorted(others.items()))
        _log.info("DICOM files that are no scans (reports, segmentations, localizers) are left out: %s", listing)
    groups: dict[str, list[tuple[Path, dicom.Header]]] = {}
    for file, header in pairs:
        if dicom.is_scan(header):
            is_single = header["position"] is None  # each X-ray of a series is an image of its own
            groups.setdefault(header["instance" if is_single else "series"], []).append((file, header))
    named = sorted((_name(uid, group[0][1]), uid, group) for uid, group in groups.items())
    first: dict[str, str] = {}
    for name, _, group in named:
        first.setdefault(group[0][1]["patient"], name)
    return [_series(name, uid, first[group[0][1]["patient"]], group) for name, uid, group in named]


def _read_headers(files: Sequence[Path]) -> list[dicom.Header | None]:
    found: list[dicom.Header | None] = []
    for start in range(0, len(files), FILES_AT_ONCE):
        some = [str(file) for file in files[start : start + FILES_AT_ONCE]]
        try:
            found += decoder.call(Path("DICOM headers"), {"task": "read_headers", "files": some}).content["answer"]
        except MFMError as error:
            if error.code not in ("E_READER_CRASH", "E_READER_TIMEOUT", "E_READER_MEMORY"):
                raise
            for file in some:  # one of them ended the child
                try:
                    request = {"task": "read_headers", "files": [file]}
                    found += decoder.call(Path("DICOM header"), request).content["answer"]
                except MFMError:
                    found.append(None)
    return found


def _name(uid: str, header: dicom.Header) -> str:
    modality = re.sub(r"[^a-z0-9]", "", header["modality"].lower())[:4] or "series"
    return f"{modality}_{hashlib.sha256(uid.encode()).hexdigest()[:12]}"


def _series(name: str, uid: str, subject: str, group: Sequence[tuple[Path, dicom.Header]]) -> Series:
    headers = [header for _, header in group]
    own = str(headers[0]["modality"])
    modality = {"PT": "PET", "CR": "Xray", "DX": "Xray"}.get(own, own)
    series = Series(name, uid, headers[0]["study"], subject, modality, tuple(file for file, _ in group), "")
    try:
        place = dicom.arrange(headers)
    except MFMError as error:
        failure = CaseFailure(name, error.code, f"{name}: {error.message}")
        return dataclasses.replace(series, failure=failure, description=f"{modality}, {len(group)} files")
    files = tuple(group[index][0] for index in place.order)
    return dataclasses.replace(series, files=files, description=dicom.describe(headers, place))


def _chosen(source: Path, series: list[Series], choice: Sequence[str]) -> list[Series]:
    wanted = {word.casefold() for word in choice} - {"all"}
    if not wanted or not series:
        return series
    found = [item for item in series if {item.name.casefold(), item.modality.casefold()} & wanted]
    if not found:
        raise MFMError(
            "E_NOT_FOUND",
            f"--series {' '.join(choice)}: there is no such series in {source.name}:\n{list_series(series)}",
        )
    return found


def require_choice(series: Sequence[Series], choice: Sequence[str]) -> None:
    """Raise MFMError (E_DICOM_SERIES) if a study has several series and the user did not choose."""
    uses = Counter(item.study for item in series)
    several = [item for item in series if uses[item.study] > 1]
    if several and not choice:
        raise MFMError(
            "E_DICOM_SERIES",
            f"{len(several)} series are of studies with several. Choose with --series: a modality, names, or all:\n"
            f"{list_series(several)}",
        )


def list_series(series: Sequence[Series]) -> str:
    """Return a line per series: its name, modality, size and voxel size."""
    return "\n".join(f"  {item.name}: {item.description}" for item in series)


def write_key(file: Path, series: Sequence[Series], source: Path) -> None:
    """Write a CSV that leads from names of series to UIDs and folders, or the archive; it identifies patients."""
    is_folder = source.is_dir()
    rows = [(item.name, item.uid, str(item.files[0].parent if is_folder else source)) for item in series]
    write_csv(file, ("name", "SeriesInstanceUID", "folder"), rows)
    _log.warning("%s leads from names to patients: keep it where the scans are kept.", file)


def convert_series(series: Series, target: Path) -> Path:
    """Write a series as a compressed NIfTI file without any text in its header; equal content is left as it is.

    Raises MFMError as :func:`mfm_nnunet.images.reading.read_series`; the message names the series.
    """
    image_CDHW, properties = read_series(series.name, series.files, "SimpleITKIO")
    affine = properties_for("NibabelIO", properties)["nibabel_stuff"]["original_affine"]
    voxels_XYZ = image_CDHW[0].T
    if len(properties["sitk_stuff"]["spacing"]) == 2:
        voxels_XYZ = voxels_XYZ[..., 0]
    if np.abs(voxels_XYZ).max() < 1 << 15 and np.array_equal(voxels_XYZ, np.rint(voxels_XYZ)):
        voxels_XYZ = voxels_XYZ.astype(np.int16)
    image = nibabel.Nifti1Image(voxels_XYZ, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    content = gzip.compress(image.to_bytes(), 4, mtime=0)
    if not target.is_file() or target.read_bytes() != content:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            file.write(content)
    return target
