"""Unlabelled images in training: equal to supervised training at weight 0, exact resume in each phase, the watch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from mfm_nnunet.finetune import semi
from mfm_nnunet.finetune.fold import FoldRun
from mfm_nnunet.settings import SemiSettings
from mfm_nnunet.tasks.consistency import turn
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny
from tests.builders.training import Killed, require_equal, state_of, train

LABELLED, VALIDATION = ["subject-00", "subject-01"], ["subject-02"]
METHODS = ("consistency", "mean_teacher")


@pytest.fixture
def few(here: Workspace) -> Workspace:
    """A fold with two labelled training cases; three cases of the dataset are in no part of it."""
    splits = [{"train": LABELLED, "val": VALIDATION}]
    (here.preprocessed / tiny.NAME / "splits_final.json").write_text(json.dumps(splits))
    return here


def train_semi(here: Workspace, *settings: str, method: str = "consistency", **options: Any) -> Path:
    return train(here, f"semi.method={method}", *settings, unlabelled=tiny.NAME, **options)


def without_semi(state: dict[str, Any]) -> dict[str, Any]:
    state["init_args"]["plans"]["mfm"].pop("semi")
    return state


@pytest.mark.parametrize("method", [*METHODS, "student"])
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d", "primus"])
def test_weight_0_is_supervised_training_bit_for_bit(few: Workspace, method: str, configuration: str) -> None:
    options: dict[str, Any] = {"configuration": configuration, "overrides": ("finetune.ema_decay=0.99",)}
    alone = state_of(train(few, **options))
    (few.results / tiny.NAME).rename(few.results / "alone")
    nothing = state_of(train_semi(few, "semi.weight=0", method=method, **options))
    require_equal(without_semi(alone), without_semi(nothing))


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact_in_each_phase(few: Workspace, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs: labels alone, ramp, full weight."""
    settings = ("semi.start=0.25", "semi.ramp=0.5", "finetune.epochs=4")
    whole = state_of(train_semi(few, *settings, method=method))
    rows = read_rows(few)
    assert [row["weight"] for row in rows] == pytest.approx([0, *ramp_of(method)], rel=1e-3)
    original = FoldRun.end_epoch
    for last in range(3):
        (few.results / tiny.NAME).rename(few.results / f"before_{last}")

        def end(self: FoldRun, epoch: int, *rest: Any, last: int = last) -> list[str]:
            lines = original(self, epoch, *rest)
            if epoch == last:
                raise Killed
            return lines

        monkeypatch.setattr(FoldRun, "end_epoch", end)
        with pytest.raises(Killed):
            train_semi(few, *settings, method=method)
        monkeypatch.setattr(FoldRun, "end_epoch", original)
        resumed = state_of(train(few, continue_training=True))
        require_equal(whole, resumed)
        assert read_rows(few) == rows


def ramp_of(method: str) -> list[float]:
    made = SemiSettings(method=method, weight={"consistency": 1.0, "mean_teacher": 0.5}[method], start=0.25, ramp=0.5)
    return [semi.weight_at(made, step, 8) for step in (3, 5, 7)]


def read_rows(here: Workspace) -> list[dict[str, Any]]:
    (file,) = here.results.glob(f"{tiny.NAME}/*/fold_0/unlabelled.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("quarters", "flips"), [(1, (True, True)), (2, (False, True)), (2, (False, False))])
def test_the_stronger_view_is_turned_as_it_says(quarters: int, flips: tuple[bool, ...]) -> None:
    weak = torch.randn(64, 1, 6, 6 if quarters == 1 else 8)
    views = semi.Views(True, quarters, flips, ComposeTransforms([]), 0.5)
    drawn = views(weak, np.random.default_rng(0))
    assert torch.equal(drawn["strong"], turn(weak, drawn["turns"]))
    assert set(drawn["turns"][:, 0].tolist()) == set(range(0, 4, quarters))
    for axis, may in enumerate(flips, start=1):
        assert set(drawn["turns"][:, axis].tolist()) == ({0, 1} if may else {0})
