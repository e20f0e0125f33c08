"""Recipes: the shipped ones are legal for what they are made for, and win over the plan but not over ``--set``."""

from __future__ import annotations

import functools
import importlib
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import mfm_nnunet
from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune import settings as finetune_settings
from mfm_nnunet.jobs import pretrain as launch
from mfm_nnunet.jobs import train as finetune_run
from mfm_nnunet.jobs.pretrain import PretrainRun
from mfm_nnunet.models.families import family_named
from mfm_nnunet.planning.recipes import FOLDER, Recipe, read_recipe, shipped_recipes
from mfm_nnunet.tasks.base import find_task
from tests.builders import tiny
from tests.builders.tiny_run import CONFIGURATION, NAME, prepare

ROOT = Path(__file__).parent.parent.parent


def write(folder: Path, settings: dict[str, Any], **others: Any) -> Path:
    file = folder / "mine.json"
    file.write_text(json.dumps({"about": "mine", "command": "mfm_pretrain", "settings": settings, **others}))
    return file


# The shipped ones


@pytest.fixture(params=shipped_recipes())
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return read_recipe(request.param)


def test_there_are_some_and_they_are_package_data() -> None:
    assert {"openmind_mae_resenc", "openmind_mae_primus", "volume_fusion_2025"} <= set(shipped_recipes())
    assert '"recipes/*.json"' in (ROOT / "pyproject.toml").read_text()


def test_shipped_recipe_has_only_settings_that_exist(recipe: Recipe) -> None:
    if recipe.file.stem.startswith("openmind_finetune"):
        block = finetune_settings.resolve(mfm_settings.MFMBlock(), recipe.assignments, None)
        assert finetune_settings.format_settings(block)
        return
    assert recipe.pretext
    task = find_task(recipe.pretext)
    run = mfm_settings.override(
        PretrainRun(mfm_settings.PretrainSettings(), task.Config(), 0, None), recipe.assignments
    )
    mfm_settings.require_legal(run.pretrain, "pretrain.")
    assert run.pretrain.batch_size >= task.smallest_batch(run.pretext)
    if recipe.network:
        assert family_named(recipe.network).meets(task.needs)


def test_shipped_recipe_is_honest_and_its_command_is_understood(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "Published values, not verified here." in recipe.about
    seen: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain", "train"):
        monkeypatch.setattr(mfm_nnunet, name, lambda *_, **words: seen.update(words) or tmp_path)
    words = shlex.split(recipe.command)
    assert importlib.import_module(words[0].replace("mfm_", "mfm_nnunet.cli.", 1)).main(words[1:]) == 0
    assert seen["recipe"] == recipe.file.stem
    assert recipe.pretext is None or seen["pretext"] == recipe.pretext
    assert capsys.readouterr().err == ""


# Reading


def test_values_are_what_set_would_take(tmp_path: Path) -> None:
    settings = {"pretrain.epochs": 3, "pretrain.warmup_epochs": None, "pretrain.compile": True}
    recipe = read_recipe(write(tmp_path, {**settings, "pretext.cell_size": [8, 8, 4], "pretrain.learning_rate": 1e-5}))
    run = PretrainRun(mfm_settings.PretrainSettings(warmup_epochs=1), find_task("mae").Config(), 0, None)
    run = mfm_settings.override(run, recipe.assignments)
    assert (run.pretrain.epochs, run.pretrain.warmup_epochs, run.pretrain.compile) == (3, None, True)
    assert (run.pretext.cell_size, run.pretrain.learning_rate) == ((8, 8, 4), 1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"about": "a", "command": "b"}, "needs 'settings'"),
        ({"about": "a", "settings": {}}, "needs 'command', a text"),
        ({"about": "a", "command": "b", "settings": {}, "setings": {}}, "no 'setings'. Did you mean 'settings'"),
        ({"about": "a", "command": "b", "settings": {"pretrain": {"epochs": 3}}}, "dotted names"),
        ({"about": "a", "command": "b", "settings": {}, "network": 3}, "needs 'network', a text"),
        ([], "expected a JSON object"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(MFMError, match=message) as caught:
        read_recipe(file)
    assert caught.value.code == "E_CONFIG"
    assert str(file) in caught.value.message


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG .*Did you mean 'openmind_mae_resenc'"):
        read_recipe("openmind_mae_resnc")
    with pytest.raises(MFMError, match=r"E_NOT_FOUND .*no such file"):
        read_recipe(tmp_path / "none.json")
    assert read_recipe("openmind_mae_resenc") == read_recipe(FOLDER / "openmind_mae_resenc.json")


# In a run


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[launch.Job]:
    """The jobs that pretraining would have done."""
    jobs: list[launch.Job] = []
    monkeypatch.setattr(launch, "pretrain_here", lambda here, request: jobs.append(launch.check(here, request)))
    return jobs


def pretrain(folder: Path, recipe: Any, pretext: str = "mae", *settings: str) -> None:
    prepare(folder)
    mfm_nnunet.pretrain(
        NAME, CONFIGURATION, pretext=pretext, workspace=folder, recipe=recipe, settings=settings, device="cpu"
    )


def test_default_then_plan_then_recipe_then_set(tmp_path: Path, checked: list[launch.Job]) -> None:
    """The plan says 3 epochs where the default is 1000."""
    file = write(tmp_path, {"pretrain.batch_size": 6, "pretrain.learning_rate": 0.5, "seed": 4})
    pretrain(tmp_path, None)
    pretrain(tmp_path, file, "mae", "pretrain.learning_rate=0.25")
    pretrain(tmp_path, write(tmp_path, {"pretrain.epochs": 7}))
    plain, both, longer = (job.resolved for job in checked)
    assert (plain.pretrain.epochs, plain.pretrain.batch_size, plain.pretrain.learning_rate, plain.seed) == (
        3,
        2,
        0.01,
        0,
    )
    assert (both.pretrain.epochs, both.pretrain.batch_size, both.pretrain.learning_rate, both.seed) == (3, 6, 0.25, 4)
    assert longer.pretrain.epochs == 7


@pytest.mark.parametrize(
    ("settings", "others", "message"),
    [
        ({"pretrain.epoch": 3}, {}, r"unknown setting 'pretrain\.epoch'. Did you mean 'pretrain\.epochs'"),
        ({"pretext.temperature": 3}, {}, r"unknown setting 'pretext\.temperature'"),
        ({"pretrain.epochs": "many"}, {}, r"pretrain\.epochs=many: expected int"),
        ({"finetune.epochs": 3}, {}, r"finetune\.epochs is a setting of mfm_train, this is mfm_pretrain"),
        ({}, {"pretext": "volume_fusion"}, "for --pretext volume_fusion, not mae"),
        ({}, {"network": "primus"}, "for primus, but the plan's network is resenc"),
    ],
)
def test_a_wrong_recipe_names_its_file_and_the_setting(
    tmp_path: Path, settings: dict[str, Any], others: dict[str, Any], message: str, checked: list[launch.Job]
) -> None:
    file = write(tmp_path, settings, **others)
    with pytest.raises(MFMError, match=message) as caught:
        pretrain(tmp_path, file)
    assert caught.value.code == "E_CONFIG"
    assert str(file) in caught.value.message
    assert not checked


def test_fine_tuning_takes_a_recipe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_run, "execute", lambda job: None)
    tiny.make(tmp_path)
    run = functools.partial(mfm_nnunet.train, tiny.NAME, CONFIGURATION, 0, workspace=tmp_path, device="cpu")
    file = write(tmp_path, {"finetune.epochs": 5, "finetune.deep_supervision": False})
    folder = run(recipe=file, settings=("finetune.epochs=6",))
    settings = json.loads((folder / "settings.json").read_text())["settings"]["finetune"]
    assert (settings["epochs"], settings["deep_supervision"]) == (6, False)
    with pytest.raises(MFMError, match=r"mine\.json: pretrain\.epochs is a setting of mfm_pretrain"):
        run(recipe=write(tmp_path, {"pretrain.epochs": 5}))
