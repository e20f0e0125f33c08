"""Training and validation streams of crops from a corpus: use of masks, balance between datasets, minimum sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.crops import CropStream, StreamSettings, case_weights, describe_shares, require_legal_balance
from mfm_nnunet.data.volumes import masked_cases, volume_shape
from mfm_nnunet.errors import MFMError
from mfm_nnunet.settings import PretrainSettings
from mfm_nnunet.tasks.base import Augmentation, PretextTask


@dataclass(frozen=True)
class Corpus:
    """The source of the streams: preprocessed cases, their volumes, and the names of training and validation cases."""

    cases: Sequence[Case]
    files: Mapping[str, Path]
    training: set[str]
    validation: set[str]

    def part(self, names: set[str]) -> list[Case]:
        """Return the named cases in the order of the corpus."""
        return [case for case in self.cases if case.name in names]

    def masked(self) -> set[str]:
        """Return the names of the cases with a preprocessed mask."""
        folders = {file.parent for file in self.files.values()}
        return set(self.files) & {name for folder in folders for name in masked_cases(folder)}


@dataclass(frozen=True)
class Streams:
    """Training and validation items, and notes for the user, one line each."""

    training: CropStream
    validation: CropStream
    notes: list[str]


def make_streams(
    corpus: Corpus,
    task_class: type[PretextTask],
    config: Any,
    patch_size: tuple[int, ...],
    settings: PretrainSettings,
    seed: int,
) -> Streams:
    """Make the two streams of a run of ``task_class`` with the resolved ``config``.

    Raises MFMError: E_CONFIG (settings that do not fit the corpus, volumes too small for the task), E_NOT_FOUND (masks
    registered after the volumes were preprocessed).
    """
    require_legal_balance(settings.balance_by, corpus.cases)
    _require_large_enough(corpus.files, task_class.smallest_volume(config))
    with_valid, notes = _use_masks(corpus, task_class, settings)
    if settings.balance_by:
        in_training = corpus.part(corpus.training)
        notes.append(describe_shares(in_training, settings.balance_by))
    transform = task_class.transform(config, patch_size)
    kinds: tuple[Augmentation, ...] = (_less(settings.augmentation, task_class.augmentation(config)), "none")
    streams = []
    for number, (names, augmentation) in enumerate(zip((corpus.training, corpus.validation), kinds)):
        drawn = StreamSettings(task_class.volumes_per_item(config), augmentation, seed, number, with_valid)
        weights = None
        if settings.balance_by:
            weights = case_weights(corpus.part(names), settings.balance_by)
        streams.append(CropStream([corpus.files[name] for name in names], transform, drawn, weights))
    return Streams(streams[0], streams[1], notes)


def _use_masks(corpus: Corpus, task_class: type[PretextTask], settings: PretrainSettings) -> tuple[bool, list[str]]:
    """Decide whether transforms get ``valid``, and describe the use of the corpus's masks in a line, if it has any."""
    named = {case.name for case in corpus.cases if case.anonymisation_mask is not None}
    there = corpus.masked()
    num_masks = len(there | named)
    if not num_masks:
        return False, []
    if not task_class.uses_valid or not settings.leave_out_anonymised:
        reason = f"{task_class.name} does not use them"
        if task_class.uses_valid:
            reason = "pretrain.leave_out_anonymised=false"
        return False, [f"the anonymisation masks of {num_masks} cases are not used: {reason}"]
    if missing := sorted(named - there):
        raise MFMError(
            "E_NOT_FOUND",
            f"{len(missing)} cases, e.g. {missing[0]}, got anonymisation masks after they were preprocessed. Run "
            "mfm_plan_and_preprocess again; it makes only what is missing.",
        )
    return True, [f"anonymised voxels of {num_masks} cases are left out of the loss"]


def _require_large_enough(files: Mapping[str, Path], smallest: tuple[int, ...] | None) -> None:
    """Check sizes from the file headers alone. In 2D the size of a slice counts."""
    if smallest is None:
        return
    shapes = {name: volume_shape(file)[-len(smallest) :] for name, file in files.items()}
    small = [name for name, shape in shapes.items() if any(n < least for n, least in zip(shape, smallest))]
    if small:
        shown = "".join(f"\n  {name}: {_size(shapes[name])}" for name in small[:5])
        more = f"\n  ... and {len(small) - 5} more" if len(small) > 5 else ""
        raise MFMError(
            "E_CONFIG",
            f"{len(small)} of {len(files)} preprocessed volumes are smaller than the {_size(smallest)} voxels that "
            f"this pretext task needs. Lower pretext.crop_size, or leave these scans out:{shown}{more}",
        )


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _less(first: Augmentation, second: Augmentation) -> Augmentation:
    return min(first, second, key=get_args(Augmentation).index)
