"""A run that was killed and resumed equals an unbroken one, bit for bit on the CPU, for any number of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mfm_nnunet import checkpoint
from mfm_nnunet.workspace import Workspace
from tests.builders.training import Killed, kill_at, require_equal, state_of, train

SETTINGS = ("finetune.epochs=3", "finetune.iterations_per_epoch=2", "seed=2")

RUN = """
import os, signal, sys
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.workspace import use
from tests.builders.training import train

step = Engine.step

def killed(self, batch, number):
    if number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, number)

Engine.step = killed
MFMTrainer.perform_actual_validation = lambda *_: None
with use(sys.argv[1]) as here:
    settings = [word for word in sys.argv[3:] if "=" in word]
    print(train(here, *settings, continue_training="--c" in sys.argv))
"""


def run_alone(root: Path, kill_before: int, *words: str) -> subprocess.CompletedProcess[str]:
    """One run in a process of its own, as the command does it: what ran before in a process may move last bits."""
    command = [sys.executable, "-c", RUN, str(root), str(kill_before), *words]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_killed_in_the_middle_of_an_epoch(here: Workspace, tmp_path: Path) -> None:
    whole = run_alone(tmp_path, -1, *SETTINGS, "num_workers=0")
    assert whole.returncode == 0, whole.stderr
    folder = Path(whole.stdout.splitlines()[-1])
    wanted = state_of(folder)
    folder.parent.rename(here.results / "unbroken")
    killed = run_alone(tmp_path, 5, *SETTINGS, "num_workers=2")  # the second step of the third epoch
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (latest,) = here.results.rglob("MFMTrainer*/fold_0/checkpoint_latest.pth")
    assert checkpoint.load(latest)["current_epoch"] == 2
    assert not [file for file in latest.parent.iterdir() if file.suffix == ".tmp"]
    continued = run_alone(tmp_path, -1, "--c")
    assert continued.returncode == 0, continued.stderr
    require_equal(state_of(folder), wanted)


@pytest.mark.parametrize("killed_before", [2, 5])
def test_random_layers_and_adamw_within_the_warm_up(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, killed_before: int
) -> None:
    settings = (*SETTINGS, "finetune.optimizer=adamw", "finetune.learning_rate=1e-3", "finetune.warmup_epochs=3")
    folder = train(here, *settings, configuration="primus")
    wanted = state_of(folder)
    folder.parent.rename(here.results / "unbroken")
    with monkeypatch.context() as patch:
        kill_at(patch, killed_before)
        with pytest.raises(Killed):
            train(here, *settings, configuration="primus")
    torch.rand(int.from_bytes(os.urandom(1), "big"))  # what happened in between must not matter
    train(here, configuration="primus", continue_training=True)
    require_equal(state_of(folder), wanted)


def test_a_run_that_is_older_than_a_setting_is_resumed(here: Workspace) -> None:
    folder = train(here, *SETTINGS)
    younger = {"schedule", "decoder_epochs", "train", "lora_rank", "lora_alpha", "layer_decay", "parts"}
    younger |= {"ema_decay", "mirroring", "batch_size"}
    file = folder / "settings.json"
    content = json.loads(file.read_text())
    for name in younger:
        del content["settings"]["finetune"][name]
    file.write_text(json.dumps(content))
    final = checkpoint.load(folder / "checkpoint_final.pth")
    del final["mfm"]["new_weights"]
    checkpoint.save({**final, "current_epoch": 2}, folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final.pth").unlink()
    assert train(here, continue_training=True) == folder
    assert (folder / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize(
    ("configuration", "settings", "more"),
    [("3d_fullres", (), set()), ("primus", ("finetune.ema_decay=0.9",), {"trained_weights", "averaged_weights"})],
)
def test_the_layout_is_that_of_runs_begun_before(
    here: Workspace, configuration: str, settings: tuple[str, ...], more: set[str]
) -> None:
    """Frozen: runs that earlier versions began are resumed from exactly these keys, and theirs by stock nnU-Net."""
    folder = train(here, "finetune.epochs=1", "finetune.iterations_per_epoch=1", *settings, configuration=configuration)
    final = checkpoint.load(folder / "checkpoint_final.pth")
    assert set(final) == more | {
        "network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch",
        "init_args", "trainer_name", "inference_allowed_mirroring_axes", "mfm",
    }  # fmt: skip
    assert {*final["logging"]} == {
        "mean_fg_dice", "ema_fg_dice", "dice_per_class_or_region", "train_losses", "val_losses", "lrs",
        "epoch_start_timestamps", "epoch_end_timestamps",
    }  # fmt: skip
    assert set(final["init_args"]) == {"plans", "configuration", "fold", "dataset_json"}
    assert set(final["mfm"]) == {"format", "kind", "finetune", "source", "new_weights", "versions"}
