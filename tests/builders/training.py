"""Trainers, checkpoints and steps of fine-tuning on the tiny dataset of :mod:`tests.builders.tiny`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from mfm_nnunet import checkpoint
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.fold import FoldRun
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.settings import MFMBlock
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny
from tests.builders.architectures import resenc
from tests.builders.tiny import run_training

CPU = torch.device("cpu")
STEM = "encoder.stem.convs.0.conv.weight"
WITHOUT_LOSS = {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
"""nnU-Net gives the coarsest output of deep supervision a weight of zero, so its layer never learns."""


class Killed(BaseException):
    """Ends a run as a kill does: nothing of ours catches it."""


def make_trainer(configuration: str = "3d_fullres", block: MFMBlock | None = None, **changes: Any) -> MFMTrainer:
    """A trainer as stock's command makes it; ``changes`` are of the plan."""
    plans = {**tiny.plans(block=block or MFMBlock(finetune=tiny.FINETUNE, num_workers=0)), **changes}
    dataset_json = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "inner": 1, "outer": 2}}
    dataset_json |= {"file_ending": ".nii.gz", "numTraining": 6, "training": ["/home/somebody/subject-42.nii.gz"]}
    return MFMTrainer({**plans, "continue_training": False}, configuration, 0, dataset_json, CPU)


def initialised(
    configuration: str = "3d_fullres", file: Path | None = None, plan: dict[str, Any] | None = None, **settings: Any
) -> MFMTrainer:
    """An initialised trainer with these fine-tuning settings, from the checkpoint ``file`` if there is one."""
    block = MFMBlock(finetune=dataclasses.replace(tiny.FINETUNE, **settings), num_workers=0)
    trainer = make_trainer(configuration, block, **(plan or {}))
    trainer.pretrained_checkpoint = file
    trainer.initialize()
    return trainer


def pretrained_file(folder: Path, architecture: dict[str, Any] | None = None, num_outputs: int = 1) -> Path:
    """A checkpoint as pretraining writes it."""
    architecture = architecture or resenc()
    torch.manual_seed(99)
    network = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        1, num_outputs, deep_supervision=False,
    )  # fmt: skip
    patch = (16,) * (2 if str(architecture["arch_kwargs"].get("conv_op")).endswith("2d") else 3)
    plans = tiny.plans("mfmPretrained", pretrained=tiny.configuration(architecture, patch))
    about = {"format": 1, "kind": "pretrained", "pretext": "mae", "plans": plans, "configuration": "pretrained"}
    file = folder / "some_pretrained.pth"
    weights = checkpoint.cpu_weights(network.state_dict())
    checkpoint.save({"network_weights": weights, "mfm": about}, file)
    return file


def first_batches(trainer: MFMTrainer) -> Iterator[dict[str, Any]]:
    """The batches of training, from the first one on."""
    return FoldRun(trainer).training_batches(0)


def take_step(trainer: MFMTrainer, batch: dict[str, Any] | None = None, number: int = 0) -> float:
    """One step of the engine, by default on the first batch; returns the loss."""
    return trainer.make_engine().step(batch if batch is not None else next(first_batches(trainer)), number)


def train(here: Workspace, *settings: str, **options: Any) -> Path:
    """A whole run of fold 0 of 3d_fullres, where ``options`` name no other; returns its folder."""
    configuration, fold = options.pop("configuration", "3d_fullres"), options.pop("fold", 0)
    overrides = (*settings, *options.pop("overrides", ()))
    return run_training(here, tiny.NAME, configuration, fold, overrides=overrides, device="cpu", **options)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run end, as if killed, before optimisation step ``step`` (0-based)."""
    take = Engine.step

    def interrupted(self: Engine, batch: Any, number: int) -> float:
        if number == step:
            raise Killed
        return take(self, batch, number)

    monkeypatch.setattr(Engine, "step", interrupted)


def state_of(folder: Path) -> dict[str, Any]:
    """What must be equal in equal runs: everything but the time."""
    content = checkpoint.load(folder / "checkpoint_final.pth")
    logging = {key: value for key, value in content["logging"].items() if "timestamps" not in key}
    settings = content.pop("mfm"), content["init_args"]["plans"]["mfm"].pop("num_workers")
    assert settings[0]["kind"] == "finetuned"
    return {**content, "logging": logging}


def require_equal(a: Any, b: Any, name: str = "") -> None:
    """Assert that two nests of dicts, lists and tensors are equal bit for bit."""
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


def refused(code: str, message: str, call: Callable[[], Any]) -> None:
    """Assert that a call raises MFMError with this code and these words."""
    with pytest.raises(MFMError) as caught:
        call()
    assert caught.value.code == code, caught.value
    assert message in caught.value.message, caught.value.message
