"""``mfm_demo``: every step on real images in minutes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.study_requests import DemoRequest

DESCRIPTION = """\
Plan, preprocess, pretrain with MAE, fine-tune and predict, on real images, in minutes.

  mfm_demo                                  blocks of a brain template: train on the left half, test on the right
  mfm_demo --data DATASET_FOLDER            a labelled dataset in nnU-Net's raw format: every fifth case tests
  mfm_demo --set finetune.epochs=20         a longer schedule

It fine-tunes with few labels, from scratch and after MAE, three times each. report.html shows how fast both learn, what
is above the spread of the three and what is noise, and the masks. It does not measure accuracy."""

NOTES = {
    "template": "All blocks come from one brain template. The demo shows how fast each start learns, not how accurate "
    "the masks are.",
    "data": "Three short trainings per start. The demo shows how fast each start learns, not what long ones reach.",
}


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_demo", DESCRIPTION, default_workspace="mfm_demo")
    parser.add_request(DemoRequest)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_run, build_parser().parse_strictly(argv))


def _run(arguments: argparse.Namespace) -> None:
    from mfm_nnunet.demo.run import format_result, run_demo

    data = Path(arguments.data) if arguments.data else None
    folder = Path(arguments.workspace)
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints progress; stdout gets the result
        result = run_demo(folder, data, arguments.settings, arguments.device, arguments.overwrite)
    print(f"\n{format_result(result)}\n{NOTES['data' if data else 'template']}\n")
    print("Masks:")
    for file in result.masks:
        print(f"  {file}")
    print(f"Report, open it in a browser: {result.report}")
