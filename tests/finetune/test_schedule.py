"""The rates of fine-tuning at every boundary, what is still until when, and resuming in the middle of a sawtooth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet import checkpoint
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.engine.optim import learning_rate_factor
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


def test_an_odd_first_phase_never_exceeds_the_peak() -> None:
    rates = [rate_factor(epoch, Phases(150, 50, 15), False) for epoch in range(150)]
    assert max(rates) == 1
    assert min(rates) > 0


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
        ({"decoder_epochs": 5}, "only finetune.schedule=sawtooth"),
        ({"schedule": "sawtooth", "train": "decoder"}, "finetune.train=all"),
        ({"ema_decay": 1.0}, "between 0 and 1"),
        ({"layer_decay": 0.0}, "above 0"),
        ({"layer_decay": 1.5}, "at most 1"),
        ({"lora_rank": 0}, "at least 1"),
        ({"lora_alpha": 0.0}, "above 0"),
        ({"batch_size": 0}, "at least 1"),
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


def test_a_fresh_start_at_the_release(here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step after the release is that of an optimizer which never saw these weights: lr (g + nesterov g)."""
    steps, gradients = record(monkeypatch), []
    clip = torch.nn.utils.clip_grad_norm_

    def clipping(parameters: Any, *arguments: Any) -> torch.Tensor:
        parameters = list(parameters)
        norm = clip(parameters, *arguments)
        gradients.append({id(p): p.grad.clone() for p in parameters if p.grad is not None})
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    trainers: list[MFMTrainer] = []
    start = MFMTrainer._start
    monkeypatch.setattr(MFMTrainer, "_start", lambda self: (trainers.append(self), start(self))[1])
    settings = ("finetune.weight_decay=0.0", "finetune.learning_rate=0.01")
    run(here, *SAWTOOTH, *settings, pretrained_weights=pretrained_file(tmp_path))
    stem = dict(trainers[0].network.named_parameters())[STEM]
    assert id(stem) not in gradients[0]  # not in the norm that is clipped
    step = steps[2]["weights"][STEM] - steps[1]["weights"][STEM]
    assert torch.allclose(step, -0.01 * 0.5 * 1.99 * gradients[2][id(stem)], atol=1e-7)


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


@pytest.mark.parametrize("train", ["decoder", "head"])
def test_an_adapted_stem_is_never_frozen(here: Workspace, tmp_path: Path, train: Any) -> None:
    """Its channels are copies of one kernel at first, and those of a cascade's labels zero."""
    for options in ({"channels": 2}, {"is_cascaded": True}):
        trainer = adapting_trainer(pretrained_file(tmp_path), FinetuneSettings(2, 1, 1, train=train), **options)
        stem = dict(trainer.network.named_parameters())[STEM]
        before = stem.detach().clone()
        assert torch.equal(before[:, 0], before[:, 1]) or not before[:, 1:].any()
        x = torch.randn(2, stem.shape[1], 16, 16, 16)
        take_step(trainer, {"data": x, "target": [torch.ones(2, 1, *[16 // step] * 3) for step in (1, 2)]})
        moved = {name for name, p in trainer.network.named_parameters() if p.grad is not None}
        assert {name for name in moved if name.startswith("encoder.")} == {STEM, STEM.replace("weight", "bias")}
        assert all(not torch.equal(before[:, c], stem[:, c]) for c in range(stem.shape[1]))
        assert all(not torch.equal(stem[:, 0], stem[:, c]) for c in range(1, stem.shape[1]))
    plain = adapting_trainer(pretrained_file(tmp_path), FinetuneSettings(2, 1, 1, train=train))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_validation_by_nnunet_computes_as_training_does(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    seen = []
    stock = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer.perform_actual_validation"
    monkeypatch.setattr(stock, lambda *_: seen.append(torch.get_autocast_dtype("cuda")))
    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", VALIDATION)
    trainer = make_trainer()
    trainer.initialize()
    trainer.is_cascaded, trainer.autocast_dtype = True, dtype
    trainer.perform_actual_validation()
    assert (seen, torch.get_autocast_dtype("cuda")) == ([dtype], torch.float16)


def test_averages_hold_the_same_on_one_gpu_and_on_several(here: Workspace, tmp_path: Path) -> None:
    settings = FinetuneSettings(train="head", ema_decay=0.9, epochs=2)
    names = []
    for is_ddp in (False, True):
        trainer = make_trainer(block=MFMBlock(finetune=settings))
        trainer.pretrained_checkpoint = pretrained_file(tmp_path)
        trainer.initialize()
        trainer.is_ddp = is_ddp
        trainer.prepare(trainer.new_weights)
        assert trainer.optimisation.average is not None
        names.append(set(trainer.optimisation.average.state_dict()))
    assert names[0] == names[1]
    assert names[0] <= {name for name in names[0] if "seg_layers" in name}


# Resuming


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
