"""A small hospital: a workspace with a labelled dataset, a corpus, a pretrained and a fine-tuned network.

Scans are noisy spheres of 24 x 20 x 22 voxels, networks have a few thousand parameters and schedules one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from tests.builders.architectures import resenc

SHAPE = (24, 20, 22)
PATCH = (24, 20, 24)
LABELLED, CORPUS = "Dataset005_Few", "Dataset701_Corpus"
PRETRAIN = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "pretrain.validation_iterations=1", "num_workers=0")
FINETUNE = ("finetune.epochs=1", "finetune.iterations_per_epoch=1", "finetune.validation_iterations=1", "num_workers=0")
MAX_LINES = 6
"""Lines that an error may take."""


@dataclass(frozen=True)
class Outcome:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error: the last lines of stderr, from the one that begins with a code or the command's name."""
        lines = self.err.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(("E_", "mfm_", "internal error"))]
        return "\n".join(lines[starts[0] :]) if starts else ""


@dataclass(frozen=True)
class Site:
    """A workspace in a folder of its own, beside its scans and test images."""

    folder: Path
    call: Callable[[], tuple[str, str]]
    """What was printed since the last call, on stdout and on stderr."""

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def scans(self) -> Path:
        return self.folder / "scans"

    @property
    def test_images(self) -> Path:
        return self.folder / "test"

    @property
    def raw(self) -> Path:
        return self.workspace / "nnUNet_raw" / LABELLED

    @property
    def results(self) -> Path:
        return self.workspace / "nnUNet_results"

    @property
    def model(self) -> Path:
        return self.results / LABELLED / "MFMTrainer__mfmPlans__3d_fullres"

    @property
    def run_folder(self) -> Path:
        return self.results / CORPUS / "mfm_pretrain__mae__mfmPlans__3d_fullres"

    @property
    def pretrained(self) -> Path:
        return self.run_folder / "checkpoint_final.pth"

    @property
    def log(self) -> str:
        """The workspace's error log: long messages and tracebacks."""
        file = self.workspace / "mfm_error.log"
        return file.read_text() if file.is_file() else ""

    def preprocessed(self, dataset: str = LABELLED) -> Path:
        return self.workspace / "nnUNet_preprocessed" / dataset

    def data(self, dataset: str = LABELLED, plans: str = "mfmPlans") -> Path:
        """The folder of preprocessed 3D data of a plan."""
        content = json.loads((self.preprocessed(dataset) / f"{plans}.json").read_text())
        return self.preprocessed(dataset) / content["configurations"]["3d_fullres"]["data_identifier"]

    def run(self, command: str, *words: object, in_workspace: bool = True) -> Outcome:
        """Call a command in this process; the workspace is this one unless the words name another."""
        self.call()
        line = [*map(str, words), *(("--workspace", str(self.workspace)) if in_workspace else ())]
        try:
            code = importlib.import_module(f"mfm_nnunet.cli.{command}").main(line)
        except SystemExit as stopped:  # argparse
            code = int(stopped.code or 0)
        return Outcome(code, *self.call())

    def plan(self, *words: object) -> Outcome:
        return self.run("plan_and_preprocess", *words)

    def pretrain(self, *words: object, settings: Sequence[str] = PRETRAIN) -> Outcome:
        return self.run("pretrain", 701, "3d_fullres", *words, "--set", *settings)

    def train(self, fold: object, *words: object, settings: Sequence[str] = FINETUNE) -> Outcome:
        return self.run("train", 5, "3d_fullres", fold, *words, "--set", *settings)

    def predict(self, images: Path, output: Path, *words: object) -> Outcome:
        model = () if "-d" in words or "-m" in words else ("-m", self.model)
        return self.run("predict", "-i", images, "-o", output, *model, "--disable_tta", *words)


def refused(outcome: Outcome, *words: object, code: int = 2) -> str:
    """The message of a command that must have refused: short, without traceback, and with ``words`` in it."""
    shown = f"{outcome.code}\n{outcome.out}\n{outcome.err}"
    assert outcome.code == code, shown
    assert "Traceback" not in outcome.out + outcome.err, shown
    assert "internal error" not in outcome.err, shown
    assert outcome.message, shown
    assert len(outcome.message.splitlines()) <= MAX_LINES, shown
    for word in words:
        assert str(word) in outcome.message, f"{word!r} is not in: {shown}"
    return outcome.message


def accepted(outcome: Outcome) -> Outcome:
    """A command that must have worked."""
    assert outcome.code == 0, f"{outcome.out}\n{outcome.err}"
    return outcome


def contents(*folders: Path) -> dict[str, str]:
    """What lies in some folders but logs: SHA-256 of each file, the target of a link, "" for anything else."""
    found = {}
    for file in (file for folder in folders for file in [folder, *folder.rglob("*")]):
        if file.name == "mfm_error.log" or file.name.startswith("training_log_"):
            continue
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode):
            found[str(file)] = str(file.readlink())
        else:
            found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
    return found


@contextlib.contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Nothing in these folders may be changed, removed or added."""
    before = contents(*folders)
    yield
    after = contents(*folders)
    assert after == before, sorted(set(after.items()) ^ set(before.items()))


@contextlib.contextmanager
def nothing_lost(*folders: Path) -> Iterator[None]:
    """What is in these folders must stay as it is; more may come."""
    before = contents(*folders)
    yield
    after = contents(*folders)
    lost = {name for name, digest in before.items() if after.get(name) != digest}
    assert not lost, sorted(lost)


def write_volume(file: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), file)
    return file


def write_scan(file: Path, seed: int = 0) -> np.ndarray:
    """Write a scan; returns its label map: a sphere of 2 in a sphere of 1."""
    grid = np.meshgrid(*(np.arange(size) - size / 2 for size in SHAPE), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in grid))
    label = np.where(radius < 3, 2, np.where(radius < 6, 1, 0)).astype(np.uint8)
    noise = np.random.default_rng(seed).standard_normal(SHAPE)
    write_volume(file, (100 + 30 * label + 5 * noise).astype(np.float32))
    return label


def write_dataset(folder: Path, num_cases: int = 3) -> Path:
    """A labelled dataset in nnU-Net's raw format: case0, case1, ..."""
    for number in range(num_cases):
        label = write_scan(folder / "imagesTr" / f"case{number}_0000.nii.gz", number)
        write_volume(folder / "labelsTr" / f"case{number}.nii.gz", label)
    write_json(folder / "dataset.json", {
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, "shell": 1, "core": 2},
        "numTraining": num_cases, "file_ending": ".nii.gz",
    })  # fmt: skip
    return folder


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(file.read_text())
    edit(content)
    write_json(file, content)


def with_small_network(plans_file: Path) -> None:
    """Replace the network of a plan by one that a step of takes no time."""

    def edit(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["architecture"] = resenc()

    edit_json(plans_file, edit)


def build(folder: Path, call: Callable[[], tuple[str, str]]) -> Site:
    """Everything, through the four commands."""
    site = Site(folder, call)
    write_dataset(site.raw)
    for number in range(3):
        write_scan(site.scans / f"scan{number}.nii.gz", 10 + number)
    for number in range(2):
        write_scan(site.test_images / f"test{number}_0000.nii.gz", 20 + number)
    accepted(site.plan("-d", 5, "-c", "3d_fullres"))
    accepted(site.plan("-d", 701, "-c", "3d_fullres", "--images", site.scans))
    for dataset in (LABELLED, CORPUS):
        with_small_network(site.preprocessed(dataset) / "mfmPlans.json")
    accepted(site.pretrain())
    accepted(site.train(0))
    return site


def reader(capsys: pytest.CaptureFixture[str]) -> Callable[[], tuple[str, str]]:
    return lambda: tuple(capsys.readouterr())  # type: ignore[return-value]
