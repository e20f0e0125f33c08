"""``mfm_plan_and_preprocess``: look at the images, decide spacing, patch and network, write the preprocessed data."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Fingerprint, plan and preprocess labelled datasets and unlabelled corpora.

  mfm_plan_and_preprocess -d 701 --images scans/ --name Corpus    a folder of scans without labels, read in place
  mfm_plan_and_preprocess -d 4                                    a labelled dataset in nnU-Net's raw format
  mfm_plan_and_preprocess -d 4 --like CHECKPOINT                  planned so that a pretrained checkpoint fits

Every decision is shown with its reason. The last lines printed are the paths of the plans."""


def build_parser() -> common.StrictParser:
    """The flags of the command."""
    parser = common.make_parser("mfm_plan_and_preprocess", DESCRIPTION)
    flag = parser.flag
    flag("-d --dataset", "numbers or names of datasets", dest="datasets", nargs="+", required=True, metavar="ID")
    flag(
        "--images",
        "register unlabelled scans as dataset ID: a folder tree of NIfTI, NRRD, MHA or PNG files, a BIDS dataset or a "
        "folder of several, a CSV (columns image or image_0, image_1 ...; optional case, subject, modality, dataset, "
        "anonymisation_mask), nnssl's pretrain_data.json, or an nnU-Net raw folder without labels",
        metavar="SOURCE",
    )
    flag("--name", "name of the corpus that --images registers (default: Corpus)")
    text = "configurations to preprocess (default: all that are planned; for a corpus 3d_fullres, or 2d for 2D images)"
    flag("-c --configuration", text, dest="configurations", nargs="+", metavar="CONFIG")
    from mfm_nnunet.models.families import network_names  # without torch

    text = "residual encoder U-Net (default), the Primus transformer (V2 and V3 have a convolutional stem), or your own"
    flag("--network", text, choices=tuple(network_names()), default="resenc")
    text = "memory that training may take (default: the GPU's, or a small preset for the CPU)"
    flag("--memory-gb -gpu_memory_target", text, type=_positive_float, metavar="G")
    text = "median (default), onemm, original, or three numbers in mm, slices first as in nnU-Net (Z Y X)"
    flag("--spacing", text, nargs="+", default=["median"], metavar="S")
    text = "take network, spacing, normalisation and axis order of a pretrained checkpoint"
    flag("--like", text, metavar="CHECKPOINT")
    text = "name of the plan (default: mfmPlans, mfmPrimusPlans, mfmPrimusV2Plans ..., or after the checkpoint)"
    flag("-pl --plans-name", text, dest="plans_name", metavar="NAME")
    text = "number of processes (default: the CPU cores)"
    flag("-np --num-processes", text, dest="num_processes", type=common.positive_int, metavar="N")
    flag("--no_pp --no-preprocessing", "plan only", dest="no_preprocessing", action="store_true")
    text = "accepted for nnU-Net's scripts: every file is always verified here"
    flag("--verify_dataset_integrity", text, action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    arguments.spacing = _spacing(parser, arguments.spacing)
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from mfm_nnunet import api

    results = api.plan_and_preprocess(
        arguments.datasets,
        images=arguments.images,
        name=arguments.name,
        configurations=arguments.configurations,
        network=arguments.network,
        memory_gb=arguments.memory_gb,
        spacing=arguments.spacing,
        like=arguments.like,
        plans_name=arguments.plans_name,
        num_processes=arguments.num_processes,
        workspace=arguments.workspace,
        preprocess=not arguments.no_preprocessing,
    )
    for result in results:
        terminal.print_path(result.file)


def _spacing(parser: common.StrictParser, words: list[str]) -> str | tuple[float, ...]:
    """One of the three words, or three lengths in mm."""
    if len(words) == 1 and words[0] in ("median", "onemm", "original"):
        return words[0]
    lengths: tuple[float, ...] = ()
    try:
        lengths = tuple(_positive_float(word) for word in words)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--spacing {' '.join(words)}: expected median, onemm, original or three numbers in mm ({error}).")
    if len(lengths) != 3:
        parser.error(f"--spacing {' '.join(words)}: expected three numbers in mm, got {len(lengths)}.")
    return lengths


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value
