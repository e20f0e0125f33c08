"""The arms of a study: from scratch, and from each of the checkpoints that are compared with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange.read import find_checkpoint

SCRATCH = "scratch"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
_SETTING = re.compile(r",(?=finetune\.)")
_RUN_FOLDER = "mfm_pretrain__"


@dataclass(frozen=True)
class Arm:
    """One way to train; ``checkpoint`` is None from scratch."""

    name: str
    checkpoint: Path | None = None
    settings: tuple[str, ...] = ()
    """``finetune.name=value``, of this arm alone; they win over the study's."""


def parse_arms(words: Sequence[str]) -> tuple[Arm, ...]:
    """The arms ``scratch``, ``CHECKPOINT`` and ``NAME=CHECKPOINT``, in their order.

    Each may be followed by settings of its own: ``NAME=CHECKPOINT,finetune.parts=encoder,finetune.learning_rate=1e-4``.

    Raises MFMError: E_CONFIG (none, a name that is no file name, a name twice), E_NOT_FOUND (no such checkpoint).
    """
    if not words:
        raise MFMError("E_CONFIG", "--arms: there is nothing to compare. Give at least one: scratch, or a checkpoint.")
    arms = [_parse(word) for word in words]
    names = [arm.name for arm in arms]
    for arm in arms:
        # Folders are named after arms, and some file systems do not tell upper from lower case.
        if [name.casefold() for name in names].count(arm.name.casefold()) > 1:
            raise MFMError(
                "E_CONFIG", f"--arms: two arms are named '{arm.name}'. Give each a name of its own: NAME=CHECKPOINT."
            )
    return tuple(arms)


def is_arm_name(name: Any) -> bool:
    """Return whether folders can be named after an arm of this name."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name))


def _parse(word: str) -> Arm:
    base, *settings = [word] if Path(word).exists() else _SETTING.split(word)
    if base == SCRATCH:
        return Arm(SCRATCH, settings=tuple(settings))
    name, separator, path = base.partition("=")
    is_named = bool(separator) and not Path(base).exists()
    place = find_checkpoint(path if is_named else base)
    if not is_named:
        name = _default_name(place)
    if not place.exists():
        raise MFMError(
            "E_NOT_FOUND",
            f"--arms {word}: there is no file {place}. An arm is the word {SCRATCH}, a checkpoint, or NAME=CHECKPOINT.",
        )
    if name == SCRATCH or not is_arm_name(name):
        raise MFMError(
            "E_CONFIG",
            f"--arms {word}: '{name}' cannot be the name of an arm with a checkpoint. Take letters, digits and "
            f"_ . + -, and not {SCRATCH}.",
        )
    return Arm(name, place.absolute(), tuple(settings))


def _default_name(file: Path) -> str:
    """After the run of mfm_pretrain that a checkpoint lies in (task, and run name), else after the file."""
    folder = file.absolute().parent.name
    if folder.startswith(_RUN_FOLDER):
        task, *rest = folder.removeprefix(_RUN_FOLDER).split("__")
        return "_".join([task, *rest[2:]])
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", file.stem)
