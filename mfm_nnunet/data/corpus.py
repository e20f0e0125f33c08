"""Register corpora of unlabelled images in place; list the cases of corpora and of nnU-Net raw datasets.

A corpus is a dataset folder with ``dataset.json`` and ``corpus.json``. The latter holds the paths of the scans. It
stays on this computer; checkpoints contain only a hash of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mfm_nnunet import dataset as dataset_jsons
from mfm_nnunet.data.cases import PICTURES, Case, is_case_name, is_named_mask, subject_of, with_digest
from mfm_nnunet.data.labelled import IMAGES, raw_cases
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import ending_of, read_json, write_json

FORMAT = 1
"""Version of corpus.json."""
_OPTIONAL = ("modality", "dataset", "anonymisation_mask")
"""Fields of a case that a corpus.json may lack."""
_log = logging.getLogger(__name__)


def register_corpus(
    raw_root: Path,
    dataset_name: str,
    cases: list[Case],
    channel_names: list[str],
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``dataset.json`` and ``corpus.json`` of a corpus into ``raw_root/dataset_name``; return the folder.

    A corpus may be registered again if the new cases include all its existing scans. New scans are added, known ones
    keep their names, and deleted ones are dropped.

    Raises MFMError: E_EXISTS (the folder holds a labelled dataset or other scans), E_CONFIG (a name other than
    DatasetXXX_Name), E_CHANNELS (a case without one file per channel name), E_FORMAT (volumes and pictures mixed
    without the setting ``slices``),
    E_NOT_FOUND (no cases).
    """
    if not re.fullmatch(r"Dataset\d{3}_[A-Za-z0-9_.+-]+", dataset_name):
        raise MFMError("E_CONFIG", f"{dataset_name}: the name must be like Dataset701_Name (letters, digits, _ . + -).")
    if not cases:
        raise MFMError("E_NOT_FOUND", f"{dataset_name}: there is no image to register.")
    settings = dict(settings or {})
    _require_equal_channels(cases, 1 if "colour" in settings else len(channel_names))
    folder = raw_root / dataset_name
    if is_corpus(folder):
        cases = _update(folder, cases)
    elif (folder / "dataset.json").exists():
        raise MFMError("E_EXISTS", f"{folder}: this is a labelled dataset. Choose another number for the corpus.")
    dataset_json: dict[str, Any] = {
        "channel_names": {str(index): name for index, name in enumerate(channel_names)},
        "labels": {"background": 0},
        "numTraining": len(cases),
        **file_format(cases, "slices" in settings),
        **({"mfm": settings} if settings else {}),
    }
    folders = [os.path.dirname(file) for case in cases for file in case.images]
    corpus = {"format": FORMAT, "source": os.path.commonpath(folders), "cases": [_entry(case) for case in cases]}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "corpus.json", corpus)
    write_json(folder / "dataset.json", dataset_json)
    return folder


def read_settings(dataset_folder: Path) -> dict[str, Any]:
    """Return the settings of a registered corpus, ``mfm`` in its dataset.json; empty without a corpus."""
    return dict(read_dataset_json(dataset_folder).get("mfm", {})) if is_corpus(dataset_folder) else {}


def load_cases(dataset_folder: Path, need_mapped_files: bool = True) -> list[Case]:
    """List the cases of a registered corpus or of an nnU-Net raw dataset, sorted by name.

    Missing scans of a corpus are reported as bad cases when they are read. A labelled dataset must be complete; without
    ``need_mapped_files``, files named by a "dataset" map may be missing. Raises MFMError: E_FORMAT (a damaged JSON
    file, or one that breaks nnU-Net's rules), and as :func:`mfm_nnunet.data.labelled.raw_cases`.
    """
    if is_corpus(dataset_folder):
        return _corpus_cases(dataset_folder)
    return raw_cases(dataset_folder, read_dataset_json(dataset_folder), need_mapped_files)


def read_dataset_json(dataset_folder: Path) -> dict[str, Any]:
    """Read ``dataset.json`` of a raw folder."""
    file = dataset_folder / "dataset.json"
    content = dataset_jsons.read_dataset_json(file, "Every dataset needs one; repair it or register the images again.")
    if twice := _names_given_twice(file):
        raise MFMError(
            "E_FORMAT",
            f"{file}: '{twice[0]}' appears twice, and only the last one would count. Rename or remove one.",
        )
    return content


def _names_given_twice(file: Path) -> list[str]:
    """Find duplicate keys in a JSON file; the parser would drop one of two such cases or labels."""
    found: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

    json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=note)
    return found


def is_corpus(dataset_folder: Path) -> bool:
    """Return whether a dataset folder is a registered corpus of unlabelled images."""
    return (dataset_folder / "corpus.json").is_file()


def corpus_hash(cases: Sequence[Case], sizes: Mapping[str, Mapping[str, list[int]]] | None = None) -> str:
    """Hash the names, modalities, datasets and file sizes of the cases. The hash reveals none of its inputs.

    ``sizes`` holds known file sizes by case (``images`` and each kind of mask), so preprocessed scans keep their hash
    after the raw files are gone. The sizes of all other cases are read from disk.
    """
    return _hash_lines([_hash_line(case, (sizes or {}).get(case.name, {})) for case in cases])


def _hash_line(case: Case, known: Mapping[str, list[int]]) -> str:
    images = known.get("images") or [_status(file)[0] for file in case.images]
    mask = case.anonymisation_mask
    size = None if mask is None else known["anonymised"][0] if "anonymised" in known else _status(mask)[0]
    return f"{case.name}\0{images}" + _more(case, size)


def signature(cases: Sequence[Case]) -> str:
    """Hash the names, paths, sizes and modification times of all files, to detect any change."""
    lines = []
    for case in cases:
        files = [*case.images, *([case.label] if case.label is not None else [])]
        mask = case.anonymisation_mask
        own = f"{case.name}\0{case.subject}\0{[(str(file), *_status(file)) for file in files]}"
        lines.append(own + _more(case, None if mask is None else (str(mask), *_status(mask))))
    return _hash_lines(lines)


def _more(case: Case, mask: Any) -> str:
    """Format a case's modality, dataset and mask for hashing; "" without any, because stored digests depend on it."""
    known = (case.modality, case.dataset, {} if mask is None else {"anonymised": mask})
    return f"\0{known}" if any(known) else ""


def _hash_lines(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def _status(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _require_equal_channels(cases: Sequence[Case], num_channels: int) -> None:
    """Require one file per channel, except for colour pictures, which hold all channels in one file."""
    colour = num_channels > 1 and all(len(case.images) == 1 and ending_of(case.images[0]) in PICTURES for case in cases)
    wrong = [f"  {case.name}: {len(case.images)}" for case in cases if len(case.images) != num_channels]
    if wrong and not colour:
        raise MFMError(
            "E_CHANNELS", f"{len(wrong)} cases do not have {num_channels} channel files:\n" + "\n".join(wrong)
        )


def _update(folder: Path, cases: list[Case]) -> list[Case]:
    """Return the new cases of a registered corpus. Known scans keep their names, which preprocessed files bear."""
    known = {case.images: case for case in _corpus_cases(folder)}
    new = {case.images for case in cases}
    gone = [case for images, case in known.items() if images not in new]
    source = _read_corpus(folder)["source"]
    there = [case for case in gone if all(file.exists() for file in case.images)]
    masks = [case for case in there if is_named_mask(PurePath(os.path.relpath(case.images[0], source)))]
    others = [case for case in there if case not in masks]
    if others:
        raise MFMError(
            "E_EXISTS",
            f"{folder}: is registered with {len(known)} scans from {source}, and "
            f"{len(others)} of them, e.g. {others[0].images[0]}, are not in the new source. Choose another number, or "
            "delete this folder if the old corpus is not needed.",
        )
    if masks:
        text = "%s: %d images that were registered as scans are named as masks and are dropped, e.g. %s"
        _log.warning(text, folder, len(masks), masks[0].images[0])
    if lost := [case for case in gone if case not in there]:
        _log.warning("%s: %d scans no longer exist and are dropped, e.g. %s", folder, len(lost), lost[0].images[0])
    taken = {known[images].name.casefold() for images in new & set(known)}
    result = []
    for case in cases:
        name = case.name
        if case.images in known:
            name = known[case.images].name
        elif name.casefold() in taken:
            name = with_digest(name, str(case.images[0]))
        subject = case.subject if case.subject != case.name else name
        result.append(dataclasses.replace(case, name=name, subject=subject))
    return result


def file_format(cases: Sequence[Case], may_mix: bool) -> dict[str, str]:
    """Choose the most common ``file_ending``, and a reader if stock nnU-Net would not find one for all files."""
    endings = Counter(ending_of(file) for case in cases for file in case.images)
    unknown = [str(file) for case in cases for file in case.images if not ending_of(file)]
    if unknown:
        raise MFMError("E_FORMAT", f"{unknown[0]}: not a known image format.")
    result = {"file_ending": endings.most_common(1)[0][0]}
    if not set(endings) & PICTURES:
        if len(endings) > 1 or set(endings) & {".mhd", ".nhdr"}:
            is_nifti = set(endings) <= {".nii", ".nii.gz"}
            result["overwrite_image_reader_writer"] = "NibabelIO" if is_nifti else "SimpleITKIO"
    elif set(endings) <= PICTURES:
        if (len(endings) > 1 and not set(endings) <= {".tif", ".tiff"}) or set(endings) & {".jpg", ".jpeg"}:
            result["overwrite_image_reader_writer"] = "NaturalImage2DIO"
    elif not may_mix:
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
        rarest = endings.most_common()[-1][0]
        files = [str(file) for case in cases for file in case.images if ending_of(file) == rarest]
        raise MFMError(
            "E_FORMAT",
            f"volumes and pictures are mixed ({counts}), e.g. {files[0]}. Register them as two corpora, move the "
            f"{rarest} files out of the source, or add --slices, which plans in 2D for slices and pictures together.",
        )
    return result


def _corpus_cases(folder: Path) -> list[Case]:
    return [
        Case(
            entry["name"],
            tuple(Path(file) for file in entry["images"]),
            None,
            entry["subject"],
            entry.get("modality", ""),
            entry.get("dataset", ""),
            Path(entry["anonymisation_mask"]) if entry.get("anonymisation_mask") else None,
        )
        for entry in _read_corpus(folder)["cases"]
    ]


def _entry(case: Case) -> dict[str, Any]:
    known = {key: str(getattr(case, key)) for key in _OPTIONAL if getattr(case, key)}
    return {"name": case.name, "images": [str(file) for file in case.images], "subject": case.subject, **known}


def _read_corpus(folder: Path) -> dict[str, Any]:
    file, advice = folder / "corpus.json", "Delete the folder and register the images again."
    content = read_json(file, advice)
    cases = content.get("cases")
    is_whole = isinstance(cases, list) and all(_is_case_entry(entry) for entry in cases)
    if content.get("format") != FORMAT or not isinstance(content.get("source"), str) or not is_whole:
        raise MFMError("E_FORMAT", f"{file}: of an unknown format, or parts are missing. {advice}")
    return content


def _is_case_entry(entry: Any) -> bool:
    """Return whether a case in corpus.json is well formed; preprocessed files are named after its name."""
    if not isinstance(entry, dict) or not is_case_name(entry.get("name")) or not isinstance(entry.get("images"), list):
        return False
    texts = [*entry["images"], entry.get("subject"), *(entry.get(key, "") for key in _OPTIONAL)]
    return bool(entry["images"]) and all(isinstance(text, str) and "\0" not in text for text in texts)


FINGERPRINT = "dataset_fingerprint.json"


@dataclass(frozen=True)
class Selection:
    """Usable cases of a preprocessed dataset, and what differs from the raw data."""

    cases: list[Case]
    """Current and preprocessed cases, sorted by name."""
    removed: list[str]
    """Preprocessed cases that left the dataset or were refused at the last planning."""
    missing: list[str]
    """Cases of the dataset that were neither preprocessed nor refused."""
    source: Path | None
    """File or folder that lists the cases; None without a list, when all preprocessed cases are used."""

    @property
    def names(self) -> list[str]:
        """Names of the usable cases."""
        return [case.name for case in self.cases]

    def notes(self) -> list[str]:
        """Return messages for the user: a line about surplus cases, and one about cases not preprocessed."""
        lines = []
        if self.removed:
            lines.append(
                f"{len(self.removed)} preprocessed cases are not used, e.g. {self.removed[0]}: they are not among the "
                f"cases of {self.source}, or were refused when these were planned last. Their files stay."
            )
        if self.missing:
            lines.append(
                f"{len(self.missing)} cases of {self.source} are not preprocessed, e.g. {self.missing[0]}. "
                "mfm_plan_and_preprocess makes only what is missing."
            )
        return lines


def select(raw: Path | None, beside: Path, stored: Collection[str]) -> Selection:
    """Select the preprocessed cases (``stored``) that the dataset currently contains.

    The list of cases comes from the raw folder ``raw`` if it has one. Otherwise it comes from the last planning, in the
    dataset's preprocessed folder ``beside``: corpus.json, or the fingerprint of a labelled dataset. Data preprocessed
    by stock nnU-Net without a raw folder have no list; then all stored cases are used.

    Raises MFMError if the list cannot be read, as :func:`mfm_nnunet.data.load_cases`.
    """
    planned, refused = _planned(beside)
    source: Path | None = None
    current: Sequence[Case] = [_named(name) for name in stored]
    if raw is not None and _has_list(raw):
        source, current = raw, _of_raw(raw)
    elif is_corpus(beside):
        source, current = beside, load_cases(beside)
    elif planned is not None:
        source, current = beside / FINGERPRINT, [_named(name) for name in planned]
    if source is None or not is_corpus(source):
        refused = set()  # a labelled dataset with a bad case is refused as a whole
    usable = {case.name: case for case in current if case.name not in refused}
    return Selection(
        cases=[usable[name] for name in sorted(set(usable) & set(stored))],
        removed=sorted(set(stored) - set(usable)),
        missing=sorted(set(usable) - set(stored)),
        source=source,
    )


def _named(name: str) -> Case:
    return Case(name, (), None, subject_of(Path(name)))


def _has_list(raw: Path) -> bool:
    """Return whether a raw folder lists its cases; the images may have been moved after preprocessing."""
    if is_corpus(raw) or not (raw / "dataset.json").is_file():
        return is_corpus(raw)
    images = raw / IMAGES
    is_listed = images.is_dir() and any(not file.name.startswith(".") for file in images.iterdir())
    return is_listed or "dataset" in read_dataset_json(raw)


def _of_raw(raw: Path) -> Sequence[Case]:
    try:
        return load_cases(raw, need_mapped_files=False)
    except MFMError as error:
        raise MFMError(
            error.code,
            f"{error.message}\nThe raw dataset says which cases may be used. To use those of the last planning, move "
            f"{raw} away.",
        ) from error


def _planned(beside: Path) -> tuple[list[str] | None, set[str]]:
    """Return the cases of the last planning (None if stock nnU-Net planned) and the cases it refused."""
    file = beside / FINGERPRINT
    if not file.is_file():
        return None, set()
    advice = f"Make it again with: mfm_plan_and_preprocess -d {beside.name}"
    ours = read_json(file, advice).get("mfm") or {}
    try:
        names = ours.get("case_names")
        refused = {str(failure[0]) for failure in ours.get("failures", [])}
        return (None if names is None else [str(name) for name in names]), refused
    except (AttributeError, TypeError, LookupError) as error:
        raise MFMError("E_FORMAT", f"{file}: its list of cases is damaged. {advice}") from error
