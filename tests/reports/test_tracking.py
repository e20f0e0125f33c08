"""Trackers: what reaches TensorBoard and Weights & Biases, and that none costs a training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.reports.tracking import VARIABLE, flatten, open_tracker

RESULTS = {"train_loss": 0.5, "validation_dice": np.array([0.25, 0.75])}


def test_lists_have_a_number_per_label() -> None:
    assert flatten(RESULTS) == {"train_loss": 0.5, "validation_dice/0": 0.25, "validation_dice/1": 0.75}


def test_without_a_tracker_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with open_tracker(tmp_path, 0) as record:
        record(0, RESULTS)
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_one_curve_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv(VARIABLE, "tensorboard")
    for epochs in ([0, 1, 2], [1, 2, 3]):  # killed after epoch 2 was recorded, resumed from the state of epoch 1
        with open_tracker(tmp_path, epochs[0]) as record:
            for epoch in epochs:
                record(epoch, {**RESULTS, "train_loss": epoch / 10 + len(epochs) * epochs[0]})
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, round(event.value, 3)) for event in found.Scalars("train_loss")] == [
        *((0, 0.0), (1, 3.1), (2, 3.2), (3, 3.3))
    ]
    assert "validation_dice/1" in found.Tags()["scalars"]


class PlayedRun:
    """Stand-in for a run of Weights & Biases, which needs an account."""

    def __init__(self, rows: list[Any], is_broken: bool) -> None:
        self.rows, self.is_broken = rows, is_broken

    def __enter__(self) -> PlayedRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.rows.append("finished")

    def log(self, values: dict[str, float], step: int) -> None:
        if self.is_broken:
            raise ConnectionError("no network")
        self.rows.append((step, values["train_loss"]))


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_tracker_never_costs_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_broken: bool
) -> None:
    rows: list[Any] = []
    played = ModuleType("wandb")
    vars(played).update(init=lambda **how: rows.append(SimpleNamespace(**how)) or PlayedRun(rows, is_broken))
    monkeypatch.setitem(sys.modules, "wandb", played)
    monkeypatch.setenv(VARIABLE, "wandb")
    with open_tracker(tmp_path, 0) as record:
        record(0, RESULTS)
        record(1, RESULTS)
    assert rows[0].resume == "allow"
    assert rows[1:] == (["finished"] if is_broken else [(0, 0.5), (1, 0.5), "finished"])
    assert len([line for line in caplog.messages if "no network" in line]) == int(is_broken)


@pytest.mark.parametrize(("name", "remedy"), [("tensorbord", "tensorboard"), ("wandb", "pip install wandb")])
def test_an_unusable_tracker_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, remedy: str) -> None:
    monkeypatch.setenv(VARIABLE, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MFMError, match=remedy) as caught, open_tracker(tmp_path, 0):
        pass
    assert caught.value.code == "E_CONFIG"
