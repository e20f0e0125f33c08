"""The scripts: legal bash, executable where they must be, and clear words where there is no usable Python."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from mfm_nnunet.version import __version__

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "setup_scripts").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_is_legal_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "set -euo pipefail" in text or script.name == "environment.sh"


def test_ci_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"


def make_environment(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``make_environment`` with a virtual environment in ``folder``."""
    code = f'set -euo pipefail; source setup_scripts/environment.sh; VENV="{folder}"; make_environment'
    environment = {**os.environ, **variables}
    return subprocess.run(["bash", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_no_usable_python_is_said(tmp_path: Path) -> None:
    result = make_environment(tmp_path / "venv", PYTHON="python2.4")
    assert result.returncode == 2
    assert "Python 3.10 or newer is needed" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = make_environment(tmp_path)
    assert result.returncode == 2
    assert "Remove it" in result.stderr
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.long
def test_the_wheel_holds_every_file_and_runs_elsewhere(tmp_path: Path) -> None:
    """Data files (recipes, templates, the plug-in) are easily forgotten in ``package-data``."""
    built = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(built, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    listed = subprocess.run(["git", "ls-files", "mfm_nnunet"], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = [name for name in listed.stdout.split() if not (tmp_path / "installed" / name).is_file()]
    assert not missing
    code = "import mfm_nnunet.cli.pretrain as c, sys; sys.exit(c.main(['--list']))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "mae" in shown.stdout
