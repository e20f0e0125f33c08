"""The state of a run: the newest that verifies is taken; a continued run must be the same run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet.engine.state import RunState, load_state, require_same_settings, save_state
from mfm_nnunet.errors import MFMError

SETTINGS = {"pretrain": {"epochs": 3, "betas": [0.9, 0.98]}, "seed": 1}


def save(folder: Path, step: int) -> None:
    save_state(
        folder, RunState(step=step, history=[{"epoch": 0}]), {"task": {"w": torch.full((9,), float(step))}}, SETTINGS
    )


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path, 5)
    state, modules = load_state(tmp_path, SETTINGS)
    assert state == RunState(step=5, history=[{"epoch": 0}])
    assert modules["task"]["w"][0] == 5


def test_damaged_state_falls_back_to_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 5)
    save(tmp_path, 6)
    file = tmp_path / "resume.pth"
    file.write_bytes(file.read_bytes()[:-200])
    assert load_state(tmp_path, SETTINGS)[0].step == 5
    assert "E_MODEL_CORRUPT" in caplog.text
    (tmp_path / "resume_previous.pth").write_bytes(b"x")
    with pytest.raises(MFMError, match="E_MODEL_CORRUPT"):
        load_state(tmp_path, SETTINGS)


def test_nothing_to_continue(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match="no run to continue"):
        load_state(tmp_path, SETTINGS)


def test_differences_are_named_but_for_those_that_may_be(tmp_path: Path) -> None:
    old, new = {"a": {"b": 1, "e": 1}, "c": 2}, {"a": {"b": 1, "e": 2}, "d": 3}
    with pytest.raises(MFMError, match=r"c was 2, is None; d was None, is 3\."):
        require_same_settings(old, new, tmp_path, may_differ=("a.e",))


@pytest.mark.parametrize(
    "content",
    [
        {"network_weights": {"w": torch.zeros(3)}, "mfm": {"kind": "pretrained"}},
        {},
        {"settings": SETTINGS, "state": {}},
        {"settings": SETTINGS, "state": [1]},
        {"settings": [1], "state": {}},
        *(
            {"settings": SETTINGS, "state": {**asdict(RunState()), name: value}}
            for name, value in (
                ("step", -1), ("step", True), ("history", {}), ("history", [3]), ("loss_sum", None), ("other", 1),
            )
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_is_no_state(content: dict[str, Any], tmp_path: Path) -> None:
    """Also one that is whole; the state before it is taken, and without one the advice says what belongs there."""
    torch.save(content, tmp_path / "resume.pth")
    with pytest.raises(MFMError) as caught:
        load_state(tmp_path, SETTINGS)
    assert caught.value.code == "E_MODEL_CORRUPT"
    assert "start again" in caught.value.message
    torch.save({"state": asdict(RunState(step=4)), "settings": SETTINGS}, tmp_path / "resume_previous.pth")
    assert load_state(tmp_path, SETTINGS)[0].step == 4


def test_runs_with_settings_that_were_removed(tmp_path: Path) -> None:
    require_same_settings({"pretrain": {"anatomy_fraction": 0.0, "balance_temperature": None}}, {}, tmp_path)
    with pytest.raises(MFMError, match=r"pretrain\.anatomy_fraction was 0\.3"):
        require_same_settings({"pretrain": {"anatomy_fraction": 0.3}}, {"pretrain": {}}, tmp_path)
