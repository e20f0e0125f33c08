"""The watch of a training with unlabelled images: what is warned of, and what counts as a collapse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.finetune.watch import EXAMPLES, PLOT, Watch, find_warnings, has_collapsed
from tests.builders.training import refused

NAMES = ["inner", "outer"]


def row(
    epoch: int, weight: float, dice: float = 0.8, volume: tuple[float, ...] = (0.02, 0.05), confident: float = 0.9
) -> dict[str, Any]:
    return {"epoch": epoch, "weight": weight, "dice": dice, "confident": confident, "volume": list(volume)}


ALONE = [row(0, 0, 0.7), row(1, 0)]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (row(2, 1), []),
        (row(2, 1, volume=(0, 0)), ["predicts nothing"]),
        (row(2, 1, volume=(0, 0.05)), ["'inner' takes 0.00%"]),
        (row(2, 1, volume=(0.2, 0.3)), ["'inner' takes 20.00%", "'outer' takes 30.00%"]),
        (row(2, 0, volume=(0, 0)), []),
    ],
)
def test_warnings_name_what_is_wrong_once(last: dict[str, Any], words: list[str]) -> None:
    found = find_warnings([*ALONE, last], NAMES)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found))
    assert find_warnings([*ALONE, last, {**last, "epoch": 3}], NAMES) == []


def test_a_weak_teacher_is_warned_of_when_its_labels_are_first_used() -> None:
    (warning,) = find_warnings([row(0, 0, 0.45), row(1, 0.1, 0.5)], NAMES)
    assert "0.45" in warning
    assert "semi.start" in warning


@pytest.mark.parametrize(
    ("fallen", "is_collapse"),
    [
        ({"dice": 0.3, "volume": (0, 0.001)}, True),
        ({"dice": 0.3, "volume": (0.6, 0.3)}, True),
        ({"dice": 0.3, "confident": 1.0}, True),
        ({"dice": 0.3}, False),
        ({"volume": (0, 0.001), "confident": 1.0}, False),
    ],
)
def test_a_collapse_is_a_fallen_dice_with_an_extreme_prediction(fallen: dict[str, Any], is_collapse: bool) -> None:
    history = [*ALONE, *(row(epoch, 1, **fallen) for epoch in (2, 3, 4))]
    assert has_collapsed(history) == is_collapse
    assert not has_collapsed(history[:-1]), "two epochs are not enough"
    assert not has_collapsed([*ALONE, *(row(epoch, 0, **fallen) for epoch in (2, 3, 4))]), "not by pseudo labels"


def test_a_collapse_stops_with_advice_that_names_the_folder(tmp_path: Path) -> None:
    watch = Watch(NAMES, ALONE)
    watch.require_no_collapse(tmp_path)
    watch.history = [*ALONE, *(row(epoch, 1, 0.1, (0, 0)) for epoch in (2, 3, 4))]
    refused("E_COLLAPSED", "semi.weight", lambda: watch.require_no_collapse(tmp_path))
    refused("E_COLLAPSED", str(tmp_path), lambda: watch.require_no_collapse(tmp_path))


def test_rows_of_a_resumed_epoch_replace_the_old_ones_and_are_drawn(tmp_path: Path) -> None:
    watch = Watch(NAMES)
    results = {"validation_dice": [0.5, float("nan")], "validation_confident": 0.9, "validation_volume": [0.0, 0.1]}
    for epoch in (0, 1, 1):
        lines = watch.add(epoch, 0.5, results)
    assert [old["epoch"] for old in watch.history] == [0, 1]
    assert watch.history[0]["dice"] == 0.5
    assert "outer 10.00%" in lines[0]
    watch.add(2, 0.5, {**results, "validation_dice": [float("nan")] * 2})
    assert watch.history[-1]["dice"] == 0
    watch.draw(tmp_path, None)
    assert (tmp_path / PLOT).stat().st_size > 1000
    assert not (tmp_path / EXAMPLES).exists()


def test_names_are_in_nnunets_order() -> None:
    labels = {"background": 0, "outer": 2, "inner": 1, "ignore": 3}
    assert Watch.of(DatasetJson.of({"labels": labels})).names == ["inner", "outer"]
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    assert Watch.of(DatasetJson.of({"labels": regions})).names == ["whole", "core"]
