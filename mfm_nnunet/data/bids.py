"""BIDS trees: which files are scans, and what subject, modality and dataset their places and names tell.

``sub-01/ses-2/anat/sub-01_ses-2_acq-fast_T1w.nii.gz`` is a T1w image of subject sub-01.
See bids-specification.readthedocs.io.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

from mfm_nnunet.data.cases import Case, named, stem_of, subject_of
from mfm_nnunet.data.not_scans import is_named_mask

DESCRIPTION = "dataset_description.json"
NO_SCANS = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
"""Folders of a BIDS dataset that hold no scans of its own."""
NO_IMAGES = frozenset(("mask", "defacemask", "dseg", "probseg", "label", "seg", "boldref"))
"""Suffixes of files that are no scans: masks, segmentations and references that were computed."""
_PLACE = re.compile(
    r"sub-[A-Za-z0-9]+/(ses-[A-Za-z0-9]+/)?(anat|func|dwi|fmap|perf|pet|micr|swi)/sub-[^/]+_[A-Za-z0-9]+"
)
_log = logging.getLogger(__name__)


def dataset_folders(source: Path, files: Sequence[Path]) -> list[Path]:
    """The BIDS datasets in ``source``: itself, or folders directly in it; empty where there are none.

    A dataset has a ``dataset_description.json``, or every one of its images has a place as in BIDS. ``files`` are the
    images below ``source``.
    """
    if _is_dataset(source, files):
        return [source]
    children = sorted({source / file.relative_to(source).parts[0] for file in files if file.parent != source})
    return [child for child in children if _is_dataset(child, [file for file in files if child in file.parents])]


def cases(source: Path, files: Sequence[Path], roots: Sequence[Path]) -> list[Case]:
    """The scans among the images ``files`` of ``source``, in which the folders ``roots`` are BIDS datasets.

    Images outside of these are taken as in any folder tree. What is left out is logged with its number and an example.
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


def _is_dataset(folder: Path, files: Sequence[Path]) -> bool:
    if (folder / DESCRIPTION).is_file():
        return True
    own = [file for file in (file.relative_to(folder) for file in files) if file.parts[0] not in NO_SCANS]
    return bool(own) and all(_PLACE.fullmatch((file.parent / stem_of(file)).as_posix()) for file in own)


def _left_out(file: PurePath) -> str:
    """Why a file of a dataset is no scan, in words; "" for a scan."""
    if file.parts[0] in NO_SCANS:
        return f"images in {file.parts[0]}/"
    if not file.parts[0].startswith("sub-"):
        return "images outside of the folders sub-*"
    if "fmap" in file.parts:
        return "field maps"
    return "masks, segmentations and computed references" if _suffix(file) in NO_IMAGES else ""


def _described(case: Case, root: Path, several: bool) -> Case:
    """The case with its dataset, its modality, and a subject that is unique over several datasets."""
    file = case.images[0]
    subject = subject_of(file.relative_to(root))
    return dataclasses.replace(
        case, subject=f"{root.name}/{subject}" if several else subject, modality=_suffix(file), dataset=root.name
    )


def _suffix(file: PurePath) -> str:
    return stem_of(file).rpartition("_")[2]
