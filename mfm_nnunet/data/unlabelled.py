"""Unlabelled images beside a labelled dataset: found, checked against its held-out cases, preprocessed by its plan.

The preprocessed files lie in the corpus's own folder, under the name of their content (decision 4): a corpus that was
planned alike is not preprocessed again, and plans never overwrite each other's files.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data.cases import Case, group_channels, subject_of
from mfm_nnunet.data.corpus import corpus_hash, load_cases, read_dataset_json
from mfm_nnunet.data.preprocess import preprocess_dataset
from mfm_nnunet.data.volumes import open_array, read_box
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.files import inside
from mfm_nnunet.modalities import kind_of, kind_of_channel
from mfm_nnunet.plan import Plan
from mfm_nnunet.workspace import Workspace, num_cores

logger = logging.getLogger(__name__)

TEST_IMAGES = "imagesTs"
SAME = 1e-3
"""Largest difference between preprocessed voxels of one scan: nnU-Net's own preprocessing rounds in another order."""
BOX = 16
"""Voxels per axis that are compared first."""


@dataclass(frozen=True)
class Unlabelled:
    """Preprocessed images without labels."""

    name: str
    """The corpus or dataset."""
    folder: Path
    """Folder of the preprocessed files."""
    cases: tuple[str, ...]
    digest: str
    """Hash of names and sizes of the scans; it reveals neither."""
    labels: Mapping[str, Path] | None = None
    """File of each image's soft labels (:mod:`mfm_nnunet.finetune.pseudo_labels`)."""

    @property
    def description(self) -> dict[str, Any]:
        """Description in settings and checkpoints."""
        return {"name": self.name, "num_cases": len(self.cases), "hash": self.digest}


@dataclass(frozen=True)
class Labelled:
    """The labelled dataset of a run, its plan, and the cases of its fold."""

    plan: Plan
    configuration: str
    dataset: DatasetJson
    cases: Sequence[Case]
    """All current cases of the dataset."""
    training: Collection[str]
    held_out: Collection[str]
    """Validation cases that do not train."""

    def folder(self, here: Workspace) -> Path:
        """Return the folder of the dataset's preprocessed cases."""
        identifier = self.plan.configuration(self.configuration).data_identifier
        return inside(here.preprocessed, self.plan.dataset_name, identifier)


def prepare_unlabelled(here: Workspace, corpus: str | int, labelled: Labelled) -> Unlabelled:
    """Preprocess a corpus, or the images of another dataset, as the labelled dataset's plan says, and check it.

    Finished work is reused. The labelled dataset itself stands for its cases outside the fold. Single bad scans are
    left out with a warning. Raises MFMError: E_NOT_FOUND (no such corpus, no cases), E_CHANNELS (another number of
    channels), E_CONFIG (another modality, scans or subjects of the validation or test set), or the code of the scans if
    none can be preprocessed.
    """
    name = here.dataset_name(corpus)
    own = name == labelled.plan.dataset_name
    cases = _outside_the_fold(labelled) if own else _find_cases(here, name, labelled)
    _require_other_subjects(name, cases, labelled)
    if own:
        folder = labelled.folder(here)
    else:
        folder, failures = preprocess_like(here, name, cases, read_dataset_json(here.raw_folder(name)), labelled)
        cases = _without_failures(name, cases, failures, labelled.plan)
    _require_no_held_out(here, name, folder, cases, labelled)
    names = tuple(sorted(case.name for case in cases))
    sizes = {case: {"images": [(folder / f"{case}.b2nd").stat().st_size]} for case in names}
    digest = corpus_hash([Case(case, ()) for case in names], sizes)
    return Unlabelled(name, folder, names, digest)


def preprocess_like(
    here: Workspace, name: str, cases: Sequence[Case], dataset_json: Mapping[str, Any], labelled: Labelled
) -> tuple[Path, list[CaseFailure]]:
    """Preprocess images without labels as a labelled dataset's plan says; return their folder and the failures."""
    rules = {key: value for key, value in dataset_json.items() if key != "regions_class_order"}
    rules["labels"] = {"background": 0}
    identifier = labelled.plan.make_data_identifier(labelled.configuration, DatasetJson.of(rules))
    plans = json.loads(json.dumps(dict(labelled.plan.content)))
    plans["configurations"][labelled.configuration]["data_identifier"] = identifier
    folder = here.preprocessed / name
    folder.mkdir(parents=True, exist_ok=True)
    report = preprocess_dataset(cases, plans, [labelled.configuration], rules, folder, num_cores())
    done = report[labelled.configuration]
    text = "%s, without labels, as plan %s says: %d cases preprocessed, %d reused, %d failed"
    logger.info(text, name, labelled.plan.name, len(done.done), len(done.reused), len(done.failures))
    return inside(folder, identifier), done.failures


# The cases


def _outside_the_fold(labelled: Labelled) -> list[Case]:
    """Return the dataset's cases that neither train nor validate."""
    name, used = labelled.plan.dataset_name, {*labelled.training, *labelled.held_out}
    cases = [dataclasses.replace(case, label=None) for case in labelled.cases if case.name not in used]
    if not cases:
        raise MFMError(
            "E_NOT_FOUND",
            f"--unlabelled {name}: all cases of this dataset are in the fold. Give a corpus (mfm_plan_and_preprocess "
            "--images), or name fewer training cases in splits_final.json: the others are used without labels.",
        )
    return cases


def _find_cases(here: Workspace, name: str, labelled: Labelled) -> list[Case]:
    """Return the cases of a corpus that have the dataset's channels and modality, without labels."""
    raw = here.raw_folder(name)
    channels = DatasetJson.of(read_dataset_json(raw)).channels
    wanted = labelled.plan.configuration(labelled.configuration).num_channels
    if len(channels) != wanted:
        raise MFMError(
            "E_CHANNELS",
            f"--unlabelled {name}: its images have {len(channels)} channels, those of {labelled.plan.dataset_name} "
            f"have {wanted}. Register scans with the same channels.",
        )
    cases = [dataclasses.replace(case, label=None) for case in load_cases(raw)]
    own, other = kind_of_channel(labelled.dataset.channels[0]), kind_of_channel(channels[0])
    kinds = {case.name: kind_of(case.modality) or other for case in cases}
    fitting = [case for case in cases if not own or kinds[case.name] in (own, "")]
    if not fitting:
        theirs = ", ".join(sorted(set(kinds.values())))
        raise MFMError(
            "E_CONFIG",
            f"--unlabelled {name}: its images are {theirs}, those of {labelled.plan.dataset_name} are {own}. Register "
            "scans of that modality (mfm_plan_and_preprocess --images, --modality).",
        )
    if len(fitting) < len(cases):
        logger.info("--unlabelled %s: %d of %d cases are %s and are used", name, len(fitting), len(cases), own)
    return fitting


def _without_failures(name: str, cases: Sequence[Case], failures: Sequence[CaseFailure], plan: Plan) -> list[Case]:
    bad = {failure.case for failure in failures}
    good = [case for case in cases if case.name not in bad]
    shown = "\n".join(f"  {failure}" for failure in failures[:5])
    if not good:
        codes = {failure.code for failure in failures}
        raise MFMError(
            codes.pop() if len(codes) == 1 else "E_FORMAT",
            f"--unlabelled {name}: none of its {len(cases)} cases can be preprocessed as plan {plan.name} says:\n"
            f"{shown}",
        )
    if failures:
        logger.warning("--unlabelled %s: %d cases are left out:\n%s", name, len(failures), shown)
    return good


# Held-out cases


def _require_other_subjects(name: str, cases: Sequence[Case], labelled: Labelled) -> None:
    held_out = {case.subject for case in labelled.cases if case.name in labelled.held_out}
    if found := sorted(case.name for case in cases if case.subject in held_out):
        raise MFMError(
            "E_CONFIG",
            f"--unlabelled {name}: {len(found)} cases are of subjects that validate this fold, e.g. {found[0]}, so the "
            "validation would not be of unseen subjects. Register the corpus without them. If they are other people of "
            "the same name, register it from a CSV with the column 'subject'.",
        )


def _require_no_held_out(here: Workspace, name: str, folder: Path, cases: Sequence[Case], labelled: Labelled) -> None:
    """Refuse scans that validate or test the labelled dataset, whatever their names and file formats."""
    own, files = labelled.folder(here), [folder / f"{case.name}.b2nd" for case in cases]
    if found := find_same([own / f"{case}.b2nd" for case in sorted(labelled.held_out)], files):
        _refuse_held_out(name, "validation case", "of the fold", found)
    if found := find_same(_test_volumes(here, labelled), files):
        _refuse_held_out(name, "test case", f"in {TEST_IMAGES}", found)
    if found := find_same([own / f"{case}.b2nd" for case in sorted(labelled.training)], files):
        logger.info("--unlabelled %s: %d of its cases are also labelled training cases", name, len(found))


def _refuse_held_out(name: str, kind: str, where: str, found: Sequence[tuple[Path, Path]]) -> None:
    first = " is ".join(file.stem for file in reversed(found[0]))
    raise MFMError(
        "E_CONFIG",
        f"--unlabelled {name}: {len(found)} scans have the voxels of a {kind} {where}, e.g. {first}. A score on it "
        "would not be on unseen scans. Register the corpus without them.",
    )


def _test_volumes(here: Workspace, labelled: Labelled) -> list[Path]:
    """Preprocess the dataset's test images, if there are any, and return the files."""
    name = labelled.plan.dataset_name
    raw = inside(here.raw, name)
    images = raw / TEST_IMAGES
    if not images.is_dir():
        return []
    dataset_json = read_dataset_json(raw)
    groups = group_channels(images, dataset_json["file_ending"])
    cases = [
        Case(f"test_{case}", tuple(files[channel] for channel in sorted(files)), None, subject_of(Path(case)))
        for case, files in groups.items()
    ]
    if not cases:
        return []
    folder, failures = preprocess_like(here, name, cases, dataset_json, labelled)
    bad = {failure.case for failure in failures}
    if failures:
        text = "%s: %d of %d test images are not compared with the unlabelled ones, e.g. %s"
        logger.warning(text, images, len(failures), len(cases), failures[0])
    return [folder / f"{case.name}.b2nd" for case in cases if case.name not in bad]


def find_same(first: Iterable[Path], second: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Return the pairs of preprocessed volumes with equal shapes and voxels (up to rounding).

    Only the middle of volumes of one shape is compared, and the whole of those that agree there.
    """
    known: dict[tuple[int, ...], list[tuple[Path, np.ndarray]]] = {}
    for file in second:
        shape, middle = _middle(file)
        known.setdefault(shape, []).append((file, middle))
    pairs = []
    for file in (file for file in first if file.is_file()):
        shape, middle = _middle(file)
        alike = (other for other, box in known.get(shape, ()) if _is_same(box, middle))
        pairs += [(file, other) for other in alike if _is_same(open_array(str(other))[:], open_array(str(file))[:])]
    return pairs


def _middle(file: Path) -> tuple[tuple[int, ...], np.ndarray]:
    volume = open_array(str(file))
    size = [min(BOX, length) for length in volume.shape[1:]]
    lower = [(length - side) // 2 for length, side in zip(volume.shape[1:], size)]
    return tuple(volume.shape), read_box(volume, lower, size)


def _is_same(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.abs(first - second).max() < SAME)
