"""Two versions of this package, old and new, in one run: preprocessing, pretraining, prediction.

    git worktree add --detach /tmp/old COMMIT
    OMP_NUM_THREADS=1 python -m tests.benchmarks.versions --old /tmp/old --data DATA/Dataset004_Hippocampus

Each job is a whole command, timed from its start to its exit with all child processes, in turn (old, new, old, new ...)
after a round that does not count. Both versions work on the same files; what they write is compared byte for byte. The
median of the ratios old/new is the number to quote: below 1, the new version is slower.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RUN = "import importlib, sys; sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"
STEPS = 30
PRETRAIN = ["pretrain.epochs=1", f"pretrain.iterations_per_epoch={STEPS}"]
FINETUNE = ["finetune.epochs=1", "finetune.iterations_per_epoch=2", "finetune.validation_iterations=1"]


class Job(NamedTuple):
    """A command in a workspace: its arguments, what it removes before it runs, and the results to compare."""

    name: str
    arguments: list[str]
    removed: str
    results: str


def main() -> None:
    """Time the jobs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="checkout of the old version")
    parser.add_argument("--data", type=Path, required=True, help="labelled dataset in nnU-Net's raw format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", nargs="+", default=[""], help="beginnings of the names of the jobs (default: all)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        spaces = {arguments.old.resolve(): Path(place) / "old", ROOT: Path(place) / "new"}
        for version, space in spaces.items():
            raw = space / "nnUNet_raw"
            raw.mkdir(parents=True)
            (raw / arguments.data.name).symlink_to(arguments.data.resolve())
            (space / "scans").mkdir()
            for file in sorted((arguments.data / "imagesTr").iterdir())[:20]:
                (space / "scans" / file.name).symlink_to(file.resolve())
            _run(version, space, _commands(arguments.data.name)["plan"])
            _run(version, space, _commands(arguments.data.name)["train"])
        print("| job | wall, old/new | range | CPU, old/new | old s | new s | results |\n|---|---|---|---|---|---|---|")
        for job in _jobs(arguments.data.name):
            if job.name.startswith(tuple(arguments.jobs)):
                _compare(job, spaces, arguments.rounds)


def _commands(dataset: str) -> dict[str, list[str]]:
    plan = ["plan_and_preprocess", "-d", dataset, "-c", "3d_fullres", "-np", "1"]
    train = ["train", dataset, "3d_fullres", "0", "--device", "cpu", "--set", *FINETUNE]
    return {"plan": plan, "train": train}


def _jobs(dataset: str) -> list[Job]:
    predict = ["predict", "-i", "scans", "-o", "masks", "-d", dataset, "-c", "3d_fullres", "-f", "0"]
    predict += ["-device", "cpu", "--overwrite"]
    pretrain = ["pretrain", dataset, "3d_fullres", "--device", "cpu", "--set", *PRETRAIN]
    preprocessed = f"nnUNet_preprocessed/{dataset}"
    run = f"nnUNet_results/{dataset}/mfm_pretrain__mae__mfmPlans__3d_fullres"
    return [
        Job("plan and preprocess", _commands(dataset)["plan"], preprocessed, f"{preprocessed}/*/*.b2nd"),
        Job(f"pretrain, {STEPS} steps of MAE", pretrain, run, f"{run}/checkpoint_final.pth"),
        Job("predict 20 scans with mirroring", predict, "masks", "masks/*.nii.gz"),
        Job("predict 20 scans without mirroring", [*predict, "--disable_tta"], "masks", "masks/*.nii.gz"),
    ]


def _compare(job: Job, spaces: dict[Path, Path], rounds: int) -> None:
    seconds: dict[Path, list[tuple[float, float]]] = {version: [] for version in spaces}
    for number in range(rounds + 1):
        for version, space in spaces.items():
            shutil.rmtree(space / job.removed, ignore_errors=True)
            times = _timed(functools.partial(_run, version, space, job.arguments))
            if number > 0:
                seconds[version].append(times)
    old, new = seconds.values()
    wall = [a[0] / b[0] for a, b in zip(old, new)]
    cpu = [a[1] / b[1] for a, b in zip(old, new)]
    first, second = (_digests(space.glob(job.results), space) for space in spaces.values())
    same = sum(first.get(name) == digest for name, digest in second.items())
    print(
        f"| {job.name} | {statistics.median(wall):.2f} | {min(wall):.2f} to {max(wall):.2f} | "
        f"{statistics.median(cpu):.2f} | "
        f"{statistics.median(a[0] for a in old):.1f} | {statistics.median(b[0] for b in new):.1f} | "
        f"{same} of {len(first)} files equal |",
        flush=True,
    )


def _run(version: Path, space: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", RUN, f"mfm_nnunet.cli.{arguments[0]}", *arguments[1:], "--workspace", str(space)]
    environment = {**os.environ, "PYTHONPATH": str(version), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=space, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{version}: {' '.join(arguments)}\n{done.stdout}{done.stderr}")


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _digests(files: Iterable[Path], space: Path) -> dict[Path, str]:
    return {file.relative_to(space): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    main()
