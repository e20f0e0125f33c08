"""``mfm_study``: how many labels does pretraining save?"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Train from scratch and from checkpoints with few and with many labels, several times, and test all on one fixed split.

  mfm_study 4 3d_fullres --labels 5 10 20 100% --arms scratch mae=CHECKPOINT --seeds 3
  mfm_study -o STUDY --table                renew table and picture from the cells that are finished

All trainings share one plan, smaller subsets are inside larger ones, and no subject both trains and tests. A study that
was killed continues with the same command. It ends with the table; the study folder holds table.md, study.png and
study.json."""


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_study", DESCRIPTION)
    common.add_dataset_arguments(parser)
    flag = parser.flag
    text = "numbers of labelled subjects, or shares of those that do not test, e.g. 5 10 20 100%%"
    flag("--labels", text, nargs="+", metavar="N")
    text = "what to compare: scratch, CHECKPOINT or NAME=CHECKPOINT, each with settings: ...,finetune.parts=encoder"
    flag("--arms", text, nargs="+", metavar="ARM")
    text = "trainings per arm and number of labels, each with a subset of its own (default: 3)"
    flag("--seeds", text, type=int, default=3, metavar="N")
    text = "who tests: a share of the subjects (default: 20%%), a number of them, or a file of case names, one per line"
    flag("--test", text, default="20%", metavar="SHARE|N|FILE")
    text = "CSV with the columns case and subject (default: every case is a subject, unless its name holds sub-XX)"
    flag("--subjects", text, metavar="CSV")
    text = "plan of the dataset that all share (default: one is made like the first checkpoint)"
    flag("-p --plans", text, metavar="PLANS")
    common.add_settings(parser, "finetune.epochs=200 finetune.learning_rate=1e-3", ["finetune"])
    text = "tolerance of the normalised surface distance in mm; in pixels for pictures, which have no mm (default: 1.0)"
    flag("--tolerance-mm", text, type=float, default=1.0, metavar="MM")
    flag("--disable_tta --disable-tta", "predict without mirroring: up to eight times faster", action="store_true")
    text = "trainings at a time (default: one per GPU, without one per CPU core)"
    flag("--jobs", text, type=common.positive_int, metavar="N")
    flag("-o --output", "the study folder (default: mfm_study in the workspace)", metavar="DIR")
    flag("--table", "only renew table and picture from the cells that are finished", action="store_true")
    common.add_device(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    if not arguments.table:
        common.take_positions(parser, arguments)
        for name in ("labels", "arms"):
            if getattr(arguments, name) is None:
                parser.error(f"--{name} is missing.")
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from mfm_nnunet.study import run
    from mfm_nnunet.study.design import StudyRequest

    if arguments.table:
        folder = run.renew_study(arguments.output, arguments.workspace)
    else:
        values = {**vars(arguments), "plans_name": arguments.plans, "mirroring": not arguments.disable_tta}
        request = StudyRequest(**{field.name: values[field.name] for field in dataclasses.fields(StudyRequest)})
        with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints progress; stdout gets the result
            folder = run.run_study(request)
    print((folder / "table.md").read_text(encoding="utf-8"))
    for name in ("table.md", "study.png", "study.json", "commands.sh"):
        terminal.print_path(folder / name)
