"""Shared parts of the commands: a strict parser, flags from request fields, and nnU-Net's way of naming a dataset.

Nothing heavy is imported here, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from mfm_nnunet import terminal, workspace
from mfm_nnunet.fields import ASSIGNMENT, Request
from mfm_nnunet.version import __version__

_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_NOT_SET = ("source", "modalities", "corpus", "universal", "network", "format")
"""Fields of a plan's block that are not settings of a run."""
_ALIKE = 0.65
"""Minimum similarity of a proposed flag, from 0 to 1: ``--run-name`` must not be proposed for ``--dry-run``."""
_OF_ARGPARSE = ("nargs", "metavar", "choices", "action")
"""Field metadata passed on to argparse unchanged."""


class StrictParser(argparse.ArgumentParser):
    """A parser that refuses unknown flags and names the nearest legal one.

    argparse alone accepts abbreviations and reads ``-plans`` as ``-p lans``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.settings: tuple[str, ...] = ()
        """Setting prefixes that ``--set`` accepts, e.g. ``pretrain``."""

    def flag(self, names: str, help_text: str, **kwargs: Any) -> None:
        """Add one flag; ``names`` are its spellings, separated by spaces."""
        self.add_argument(*names.split(), help=help_text, **kwargs)

    def add_request(self, request: type[Request], **choices: Sequence[str]) -> None:
        """Add a flag for each field of a request. Positional fields also get a flag.

        ``choices`` are the legal values of fields for which the request does not define them.
        """
        for item in fields(request):
            if "spellings" in item.metadata:
                self._add_field(item, choices.get(item.name))

    def _add_field(self, item: Field[Any], choices: Sequence[str] | None) -> None:
        details = {name: item.metadata[name] for name in _OF_ARGPARSE if name in item.metadata}
        details |= {"choices": choices} if choices else {}
        text, names, default = item.metadata["help"].replace("%", "%%"), item.metadata["spellings"], item.default
        if default not in (MISSING, None, ()) and not isinstance(default, bool) and "(default" not in text:
            text = f"{text} (default: {str(default).replace('%', '%%')})"
        if item.metadata.get("position"):
            self.add_argument(item.name, help=text, nargs="?", **details)
            self.add_argument(*names, help=f"{text} (instead of the argument)", dest=f"{item.name}_flag", **details)
        elif isinstance(default, bool):  # the flag inverts the default
            self.add_argument(*names, help=text, action="store_true", dest=f"no_{item.name}" if default else item.name)
        elif default is MISSING:
            self.add_argument(
                *names, help=text, dest=item.name, required=item.metadata.get("required", True), **details
            )
        else:
            if "action" in details:
                default, self.settings = [], item.metadata["parts"]
            default = [default] if "nargs" in details and default is not None else default
            is_required = item.metadata.get("required", False)
            self.add_argument(*names, help=text, dest=item.name, default=default, required=is_required, **details)

    def merge_positions(self, request: type[Request], arguments: argparse.Namespace) -> None:
        """Merge each positional argument with its flag; an error if a required one is missing or they differ."""
        for item in (item for item in fields(request) if item.metadata.get("position")):
            position, flag = getattr(arguments, item.name), getattr(arguments, f"{item.name}_flag")
            name = f"{item.metadata['metavar']} ({item.metadata['spellings'][0]})"
            if position is not None and flag is not None and position != flag:
                self.error(f"{name} is given twice, as {position} and as {flag}. Give it once.")
            value = flag if position is None else position
            if value is None:
                self.error(f"{name} is missing.")
            setattr(arguments, item.name, value)

    def flags(self) -> list[str]:
        """Return all legal flags, sorted."""
        return sorted({flag for action in self._actions for flag in action.option_strings})

    def parse_strictly(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse a command line; an error ends the process with exit code 2 and a two-line message."""
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
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: {terminal.one_message(message)}\nSee {self.prog} --help.\n")


def make_parser(name: str, description: str, default_workspace: str | None = None) -> StrictParser:
    """Make a parser with the common flags; with a ``default_workspace``, environment variables are ignored."""
    parser = StrictParser(prog=name, description=description)
    text = f"folder for all data and results (default: {default_workspace or workspace.DEFAULT})"
    if default_workspace is None:
        text += "; nnUNet_raw, nnUNet_preprocessed and nnUNet_results override it if set"
    parser.flag("--workspace", text, metavar="DIR", default=default_workspace)
    parser.flag("--debug", "show the traceback of an error", action="store_true")
    parser.flag("--version", "print the version", action="version", version=f"mfm_nnunet {__version__}")
    return parser


def options_of(request: type[Request], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of a request's fields by name, as parameters of its job.

    Invalid values are refused here, before heavy libraries are imported.
    """
    values = vars(arguments)
    options: dict[str, Any] = {
        item.name: not values[f"no_{item.name}"] if item.default is True else values[item.name]
        for item in fields(request)
        if {item.name, f"no_{item.name}"} & set(values)  # others are for Python only
    }
    return vars(request(**options))


def _split_assignments(arguments: Sequence[str]) -> Iterator[str]:
    """Rewrite ``--set a=1 b=2 701`` as ``--set=a=1 --set=b=2 701``: only assignments belong to --set."""
    is_open = is_first = False
    for token in arguments:
        is_value = is_open and not token.startswith("-") and (is_first or bool(ASSIGNMENT.match(token)))
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


def _nearest_flag(flag: str, legal: Sequence[str], parts: Sequence[str]) -> str:
    """Suggest a replacement for an unknown flag: settings of that name if there are any, else a similar flag."""
    from mfm_nnunet.settings import MFMBlock, setting_names

    word = flag.lstrip("-").replace("-", "_")
    names = [name for name in setting_names(MFMBlock()) if name.rpartition(".")[0] in (*parts, "")]
    settings = [name for name in names if name not in _NOT_SET and word in (name, name.rpartition(".")[2])]
    if settings and "--set" in legal:
        return f"Settings are given with --set: {' or '.join(f'{name}=VALUE' for name in settings)}."
    alike = difflib.get_close_matches(flag, legal, n=1, cutoff=_ALIKE)
    return f"Did you mean '{alike[0]}'?" if alike else ""
