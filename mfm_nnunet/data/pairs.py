"""Pair the images of a folder with the masks of another by name, and read the labels that the masks hold."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from mfm_nnunet.data.cases import Case, image_files, is_named_mask, named, require_channels, stem_of
from mfm_nnunet.data.loops import in_threads, with_progress
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError
from mfm_nnunet.files import ending_of
from mfm_nnunet.images.reading import read_label, reader_for
from mfm_nnunet.modalities import kind_of_path

MOST_LABELS = 256
"""More different values in the masks than this are no labels."""
LOSSY = (".jpg", ".jpeg")
_MASK_WORDS = r"(?:masks?|segs?|segmentations?|labels?|labelmaps?|gt|ground[_ -]?truths?|annotations?)"
_IMAGE_WORDS = r"(?:images?|imgs?|scans?|volumes?|vol)"
_log = logging.getLogger(__name__)


def pair_folders(images: Path, labels: Path) -> list[Case]:
    """Return a case for each image with its mask; both folders may be the same, or one inside the other.

    Names match after words such as ``_seg``, ``label_``, ``_mask`` or ``image_`` are removed, and channels ``_0000``.
    Files in subfolders match by name alone if that is unique, else by their path, else by
    their folder. Raises MFMError: E_NOT_FOUND (no
    images or masks, images without masks and the reverse, all listed), E_CONFIG (several candidates for a name),
    E_CHANNELS (missing channels).
    """
    images, labels = (Path(folder).expanduser().absolute() for folder in (images, labels))
    for flag, folder in (("--images", images), ("--labels", labels)):
        if not folder.is_dir():
            raise MFMError("E_NOT_FOUND", f"{flag} {folder}: no such folder. Check the path.")
    masks = sorted(file for file in image_files(labels) if labels != images or is_named_mask(file.relative_to(labels)))
    taken = set(masks)
    scans = [file for file in image_files(images) if file not in taken]
    scans = sorted(file for file in scans if labels == images or labels not in file.parents)
    if dropped := [file for file in scans if is_named_mask(file.relative_to(images))]:
        text = "%s: %d images are left out, because their names or folders are those of masks, e.g. %s"
        _log.warning(text, images, len(dropped), dropped[0].relative_to(images))
        scans = [file for file in scans if file not in set(dropped)]
    for folder, files, what in ((images, scans, "image"), (labels, masks, "mask")):
        if not files:
            raise MFMError("E_NOT_FOUND", f"{folder}: there is no {what} in it.")
    options = [
        _Pairing.of(images, scans, labels, masks, by, has_channels)
        for by in ("name", "path", "folder")
        for has_channels in (False, True)
    ]
    best = max(options, key=lambda option: option.num_pairs)  # the first of equals
    best.require_unique(images, labels)
    best.require_partners(images, labels)
    found = {key: {channel: files[0] for channel, files in group.items()} for key, group in best.scans.items()}
    require_channels(images, found, len({channel for files in found.values() for channel in files}))
    cases = named(
        [PurePath(key) for key in found], [tuple(files[c] for c in sorted(files)) for files in found.values()]
    )
    folders = [(images.name, *case.images[0].relative_to(images).parts[:-1]) for case in cases]
    return [
        dataclasses.replace(case, label=best.masks[key][0], modality=kind_of_path(names))
        for case, key, names in zip(cases, found, folders)
    ]


@dataclass(frozen=True)
class _Pairing:
    """Images by name and channel, and masks by name."""

    scans: dict[str, dict[int, list[Path]]]
    masks: dict[str, list[Path]]

    @classmethod
    def of(
        cls,
        images: Path,
        scans: Sequence[Path],
        labels: Path,
        masks: Sequence[Path],
        by: str,
        has_channels: bool,
    ) -> _Pairing:
        """Group files by ``name``, ``path`` or ``folder``, with or without channel numbers in the names of images."""
        result = cls({}, {})
        for file in scans:
            name, channel = _numbered(file.relative_to(images), by, has_channels)
            result.scans.setdefault(name, {}).setdefault(channel, []).append(file)
        for file in masks:
            result.masks.setdefault(_key(file.relative_to(labels), _MASK_WORDS, by), []).append(file)
        return result

    @property
    def num_pairs(self) -> int:
        """Number of names with exactly one mask and one image per channel."""
        return sum(
            len(self.masks.get(key, ())) == 1 and all(len(files) == 1 for files in group.values())
            for key, group in self.scans.items()
        )

    def require_unique(self, images: Path, labels: Path) -> None:
        """Refuse several masks, or several images of a channel, for one name (E_CONFIG)."""
        several = [(key, labels, files) for key, files in self.masks.items() if len(files) > 1]
        several += [(k, images, files) for k, group in self.scans.items() for files in group.values() if len(files) > 1]
        if several:
            lines = [
                f"  {key}: {' and '.join(str(f.relative_to(folder)) for f in files)}" for key, folder, files in several
            ]
            raise MFMError("E_CONFIG", f"several files for one name; rename or remove all but one:\n{_first(lines)}")

    def require_partners(self, images: Path, labels: Path) -> None:
        """Refuse images without masks and masks without images (E_NOT_FOUND)."""
        lines = [f"  no mask for {key}" for key in sorted(set(self.scans) - set(self.masks))]
        masks = sorted(set(self.masks) - set(self.scans))
        lines += [f"  no image for {self.masks[key][0].relative_to(labels)}" for key in masks]
        if lines:
            raise MFMError(
                "E_NOT_FOUND",
                f"{images} and {labels}: {len(lines)} files have no partner of the same name (endings, channels and "
                "words such as _seg do not count). Add, rename or remove them, or pair them in a CSV with the columns "
                f"image and label:\n{_first(lines)}",
            )


def _first(lines: Sequence[str]) -> str:
    return "\n".join([*lines[:20], *([f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else [])])


def mask_key(file: Path) -> str:
    """Return the name of a mask without words such as ``_seg``."""
    return _key(PurePath(file.name), _MASK_WORDS, by="name")


def _numbered(file: PurePath, by: str, has_channels: bool) -> tuple[str, int]:
    match = re.fullmatch(r"(.+)_(\d{4})", stem_of(file), re.DOTALL) if has_channels else None
    plain = file.with_name(f"{match[1]}{ending_of(Path(file.name))}") if match else file
    return _key(plain, _IMAGE_WORDS, by), int(match[2]) if match else 0


def _key(file: PurePath, words: str, by: str) -> str:
    """Return a file's name, its path or its folder, without words for images or masks."""
    name = re.sub(rf"(?i)(?:^|[_\-. ]+){words}$|^{words}(?:[_\-. ]+|(?=\d)|$)", "", stem_of(file))
    if by == "name":
        return name or stem_of(file)
    folders = [re.sub(rf"(?i)^(?:{_MASK_WORDS}|{_IMAGE_WORDS})$", "", part) for part in file.parts[:-1]]
    return "/".join(part for part in (*folders, name if by == "path" else "") if part) or stem_of(file)


def find_values(cases: Sequence[Case], num_processes: int) -> set[int]:
    """Read all masks and return the values in them. Raises MFMError listing all masks that cannot be used."""
    values: set[int] = set()
    failures: list[CaseFailure] = []
    with with_progress(in_threads(_values_of, cases, num_processes), len(cases), "masks read") as outcomes:
        for _, outcome in outcomes:
            if isinstance(outcome, CaseFailure):
                failures.append(outcome)
            else:
                values |= outcome
    if failures:
        raise CasesFailedError(failures, len(cases), "masks")
    if len(values) > MOST_LABELS:
        reason = f"the masks have {len(values)} different values. A label map has a whole number per structure"
        raise MFMError("E_LABEL_VALUE", f"{reason}; probabilities and compressed pictures are none.")
    if not values - {0}:
        raise MFMError("E_LABEL_VALUE", "all masks are 0 everywhere, so there is nothing to learn. Check --labels.")
    return values


def _values_of(case: Case) -> set[int]:
    assert case.label is not None, "a pair has a mask"
    if ending_of(case.label) in LOSSY:
        raise MFMError("E_LABEL_VALUE", f"{case.label}: JPEG changes the values of a mask. Save it as PNG.")
    values = np.unique(read_label(case.label, reader_for(case.label))[0])
    if values[0] < 0:
        raise MFMError("E_LABEL_VALUE", f"{case.label}: the mask has the value {values[0]:g}, and 0 is the background.")
    return {int(value) for value in values[: MOST_LABELS + 2]}


def name_labels(values: Collection[int], names: Mapping[int, str]) -> tuple[dict[str, int], dict[int, int]]:
    """Return the labels for dataset.json, and the new value of each value of the masks (0, 1, 2, ... without a gap).

    A label named ``ignore`` comes last. Raises MFMError (E_CONFIG) for names of values that no mask has.
    """
    if unknown := sorted(set(names) - set(values) - {0}):
        found = " ".join(str(value) for value in sorted(values))
        raise MFMError(
            "E_CONFIG", f"--label-names {unknown[0]}={names[unknown[0]]}: the values in the masks are {found}."
        )
    foreground = sorted(set(values) - {0}, key=lambda value: (names.get(value) == "ignore", value))
    new = {0: 0} | {value: number for number, value in enumerate(foreground, start=1)}
    labels = {"background": 0} | {names.get(value, f"label_{new[value]}"): new[value] for value in foreground}
    if len(labels) <= len(foreground):
        raise MFMError("E_CONFIG", "--label-names: two values have the same name, or one is called background.")
    return labels, new
