"""A run that was killed and continued equals an unbroken one, bit for bit on the CPU, for any number of workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from mfm_nnunet import checkpoint
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny
from tests.builders.tiny import run_training

SETTINGS = ("finetune.epochs=3", "finetune.iterations_per_epoch=2", "seed=2")

RUN = """
import os, signal, sys
from pathlib import Path
from tests.builders.tiny import run_training
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.workspace import use

update, calls = MFMTrainer._update, []

def killed(self, loss):
    calls.append(0)
    if len(calls) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, loss)

MFMTrainer._update = killed
with use(sys.argv[1]) as here:
    settings = [word for word in sys.argv[5:] if "=" in word]
    go_on = "--c" in sys.argv
    print(run_training(here, sys.argv[2], sys.argv[3], 0, overrides=settings, continue_training=go_on, device="cpu"))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)  # slower than the training itself
    tiny.make(tmp_path)
    with use(tmp_path) as workspace:
        yield workspace


def state(folder: Path) -> dict[str, Any]:
    """What must be equal: everything but the time."""
    content = checkpoint.load(folder / "checkpoint_final.pth")
    logging = {key: value for key, value in content["logging"].items() if "timestamps" not in key}
    settings = content.pop("mfm"), content["init_args"]["plans"]["mfm"].pop("num_workers")
    assert settings[0]["kind"] == "finetuned"
    return {**content, "logging": logging}


def require_equal(a: Any, b: Any, name: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            require_equal(a[key], b[key], f"{name}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for index, (x, y) in enumerate(zip(a, b)):
            require_equal(x, y, f"{name}[{index}]")
    else:
        assert a == b or (a != a and b != b), name


def unbroken(here: Workspace, configuration: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    folder = run_training(here, tiny.NAME, configuration, 0, overrides=overrides, device="cpu")
    result = state(folder)
    folder.parent.rename(here.results / "unbroken")
    return result


def run_alone(root: Path, kill_at: int, *words: str) -> subprocess.CompletedProcess[str]:
    """One run in a process of its own, as the command does it: what ran before in a process may move last bits."""
    command = [sys.executable, "-c", RUN, str(root), tiny.NAME, "3d_fullres", str(kill_at), *words]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_killed_in_the_middle_of_an_epoch(here: Workspace, tmp_path: Path) -> None:
    whole = run_alone(tmp_path, -1, *SETTINGS, "num_workers=0")
    assert whole.returncode == 0, whole.stderr
    folder = Path(whole.stdout.splitlines()[-1])
    wanted = state(folder)
    folder.parent.rename(here.results / "unbroken")
    killed = run_alone(tmp_path, 6, *SETTINGS, "num_workers=2")  # the second step of the third epoch
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (latest,) = here.results.rglob("MFMTrainer*/fold_0/checkpoint_latest.pth")
    assert checkpoint.load(latest)["current_epoch"] == 2
    assert not [file for file in latest.parent.iterdir() if file.suffix == ".tmp"]
    continued = run_alone(tmp_path, -1, "--c")
    assert continued.returncode == 0, continued.stderr
    require_equal(state(folder), wanted)


@pytest.mark.parametrize("stop_at", [3, 6])
def test_random_layers_and_adamw_within_the_warm_up(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    settings = (*SETTINGS, "finetune.optimizer=adamw", "finetune.learning_rate=1e-3", "finetune.warmup_epochs=3")
    wanted = unbroken(here, "primus", settings)
    update, calls = MFMTrainer._update, []

    class Killed(BaseException):
        pass

    def interrupted(self: MFMTrainer, loss: torch.Tensor) -> None:
        calls.append(0)
        if len(calls) == stop_at:
            raise Killed
        update(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(MFMTrainer, "_update", interrupted)
        with pytest.raises(Killed):
            run_training(here, tiny.NAME, "primus", 0, overrides=settings, device="cpu")
    torch.rand(int.from_bytes(os.urandom(1), "big"))  # what happened in between must not matter
    folder = run_training(here, tiny.NAME, "primus", 0, continue_training=True, device="cpu")
    require_equal(state(folder), wanted)


def test_a_run_that_is_older_than_a_setting_goes_on(here: Workspace) -> None:
    folder = run_training(here, tiny.NAME, "3d_fullres", 0, overrides=SETTINGS, device="cpu")
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
    assert run_training(here, tiny.NAME, "3d_fullres", 0, continue_training=True, device="cpu") == folder
    assert (folder / "checkpoint_final.pth").is_file()
