"""The notebook in ``examples``: it runs from top to bottom, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mfm_nnunet

NOTEBOOK = Path(__file__).parent.parent / "examples" / "quickstart.ipynb"


def read() -> dict[str, Any]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_it_is_kept_without_outputs_and_with_links_that_lead_somewhere() -> None:
    content = read()
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None]
    for cell in code:
        compile("".join(cell["source"]), "cell", "exec")
    text = "".join("".join(cell["source"]) for cell in content["cells"])
    links = [part.partition(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    assert links
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]
    used = {part.partition("(")[0] for part in text.split("mfm.")[1:]}
    assert used <= set(mfm_nnunet.__all__)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_it_runs_and_shows_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("nilearn")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses, as for a person
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # A cell that fails raises CellExecutionError with its traceback.
    nbclient.NotebookClient(notebook, timeout=2400, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [data["text/html"] for data in shown if "text/html" in data]
    assert len(tables) == 3  # two plans, and the report of a prediction
    assert all("<table>" in table for table in tables)
    assert "<td>block_6</td><td>done</td>" in tables[-1]
    assert len([data for data in shown if "image/png" in data]) == 3
    folder = tmp_path / "mfm_quickstart"
    assert (folder / "predicted" / "report.html").is_file()
    assert len(list((folder / "predicted").glob("*.nii.gz"))) == 2
