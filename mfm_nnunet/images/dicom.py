"""Recognise DICOM, even without an ending or in a zip archive, to explain that it must be converted first."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

CONVERT = "Convert DICOM to NIfTI first: pip install dcm2niix; dcm2niix -z y -o nifti dicom/"
_ENDINGS = (".dcm", ".ima")
_MOST_FILES = 1000
"""Limit of files to examine; a folder of another kind may hold millions."""


def find_dicom(place: Path) -> str:
    """Return the name of a DICOM file: ``place`` itself, or one in that folder or zip archive; "" if there is none.

    Only the first files of a large folder or archive are examined.
    """
    if os.path.isfile(place) and zipfile.is_zipfile(place):
        return _find_in_archive(place)
    for number, file in enumerate(_files(place)):
        if number >= _MOST_FILES:
            break
        if file.suffix.lower() in _ENDINGS or _is_dicom(file):
            return str(file)
    return ""


def advice(place: Path) -> str:
    """Return sentences about DICOM files found in ``place``, with a trailing blank; "" if there are none."""
    found = find_dicom(place)
    return f"It holds DICOM, e.g. {found}, which is not read. {CONVERT} " if found else ""


def _files(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        yield place
    for folder, folders, names in os.walk(place):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _is_dicom(file: Path) -> bool:
    """Return whether a regular file has the DICOM mark; pipes and devices are not opened."""
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as stream:
            return _has_mark(stream)
    except OSError:
        return False


def _has_mark(stream: IO[bytes]) -> bool:
    return stream.read(132)[128:] == b"DICM"


def _find_in_archive(archive: Path) -> str:
    try:
        with zipfile.ZipFile(archive) as content:
            for entry in content.infolist()[:_MOST_FILES]:
                is_named = entry.filename.lower().endswith(_ENDINGS)
                if not entry.is_dir() and (is_named or _has_mark(content.open(entry))):
                    return f"{archive}: {entry.filename}"
    except (OSError, RuntimeError, NotImplementedError, ValueError, zipfile.BadZipFile, zipfile.LargeZipFile):
        pass  # damaged or encrypted: its content is unknown
    return ""
