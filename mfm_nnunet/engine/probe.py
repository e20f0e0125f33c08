"""What are the weights worth so far? A probe on a few labelled cases, every few epochs, while pretraining goes on.

Losses of different pretext tasks cannot be compared; the Dice of a probe can. It is a function of weights, seed and
data alone, and leaves weights, modes and random generators of the run as they were. The main process computes, the
others wait.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mfm_nnunet.data.cases import Case
from mfm_nnunet.device import autocast
from mfm_nnunet.engine.distributed import World
from mfm_nnunet.engine.probe_data import LabelledVolume, ProbeDataset, preprocess
from mfm_nnunet.engine.probe_methods import Labeller, finetuned_labeller, linear_labeller
from mfm_nnunet.errors import MFMError
from mfm_nnunet.metrics import dice, mean_dice
from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.settings import ProbeSettings, to_dict

PATIENCE = datetime.timedelta(days=1)
"""How long processes wait for the main one; the default of NCCL is ten minutes."""
MAX_SLICES = 16
"""2D patches that are labelled at once."""


@dataclass(frozen=True)
class Probe:
    """The probe of a run; every process holds one."""

    settings: ProbeSettings
    dataset: ProbeDataset
    plans: dict[str, Any]
    configuration: str
    batch_size: int
    """Of the fine-tuned copy: the items per step of pretraining."""
    seed: int

    def description(self) -> dict[str, Any]:
        """What a continued run must agree with."""
        return {**self.dataset.description(), **to_dict(self.settings)}

    def is_due(self, epoch: int, epochs: int) -> bool:
        """Whether the weights are probed at the end of ``epoch``, counted from 0."""
        return (epoch + 1) % self.settings.every == 0 or epoch + 1 == epochs

    def measure(
        self, backbone: AbstractBackbone, device: torch.device, dtype: torch.dtype | None = None
    ) -> dict[str, float | None]:
        """The entries of the log: ``probe_dice`` (mean over labels), ``probe_dice_<label>``, ``probe_seconds``.

        A Dice is the mean over the held-out cases; None where a label is in no case and was nowhere predicted.
        """
        start = time.monotonic()
        names = list(self.dataset.foreground)
        with undisturbed(backbone, device), torch.no_grad():
            torch.manual_seed(self.seed)
            label, patch_size = self._labeller(backbone, device, dtype), backbone.patch_size
            by_case = [self._dice(label, volume, patch_size) for volume in self._volumes(self.dataset.held_out)]
        by_label = {name: mean_dice([scores[name] for scores in by_case]) for name in names}
        values = {"": mean_dice(list(by_label.values())), **{f"_{name}": by_label[name] for name in names}}
        return {
            **{f"probe_dice{name}": None if math.isnan(value) else value for name, value in values.items()},
            "probe_seconds": round(time.monotonic() - start, 3),
        }

    def _labeller(self, backbone: AbstractBackbone, device: torch.device, dtype: torch.dtype | None) -> Labeller:
        rng = np.random.default_rng([self.seed, 2])
        volumes, classes = list(self._volumes(self.dataset.fit)), self.dataset.classes
        if self.settings.kind == "linear":

            def features(x_BCDHW: Tensor) -> list[Tensor]:
                with autocast(device, dtype):
                    return [m.float() for m in backbone.features(x_BCDHW.to(device))]

            backbone.eval()
            return linear_labeller(backbone, volumes, classes, rng, features)
        schedule = self.settings.steps, self.settings.learning_rate, self.batch_size
        return finetuned_labeller(
            backbone, volumes, classes, rng, plans=self.plans, configuration=self.configuration, schedule=schedule,
            device=device, dtype=dtype,
        )  # fmt: skip

    def _volumes(self, cases: Sequence[Case]) -> Iterator[LabelledVolume]:
        return (LabelledVolume(self.dataset.folder, case.name, self.dataset.ignored) for case in cases)

    def _dice(self, label: Labeller, volume: LabelledVolume, patch_size: Sequence[int]) -> dict[str, float]:
        predicted = predict(label, volume, patch_size)
        return {
            name: dice(volume.labels, predicted, values, ignore=-1) for name, values in self.dataset.foreground.items()
        }


def predict(label: Labeller, volume: LabelledVolume, patch_size: Sequence[int]) -> np.ndarray:
    """The label map (D, H, W) of a volume, patch by patch."""
    predicted = np.zeros(volume.labels.shape, np.int16)
    tiles = volume.tiles(patch_size)
    at_once = 1 if len(patch_size) == 3 else MAX_SLICES
    for first in range(0, len(tiles), at_once):
        batch = tiles[first : first + at_once]
        scores = label(torch.stack([volume.patch(tile, patch_size) for tile in batch]))
        for tile, classes in zip(batch, scores.argmax(1).cpu().numpy()):
            where, inside = volume.inside(tile, patch_size)
            predicted[where] = classes[inside]
    return predicted


@contextlib.contextmanager
def undisturbed(backbone: AbstractBackbone, device: torch.device) -> Iterator[None]:
    """Give torch's generators and the modes of all modules back as they were."""
    modes = {module: module.training for module in backbone.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, is_training in modes.items():
                module.training = is_training


def require_legal(settings: ProbeSettings, is_on: bool) -> None:
    """Raise MFMError (E_CONFIG) for settings of a probe that is not on."""
    changed = [name for name, value in to_dict(settings).items() if value != getattr(ProbeSettings(), name)]
    if changed and not is_on:
        raise MFMError(
            "E_CONFIG",
            f"probe.{changed[0]} is set, but there is no probe. Name its labelled dataset with --probe DATASET.",
        )


def prepare(probe: Probe, world: World) -> None:
    """Preprocess the labelled cases in the main process. Raises what :func:`preprocess` raises."""
    with others_waiting(world):
        if world.is_main:
            preprocess(probe.dataset, probe.plans, probe.configuration)


@contextlib.contextmanager
def others_waiting(world: World) -> Iterator[None]:
    """All processes meet at the end, however long the main one takes; if it fails the others fail too."""
    if world.size == 1:
        yield
        return
    # A group of its own, on the CPU: the time limit of the run's group is meant for steps.
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield
        dist.barrier(group)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group(group)


def in_words(row: Mapping[str, Any]) -> str:
    """The probe's results in a row of the log, for the console."""
    labels = {name.removeprefix("probe_dice_"): row[name] for name in row if name.startswith("probe_dice_")}
    each = ", ".join(f"{name} {_number(value)}" for name, value in labels.items())
    return f"probe: Dice {_number(row['probe_dice'])} ({each})  {row['probe_seconds']:.1f} s"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
