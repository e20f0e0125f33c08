"""``mfm_doctor``: is everything here that a run needs?"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence

from mfm_nnunet.cli import common
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Examine the installation, the device, memory, disk and the workspace with its datasets, plans and runs.

Each problem has a remedy. Exit code 0: all is well, 3: something is wrong. Nothing is written."""
TOPIC_WIDTH = 30


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_doctor", DESCRIPTION)
    parser.flag("--json", "print the findings as JSON", action="store_true", dest="as_json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    problems: list[str] = []
    code = run_command(functools.partial(_run, problems), build_parser().parse_strictly(argv))
    return code or (3 if problems else 0)


def _run(problems: list[str], arguments: argparse.Namespace) -> None:
    from mfm_nnunet import doctor

    findings = doctor(arguments.workspace)
    problems += [finding.remedy for finding in findings if finding.remedy]
    if arguments.as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
        return
    for finding in findings:
        print(f"{'!!' if finding.remedy else 'ok'}  {finding.topic.ljust(TOPIC_WIDTH)}  {finding.value}")
        if finding.remedy:
            print(f"    {' ' * TOPIC_WIDTH}  {finding.remedy}")
    print(f"{len(problems)} problems." if len(problems) != 1 else "1 problem.")
