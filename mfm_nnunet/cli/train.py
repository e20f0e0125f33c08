"""``mfm_train``: train a segmentation network in nnU-Net, from scratch or from pretrained weights."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.requests import TrainRequest

DESCRIPTION = """\
Train on a labelled dataset, from scratch or from a pretrained checkpoint on the same schedule.

  mfm_train 4 3d_fullres 0
  mfm_train 4 3d_fullres 0 -p PLANS -pretrained_weights CHECKPOINT

The line on stdout is the folder of the fold. The model folder above it is nnU-Net's own."""


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_train", DESCRIPTION)
    parser.add_request(TrainRequest)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    parser.merge_positions(TrainRequest, arguments)
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    options = common.options_of(TrainRequest, arguments)
    from mfm_nnunet import train

    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints progress; stdout gets the result
        folder = train(**options)
    if not arguments.dry_run:
        terminal.print_path(folder)
