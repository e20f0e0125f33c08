"""How a folder is predicted, what comes of it, and whether the folders allow it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mfm_nnunet.errors import CaseFailure, MFMError
from mfm_nnunet.files import ending_of, is_file_name, require_unicode, shown
from mfm_nnunet.predict.export import STAGING_PREFIX
from mfm_nnunet.predict.journal import journal_name
from mfm_nnunet.predict.model import Model

logger = logging.getLogger(__name__)

SETTINGS_FILE = "predict_from_raw_data_args.json"
"""Name that nnU-Net gives to the file with the settings of a prediction."""
ERROR_FOLDER = "errors"


@dataclass(frozen=True)
class PredictOptions:
    """How a folder is predicted."""

    folds: tuple[int | str, ...] | None = None
    """Folds whose predictions are averaged. None: those that exist."""
    checkpoint_name: str = "checkpoint_final.pth"
    step_size: float = 0.5
    """Distance of neighbouring windows as a share of the patch."""
    mirroring: bool = True
    """Average over mirrored copies, along the axes that the training allowed."""
    save_probabilities: bool = False
    overwrite: bool = False
    """Predict everything again and replace what is there."""
    resume: bool = False
    """Keep the masks that this model made from these images with these settings, do the others."""
    previous_stage: Path | None = None
    """Folder with the masks of a cascade's previous stage."""
    num_parts: int = 1
    """Number of runs that share the input folder; ``part_id`` (from 0) is the one that this run does."""
    part_id: int = 0
    device: str | torch.device = "auto"
    progress: Callable[[str], None] | None = None
    """Gets a line per case; without it the line is logged."""


@dataclass(frozen=True)
class PredictReport:
    """Names of the cases that were predicted and of those that were there already, and what failed."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[CaseFailure] = field(default_factory=list)
    output_folder: Path = Path()
    warnings: list[str] = field(default_factory=list)
    """What is odd about images whose masks are there all the same."""


def check_options(options: PredictOptions) -> None:
    if not is_file_name(options.checkpoint_name) or "*" in options.checkpoint_name:
        raise MFMError(
            "E_CONFIG", f"-chk {shown(options.checkpoint_name)}: give the name of a file in the fold folders, no path."
        )
    if not 0 < options.step_size <= 1:
        raise MFMError("E_CONFIG", f"step_size={options.step_size}: must be above 0 and at most 1.")
    if options.num_parts < 1 or not 0 <= options.part_id < options.num_parts:
        raise MFMError(
            "E_CONFIG",
            f"part {options.part_id} of {options.num_parts}: parts are numbered from 0 to num_parts minus 1.",
        )
    if options.overwrite and options.resume:
        raise MFMError("E_CONFIG", "overwrite and resume exclude each other: replace the masks, or keep them.")


def check_folders(
    model_folder: Path, input_folder: Path, output_folder: Path, previous_stage: Path | None = None
) -> None:
    if input_folder.exists() and not input_folder.is_dir():
        raise MFMError(
            "E_NOT_FOUND",
            f"{input_folder}: this is a file, and the input is a folder of images. Put the image into a folder of its "
            "own and give that one.",
        )
    if not input_folder.is_dir():
        raise MFMError("E_NOT_FOUND", f"{input_folder}: no such input folder. Check the path.")
    source, target = input_folder.resolve(), output_folder.resolve()
    if target == source or source in target.parents:
        raise MFMError(
            "E_CONFIG", f"{output_folder}: the output folder is the input folder or inside it. Choose another."
        )
    if target == model_folder.resolve():
        raise MFMError("E_CONFIG", f"{output_folder}: the output folder is the model folder. Choose another.")
    if previous_stage is not None and target == previous_stage.resolve():
        raise MFMError(
            "E_CONFIG", f"{output_folder}: the output folder is that of the previous stage's masks. Choose another."
        )
    require_unicode(target, "the output folder")
    if output_folder.exists() and not output_folder.is_dir():
        raise MFMError("E_EXISTS", f"{output_folder}: is a file; the masks need a folder.")


def check_previous_stage(model: Model, options: PredictOptions) -> None:
    needed = model.configuration_manager.previous_stage_name
    if needed is not None and options.previous_stage is None:
        raise MFMError(
            "E_CONFIG",
            f"the model is the second stage of a cascade: predict the same images with configuration '{needed}' first "
            "and give that folder (-prev_stage_predictions).",
        )
    if needed is None and options.previous_stage is not None:
        raise MFMError("E_CONFIG", "-prev_stage_predictions: the model is no cascade and takes no previous stage.")
    if options.previous_stage is not None and not options.previous_stage.is_dir():
        raise MFMError("E_NOT_FOUND", f"{options.previous_stage}: no such folder of masks of the previous stage.")


def check_output(folder: Path, other_cases: Sequence[str], options: PredictOptions) -> None:
    """Raises MFMError (E_EXISTS) when something would be replaced, or mixed with what is there, unasked.

    ``other_cases`` are those of the other parts of this run, which may be writing to the folder.
    """
    entries = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    entries = sorted(name for name in entries if not name.startswith(STAGING_PREFIX))
    if not entries or options.overwrite:
        return
    if options.resume:
        if not any(re.fullmatch(r"cases(_\d+of\d+)?\.jsonl", name) for name in entries):
            raise MFMError(
                "E_EXISTS", f"{folder}: not empty, and nothing to resume: it has no {journal_name()} of this command."
            )
        return
    if options.num_parts > 1:
        journals = {journal_name(options.num_parts, part) for part in range(options.num_parts)}
        journals -= {journal_name(options.num_parts, options.part_id)}
        shared = journals | {"dataset.json", "plans.json", SETTINGS_FILE, ERROR_FOLDER}
        others = set(other_cases)
        entries = [name for name in entries if name not in shared and not _belongs_to(name, others)]
    if entries:
        raise MFMError(
            "E_EXISTS",
            f"{folder}: the output folder is not empty ({len(entries)} entries, e.g. {entries[0]}). Choose another, or "
            "continue with --resume, or replace what is there with --overwrite.",
        )


def warn_of_others(folder: Path, masks: set[str]) -> None:
    """Say which images in the output folder are none of ``masks``, which will be written: they are not replaced."""
    others = [file.name for file in folder.iterdir() if ending_of(file)] if folder.is_dir() else []
    others = sorted(name for name in others if name not in masks and not name.startswith("."))
    if others:
        logger.warning(
            "%s: %d masks stay that are not of this input (%s%s); dataset.json beside them is now that of this model",
            folder, len(others), ", ".join(others[:3]), ", ..." if len(others) > 3 else "",
        )  # fmt: skip


def _belongs_to(file_name: str, cases: set[str]) -> bool:
    """Whether a file is named after one of ``cases`` (whose names may hold dots)."""
    pieces = file_name.split(".")
    return any(".".join(pieces[:count]) in cases for count in range(1, len(pieces)))
