"""``mfm_pretrain``: learn weights from scans without labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.requests import PretrainRequest

DESCRIPTION = """\
Pretrain the network of a plan on scans without labels.

  mfm_pretrain 701 3d_fullres --pretext mae --set pretrain.epochs=300

The last line printed is the path of the pretrained checkpoint. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP save and stop; --c
continues."""

LIST_WIDTH = 120
REASONS = {"tokens": "tokens to replace", "sparse encoder": "an encoder of convolutions alone"}
"""Why a task does not work on every network."""


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_pretrain", DESCRIPTION)
    parser.add_request(PretrainRequest)
    parser.flag("--list", "print a table of the pretext tasks and exit", dest="list_tasks", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    if arguments.list_tasks:
        return run_command(_list_tasks, arguments)
    parser.merge_positions(PretrainRequest, arguments)
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    options = common.options_of(PretrainRequest, arguments)
    from mfm_nnunet import pretrain

    checkpoint = pretrain(**options)
    if not arguments.dry_run:
        terminal.print_path(checkpoint)


def _list_tasks(arguments: argparse.Namespace) -> None:
    """Print a table of at most ``LIST_WIDTH`` columns of text; the third column wraps if necessary."""
    import textwrap

    from mfm_nnunet.tasks.registry import list_tasks

    rows = [("task", "networks", "hidden or mixed", "published", "paper")]
    rows += [(task.name, ", ".join(task.backbones), task.hides, task.recipe, task.paper) for task in list_tasks()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[2] = min(widths[2], LIST_WIDTH - sum(widths) + widths[2] - 2 * (len(widths) - 1))
    for row in rows:
        for number, line in enumerate(textwrap.wrap(row[2], widths[2]) or [""]):
            cells = (row[0], row[1], line, row[3], row[4]) if number == 0 else ("", "", line)
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip())
    needs = [f"{task.name} needs {REASONS[task.needs]}" for task in list_tasks() if task.needs in REASONS]
    print(f"{'; '.join(needs)}.")
    print("published: batch x patch of the published recipe. Settings: documentation/reference/pretext_tasks.md")
