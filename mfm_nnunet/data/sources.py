"""Sources of a corpus: a folder tree, a BIDS tree, a table, nnssl's index, an nnU-Net raw folder, one image.

DICOM series are found by :mod:`mfm_nnunet.data.dicom`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

from mfm_nnunet.data import listings
from mfm_nnunet.data.cases import (
    PICTURES,
    Case,
    group_channels,
    image_files,
    is_named_mask,
    named,
    require_channels,
    stem_of,
    subject_of,
)
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import IMAGE_ENDINGS, ending_of
from mfm_nnunet.modalities import kind_of_path

_RAW_FOLDERS = ("imagesTr", "imagesTs")
_LABEL_FOLDERS = {"labelsTr", "labelsTs"}
_log = logging.getLogger(__name__)


def index_source(source: Path, with_pictures: bool = False, with_dicom: bool = False) -> list[Case]:
    """List the cases of a source of images: absolute paths, sorted; no image is opened.

    * A folder tree: each image file is a case; hidden files are left out, and so are, with a message, those that are
      named as masks (:func:`is_named_mask`), and, unless ``with_pictures``, a few pictures among
      volumes. ``sub-XX`` in a path names the subject, and a folder named ``CT``, ``MR``, ``PET``, ``Xray`` or ``US``
      the modality.
    * A BIDS dataset, or a folder that holds several.
    * A folder with ``imagesTr`` or ``imagesTs`` (or one of these itself): nnU-Net's ``_0000`` names.
    * A CSV table or nnssl's ``pretrain_data.json`` (:mod:`mfm_nnunet.data.listings`), also a folder that holds the
      latter.
    * A single image.

    ``with_dicom`` allows a source that holds nothing but DICOM; the list is then empty.

    Raises MFMError: E_NOT_FOUND (no such source, no image in it, images or masks that a listing names), E_CHANNELS
    (missing channel files, all listed), E_FORMAT (a listing of another form, an archive), E_CONFIG (a listing
    with a case name twice, or with a variable that is not set), E_MASK (a folder tree in which every image is named as
    a mask).
    """
    source = Path(os.path.abspath(os.path.expanduser(source)))
    if source.is_dir():
        cases = _folder(source, with_pictures)
    elif not source.exists():
        raise MFMError("E_NOT_FOUND", f"{source}: no such folder or file. Check the path.")
    elif source.suffix.lower() == ".csv":
        cases = listings.read_table(source)
    elif source.suffix.lower() == ".json":
        cases = listings.read_nnssl(source)
    elif ending_of(source):
        cases = named([PurePath(source.name)], [(source,)])
    elif not with_dicom:
        raise _unknown_source(source)
    else:
        cases = []
    if not cases and not with_dicom:
        known = f"Known endings: {' '.join(IMAGE_ENDINGS)}"
        raise MFMError("E_NOT_FOUND", f"{source}: no image in it. {_what_else(source)}{known}")
    return _each_once(source, cases)


def _unknown_source(source: Path) -> MFMError:
    if not os.path.isfile(source):
        return MFMError("E_FORMAT", f"{source}: this is a pipe or device. Give a folder, a table or an image.")
    if zipfile.is_zipfile(source):
        return MFMError("E_FORMAT", f"{source}: this is a zip archive. Unpack it and give the folder.")
    endings = " ".join(IMAGE_ENDINGS)
    return MFMError(
        "E_FORMAT", f"{source}: expected a folder, a CSV file, a pretrain_data.json or an image ({endings})."
    )


def _what_else(source: Path) -> str:
    """Describe in sentences what a folder without images contains instead; "" if nothing is recognised."""
    if not source.is_dir():
        return ""
    if indices := sorted(file for file in source.glob("*.json") if listings.is_of_preprocessed(file)):
        return f"{indices[0].name}: {listings.OF_PREPROCESSED} "
    archives = sorted(file for file in source.iterdir() if file.suffix.lower() == ".zip")
    return f"Unpack the archives in it, e.g. {archives[0].name}. " if archives else ""


def _each_once(source: Path, cases: list[Case]) -> list[Case]:
    """Drop repeated cases of a listing: otherwise one might train while its copy validates."""
    first: dict[tuple[Path, ...], Case] = {}
    for case in cases:
        first.setdefault(case.images, case)
    if len(first) < len(cases):
        again = next(case for case in cases if first[case.images] is not case)
        text = "%s: %d entries name an image for the second time and are left out, e.g. %s"
        _log.warning(text, source, len(cases) - len(first), again.images[0])
    return list(first.values())


def _folder(source: Path, with_pictures: bool) -> list[Case]:
    if (source / listings.NNSSL_FILE).is_file():
        return listings.read_nnssl(source / listings.NNSSL_FILE)
    there = [source / name for name in _RAW_FOLDERS if (source / name).is_dir()]
    images = there[0] if there else source
    if there[1:]:
        _log.warning("%s is not taken: a corpus is one folder, and this is %s. Register it apart.", there[1], images)
    if images.name in _RAW_FOLDERS and _has_channels(images):
        return _raw(images)
    files = sorted(image_files(images), key=lambda file: file.relative_to(images).as_posix())
    places = [file for file in files if not _LABEL_FOLDERS & set(file.relative_to(images).parts)]
    if roots := _bids_folders(images, places):
        return _bids_cases(images, files, roots)
    files = _without_masks(images, files)
    if not with_pictures:
        files = _without_stray_pictures(images, files)
    _warn_of_channels(files)
    cases = named([file.relative_to(images) for file in files], [(file,) for file in files])
    folders = [(images.name, *file.relative_to(images).parts[:-1]) for file in files]
    return [dataclasses.replace(case, modality=kind_of_path(names)) for case, names in zip(cases, folders)]


def _without_masks(source: Path, files: list[Path]) -> list[Path]:
    masks = [file for file in files if is_named_mask(file.relative_to(source))]
    if not masks:
        return files
    if len(masks) == len(files):
        raise MFMError(
            "E_MASK",
            f"{source}: all {len(files)} images in it have names of masks, e.g. {masks[0].relative_to(source)}. If "
            "they are scans, give the folder that holds them directly, or list them in a CSV with a column 'image'.",
        )
    text = "%s: %d images are left out, because their names or folders are those of masks, e.g. %s"
    _log.warning(text, source, len(masks), masks[0].relative_to(source))
    left = set(masks)
    return [file for file in files if file not in left]


def _without_stray_pictures(source: Path, files: list[Path]) -> list[Path]:
    """Drop a few pictures among volumes, such as screenshots. Registration refuses other mixtures."""
    pictures = [file for file in files if ending_of(file) in PICTURES]
    volumes = [file for file in files if ending_of(file) not in PICTURES]
    if not pictures or len(volumes) < 3 or len(pictures) > max(1, len(files) // 10):
        return files
    text = "%s: %d pictures among %d volumes are left out, e.g. %s"
    _log.warning(text, source, len(pictures), len(volumes), pictures[0].relative_to(source))
    return volumes


def _warn_of_channels(files: Sequence[Path]) -> None:
    """Warn about files that look like channels of one case, which a folder tree cannot express."""
    stems = [re.fullmatch(r"(.+)_\d{4}", str(file.parent / stem_of(file))) for file in files]
    several = [name for name, count in Counter(match[1] for match in stems if match).items() if count > 1]
    if several:
        _log.warning(
            "%d names have several files with channel numbers, e.g. %s_0000: each file is a case of its own here. If "
            "they are channels of one case, put them into a folder named imagesTr, or list them in a CSV (image_0, "
            "image_1 ...).",
            len(several),
            several[0],
        )


def _has_channels(folder: Path) -> bool:
    """Return whether any file is named ``NAME_0000``; folders of the Medical Segmentation Decathlon have none."""
    return any(re.search(r"_0000$", stem_of(file)) for file in folder.iterdir() if ending_of(file))


def _raw(folder: Path) -> list[Case]:
    groups = group_channels(folder)
    require_channels(folder, groups, len({channel for files in groups.values() for channel in files}))
    return named(
        [PurePath(name) for name in groups], [tuple(files[c] for c in sorted(files)) for files in groups.values()]
    )


_DESCRIPTION = "dataset_description.json"
_NO_SCANS = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
"""Folders of a BIDS dataset that contain no scans of its own."""
_NO_IMAGES = frozenset(("mask", "defacemask", "dseg", "probseg", "label", "seg", "boldref"))
"""Suffixes of files that are not scans: masks, segmentations and computed references."""
_PLACE = re.compile(
    r"sub-[A-Za-z0-9]+/(ses-[A-Za-z0-9]+/)?(anat|func|dwi|fmap|perf|pet|micr|swi)/sub-[^/]+_[A-Za-z0-9]+"
)


def _bids_folders(source: Path, files: Sequence[Path]) -> list[Path]:
    """Find the BIDS datasets in ``source``: itself or its direct subfolders; empty if there are none.

    A folder is a BIDS dataset if it has a ``dataset_description.json``, or if all its images have BIDS paths. ``files``
    are the images below ``source``.
    """
    if _is_bids(source, files):
        return [source]
    children = sorted({source / file.relative_to(source).parts[0] for file in files if file.parent != source})
    return [child for child in children if _is_bids(child, [file for file in files if child in file.parents])]


def _bids_cases(source: Path, files: Sequence[Path], roots: Sequence[Path]) -> list[Case]:
    """Select the scans among the images ``files`` of ``source``; the folders ``roots`` are BIDS datasets.

    Images outside of these are treated as in any folder tree. Skipped files are logged with their number and an
    example.
    """
    owners = [next((root for root in roots if root in file.parents), None) for file in files]
    reasons = [
        _left_out(file.relative_to(root)) if root else "masks" if is_named_mask(file.relative_to(source)) else ""
        for file, root in zip(files, owners)
    ]
    for reason, count in sorted(Counter(filter(None, reasons)).items()):
        _log.info("%s: %d %s are left out, e.g. %s", source, count, reason, files[reasons.index(reason)])
    kept = [(file, root) for file, root, reason in zip(files, owners, reasons) if not reason]
    plain = named([file.relative_to(source) for file, _ in kept], [(file,) for file, _ in kept])
    return [
        case if root is None else _described(case, root, several=len(roots) > 1 or root != source)
        for case, (_, root) in zip(plain, kept)
    ]


def _is_bids(folder: Path, files: Sequence[Path]) -> bool:
    if (folder / _DESCRIPTION).is_file():
        return True
    own = [file for file in (file.relative_to(folder) for file in files) if file.parts[0] not in _NO_SCANS]
    return bool(own) and all(_PLACE.fullmatch((file.parent / stem_of(file)).as_posix()) for file in own)


def _left_out(file: PurePath) -> str:
    """Return the reason why a file of a dataset is not a scan; "" for a scan."""
    if file.parts[0] in _NO_SCANS:
        return f"images in {file.parts[0]}/"
    if not file.parts[0].startswith("sub-"):
        return "images outside of the folders sub-*"
    if "fmap" in file.parts:
        return "field maps"
    return "masks, segmentations and computed references" if _suffix(file) in _NO_IMAGES else ""


def _described(case: Case, root: Path, several: bool) -> Case:
    """Add the dataset, the modality, and a subject that is unique across datasets."""
    file = case.images[0]
    subject = subject_of(file.relative_to(root))
    return dataclasses.replace(
        case, subject=f"{root.name}/{subject}" if several else subject, modality=_suffix(file), dataset=root.name
    )


def _suffix(file: PurePath) -> str:
    return stem_of(file).rpartition("_")[2]
