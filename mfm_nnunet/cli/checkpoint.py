"""``mfm_checkpoint``: list published weights; describe, verify, export and import pretrained ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mfm_nnunet import terminal
from mfm_nnunet.cli import common
from mfm_nnunet.cli.info import as_table
from mfm_nnunet.cli.run import run_command

DESCRIPTION = """\
Describe and verify pretrained checkpoints, and convert them from and to other programs.

  mfm_checkpoint list
  mfm_checkpoint describe CHECKPOINT
  mfm_checkpoint verify CHECKPOINT
  mfm_checkpoint export CHECKPOINT -o FOLDER [--layout nnssl]
  mfm_checkpoint import CHECKPOINT -o FILE.pth [--token-order hwd]

CHECKPOINT is a file or folder of mfm_nnunet, nnssl, OpenMind or nnU-Net, a name in the list of published weights, a
file:// address, or hf://OWNER/NAME@COMMIT. No code in it is run."""
ACTIONS = ("list", "describe", "verify", "export", "import")


def build_parser() -> common.StrictParser:
    """Define the flags of the command."""
    parser = common.make_parser("mfm_checkpoint", DESCRIPTION)
    parser.flag("action", f"one of {', '.join(ACTIONS)}", choices=ACTIONS, metavar="ACTION")
    parser.flag("checkpoint", "file, folder, published name or address", nargs="?", metavar="CHECKPOINT")
    parser.flag("-o --output", "export: a new folder; import: a new .pth file", metavar="PATH")
    text = "export: folder (default) is safetensors, JSON and a model card; nnssl is what nnU-Net's newest code reads"
    parser.flag("--layout", text, choices=("folder", "nnssl"))
    text = "order in which a foreign Primus flattens its tokens, if its file does not say: whd is axis 0 outermost"
    parser.flag("--token-order", text, choices=("whd", "hwd"))
    text = "export: besides the curve of the run, also its picture of a crop of a scan (examples.png)"
    parser.flag("--pictures", text, action="store_true")
    parser.flag("--licence", "import and export: the licence of the weights, e.g. cc-by-4.0", metavar="NAME")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = build_parser()
    arguments = parser.parse_strictly(argv)
    if (arguments.checkpoint is None) != (arguments.action == "list"):
        parser.error(f"{arguments.action} takes no CHECKPOINT." if arguments.checkpoint else "CHECKPOINT is missing.")
    writes = arguments.action in ("export", "import")
    if writes and arguments.output is None:
        parser.error(f"{arguments.action} needs -o PATH, the output.")
    if not writes and (arguments.output or arguments.licence):
        parser.error(f"{arguments.action} writes nothing: leave out -o and --licence.")
    if (arguments.layout or arguments.pictures) and arguments.action != "export":
        parser.error("--layout and --pictures belong to export.")
    return run_command(_run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.action == "list":
        from mfm_nnunet import info

        print(as_table(info("checkpoints")))
        return
    from mfm_nnunet import convert_checkpoint, describe_checkpoint

    address, token_order = arguments.checkpoint, arguments.token_order
    if arguments.action in ("describe", "verify"):
        print(describe_checkpoint(address, verify=arguments.action == "verify", token_order=token_order))
        if arguments.action == "verify":
            print("OK (names, shapes, values, and the checksums in the file)")
        return
    layout: Any = (arguments.layout or "folder") if arguments.action == "export" else "pth"
    options = {"layout": layout, "licence": arguments.licence, "token_order": token_order}
    terminal.print_path(convert_checkpoint(address, arguments.output, **options, pictures=arguments.pictures))
