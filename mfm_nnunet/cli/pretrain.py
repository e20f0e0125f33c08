"""``mfm_pretrain``: learn weights from scans without labels."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Pretrain the network of a plan on scans without labels.

  mfm_pretrain 701 3d_fullres --pretext mae --set pretrain.epochs=300

The last line printed is the path of the pretrained checkpoint. Ctrl-C and SIGTERM save and stop; --c continues."""


def build_parser() -> common.StrictParser:
    """The flags of the command."""
    parser = common.make_parser("mfm_pretrain", DESCRIPTION)
    common.add_dataset_arguments(parser)
    text = "pretext task (default: mae); see --list, or the dotted name of a module of your own"
    parser.flag("--pretext", text, default="mae", metavar="TASK")
    parser.flag("--run-name", "name of the run folder (default: after the pretext task)", metavar="NAME")
    parser.flag("--list", "name the pretext tasks and exit", dest="list_tasks", action="store_true")
    common.add_run_arguments(parser, "pretrain.epochs=300 pretrain.batch_size=4 seed=1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    if arguments.list_tasks:
        return run_command(_list_tasks, arguments)
    common.take_positions(parser, arguments)
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from mfm_nnunet import api

    checkpoint = api.pretrain(
        arguments.dataset,
        arguments.configuration,
        plans_name=arguments.plans,
        pretext=arguments.pretext,
        settings=arguments.settings,
        continue_training=arguments.continue_training,
        device=arguments.device,
        num_gpus=arguments.num_gpus,
        workspace=arguments.workspace,
        run_name=arguments.run_name,
    )
    print(checkpoint)


def _list_tasks(arguments: argparse.Namespace) -> None:
    from mfm_nnunet.pretext.registry import list_tasks

    for task in list_tasks():
        print(f"{task.name:16}{task.summary}")
