"""What strangers wrote into names and files does nothing to a terminal: one place escapes all that is printed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mfm_nnunet import terminal
from mfm_nnunet.errors import CaseFailure, CasesFailedError

STEERING = {
    "colour": ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "one byte": ("\x9b2J", r"\x9b2J"),
    "back": ("a\rb\bc", r"a\rb\x08c"),
    "direction": ("\u202egpj.exe", r"\u202egpj.exe"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "separator": ("a\u2028b\x0bc\x85d", r"a\u2028b\x0bc\x85d"),
    "latin-1": ("M\udcfcller", r"M\udcfcller"),
}
HARMLESS = ["Müller (2)", "患者", "caf\u0065\u0301", "a\tb", "\U0001f469\u200d\u2695", "\u06cc\u200c\u062e", r"a\x1b"]
"""Other scripts, with joiners that they need, stay as they are."""


@pytest.mark.parametrize("kind", STEERING)
def test_what_steers_is_shown(kind: str) -> None:
    assert terminal.escaped(STEERING[kind][0]) == STEERING[kind][1]
    assert terminal.one_message(STEERING[kind][0]).isprintable()


@pytest.mark.parametrize("text", HARMLESS)
def test_other_scripts_stay(text: str) -> None:
    assert terminal.one_message(text) == text


def test_a_line_of_a_name_is_no_line_of_a_message() -> None:
    failure = CaseFailure("a\nE_OK  all is well", "E_FORMAT", "in/a\nb.nii: damaged.")
    message = terminal.one_message(str(CasesFailedError([failure], 2)))
    assert message.splitlines()[1:] == [r"  a\nE_OK  all is well: E_FORMAT  in/a\nb.nii: damaged."]


def test_prints_and_logs_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    """Also those of other libraries; progress bars still renew their line."""
    before = sys.stdout, sys.stderr
    with terminal.escaped_streams():
        terminal.configure_logging()
        print("name", STEERING["colour"][0])
        print(STEERING["title"][0], file=sys.stderr)
        sys.stderr.writelines(["\r\x1b[2K5 % of \x1b[1m\n", "\r10 %\n", "\n\x1b[A"])
        with contextlib.redirect_stdout(sys.stderr):
            print("of nnU-Net \u202e")
        logging.getLogger("mfm_nnunet.x").info("%s: left out", Path("a\x1b[2J\nb"))
        logging.getLogger("mfm_nnunet.x").info("settings:\n%s", "a = 1\nb = \x1b2")
        logging.getLogger("nibabel").warning("two\nlines \x1b[2J")
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert out == "name \\x1b[31mred\\x1b[0m\n"
    assert err.startswith("\\x1b]0;owned\\x07\n\r\x1b[2K5 % of \\x1b[1m\n\r10 %\n\n\x1b[Aof nnU-Net \\u202e\n")
    for line in ("a\\x1b[2J\\nb: left out", "settings:\na = 1\nb = \\x1b2", "two\nlines \\x1b[2J"):
        assert f"{line}\n" in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
        ("a | b", r"a \| b"),
        ("[a](http://x)", r"[a]\(http://x)"),
        ("one\n\n# two\x1b", r"one # two\x1b"),
        ("Müller, axes [0, 1, 2]", "Müller, axes [0, 1, 2]"),
    ],
)
def test_words_in_a_report_are_words(text: str, shown: str) -> None:
    assert terminal.in_markdown(text) == shown


def test_a_path_is_exact_for_programs(tmp_path: Path) -> None:
    """A script that reads stdout gets the name of the file, byte by byte; a person does not."""
    name = b"M\xfcller \x1b[31m"
    code = (
        "import os, sys; from pathlib import Path; from mfm_nnunet import terminal\n"
        "with terminal.escaped_streams():\n"
        "    terminal.print_path(Path(os.fsdecode(sys.argv[1]))); print('done')"
    )
    line = [os.fsencode(sys.executable), b"-c", code.encode(), name]
    assert subprocess.run(line, capture_output=True, timeout=60, check=True).stdout == name + b"\ndone\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    with contextlib.redirect_stdout(screen), terminal.escaped_streams():
        terminal.print_path(Path(os.fsdecode(name)))
    assert screen.getvalue() == "M\\udcfcller \\x1b[31m\n"
