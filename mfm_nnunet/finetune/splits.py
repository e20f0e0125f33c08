"""Training and validation cases: nnU-Net's ``splits_final.json``, for any number of cases.

Five or more cases get nnU-Net's own five folds. Fewer get one fold per case (leave one out), where nnU-Net fails. Cases
of one subject stay together. An existing file is used unchanged, except for cases removed from the dataset.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from mfm_nnunet.data.corpus import Selection
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import atomic_write, parse_json

logger = logging.getLogger(__name__)

NUM_FOLDS = 5

Split = dict[str, list[str]]
"""One fold: the case names under "train" and "val"."""
Maker = Callable[[Sequence[str], Mapping[str, str]], list[Split]]
"""Makes folds of cases; the mapping gives the subject of a case."""


def choose_split(
    fold: int | str, preprocessed_folder: Path, selection: Selection, make: Maker | None = None, *, keep: bool = True
) -> Split:
    """Return the training and validation cases of ``fold``; write the split file if there is none (``keep``).

    ``make`` makes folds of cases and their subjects, by default :func:`make_splits`. Only cases of ``selection`` are
    used. Other cases that are preprocessed or in the file are left out with a warning. Raises MFMError: E_CONFIG (no
    cases; a fold that does not exist or becomes empty; unknown cases in the file) and E_NOT_FOUND (cases of the dataset
    that are not preprocessed).
    """
    if not selection.cases:
        raise MFMError(
            "E_CONFIG", f"{preprocessed_folder.name} has no labelled cases, so there is nothing to train on."
        )
    file = preprocessed_folder / "splits_final.json"
    if selection.missing and (fold == "all" or not file.is_file()):
        raise MFMError("E_NOT_FOUND", selection.notes()[-1])
    if selection.removed:
        logger.warning("%s: %s", preprocessed_folder.name, selection.notes()[0])
    if fold == "all":
        return {"train": selection.names, "val": selection.names}
    splits = ensure_splits(
        preprocessed_folder, selection.names, {c.name: c.subject for c in selection.cases}, make, keep
    )
    if not isinstance(fold, int) or not 0 <= fold < len(splits):
        raise MFMError(
            "E_CONFIG",
            f"fold {fold}: {preprocessed_folder.name} has the folds 0 to {len(splits) - 1}, and 'all' "
            f"(training on everything). They are defined in {file}.",
        )
    named = {case for split in splits for part in split.values() for case in part}
    if others := sorted({*selection.names, *selection.missing} - named):
        logger.warning(
            "%s: %d cases of the dataset are in no fold and are not used, e.g. %s. Add them, or delete the file to get "
            "folds of all cases.",
            file, len(others), others[0],
        )  # fmt: skip
    return _keep_current(splits[fold], fold, selection, file)


def ensure_splits(
    preprocessed_folder: Path,
    cases: Sequence[str],
    subjects: Mapping[str, str] | None = None,
    make: Maker | None = None,
    keep: bool = True,
) -> list[Split]:
    """Read the folds in ``splits_final.json``; write the file first if there is none (``keep``).

    ``subjects`` maps a case to its subject. Other cases count as a subject each.
    """
    file = preprocessed_folder / "splits_final.json"
    if not file.is_file():
        splits = (make or make_splits)(cases, subjects or {})
        if keep:
            with atomic_write(file) as handle:
                handle.write(json.dumps(splits, indent=4).encode())
        return splits
    try:
        splits = parse_json(file.read_bytes())
        if not isinstance(splits, list) or not splits:
            raise ValueError("it holds no list, or an empty one")
        return [{part: _case_names(split[part]) for part in ("train", "val")} for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise MFMError(
            "E_CONFIG",
            f"{file}: not a list of folds with 'train' and 'val' ({error}). Repair the file, or delete it to get the "
            "default folds.",
        ) from error


def _case_names(names: object) -> list[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError("cases are a list of names")
    return names


def make_splits(cases: Sequence[str], subjects: Mapping[str, str]) -> list[Split]:
    """Make nnU-Net's own folds for five or more subjects, else one fold per subject."""
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


def _keep_current(split: Split, fold: int, selection: Selection, file: Path) -> Split:
    """Remove cases that left the dataset, and duplicates, from a fold."""
    named = {*split["train"], *split["val"]}
    known, removed = set(selection.names), set(selection.removed)
    if unknown := sorted(named - known - removed):
        raise MFMError(
            "E_CONFIG",
            f"{file}: fold {fold} names {len(unknown)} cases that are not preprocessed: {', '.join(unknown[:10])}. "
            "Preprocess them, or delete the file to get the default folds.",
        )
    dropped = sorted(named & removed)
    if dropped:
        logger.warning(
            "%s: fold %d names %d cases that are no longer in the dataset and are left out, e.g. %s",
            file, fold, len(dropped), dropped[0],
        )  # fmt: skip
    kept = {part: [case for case in dict.fromkeys(split[part]) if case in known] for part in ("train", "val")}
    for part, cases in kept.items():
        if not cases:
            raise MFMError(
                "E_CONFIG", f"{file}: fold {fold} has no cases under '{part}'. Add some, or delete the file."
            )
        if len(split[part]) > len(set(split[part])):
            logger.warning("%s: fold %d names cases more than once under '%s'; each counts once", file, fold, part)
    if both := sorted(set(kept["train"]) & set(kept["val"])):
        logger.warning(
            "%s: in fold %d %d cases train and validate, e.g. %s: their validation scores are meaningless",
            file, fold, len(both), both[0],
        )  # fmt: skip
    return kept
