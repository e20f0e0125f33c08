"""Settings of a fine-tuning run: resolved from the plan, ``--set`` and advice, and saved in the run folder.

Advice fills settings left open, from the checkpoint and the number of labelled cases. It follows published results
only. The schedule stays plain warm-up for all networks: published results favour the sawtooth for CNNs with long
schedules, and we measured nothing ourselves.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mfm_nnunet.engine.state import LONGER, flat, require_same_settings
from mfm_nnunet.errors import MFMError, about, nearest
from mfm_nnunet.files import digest_of, read_json, write_json
from mfm_nnunet.finetune.pretrained import has_decoder
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.models.families import NetworkFamily, family_named, family_of
from mfm_nnunet.settings import (
    FinetuneSettings,
    MFMBlock,
    SemiSettings,
    from_dict,
    override,
    require_legal,
    resolved_decoder_epochs,
    resolved_warmup,
    setting_names,
    to_dict,
)
from mfm_nnunet.values import require_in_range

logger = logging.getLogger(__name__)

FILE = "settings.json"
MAY_DIFFER = ("num_workers", "finetune.checkpoint.licence", "finetune.checkpoint.citations")
"""Settings that a resumed run may change because they do not affect its result."""
FEW_CASES = 10
"""Largest number of labelled cases for which published adapters were as good as training all weights."""
TEACHER_DECAY = 0.99
"""Decay of the averaged weights that teach (arXiv 2305.00673)."""
PUBLISHED: dict[str, dict[str, float]] = {
    "consistency": {"weight": 1.0, "ramp": 0.0, "start": 0.1},
    "mean_teacher": {"weight": 0.5, "ramp": 0.4, "start": 0.1},
    "student": {"weight": 1.0, "ramp": 0.0, "start": 0.0},
}
"""Weight of the unlabelled images, share of the steps in which it rises, and share before it, by method."""


@dataclass(frozen=True)
class Advice:
    """A value for a ``finetune`` setting and the reason for it."""

    name: str
    value: Any
    reason: str


def advise(family: NetworkFamily, num_cases: int, pretext: str | None, has_decoder: bool) -> list[Advice]:
    """Return advice for open settings.

    ``pretext`` is the checkpoint's task (None: unknown or supervised). ``has_decoder`` is true if the checkpoint has
    decoder weights.
    """
    task = pretext or "the checkpoint's training"
    parts = Advice("parts", "encoder", f"{task} left no weights of a decoder")
    if has_decoder:
        reason = f"{task} trained the decoder too, and encoder with decoder transferred best (arXiv 2410.23132)"
        parts = Advice("parts", "encoder_decoder", reason)
    reason = family.layer_decay_problem()
    if not reason:
        reason = f"published fine-tuning of {family.title} has one rate for all blocks (arXiv 2412.17041)"
        if num_cases <= FEW_CASES:
            reason += f"; with {num_cases} cases finetune.train=lora or finetune.layer_decay=0.75 are worth a try"
    return [parts, Advice("layer_decay", 1.0, reason)]


def advise_as_begun(settings: FinetuneSettings) -> list[Advice]:
    """Return the values that a run started with, as advice for settings left open when it is resumed."""
    names = ("learning_rate", "warmup_epochs", "decoder_epochs", "layer_decay", "parts", "train")
    values = {name: getattr(settings, name) for name in names}
    return [Advice(name, value, "as this run began") for name, value in values.items() if value not in (None, "auto")]


def resolve_new(
    block: MFMBlock, overrides: Sequence[str], reading: Reading | None, network: nn.Module, num_cases: int
) -> MFMBlock:
    """Resolve the settings of a new run on ``num_cases`` cases, from scratch or with the checkpoint's advice."""
    block = dataclasses.replace(
        block,
        finetune=dataclasses.replace(block.finetune, checkpoint=None),
        semi=dataclasses.replace(block.semi, corpus=None),
    )
    origin, advice = None, []
    if reading is not None:
        origin = reading.origin
        advice = advise(family_of(network), num_cases, origin["pretext"], has_decoder(reading, network))
        values, reason = family_of(network).advise_training(network, num_cases)
        advice = [item for item in advice if item.name not in values]
        advice += [Advice(name, value, reason) for name, value in values.items()]
    resolved = resolve(block, overrides, origin, advice)
    if override(block, overrides).finetune.learning_rate is None:
        of = block.network, resolved.finetune.optimizer, "scratch" if origin is None else "a checkpoint"
        rate = resolved.finetune.learning_rate
        logger.info("finetune.learning_rate=%g: the published rate of %s with %s from %s", rate, *of)
    return resolved


def resolve_resumed(
    block: MFMBlock, overrides: Sequence[str], reading: Reading | None, folder: Path, plans: Mapping[str, Any]
) -> MFMBlock:
    """Resolve the settings of a resumed run, which must be those saved in ``folder``; ``block`` if none were saved."""
    origin = None if reading is None else reading.origin
    saved = load_settings(folder, plans)
    if saved is None:
        return resolve(block, overrides, origin)
    resolved = resolve(saved, overrides, origin, advise_as_begun(saved.finetune))
    # Settings added since the run began are resolved on both sides.
    require_same(resolve(saved, (), None), resolved, folder)
    return resolved


def resolve(
    block: MFMBlock, overrides: Sequence[str], pretrained: Mapping[str, Any] | None, advice: Sequence[Advice] = ()
) -> MFMBlock:
    """Apply ``name=value`` overrides and the checkpoint's description to a block, and fill in open settings.

    Advice is used for settings still open after the overrides, and logged with its reason. Raises MFMError (E_CONFIG)
    for an unknown setting, one that does not belong to training, or an invalid value.
    """
    require_of_training(overrides, block)
    block = override(block, overrides)
    settings = block.finetune
    require_legal(settings, "finetune.")
    taken = [item for item in advice if getattr(settings, item.name) in (None, "auto")]
    settings = dataclasses.replace(settings, **{item.name: item.value for item in taken})
    for item in taken:
        logger.info("finetune.%s=%s: %s", item.name, item.value, item.reason)
    if pretrained is not None:
        settings = dataclasses.replace(settings, checkpoint=dict(pretrained))
    settings = dataclasses.replace(
        settings,
        learning_rate=family_named(block.network).learning_rate(settings),
        train="all" if settings.train == "auto" else settings.train,
        warmup_epochs=resolved_warmup(settings.warmup_epochs, settings.epochs),
        decoder_epochs=resolved_decoder_epochs(settings),
        layer_decay=1.0 if settings.layer_decay is None else settings.layer_decay,
    )
    semi = resolve_semi(block.semi)
    if semi.method == "mean_teacher" and settings.ema_decay is None:
        logger.info("finetune.ema_decay=%g: the averaged weights teach, and are validated and shipped", TEACHER_DECAY)
        settings = dataclasses.replace(settings, ema_decay=TEACHER_DECAY)
    return dataclasses.replace(block, finetune=settings, semi=semi)


def resolve_semi(semi: SemiSettings) -> SemiSettings:
    """Check the settings of unlabelled images and fill in the open ones; without a method they stay as they are."""
    require_in_range(semi, "semi.")
    if semi.method is None:
        return semi
    open_ones = {name: value for name, value in PUBLISHED[semi.method].items() if getattr(semi, name) is None}
    return dataclasses.replace(semi, **open_ones)  # type: ignore[arg-type]


def require_both(corpus: object, semi: SemiSettings, overrides: Sequence[str]) -> None:
    """Raise MFMError (E_CONFIG) for unlabelled images without a method, or settings of one without images."""
    given = [assignment for assignment in overrides if assignment.strip().startswith("semi.")]
    methods = ", ".join(PUBLISHED)
    if corpus is not None and semi.method is None:
        raise MFMError(
            "E_CONFIG",
            f"--unlabelled {corpus}: how shall the images be used? Add --set semi.method=NAME ({methods}).",
        )
    if corpus is None and (given or semi.method is not None):
        raise MFMError(
            "E_CONFIG",
            f"--set {given[0] if given else f'semi.method={semi.method}'}: it is about unlabelled images. Add "
            "--unlabelled CORPUS, or leave it out.",
        )


def require_effect(overrides: Sequence[str], settings: FinetuneSettings, device: str) -> None:
    """Raise MFMError (E_CONFIG) for adapter settings of a run without adapters; log others that have no effect.

    Settings that need a checkpoint or a GPU are allowed: a baseline from scratch gets the same settings, and every plan
    has finetune.compile=true.
    """
    given = {assignment.partition("=")[0].strip().removeprefix("finetune.") for assignment in overrides}
    for name in sorted(given & {"lora_rank", "lora_alpha"}):
        if settings.train != "lora":
            raise MFMError(
                "E_CONFIG",
                f"finetune.{name}={getattr(settings, name)}: adapters need finetune.train=lora. Set it, or leave this "
                "out.",
            )
    for name in sorted(given & {"parts", "transfer"}):
        if settings.checkpoint is None:
            logger.info("finetune.%s has no effect: this run starts from scratch", name)
    for name in sorted(given & _without_effect(settings)):
        logger.info("finetune.%s has no effect with finetune.mix=%s", name, settings.mix)
    if settings.compile and device != "cuda":
        logger.info(
            "finetune.compile=true has no effect: networks are compiled on CUDA GPUs only, this run is on %s", device
        )


def _without_effect(settings: FinetuneSettings) -> set[str]:
    """Return the settings of mixing that the chosen kind does not use."""
    used = {"none": set(), "cutmix": {"mix_box"}}.get(settings.mix, {"mix_labels", "mix_draw"})
    used |= {"mix_probability", "mix_start"} if settings.mix != "none" else set()
    return {"mix_probability", "mix_start", "mix_box", "mix_labels", "mix_draw"} - used


def save_settings(folder: Path, block: MFMBlock, plans: Mapping[str, Any]) -> None:
    """Write ``settings.json`` into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"settings": to_dict(block), "plan_sha256": plan_hash(plans)}, indent=2)


def load_settings(folder: Path, plans: Mapping[str, Any]) -> MFMBlock | None:
    """Read the settings of a started run; None for a run of stock nnU-Net, which saves none.

    Raises MFMError (E_CONFIG) when the plan has changed since.
    """
    if not (folder / FILE).is_file():
        return None
    content = read_json(folder / FILE, "Move the folder away and train again.")
    if content.get("plan_sha256") != plan_hash(plans):
        raise MFMError(
            "E_CONFIG",
            f"{folder}: plan {plans['plans_name']} was changed after this run began, so it cannot be resumed. Put the "
            "old plan back (a copy is plans.json in the model folder), or start a new run under another plan name.",
        )
    with about(folder / FILE):
        return from_dict(MFMBlock, content.get("settings", {}))


def is_longer(folder: Path, block: MFMBlock, plans: Mapping[str, Any]) -> bool:
    """Return whether a resumed run gets more epochs than saved in ``folder``, and say what its rates become."""
    saved = load_settings(folder, plans)
    if saved is None or block.finetune.epochs <= saved.finetune.epochs:
        return False
    logger.info(LONGER, saved.finetune.epochs, block.finetune.epochs)
    return True


def require_same(before: MFMBlock, now: MFMBlock, folder: Path) -> None:
    """Raise MFMError (E_CONFIG) naming the differences if a resumed run would get other settings."""
    require_same_settings(to_dict(before), to_dict(now), folder, MAY_DIFFER)


def format_settings(block: MFMBlock) -> str:
    """Format the training settings, one per line."""
    parts = {"finetune": to_dict(block.finetune), **({"semi": to_dict(block.semi)} if block.semi.method else {})}
    values = flat({**parts, "seed": block.seed, "num_workers": block.num_workers})
    return "\n".join(f"  {name} = {value}" for name, value in values.items() if not name.endswith(".citations"))


def plan_hash(plans: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of a plan without our block."""
    stock = {key: value for key, value in plans.items() if key not in ("mfm", "continue_training")}
    return digest_of(stock)


def require_of_training(overrides: Sequence[str], block: MFMBlock) -> None:
    """Raise MFMError (E_CONFIG) for an override that is no setting of a training."""
    for assignment in overrides:
        _require_setting(assignment.partition("=")[0].strip(), block)


def _require_setting(name: str, block: MFMBlock) -> None:
    if name == "finetune.checkpoint":
        raise MFMError("E_CONFIG", f"--set {name}: give the checkpoint with -pretrained_weights.")
    if name == "semi.corpus":
        raise MFMError("E_CONFIG", f"--set {name}: give the unlabelled images with --unlabelled.")
    own = ("finetune.", "semi.")
    names = [n for n in setting_names(block) if n in ("seed", "num_workers") or n.startswith(own)]
    names = [n for n in names if n not in ("finetune.checkpoint", "semi.corpus")]
    if name not in names:
        raise MFMError("E_CONFIG", f"training has no setting '{name}'. {nearest(name, names)}")
