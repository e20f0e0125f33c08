"""``mfm_info``: the settings, recipes, pretext tasks and networks that the commands accept."""

from __future__ import annotations

import argparse
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
  mfm_info networks            what --network takes"""
TOPICS = ("settings", "recipes", "tasks", "networks")
WIDTH_OF_A_FILE = 160


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_info", DESCRIPTION)
    parser.flag("topic", f"one of {', '.join(TOPICS)}", choices=TOPICS, metavar="TOPIC")
    parser.flag("word", "only rows with this word", nargs="?", metavar="WORD")
    parser.flag("--json", "print the table as JSON", action="store_true", dest="as_json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_run, build_parser().parse_strictly(argv))


def _run(arguments: argparse.Namespace) -> None:
    from mfm_nnunet import info

    rows = info(arguments.topic)
    if arguments.word is not None:
        rows = [row for row in rows if arguments.word.lower() in " ".join(row.values()).lower()]
    if arguments.as_json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(_as_table(rows))
    else:
        print(f"no row has the word {arguments.word}.")


def _as_table(rows: list[dict[str, str]]) -> str:
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
