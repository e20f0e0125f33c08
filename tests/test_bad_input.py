"""Bad input through the commands: one clear error, the documented exit code, nothing lost.

What the parts do with each kind of damage is tested beside them (``tests/data/test_reading.py`` and others); here a
person types a command.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from mfm_nnunet import checkpoint
from mfm_nnunet.cli import plan_and_preprocess, predict, pretrain, train
from tests.cli.test_demo import make_dataset

NAME = "Dataset001_Small"
RUN = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "pretrain.validation_iterations=1", "num_workers=0")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A workspace with a good labelled dataset of five volumes."""
    folder = tmp_path / "workspace"
    make_dataset(folder / "nnUNet_raw" / NAME, 5, is_2d=False)
    return folder


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, planned and preprocessed, with a pretrained checkpoint."""
    folder = tmp_path_factory.mktemp("planned") / "workspace"
    make_dataset(folder / "nnUNet_raw" / NAME, 5, is_2d=False)
    line = ["--workspace", str(folder)]
    assert plan_and_preprocess.main(["-d", "1", "-c", "3d_fullres", *line]) == 0
    assert pretrain.main(["1", "3d_fullres", *line, "--set", *RUN]) == 0
    return folder


def images(site: Path) -> list[Path]:
    return sorted((site / "nnUNet_raw" / NAME / "imagesTr").iterdir())


def labels(site: Path) -> list[Path]:
    return sorted((site / "nnUNet_raw" / NAME / "labelsTr").iterdir())


def fails(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], line: list[str], *words: str, code: int = 2
) -> None:
    """The command ends with ``code`` and a short message that holds all ``words``."""
    capsys.readouterr()
    try:
        result = main(line)
    except SystemExit as stop:
        result = int(stop.code or 0)
    error = capsys.readouterr().err
    message = "\n".join(error.splitlines()[-7:])
    assert result == code, error
    assert "Traceback" not in error
    for word in words:
        assert word in error, message


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    image = nibabel.load(file)
    data = change(np.asarray(image.dataobj))
    nibabel.save(nibabel.Nifti1Image(data, image.affine if affine is None else affine), file)


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(np.float32)
        data[2, 3, 4] = value
        return data

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing image": (lambda s: images(s)[1].unlink(), ("E_NOT_FOUND", "case1_0000.nii.gz")),
    "missing label": (lambda s: labels(s)[1].unlink(), ("E_NOT_FOUND",)),
    "empty image": (lambda s: images(s)[1].write_bytes(b""), ("E_EMPTY",)),
    "truncated image": (lambda s: images(s)[1].write_bytes(images(s)[1].read_bytes()[:-100]), ("E_GZIP_TRUNCATED",)),
    "not an image": (lambda s: images(s)[1].write_text("<html>404</html>"), ("E_FORMAT",)),
    "NaN voxel": (lambda s: rewrite(images(s)[1], with_value(np.nan)), ("E_NONFINITE",)),
    "infinite voxel": (lambda s: rewrite(images(s)[1], with_value(np.inf)), ("E_NONFINITE",)),
    "4D image": (lambda s: rewrite(images(s)[1], lambda d: np.stack([d, d], -1)), ("E_DIM",)),
    "label of another shape": (lambda s: rewrite(labels(s)[1], lambda d: d[:-1]), ("E_LABEL_GEOMETRY",)),
    "label of another spacing": (
        lambda s: rewrite(labels(s)[1], lambda d: d, np.diag([1, 1, 2.5, 1])),
        ("E_LABEL_GEOMETRY",),
    ),
    "label of another direction": (
        lambda s: rewrite(labels(s)[1], lambda d: d, np.diag([-1, 1, 1, 1])),
        ("E_LABEL_GEOMETRY",),
    ),
    "unknown label value": (lambda s: rewrite(labels(s)[1], lambda d: d + 7), ("E_LABEL_VALUE",)),
    "no label at all": (lambda s: [rewrite(f, lambda d: d * 0) for f in labels(s)], ("E_LABEL_VALUE",)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_datasets_are_refused_whole(site: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGE[kind]
    damage(site)
    line = ["-d", "1", "-c", "3d_fullres", "--workspace", str(site)]
    fails(capsys, plan_and_preprocess.main, line, *words)
    assert not list((site / "nnUNet_preprocessed").rglob("*.b2nd"))


def test_bad_scans_of_a_corpus_cost_no_others(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for file in images(site):
        (scans / file.name).write_bytes(file.read_bytes())
    (scans / "broken.nii.gz").write_bytes(images(site)[0].read_bytes()[:500])
    line = ["-d", "7", "--images", str(scans), "--name", "Scans", "--workspace", str(site)]
    fails(capsys, plan_and_preprocess.main, line, "broken", "E_GZIP_TRUNCATED", code=3)
    assert len(list((site / "nnUNet_preprocessed" / "Dataset007_Scans").rglob("*.b2nd"))) == 5


@pytest.mark.parametrize(
    ("main", "line", "words"),
    [
        (plan_and_preprocess.main, ["-d", "2"], ["no dataset 2"]),
        (pretrain.main, ["1", "3d_fulres"], ["Did you mean '3d_fullres'"]),
        (pretrain.main, ["1", "3d_fullres", "--pretext", "mea"], ["Did you mean 'mae'"]),
        (pretrain.main, ["1", "3d_fullres", "--set", "pretrain.epoch=3"], ["Did you mean 'pretrain.epochs'"]),
        (pretrain.main, ["1", "3d_fullres", "-p", "mfmPlan"], ["Did you mean 'mfmPlans'"]),
        (pretrain.main, ["1", "3d_fullres"], ["E_EXISTS", "--c"]),
        (train.main, ["1", "3d_fullres", "9"], ["E_CONFIG", "fold"]),
        (train.main, ["1", "3d_fullres", "0", "-tr", "MFMTrainr"], ["Did you mean 'MFMTrainer'"]),
        (train.main, ["1", "3d_fullres", "0", "--c"], ["E_NOT_FOUND"]),
        (train.main, ["1", "3d_fullres", "0", "--set", "finetune.epoch=3"], ["Did you mean 'finetune.epochs'"]),
        (train.main, ["1", "3d_fullres", "0", "-pretrained_weight", "x"], ["-pretrained_weights"]),
        (predict.main, ["-i", "none", "-o", "out", "-d", "1", "-c", "3d_fullres", "-f", "0"], ["E_NOT_FOUND"]),
    ],
)
def test_unknown_names_get_the_nearest_legal_one(
    planned: Path, main: Callable[[list[str]], int], line: list[str], words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = tree(planned)
    fails(capsys, main, [*line, "--workspace", str(planned)], *words)
    assert before.items() <= tree(planned).items()


def other_network(planned: Path, file: Path) -> None:
    content = checkpoint.load(trained(planned))
    content["network_weights"] = {name: torch.zeros(7) for name in content["network_weights"]}
    checkpoint.save(content, file)


def trained(planned: Path) -> Path:
    return next((planned / "nnUNet_results").rglob("checkpoint_final.pth"))


CHECKPOINTS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda planned, file: None, "E_NOT_FOUND"),
    "empty": (lambda planned, file: file.write_bytes(b""), "E_EMPTY"),
    "text": (lambda planned, file: file.write_text("hello"), "E_MODEL_CORRUPT"),
    "truncated": (lambda p, file: file.write_bytes(trained(p).read_bytes()[:-5000]), "E_MODEL_CORRUPT"),
    "without weights": (lambda planned, file: torch.save({"a": 1}, file), "E_MODEL_CORRUPT"),
    "unsafe": (lambda planned, file: torch.save({"network_weights": print}, file), "E_MODEL_UNSAFE"),
    "of another network": (other_network, "E_MODEL_MISMATCH"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_bad_checkpoints(planned: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, code = CHECKPOINTS[kind]
    file = tmp_path / "weights.pth"
    make(planned, file)
    line = ["1", "3d_fullres", "0", "-pretrained_weights", str(file), "--workspace", str(planned)]
    fails(capsys, train.main, [*line, "--set", "finetune.epochs=1"], code, "weights.pth")


@pytest.mark.parametrize("num_cases", [1, 2, 4])
def test_few_cases(tmp_path: Path, num_cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One case has no folds; two to four are left out one at a time, and there is no fold beyond."""
    site = tmp_path / "workspace"
    make_dataset(site / "nnUNet_raw" / NAME, num_cases, is_2d=False)
    assert plan_and_preprocess.main(["-d", "1", "-c", "3d_fullres", "--workspace", str(site)]) == 0
    fold = 0 if num_cases == 1 else num_cases
    fails(capsys, train.main, ["1", "3d_fullres", str(fold), "--workspace", str(site)], "E_CONFIG", "fold")


@pytest.mark.parametrize("content", ["{", "[]", '{"plans_name": "mfmPlans"}'])
def test_broken_plans(planned: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = planned / "nnUNet_preprocessed" / NAME / "mfmBroken.json"
    file.write_text(content)
    line = ["1", "3d_fullres", "-p", "mfmBroken", "--workspace", str(planned)]
    fails(capsys, pretrain.main, line, "mfmBroken.json")
    file.unlink()


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash, but for the log of errors."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "mfm_error.log"]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_json_of_a_dataset(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = site / "nnUNet_raw" / NAME / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text("{")
    fails(capsys, plan_and_preprocess.main, ["-d", "1", "--workspace", str(site)], "dataset.json")
    file.write_text(json.dumps({**content, "labels": {"background": 0, "a": 1, "b": 5}}))
    fails(capsys, plan_and_preprocess.main, ["-d", "1", "--workspace", str(site)], "dataset.json")
