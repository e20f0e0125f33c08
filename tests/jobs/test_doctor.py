"""``mfm_doctor`` and ``mfm_info``: what is there, what is wrong with a remedy, and what the commands accept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mfm_nnunet.cli import doctor as doctor_command
from mfm_nnunet.cli import info as info_command
from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs import doctor
from mfm_nnunet.jobs.info import info
from mfm_nnunet.planning.recipes import shipped_recipes
from mfm_nnunet.settings import MFMBlock, override
from tests.builders import tiny


@pytest.fixture(autouse=True)
def _enough_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The computer of the tests may be small."""
    for name in ("LEAST_MEMORY", "LEAST_SHARED", "LEAST_DISK"):
        monkeypatch.setattr(doctor, name, 0)
    monkeypatch.setattr(doctor, "_check_versions", lambda: iter(()))


def findings(folder: Path, code: int, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """Run the command and return its findings by topic; of several of a topic, the last."""
    assert doctor_command.main(["--json", "--workspace", str(folder)]) == code
    return {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_what_is_there_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = tiny.make(tmp_path)
    fold = here.results / tiny.NAME / "MFMTrainer__mfmPlans__3d_fullres" / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_latest.pth").touch()
    found = findings(tmp_path, 0, capsys)
    assert found["dataset"]["value"] == f"{tiny.NAME}, plans: mfmPlans, without raw data"
    assert found["run"]["value"].endswith("fold_0: not finished; --c continues it")
    assert not [finding for finding in found.values() if finding["remedy"]]
    file = here.preprocessed / tiny.NAME / "mfmPlans.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"configurations": 3}))
    (here.raw / "Dataset008_Lost").mkdir()
    found = findings(tmp_path, 3, capsys)
    assert str(file) in found["plan"]["remedy"]
    assert "dataset.json" in found["dataset"]["remedy"]
    assert doctor_command.main(["--workspace", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "2 problems."
    assert out.count("\n!!  ") == 2


def test_too_little_room_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LEAST_MEMORY", "LEAST_SHARED", "LEAST_DISK"):
        monkeypatch.setattr(doctor, name, 1e30)
    remedies = {finding.topic: finding.remedy for finding in doctor.doctor(tmp_path / "none") if finding.remedy}
    assert "--memory-gb" in remedies["memory"]
    assert "--workspace" in remedies["disk"]
    assert not doctor.SHARED_MEMORY.is_dir() or "--shm-size" in remedies["/dev/shm"]
    assert not (tmp_path / "none").exists()


def test_a_version_that_does_not_fit_is_a_problem() -> None:
    for text, value in (("numpy>=1", ""), ("numpy>=999", "needs >=999"), ("no-such-package>1", "not installed")):
        finding = doctor._check_requirement(doctor.Requirement(text))
        assert value in finding.value
        assert bool(finding.remedy) is bool(value)


def test_every_listed_setting_is_accepted_with_its_default() -> None:
    rows = [row for row in info("settings") if not row["name"].startswith(("pretext.", "probe."))]
    assert override(MFMBlock(), [f"{row['name']}={row['default']}" for row in rows]) == MFMBlock()
    assert [row["recipe"] for row in info("recipes")] == shipped_recipes()
    with pytest.raises(MFMError, match="'recipes'"):
        info("recipe")  # type: ignore[arg-type]


def test_tables_are_whole_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert info_command.main(["settings", "warmup", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"pretrain.warmup_epochs", "finetune.warmup_epochs"} <= {row["name"] for row in rows}
    assert info_command.main(["settings", "warmup_epochs"]) == 0
    assert "finetune.warmup_epochs" in capsys.readouterr().out


def test_the_doctor_waits_for_torch_and_nothing_else_that_is_heavy(tmp_path: Path) -> None:
    """It takes two seconds of CPU time, most of them in torch; each of these would add one or more."""
    heavy = {"nnunetv2", "matplotlib", "scipy", "SimpleITK", "timm", "torchvision", "dynamic_network_architectures"}
    code = f"import sys, mfm_nnunet; mfm_nnunet.doctor({str(tmp_path)!r}); print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == []
