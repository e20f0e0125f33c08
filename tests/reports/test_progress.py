"""The one progress display: lines where there is no terminal, bars below whole lines where there is one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mfm_nnunet.reports import progress
from mfm_nnunet.reports.progress import Track, track

SCRIPT = """
import argparse, logging, os, sys, time
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.errors import StoppedError

def job(arguments):
    from mfm_nnunet.reports.progress import Stages, track
    with Stages(2) as stages:
        stages.begin("first")
        with track("cases", 2) as advance:
            for number in range(2):
                with track("case\\x1b[2J", 4, "tiles") as tile:
                    for _ in range(4):
                        time.sleep(0.15)
                        tile()
                    logging.getLogger("mfm_nnunet.x").info("done %s", "long/" * 40)
                    sys.stderr.write("half ")
                    sys.stderr.write("a line\\n")
                    if (child := os.fork()) == 0:
                        print("of a child", flush=True)
                        os._exit(0)
                    os.waitpid(child, 0)
                advance()
                print("result", number)
        stages.begin("second")
        with track("training", 3, "steps") as advance:
            for number in range(3):
                time.sleep(0.3)
                advance(f"loss {number}")
            raise StoppedError(130, "stopped by a test.")

sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[1], debug=False)))
"""


def on_a_terminal(script: Path, *words: str) -> tuple[int, str]:
    """Run a script with a terminal of 100 columns; return its exit code and what it wrote, control characters too."""
    reading, writing = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[2])}
    line = [sys.executable, str(script), *words]
    process = subprocess.Popen(line, stdin=writing, stdout=writing, stderr=writing, env=environment)
    os.close(writing)
    found = b""
    while True:
        try:
            part = os.read(reading, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    os.close(reading)
    return process.wait(), found.decode()


def screen_of(text: str) -> list[str]:
    """Return the lines that a terminal shows in the end: it knows CR, LF, up and erase, as rich uses them."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
        elif token == "\x1b[2K":
            lines[row] = ""
        elif not token.startswith("\x1b") and token != "\r":
            lines[row] += token
    return [line for line in lines if line]


def test_bars_on_a_terminal_leave_whole_lines_and_no_trace(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    code, text = on_a_terminal(script, str(tmp_path))
    assert code == 130
    for shown in (r"\[1 of 2\] cases .*1/2 cases", r"[234]/4 tiles", r"\[2 of 2\] training .*2/3 steps .*loss 1"):
        assert re.search(shown, text), shown
    assert "0:00:0" in text
    assert "case\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "\x1b[?25l" not in text, "a command that is killed would leave the cursor hidden"
    lines = screen_of(text)
    each = ["done " + "long/" * 40, "half a line"]  # a child writes into the bars
    expected = ["== 1 of 2  first", *each, "result 0", *each, "result 1", "== 2 of 2  second", "stopped by a test."]
    assert [line for line in lines if "cases" not in line] == expected


def test_lines_without_a_terminal(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(line, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 130
    assert "\x1b" not in result.stderr
    (first,) = (line for line in result.stderr.splitlines() if line.startswith("training: "))
    assert re.fullmatch(r"training: [12] of 3 steps, about 0:00:0\d left, loss [01]", first)


def test_time_left_counts_down_between_units(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    part = Track("cases", 5, "cases", 1)
    assert part.left() == ""
    now = 110.0
    part()
    assert part.left() == "0:00:30"
    now = 118.0
    assert part.left() == "0:00:22"
    now = 500.0
    assert part.line() == "cases: 2 of 5 cases, about 0:00:00 left"


def test_a_quiet_command_shows_no_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
    for is_silent, level, expected in ((True, 0, False), (False, 30, False), (False, 0, True)):
        progress.logger.setLevel(level)
        with track("reading", is_silent=is_silent):
            time.sleep(0.1)
        assert ("reading: 0:00:00 so far" in capsys.readouterr().err) is expected
