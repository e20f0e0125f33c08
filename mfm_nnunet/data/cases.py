"""Cases: readable, unique names, channels and subjects; detection of masks mistaken for scans."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import ending_of, is_file_name

ROOM_FOR_ENDING = 40
"""Bytes of a file name reserved for endings and for the names of unfinished files."""
MAX_NAME = 120
"""Longest name of a case; file systems allow 255 bytes and endings are added."""
PICTURES = frozenset((".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"))
"""Endings of flat images; TIFF may also hold a stack."""
_SKIPPED_FOLDERS = {"__MACOSX"}


@dataclass(frozen=True)
class Case:
    """One image (with all its channels) and, in a labelled dataset, its label map."""

    name: str
    """Unique within the dataset, also without regard to case; the stem of the preprocessed files."""
    images: tuple[Path, ...]
    """One file per channel."""
    label: Path | None = None
    subject: str = ""
    """Cases of one subject are never split between training and validation."""
    modality: str = ""
    """Kind of image in the words of the source ("T1w", "CT"); "" if unknown."""
    dataset: str = ""
    """Name of the original dataset within a collection; "" if unknown."""
    anonymisation_mask: Path | None = None
    """Mask on the image's grid, above 0 where voxels were altered to prevent identification."""
    slices: tuple[Path, ...] = ()
    """Files of the DICOM series that the image is read from, in spatial order; ``images`` then holds its name."""

    def __post_init__(self) -> None:
        if not self.subject:
            object.__setattr__(self, "subject", self.name)


def group_channels(folder: Path, file_ending: str = "") -> dict[str, dict[int, Path]]:
    """Group the files ``NAME_0000.nii.gz`` of a folder: {name: {channel: file}}; ``file_ending`` "" for any image."""
    groups: dict[str, dict[int, Path]] = {}
    strange, twice = [], []
    for file in sorted(folder.iterdir()):
        ending = file_ending or ending_of(file)
        if file.name.startswith(".") or not ending or not (file_ending == "" or file.name.endswith(ending)):
            continue
        match = re.fullmatch(r"(.+)_(\d{4})", file.name[: -len(ending)], re.DOTALL)
        if not match:
            strange.append(file.name)
        elif (first := groups.setdefault(match[1], {}).setdefault(int(match[2]), file)) != file:
            twice.append(f"  {first.name} and {file.name}")
    if strange:
        raise MFMError(
            "E_FORMAT",
            f"{folder}: {len(strange)} names do not end with a channel as in NAME_0000.nii.gz, e.g. {strange[0]}. "
            "Rename them.",
        )
    if twice:
        raise MFMError(
            "E_CHANNELS",
            f"{folder}: {len(twice)} channels have two files each. Move one of the two away, or rename it:\n"
            + "\n".join(twice),
        )
    return groups


def require_channels(folder: Path, groups: dict[str, dict[int, Path]], num_channels: int) -> None:
    """Require exactly the channels 0 to ``num_channels`` - 1 of each case; E_CHANNELS lists all deviations."""
    wanted = set(range(num_channels))
    lines = []
    for name, files in groups.items():
        if lacking := sorted(wanted - set(files)):
            lines.append(f"  {name}: missing {', '.join(f'{name}_{channel:04d}' for channel in lacking)}")
        if surplus := sorted(set(files) - wanted):
            lines.append(f"  {name}: unexpected {', '.join(files[channel].name for channel in surplus)}")
    if lines:
        raise MFMError(
            "E_CHANNELS",
            f"{folder}: {len(lines)} cases do not have {num_channels} channels. Add or remove the files:\n"
            + "\n".join(lines),
        )


def named(relative: Sequence[PurePath], images: Sequence[tuple[Path, ...]]) -> list[Case]:
    """Make cases named after the file stem, or after the whole relative path if the stem is not unique."""
    stems = [safe_name(stem_of(path)) for path in relative]
    longer = ["__".join(safe_name(part) for part in (*path.parts[:-1], stem_of(path))) for path in relative]
    uses = Counter(stem.casefold() for stem in stems)
    candidates = [stem if uses[stem.casefold()] == 1 else full for stem, full in zip(stems, longer)]
    # Names that still collide (same stem with two endings, or differing only in case) get a digest of their path.
    uses = Counter(name.casefold() for name in candidates)
    names = [
        name if uses[name.casefold()] == 1 and len(name) <= MAX_NAME else with_digest(name, path.as_posix())
        for name, path in zip(candidates, relative)
    ]
    # A listing may give two files the same name and place.
    uses = Counter(name.casefold() for name in names)
    names = [
        name if uses[name.casefold()] == 1 else with_digest(name, str(files[0])) for name, files in zip(names, images)
    ]
    return [Case(name, files, None, subject_of(path) or name) for name, path, files in zip(names, relative, images)]


def with_digest(name: str, path: str) -> str:
    """Append 8 hexadecimal digits of a hash of ``path`` to ``name``, shortened if necessary."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}_{digest}"


def subject_of(path: PurePath) -> str:
    """Return the BIDS subject ``sub-XX`` in a path; "" without one.

    Equal names in different folders count as one person, as in derivatives or one folder per modality. If they are
    different people, only some freedom in splitting is lost.
    """
    matches = (re.match(r"sub-[A-Za-z0-9]+", part) for part in path.parts)
    return next((match[0] for match in matches if match), "")


def is_case_name(name: Any) -> bool:
    """Return whether a value can be the stem of nnU-Net's files; NAME_seg.b2nd is the label map of NAME."""
    if not isinstance(name, str) or not name or name.endswith("_seg") or name.startswith("."):
        return False
    return is_file_name(f"{name}{'':_<{ROOM_FOR_ENDING}}")


def spelling_of(name: str) -> str:
    """Normalise a name as file systems do that ignore letter case or Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def stem_of(path: PurePath) -> str:
    """Return a file name without its image ending; ``.nii.gz`` is one ending."""
    return path.name[: len(path.name) - len(ending_of(Path(path.name)))]


def safe_name(text: str) -> str:
    """Reduce a text to ASCII letters, digits, ``.``, ``-``, ``+`` and ``_``, which every file system can store."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "_", plain).lstrip(".-") or "case"
    # nnU-Net takes NAME_seg.b2nd for the label map of NAME.
    return plain + "_image" if plain.lower().endswith("_seg") else plain


def image_files(source: Path) -> Iterator[Path]:
    """Yield all files below ``source`` with an image ending, following links."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # A link that leads back up.
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        for name in files:
            if not name.startswith(".") and ending_of(Path(name)):
                yield Path(folder, name)


_WORDS = r"(?:masks?|segs?|segmentations?|labels?|labelmaps?|gt|ground[_ -]?truths?|annotations?)"
_STEM = re.compile(rf"(?:.*[_\-. ])?{_WORDS}(?:[_\-. ]?\d+)?", re.IGNORECASE | re.DOTALL)
_FOLDER = re.compile(rf"(?:.*[_\-. ])?{_WORDS}(?:[_\-. ]?(?:tr|ts|\d+))?", re.IGNORECASE | re.DOTALL)
_WITHOUT = re.compile(r"(?:^|[_\-. ])(?:no|non|without)[_\-. ]", re.IGNORECASE)

FEW_VALUES = 20
"""An image with at most this many distinct whole numbers, the smallest 0, is a mask. Real 8-bit scans have over 100."""
MOST_LABELS = 256
SMOOTH = 0.85
"""An image with up to ``MOST_LABELS`` whole numbers is a mask if this share of its voxels equals the next one.

Label maps reach 0.9 and more. Ultrasound in 8 bits, the smoothest scans measured, reaches 0.6.
"""
_SAMPLE = 1 << 18
"""Number of voxels checked first. An image that looks like a mask in these is checked as a whole."""


def is_named_mask(relative: PurePath) -> bool:
    """Return whether the name of an image, or of a folder above it, marks it as a mask.

    ``relative`` is its path below the source: ``masks/a.nii.gz``, ``labelsTr/a.nii.gz``, ``a_seg.nii.gz``,
    ``p1/segmentation.nii.gz``, ``label0001.nii.gz``. Names such as ``no_mask`` are excluded.
    """
    names = [(_FOLDER, folder) for folder in relative.parts[:-1]] + [(_STEM, stem_of(relative))]
    return any(pattern.fullmatch(name) and not _WITHOUT.search(name) for pattern, name in names)


def require_scan(file: Path, image_CDHW: np.ndarray) -> None:
    """Raise MFMError (E_MASK) if an image of a corpus has the values of a mask or label map."""
    lines = image_CDHW.reshape(-1, image_CDHW.shape[-1])
    sample = lines[:: max(1, lines.size // _SAMPLE)]
    if _count_labels(sample) and (number := _count_labels(lines)):
        raise MFMError(
            "E_MASK",
            f"{file}: this is a mask, not a scan: its voxels have only {number} different whole values. Remove it "
            "from the source.",
        )


def _count_labels(lines: np.ndarray) -> int:
    """Count the distinct values of a label map; 0 for a scan."""
    if lines.min() != 0 or not (lines == np.rint(lines)).all():
        return 0
    number = len(np.unique(lines))
    if number <= FEW_VALUES:
        return number
    before, after = lines[:, :-1], lines[:, 1:]
    is_inside = after != 0
    is_smooth = np.count_nonzero((before == after) & is_inside) >= SMOOTH * np.count_nonzero(is_inside)
    return number if number <= MOST_LABELS and is_smooth else 0
