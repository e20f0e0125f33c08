"""Two gloo processes equal one with the same total batch, for every registered task, through the engine.

The two processes are started once per family of networks and run all tasks, one after the other; as a script this file
is one of them: python -m tests.engine.test_distributed_tasks FOLDER FAMILY RANK TASK [TASK ...]
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mfm_nnunet import checkpoint
from mfm_nnunet.reports import examples, progress
from mfm_nnunet.tasks.base import list_tasks
from tests.builders.tiny_run import CONFIGURATION, NAME, prepare, run, run_folder

ROOT = Path(__file__).parent.parent.parent
FAMILIES = ("resenc", "primus")
STEPS = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=2", "pretrain.batch_size=4", "num_workers=0",
         "pretrain.learning_rate=0.1")  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "mae+long": ("pretrain.accumulation=2", "pretrain.ema_decay=0.9", "pretrain.activation_checkpointing=true"),
    "simclr": ("pretext.projector_width=32",),
    "simclr+parts": ("pretext.projector_width=32", "pretrain.accumulation=2", "pretrain.batch_size=8"),
    "voco": ("pretext.projector_width=32",),
}
"""What a task needs to be fast on volumes of 20 x 18 x 24 voxels; with a suffix, a further run of the same task."""
RUNS = [*(info.name for info in list_tasks()), *(name for name in SETTINGS if "+" in name)]


def runs_of(family: str) -> list[str]:
    backbones = {info.name: info.backbones for info in list_tasks()}
    return [name for name in RUNS if family in backbones[name.partition("+")[0]]]


def state_of(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole state of a run and its log of one epoch."""
    task, _, suffix = name.partition("+")
    place = run_folder(folder, task)
    place = place.with_name(f"{place.name}__{suffix}") if suffix else place
    return checkpoint.load(place / "resume.pth"), json.loads((place / "log.jsonl").read_text())


def prepared(folder: Path, family: str) -> Any:
    """The tiny corpus; without drop path, which each process draws for its own items."""
    here = prepare(folder, family)
    file = here.preprocessed / NAME / "mfmPlans.json"
    plans = json.loads(file.read_text())
    if family == "primus":
        plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]["drop_path_rate"] = 0.0
        file.write_text(json.dumps(plans))
    return here


def run_all(folder: Path, family: str, tasks: list[str], rank: int | None = None) -> None:
    """Every task; what goes wrong is written beside the runs, so that the others are compared all the same."""
    torch.set_num_threads(1)
    progress.plot_progress = lambda *_, **__: None  # type: ignore[assignment]
    examples.plot_examples = lambda _, file, *__, **___: file.touch()  # type: ignore[assignment]
    here = prepared(folder, family)
    for task in tasks:
        try:
            if rank is not None:
                _meet(folder / f"{task}.meeting", rank)
            name, _, suffix = task.partition("+")
            run(here, name, (*STEPS, *SETTINGS.get(task, ())), run_name=suffix or None)
        except Exception as error:
            (folder / f"{task}_{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def _meet(place: Path, rank: int) -> None:
    """A process group for one run, which leaves it at its end."""
    if dist.is_initialized():
        dist.destroy_process_group()
    patience = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{place}", patience, 2, rank)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folders of the runs of one and of two processes, by family; each family runs once.

    A fixture with the family as its parameter would run anew for every test that names the family.
    """
    return functools.cache(lambda family: run_both(family, tmp_path_factory))


def run_both(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All tasks of a family in one process and in two."""
    single, double = (tmp_path_factory.mktemp(name) for name in ("single", "double"))
    tasks = runs_of(family)
    prepared(double, family)
    command = [sys.executable, "-m", "tests.engine.test_distributed_tasks", str(double), family]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), *tasks], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    plots = progress.plot_progress, examples.plot_examples
    try:
        run_all(single, family, tasks)
        texts = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        progress.plot_progress, examples.plot_examples = plots
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return single, double


@pytest.mark.parametrize(("family", "task"), [(family, task) for family in FAMILIES for task in runs_of(family)])
def test_two_processes_equal_one(family: str, task: str, runs: Callable[[str], tuple[Path, Path]]) -> None:
    """All weights after two steps: of the network, and of what the task adds to it."""
    single, double = runs(family)
    problems = {file.name: file.read_text() for folder in (single, double) for file in folder.glob(f"{task}_*.txt")}
    assert not problems
    (first, *_), (second, *_) = states = [state_of(folder, task) for folder in (single, double)]
    assert ("average" in first) == (task == "mae+long")
    for part in ("task", "average") if "average" in first else ("task",):
        assert first[part].keys() == second[part].keys()
        differences = {name: float((first[part][name] - second[part][name]).abs().max()) for name in first[part]}
        worst = max(differences, key=differences.__getitem__)
        assert differences[worst] < 1e-5, (worst, differences[worst])
    rows = [row for _, row in states]
    for name in ("train_loss", "validation_loss"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4), name


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[3], "WORLD_SIZE": "2", "LOCAL_RANK": sys.argv[3]}
    run_all(Path(sys.argv[1]), sys.argv[2], sys.argv[4:], int(sys.argv[3]))
