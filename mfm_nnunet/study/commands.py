"""A cell as commands: train, predict the test images, score; what is finished already is left out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mfm_nnunet.files import inside
from mfm_nnunet.study.design import Cell, Design
from mfm_nnunet.study.evaluation import RESULT

TRAINING = "training"
"""Title of the step that trains from the beginning; one that goes on has another."""
_COMMAND = "import sys; from mfm_nnunet.cli.{} import main; sys.exit(main())"
_OUT = Path("/$OUT")
"""Stands for the folder that ``commands.sh`` is given."""
_CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")


@dataclass(frozen=True)
class Step:
    """One command: ``words`` as a person would type them, and the environment that it needs on top."""

    title: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> list[str]:
        """The words as a process of this Python, whatever PATH says."""
        if self.words[0].startswith("mfm_"):
            return [sys.executable, "-c", _COMMAND.format(self.words[0].removeprefix("mfm_")), *self.words[1:]]
        return [sys.executable, *self.words[1:]] if self.words[0] == "python" else list(self.words)


Steps = Callable[[Cell], Iterator[Step]]
"""The steps of a cell that are still to be done; each is asked for when the one before has ended."""


def steps_of(design: Design, plans_name: str, device: str) -> Steps:
    """Train (or go on), predict the test images, score; a cell that has a result is only scored again."""

    def steps(cell: Cell) -> Iterator[Step]:
        folder = design.cell_folder(cell)
        train, predict, score = all_steps(design, cell, plans_name, device, folder)
        if (folder / RESULT).is_file():  # of another version of the library: masks and model stay
            yield score
            return
        fold = _model_folder(design, plans_name, folder) / f"fold_{design.fold(cell)}"
        existing = [name for name in _CHECKPOINTS if (fold / name).is_file()]
        folder.mkdir(parents=True, exist_ok=True)
        if "checkpoint_final.pth" not in existing:
            continued = Step(f"{train.title}, continued", (*train.words, "--c"), train.environment)
            yield continued if existing else train
        yield predict
        yield score

    return steps


def all_steps(design: Design, cell: Cell, plans_name: str, device: str, folder: Path) -> tuple[Step, Step, Step]:
    """What a cell is made of from its beginning: training, prediction, scores; all is written into ``folder``."""
    question, arm = design.question, design.arm(cell.arm)
    fold, model = str(design.fold(cell)), _model_folder(design, plans_name, folder)
    environment = {
        "nnUNet_raw": str(design.workspace / "nnUNet_raw"),
        "nnUNet_preprocessed": str(design.workspace / "nnUNet_preprocessed"),
        "nnUNet_results": str(folder / "results"),
    }
    common = ("--workspace", str(folder), *(() if device == "auto" else ("-device", device)))
    weights = () if arm.checkpoint is None else ("-pretrained_weights", str(arm.checkpoint))
    settings = ("--set", *question.settings, *arm.settings, f"seed={cell.seed}")
    train = ("mfm_train", question.dataset, question.configuration, fold, "-p", plans_name)
    predict = ("mfm_predict", "-i", str(design.test_folder), "-o", str(folder / "masks"), "-m", str(model))
    tta = () if question.mirroring else ("--disable_tta",)
    score = ("python", "-m", "mfm_nnunet.study.evaluation", str(design.folder), str(folder))
    return (
        Step(TRAINING, (*train, *weights, *common, *settings), environment),
        Step("prediction", (*predict, "-f", fold, "--resume", *tta, *common), environment),
        Step("scores", score),
    )


def commands_script(design: Design, plans_name: str, device: str) -> str:
    """A shell script that makes every cell from its beginning, by hand and one after the other, in a folder of its own.

    It reads the study's workspace and test images; what it writes is below the folder that it is given.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# The commands of every cell of the study. They read its workspace and its test images, which must be there.",
        "set -eu",
        "OUT=${1:?give a new folder for what the commands write: bash commands.sh OUT}",
    ]
    for cell in design.asked():
        lines += ["", f"# {cell}"]
        for step in all_steps(design, cell, plans_name, device, _OUT / cell.folder_name):
            variables = [f"{name}={_shell_word(value)}" for name, value in step.environment.items()]
            lines.append(" ".join([*variables, *map(_shell_word, step.words)]))
    return "\n".join(lines) + "\n"


def _shell_word(word: str) -> str:
    """A word as the shell reads it; a path below ``_OUT`` is below the script's folder."""
    if not word.startswith(f"{_OUT}/"):
        return shlex.quote(word)
    return f'"$OUT"{shlex.quote(word.removeprefix(str(_OUT)))}'


def _model_folder(design: Design, plans_name: str, cell_folder: Path) -> Path:
    question = design.question
    model = f"MFMTrainer__{plans_name}__{question.configuration}"
    return inside(cell_folder, "results", question.dataset, model)
