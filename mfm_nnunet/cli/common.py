"""What the commands share: a strict parser, the flags that they have in common, and nnU-Net's way of naming a dataset.

Nothing heavy is imported here, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from mfm_nnunet import terminal, workspace
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import whole_number
from mfm_nnunet.version import __version__

_ASSIGNMENT = re.compile(r"[A-Za-z_][\w.]*=")
_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NOT_SET = ("source", "network", "format")
"""Parts of a plan's block that no run sets."""
_ALIKE = 0.65
"""How alike a flag must be to be proposed, from 0 to 1: ``--dry-run`` is not meant to be ``--run-name``."""
_POSITIONS = {"dataset": "DATASET (-d)", "configuration": "CONFIG (-c)", "fold": "FOLD (-f)"}


class StrictParser(argparse.ArgumentParser):
    """A parser in which a misspelt flag is an error that names the nearest legal flag, never a value of another flag.

    argparse alone accepts abbreviations and reads ``-plans`` as ``-p lans``; here a flag is legal or refused.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.settings: tuple[str, ...] = ()
        """The parts of the settings that ``--set`` takes here, e.g. ``pretrain``."""

    def flag(self, names: str, help_text: str, **kwargs: Any) -> None:
        """Add one flag; ``names`` are its spellings, separated by spaces."""
        self.add_argument(*names.split(), help=help_text, **kwargs)

    def flags(self) -> list[str]:
        """All legal flags, sorted."""
        return sorted({flag for action in self._actions for flag in action.option_strings})

    def parse_strictly(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The parsed command line; an error ends the process with exit code 2 and a message of two lines."""
        tokens = list(_split_assignments(sys.argv[1:] if arguments is None else arguments))
        legal = self.flags()
        for token in tokens:
            if token == "--":
                break
            flag = token.split("=", 1)[0]
            if flag.startswith("-") and flag != "-" and flag not in legal and not _NUMBER.fullmatch(token):
                self.error(f"unknown flag {flag}. {_nearest_flag(flag, legal, self.settings)}".rstrip())
        return self.parse_intermixed_args(tokens)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(2, f"{self.prog}: {terminal.one_message(message)}\nSee {self.prog} --help.\n")


def make_parser(name: str, description: str, default_workspace: str | None = None) -> StrictParser:
    """A parser with the flags that every command has; with a ``default_workspace`` the environment does not count."""
    parser = StrictParser(prog=name, description=description)
    text = f"where everything lives (default: {default_workspace or workspace.DEFAULT})"
    if default_workspace is None:
        text += "; nnUNet_raw, nnUNet_preprocessed and nnUNet_results win where they are set"
    parser.flag("--workspace", text, metavar="DIR", default=default_workspace)
    parser.flag("--debug", "show the traceback of an error", action="store_true")
    parser.flag("--version", "print the version", action="version", version=f"mfm_nnunet {__version__}")
    return parser


def add_dataset_arguments(parser: StrictParser, has_fold: bool = False) -> None:
    """DATASET CONFIG [FOLD] as positions and ``-d -c -f`` alike."""
    parser.flag("dataset", "name or number of the dataset", nargs="?", metavar="DATASET")
    parser.flag("configuration", "configuration, e.g. 3d_fullres or 2d", nargs="?", metavar="CONFIG")
    parser.flag("-d --dataset", "the same as a flag", dest="dataset_flag", metavar="DATASET")
    parser.flag("-c --configuration", "the same as a flag", dest="configuration_flag", metavar="CONFIG")
    if has_fold:
        parser.flag("fold", "number of the fold, or all", nargs="?", metavar="FOLD")
        parser.flag("-f --fold", "the same as a flag", dest="fold_flag", metavar="FOLD")


def add_run_arguments(parser: StrictParser, examples: str, parts: Sequence[str]) -> None:
    """Plan, settings, device and number of GPUs of a training run."""
    parser.flag("-p --plans", "name of the plan (default: mfmPlans)", default="mfmPlans", metavar="PLANS")
    text = "settings of a whole run: the name of a shipped recipe, or a .json file; --set wins over it"
    parser.flag("--recipe", text, metavar="NAME|FILE")
    add_settings(parser, examples, parts)
    parser.flag("--c", "continue a stopped or killed run where it was", dest="continue_training", action="store_true")
    add_device(parser)
    parser.flag("-num_gpus --num-gpus", "number of GPUs (default: 1)", type=positive_int, default=1, metavar="N")


def add_settings(parser: StrictParser, examples: str, parts: Sequence[str]) -> None:
    """``--set name=value ...``, of these parts of the settings and of those that belong to none."""
    parser.settings = tuple(parts)
    text = f"change a setting; several may follow, e.g. {examples}"
    parser.flag("--set", text, dest="settings", action="append", default=[], metavar="NAME=VALUE", type=_assignment)


def add_device(parser: StrictParser) -> None:
    """``-device``."""
    text = "auto (default) takes a GPU where there is one; CUDA_VISIBLE_DEVICES chooses which"
    parser.flag("-device --device", text, choices=("auto", "cpu", "cuda", "mps"), default="auto")


def take_positions(parser: StrictParser, arguments: argparse.Namespace) -> None:
    """Merge positions and flags of the same meaning; an error when one is missing or the two differ."""
    for name in (n for n in _POSITIONS if hasattr(arguments, n)):
        position, flag = getattr(arguments, name), getattr(arguments, f"{name}_flag")
        if position is not None and flag is not None and position != flag:
            parser.error(f"{_POSITIONS[name]} is given twice and differs: {position} and {flag}. Give it once.")
        value = flag if position is None else position
        if value is None:
            parser.error(f"{_POSITIONS[name]} is missing.")
        setattr(arguments, name, value)


def fold_value(text: str) -> int | str:
    """A fold: a number or ``all``. Raises MFMError (E_CONFIG) for anything else."""
    if text == "all":
        return text
    number = whole_number(text)
    if number is not None:
        return number
    raise MFMError("E_CONFIG", f"fold {text}: expected a number from 0, or all.")


def positive_int(text: str) -> int:
    """An argparse type."""
    if number := whole_number(text):
        return number
    raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")


def _split_assignments(arguments: Sequence[str]) -> Iterator[str]:
    """``--set a=1 b=2 701`` as ``--set=a=1 --set=b=2 701``: several assignments, and nothing else, belong to --set."""
    is_open = is_first = False
    for token in arguments:
        is_value = is_open and not token.startswith("-") and (is_first or bool(_ASSIGNMENT.match(token)))
        if is_value:
            yield f"--set={token}"
            is_first = False
            continue
        if is_first:
            yield "--set"
        is_open = is_first = token == "--set"
        if not is_open:
            yield token
    if is_first:
        yield "--set"


def _assignment(text: str) -> str:
    if _ASSIGNMENT.match(text):
        return text
    raise argparse.ArgumentTypeError(f"expected name=value, got {text}")


def _nearest_flag(flag: str, legal: Sequence[str], parts: Sequence[str]) -> str:
    """The advice for an unknown flag: the settings of that name where there are any, else a flag that is spelt alike.

    ``parts`` are the parts of the settings that the command takes.
    """
    from mfm_nnunet.settings import MFMBlock, setting_names

    word = flag.lstrip("-").replace("-", "_")
    names = [name for name in setting_names(MFMBlock()) if name.rpartition(".")[0] in (*parts, "")]
    settings = [name for name in names if name not in _NOT_SET and word in (name, name.rpartition(".")[2])]
    if settings and "--set" in legal:
        return f"Settings are given with --set: {' or '.join(f'{name}=VALUE' for name in settings)}."
    alike = difflib.get_close_matches(flag, legal, n=1, cutoff=_ALIKE)
    return f"Did you mean '{alike[0]}'?" if alike else ""
