"""The documented list of error codes is the one that the package raises, and tests reach the codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = re.compile(r"""["`]((?:E)_[A-Z]+(?:_[A-Z]+)*)(?=["`]|  )""")


def codes_in(*files: Path) -> set[str]:
    return {code for file in files for code in CODE.findall(file.read_text(encoding="utf-8"))}


RAISED = codes_in(*(ROOT / "mfm_nnunet").rglob("*.py"))
UNREACHED = {"E_CASES_FAILED": "tested as CasesFailedError and exit code 3", "E_PERMISSION": "tests may run as root"}


def test_the_documented_codes_are_those_raised() -> None:
    rows = (ROOT / "documentation" / "reference" / "errors.md").read_text().splitlines()
    documented = [match[1] for row in rows if (match := re.match(r"\| `(E_[A-Z_]+)` \|", row))]
    assert sorted(documented) == documented
    assert set(documented) == RAISED


@pytest.mark.parametrize("code", sorted(RAISED - set(UNREACHED)))
def test_a_test_reaches_the_code(code: str) -> None:
    here = Path(__file__).name
    texts = (file.read_text() for file in (ROOT / "tests").rglob("*.py") if file.name != here)
    assert any(code in text for text in texts)
