"""Extract the fingerprint of a dataset, with or without labels: spacings, cropped shapes, intensities.

Keys and meaning are nnU-Net's: intensities of the foreground (labels above 0, or all non-zero voxels without labels),
with equal weight per case. nnU-Net estimates the statistics from 1e8 random draws. Here mean, standard deviation,
minimum and maximum are exact, and percentiles are exact up to :data:`MAX_VALUES` foreground voxels. Memory is bounded
by that number and by one image per worker.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import bounding_box_to_slice, get_bbox_from_mask

from mfm_nnunet.data.cases import require_scan
from mfm_nnunet.data.loops import in_threads, with_progress
from mfm_nnunet.data.preprocess import find_nonzero
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError
from mfm_nnunet.images import reading

if TYPE_CHECKING:
    from mfm_nnunet.data.cases import Case

MAX_VALUES = 1 << 23
"""Number of intensities (float32) kept for the percentiles, over all cases and channels."""

PERCENTILES = {"median": 50.0, "percentile_99_5": 99.5, "percentile_00_5": 0.5}


@dataclass(frozen=True)
class ChannelStatistics:
    """Foreground intensities of one channel of a case; ``values`` (float32) are sorted, and thinned if too many."""

    mean: float
    variance: float
    minimum: float
    maximum: float
    values: np.ndarray


@dataclass(frozen=True)
class CaseStatistics:
    """Spacing in mm of a case, and shape (D, H, W) and share of voxels after cropping to the non-zero box."""

    spacing: list[float]
    shape_after_crop: list[int]
    relative_size: float
    channels: list[ChannelStatistics] | None
    """None for a case without foreground."""


def extract_fingerprint(
    cases: Sequence[Case], dataset_json: dict[str, Any], num_processes: int = 1
) -> tuple[dict[str, Any], list[CaseFailure]]:
    """Return the fingerprint of ``cases`` as JSON values, and the failed cases.

    It has all of nnU-Net's keys, and ``"mfm"``: names of the used cases (in the order of ``spacings``), whether they
    are labelled, number of channels, the reader, and whether the percentiles are exact. The result does not depend on
    ``num_processes`` (these are threads, as reading releases the GIL).

    Raises MFMError: E_NOT_FOUND (no cases), E_LABEL_VALUE (no foreground in any label), and CasesFailedError if no
    case could be read.
    """
    if not cases:
        raise MFMError("E_NOT_FOUND", "the dataset has no cases. Check its folder, or register images for it.")
    num_channels = len(DatasetJson.of(dataset_json).channels)
    has_labels = all(case.label is not None for case in cases)
    used: list[Case] = []
    statistics: list[CaseStatistics] = []
    failures: list[CaseFailure] = []
    pool = _Pool(num_channels)
    reader = choose_reader(cases, dataset_json, num_processes)
    work = functools.partial(_analyse, reader=reader, dataset_json=dataset_json, num_channels=num_channels)
    outcomes = in_threads(work, cases, num_processes)
    with with_progress(outcomes, len(cases), "reading the images") as counted:
        for case, outcome in counted:
            if isinstance(outcome, CaseFailure):
                failures.append(outcome)
                continue
            used.append(case)
            pool.add(outcome.channels)
            statistics.append(replace(outcome, channels=None))
    if not used:
        raise CasesFailedError(failures, len(cases))
    if not pool.has_foreground:
        raise MFMError(
            "E_LABEL_VALUE",
            f"none of the {len(used)} label files marks any foreground: every voxel is 0. Check that the labels belong "
            "to these images and that dataset.json names their values.",
        )
    fingerprint = {
        "spacings": [item.spacing for item in statistics],
        "shapes_after_crop": [item.shape_after_crop for item in statistics],
        "foreground_intensity_properties_per_channel": {str(c): pool.properties(c) for c in range(num_channels)},
        "median_relative_size_after_cropping": float(np.median([item.relative_size for item in statistics])),
        "mfm": {
            "case_names": [case.name for case in used],
            "has_labels": has_labels,
            "num_channels": num_channels,
            "reader": reader,
            "percentiles_exact": pool.exact,
        },
    }
    return fingerprint, failures


def choose_reader(cases: Sequence[Case], dataset_json: Mapping[str, Any], num_processes: int = 1) -> str:
    """Choose nnU-Net's reader for all files of a dataset, because a plan names only one.

    This is NibabelIO if any NIfTI file needs it, because it can read the others too; else the reader of most cases.
    Raises MFMError as :func:`mfm_nnunet.images.reading.reader_for` if that fails for every case.
    """
    work = functools.partial(_readers_of, dataset_json=dataset_json)
    wanted = Counter[str]()
    for _, outcome in in_threads(work, cases, num_processes):
        if not isinstance(outcome, CaseFailure):  # reported later, when the case is read
            wanted.update(outcome)
    if not wanted:
        return reading.reader_for(cases[0].images[0], dataset_json)
    return "NibabelIO" if set(wanted) == {"NibabelIO", "SimpleITKIO"} else wanted.most_common(1)[0][0]


def _readers_of(case: Case, *, dataset_json: Mapping[str, Any]) -> set[str]:
    files = [*case.images, *([case.label] if case.label is not None else [])]
    return {reading.reader_for(file, dataset_json) for file in files}


def _analyse(case: Case, *, reader: str, dataset_json: dict[str, Any], num_channels: int) -> CaseStatistics:
    image_CDHW, properties = reading.read_image(case.images, reader)
    if case.label is None:
        require_scan(case.images[0], image_CDHW)
    if len(image_CDHW) != num_channels and case.label is None and len(case.images) == 1:
        raise MFMError("E_CHANNELS", _other_colours(case, len(image_CDHW), num_channels))
    if len(image_CDHW) != num_channels:
        raise MFMError(
            "E_CHANNELS",
            f"{case.name} has {len(image_CDHW)} channels, dataset.json names {num_channels}. "
            "Add the missing files, or correct channel_names.",
        )
    label = None
    if case.label is not None:
        label, label_properties = reading.read_label(case.label, reader)
        reading.check_label(label, label_properties, image_CDHW, properties, dataset_json, case.name)
    nonzero_DHW = find_nonzero(image_CDHW)
    # nnU-Net fills holes before it computes the box, but this cannot change the box.
    box = bounding_box_to_slice(get_bbox_from_mask(nonzero_DHW))
    foreground_DHW = nonzero_DHW[box] if label is None else label[0][box] > 0
    shape = foreground_DHW.shape
    has_foreground = bool(foreground_DHW.any())
    return CaseStatistics(
        spacing=[float(mm) for mm in properties["spacing"]],
        shape_after_crop=[int(n) for n in shape],
        relative_size=float(np.prod(shape) / np.prod(image_CDHW.shape[1:])),
        channels=[_summarise(x_DHW[box][foreground_DHW]) for x_DHW in image_CDHW] if has_foreground else None,
    )


def _other_colours(case: Case, found: int, wanted: int) -> str:
    """Explain why an image of a corpus is refused. In a corpus, a file with several channels is a colour image."""
    kinds = {1: "grey", 3: "in colour", 4: "in colour with transparency"}
    is_kind, wanted_kind = kinds.get(found, "of another kind"), kinds.get(wanted, "of another kind")
    return (
        f"{case.images[0]}: is {is_kind} ({found} channels), and this corpus is {wanted_kind} ({wanted} channels). "
        f"Save it as the others are, or register the pictures that are {is_kind} as a corpus of their own."
    )


def _summarise(values: np.ndarray) -> ChannelStatistics:
    values = np.sort(values.astype(np.float32, copy=False))
    mean = float(values.mean(dtype=np.float64))
    variance = float(np.mean(np.square(values - mean, dtype=np.float64)))
    return ChannelStatistics(mean, variance, float(values[0]), float(values[-1]), _thin(values, MAX_VALUES))


def _thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Return at most ``limit`` of the sorted ``values`` at evenly spaced ranks."""
    if len(values) <= limit:
        return values
    return values[((np.arange(limit) + 0.5) * (len(values) / limit)).astype(np.int64)]


class _Pool:
    """Foreground intensities of all cases, with equal weight per case."""

    def __init__(self, num_channels: int) -> None:
        self._cases: list[list[ChannelStatistics]] = []
        self._values: list[list[np.ndarray]] = [[] for _ in range(num_channels)]
        self._num_values = 0
        self.exact = True

    @property
    def has_foreground(self) -> bool:
        return bool(self._cases)

    def add(self, channels: list[ChannelStatistics] | None) -> None:
        if channels is None:
            return
        nothing = np.empty(0, dtype=np.float32)
        self._cases.append([ChannelStatistics(c.mean, c.variance, c.minimum, c.maximum, nothing) for c in channels])
        for values, channel in zip(self._values, channels):
            values.append(channel.values)
            self._num_values += len(channel.values)
            self.exact &= len(channel.values) < MAX_VALUES
        if self._num_values > MAX_VALUES:
            self._shrink()

    def _shrink(self) -> None:
        """Thin the largest cases to half of MAX_VALUES in total, so that this is rarely needed."""
        self.exact = False
        sizes = np.sort([len(item) for values in self._values for item in values])
        # Find the common limit L with sum(min(size, L)) close to the target, starting with the small cases.
        target, limit = MAX_VALUES // 2, 1
        for position, size in enumerate(sizes):
            limit = max(target // (len(sizes) - position), 1)
            if size > limit:
                break
            target -= size
        self._values = [[_thin(item, int(limit)) for item in values] for values in self._values]
        self._num_values = sum(len(item) for values in self._values for item in values)

    def properties(self, channel: int) -> dict[str, float]:
        """Return nnU-Net's ``foreground_intensity_properties_per_channel`` of one channel."""
        cases = [case[channel] for case in self._cases]
        means = np.array([case.mean for case in cases])
        mean = float(means.mean())
        variance = float(np.mean([case.variance for case in cases]) + np.mean((means - mean) ** 2))
        return {
            "mean": mean,
            "std": variance**0.5,
            "min": min(case.minimum for case in cases),
            "max": max(case.maximum for case in cases),
            **weighted_percentiles(self._values[channel]),
        }


def weighted_percentiles(groups: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the percentiles 0.5, 50 and 99.5 of the pooled groups, with equal total weight per group.

    A percentile is the smallest value with at least that share of the weight at or below it. nnU-Net's random draws
    converge to it.
    """
    values = np.concatenate(groups)
    weights = np.concatenate([np.full(len(group), 1 / len(group)) for group in groups])
    order = np.argsort(values, kind="stable")
    share = np.cumsum(weights[order])
    # Tolerance for rounding: a share that is reached exactly must not be missed.
    share /= share[-1] * (1 - 1e-12)
    return {name: float(values[order[np.searchsorted(share, q / 100)]]) for name, q in PERCENTILES.items()}
