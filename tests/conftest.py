"""What all tests share: where the real scans are, and quiet, predictable threads."""

from __future__ import annotations

import logging
import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_n_proc_DA", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from mfm_nnunet.signals import STOP_SIGNALS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> None:
    """Stop ignoring signals that the parent ignored, as nohup does: this process and its children react to them."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("MFM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real scans: {folder} is absent (set MFM_SHARED_DATA)")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape names that are no UTF-8 in what was captured: processes of pytest-xdist cannot send them."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _no_workspace_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests use their own workspaces, whatever the environment of the developer says."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _levels_of_loggers() -> Iterator[None]:
    """Restore the levels of our loggers: a command sets some of them for its process (--disable_progress_bar)."""
    yield
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("mfm_nnunet.")]:
        logging.getLogger(name).setLevel(logging.NOTSET)
