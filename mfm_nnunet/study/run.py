"""A study from its design to its report: what can be refused before hours of training, then the cells, then the table.

Planning and preprocessing are not here: :func:`mfm_nnunet.api.run_study` does them in between.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torch import nn

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loops import in_threads, with_progress
from mfm_nnunet.device import pick_device
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError, dataset_refused
from mfm_nnunet.files import inside, shown
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune import settings as finetune_settings
from mfm_nnunet.finetune.pretrained import describe, has_decoder, transfer
from mfm_nnunet.finetune.settings import advise
from mfm_nnunet.images.reading import check_label, read_image, read_label
from mfm_nnunet.interchange.read import read_checkpoint
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.settings import MFMBlock, block_of
from mfm_nnunet.study import cells as running
from mfm_nnunet.study.arms import Arm
from mfm_nnunet.study.commands import TRAINING, commands_script, steps_of
from mfm_nnunet.study.design import Cell, Design, cells_of
from mfm_nnunet.study.evaluation import RESULT
from mfm_nnunet.study.folder import RECORD, read_record, write_json
from mfm_nnunet.study.report import cautions, plot, table
from mfm_nnunet.study.summary import Tested, read_result, read_results, summarise

logger = logging.getLogger(__name__)

TABLE, PICTURE, COMMANDS = "table.md", "study.png", "commands.sh"


def check_settings(settings: Sequence[str]) -> None:
    """Raise MFMError (E_CONFIG) for a setting that fine-tuning does not have, or an impossible value."""
    finetune_settings.resolve(MFMBlock(), settings, None)


def check_checkpoints(design: Design, plans: Mapping[str, Any]) -> None:
    """Raise MFMError (E_MODEL_MISMATCH, E_CONFIG and others) where the training of an arm would be refused.

    Its weights must fit the network of the plan, and its settings the network and what it starts from.
    """
    configuration = design.question.configuration
    num_inputs = len(design.dataset_json.get("channel_names") or design.dataset_json.get("modality") or [0])
    network = build_network(plans, configuration, num_inputs, 2)
    for arm in design.arms:
        try:
            _check_arm(arm, design, plans, network)
        except MFMError as error:
            raise MFMError(error.code, f"arm {arm.name}: {error.message}") from error


def _check_arm(arm: Arm, design: Design, plans: Mapping[str, Any], network: nn.Module) -> None:
    """As training checks it; ``network`` gets the arm's weights."""
    overrides = (*design.question.settings, *arm.settings)
    if arm.checkpoint is None:
        settings = finetune_settings.resolve(block_of(plans), overrides, None).finetune
        if settings.train != "all":
            raise MFMError(
                "E_CONFIG",
                f"finetune.train={settings.train}: from scratch the encoder would stay random. Give this to the arms "
                f"with a checkpoint alone: NAME=CHECKPOINT,finetune.train={settings.train}.",
            )
        groups.require_fitting(settings, network, is_distributed=False)
        return
    reading = read_checkpoint(arm.checkpoint)
    about = describe(arm.checkpoint, reading)
    advice = advise(family_of(network), min(design.labels), about["pretext"], has_decoder(reading, network))
    settings = finetune_settings.resolve(block_of(plans), overrides, about, advice).finetune
    groups.require_fitting(settings, network, is_distributed=False)
    groups.require_pretrained(settings, is_pretrained=True)
    parts = "all_but_heads" if settings.parts == "auto" else settings.parts
    try:
        _, report = transfer(arm.checkpoint, network, parts, settings.transfer)
    except MFMError as error:
        raise MFMError(
            error.code,
            f"{error.message} All arms share one plan, and this is {plans.get('plans_name')}: name one that all fit "
            "with -p, or give the checkpoint that decides first; both in a new folder (-o) once something was trained.",
        ) from error
    groups.require_no_random_rest(settings, network, [entry.name for entry in report.new])
    logger.info("arm %s: %.0f %% of the encoder's parameters come from it", arm.name, 100 * report.encoder_share)


def check_test_cases(design: Design, reader: str) -> None:
    """Read every test image, through its link as prediction does, and its label: they are used only after the training.

    Raises MFMError with the list of all that cannot be used.
    """

    def check(case: Case) -> bool:
        assert case.label is not None
        image, properties = read_image(design.test_images(case), reader)
        label, label_properties = read_label(case.label, reader)
        check_label(label, label_properties, image, properties, design.dataset_json, case.name)
        return True

    with with_progress(in_threads(check, design.test, 1), len(design.test), "reading the test cases") as outcomes:
        failures = [found for _, found in outcomes if isinstance(found, CaseFailure)]
    if failures:
        raise dataset_refused(
            f"{design.question.dataset}, test split", failures, len(design.test), "; nothing was trained"
        )


def run_design(
    design: Design, plans_name: str, device: str = "auto", jobs: int | None = None, lock: IO[bytes] | None = None
) -> None:
    """Run all cells that are not finished; table and picture are renewed with every cell.

    Finished ones, of earlier calls too, are scored again where another version of the library scored them, so that all
    in the table have the same.

    Raises CasesFailedError after all others are done when cells failed.
    """
    gpus = visible_gpus(device)
    cells = list(design.cells())
    todo = [cell for cell in cells if not (design.cell_folder(cell) / RESULT).is_file()]
    again = _scored_otherwise(design)
    at_once = jobs or (1 if pick_device(device).type == "mps" else running.default_jobs(gpus))
    num_jobs = min(at_once, max(1, len(todo) + len(again)))
    with atomic_write(design.folder / COMMANDS) as handle:
        handle.write(commands_script(design, plans_name, device).encode("utf-8", "surrogateescape"))
    logger.info("%d cells, %d of them finished; %d at a time", len(cells), len(cells) - len(todo), num_jobs)
    for caution in cautions(read_record(design.folder)):
        logger.warning("%s", caution)
    if again:
        logger.info("%d finished cells are scored again, with the version of the library that is here", len(again))

    def finished(cell: Cell, seconds: dict[str, float]) -> str:
        _note_seconds(design.cell_folder(cell), seconds)
        _drop_unused(design.cell_folder(cell))
        renew(design.folder)
        result = read_result(design.cell_folder(cell))
        mean = Tested.of([result], design.question.subjects).mean(result, "dice")
        return f"Dice {mean:.3f} in {sum(seconds.values()):.0f} s"

    failures = running.run_cells(
        again + todo,
        steps_of(design, plans_name, device),
        running.slots(num_jobs, gpus),
        lambda cell: inside(design.folder, "logs", f"{cell.folder_name}.txt"),
        finished,
        _known_seconds(design.folder, cells),
        lock,
    )
    renew(design.folder, failures)
    if failures:
        raise CasesFailedError(failures, len(cells) + len(again), "cells")


def renew(folder: Path, failures: Sequence[CaseFailure] = ()) -> None:
    """Write ``table.md``, ``study.png`` and the results in ``study.json`` anew from the cells that are finished.

    What the record says of other failures stays, but for cells that are finished by now.

    Raises MFMError (E_NOT_FOUND) when the folder holds no study.
    """
    record = read_record(folder)
    summary = summarise(record, read_results(folder, cells_of(record)), failures)
    write_json(folder / RECORD, {**record, "results": summary})
    with atomic_write(folder / TABLE) as handle:
        handle.write(shown(table(record, summary)).encode())
    plot(folder / PICTURE, record, summary)


def visible_gpus(device: str) -> list[str]:
    """The GPUs that cells are shared among, as CUDA_VISIBLE_DEVICES names them; none where the CPU computes."""
    if pick_device(device).type != "cuda":
        return []
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[: torch.cuda.device_count()] or [str(number) for number in range(torch.cuda.device_count())]


def _scored_otherwise(design: Design) -> list[Cell]:
    """The finished cells that another library, or another version of it, scored."""
    library, found = read_record(design.folder)["library"], read_results(design.folder, design.asked())
    return [cell for cell, result in found.items() if result.get("library") != library]


def _note_seconds(folder: Path, seconds: Mapping[str, float]) -> None:
    """Add the seconds of each step to a result."""
    result = read_result(folder)
    write_json(folder / RESULT, {**result, "seconds": {**result.get("seconds", {}), **seconds}})


def _drop_unused(folder: Path) -> None:
    """The best checkpoint is never tested, and is as large as the final one."""
    for file in folder.glob("results/*/*/fold_*/checkpoint_best.pth"):
        with contextlib.suppress(OSError):
            file.unlink()


def _known_seconds(folder: Path, cells: Sequence[Cell]) -> list[float]:
    """How long finished cells took."""
    found = [result.get("seconds", {}) for result in read_results(folder, cells).values()]
    return [sum(seconds.values()) for seconds in found if TRAINING in seconds]
