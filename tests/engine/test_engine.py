"""The pretraining loop: learns, resumes bit for bit, saves on signals, stops before a bad update."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mfm_nnunet import checkpoint
from mfm_nnunet.data.cases import Case
from mfm_nnunet.engine.pretraining import choose_dtype
from mfm_nnunet.jobs.pretrain import split_subjects
from tests.builders.groups import started, wait_for_end
from tests.builders.tiny_run import prepare, run, run_folder, same, weights

ROOT = Path(__file__).parent.parent.parent


def start(folder: Path, task: str, family: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.builders.tiny_run", str(folder), task, family, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_run_leaves_what_the_documentation_promises(tmp_path: Path) -> None:
    final = run(prepare(tmp_path), settings=("pretrain.epochs=6", "pretrain.learning_rate=0.02"))
    names = {file.name for file in final.parent.iterdir()}
    pictures = {"progress.png", "examples.png", "examples_first.png"}
    assert names == {"checkpoint_final.pth", "resume.pth", "settings.json", "log.jsonl", "report.html", *pictures}
    rows = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(6))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    content = torch.load(final, weights_only=True)
    assert content["mfm"]["pretext"] == "mae"
    assert content["mfm"]["epoch"] == 6
    assert content["mfm"]["corpus"]["num_cases"] == 6
    text = final.read_bytes()
    assert b"case0" not in text
    assert str(tmp_path).encode() not in text


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_weights_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    here = prepare(tmp_path)
    finals = [run(here, settings=(f"num_workers={n}", "pretrain.epochs=1"), run_name=f"w{n}") for n in (0, 2)]
    assert same(weights(finals[0]), weights(finals[1]))
    other_seed = run(here, settings=("seed=1", "pretrain.epochs=1"), run_name="seed1")
    assert not same(weights(finals[0]), weights(other_seed))


LONG = ("pretrain.ema_decay=0.99", "pretrain.accumulation=2", "pretrain.activation_checkpointing=true")


@pytest.mark.parametrize(("task", "family", "settings"), [("volume_fusion", "resenc", ()), ("mae", "primus", LONG)])
def test_kill_and_continue_ends_in_the_same_bits(
    tmp_path: Path, task: str, family: str, settings: tuple[str, ...]
) -> None:
    whole = weights(run(prepare(tmp_path / "whole", family), task, settings))
    broken = tmp_path / "broken"
    chance = random.Random(task + family)
    for attempt in range(2):
        resume = ("--c",) if (run_folder(broken, task) / "resume.pth").exists() else ()
        process = start(broken, task, family, *settings, *resume)
        deadline = time.monotonic() + 60
        before = _stamp(broken, task)
        while process.poll() is None and _stamp(broken, task) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        process.communicate()
        if (run_folder(broken, task) / "checkpoint_final.pth").exists():
            assert attempt > 0, "the run ended before it could be killed once"
            break
    final = run(prepare(broken, family), task, settings, continue_training=True)
    assert same(whole, weights(final))
    assert losses(run_folder(tmp_path / "whole", task)) == losses(run_folder(broken, task))
    states = [checkpoint.load(run_folder(folder, task) / "resume.pth") for folder in (tmp_path / "whole", broken)]
    assert ("average" in states[0]) == bool(settings)
    for part in {"task", "average"} & states[0].keys():
        assert same(states[0][part], states[1][part]), part


def losses(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["train_loss"], row["validation_loss"]) for row in rows]


def _stamp(folder: Path, task: str) -> float:
    file = run_folder(folder, task) / "resume.pth"
    return file.stat().st_mtime if file.exists() else 0.0


def test_signal_saves_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """The script has no error handling of its own, so the exception's text shows code and step."""
    long = ("pretrain.iterations_per_epoch=60", "pretrain.epochs=1")
    process = start(tmp_path, "mae", "resenc", *long)
    assert process.stderr is not None
    while "training: 1 of" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=60)
    assert "stopped by SIGTERM; saved at step" in text, text
    assert "Continue with --c" in text, text
    step = int(text.split("saved at step ")[1].split()[0])
    assert 0 < step < 60
    state = checkpoint.load(run_folder(tmp_path) / "resume.pth")["state"]
    assert state["step"] == step
    assert state["loss_count"] == step
    whole = weights(run(prepare(tmp_path / "whole"), settings=long))
    assert same(whole, weights(run(prepare(tmp_path), settings=long, continue_training=True)))


def test_gradients_that_loss_scaling_cannot_help_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in fp16, where a step with such gradients is skipped, for ever if need be, and the scale ends at 0."""

    class Spoilt(torch.amp.GradScaler):
        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            for parameter in optimizer.param_groups[0]["params"]:
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
            super().unscale_(optimizer)

    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: Spoilt(device, init_scale=4.0))
    with pytest.raises(FloatingPointError, match=r"gradient became non-finite at step 2 .*Cases of the batch: case\d"):
        run(prepare(tmp_path))


def test_subjects_are_never_split() -> None:
    cases = [Case(f"{subject}_{scan}", (), None, subject) for subject in "abcdefgh" for scan in range(3)]
    training, validation = split_subjects(cases, 0.25, seed=1)
    assert {name[0] for name in training}.isdisjoint({name[0] for name in validation})
    assert len(validation) == 6
    assert split_subjects(cases, 0.25, seed=1) == (training, validation)


@pytest.mark.parametrize(("num_subjects", "scans", "held_out"), [(4, 1, 2), (3, 1, 1), (30, 1, 2), (4, 2, 2)])
def test_as_many_volumes_are_held_out_as_an_item_mixes(num_subjects: int, scans: int, held_out: int) -> None:
    """And not more, so that the split of a run that was begun stays; with three there are not enough to train."""
    names = [(subject, scan) for subject in range(num_subjects) for scan in range(scans)]
    cases = [Case(f"{subject:02}_{scan}", (), None, str(subject)) for subject, scan in names]
    training, validation = split_subjects(cases, 0.05, 1, volumes_per_item=2)
    assert len(validation) == held_out
    assert {name[:2] for name in training}.isdisjoint({name[:2] for name in validation})
    if held_out == 2 and scans == 2:
        assert (training, validation) == split_subjects(cases, 0.05, 1)


def test_automatic_precision_does_not_take_emulated_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs before Ampere emulate it, slower than float32."""
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16
    assert choose_dtype("auto", torch.device("cpu")) is None


TWO_PROCESSES = """
import argparse, sys
from pathlib import Path
from mfm_nnunet.cli.run import run_command
from mfm_nnunet.jobs.pretrain import launch
from tests.builders.tiny_run import prepare, request

def job(arguments):
    settings = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=100000", "num_workers=1")
    launch(prepare(Path(sys.argv[1])), request("mae", settings, num_gpus=2))

if __name__ == "__main__":
    sys.exit(run_command(job, argparse.Namespace(workspace=sys.argv[1], debug=False)))
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGUSR1, False), (signal.SIGUSR1, True), (signal.SIGHUP, False), (signal.SIGINT, True)],
)
def test_a_signal_to_several_processes_saves_and_leaves_none(
    number: signal.Signals, to_all: bool, tmp_path: Path
) -> None:
    """To the parent alone, which passes it on, or to all, as Slurm does; workers that read belong to them."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    process = started(script, tmp_path)
    assert process.stderr is not None
    lines = []
    while " steps" not in (lines or [""])[-1]:
        lines.append(process.stderr.readline())
        assert process.poll() is None, "".join(lines)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 128 + number, errors
    assert "saved at step" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert (run_folder(tmp_path) / "resume.pth").is_file()
    assert not wait_for_end(process.pid)
