"""The journal of a prediction with lines that no run wrote: ignored, and the masks they name are never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import sha256
from mfm_nnunet.prediction.journal import Journal

GOOD: dict[str, Any] = {"case": "a", "status": "done", "output": {"a.nii.gz": "0" * 64}, "time": "2026-01-01"}
LINES: list[Any] = [
    3, [], "x", None, {}, {"case": "a"}, {**GOOD, "case": ["a"]}, {**GOOD, "case": 3}, {**GOOD, "case": {"a": 1}},
    {**GOOD, "status": ["done"]}, {**GOOD, "status": "never heard of"}, {**GOOD, "status": None},
    {**GOOD, "output": ["a.nii.gz"]}, {**GOOD, "output": "a.nii.gz"}, {**GOOD, "output": 3},
    {**GOOD, "output": {"a.nii.gz": ["0"]}}, {**GOOD, "output": {"a.nii.gz": None}},
    {**GOOD, "output": {"../../../etc/passwd": "0"}}, {**GOOD, "output": {"/etc/passwd": "0"}},
    {**GOOD, "settings": ["x"]}, {**GOOD, "settings": 3}, {**GOOD, "warnings": 3}, {**GOOD, "warnings": [[]]},
]  # fmt: skip


@pytest.mark.parametrize("line", [*LINES, "[" * 100_000, '{"case":' * 100_000], ids=lambda line: str(line)[:50])
def test_lines_that_no_run_wrote(line: Any, tmp_path: Path) -> None:
    text = line if isinstance(line, str) and len(line) > 1000 else json.dumps(line)
    (tmp_path / "cases.jsonl").write_text(f"{text}\n{json.dumps({**GOOD, 'case': 'b', 'self': 1, 'x': [1]})}\n")
    (tmp_path / "a.nii.gz").write_text("a mask")
    with Journal(tmp_path) as journal:
        assert set(journal.last) == {"b"}
        assert "self" not in journal.last["b"]
        with pytest.raises(MFMError, match="E_CHANGED"):
            journal.is_done("a", ["a.nii.gz"], {})
        journal.write(**{**journal.last["b"], "status": "done"})
        journal.write("c", "failed", reason="M\udcfcller")
    with Journal(tmp_path) as journal:
        assert set(journal.last) == {"b", "c"}


def test_a_journal_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_text("a mask")
    with Journal(tmp_path) as journal:
        journal.write("a", "done", output={"a.nii.gz": sha256(tmp_path / "a.nii.gz")})
    with open(tmp_path / "cases.jsonl", "a") as handle:
        handle.write('{"case": "b", "sta')
    with Journal(tmp_path) as journal:
        journal.write("c", "started")
        assert journal.is_done("a", ["a.nii.gz"], {})
    with Journal(tmp_path) as journal:
        assert set(journal.last) == {"a", "c"}
