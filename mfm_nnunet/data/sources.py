"""Where a corpus comes from: a folder tree, a BIDS tree, a table, nnssl's index, an nnU-Net raw folder, one image."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

from mfm_nnunet.data import bids, listings
from mfm_nnunet.data.index import Case, group_channels, image_files, named, require_channels, stem_of
from mfm_nnunet.data.integrity import IMAGE_ENDINGS, ending_of
from mfm_nnunet.errors import MFMError

_RAW_FOLDERS = ("imagesTr", "imagesTs")
_DICOM = {".dcm", ".ima"}
MAX_FILES_ASKED = 1000
"""How many files of a folder without images are asked whether they are DICOM."""
_log = logging.getLogger(__name__)


def index_source(source: Path) -> list[Case]:
    """The cases of a source of images; absolute paths, sorted, none of the files opened.

    * A folder tree: each image file is a case; hidden files and nnU-Net's label folders are left out. ``sub-XX`` in a
      path names the subject.
    * A BIDS dataset, or a folder that holds several (:mod:`mfm_nnunet.data.bids`).
    * A folder with ``imagesTr`` or ``imagesTs`` (or one of these itself): nnU-Net's ``_0000`` names.
    * A CSV table or nnssl's ``pretrain_data.json`` (:mod:`mfm_nnunet.data.listings`), also a folder that holds the
      latter.
    * A single image.

    Raises MFMError: E_NOT_FOUND (no such source, no image in it, images or masks that a listing names), E_CHANNELS
    (missing channel files, all listed), E_FORMAT (a listing of another form), E_CONFIG (a listing with a case name
    twice, or with a variable that is not set).
    """
    source = Path(os.path.abspath(os.path.expanduser(source)))
    if source.is_dir():
        cases = _folder(source)
    elif not source.exists():
        raise MFMError("E_NOT_FOUND", f"{source}: no such folder or file. Check the path.")
    elif source.suffix.lower() == ".csv":
        cases = listings.read_table(source)
    elif source.suffix.lower() == ".json":
        cases = listings.read_nnssl(source)
    elif ending_of(source):
        cases = named([PurePath(source.name)], [(source,)])
    else:
        raise MFMError(
            "E_FORMAT",
            f"{source}: expected a folder, a CSV file, a pretrain_data.json or an image ({' '.join(IMAGE_ENDINGS)}). "
            f"{dicom_advice(source)}",
        )
    if not cases:
        advice = dicom_advice(source)
        raise MFMError("E_NOT_FOUND", f"{source}: no image in it. {advice}Known endings: {' '.join(IMAGE_ENDINGS)}")
    return cases


def dicom_advice(source: Path) -> str:
    """Return what to do with DICOM files, which are not read, where ``source`` is one or holds some; else ""."""
    files = [source] if source.is_file() else itertools.islice(source.rglob("*"), MAX_FILES_ASKED)
    if not any(_is_dicom(file) for file in files):
        return ""
    return (
        "DICOM series are not read: convert each to NIfTI first, e.g. pip install dcm2niix, then dcm2niix -z y -o "
        "NIFTI_FOLDER DICOM_FOLDER. "
    )


def _is_dicom(file: Path) -> bool:
    """Tell DICOM by its name, or by its first bytes: archives export files without an ending."""
    if file.suffix.lower() in _DICOM:
        return True
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _folder(source: Path) -> list[Case]:
    if (source / listings.NNSSL_FILE).is_file():
        return listings.read_nnssl(source / listings.NNSSL_FILE)
    there = [source / name for name in _RAW_FOLDERS if (source / name).is_dir()]
    images = there[0] if there else source
    if there[1:]:
        _log.warning("%s is not taken: a corpus is one folder, and this is %s. Register it apart.", there[1], images)
    if images.name in _RAW_FOLDERS and _has_channels(images):
        return _raw(images)
    files = sorted(image_files(images), key=lambda file: file.relative_to(images).as_posix())
    if roots := bids.dataset_folders(images, files):
        return bids.cases(images, files, roots)
    _warn_of_channels(files)
    return named([file.relative_to(images) for file in files], [(file,) for file in files])


def _warn_of_channels(files: Sequence[Path]) -> None:
    """Say it when files look like the channels of one case, which only nnU-Net's folders and tables make of them."""
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
    """Whether any file is named ``NAME_0000``; the Medical Segmentation Decathlon has such folders without channels."""
    return any(re.search(r"_0000$", stem_of(file)) for file in folder.iterdir() if ending_of(file))


def _raw(folder: Path) -> list[Case]:
    groups = group_channels(folder)
    require_channels(folder, groups, len({channel for files in groups.values() for channel in files}))
    return named(
        [PurePath(name) for name in groups], [tuple(files[c] for c in sorted(files)) for files in groups.values()]
    )
