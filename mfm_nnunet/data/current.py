"""Which cases a dataset or corpus has now: the one answer for training, validation, pretraining and all counts.

Preprocessed data of cases that were taken out stay on the disk, because nothing that another plan may use is deleted;
so a listing of that folder says what was preprocessed at some time, and not what may be used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mfm_nnunet.data import corpus
from mfm_nnunet.data.corpus import Case, subject_of
from mfm_nnunet.data.labelled import IMAGES
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import read_json

FINGERPRINT = "dataset_fingerprint.json"


@dataclass(frozen=True)
class Selection:
    """The cases that may be used of those that are preprocessed."""

    cases: list[Case]
    """Current and preprocessed, sorted by name."""
    removed: list[str]
    """Preprocessed and no longer in the dataset, or refused when it was planned last."""
    missing: list[str]
    """In the dataset and not preprocessed, and no planning said why."""
    source: Path | None
    """What says which cases there are; None where nothing does, and all that is preprocessed is used."""

    @property
    def names(self) -> list[str]:
        """Names of the cases that may be used."""
        return [case.name for case in self.cases]

    def notes(self) -> list[str]:
        """Return what the user should know: a line for what is left over, and one for what is not preprocessed."""
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
    """Choose the cases that a dataset has now among those ``stored`` in a folder of preprocessed data.

    ``raw`` is the dataset's raw folder, which decides where it holds a list of cases. Else the list of the last
    planning does, which lies in ``beside``, the dataset's preprocessed folder: corpus.json, or the fingerprint of a
    labelled dataset. Data of stock nnU-Net without raw folder have no list; then all that is stored is used.

    Raises MFMError when the list cannot be read, as :func:`mfm_nnunet.data.corpus.load_cases`.
    """
    planned, refused = _planned(beside)
    source: Path | None = None
    current: Sequence[Case] = [_named(name) for name in stored]
    if raw is not None and _has_list(raw):
        source, current = raw, _of_raw(raw)
    elif corpus.is_corpus(beside):
        source, current = beside, corpus.load_cases(beside)
    elif planned is not None:
        source, current = beside / FINGERPRINT, [_named(name) for name in planned]
    if source is None or not corpus.is_corpus(source):
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
    """Whether a raw folder tells its cases; images may have been moved away since the dataset was preprocessed."""
    if corpus.is_corpus(raw) or not (raw / "dataset.json").is_file():
        return corpus.is_corpus(raw)
    images = raw / IMAGES
    is_listed = images.is_dir() and any(not file.name.startswith(".") for file in images.iterdir())
    return is_listed or "dataset" in corpus.read_dataset_json(raw)


def _of_raw(raw: Path) -> Sequence[Case]:
    try:
        return corpus.load_cases(raw, need_mapped_files=False)
    except MFMError as error:
        raise MFMError(
            error.code,
            f"{error.message}\nThe raw dataset says which cases may be used. To use those of the last planning, move "
            f"{raw} away.",
        ) from error


def _planned(beside: Path) -> tuple[list[str] | None, set[str]]:
    """The cases of the last planning, None where it was stock nnU-Net's, and those that it refused."""
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
