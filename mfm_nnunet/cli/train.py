"""``mfm_train``: train a segmentation network in nnU-Net, from scratch or from pretrained weights."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Train on a labelled dataset, from scratch or from a pretrained checkpoint on the same schedule.

  mfm_train 4 3d_fullres 0
  mfm_train 4 3d_fullres 0 -p PLANS -pretrained_weights CHECKPOINT

The line on stdout is the folder of the fold. The model folder above it is nnU-Net's own."""


def build_parser() -> common.StrictParser:
    """The flags of the command."""
    parser = common.make_parser("mfm_train", DESCRIPTION)
    common.add_dataset_arguments(parser, has_fold=True)
    parser.flag("-tr --trainer", "trainer class (default: MFMTrainer)", default="MFMTrainer", metavar="NAME")
    text = "start from these weights (default: from scratch)"
    parser.flag("-pretrained_weights --pretrained-weights", text, metavar="CHECKPOINT")
    parser.flag("--val", "only validate a run that is finished", dest="only_validate", action="store_true")
    parser.flag("--npz", "save the probabilities of the validation", dest="save_probabilities", action="store_true")
    common.add_run_arguments(parser, "finetune.epochs=200 finetune.learning_rate=1e-3 seed=1")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    common.take_positions(parser, arguments)
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    fold = common.fold_value(arguments.fold)
    from mfm_nnunet import api

    with contextlib.redirect_stdout(sys.stderr):  # what nnU-Net prints is progress; stdout gets the result
        folder = api.train(
            arguments.dataset,
            arguments.configuration,
            fold,
            plans_name=arguments.plans,
            trainer=arguments.trainer,
            pretrained_weights=arguments.pretrained_weights,
            settings=arguments.settings,
            continue_training=arguments.continue_training,
            only_validate=arguments.only_validate,
            save_probabilities=arguments.save_probabilities,
            device=arguments.device,
            num_gpus=arguments.num_gpus,
            workspace=arguments.workspace,
            recipe=arguments.recipe,
        )
    terminal.print_path(folder)
