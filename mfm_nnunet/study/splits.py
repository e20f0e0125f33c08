"""Who trains and who tests: pure functions of names and seeds.

Everything is drawn by subject, so that no person is on both sides. The order of subjects is that of hashes of seed and
name: it is the same on every computer, and a case that is added to the dataset moves no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mfm_nnunet.errors import MFMError, nearest

TEST_DRAW = "test"
"""Stands for a seed in the draw of the test split, which is the same for all seeds."""


@dataclass(frozen=True)
class Cases:
    """The cases of a dataset by subject; subjects and cases are sorted."""

    by_subject: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, subjects: Mapping[str, str]) -> Cases:
        """From the subject of every case."""
        groups: dict[str, list[str]] = {}
        for case in sorted(subjects):
            groups.setdefault(subjects[case], []).append(case)
        return cls({subject: tuple(groups[subject]) for subject in sorted(groups)})

    def names(self, subjects: Iterable[str]) -> list[str]:
        """The cases of some subjects, sorted."""
        return sorted(case for subject in subjects for case in self.by_subject[subject])


def shuffled(subjects: Iterable[str], seed: int | str) -> list[str]:
    """The one random order of the subjects that belongs to a seed."""
    return sorted(subjects, key=lambda subject: hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest())


def draw_test(cases: Cases, wanted: str) -> list[str]:
    """The subjects that test: ``wanted`` is a share (``20%``), a number of subjects, or a file of case names.

    Raises MFMError: E_CONFIG for an impossible share or number, a split that is empty or leaves nothing to train on,
    unknown cases, and a subject of which only some cases are named; E_NOT_FOUND for a missing file.
    """
    subjects = list(cases.by_subject)
    if wanted.endswith("%") or wanted.lstrip("-").isdigit():
        chosen = shuffled(subjects, TEST_DRAW)[: _count(wanted, len(subjects), "--test")]
    else:
        chosen = _subjects_in_file(cases, Path(wanted))
    if not chosen:
        raise MFMError("E_CONFIG", f"--test {wanted}: the test split would be empty. Give at least one subject.")
    if len(chosen) >= len(subjects):
        raise MFMError(
            "E_CONFIG",
            f"--test {wanted}: all {len(subjects)} subjects would test and none would be left to train on. "
            "Give a smaller share or number.",
        )
    return sorted(chosen)


def label_counts(wanted: Sequence[str], num_subjects: int) -> list[int]:
    """The numbers of labelled subjects that ``--labels`` asks for, ascending; ``num_subjects`` are in the pool.

    Raises MFMError (E_CONFIG): none, not a number or share, less than one, more than there are, or one twice.
    """
    if not wanted:
        raise MFMError("E_CONFIG", "--labels: give at least one number of labels, e.g. --labels 5 10 20 100%.")
    counts: dict[int, str] = {}
    for text in wanted:
        count = _count(text, num_subjects, "--labels")
        if count < 1:
            raise MFMError("E_CONFIG", f"--labels {text}: at least one label is needed to train.")
        if count > num_subjects:
            raise MFMError(
                "E_CONFIG",
                f"--labels {text}: without the test split there are {num_subjects} subjects with labels. Give at most "
                f"{num_subjects}, or 100% for all of them.",
            )
        if count in counts:
            raise MFMError("E_CONFIG", f"--labels {counts[count]} and {text} are both {count}. Give one of them.")
        counts[count] = text
    return sorted(counts)


def nested_subset(cases: Cases, pool: Sequence[str], num_labels: int, seed: int) -> list[str]:
    """The cases of the first ``num_labels`` subjects of the pool in the seed's order: 5 are among 10 among 20."""
    return cases.names(shuffled(pool, seed)[:num_labels])


def _count(text: str, total: int, flag: str) -> int:
    """A number, or a share of ``total`` (at least one where the share is above zero)."""
    number = text.removesuffix("%")
    try:
        value = float(number) if text.endswith("%") else int(number)
    except ValueError as error:
        raise MFMError("E_CONFIG", f"{flag} {text}: expected a number such as 10, or a share such as 20%.") from error
    if not text.endswith("%"):
        return max(0, int(value))
    if not 0 <= value <= 100:
        raise MFMError("E_CONFIG", f"{flag} {text}: a share is from 0% to 100%.")
    return max(1, round(total * value / 100)) if value else 0


def _subjects_in_file(cases: Cases, file: Path) -> list[str]:
    """The subjects of the case names in a file, one per line."""
    if not file.is_file():
        raise MFMError(
            "E_NOT_FOUND", f"--test {file}: no such file. Give a share (20%), a number, or a file of case names."
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise MFMError("E_FORMAT", f"--test {file}: not a text of one case name per line ({error}).") from error
    named = {line.strip() for line in lines if line.strip()}
    subject_of = {case: subject for subject, names in cases.by_subject.items() for case in names}
    if unknown := sorted(named - set(subject_of)):
        raise MFMError(
            "E_CONFIG",
            f"--test {file}: {len(unknown)} names are no labelled cases, e.g. {unknown[0]}. "
            f"{nearest(unknown[0], subject_of)}",
        )
    chosen = sorted({subject_of[case] for case in named})
    for subject in chosen:
        if left := sorted(set(cases.by_subject[subject]) - named):
            raise MFMError(
                "E_CONFIG",
                f"--test {file}: case {left[0]} is of subject {subject}, of whom other cases test. Name all cases of a "
                "subject or none.",
            )
    return chosen
