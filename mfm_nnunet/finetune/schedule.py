"""The learning rate of fine-tuning as pure functions of the epoch, so checkpoints and resuming need no schedule state.

``warmup`` has one phase: linear warm-up, then polynomial decay. ``sawtooth`` (arXiv 2410.23132) puts a first phase in
front, which rises for its first half and decays in its second, and in which the transferred encoder is still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import nn

from mfm_nnunet.engine.optim import learning_rate_factor
from mfm_nnunet.finetune.groups import Group, count
from mfm_nnunet.settings import FinetuneSettings, resolved_decoder_epochs, resolved_warmup


@dataclass(frozen=True)
class Phases:
    """Lengths in epochs: of the whole run, of the whole network's warm-up, of the first phase (0: there is none)."""

    epochs: int
    warmup_epochs: int
    decoder_epochs: int = 0

    @classmethod
    def of(cls, settings: FinetuneSettings, is_pretrained: bool) -> Phases:
        """The phases of a run; from scratch there is nothing to hold still, hence no first phase."""
        has_first = settings.schedule == "sawtooth" and is_pretrained
        first = resolved_decoder_epochs(settings) if has_first else None
        return cls(settings.epochs, resolved_warmup(settings.warmup_epochs, settings.epochs), first or 0)


def rate_factor(epoch: int, phases: Phases, waits: bool) -> float:
    """Share of the peak learning rate at ``epoch`` (0-based); 0 in the first phase for weights that wait for it to end.

    With D, W and E the first phase, warm-up and run: (e+1)/(D/2) below D/2 and (1-(e-D/2)/(D/2))^0.9 below D; then
    (e-D+1)/W below D+W and (1-(e-D-W)/(E-D-W))^0.9.
    """
    first = phases.decoder_epochs
    if epoch < first:
        return 0.0 if waits else learning_rate_factor(epoch, first, first / 2)
    return learning_rate_factor(epoch - first, phases.epochs - first, phases.warmup_epochs)


class EpochSchedule:
    """Sets the learning rate of every group of the optimizer; ``peak`` is the largest."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group], peak: float, phases: Phases) -> None:
        assert len(groups) == len(optimizer.param_groups), "one description for each group"
        self.optimizer = optimizer
        self.groups = tuple(groups)
        self.peak = peak
        self.phases = phases

    def step(self, epoch: int) -> None:
        """The rates of ``epoch``."""
        for description, group in zip(self.groups, self.optimizer.param_groups):
            group["lr"] = self.peak * description.scale * rate_factor(epoch, self.phases, description.waits)

    def trained_names(self, epoch: int) -> set[str]:
        """Names of the parameters that learn in ``epoch``."""
        in_first = epoch < self.phases.decoder_epochs
        return {name for group in self.groups if not (in_first and group.waits) for name in group.names}

    def all_trained_names(self) -> set[str]:
        """Names of the parameters that learn in some epoch."""
        return {name for group in self.groups for name in group.names}


def in_words(schedule: EpochSchedule, settings: FinetuneSettings, network: nn.Module) -> list[str]:
    """What learns, for the log of a run; ``network`` is without wrappers."""
    learn, total = count(network, schedule.all_trained_names()), sum(p.numel() for p in network.parameters())
    lines = [f"{learn:,} of {total:,} parameters are trained ({learn / total:.1%})"]
    first = schedule.phases.decoder_epochs
    if first:
        early = count(network, schedule.trained_names(0))
        lines.append(f"sawtooth: {early:,} of them in the first {first} epochs, then all")
    elif settings.schedule == "sawtooth":
        lines.append("sawtooth: nothing came from a checkpoint, so the whole network warms up at once")
    return lines


def epoch_in_words(last: Mapping[str, Any], epochs_left: int) -> str:
    """The line of a finished epoch in the log; ``last`` holds what nnU-Net's logger has of it."""
    dice = np.round(last["dice_per_class_or_region"], 4).tolist()
    seconds = last["epoch_end_timestamps"] - last["epoch_start_timestamps"]
    losses = f"train_loss {last['train_losses']:.4f}  val_loss {last['val_losses']:.4f}"
    left = timedelta(seconds=round(seconds * epochs_left))
    return f"{losses}  pseudo dice {dice}  {seconds:.1f} s  ETA {left}"
