"""Which cases train and which validate: nnU-Net's ``splits_final.json``, defined for every number of cases.

Five and more cases get nnU-Net's own five folds. Fewer get one fold per case (leave one out), where nnU-Net fails.
Cases of one subject stay together. A file that exists is used as it stands.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.data import corpus
from mfm_nnunet.errors import MFMError
from mfm_nnunet.json_files import parse_json

logger = logging.getLogger(__name__)

NUM_FOLDS = 5

Split = dict[str, list[str]]
"""One fold: the case names under "train" and "val"."""


def require_fold(fold: int | str, preprocessed_folder: Path, cases: Sequence[str], raw_folder: Path | None) -> int:
    """Make sure that ``fold`` can be trained, writing the split file if there is none; the number of training cases.

    ``cases`` are the preprocessed ones; ``raw_folder`` tells which belong to one subject, where it exists.
    Raises MFMError (E_CONFIG): no cases, a fold that does not exist, a split that names other cases.
    """
    if not cases:
        raise MFMError(
            "E_CONFIG", f"{preprocessed_folder.name} has no labelled cases, so there is nothing to train on."
        )
    if fold == "all":
        return len(cases)
    splits = ensure_splits(preprocessed_folder, cases, subjects_of(raw_folder))
    if not isinstance(fold, int) or not 0 <= fold < len(splits):
        raise MFMError(
            "E_CONFIG",
            f"fold {fold}: {preprocessed_folder.name} has the folds 0 to {len(splits) - 1}, and 'all' "
            f"(training on everything). They are defined in {preprocessed_folder / 'splits_final.json'}.",
        )
    _check_split(splits[fold], fold, cases, preprocessed_folder / "splits_final.json")
    return len(splits[fold]["train"])


def ensure_splits(
    preprocessed_folder: Path, cases: Sequence[str], subjects: Mapping[str, str] | None = None
) -> list[Split]:
    """The folds in ``splits_final.json``; the file is written first if there is none.

    ``subjects`` maps a case to its subject; a case that is not in it is its own.
    Raises MFMError (E_CONFIG) for a single case or subject, which cannot be split, and for a file of another form.
    """
    file = preprocessed_folder / "splits_final.json"
    if not file.is_file():
        splits = make_splits(cases, subjects or {})
        with atomic_write(file) as handle:
            handle.write(json.dumps(splits, indent=4).encode())
        return splits
    try:
        splits = parse_json(file.read_bytes())
        if not isinstance(splits, list) or not splits:
            raise ValueError("it holds no list, or an empty one")
        return [{part: _names(split[part], part) for part in ("train", "val")} for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise MFMError(
            "E_CONFIG",
            f"{file}: not a list of folds with 'train' and 'val' ({error}). Repair the file, or delete it to get the "
            "default folds.",
        ) from error


def _names(cases: Any, part: str) -> list[str]:
    if not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        raise ValueError(f"'{part}' is no list of case names")
    return cases


def make_splits(cases: Sequence[str], subjects: Mapping[str, str]) -> list[Split]:
    """The folds of some cases: nnU-Net's own for five and more subjects, else one per subject.

    Raises MFMError (E_CONFIG) when there is only one.
    """
    groups: dict[str, list[str]] = {}
    for case in sorted(cases):
        groups.setdefault(subjects.get(case, case), []).append(case)
    names = sorted(groups)
    if len(names) == 1:
        raise MFMError(
            "E_CONFIG",
            f"there is only one labelled {'case' if len(cases) == 1 else 'subject'} ({names[0]}), so none can be held "
            "out for validation. Train on it with fold 'all', or add labelled cases.",
        )
    if len(names) < NUM_FOLDS:
        folds = [{"train": [name for name in names if name != held_out], "val": [held_out]} for held_out in names]
    else:
        folds = generate_crossval_split(names, n_splits=NUM_FOLDS)
    return [
        {part: [case for name in fold[part] for case in groups[str(name)]] for part in ("train", "val")}
        for fold in folds
    ]


def subjects_of(raw_folder: Path | None) -> dict[str, str]:
    """The subject of every case of a raw dataset; empty when the raw data are not there (any more)."""
    if raw_folder is None or not (raw_folder / "dataset.json").is_file():
        return {}
    try:
        return {case.name: case.subject or case.name for case in corpus.load_cases(raw_folder)}
    except MFMError as error:  # preprocessed data are enough to train; raw files may have been moved away
        logger.warning("every case counts as a subject of its own, because the raw data cannot be read: %s", error)
        return {}


def _check_split(split: Split, fold: int, cases: Sequence[str], file: Path) -> None:
    unknown = sorted({*split["train"], *split["val"]} - set(cases))
    if unknown:
        raise MFMError(
            "E_CONFIG",
            f"{file}: fold {fold} names {len(unknown)} cases that are not preprocessed: {', '.join(unknown[:10])}. "
            "Preprocess them, or delete the file to get the default folds.",
        )
    for part in ("train", "val"):
        if not split[part]:
            raise MFMError(
                "E_CONFIG", f"{file}: fold {fold} has no cases under '{part}'. Add some, or delete the file."
            )
