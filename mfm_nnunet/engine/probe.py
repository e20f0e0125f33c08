"""A linear probe on a few labelled cases: it measures the weights every few epochs of pretraining.

Losses of different pretext tasks cannot be compared, but the Dice of a probe can. It is a function of weights, seed and
data alone, and restores the network's modes and torch's generators. The main process computes it while the others wait.

Legend: B batch, C channels, F features, K classes, N voxels, D H W voxels of a patch (2D: H W).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from mfm_nnunet.data import corpus, storage
from mfm_nnunet.data.preprocess import preprocess_dataset
from mfm_nnunet.data.sizes import sliding_windows
from mfm_nnunet.data.volumes import open_volume, read_box
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import autocast
from mfm_nnunet.errors import MFMError, dataset_refused
from mfm_nnunet.files import inside
from mfm_nnunet.metrics import dice, mean_dice
from mfm_nnunet.models.backbone import AbstractBackbone, modes_kept
from mfm_nnunet.plan import Plan
from mfm_nnunet.processes import World
from mfm_nnunet.settings import ProbeSettings, to_dict
from mfm_nnunet.workspace import Workspace, num_cores

logger = logging.getLogger(__name__)

Labeller = Callable[[Tensor], Tensor]
"""Maps patches (B, C, D, H, W) to scores (B, K, D, H, W)."""
Window = tuple[Any, ...]
"""Index of a patch in a volume: one slice per axis of the patch. In 2D the number of the slice comes first."""
PATIENCE = datetime.timedelta(days=1)
"""Time limit of the waiting processes; NCCL's default is ten minutes."""
MAX_SLICES = 16
"""Number of 2D patches labelled at once."""
NUM_VOXELS = 20_000
"""Number of voxels the classifier is fitted on, over all cases and classes."""
TILES_PER_CLASS = 2
"""Number of patches per case and class from which voxels are drawn, so that a large volume costs little."""
PENALTY = 1e-3
"""Weight of the classifier's squared norm, for standardised features."""
RETIRED = {"steps": 200, "learning_rate": 1e-3}
"""Settings of the former probe by fine-tuning. They are still saved, so runs started with a linear probe before its
removal can be resumed.
"""


class LabelledVolume:
    """A preprocessed case, padded to at least the patch size. The image is read patch by patch.

    ``labels`` (D, H, W) int16: -1 for ignored and padded voxels, 0 for background and outside the non-zero region.
    """

    def __init__(self, image: Any, labels: np.ndarray, patch_size: Sequence[int]) -> None:
        self.image, self.patch_size = image, tuple(patch_size)
        self._num_leading = labels.ndim - len(patch_size)
        gaps = [max(0, size - extent) for size, extent in zip(patch_size, labels.shape[self._num_leading :])]
        self._margins = [(gap + 1) // 2 for gap in gaps]
        padding = [(0, 0)] * self._num_leading + [(low, gap - low) for low, gap in zip(self._margins, gaps)]
        self.labels = np.pad(labels, padding, constant_values=-1)

    def windows(self) -> list[Window]:
        """Cover the volume with as few patches as possible."""
        return sliding_windows(self.labels.shape, self.patch_size, step_size=1)

    def patch(self, window: Window) -> Tensor:
        """Read the image (C, *patch) of a window; 0 outside the volume."""
        leading, sides = window[: self._num_leading], window[self._num_leading :]
        lower = [side.start - margin for side, margin in zip(sides, self._margins)]
        return torch.from_numpy(read_box(self.image, lower, self.patch_size, leading))


@dataclass(frozen=True)
class Probe:
    """The probe of a run. It stores names and settings only, so every process has one."""

    settings: ProbeSettings
    name: str
    """Name of the labelled dataset."""
    dataset: DatasetJson
    plan: Plan
    configuration: str
    folder: Path
    """Folder of the preprocessed cases."""
    fit: tuple[corpus.Case, ...]
    held_out: tuple[corpus.Case, ...]
    unused: tuple[corpus.Case, ...]
    """Labelled cases of the dataset that the probe does not use."""
    seed: int

    @property
    def num_classes(self) -> int:
        """Number of values in the label maps, including background but not the ignore label."""
        return 1 + max((value for values in self.dataset.foreground.values() for value in values), default=0)

    def description(self) -> dict[str, Any]:
        """Settings that must not change when the run is resumed; no case names."""
        cases = [*self.fit, *self.held_out]
        data = {"dataset": self.name, "num_cases": len(cases), "hash": corpus.corpus_hash(cases)}
        return {**data, **to_dict(self.settings), **RETIRED}

    def measure(
        self, backbone: AbstractBackbone, device: torch.device, dtype: torch.dtype | None = None
    ) -> dict[str, float | None]:
        """Fit the probe and return ``probe_dice`` (mean over labels), ``probe_dice_<label>`` and ``probe_seconds``.

        A Dice is the mean over the held-out cases, or None for a label that no case has and that was never predicted.
        """
        start = time.monotonic()

        def features(x_BCDHW: Tensor) -> list[Tensor]:
            with autocast(device, dtype):
                return [feature_map.float() for feature_map in backbone.features(x_BCDHW.to(device))]

        with _undisturbed(backbone, device), torch.no_grad():
            torch.manual_seed(self.seed)
            backbone.eval()
            fit = [self._open(case, backbone.patch_size) for case in self.fit]
            label = linear_labeller(features, fit, self.num_classes, np.random.default_rng([self.seed, 2]))
            scores: dict[str, list[float]] = {name: [] for name in self.dataset.foreground}
            for case in self.held_out:
                volume = self._open(case, backbone.patch_size)
                predicted = label_volume(label, volume)
                for name, values in self.dataset.foreground.items():
                    scores[name].append(dice(volume.labels, predicted, values, ignore=-1))
        by_label = {f"probe_dice_{name}": mean_dice(values) for name, values in scores.items()}
        row = {"probe_dice": mean_dice(list(by_label.values())), **by_label}
        seconds = round(time.monotonic() - start, 3)
        return {**{name: None if math.isnan(value) else value for name, value in row.items()}, "probe_seconds": seconds}

    def _open(self, case: corpus.Case, patch_size: Sequence[int]) -> LabelledVolume:
        labels = open_volume(str(inside(self.folder, f"{case.name}_seg.b2nd")))[0].astype(np.int16).clip(min=0)
        if self.dataset.ignore is not None:
            labels[labels == self.dataset.ignore] = -1
        return LabelledVolume(open_volume(str(inside(self.folder, f"{case.name}.b2nd"))), labels, patch_size)


def make_probe(
    here: Workspace, dataset: str | int | None, plan: Plan, configuration: str, settings: ProbeSettings, seed: int
) -> Probe | None:
    """Choose at most ``max_cases`` cases of a labelled dataset and hold out every third subject; None without a probe.

    The choice depends on the dataset and seed only; only file names are read. Raises MFMError: E_NOT_FOUND (no such
    dataset, missing files), E_CONFIG (no labels, a single subject), E_CHANNELS, E_FORMAT (dataset.json).
    """
    if dataset is None:
        if changed := [name for name, value in to_dict(settings).items() if value != getattr(ProbeSettings(), name)]:
            advice = "Give its labelled dataset with --probe DATASET."
            raise MFMError("E_CONFIG", f"probe.{changed[0]} is set, but there is no probe. {advice}")
        return None
    name, resolved = here.dataset_name(dataset), plan.configuration(configuration)
    raw = here.raw / name
    about = DatasetJson.of(corpus.read_dataset_json(raw))
    if corpus.is_corpus(raw) or not about.foreground:
        raise MFMError("E_CONFIG", f"--probe {dataset}: {name} has no labels. Give a labelled dataset.")
    if len(about.channels) != resolved.num_channels:
        raise MFMError(
            "E_CHANNELS",
            f"--probe {dataset}: {name} has {len(about.channels)} channels, the pretrained network takes "
            f"{resolved.num_channels}. Give a dataset with as many.",
        )
    cases = [case for case in corpus.load_cases(raw) if case.label is not None]
    chosen = _choose(cases, settings.max_cases, seed)
    subjects = list(dict.fromkeys(case.subject for case in chosen))
    if len(subjects) < 2:
        raise MFMError(
            "E_CONFIG",
            f"--probe {dataset}: {name} has labels of {len(subjects)} subject; a probe needs two, one to fit and one "
            "to measure the Dice on. Add labelled cases.",
        )
    apart = set(subjects[2::3] or subjects[-1:])
    fit = tuple(case for case in chosen if case.subject not in apart)
    held_out = tuple(case for case in chosen if case.subject in apart)
    unused = tuple(case for case in cases if case not in chosen)
    folder = inside(here.preprocessed, name, resolved.data_identifier)
    return Probe(settings, name, about, plan, configuration, folder, fit, held_out, unused, seed)


def _choose(cases: Sequence[corpus.Case], max_cases: int, seed: int) -> list[corpus.Case]:
    """Choose all cases of randomly ordered subjects, from at least two subjects if possible."""
    subjects = sorted({case.subject for case in cases})
    random.Random(seed).shuffle(subjects)
    chosen: list[corpus.Case] = []
    for number, subject in enumerate(subjects):
        theirs = [case for case in cases if case.subject == subject]
        if number < 2 or len(chosen) + len(theirs) <= max_cases:
            chosen += theirs
    return chosen


def prepare(probe: Probe) -> None:
    """Preprocess the cases with the pretraining plan, and reuse existing ones.

    Raises MFMError: E_EXISTS when the folder contains data of another plan, and E_DISK_FULL. Bad cases are all listed,
    under their common code or E_FORMAT.
    """
    settings_hash = probe.plan.preprocessing_digest(probe.configuration, probe.dataset)
    stored, entries = storage.stored_cases(probe.folder), storage.Manifest.read(probe.folder).entries
    used = [*probe.fit, *probe.held_out]
    current = {case.name for case in (*used, *probe.unused)}
    foreign = [case for case in stored & current if entries.get(case, {}).get("hash") != settings_hash]
    if foreign:
        raise MFMError(
            "E_EXISTS",
            f"{probe.folder}: {len(foreign)} cases here were preprocessed with other settings, and a probe does "
            "not replace them. Delete the folder if no plan needs it.",
        )
    # Include the cases of other runs; otherwise preprocessing would report them as lost.
    cases = [*used, *(case for case in probe.unused if case.name in stored)]
    content = (dict(probe.plan.content), [probe.configuration], dict(probe.dataset.content))
    report = preprocess_dataset(cases, *content, probe.folder.parent, num_cores())[probe.configuration]
    names = {case.name for case in used}
    failures = [failure for failure in report.failures if failure.case in names]
    if failures:
        raise dataset_refused(probe.name, failures, len(used), " for the probe")
    logger.info(
        "probe on %s: %d cases to fit, %d to measure; %d preprocessed, %d reused",
        probe.name, len(probe.fit), len(probe.held_out), len(report.done), len(report.reused),
    )  # fmt: skip


def linear_labeller(
    features: Callable[[Tensor], list[Tensor]],
    volumes: Sequence[LabelledVolume],
    num_classes: int,
    rng: np.random.Generator,
) -> Labeller:
    """Fit a multinomial logistic regression on all feature maps, with equally many voxels of each class.

    The weight of a class is the square root of its share of all voxels. Balanced classes would overpredict rare ones,
    and true shares would never predict them; either way the Dice would stay low even for the best features.
    """
    quota, patch_size = max(NUM_VOXELS // (num_classes * len(volumes)), 1), volumes[0].patch_size
    x_parts, y_parts = [], []
    for volume in volumes:
        for window, places, labels in draw_voxels(volume, num_classes, quota, rng):
            maps = features(volume.patch(window)[None])
            x_parts.append(features_at(maps, torch.from_numpy(places), patch_size))
            y_parts.append(torch.from_numpy(labels))
    x_NF, y_N = torch.cat(x_parts).double(), torch.cat(y_parts)
    mean, scale = x_NF.mean(0), x_NF.std(0, correction=0).clamp(min=1e-6)
    shares_K = torch.from_numpy(sum(_count_classes(volume.labels, num_classes) for volume in volumes)).double().sqrt()
    weight_KF, bias_K = fit_logistic((x_NF - mean) / scale, y_N, shares_K)
    weight_KF = weight_KF / scale
    bias_K = bias_K - weight_KF @ mean
    mode = "trilinear" if len(patch_size) == 3 else "bilinear"

    def label(x_BCDHW: Tensor) -> Tensor:
        maps = features(x_BCDHW)
        # Scores are linear in the features, so they can be computed at each map's resolution and upsampled afterwards.
        weights = weight_KF.float().to(maps[0].device).split([m.shape[1] for m in maps], dim=1)
        scores = [torch.einsum("kf,bf...->bk...", *pair) for pair in zip(weights, maps)]
        enlarged = [functional.interpolate(s, patch_size, mode=mode, align_corners=False) for s in scores]
        return torch.stack(enlarged).sum(0) + bias_K.float().to(maps[0].device).reshape(-1, *[1] * len(patch_size))

    return label


def draw_voxels(
    volume: LabelledVolume, num_classes: int, quota: int, rng: np.random.Generator
) -> list[tuple[Window, np.ndarray, np.ndarray]]:
    """Draw windows of a case, each with positions (N, axes) and their labels (N,), at most ``quota`` per class."""
    windows = volume.windows()
    counts = np.stack([_count_classes(volume.labels[window], num_classes) for window in windows])
    present = np.flatnonzero(counts.sum(0))
    drawn = [rng.choice(len(windows), TILES_PER_CLASS, p=counts[:, k] / counts[:, k].sum()) for k in present]
    chosen = np.unique(drawn).astype(int)
    result = []
    for index in chosen:
        labels = volume.labels[windows[index]]
        picked = []
        for k in np.flatnonzero(counts[index]):
            share = -(-quota // np.count_nonzero(counts[chosen, k]))
            picked.append(rng.permutation(np.flatnonzero(labels == k))[:share])
        places = np.concatenate(picked)
        result.append((windows[index], np.stack(np.unravel_index(places, labels.shape), 1), labels.ravel()[places]))
    return result


def _count_classes(labels: np.ndarray, num_classes: int) -> np.ndarray:
    return np.bincount(labels[labels >= 0].ravel(), minlength=num_classes)


def features_at(maps: Sequence[Tensor], places: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Return the linearly upsampled features (N, F), on the CPU, at positions ``places`` (N, axes) of one patch."""
    # grid_sample's coordinates run from -1 to 1 over the patch, last axis first.
    grid = ((2 * places + 1) / torch.tensor(list(patch_size)) - 1).flip(-1).float()
    grid = grid.reshape(1, -1, *[1] * (len(patch_size) - 1), len(patch_size))
    settings: dict[str, Any] = {"mode": "bilinear", "padding_mode": "border", "align_corners": False}
    sampled = [functional.grid_sample(m, grid.to(m.device), **settings)[0].flatten(1).T for m in maps]
    return torch.cat(sampled, dim=1).cpu()


def fit_logistic(x_NF: Tensor, y_N: Tensor, shares_K: Tensor) -> tuple[Tensor, Tensor]:
    """Fit weights (K, F) and biases (K,) of a multinomial logistic regression by L-BFGS from zero.

    ``shares_K`` is the total weight of each class, whatever its number of voxels.
    """
    num_classes = len(shares_K)
    weight = torch.zeros(num_classes, x_NF.shape[1], dtype=x_NF.dtype, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=x_NF.dtype, requires_grad=True)
    balance = shares_K.to(x_NF.dtype) / torch.bincount(y_N.long(), minlength=num_classes).clamp(min=1)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = functional.cross_entropy(x_NF @ weight.T + bias, y_N.long(), weight=balance)
        total = error + PENALTY / 2 * (weight.square().sum() + bias.square().sum())
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def label_volume(label: Labeller, volume: LabelledVolume) -> np.ndarray:
    """Label a volume patch by patch and return a label map of the shape of ``volume.labels``."""
    predicted, windows = np.zeros(volume.labels.shape, np.int16), volume.windows()
    at_once = 1 if len(volume.patch_size) == 3 else MAX_SLICES
    for first in range(0, len(windows), at_once):
        batch = windows[first : first + at_once]
        scores = label(torch.stack([volume.patch(window) for window in batch]))
        for window, classes in zip(batch, scores.argmax(1).cpu().numpy()):
            predicted[window] = classes
    return predicted


@contextlib.contextmanager
def _undisturbed(backbone: AbstractBackbone, device: torch.device) -> Iterator[None]:
    """Restore torch's generators and the modes of all modules afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), modes_kept(backbone):
        yield


@contextlib.contextmanager
def others_waiting(world: World) -> Iterator[None]:
    """Make the other processes wait until the main one is done, without the usual time limit. If it fails, all fail."""
    if world.size == 1:
        yield
        return
    # A separate group on the CPU: the time limit of the run's own group is meant for training steps.
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
        dist.barrier(group)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group(group)


def in_words(row: Mapping[str, Any]) -> str:
    """Format the probe's results in a row of the log for the console."""
    shown = {name: "none" if row[name] is None else f"{row[name]:.3f}" for name in row if name.startswith("probe_dice")}
    mean = shown.pop("probe_dice")
    each = ", ".join(f"{name.removeprefix('probe_dice_')} {value}" for name, value in shown.items())
    return f"probe: Dice {mean} ({each})  {row['probe_seconds']:.1f} s"
