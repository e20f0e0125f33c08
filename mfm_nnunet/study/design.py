"""The design of a study: its arms and cells, and the split into training and test cases.

Everything is drawn by subject, so no person is in both parts. Subjects are ordered by a hash of seed and name. The
order is the same on every computer, and a case added to the dataset does not move the others.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.jobs.preflight import find_checkpoint, hash_checkpoint
from mfm_nnunet.requests import HEADS

logger = logging.getLogger(__name__)

SCRATCH = "scratch"
LARGEST_COUNT = 1 << 31
TEST_DRAW = "test"
"""Used instead of a seed to draw the test split, which is the same for all seeds."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_SETTING = re.compile(r",(?=(?:finetune|semi)\.|head=)")
_RUN_FOLDER = "mfm_pretrain__"


@dataclass(frozen=True)
class Arm:
    """The initial weights of a training; ``file`` and ``sha256`` are None from scratch."""

    file: str | None = None
    sha256: str | None = None
    settings: tuple[str, ...] = ()
    """``finetune.name=value`` settings of this arm only; they override the study's."""
    head: str = ""
    """Head of a classifier; "" for the default, and for masks."""
    unlabelled: str = ""
    """Name and hash of the corpus that it also learns from; "" without one."""

    @property
    def method(self) -> str:
        """Method for unlabelled images; "" without one."""
        values = [setting.partition("=")[2] for setting in self.settings if setting.startswith("semi.method=")]
        return values[-1] if values and values[-1] != "none" else ""


@dataclass(frozen=True, order=True)
class Cell:
    """One training: an arm, a number of labelled subjects and a seed."""

    num_labels: int
    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm}, {self.num_labels} labels, seed {self.seed}"

    @property
    def folder_name(self) -> str:
        """Name of its folder inside ``cells``."""
        return f"{self.arm}__{self.num_labels}_labels__seed{self.seed}"


def is_arm_name(name: Any) -> bool:
    """Check that an arm's name can be used for folders."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name))


def parse_arms(words: Sequence[str]) -> dict[str, Arm]:
    """Parse the arms of a request, in the given order."""
    arms: dict[str, Arm] = {}
    for name, arm in map(_parse_arm, words):
        # Folders are named after arms, and some file systems ignore case.
        is_taken = name.casefold() in map(str.casefold, arms)
        if is_taken and (own := [*filter(None, [arm.head]), *map(_name_setting, arm.settings)]):
            name = "_".join([name, *own])
            is_taken = name.casefold() in map(str.casefold, arms)
        if is_taken:
            raise MFMError("E_CONFIG", f"--arms: two arms are named '{name}'. Name one differently: NAME=CHECKPOINT.")
        arms[name] = arm
    if not arms:
        raise MFMError("E_CONFIG", "--arms: nothing to compare. Give at least one arm: scratch, or a checkpoint.")
    return arms


def _parse_arm(word: str) -> tuple[str, Arm]:
    base, *given = [word] if Path(word).exists() else _SETTING.split(word)
    heads = [setting.removeprefix("head=") for setting in given if setting.startswith("head=")]
    own = tuple(setting for setting in given if not setting.startswith("head="))
    if unknown := [head for head in heads[:1] if head not in HEADS] or heads[1:]:
        raise MFMError("E_CONFIG", f"--arms {word}: an arm has one head. {nearest(unknown[0], HEADS)}")
    name, separator, path = base.partition("=")
    is_named = bool(separator) and not Path(base).exists()
    if base == SCRATCH or (is_named and path == SCRATCH and is_arm_name(name)):
        return name, Arm(settings=own, head="".join(heads))
    place = find_checkpoint(path if is_named else base).absolute()
    if not place.exists():
        raise MFMError(
            "E_NOT_FOUND",
            f"--arms {word}: there is no file {place}. Give {SCRATCH}, a checkpoint, or NAME=CHECKPOINT.",
        )
    name = name if is_named else _name_after(place)
    if name == SCRATCH or not is_arm_name(name):
        advice = f"Use letters, digits and _ . + -, and not {SCRATCH}."
        raise MFMError("E_CONFIG", f"--arms {word}: a checkpoint's arm cannot be named '{name}'. {advice}")
    return name, Arm(str(place), hash_checkpoint(place), own, "".join(heads))


def _name_setting(setting: str) -> str:
    """Return the part of an arm's name for one of its settings, e.g. ``mix-cutmix``."""
    name, _, value = setting.partition("=")
    return re.sub(r"[^A-Za-z0-9.+-]", "_", f"{name.partition('.')[2]}-{value}")


def _name_after(file: Path) -> str:
    """Name an arm after task and run name if its checkpoint is in a run of mfm_pretrain, else after its file."""
    folder = file.parent.name
    if folder.startswith(_RUN_FOLDER):
        task, *rest = folder.removeprefix(_RUN_FOLDER).split("__")
        return "_".join([task, *rest[2:]])
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", file.stem)


def read_order(file: str | Path | None, subjects: Mapping[str, str]) -> list[str]:
    """Return the subjects in the order of a file with one subject, or one of its cases, per line; none without a file.

    Raises MFMError: E_NOT_FOUND, E_FORMAT, E_CONFIG (no line names a subject of the dataset).
    """
    if file is None:
        return []
    flag, everybody = f"--order {file}", set(subjects.values())
    lines = _read_lines(Path(file), flag, "Give a file with one subject per line.")
    found = {line: line if line in everybody else subjects.get(line) for line in lines}
    order = list(dict.fromkeys(subject for subject in found.values() if subject is not None))
    unknown = [line for line, subject in found.items() if subject is None]
    if not order:
        example = f", e.g. '{unknown[0]}'. {nearest(unknown[0], everybody)}" if unknown else "."
        raise MFMError("E_CONFIG", f"{flag}: no line names a subject of the dataset{example}")
    if unknown:
        logger.warning("%s: %d lines name no subject of the dataset, e.g. %s", flag, len(unknown), unknown[0])
    return order


def shuffle(subjects: Iterable[str], seed: int | str, strata: Mapping[str, int] | None = None) -> list[str]:
    """Return the subjects in the random order of a seed.

    With ``strata``, each subject's class, an order begins with one of each, and then has the classes in the proportion
    in which the subjects have them.
    """
    order = sorted(subjects, key=lambda subject: hashlib.sha256(f"{seed}:{subject}".encode()).hexdigest())
    if not strata:
        return order
    sizes, before = Counter(strata[subject] for subject in order), Counter[int]()
    places: dict[str, float] = {}
    for subject in order:
        stratum = strata[subject]
        places[subject] = (before[stratum] + 0.5) / sizes[stratum] if before[stratum] else 0.0
        before[stratum] += 1
    return sorted(order, key=lambda subject: places[subject])  # stable: equal places keep the random order


def draw_test(subjects: Mapping[str, str], wanted: str, strata: Mapping[str, int] | None = None) -> list[str]:
    """Draw the test cases and return them sorted; ``subjects`` maps every case to its subject.

    ``wanted`` is a share of the subjects (``20%``), a number of them, or a file of case names; ``strata`` as in
    :func:`shuffle`.
    """
    everybody = set(subjects.values())
    if wanted.endswith("%") or wanted.lstrip("-").isdigit():
        chosen = set(shuffle(everybody, TEST_DRAW, strata)[: _parse_count(wanted, len(everybody), "--test")])
    else:
        chosen = _subjects_in_file(subjects, Path(wanted))
    if not chosen:
        raise MFMError("E_CONFIG", f"--test {wanted}: the test split would be empty. Give at least one subject.")
    if chosen == everybody:
        reason = f"all {len(everybody)} subjects would be test subjects, none left for training. Give fewer."
        raise MFMError("E_CONFIG", f"--test {wanted}: {reason}")
    return _cases_of(subjects, chosen)


def draw_subset(
    subjects: Mapping[str, str],
    test: Collection[str],
    num_labels: int,
    seed: int,
    order: Sequence[str] = (),
    strata: Mapping[str, int] | None = None,
) -> list[str]:
    """Return the cases of the first ``num_labels`` subjects in the seed's order, so that smaller subsets are nested.

    The order of the first seed begins with the subjects in ``order``; ``strata`` as in :func:`shuffle`.
    """
    pool = {subject for case, subject in subjects.items() if case not in test}
    given = [subject for subject in order if subject in pool] if seed == 0 else []
    return _cases_of(subjects, [*given, *shuffle(pool - set(given), seed, strata)][:num_labels])


def count_labels(wanted: Sequence[str], num_subjects: int) -> list[int]:
    """Parse ``--labels`` into ascending numbers of labelled subjects out of ``num_subjects`` in the pool."""
    if not wanted:
        raise MFMError("E_CONFIG", "--labels: give at least one number of labels, e.g. --labels 5 10 20 100%.")
    counts: dict[int, str] = {}
    for text in wanted:
        count = _parse_count(text, num_subjects, "--labels")
        if not 1 <= count <= num_subjects:
            reason = f"without the test split there are {num_subjects} subjects"
            raise MFMError("E_CONFIG", f"--labels {text}: {reason}. Give 1 to {num_subjects}, or 100% for all.")
        if count in counts:
            raise MFMError("E_CONFIG", f"--labels {counts[count]} and {text} are both {count}. Give one of them.")
        counts[count] = text
    return sorted(counts)


def _cases_of(subjects: Mapping[str, str], chosen: Collection[str]) -> list[str]:
    return sorted(case for case, subject in subjects.items() if subject in chosen)


def _parse_count(text: str, total: int, flag: str) -> int:
    """Parse a number, or a share of ``total`` (at least one if the share is above zero)."""
    is_share = text.endswith("%")
    try:
        value = float(text[:-1]) if is_share else int(text)
    except ValueError as error:
        raise MFMError("E_CONFIG", f"{flag} {text}: expected a number such as 10, or a share such as 20%.") from error
    if not is_share:
        return max(0, int(value))
    if not 0 <= value <= 100:
        raise MFMError("E_CONFIG", f"{flag} {text}: expected a share from 0% to 100%.")
    return max(1, round(total * value / 100)) if value else 0


def _subjects_in_file(subjects: Mapping[str, str], file: Path) -> set[str]:
    """Return the subjects of the case names in a file, one name per line."""
    named = set(_read_lines(file, f"--test {file}", "Give a share (20%), a number, or a file of case names."))
    if unknown := sorted(named - set(subjects)):
        reason = f"{len(unknown)} names are not labelled cases, e.g. {unknown[0]}. {nearest(unknown[0], subjects)}"
        raise MFMError("E_CONFIG", f"--test {file}: {reason}")
    chosen = {subjects[case] for case in named}
    if left := [case for case in _cases_of(subjects, chosen) if case not in named]:
        reason = f"case {left[0]} is missing, but other cases of its subject {subjects[left[0]]} are listed"
        raise MFMError("E_CONFIG", f"--test {file}: {reason}. List all cases of a subject or none.")
    return chosen


def _read_lines(file: Path, flag: str, advice: str) -> list[str]:
    """Return the lines of a text file that are not empty, stripped."""
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{flag}: no such file. {advice}")
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except ValueError as error:
        raise MFMError("E_FORMAT", f"{flag}: expected a text file with one name per line.") from error
