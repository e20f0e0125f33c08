"""What a command need not be told: which plan, which settings a run began with; and runs that are made longer."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mfm_nnunet import checkpoint, workspace
from mfm_nnunet.engine.optim import learning_rate_factor
from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.pretrain import pretrain_here
from mfm_nnunet.jobs.train import _find_newest
from mfm_nnunet.requests import PretrainRequest
from mfm_nnunet.settings import MFMBlock
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny, tiny_run

NAME = "Dataset004_Liver"
OTHER_FILES = {"dataset": {"labels": {}}, "splits_final": [], "corpus_report": {"num_cases": 3}}


def site(folder: Path, **plans: str | None) -> Workspace:
    """A dataset with these plans, each with the hash of the checkpoint it is like; and a damaged file."""
    here = Workspace(folder / "raw", folder / "preprocessed", folder / "results")
    base = here.preprocessed / NAME
    base.mkdir(parents=True)
    for name, source in plans.items():
        block = {"mfm": {"source": None if source is None else {"sha256": source}}} if source != "stock" else {}
        (base / f"{name}.json").write_text(json.dumps({"configurations": {}, **block}))
    for name, content in OTHER_FILES.items():
        (base / f"{name}.json").write_text(json.dumps(content))
    (base / "half.json").write_text("{")
    return here


@pytest.mark.parametrize(
    ("plans", "weights", "chosen"),
    [
        ({"mfmLikePlans": "abc"}, None, "mfmLikePlans"),
        ({"mfmPlans": None, "mfmLikePlans": "abc"}, "abc", "mfmLikePlans"),
        ({"mfmPlans": None, "mfmLikePlans": "abc"}, "xyz", "mfmPlans"),
        ({"mfmPlans": None, "mfmLikePlans": "abc"}, None, "mfmPlans"),
        ({"nnUNetResEncUNetLPlans": "stock"}, "abc", "nnUNetResEncUNetLPlans"),
        ({}, None, "mfmPlans"),
        ({"mfmLikePlans": "abc", "mfmScratchPlans": "abc"}, "abc", ""),
        ({"mfmAPlans": None, "mfmBPlans": None}, None, ""),
    ],
)
def test_the_plan_that_is_meant(
    plans: dict[str, str | None],
    weights: str | None,
    chosen: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    here = site(tmp_path, **plans)
    of_weights = None if weights is None else lambda: weights
    assert here.choose_plan(NAME, "mfmMinePlans", of_weights) == "mfmMinePlans"
    if not chosen:
        with pytest.raises(MFMError, match="E_CONFIG") as refused:
            here.choose_plan(NAME, None, of_weights)
        assert all(name in str(refused.value) for name in (*plans, "-p"))
        return
    with caplog.at_level(logging.INFO):
        assert here.choose_plan(NAME, None, of_weights) == chosen
    assert not plans or f"plan {chosen}: " in caplog.text


def test_a_checkpoint_is_hashed_only_if_a_plan_is_like_one(tmp_path: Path) -> None:
    here = site(tmp_path, mfmPlans=None)
    assert here.choose_plan(NAME, None, lambda: pytest.fail("read a large file for nothing")) == "mfmPlans"


@pytest.mark.parametrize("word", [4, "4", "004", "Liver", NAME])
def test_a_dataset_by_number_or_name(word: str | int, tmp_path: Path) -> None:
    assert site(tmp_path).dataset_name(word) == NAME


def test_two_datasets_of_one_name_are_told_apart(tmp_path: Path) -> None:
    here = site(tmp_path)
    (here.preprocessed / "Dataset005_Liver").mkdir()
    with pytest.raises(MFMError, match="Dataset004_Liver, Dataset005_Liver"):
        here.dataset_name("Liver")


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_pretraining_goes_on_without_its_settings_and_longer(tmp_path: Path) -> None:
    here, folder = tiny_run.prepare(tmp_path, num_cases=3), tiny_run.run_folder(tmp_path)
    short = (
        "pretrain.epochs=2",
        "pretrain.iterations_per_epoch=2",
        "pretext.mask_ratio=0.5",
        "seed=3",
        "num_workers=0",
    )
    tiny_run.run(here, settings=short)
    again = PretrainRequest(tiny_run.NAME, tiny_run.CONFIGURATION, device="cpu", continue_training=True)
    pretrain_here(here, again)
    assert len(history(folder)) == 2
    pretrain_here(here, replace(again, settings=("pretrain.epochs=4",)))
    rows, saved = history(folder), json.loads((folder / "settings.json").read_text())
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert (saved["pretrain"]["epochs"], saved["seed"], saved["pretext_config"]["mask_ratio"]) == (4, 3, 0.5)
    rate = saved["pretrain"]["learning_rate"] * learning_rate_factor(2 + 1 / 2, 4, 0)
    assert rows[2]["learning_rate"] == pytest.approx(rate), "as in a run of four epochs"
    assert checkpoint.load(folder / "checkpoint_final.pth")["mfm"]["epoch"] == 4
    for wrong in ("pretrain.epochs=3", "pretrain.batch_size=1", "pretext.mask_ratio=0.6"):
        with pytest.raises(MFMError, match="E_CONFIG") as refused:
            pretrain_here(here, replace(again, settings=(wrong,)))
        assert wrong.partition("=")[0].replace("pretext.", "pretext_config.") in str(refused.value)


def test_a_fine_tuning_trains_on_from_where_it_is(tmp_path: Path) -> None:
    short = replace(tiny.FINETUNE, epochs=1, iterations_per_epoch=1)
    here = tiny.make(tmp_path, num_cases=5, block=MFMBlock(finetune=short, num_workers=0))
    arguments = (tiny.NAME, "3d_fullres", 0)
    with workspace.use_only(tmp_path):
        folder = tiny.run_training(here, *arguments, device="cpu")
        final, before = folder / "checkpoint_final.pth", tmp_path / "before.pth"
        shutil.copy(final, before)
        longer = {"overrides": ["finetune.epochs=2"], "device": "cpu", "continue_training": True}
        tiny.run_training(here, *arguments, **longer)
        assert checkpoint.load_weights(final)["current_epoch"] == 2
        # Killed after its second epoch, the longer run had both files.
        shutil.move(final, folder / "checkpoint_latest.pth")
        shutil.copy(before, final)
        assert _find_newest(folder, only_validate=False) == folder / "checkpoint_latest.pth"
        assert _find_newest(folder, only_validate=True) == final
        tiny.run_training(here, *arguments, device="cpu", continue_training=True)
        with pytest.raises(MFMError, match=r"finetune\.epochs was 2, is 1"):
            tiny.run_training(here, *arguments, **{**longer, "overrides": ["finetune.epochs=1"]})
