"""``mfm_plan_and_preprocess``: analyse images, choose spacing, patch and network, and write the preprocessed data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.requests import PlanRequest

DESCRIPTION = """\
Fingerprint, plan and preprocess labelled datasets and unlabelled corpora.

  mfm_plan_and_preprocess -d 701 --images scans/ --name Corpus    a folder of scans without labels, read in place
  mfm_plan_and_preprocess -d 61 --images scans/ --labels masks/   images and masks of the same names, used in place
  mfm_plan_and_preprocess -d 4                                    a labelled dataset in nnU-Net's raw format
  mfm_plan_and_preprocess -d 4 --like CHECKPOINT                  planned so that a pretrained checkpoint fits

Every decision is printed with its reason. The last lines on stdout are the paths of the plans."""


class _Networks(tuple[str, ...]):
    """Names of networks. Behind a colon may follow what only the network's family can check."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(str(name).partition(":")[0])


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_plan_and_preprocess", DESCRIPTION)
    from mfm_nnunet.models.families import network_names  # without torch

    parser.add_request(PlanRequest, network=_Networks(network_names()))
    text = "ignored, because every file is always verified; accepted for nnU-Net's scripts"
    parser.flag("--verify_dataset_integrity", text, action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_run, build_parser().parse_strictly(argv))


def _run(arguments: argparse.Namespace) -> None:
    options = common.options_of(PlanRequest, arguments)
    from mfm_nnunet.images import decoder

    decoder.warm()  # its libraries are imported while this process imports torch
    from mfm_nnunet import plan_and_preprocess

    for result in plan_and_preprocess(**options):
        if not arguments.dry_run:
            terminal.print_path(result.file)
