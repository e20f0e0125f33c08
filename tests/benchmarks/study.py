"""What the studies of pretraining share: split, commands in processes of their own, fine-tuning, Dice and tables.

150 hippocampus scans are the unlabelled corpus (dataset 701), 8 labelled ones train (704) and the other 42 test. The
split is by scan, because the set does not tell which scans are of one person (left and right hippocampus).
Everything runs through the four commands, each cell in a process of its own on one core; finished cells are kept, so
a study continues where it was stopped.
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

from mfm_nnunet.files import atomic_write

NUM_CORPUS, NUM_TRAIN = 150, 8
CORPUS, LABELLED = "701_Corpus", "704_Hippocampus8"
LABELS = {1: "anterior", 2: "posterior"}
SETTINGS = "study.json"
"""What the pretrainings and cells in a work folder were made with."""


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the labelled dataset in nnU-Net's raw format")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that the study writes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, one core each")
    parser.add_argument("--pretrain", nargs="*", default=[], metavar="NAME=VALUE", help="settings of pretraining")
    parser.add_argument("--finetune", nargs="*", default=[], metavar="NAME=VALUE", help="settings of fine-tuning")
    return parser


def case_names(dataset: Path) -> list[str]:
    """The cases of a dataset of one channel in nnU-Net's raw format, sorted."""
    return sorted(file.name[: -len("_0000.nii.gz")] for file in (dataset / "imagesTr").glob("*_0000.nii.gz"))


class Study:
    """``folder`` is the study's workspace."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.folder: Path = arguments.work.absolute()
        self.data: Path = arguments.data.absolute()
        self.cores: queue.Queue[int] = queue.Queue()
        for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), arguments.jobs):
            self.cores.put(core)
        self.split()

    def split(self) -> None:
        """``corpus``, ``train`` and ``test``: the names of the cases that pretrain, train and test."""
        names = case_names(self.data)
        random.Random(0).shuffle(names)
        self.corpus, rest = names[:NUM_CORPUS], names[NUM_CORPUS:]
        self.train, self.test = rest[:NUM_TRAIN], rest[NUM_TRAIN:]

    def prepare(self) -> None:
        """Write the split: the corpus as a CSV, the labelled dataset, and links to the test scans."""
        self.require_same_settings()
        (self.folder / "test").mkdir(parents=True, exist_ok=True)
        with open(self.folder / "corpus.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "image", "modality"])
            writer.writerows(self.corpus_rows())
        for name in self.test:
            link = self.folder / "test" / f"{name}_0000.nii.gz"
            if not link.exists():
                link.symlink_to(self.image(name))
        self.dataset(LABELLED, self.train)

    def settings_of_all(self) -> dict[str, Any]:
        """The settings that every pretraining and cell in the work folder must share."""
        return {"pretrain": self.arguments.pretrain, "finetune": self.arguments.finetune}

    def require_same_settings(self) -> None:
        """Refuse to mix what was made with different settings; a folder that tells none is taken for one of these."""
        settings = json.loads(json.dumps(self.settings_of_all()))
        file = self.folder / SETTINGS
        before = json.loads(file.read_text()) if file.exists() else settings
        if changed := [name for name in settings if before.get(name) != settings[name]]:
            raise SystemExit(f"{file}: what is finished was made with other {', '.join(changed)}. Use another --work.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as handle:
            handle.write(json.dumps({**before, **settings, **self.notes()}, indent=1).encode())

    def notes(self) -> dict[str, Any]:
        """What else is written beside the settings; it may change."""
        return {}

    def corpus_rows(self) -> list[tuple[str, Path, str]]:
        """Case, image and modality of every scan of the corpus."""
        return [(name, self.image(name), "MR") for name in sorted(self.corpus)]

    def plan_corpus(self, *words: Any) -> None:
        """Register the corpus, plan and preprocess it."""
        source = ("--images", self.folder / "corpus.csv", "--name", "Corpus")
        self.command("mfm_plan_and_preprocess", "-d", "701", *source, *words)

    def plan_like(self, dataset: str, checkpoint: Path, plans: str) -> None:
        """Plan and preprocess a labelled dataset so that the checkpoint's network fits."""
        words = ("-d", dataset[:3], "-c", "3d_fullres", "--like", checkpoint, "-pl", plans)
        self.command("mfm_plan_and_preprocess", *words)

    def pretrain_once(self, checkpoint: Path, *words: Any, core: int, log: str | None = None) -> None:
        """``mfm_pretrain`` with these words, unless its ``checkpoint`` is there; a run that was stopped goes on."""
        if not checkpoint.exists():
            resume = ("--c",) if (checkpoint.parent / "resume.pth").exists() else ()
            self.command("mfm_pretrain", "701", "3d_fullres", *words, *resume, core=core, log=log)

    def finetune_once(
        self, cell: Path, about: dict[str, Any], *, dataset: str, plans: str, weights: Path | None, core: int,
        settings: tuple[str, ...] = (), predict: tuple[str, ...] = (), log: str | None = None,
    ) -> None:  # fmt: skip
        """Train, predict the test cases and write ``result.json`` into the folder ``cell``, unless it is there."""
        if (cell / "result.json").exists():
            return
        start = time.monotonic()
        first = ("-pretrained_weights", weights) if weights else ()
        resume: tuple[Any, ...] = ("--c",) if any((cell / "results").rglob("checkpoint_*.pth")) else first
        self.command(
            "mfm_train", dataset[:3], "3d_fullres", "all", "-p", plans, *resume,
            "--set", *self.arguments.finetune, *settings, f"seed={about['seed']}", core=core, log=log,
            environment={"nnUNet_results": str(cell / "results")},
        )  # fmt: skip
        seconds = time.monotonic() - start
        model = cell / "results" / f"Dataset{dataset}" / f"MFMTrainer__{plans}__3d_fullres"
        self.command("mfm_predict", "-i", self.folder / "test", "-o", cell / "masks", "-m", model, "-f", "all",
                     "--overwrite", *predict, core=core, log=log)  # fmt: skip
        dice = {name: self.dice(name, cell / "masks") for name in self.test}
        with atomic_write(cell / "result.json") as handle:
            handle.write(json.dumps({**about, "seconds": seconds, "dice": dice}).encode())

    def image(self, name: str) -> Path:
        return self.data / "imagesTr" / f"{name}_0000.nii.gz"

    def cell(self, arm: str, seed: int) -> Path:
        """The folder of one arm and seed."""
        return self.folder / "cells" / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"

    def checkpoint(self, pretext: str, plans: str, run_name: str) -> Path:
        """The checkpoint of a pretraining."""
        run = f"mfm_pretrain__{pretext}__{plans}__3d_fullres__{run_name}"
        return self.folder / "nnUNet_results" / f"Dataset{CORPUS}" / run / "checkpoint_final.pth"

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
        """Dice of each label of a test case, on the original grid."""
        import nibabel
        import numpy as np

        truth = np.asarray(nibabel.Nifti1Image.from_filename(self.data / "labelsTr" / f"{name}.nii.gz").dataobj)
        mask = np.asarray(nibabel.Nifti1Image.from_filename(masks / f"{name}.nii.gz").dataobj)
        pairs = [(truth == label, mask == label) for label in LABELS]
        return [float(2 * (t & m).sum() / max((t.sum() + m.sum()), 1)) for t, m in pairs]

    def parallel(self, function: Any, cells: list[tuple[Any, ...]]) -> None:
        """Call ``function(*cell, core=...)`` for all cells in their order, ``--jobs`` at a time."""

        def run(cell: tuple[Any, ...]) -> None:
            core = self.cores.get()
            try:
                function(*cell, core=core)
            finally:
                self.cores.put(core)

        with concurrent.futures.ThreadPoolExecutor(self.arguments.jobs) as pool:
            list(pool.map(run, cells))

    def command(self, *words: Any, core: int | None = None, environment: dict[str, str] | None = None,
                log: str | None = None) -> None:  # fmt: skip
        """Run one of the commands in this workspace, on one core if ``core`` is given.

        Its output is appended to ``logs/NAME.txt``; without ``log`` the name is made of the words.
        """
        program = str(Path(sys.executable).parent / str(words[0]))
        name = log or "_".join(str(w) for w in words if "/" not in str(w))[:120]
        self.process([program, *map(str, words[1:]), "--workspace", str(self.folder)], name, core, environment)

    def process(
        self, line: list[str], log: str, core: int | None = None, environment: dict[str, str] | None = None
    ) -> None:
        """Run a program to its end, on one core if ``core`` is given; its output is appended to a log."""
        line = [*([] if core is None else ["taskset", "-c", str(core)]), *line]
        file = self.folder / "logs" / f"{log}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        print(time.strftime("%H:%M:%S"), " ".join(line), flush=True)
        settings = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
        with open(file, "a") as handle:
            subprocess.run(line, stdout=handle, stderr=subprocess.STDOUT, check=True, env=settings)

    def write_table(self, lines: list[str]) -> None:
        """``table.md``, and on the screen."""
        text = "\n".join(lines) + "\n"
        (self.folder / "table.md").write_text(text)
        print(text, flush=True)
