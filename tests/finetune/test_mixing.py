"""Runs that mix their crops: what they read, exact resume, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from mfm_nnunet.finetune.fold import FoldRun
from mfm_nnunet.finetune.loading import SeededBatches, make_loaders, read_batches
from mfm_nnunet.finetune.mixing import MixedBatches, make_mixing, mix_batches, require_something_to_mix
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.settings import FinetuneSettings
from mfm_nnunet.workspace import Workspace
from tests.builders.training import (
    STEM,
    Killed,
    first_batches,
    initialised,
    kill_at,
    refused,
    require_equal,
    state_of,
    train,
)


def mixed(trainer: MFMTrainer) -> MixedBatches:
    return mix_batches(SeededBatches(make_loaders(trainer, True)[0], 5, "training 0"), trainer)


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d", "primus"])
def test_without_chance_batches_are_those_without_mixing(here: Workspace, configuration: str) -> None:
    """Deep supervision included: targets are reduced after the mixing to what nnU-Net's loader reduces them to."""
    off, none, late = (
        next(first_batches(initialised(configuration, **settings)))
        for settings in (
            {},
            {"mix": "cutmix", "mix_probability": 0.0},
            {"mix": "cutmix", "mix_probability": 1.0, "mix_start": 1},
        )
    )
    for batch in (none, late):
        assert torch.equal(batch["data"], off["data"])
        require_equal(batch["target"], off["target"])


@pytest.mark.parametrize("kind", ["cutmix", "copy_paste", "lesion_paste"])
def test_a_batch_depends_on_seed_and_step_alone(here: Workspace, kind: str) -> None:
    trainer = initialised(mix=kind, mix_probability=1.0, mix_start=1)
    source = mixed(trainer)
    alone, together = (list(read_batches(source, 0, 4, workers)) for workers in (0, 2))
    (late,) = read_batches(source, 3, 4, 1)
    plain = SeededBatches(make_loaders(trainer)[0], 5, "training 0")
    for batch, other in (*zip(alone, together), (alone[3], late)):
        assert torch.equal(batch["data"], other["data"])
        require_equal(batch["target"], other["target"])
    assert torch.equal(alone[0]["data"], plain[0]["data"])
    assert not torch.equal(alone[1]["data"], plain[1]["data"])


def test_validation_is_not_mixed(here: Workspace) -> None:
    off, on = FoldRun(initialised()), FoldRun(initialised(mix="cutmix", mix_probability=1.0))
    for run in (off, on):
        next(run.training_batches(0))
    first, second = (next(iter(run.validation_batches(0))) for run in (off, on))
    assert torch.equal(first["data"], second["data"])
    require_equal(first["target"], second["target"])


@pytest.mark.parametrize("kind", ["cutmix", "lesion_paste"])
def test_a_killed_run_resumes_exactly(here: Workspace, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    settings = (f"finetune.mix={kind}", "finetune.mix_probability=1", "finetune.mix_start=1")
    folder = train(here, *settings)
    wanted = state_of(folder)
    folder.parent.rename(here.results / "unbroken")
    for number, step in enumerate((3, 4)):
        with monkeypatch.context() as patch:
            kill_at(patch, step)
            with pytest.raises(Killed):
                train(here, *settings, continue_training=bool(number))
    train(here, continue_training=True)
    require_equal(state_of(folder), wanted)
    folder.parent.rename(here.results / "resumed")
    plain = state_of(train(here))
    assert not torch.equal(plain["network_weights"][STEM], wanted["network_weights"][STEM])


# What is refused


def with_properties(trainer: MFMTrainer, places: dict[Any, Any]) -> Any:
    """The training cases, with these places of labels."""
    dataset = make_loaders(trainer)[0]._data
    load = dataset.load_case
    dataset.load_case = lambda case: (*load(case)[:3], {"class_locations": places})
    return dataset


def test_what_cannot_be_mixed_is_refused(here: Workspace) -> None:
    alone = initialised(mix="cutmix", batch_size=1)
    refused("E_CONFIG", "finetune.batch_size=2", lambda: next(first_batches(alone)))
    unknown = initialised(mix="copy_paste", mix_labels=(3,))
    refused("E_CONFIG", "mix_labels=3", lambda: next(first_batches(unknown)))
    late = ("finetune.mix=cutmix", "finetune.mix_start=6")
    refused("E_CONFIG", "mix_start=6", lambda: train(here, *late))
    empty = initialised(mix="copy_paste")
    dataset = with_properties(empty, {1: np.zeros((0, 4)), 2: []})
    mixing = make_mixing(empty.settings, empty.label_manager)
    refused("E_CONFIG", "mix_labels", lambda: require_something_to_mix(empty, mixing, dataset))
    boxes = make_mixing(dataclasses.replace(empty.settings, mix="cutmix"), empty.label_manager)
    require_something_to_mix(empty, boxes, dataset)


def test_ignored_cases_are_refused_or_warned_of(here: Workspace) -> None:
    trainer = initialised(mix="cutmix")
    trainer.label_manager._ignore_label = 3
    mixing = make_mixing(trainer.settings, trainer.label_manager)
    assert mixing.ignored == 3
    nowhere = with_properties(trainer, {1: [], 2: [], (-1, 0, 1, 2): np.zeros((0, 4))})
    refused("E_CONFIG", "ignore label", lambda: require_something_to_mix(trainer, mixing, nowhere))
    load, first = nowhere.load_case, nowhere.identifiers[0]
    some = {(-1, 0, 1, 2): np.ones((5, 4))}
    nowhere.load_case = lambda case: load(case) if case == first else (None, None, None, {"class_locations": some})
    require_something_to_mix(trainer, mixing, nowhere)
    log = Path(trainer.log_file).read_text()
    assert f"e.g. {first}" in log
    assert "WARNING" in log


def test_settings_without_effect_are_said(here: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(here, "finetune.mix=cutmix", "finetune.mix_labels=1", "finetune.mix_box=0.5", "finetune.epochs=1")
    said = [record.message for record in caplog.records if "has no effect with finetune.mix" in record.message]
    assert said == ["finetune.mix_labels has no effect with finetune.mix=cutmix"]


def test_labels_are_those_of_the_dataset() -> None:
    settings = FinetuneSettings(mix="lesion_paste", mix_labels=(2,), mix_draw="one")
    mixing = make_mixing(settings, LabelManager({"background": 0, "organ": 1, "lesion": 2, "ignore": 3}, None))
    assert (mixing.labels, mixing.hosts, mixing.is_one_label) == ((2,), (1,), True)
    assert (mixing.has_regions, mixing.ignored) == (False, 3)
    regions = LabelManager({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    mixing = make_mixing(settings, regions)  # channels: whole, core, ignored
    assert (mixing.labels, mixing.hosts, mixing.has_regions, mixing.ignored) == ((1,), (0,), True, 2)
    assert make_mixing(FinetuneSettings(mix="copy_paste"), regions).labels == (0, 1)
    refused("E_CONFIG", "1, 2", lambda: make_mixing(FinetuneSettings(mix="copy_paste", mix_labels=(3,)), regions))
