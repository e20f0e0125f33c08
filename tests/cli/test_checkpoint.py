"""``mfm_checkpoint`` as people call it: what it prints, what it writes, and short errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mfm_nnunet.cli.checkpoint import main
from tests.bad_input.test_checkpoints import Payload
from tests.builders import foreign


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return foreign.OPENMIND["PrimusM-OpenMind-MAE"]().write(tmp_path / "released")


def test_describe_says_what_it_is_and_names_nobody(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(file.parent)]) == 0
    out = capsys.readouterr().out
    for text in ("mae", "Primus 72 wide", "spacing 1 x 1 x 1 mm", "ZScoreNormalization", "Doe, J. (2022)", "nnssl",
                 "token order repaired", "names the subjects", "decoder, mask_token"):  # fmt: skip
        assert text in out
    assert foreign.SUBJECT not in out


def test_import_verify_and_export(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(file), "-o", "ours.pth", "--licence", "cc-by-4.0"]) == 0
    assert capsys.readouterr().out == "ours.pth\n"
    assert main(["verify", "ours.pth"]) == 0
    out = capsys.readouterr().out
    assert "cc-by-4.0" in out
    assert out.splitlines()[-1].startswith("OK")
    assert main(["export", "ours.pth", "-o", "hub"]) == 0
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["mfm"]["licence"] == "cc-by-4.0"
    assert main(["verify", "hub"]) == 0
    assert main(["export", "ours.pth", "-o", "hub"]) == 2
    assert "E_EXISTS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("describe", "CHECKPOINT is missing"),
        ("list a.pth", "takes no CHECKPOINT"),
        ("list -o a", "writes nothing"),
        ("explain a.pth", "choose from"),
        ("export a.pth", "-o PATH"),
        ("import a.pth", "-o PATH"),
        ("describe a.pth -o b.pth", "writes nothing"),
        ("import a.pth -o b.pth --layout nnssl", "belong to export"),
        ("import a.pth -o b.pth --pictures", "belong to export"),
    ],
)
def test_usage(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("action", ["describe", "verify", "import", "export"])
def test_what_cannot_be_read(action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other damage is in tests/bad_input/test_checkpoints.py."""
    torch.save({"network_weights": {}, "logging": Payload(tmp_path / "payload_ran")}, tmp_path / "bad.pth")
    output = ["-o", "out"] if action in ("import", "export") else []
    for name, code in (("bad.pth", "E_MODEL_UNSAFE"), ("none.pth", "E_NOT_FOUND")):
        assert main([action, name, *output]) == 2
        error = capsys.readouterr().err
        assert code in error
        assert name in error
        assert len(error.splitlines()) <= 5
    assert not (tmp_path / "payload_ran").exists()
    assert not (tmp_path / "out").exists()


def test_an_unknown_token_order_can_be_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(file, weights_only=True)
    del content["trainer_name"]
    torch.save(content, file)
    assert main(["import", str(file), "-o", "ours.pth"]) == 2
    assert "--token-order" in capsys.readouterr().err
    assert main(["import", str(file), "-o", "ours.pth", "--token-order", "hwd"]) == 0
    assert "token order repaired" in capsys.readouterr().err
