"""The resolved settings of a fine-tuning run: plan, then ``--set``; saved in the run folder, compared on ``--c``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.errors import MFMError, about, nearest
from mfm_nnunet.files import read_json
from mfm_nnunet.finetune.advice import Advice, applied
from mfm_nnunet.models.families import family_named
from mfm_nnunet.settings import (
    FinetuneSettings,
    MFMBlock,
    from_dict,
    override,
    require_legal_finetuning,
    resolved_decoder_epochs,
    resolved_warmup,
    setting_names,
    to_dict,
)

logger = logging.getLogger(__name__)

FILE = "settings.json"
MAY_DIFFER = ("num_workers", "finetune.checkpoint.licence", "finetune.checkpoint.citations")
"""Settings that a continued run may change, because they do not change its result."""


def resolve(
    block: MFMBlock, overrides: Sequence[str], pretrained: Mapping[str, Any] | None, advice: Sequence[Advice] = ()
) -> MFMBlock:
    """The block with ``name=value`` overrides and the checkpoint's description applied, and what is open resolved.

    ``advice`` is taken for what is open then and logged with its reasons.

    Raises MFMError (E_CONFIG) for an unknown setting, one that training does not have, and an impossible value.
    """
    for assignment in overrides:
        _require_of_training(assignment.partition("=")[0].strip(), block)
    block = override(block, overrides)
    settings = block.finetune
    require_legal_finetuning(settings)
    settings, taken = applied(settings, list(advice))
    for item in taken:
        logger.info("finetune.%s=%s: %s", item.name, item.value, item.reason)
    if pretrained is not None:
        settings = dataclasses.replace(settings, checkpoint=dict(pretrained))
    settings = dataclasses.replace(
        settings,
        learning_rate=family_named(block.network).learning_rate(settings),
        warmup_epochs=resolved_warmup(settings.warmup_epochs, settings.epochs),
        decoder_epochs=resolved_decoder_epochs(settings),
        layer_decay=1.0 if settings.layer_decay is None else settings.layer_decay,
    )
    return dataclasses.replace(block, finetune=settings)


def require_effect(overrides: Sequence[str], settings: FinetuneSettings, device: str) -> None:
    """Raise MFMError (E_CONFIG) for a setting of adapters that was given to a run without any.

    What has no effect without a checkpoint or without a GPU is logged, not refused: a baseline from scratch is given
    the same settings, and every plan says finetune.compile=true.
    """
    given = {assignment.partition("=")[0].strip().removeprefix("finetune.") for assignment in overrides}
    for name in sorted(given & {"lora_rank", "lora_alpha"}):
        if settings.train != "lora":
            raise MFMError(
                "E_CONFIG",
                f"finetune.{name}={getattr(settings, name)}: only finetune.train=lora has adapters; set that, or leave "
                "this out.",
            )
    for name in sorted(given & {"parts", "transfer"}):
        if settings.checkpoint is None:
            logger.info("finetune.%s has no effect: this run starts from scratch", name)
    if settings.compile and device != "cuda":
        logger.info(
            "finetune.compile=true has no effect: networks are compiled on CUDA GPUs only, this run is on %s", device
        )


def save(folder: Path, block: MFMBlock, plans: Mapping[str, Any]) -> None:
    """Write ``settings.json`` into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / FILE) as handle:
        handle.write(json.dumps({"settings": to_dict(block), "plan_sha256": plan_hash(plans)}, indent=2).encode())


def load(folder: Path, plans: Mapping[str, Any]) -> MFMBlock | None:
    """The settings that a run began with; None for a run of stock nnU-Net, which saved none.

    Raises MFMError (E_CONFIG) when the plan is not the one that the run began with.
    """
    if not (folder / FILE).is_file():
        return None
    content = read_json(folder / FILE, "Move the folder away and train again.")
    if content.get("plan_sha256") != plan_hash(plans):
        raise MFMError(
            "E_CONFIG",
            f"{folder}: plan {plans['plans_name']} was changed after this run began, so it cannot go on. Put the "
            "old plan back (a copy is plans.json in the model folder), or start a new run under another plan name.",
        )
    with about(folder / FILE):
        return from_dict(MFMBlock, content.get("settings", {}))


def require_same(before: MFMBlock, now: MFMBlock, folder: Path) -> None:
    """Raise MFMError (E_CONFIG) that names the differences when a continued run would get other settings."""
    old, new = (_flat(to_dict(block)) for block in (before, now))
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name) and name not in MAY_DIFFER]
    if names:
        lines = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
        raise MFMError(
            "E_CONFIG",
            f"--c continues the same run, but the settings differ from those of {folder}: {lines}. Leave out the "
            "settings that changed, or start a new run.",
        )


def format_settings(block: MFMBlock) -> str:
    """What training reads, one setting per line."""
    values = _flat({"finetune": to_dict(block.finetune), "seed": block.seed, "num_workers": block.num_workers})
    return "\n".join(f"  {name} = {value}" for name, value in values.items() if not name.endswith(".citations"))


def plan_hash(plans: Mapping[str, Any]) -> str:
    """SHA-256 of what a plan decides besides our block, in hex."""
    stock = {key: value for key, value in plans.items() if key not in ("mfm", "continue_training")}
    return hashlib.sha256(json.dumps(stock, sort_keys=True).encode()).hexdigest()


def _require_of_training(name: str, block: MFMBlock) -> None:
    names = [n for n in setting_names(block) if n in ("seed", "num_workers") or n.startswith("finetune.")]
    names.remove("finetune.checkpoint")
    if name == "finetune.checkpoint":
        raise MFMError("E_CONFIG", f"--set {name}: give the checkpoint with -pretrained_weights.")
    if name not in names:
        raise MFMError("E_CONFIG", f"training has no setting '{name}'. {nearest(name, names)}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result.update(_flat(value, f"{prefix}{name}."))
        else:
            result[prefix + name] = value
    return result
