"""Values for settings of fine-tuning that were left open, from the checkpoint and the number of labelled cases.

Only what the literature supports is chosen, with its reason. The schedule stays the plain warm-up for both families of
networks: published results favour the sawtooth for CNNs with long schedules, and nothing was measured here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mfm_nnunet.models.families import NetworkFamily
from mfm_nnunet.settings import FinetuneSettings

FEW_CASES = 10
"""The number of labelled cases up to which adapters were published to be as good as all weights."""


@dataclass(frozen=True)
class Advice:
    """A value for one setting of ``finetune`` and the reason for it."""

    name: str
    value: Any
    reason: str


def advised(family: NetworkFamily, num_cases: int, pretext: str | None, has_decoder: bool) -> list[Advice]:
    """What to set for a checkpoint of ``pretext`` (None: unknown or supervised) and ``num_cases`` training cases.

    ``has_decoder`` says whether the checkpoint holds weights of a decoder.
    """
    return [_parts(pretext, has_decoder), _layer_decay(family, num_cases)]


def as_begun(settings: FinetuneSettings) -> list[Advice]:
    """What a continued run leaves open again is as it was resolved when the run began: ``settings`` are those."""
    names = ("learning_rate", "warmup_epochs", "decoder_epochs", "layer_decay", "parts")
    values = {name: getattr(settings, name) for name in names}
    return [Advice(name, value, "as this run began") for name, value in values.items() if value not in (None, "auto")]


def applied(settings: FinetuneSettings, advice: list[Advice]) -> tuple[FinetuneSettings, list[Advice]]:
    """The settings with the advice on what they leave open, and the part of the advice that was taken."""
    taken = [item for item in advice if getattr(settings, item.name) in (None, "auto")]
    return dataclasses.replace(settings, **{item.name: item.value for item in taken}), taken


def _parts(pretext: str | None, has_decoder: bool) -> Advice:
    task = pretext or "the checkpoint's training"
    if not has_decoder:
        return Advice("parts", "encoder", f"{task} left no weights of a decoder")
    reason = f"{task} trained the decoder too, and encoder with decoder transferred best (arXiv 2410.23132)"
    return Advice("parts", "encoder_decoder", reason)


def _layer_decay(family: NetworkFamily, num_cases: int) -> Advice:
    if problem := family.layer_decay_problem():
        return Advice("layer_decay", 1.0, problem)
    reason = f"published fine-tuning of {family.title} has one rate for all blocks (arXiv 2412.17041)"
    if num_cases <= FEW_CASES:
        reason += f"; with {num_cases} cases finetune.train=lora or finetune.layer_decay=0.75 are worth a try"
    return Advice("layer_decay", 1.0, reason)
