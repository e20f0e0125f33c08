"""What all tests share: where the real scans are, and quiet, predictable threads."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_n_proc_DA", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MFM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans: {folder} is absent (set MFM_SHARED_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _no_workspace_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests use their own workspaces, whatever the environment of the developer says."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(name, raising=False)
