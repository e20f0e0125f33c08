"""``mfm_predict``: masks for a folder of images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Predict a folder of images; the masks have the geometry of the images.

  mfm_predict -i images/ -o masks/ -m MODEL_FOLDER
  mfm_predict -i images/ -o masks/ -d 4 -c 3d_fullres -f 0

A case that fails is reported and the others are done (exit code 3)."""

WITHOUT_EFFECT = ("npp", "nps", "not_on_device")


def build_parser() -> common.StrictParser:
    """The flags of the command."""
    parser = common.make_parser("mfm_predict", DESCRIPTION)
    text = "folder of images, named as for nnU-Net (case_0000.nii.gz, case_0001.nii.gz ...: one file per channel)"
    parser.flag("-i --input", text, required=True, metavar="IN")
    parser.flag("-o --output", "folder for the masks", required=True, metavar="OUT")
    _add_model_arguments(parser)
    _add_prediction_arguments(parser)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the masks that are in OUT")
    text = "keep the masks in OUT that this model made from these images, do the others"
    existing.add_argument("--resume", "--continue_prediction", "--c", dest="resume", action="store_true", help=text)
    common.add_device(parser)
    return parser


def _add_model_arguments(parser: common.StrictParser) -> None:
    flag = parser.flag
    flag("-m --model", "model folder with fold_* in it; or name the model by -d -c -f", metavar="MODEL_FOLDER")
    flag("-d --dataset", "name or number of the dataset", metavar="DATASET")
    flag("-c --configuration", "configuration", metavar="CONFIG")
    flag("-f --folds", "folds, or all (default: those that are there)", nargs="+", metavar="FOLD")
    flag("-p --plans", "name of the plan (default: mfmPlans)", default="mfmPlans", metavar="PLANS")
    flag("-tr --trainer", "trainer class (default: MFMTrainer)", default="MFMTrainer", metavar="NAME")
    text = "checkpoint in the fold folders (default: checkpoint_final.pth)"
    flag("-chk --checkpoint", text, dest="checkpoint_name", default="checkpoint_final.pth", metavar="FILE")


def _add_prediction_arguments(parser: common.StrictParser) -> None:
    flag = parser.flag
    text = "step of the sliding window as a share of the patch (default: 0.5)"
    flag("-step_size --step-size", text, type=_step_size, default=0.5, metavar="SHARE")
    text = "do not average over mirrored images: up to eight times faster, less accurate"
    flag("--disable_tta --disable-tta", text, action="store_true")
    flag("--save_probabilities --save-probabilities", "also save the probabilities (.npz)", action="store_true")
    text = "masks of the previous stage, for a cascade"
    flag("-prev_stage_predictions --previous-stage", text, dest="previous_stage", metavar="DIR")
    text = "number of commands that share the folder (default: 1)"
    flag("-num_parts --num-parts", text, type=common.positive_int, default=1, metavar="N")
    flag("-part_id --part-id", "which of them this is, from 0 (default: 0)", type=int, default=0, metavar="I")
    flag("--disable_progress_bar", "no progress lines", action="store_true")
    flag("--verbose", "say more", action="store_true")
    text = "accepted for nnU-Net's scripts, without effect"
    flag("-npp", text, type=int, metavar="N")
    flag("-nps", text, type=int, metavar="N")
    flag("--not_on_device", text, action="store_true")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    by_name = [arguments.dataset, arguments.configuration]
    if arguments.model is not None and any(by_name):
        parser.error("give the model as -m MODEL_FOLDER or as -d DATASET -c CONFIG, not both.")
    if arguments.model is None and not all(by_name):
        parser.error("which model? Give -m MODEL_FOLDER, or -d DATASET -c CONFIG -f FOLD.")
    if not 0 <= arguments.part_id < arguments.num_parts:
        parser.error(f"-part_id {arguments.part_id}: must be from 0 to -num_parts minus 1.")
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    folds = None if arguments.folds is None else [common.fold_value(fold) for fold in arguments.folds]
    _set_verbosity(arguments)
    from mfm_nnunet import api

    api.predict(
        arguments.input,
        arguments.output,
        model_folder=arguments.model,
        dataset=arguments.dataset,
        configuration=arguments.configuration,
        folds=folds,
        plans_name=arguments.plans,
        trainer=arguments.trainer,
        checkpoint_name=arguments.checkpoint_name,
        step_size=arguments.step_size,
        mirroring=not arguments.disable_tta,
        save_probabilities=arguments.save_probabilities,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        previous_stage=arguments.previous_stage,
        num_parts=arguments.num_parts,
        part_id=arguments.part_id,
        device=arguments.device,
        workspace=arguments.workspace,
    )
    print(f"masks: {arguments.output}")


def _set_verbosity(arguments: argparse.Namespace) -> None:
    quiet = logging.WARNING if arguments.disable_progress_bar else logging.NOTSET
    logging.getLogger("mfm_nnunet.predict").setLevel(logging.DEBUG if arguments.verbose else quiet)
    for name in WITHOUT_EFFECT:
        if getattr(arguments, name):
            logging.getLogger(__name__).info("%s has no effect here.", name)


def _step_size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text}")
    return value
