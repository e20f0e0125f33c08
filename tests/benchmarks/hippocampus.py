"""Does pretraining help on the hippocampus set? From scratch, MAE and Volume Fusion on one schedule, several seeds.

150 scans are the unlabelled corpus, 8 labelled ones train and the other 42 test; a fourth arm trains from scratch with
32 labels (8 and 24 of the corpus's), which shows that the schedule is long enough to measure labels and not steps.
Everything runs through the four commands, each cell in a process of its own on one core; finished cells are kept, so
the script continues where it was stopped.

    python tests/benchmarks/hippocampus.py --data ../shared/data/Dataset004_Hippocampus --work study
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import itertools
import json
import os
import queue
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NUM_CORPUS, NUM_TRAIN, NUM_MORE = 150, 8, 24
PRETEXTS = ("mae", "volume_fusion")
ARMS = {
    "scratch, 8 labels": ("704_Hippocampus8", None),
    "MAE, 8 labels": ("704_Hippocampus8", "mae"),
    "Volume Fusion, 8 labels": ("704_Hippocampus8", "volume_fusion"),
    "scratch, 32 labels": ("705_Hippocampus32", None),
}


def main() -> None:
    arguments = parse()
    study = Study(arguments)
    study.prepare()
    study.pretrain()
    study.finetune()
    study.summarise()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Dataset004_Hippocampus in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that the study writes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one core each")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="NAME=VALUE", help="settings of pretraining")
    parser.add_argument("--finetune", nargs="*", default=[], metavar="NAME=VALUE", help="settings of fine-tuning")
    return parser.parse_args()


class Study:
    """The steps of the study; ``folder`` is its workspace."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.work.absolute()
        self.data: Path = arguments.data.absolute()
        self.cores: queue.Queue[int] = queue.Queue()
        for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), arguments.jobs):
            self.cores.put(core)

    def prepare(self) -> None:
        """Split the cases, register the corpus and plan it."""
        names = sorted(file.name[: -len("_0000.nii.gz")] for file in (self.data / "imagesTr").glob("*_0000.nii.gz"))
        random.Random(0).shuffle(names)
        corpus, rest = names[:NUM_CORPUS], names[NUM_CORPUS:]
        self.test = rest[NUM_TRAIN:]
        (self.folder / "test").mkdir(parents=True, exist_ok=True)
        with open(self.folder / "corpus.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "image"])
            writer.writerows([name, self.image(name)] for name in sorted(corpus))
        for name in self.test:
            link = self.folder / "test" / f"{name}_0000.nii.gz"
            if not link.exists():
                link.symlink_to(self.image(name))
        self.dataset("704_Hippocampus8", rest[:NUM_TRAIN])
        self.dataset("705_Hippocampus32", rest[:NUM_TRAIN] + corpus[:NUM_MORE])
        self.command("mfm_plan_and_preprocess", "-d", "701", "--images", self.folder / "corpus.csv", "--name", "Corpus")

    def pretrain(self) -> None:
        """Each pretext task with each seed; then the labelled sets are planned to fit."""
        cells = [(pretext, seed) for seed in range(self.arguments.seeds) for pretext in PRETEXTS]
        self.parallel(self.pretrain_cell, cells)
        checkpoint = self.checkpoint("mae", 0)
        for dataset in ("704", "705"):
            like = ("--like", checkpoint, "-pl", "mfmStudyPlans")
            self.command("mfm_plan_and_preprocess", "-d", dataset, "-c", "3d_fullres", *like)

    def pretrain_cell(self, pretext: str, seed: int, core: int) -> None:
        if self.checkpoint(pretext, seed).exists():
            return
        settings = ("--set", *self.arguments.pretrain, f"seed={seed}")
        folder = self.checkpoint(pretext, seed).parent
        resume = ("--c",) if (folder / "resume.pth").exists() else ()
        self.command(
            "mfm_pretrain", "701", "3d_fullres", "--pretext", pretext, "--run-name", f"seed{seed}", *settings, *resume,
            core=core,
        )  # fmt: skip

    def finetune(self) -> None:
        """Each arm with each seed: train, predict the test cases, evaluate."""
        cells = [(arm, seed) for seed in range(self.arguments.seeds) for arm in self.arguments.arms]
        self.parallel(self.finetune_cell, cells)

    def finetune_cell(self, arm: str, seed: int, core: int) -> None:
        cell = self.cell(arm, seed)
        if (cell / "result.json").exists():
            return
        dataset, pretext = ARMS[arm]
        results = {"nnUNet_results": str(cell / "results")}
        start = time.monotonic()
        weights = ("-pretrained_weights", self.checkpoint(pretext, seed)) if pretext else ()
        resume: tuple[Any, ...] = ("--c",) if (cell / "results").exists() else weights
        self.command(
            "mfm_train", dataset[:3], "3d_fullres", "all", "-p", "mfmStudyPlans", *resume,
            "--set", *self.arguments.finetune, f"seed={seed}", core=core, environment=results,
        )  # fmt: skip
        seconds = time.monotonic() - start
        model = cell / "results" / f"Dataset{dataset}" / "MFMTrainer__mfmStudyPlans__3d_fullres"
        self.command("mfm_predict", "-i", self.folder / "test", "-o", cell / "masks", "-m", model, "-f", "all",
                     "--overwrite", core=core)  # fmt: skip
        dice = {name: self.dice(name, cell / "masks") for name in self.test}
        (cell / "result.json").write_text(json.dumps({"arm": arm, "seed": seed, "seconds": seconds, "dice": dice}))

    def summarise(self) -> None:
        """The table: Dice per label and mean over the test cases, mean and spread over the seeds."""
        import numpy as np

        lines = ["| arm | anterior | posterior | mean | seeds' means | minutes |", "|---|---|---|---|---|---|"]
        for arm in self.arguments.arms:
            cells = [json.loads((self.cell(arm, s) / "result.json").read_text()) for s in range(self.arguments.seeds)]
            values = np.array([[cell["dice"][name] for name in self.test] for cell in cells])  # seeds, cases, labels
            per_seed = values.mean(axis=1)
            columns = [f"{m:.4f} ± {s:.4f}" for m, s in zip(per_seed.mean(0), per_seed.std(0, ddof=1))]
            means = per_seed.mean(1)
            columns += [f"{means.mean():.4f} ± {means.std(ddof=1):.4f}", " ".join(f"{m:.4f}" for m in means)]
            minutes = np.mean([cell["seconds"] for cell in cells]) / 60
            lines.append(f"| {arm} | {' | '.join(columns)} | {minutes:.1f} |")
        text = "\n".join(lines) + "\n"
        (self.folder / "table.md").write_text(text)
        print(text)

    def image(self, name: str) -> Path:
        return self.data / "imagesTr" / f"{name}_0000.nii.gz"

    def cell(self, arm: str, seed: int) -> Path:
        return self.folder / "cells" / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"

    def checkpoint(self, pretext: str, seed: int) -> Path:
        run = f"mfm_pretrain__{pretext}__mfmPlans__3d_fullres__seed{seed}"
        return self.folder / "nnUNet_results" / "Dataset701_Corpus" / run / "checkpoint_final.pth"

    def dataset(self, name: str, cases: list[str]) -> None:
        """A labelled dataset that refers to the images where they are."""
        content = json.loads((self.data / "dataset.json").read_text())
        content["numTraining"] = len(cases)
        content["dataset"] = {
            case: {"images": [str(self.image(case))], "label": str(self.data / "labelsTr" / f"{case}.nii.gz")}
            for case in sorted(cases)
        }
        folder = self.folder / "nnUNet_raw" / f"Dataset{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "dataset.json").write_text(json.dumps(content, indent=1))

    def dice(self, name: str, masks: Path) -> list[float]:
        import nibabel
        import numpy as np

        truth = np.asarray(nibabel.load(self.data / "labelsTr" / f"{name}.nii.gz").dataobj)
        mask = np.asarray(nibabel.load(masks / f"{name}.nii.gz").dataobj)
        pairs = [(truth == label, mask == label) for label in (1, 2)]
        return [float(2 * (t & m).sum() / max((t.sum() + m.sum()), 1)) for t, m in pairs]

    def parallel(self, function: Any, cells: list[tuple[Any, ...]]) -> None:
        def run(cell: tuple[Any, ...]) -> None:
            core = self.cores.get()
            try:
                function(*cell, core=core)
            finally:
                self.cores.put(core)

        with concurrent.futures.ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(run, cells))

    def command(self, *words: Any, core: int | None = None, environment: dict[str, str] | None = None) -> None:
        """Run one of the commands in this workspace, on one core if ``core`` is given; its output goes to a log."""
        program = str(Path(sys.executable).parent / str(words[0]))
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        line = [*pinned, program, *map(str, words[1:]), "--workspace", str(self.folder)]
        log = self.folder / "logs" / f"{'_'.join(str(w) for w in words if '/' not in str(w))[:120]}.txt"
        log.parent.mkdir(exist_ok=True)
        print(time.strftime("%H:%M:%S"), " ".join(line), flush=True)
        settings = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
        with open(log, "a") as file:
            subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=True, env=settings)


if __name__ == "__main__":
    main()
