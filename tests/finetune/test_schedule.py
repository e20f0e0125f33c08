"""The rates of fine-tuning at every boundary, what is still until when, and resumed runs that equal unbroken ones."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet import checkpoint
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.engine.optim import learning_rate_factor, make_optimizer
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.fold import FoldRun
from mfm_nnunet.finetune.groups import EpochSchedule, Group, Phases, rate_factor
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.models.transfer import unwrapped
from mfm_nnunet.settings import FinetuneSettings, MFMBlock, require_legal, resolved_decoder_epochs
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny
from tests.builders.architectures import resenc
from tests.builders.training import (
    STEM,
    WITHOUT_LOSS,
    Killed,
    first_batches,
    initialised,
    kill_at,
    make_trainer,
    pretrained_file,
    refused,
    require_equal,
    state_of,
    take_step,
    train,
)

SAWTOOTH = (
    *("finetune.schedule=sawtooth", "finetune.decoder_epochs=2", "finetune.warmup_epochs=2", "finetune.epochs=6"),
    *("finetune.iterations_per_epoch=1", "finetune.validation_iterations=1", "num_workers=0"),
)
VALIDATION = MFMTrainer.perform_actual_validation
"""Other tests here end without it."""


# Rates


def table(epoch: int, first: int, ramp: int, epochs: int) -> tuple[float, float]:
    """Shares of the peak for new and for transferred weights, as published (lengths D, W and E)."""
    if epoch < first / 2:
        return (epoch + 1) / (first / 2), 0.0
    if epoch < first:
        return (1 - (epoch - first / 2) / (first / 2)) ** 0.9, 0.0
    if epoch < first + ramp:
        return ((epoch - first + 1) / ramp,) * 2
    return ((1 - (epoch - first - ramp) / (epochs - first - ramp)) ** 0.9,) * 2


@pytest.mark.parametrize(("first", "ramp", "epochs"), [(50, 50, 1000), (14, 14, 150), (2, 1, 10), (4, 8, 20)])
def test_the_sawtooth_is_the_published_table(first: int, ramp: int, epochs: int) -> None:
    phases = Phases(epochs, ramp, first)
    boundaries = (0, first // 2 - 1, first // 2, first - 1, first, first + ramp - 1, first + ramp, epochs - 1)
    for epoch in boundaries:
        rates = rate_factor(epoch, phases, False), rate_factor(epoch, phases, True)
        assert rates == pytest.approx(table(epoch, first, ramp, epochs)), epoch


def test_the_ramp_reaches_the_peak_and_equal_lengths_have_their_own_phases() -> None:
    """Published code divides the ramp by D + W, and with D = W never returns its ramp."""
    phases = Phases(1000, 50, 50)
    assert [rate_factor(epoch, phases, True) for epoch in (49, 50, 74, 99, 100)] == pytest.approx([0, 0.02, 0.5, 1, 1])


def test_the_warm_up_is_as_before() -> None:
    for epoch in range(20):
        for waits in (True, False):
            assert rate_factor(epoch, Phases(20, 4), waits) == learning_rate_factor(epoch, 20, 4)


def test_rates_of_groups_are_scaled_and_need_no_state() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], 1.0)
    groups = (Group(("new",)), Group(("late",), waits=True), Group(("early",), waits=True, scale=0.5))
    schedule = EpochSchedule(optimizer, groups, 0.1, Phases(20, 4, 4))
    seen = {}
    for epoch in (5, 0, 7, 3, 5):
        schedule.step(epoch)
        seen.setdefault(epoch, [group["lr"] for group in optimizer.param_groups])
        assert seen[epoch] == [group["lr"] for group in optimizer.param_groups]
    assert seen[0] == pytest.approx([0.05, 0, 0])
    assert seen[7] == pytest.approx([0.1, 0.1, 0.05])
    assert schedule.trained_names(3) == {"new"}
    assert schedule.trained_names(4) == {"new", "late", "early"}


@pytest.mark.parametrize(("epochs", "expected"), [(1000, 50), (300, 15), (150, 15), (20, 2), (6, 2)])
def test_the_default_length_of_the_first_phase(epochs: int, expected: int) -> None:
    assert resolved_decoder_epochs(FinetuneSettings(epochs=epochs, schedule="sawtooth")) == expected
    assert resolved_decoder_epochs(FinetuneSettings(epochs=epochs)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "sawtooth", "decoder_epochs": 1}, "decoder_epochs=1: must be at least 2"),
        ({"schedule": "sawtooth", "epochs": 2}, "the first phase (2 epochs)"),
        ({"schedule": "sawtooth", "epochs": 10, "decoder_epochs": 6, "warmup_epochs": 5}, "finetune.epochs=10"),
        ({"decoder_epochs": 5}, "needs finetune.schedule=sawtooth"),
        ({"schedule": "sawtooth", "train": "decoder"}, "finetune.train=all"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MFMError) as caught:
        require_legal(FinetuneSettings(**changes), "finetune.")
    assert caught.value.code == "E_CONFIG"
    assert message in caught.value.message


# What is still until when


def run(here: Workspace, *settings: str, configuration: str = "3d_fullres", **options: Any) -> Path:
    return train(here, *settings, configuration=configuration, **options)


def record(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """After every step: which parameters have a gradient, the weights, and the optimizer's state."""
    steps: list[dict[str, Any]] = []
    take = Engine.step

    def recording(self: Engine, batch: Any, number: int) -> float:
        loss, named = take(self, batch, number), dict(self._task.network.named_parameters())
        steps.append(
            {
                "gradients": {name for name, p in named.items() if p.grad is not None},
                "weights": {name: p.detach().clone() for name, p in named.items()},
                "remembered": {name for name, p in named.items() if p in self._optimisation.optimizer.state},
            }
        )
        return loss

    monkeypatch.setattr(Engine, "step", recording)
    return steps


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name, weight in after["weights"].items() if not torch.equal(before["weights"][name], weight)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_encoder_is_still_until_the_first_phase_ends(
    here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    steps = record(monkeypatch)
    file = pretrained_file(tmp_path)
    run(here, *SAWTOOTH, f"finetune.optimizer={optimizer}", "finetune.weight_decay=0.1", pretrained_weights=file)
    source = checkpoint.load_weights(file)["network_weights"]
    everything = set(steps[0]["weights"]) - WITHOUT_LOSS
    encoder = {name for name in everything if name.startswith("encoder.")}
    for step in steps[:2]:
        assert step["gradients"] == step["remembered"] == everything - encoder  # no momentum fills up meanwhile
        assert all(torch.equal(step["weights"][name], source[name]) for name in encoder)
    decoder = {name for name in everything - encoder if name.endswith(("conv.weight", "transpconvs.0.weight"))}
    assert decoder <= changed(steps[0], steps[1])  # it came from the checkpoint too
    # A bias in front of a norm may have a gradient of exactly zero.
    assert {name for name in everything if name.endswith("conv.weight")} <= changed(steps[1], steps[2])
    assert steps[2]["gradients"] == steps[2]["remembered"] == everything


def test_an_adapted_stem_learns_from_the_start_and_once(
    here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published code lists the stem twice among the parameters when the channels differ."""
    trainer = sawtooth_trainer(pretrained_file(tmp_path))
    plain = trainer.lr_scheduler.trained_names(0)
    assert plain == {name for name, _ in trainer.network.named_parameters() if not name.startswith("encoder.")}
    trainer = sawtooth_trainer(pretrained_file(tmp_path), channels=2)
    assert trainer.lr_scheduler.trained_names(0) - plain == {STEM, STEM.replace("weight", "bias")}
    listed = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in trainer.network.parameters())


def test_an_adapted_stem_is_never_frozen(here: Workspace, tmp_path: Path) -> None:
    """Its channels are copies of one kernel at first, and those of a cascade's labels zero."""
    for part, options in (("decoder", {"channels": 2}), ("head", {"is_cascaded": True})):
        trainer = adapting_trainer(pretrained_file(tmp_path), FinetuneSettings(2, 1, 1, train=part), **options)  # type: ignore[arg-type]
        stem = dict(trainer.network.named_parameters())[STEM]
        before = stem.detach().clone()
        assert torch.equal(before[:, 0], before[:, 1]) or not before[:, 1:].any()
        x = torch.randn(2, stem.shape[1], 16, 16, 16)
        take_step(trainer, {"data": x, "target": [torch.ones(2, 1, *[16 // step] * 3) for step in (1, 2)]})
        moved = {name for name, p in trainer.network.named_parameters() if p.grad is not None}
        assert {name for name in moved if name.startswith("encoder.")} == {STEM, STEM.replace("weight", "bias")}
        assert all(not torch.equal(before[:, c], stem[:, c]) for c in range(stem.shape[1]))
        assert all(not torch.equal(stem[:, 0], stem[:, c]) for c in range(1, stem.shape[1]))
    plain = adapting_trainer(pretrained_file(tmp_path), FinetuneSettings(2, 1, 1, train="head"))
    assert STEM not in plain.lr_scheduler.all_trained_names()


def test_a_run_in_which_other_weights_learned_does_not_go_on(here: Workspace, tmp_path: Path) -> None:
    """As one of a version that kept adapted stems still."""
    settings = FinetuneSettings(2, 1, 1, train="decoder")
    trainer = adapting_trainer(pretrained_file(tmp_path), settings, channels=2)
    take_step(trainer, {"data": torch.randn(2, 2, 16, 16, 16), "target": [torch.ones(2, 1, *[s] * 3) for s in (16, 8)]})
    content = trainer.make_checkpoint()
    (group,) = content["optimizer_state"]["param_groups"]
    group["params"] = group["params"][2:]
    refused("E_CONFIG", "trained other weights", lambda: trainer.load_checkpoint(content))


def sawtooth_trainer(
    file: Path, channels: int = 1, epochs: int = 20, features: tuple[int, ...] = (4, 8, 8)
) -> MFMTrainer:
    """An initialised trainer with a sawtooth of the default lengths."""
    return adapting_trainer(file, FinetuneSettings(epochs, 1, 1, schedule="sawtooth"), channels, features)


def adapting_trainer(
    file: Path,
    settings: FinetuneSettings,
    channels: int = 1,
    features: tuple[int, ...] = (4, 8, 8),
    is_cascaded: bool = False,
) -> MFMTrainer:
    """An initialised trainer whose network has one or more images as input, or the labels of a first stage too."""
    configuration = tiny.configuration(resenc(features=features))
    configuration |= {
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        **({"previous_stage": "2d"} if is_cascaded else {}),
    }
    plans = tiny.plans(block=MFMBlock(finetune=settings, num_workers=0), **{"3d_fullres": configuration})
    dataset_json = {"channel_names": {str(c): "MRI" for c in range(channels)}, "file_ending": ".nii.gz"}
    dataset_json |= {"labels": {"background": 0, "inner": 1, "outer": 2}, "numTraining": 6}
    trainer = MFMTrainer({**plans, "continue_training": False}, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.pretrained_checkpoint = file
    trainer.initialize()
    return trainer


def test_from_scratch_the_sawtooth_is_the_warm_up_of_equal_length(here: Workspace) -> None:
    settings = SAWTOOTH[2:]
    plain = run(here, *settings)
    wanted = checkpoint.load(plain / "checkpoint_final.pth")["network_weights"]
    plain.parent.rename(here.results / "plain")
    folder = run(here, *SAWTOOTH)
    require_equal(checkpoint.load(folder / "checkpoint_final.pth")["network_weights"], wanted)
    (log,) = folder.glob("training_log*.txt")
    assert "nothing came from a checkpoint" in log.read_text()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_under_data_parallelism_a_run_is_the_same(
    here: Workspace, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Published code crashes there. DistributedDataParallel computes gradients of the still ones too; they are dropped.

    The network has no pyramid, in which nnU-Net itself gives one output no loss.
    """
    file, results = pretrained_file(tmp_path, resenc(features=(4, 8))), []
    for is_wrapped in (False, True):
        trainer = sawtooth_trainer(file, epochs=6, features=(4, 8))
        batch = next(first_batches(trainer))
        if is_wrapped:
            request.getfixturevalue("process_group")
            trainer.network, trainer.is_ddp = torch.nn.parallel.DistributedDataParallel(trainer.network), True
            trainer.prepare(trainer.new_weights)
        network, fold = unwrapped(trainer.network), FoldRun(trainer)
        for epoch in range(4):
            fold.begin_epoch(epoch)
            take_step(trainer, batch)
            results.append({name: p.detach().clone() for name, p in network.named_parameters()})
    require_equal(results[4:], results[:4])
    assert torch.equal(results[5][STEM], checkpoint.load_weights(file)["network_weights"][STEM])
    assert not torch.equal(results[6][STEM], results[5][STEM])


def test_outputs_that_nothing_uses_do_not_stop_data_parallelism(
    here: Workspace, request: pytest.FixtureRequest
) -> None:
    """Without deep supervision, DistributedDataParallel would wait for the gradients of all outputs but the last."""
    settings = FinetuneSettings(epochs=2, iterations_per_epoch=2, deep_supervision=False)
    trainer = make_trainer(block=MFMBlock(finetune=settings, num_workers=0))
    trainer.initialize()
    batch = next(first_batches(trainer))
    request.getfixturevalue("process_group")
    outputs = trainer.label_manager.num_segmentation_heads
    network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, trainer.num_input_channels, outputs, False
    )
    trainer.network, trainer.is_ddp = torch.nn.parallel.DistributedDataParallel(network), True  # as nnU-Net: at once
    trainer.prepare(None)
    FoldRun(trainer).begin_epoch(0)
    for _ in range(3):
        take_step(trainer, batch)
    assert len(unwrapped(trainer.network).decoder.seg_layers) == 2  # type: ignore[union-attr, arg-type]


def test_compiled_code_notices_that_the_encoder_learns_from_now_on(here: Workspace, tmp_path: Path) -> None:
    trainer = sawtooth_trainer(pretrained_file(tmp_path, resenc(features=(4, 8))), epochs=6, features=(4, 8))
    trainer.network = torch.compile(trainer.network, backend="aot_eager")
    trainer.prepare(trainer.new_weights)
    stem = dict(unwrapped(trainer.network).named_parameters())[STEM]
    batch = next(first_batches(trainer))
    stems, fold = [stem.detach().clone()], FoldRun(trainer)
    for epoch in range(4):
        fold.begin_epoch(epoch)
        take_step(trainer, batch)
        stems.append(stem.detach().clone())
    assert torch.equal(stems[0], stems[2])
    assert not torch.equal(stems[2], stems[3])


def test_validation_by_nnunet_computes_as_training_does(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, dtype = [], torch.bfloat16
    stock = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer.perform_actual_validation"
    monkeypatch.setattr(stock, lambda *_: seen.append(torch.get_autocast_dtype("cuda")))
    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", VALIDATION)
    trainer = initialised()
    trainer.is_cascaded, trainer.autocast_dtype = True, dtype
    trainer.perform_actual_validation()
    assert (seen, torch.get_autocast_dtype("cuda")) == ([dtype], torch.float16)


@pytest.mark.parametrize("configuration", ["3d_fullres", "primus"])
def test_resuming_at_every_boundary_is_exact(
    here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: str
) -> None:
    """D = W = 2: stopped at D-1, D, D+W-1 and D+W, each time by another process' worth of state."""
    architecture = tiny.drop_path_primus() if configuration == "primus" else None
    file = pretrained_file(tmp_path, architecture)
    settings = (*SAWTOOTH, "finetune.weight_decay=0.1")
    if architecture:
        settings += ("finetune.optimizer=adamw", "finetune.layer_decay=0.5", "finetune.ema_decay=0.9")
    folder = run(here, *settings, configuration=configuration, pretrained_weights=file)
    wanted = state_of(folder)
    folder.parent.rename(here.results / "unbroken")
    for number, epoch in enumerate((1, 2, 3, 4)):  # of one step each
        options: dict[str, Any] = {"continue_training": True} if number else {"pretrained_weights": file}
        with monkeypatch.context() as patch:
            kill_at(patch, epoch)
            with pytest.raises(Killed):
                run(here, *(() if number else settings), configuration=configuration, **options)
    run(here, configuration=configuration, continue_training=True)
    require_equal(state_of(folder), wanted)


def test_a_run_goes_on_with_the_phases_that_it_began_with(here: Workspace, tmp_path: Path) -> None:
    """Those of earlier versions held a transferred decoder still too."""
    file = pretrained_file(tmp_path)
    trainer = sawtooth_trainer(file)
    heads = {name for name, _ in trainer.network.named_parameters() if name.startswith("decoder.seg_layers.")}
    trainer.prepare(heads)
    trainer.logger.log("epoch_end_timestamps", 1.0, 0)
    content = trainer.make_checkpoint()
    continued = sawtooth_trainer(file)
    continued.load_checkpoint(content)
    assert continued.lr_scheduler.trained_names(0) == heads


def test_without_the_names_of_what_is_new_a_run_cannot_go_on(here: Workspace, tmp_path: Path) -> None:
    folder = run(here, *SAWTOOTH, pretrained_weights=pretrained_file(tmp_path))
    file = folder / "checkpoint_final.pth"
    content = checkpoint.load(file)
    del content["mfm"]["new_weights"]
    checkpoint.save(content, file)
    refused("E_MODEL_CORRUPT", "mfm.new_weights", lambda: run(here, continue_training=True))


def test_adamw_has_the_published_moments() -> None:
    (group,) = make_optimizer([torch.nn.Parameter(torch.zeros(1))], "adamw", 1e-3, 0.05).param_groups
    assert (group["betas"], group["lr"], group["weight_decay"]) == ((0.9, 0.98), 1e-3, 0.05)


# Resuming

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
