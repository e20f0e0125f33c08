"""``mfm_study``: how many labels does pretraining save?"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.study_requests import StudyRequest

DESCRIPTION = """\
Train from scratch and from checkpoints with few and with many labels, several times, and test all on one fixed split.

  mfm_study 4 3d_fullres --labels 5 10 20 100% --arms scratch mae=CHECKPOINT --seeds 3
  mfm_study -o STUDY --table                rewrite table and picture from the finished cells

All trainings share one plan, smaller subsets are part of larger ones, and no subject is in both training and test. The
same command continues a study that was killed. It ends with the table; the study folder holds table.md, study.png and
study.json."""


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_study", DESCRIPTION)
    parser.add_request(StudyRequest)
    parser.flag("--table", "only rewrite table and picture from the finished cells", action="store_true")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    if not arguments.table:
        parser.merge_positions(StudyRequest, arguments)
        for name in ("labels", "arms"):
            if getattr(arguments, name) is None:
                parser.error(f"--{name} is missing.")
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    from mfm_nnunet.study import run

    if arguments.table:
        folder = run.study_folder(arguments.output, arguments.workspace)
        run.renew(folder)
    else:
        options = common.options_of(StudyRequest, arguments)
        with contextlib.redirect_stdout(sys.stderr):  # nnU-Net prints progress; stdout gets the result
            folder = run.run_study(**options)
    print((folder / "table.md").read_text(encoding="utf-8"))
    for name in ("table.md", "study.png", "study.json", "commands.sh"):
        terminal.print_path(folder / name)
