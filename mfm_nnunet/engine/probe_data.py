"""The labelled cases of a probe: chosen, checked, preprocessed with the pretraining plan, and cut into tiles.

Nothing here draws from a global generator. Legend: C channels, D H W voxels of a patch (2D: H W), K classes.
"""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet.data import corpus, storage
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.preprocess import preprocess_dataset, preprocessing_hash
from mfm_nnunet.data.volumes import open_volume, read_box
from mfm_nnunet.errors import MFMError, dataset_refused
from mfm_nnunet.files import inside
from mfm_nnunet.metrics import foreground_labels, ignore_label
from mfm_nnunet.workspace import Workspace, num_cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeDataset:
    """What a probe uses of a labelled dataset: names only, so every process may hold it."""

    name: str
    dataset_json: dict[str, Any]
    fit: tuple[Case, ...]
    held_out: tuple[Case, ...]
    others: tuple[Case, ...]
    """Labelled cases that are not used."""
    folder: Path
    """Where the preprocessed cases are or will be."""

    @property
    def classes(self) -> int:
        """Number of values in the label maps, background included, without the value to ignore."""
        labels = self.dataset_json["labels"]
        values = [np.atleast_1d(value).astype(int).max() for name, value in labels.items() if name != "ignore"]
        return int(max(values)) + 1

    @property
    def foreground(self) -> dict[str, tuple[int, ...]]:
        """Names and values of the structures whose Dice is measured."""
        return foreground_labels(self.dataset_json)

    @property
    def ignored(self) -> int | None:
        """The value of voxels that do not count."""
        return ignore_label(self.dataset_json)

    def description(self) -> dict[str, Any]:
        """What a continued run must find again; no name of a case."""
        cases = [*self.fit, *self.held_out]
        return {"dataset": self.name, "num_cases": len(cases), "hash": corpus.corpus_hash(cases)}


def choose_cases(
    here: Workspace, dataset: str | int, plans: dict[str, Any], configuration: str, max_cases: int, seed: int
) -> ProbeDataset:
    """The cases of a labelled dataset that a probe uses: at most ``max_cases``, every third subject held out.

    The same for the same dataset and seed. Nothing is read but file names. Raises MFMError: E_NOT_FOUND (no such
    dataset, missing files), E_CONFIG (no labels, a single subject), E_CHANNELS, E_FORMAT (dataset.json).
    """
    name = here.dataset_name(dataset)
    raw, resolved = here.raw / name, plans["configurations"][configuration]
    dataset_json = corpus.read_dataset_json(raw)
    if corpus.is_corpus(raw) or not foreground_labels(dataset_json):
        raise MFMError("E_CONFIG", f"--probe {dataset}: {name} has no labels. Name a labelled dataset.")
    num_channels = len(dataset_json.get("channel_names") or dataset_json["modality"])
    expected = len(resolved["normalization_schemes"])
    if num_channels != expected:
        raise MFMError(
            "E_CHANNELS",
            f"--probe {dataset}: {name} has {num_channels} channels, the network that is pretrained takes {expected}. "
            "Name a dataset with as many.",
        )
    cases = [case for case in corpus.load_cases(raw) if case.label is not None]
    chosen = _choose(cases, max_cases, seed)
    if len({case.subject for case in chosen}) < 2:
        raise MFMError(
            "E_CONFIG",
            f"--probe {dataset}: {name} has labels of {len({case.subject for case in cases})} subject; a probe needs "
            "two, one to learn from and one to measure the Dice on. Add labelled cases.",
        )
    subjects = list(dict.fromkeys(case.subject for case in chosen))
    held_out = set(subjects[2::3] or subjects[-1:])
    return ProbeDataset(
        name,
        dataset_json,
        tuple(case for case in chosen if case.subject not in held_out),
        tuple(case for case in chosen if case.subject in held_out),
        tuple(case for case in cases if case not in chosen),
        inside(here.preprocessed, name, resolved["data_identifier"]),
    )


def _choose(cases: Sequence[Case], max_cases: int, seed: int) -> list[Case]:
    """Cases of whole subjects in a random order; of at least two subjects if there are as many."""
    subjects = sorted({case.subject for case in cases})
    random.Random(seed).shuffle(subjects)
    chosen: list[Case] = []
    for number, subject in enumerate(subjects):
        theirs = [case for case in cases if case.subject == subject]
        if number < 2 or len(chosen) + len(theirs) <= max_cases:
            chosen += theirs
    return chosen


def preprocess(dataset: ProbeDataset, plans: dict[str, Any], configuration: str) -> None:
    """Preprocess the cases as the pretraining plan says; what is there already is reused.

    Raises MFMError: E_EXISTS when the folder holds data of another plan, E_DISK_FULL, and for bad cases, all listed,
    their common code or E_FORMAT.
    """
    settings_hash = preprocessing_hash(plans, configuration, dataset.dataset_json)
    stored, entries = storage.stored_cases(dataset.folder), storage.Manifest.read(dataset.folder).entries
    current = {case.name for case in (*dataset.fit, *dataset.held_out, *dataset.others)}
    foreign = sorted(case for case in stored & current if entries.get(case, {}).get("hash") != settings_hash)
    if foreign:
        raise MFMError(
            "E_EXISTS",
            f"{dataset.folder}: holds {len(foreign)} cases that were preprocessed with other settings, which a probe "
            "does not replace. Delete the folder if no plan needs it.",
        )
    used = [*dataset.fit, *dataset.held_out]
    # Cases that another run used are named too, else preprocessing would say that the dataset has lost them.
    cases = [*used, *(case for case in dataset.others if case.name in stored)]
    report = preprocess_dataset(cases, plans, configuration, dataset.dataset_json, dataset.folder.parent, num_cores())
    names = {case.name for case in used}
    failures = [failure for failure in report.failures if failure.case in names]
    if failures:
        raise dataset_refused(dataset.name, failures, len(used), " for the probe")
    logger.info(
        "probe on %s: learns from %d cases, measures on %d; %d preprocessed, %d reused",
        dataset.name, len(dataset.fit), len(dataset.held_out), len(report.done), len(report.reused),
    )  # fmt: skip


@dataclass(frozen=True)
class Tile:
    """Where one patch lies in a volume: ``lower`` may be negative, in 2D ``leading`` is the slice."""

    lower: tuple[int, ...]
    leading: tuple[int, ...] = ()


class LabelledVolume:
    """A preprocessed case; voxels are read patch by patch.

    ``labels`` (D, H, W) int16: -1 where a voxel does not count, 0 for background and outside the non-zero region.
    """

    def __init__(self, folder: Path, case: str, ignored: int | None) -> None:
        self.image = open_volume(str(inside(folder, f"{case}.b2nd")))
        self.labels = np.maximum(open_volume(str(inside(folder, f"{case}_seg.b2nd")))[0], 0).astype(np.int16)
        if ignored is not None:
            self.labels[self.labels == ignored] = -1

    def tiles(self, patch_size: Sequence[int]) -> list[Tile]:
        """Patches that together cover the volume, overlapping as little as they can."""
        shape = self.labels.shape[-len(patch_size) :]
        starts = [_starts(extent, size) for extent, size in zip(shape, patch_size)]
        is_2d = len(patch_size) < self.labels.ndim
        leading: list[tuple[int, ...]] = [(index,) for index in range(len(self.labels))] if is_2d else [()]
        return [Tile(lower, first) for first in leading for lower in itertools.product(*starts)]

    def patch(self, tile: Tile, patch_size: Sequence[int]) -> Tensor:
        """The image (C, *patch) at a tile, 0 outside the volume."""
        return torch.from_numpy(read_box(self.image, tile.lower, patch_size, tile.leading))

    def inside(self, tile: Tile, patch_size: Sequence[int]) -> tuple[tuple, tuple]:
        """The part of a tile that lies in the volume: indices into the volume and into the patch."""
        shape = self.labels.shape[len(tile.leading) :]
        ends = [(max(low, 0), min(low + size, extent)) for low, size, extent in zip(tile.lower, patch_size, shape)]
        volume = (*tile.leading, *(slice(start, stop) for start, stop in ends))
        return volume, tuple(slice(start - low, stop - low) for (start, stop), low in zip(ends, tile.lower))

    def label_patch(self, tile: Tile, patch_size: Sequence[int]) -> np.ndarray:
        """The label map at a tile, (D, H, W), -1 outside the volume."""
        patch = np.full(tuple(patch_size), -1, np.int16)
        volume, inside = self.inside(tile, patch_size)
        patch[inside] = self.labels[volume]
        return patch


def _starts(extent: int, size: int) -> list[int]:
    """Lower ends of the fewest windows that cover an axis; one in the middle where the axis is shorter."""
    if extent <= size:
        return [(extent - size) // 2]
    steps = math.ceil(extent / size) - 1
    return [round(step * (extent - size) / steps) for step in range(steps + 1)]
