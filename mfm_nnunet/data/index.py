"""From a folder tree, a CSV or an nnU-Net raw folder to a list of cases with unique, readable names."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from mfm_nnunet.data.integrity import IMAGE_ENDINGS, ending_of
from mfm_nnunet.errors import MFMError

MAX_NAME = 120
"""Longest name of a case; file systems allow 255 bytes and endings are added."""
_SKIPPED_FOLDERS = {"labelsTr", "labelsTs", "__MACOSX"}
_RAW_FOLDERS = ("imagesTr", "imagesTs")


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

    def __post_init__(self) -> None:
        if not self.subject:
            object.__setattr__(self, "subject", self.name)


def index_source(source: Path) -> list[Case]:
    """The cases of a folder tree, a CSV file, an nnU-Net raw folder or a single image; absolute paths, sorted.

    A folder tree: each image file is a case; hidden files and nnU-Net's label folders are left out. A folder with
    ``imagesTr`` or ``imagesTs`` (or one of these itself): nnU-Net's ``_0000`` names, channels grouped. A CSV: column
    ``image``, or ``image_0``, ``image_1``, ...; optional ``case`` and ``subject``; paths relative to the file.
    ``sub-XX`` in a path names the subject, as in BIDS.

    Raises MFMError: E_NOT_FOUND (no such source, no image in it, files that a CSV names), E_CHANNELS (missing channel
    files, all listed), E_FORMAT (a CSV without the columns), E_CONFIG (a CSV with a case name twice).
    """
    source = Path(os.path.abspath(source.expanduser()))
    if source.is_dir():
        images = next((source / name for name in _RAW_FOLDERS if (source / name).is_dir()), source)
        cases = _raw(images) if images.name in _RAW_FOLDERS and _has_channels(images) else _tree(images)
    elif not source.exists():
        raise MFMError("E_NOT_FOUND", f"{source}: no such folder or file. Check the path.")
    elif source.suffix.lower() == ".csv":
        cases = _table(source)
    elif ending_of(source):
        cases = named([PurePath(source.name)], [(source,)])
    else:
        raise MFMError("E_FORMAT", f"{source}: expected a folder, a CSV file or an image ({' '.join(IMAGE_ENDINGS)}).")
    if not cases:
        raise MFMError("E_NOT_FOUND", f"{source}: no image in it. Known endings: {' '.join(IMAGE_ENDINGS)}")
    return cases


def group_channels(folder: Path, file_ending: str = "") -> dict[str, dict[int, Path]]:
    """The files ``NAME_0000.nii.gz`` of a folder as {name: {channel: file}}, sorted; ``file_ending`` "" for any image.

    Raises MFMError (E_FORMAT) when image files do not have such names, listing them.
    """
    groups: dict[str, dict[int, Path]] = {}
    strange = []
    for file in sorted(folder.iterdir()):
        ending = file_ending or ending_of(file)
        if file.name.startswith(".") or not ending or not file.name.lower().endswith(ending.lower()):
            continue
        match = re.fullmatch(r"(.+)_(\d{4})", file.name[: -len(ending)], re.DOTALL)
        if match:
            groups.setdefault(match[1], {})[int(match[2])] = file
        else:
            strange.append(file.name)
    if strange:
        raise MFMError(
            "E_FORMAT",
            f"{folder}: {len(strange)} names do not end with a channel as in NAME_0000.nii.gz, e.g. {strange[0]}. "
            "Rename them.",
        )
    return groups


def require_channels(folder: Path, groups: dict[str, dict[int, Path]], num_channels: int) -> None:
    """Every case must have the channels 0 to ``num_channels`` - 1; MFMError (E_CHANNELS) lists all that lack."""
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
    """Cases named after the file stem, or after the whole relative path where the stem is not unique."""
    stems = [_safe(_stem(path)) for path in relative]
    longer = ["__".join(_safe(part) for part in (*path.parts[:-1], _stem(path))) for path in relative]
    uses = Counter(stem.casefold() for stem in stems)
    candidates = [stem if uses[stem.casefold()] == 1 else full for stem, full in zip(stems, longer)]
    # Names that still agree (two endings of one stem, letters of another case) get a digest of their path.
    uses = Counter(name.casefold() for name in candidates)
    names = [
        name if uses[name.casefold()] == 1 and len(name) <= MAX_NAME else with_digest(name, path.as_posix())
        for name, path in zip(candidates, relative)
    ]
    return [Case(name, files, None, subject_of(path) or name) for name, path, files in zip(names, relative, images)]


def with_digest(name: str, path: str) -> str:
    """``name``, shortened if need be, with 8 hexadecimal digits that tell it from others."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}_{digest}"


def subject_of(path: PurePath) -> str:
    """The BIDS subject ``sub-XX`` in a path; "" without one.

    Equal names in different folders count as one person: they often are (derivatives, one folder per modality), and
    if not, nothing is lost but some freedom in splitting.
    """
    matches = (re.match(r"sub-[A-Za-z0-9]+", part) for part in path.parts)
    return next((match[0] for match in matches if match), "")


def _stem(path: PurePath) -> str:
    return path.name[: len(path.name) - len(ending_of(Path(path.name)))]


def _safe(text: str) -> str:
    """ASCII letters, digits, ``.``, ``-``, ``+`` and ``_``: a name that every file system takes and tells apart."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "_", plain).lstrip(".-") or "case"
    # nnU-Net takes NAME_seg.b2nd for the label map of NAME.
    return plain + "_image" if plain.lower().endswith("_seg") else plain


def _tree(source: Path) -> list[Case]:
    files = sorted(_walk(source), key=lambda file: file.relative_to(source).as_posix())
    return named([file.relative_to(source) for file in files], [(file,) for file in files])


def _walk(source: Path) -> Iterator[Path]:
    """All image files below ``source``, links followed; whatever has an image's name, so the gate can report it."""
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


def _has_channels(folder: Path) -> bool:
    """Whether any file is named ``NAME_0000``; the Medical Segmentation Decathlon has such folders without channels."""
    return any(re.search(r"_0000$", _stem(file)) for file in folder.iterdir() if ending_of(file))


def _raw(folder: Path) -> list[Case]:
    groups = group_channels(folder)
    require_channels(folder, groups, len({channel for files in groups.values() for channel in files}))
    return named(
        [PurePath(name) for name in groups], [tuple(files[c] for c in sorted(files)) for files in groups.values()]
    )


def _table(file: Path) -> list[Case]:
    columns, rows = _read_table(file)
    problems = [
        f"  line {line}: {f'no such file {row[column]}' if row[column] else f'{column} is empty'}"
        for line, row in enumerate(rows, start=2)
        for column in columns
        if not row[column] or not os.path.lexists(_absolute(row[column], file.parent))
    ]
    if problems:
        raise MFMError("E_NOT_FOUND", f"{file}: {len(problems)} images are missing:\n" + "\n".join(problems))
    images = [tuple(_absolute(row[column], file.parent) for column in columns) for row in rows]
    if not images:
        return []
    root = os.path.commonpath([files[0].parent for files in images])
    return _with_columns(file, rows, named([files[0].relative_to(root) for files in images], images))


def _read_table(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns that hold images, and the rows, with trimmed names in lower case."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MFMError("E_FORMAT", f"{file}: cannot be read as a CSV table ({error}).") from error
    first = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    header = [name.strip().lower() for name in reader.fieldnames or []]
    rows = [
        {name: (row.get(key) or "").strip() for name, key in zip(header, reader.fieldnames or [])} for row in reader
    ]
    channels = sorted((name for name in header if re.fullmatch(r"image_\d+", name)), key=lambda name: int(name[6:]))
    columns = ["image"] if "image" in header else channels
    if not columns:
        found = f"only {', '.join(header)}" if header else "and no first line"
        raise MFMError("E_FORMAT", f"{file}: no column 'image' or 'image_0', {found}. Name the column of the paths.")
    return columns, rows


def _absolute(path: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / Path(path).expanduser()))


def _with_columns(file: Path, cells: list[dict[str, str]], cases: list[Case]) -> list[Case]:
    """The cases with the names and subjects that the table gives."""
    given = [_safe(row["case"]) if row.get("case") else case.name for row, case in zip(cells, cases)]
    uses = Counter(name.casefold() for name in given)
    twice = sorted({name for name in given if uses[name.casefold()] > 1})
    if twice:
        raise MFMError("E_CONFIG", f"{file}: these cases are named twice: {', '.join(twice)}.")
    return [
        Case(name, case.images, None, row.get("subject") or (case.subject if case.subject != case.name else name))
        for name, row, case in zip(given, cells, cases)
    ]
