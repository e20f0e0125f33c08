"""``mfm_info``: what the commands accept, and the script that completes it in a shell."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import shutil
import sys
from collections.abc import Sequence

from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
List what the commands accept.

  mfm_info settings            all settings for --set, with defaults and legal values
  mfm_info settings epochs     those with a word in their name or meaning
  mfm_info recipes             what --recipe takes by name
  mfm_info tasks               what --pretext takes
  mfm_info networks            what --network takes
  mfm_info checkpoints         published weights, which --like and -pretrained_weights take by name
  mfm_info completion bash     a script for bash, zsh or tcsh: Tab completes flags, words and files"""
COMPLETION = "completion"
TOPICS = ("settings", "recipes", "tasks", "networks", "checkpoints", COMPLETION)
SHELLS = ("bash", "zsh", "tcsh")
COMMANDS = ("plan_and_preprocess", "pretrain", "train", "predict", "checkpoint", "demo", "study", "info", "doctor")
"""Modules beside this one; each is a command."""
WIDTH_OF_A_FILE = 160
PATHS = {"CHECKPOINT", "CSV", "DIR", "FILE", "FOLDER", "IN", "MODEL_FOLDER", "OUT", "PATH", "SOURCE"}
"""Words in the help for values that are completed as files and folders."""


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_info", DESCRIPTION)
    parser.flag("topic", f"one of {', '.join(TOPICS)}", choices=TOPICS, metavar="TOPIC")
    parser.flag("word", "only rows with this word; of completion: the shell", nargs="?", metavar="WORD")
    parser.flag("--json", "print the table as JSON", action="store_true", dest="as_json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    if arguments.topic == COMPLETION and (arguments.word not in SHELLS or arguments.as_json):
        parser.error(f"give the shell and nothing else, e.g. {COMPLETION} bash. Known: {', '.join(SHELLS)}.")
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.topic == COMPLETION:
        print(completion_script(arguments.word))
        return
    from mfm_nnunet import info

    rows = info(arguments.topic)
    if arguments.word is not None:
        rows = [row for row in rows if arguments.word.lower() in " ".join(row.values()).lower()]
    if arguments.as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(as_table(rows))
    else:
        print(f"no row has the word {arguments.word}.")


def completion_script(shell: str) -> str:
    """Return the completions of all commands for a shell."""
    import shtab

    scripts = []
    for name in COMMANDS:
        parser = importlib.import_module(f"mfm_nnunet.cli.{name}").build_parser()
        for action in parser._actions:
            if not action.choices and PATHS & set(str(action.metavar).split("|")):
                action.complete = shtab.FILE
        scripts.append(shtab.complete(parser, shell))
    return "\n".join(scripts)


def as_table(rows: list[dict[str, str]]) -> str:
    """Lay out rows of equal keys for a terminal, or for a file."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_OF_A_FILE
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(rows[0]):
        table.add_column(Text(name), no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(Text, row.values()))
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
