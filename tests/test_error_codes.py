"""The documented list of error codes is the one that the package raises, and tests reach each of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RAISED = re.compile(r"""["'](E_[A-Z]+(?:_[A-Z]+)*)(?=["']|  )""")
"""A code as an argument, or at the beginning of a message."""
# Code, what happened, typical cause, what to do: a row that lacks one is not found.
ROW = re.compile(r"\| `(E_[A-Z_]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|")


def codes_in(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*.py") if file.name != Path(__file__).name)
    return {code for file in files for code in RAISED.findall(file.read_text(encoding="utf-8"))}


CODES = sorted(codes_in(ROOT / "mfm_nnunet"))
DOCUMENTED = ROW.findall((ROOT / "documentation" / "reference" / "errors.md").read_text(encoding="utf-8"))


def test_the_documented_codes_are_those_raised() -> None:
    assert [row[0] for row in DOCUMENTED] == CODES


@pytest.mark.parametrize("code", CODES)
def test_a_test_reaches_the_code(code: str) -> None:
    """Some test says that it expects the code; those of ``bad_input`` do so through the commands."""
    assert code in codes_in(ROOT / "tests")


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "documentation" / "reference" / "errors.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == ["0", "1", "2", "3", "129", "130", "138", "143"]
