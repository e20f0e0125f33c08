"""``mfm_predict``: masks, or labels, for a folder of images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.requests import PredictRequest

DESCRIPTION = """\
Predict images: a folder, one file, or DICOM; the masks have the geometry of the images.

  mfm_predict -i images/ -o masks/ -m MODEL_FOLDER
  mfm_predict -i scan.nrrd -o masks/ -m MODEL_FOLDER
  mfm_predict -i dicom/ -o masks/ -m MODEL_FOLDER --dicom-seg     a folder tree, or a zip archive
  mfm_predict -i images/ -o masks/ -d 4 -c 3d_fullres -f 0

Cases that fail are reported, and all others are predicted (exit code 3)."""

WITHOUT_EFFECT = ("npp", "nps", "not_on_device")


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_predict", DESCRIPTION)
    parser.add_request(PredictRequest)
    parser.flag("--disable_progress_bar", "no progress lines", action="store_true")
    parser.flag("--verbose", "print more details", action="store_true")
    text = "ignored; accepted for nnU-Net's scripts"
    parser.flag("-npp", text, type=int, metavar="N")
    parser.flag("-nps", text, type=int, metavar="N")
    parser.flag("--not_on_device", text, action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    return run_command(_run, build_parser().parse_strictly(argv))


def _run(arguments: argparse.Namespace) -> None:
    _set_verbosity(arguments)
    options = common.options_of(PredictRequest, arguments)
    from mfm_nnunet.images import decoder

    decoder.warm()  # its libraries are imported while this process imports torch
    from mfm_nnunet import predict

    report = predict(**options)
    if not arguments.dry_run:
        print(f"predictions: {report.table}" if report.table else f"masks: {arguments.output_folder}")


def _set_verbosity(arguments: argparse.Namespace) -> None:
    quiet = logging.WARNING if arguments.disable_progress_bar else logging.NOTSET
    for name in ("jobs.predict", "prediction", "data.loops", "reports.progress"):
        logging.getLogger(f"mfm_nnunet.{name}").setLevel(logging.DEBUG if arguments.verbose else quiet)
    for name in WITHOUT_EFFECT:
        if getattr(arguments, name):
            logging.getLogger(__name__).info("%s has no effect here.", name)
