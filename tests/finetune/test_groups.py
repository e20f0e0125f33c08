"""Who learns with each ``finetune.train``, at which share of the rate, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mfm_nnunet import checkpoint
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.loading import make_loaders, seeded
from mfm_nnunet.finetune.settings import advise, advise_as_begun, require_effect, require_same, resolve
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.models.families import family_named, family_of
from mfm_nnunet.settings import FinetuneSettings, MFMBlock
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny
from tests.builders.tiny import run_training
from tests.builders.tiny_plans import tiny_network
from tests.builders.training import (
    WITHOUT_LOSS,
    first_batches,
    make_trainer,
    pretrained_file,
    refused,
    take_step,
    train,
)
from tests.models.test_transfer import primus, resenc


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Workspace]:
    tiny.make(tmp_path)
    with use(tmp_path) as workspace:
        yield workspace


def names_of(network: nn.Module) -> set[str]:
    return {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize("make", [resenc, primus])
def test_the_default_is_one_group_in_the_networks_order(make: Any) -> None:
    """So that optimizer states of older runs, and of stock nnU-Net, fit."""
    network = make()
    for new in (None, family_of(network).head_names(network)):
        (group,) = groups.group_parameters(network, FinetuneSettings(), new)
        assert list(group.names) == [name for name, _ in network.named_parameters()]
        assert (group.waits, group.scale) == (False, 1.0)


@pytest.mark.parametrize("make", [resenc, primus])
def test_who_learns(make: Any) -> None:
    network = make()
    encoder = family_of(network).encoder_names(network)
    assert groups.trained_names(network, "decoder") == names_of(network) - encoder
    assert groups.trained_names(network, "head") == family_of(network).head_names(network)
    new = family_of(network).head_names(network)
    first, second = groups.group_parameters(network, FinetuneSettings(schedule="sawtooth"), new)
    assert (set(first.names), set(second.names)) == (new, names_of(network) - new)
    assert (first.waits, second.waits) == (False, True)


def test_the_decoder_of_a_u_net_is_what_is_not_encoder() -> None:
    """``network.decoder`` of nnU-Net holds the encoder too; published code froze nothing for that reason."""
    network = resenc()
    assert {id(p) for p in network.encoder.parameters()} <= {id(p) for p in network.decoder.parameters()}
    learning = groups.trained_names(network, "decoder")
    parameters = dict(network.named_parameters())
    assert not {id(parameters[name]) for name in learning} & {id(p) for p in network.encoder.parameters()}


def test_layer_decay_of_primus() -> None:
    network = primus()
    decayed = groups.group_parameters(network, FinetuneSettings(layer_decay=0.5), None)
    scales = {name: group.scale for group in decayed for name in group.names}
    assert scales.keys() == names_of(network)
    assert scales["eva.blocks.0.attn.q_proj.weight"] == 0.5
    assert scales["eva.pos_embed"] == scales["down_projection.proj.weight"] == 0.25
    assert scales["eva.norm.weight"] == scales["up_projection.decode.0.0.weight"] == 1
    assert [group.scale for group in decayed] == [1, 0.5, 0.25]
    deep = tiny_network("primus", (16, 16, 16), eva_depth=4)
    assert [groups.layer_scale(f"eva.blocks.{i}.norm", deep, 0.5) for i in range(4)] == [0.5**4, 0.5**3, 0.5**2, 0.5]


def test_holding_still() -> None:
    network = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2), nn.Conv3d(2, 1, 1)).train()
    still = groups.freeze(network, {"2.weight", "2.bias"}, keep_gradients=False)
    assert len(still) == 4
    assert [p.requires_grad for p in network.parameters()] == [False] * 4 + [True] * 2
    network(torch.rand(1, 1, 2, 2, 2)).sum().backward()
    assert torch.equal(network[1].running_mean, torch.zeros(2))
    network.train()
    assert groups.freeze(network, names_of(network), keep_gradients=False) == []
    assert all(p.requires_grad for p in network.parameters())
    assert network[1].training


def test_on_several_gpus_gradients_of_the_still_are_dropped_before_clipping(
    here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DistributedDataParallel expects them, so they are computed there; the step must be the one without them."""
    weights, seen = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def clipping(parameters: Any, *arguments: Any) -> torch.Tensor:
        parameters = list(parameters)
        seen.append(sum(p.grad is not None for p in parameters))
        return clip(parameters, *arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipping)
    for keep in (False, True):
        settings = dataclasses.replace(tiny.FINETUNE, train="decoder", gradient_clip=0.01, weight_decay=0.1)
        trainer = make_trainer(block=MFMBlock(finetune=settings, num_workers=0))
        trainer.pretrained_checkpoint = pretrained_file(tmp_path)
        trainer.initialize()
        trained = trainer.lr_scheduler.trained_names(0)
        trainer.optimisation.frozen = groups.freeze(trainer.network, trained, keep)
        for _ in range(2):
            take_step(trainer)
        weights.append({name: p.detach().clone() for name, p in trainer.network.named_parameters()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert set(seen) == {len(trained - WITHOUT_LOSS)}


@pytest.mark.parametrize(
    ("train", "configuration"), [("decoder", "3d_fullres"), ("head", "3d_fullres"), ("head", "primus")]
)
def test_what_is_frozen_never_moves(here: Workspace, tmp_path: Path, train: str, configuration: str) -> None:
    architecture = tiny.drop_path_primus() if configuration == "primus" else None
    settings = dataclasses.replace(tiny.FINETUNE, train=train, weight_decay=0.1, ema_decay=0.5)
    trainer = make_trainer(configuration, block=MFMBlock(finetune=settings, num_workers=0))
    trainer.pretrained_checkpoint = pretrained_file(tmp_path, architecture)
    trainer.initialize()
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    take_step(trainer)
    after = dict(trainer.network.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    learning = groups.trained_names(trainer.network, train)
    assert moved == learning - WITHOUT_LOSS
    assert {name for name, p in after.items() if p.grad is not None} == moved
    assert trainer.optimisation.average is not None
    assert trainer.optimisation.average.state_dict().keys() == learning


@pytest.mark.parametrize(
    ("configuration", "overrides", "message"),
    [
        ("3d_fullres", ("finetune.layer_decay=0.75",), "skip connections"),
        ("3d_fullres", ("finetune.train=lora",), "adapters are for transformers"),
        ("primus", ("finetune.train=lora", "finetune.lora_rank=1000"), "narrowest layer"),
        ("primus", ("finetune.train=lora",), "-pretrained_weights"),
        ("3d_fullres", ("finetune.train=decoder",), "the encoder would stay random"),
        ("3d_fullres", ("finetune.train=head",), "-pretrained_weights"),
        ("primus", ("finetune.lora_rank=4",), "adapters need finetune.train=lora"),
        ("3d_fullres", ("finetune.schedule=zigzag",), "legal values are warmup, sawtooth"),
    ],
)
def test_refused_before_anything_is_written(
    here: Workspace, configuration: str, overrides: tuple[str, ...], message: str
) -> None:
    refused("E_CONFIG", message, lambda: train(here, *overrides, configuration=configuration))
    assert not list(here.results.rglob("*"))


def test_adapters_are_refused_on_several_gpus() -> None:
    settings = FinetuneSettings(train="lora")
    groups.require_fitting(settings, primus(), is_distributed=False)
    refused("E_CONFIG", "-num_gpus 1", lambda: groups.require_fitting(settings, primus(), is_distributed=True))


def test_a_trainer_of_stock_commands_refuses_random_frozen_weights(here: Workspace) -> None:
    settings = dataclasses.replace(tiny.FINETUNE, train="decoder")
    trainer = make_trainer(block=MFMBlock(finetune=settings, num_workers=0))
    refused("E_CONFIG", "-pretrained_weights", trainer.run_training)


def test_a_probe_of_a_decoder_that_did_not_travel_is_refused(here: Workspace, tmp_path: Path) -> None:
    file = pretrained_file(tmp_path)
    probe = lambda *settings: train(here, *settings, pretrained_weights=file)  # noqa: E731
    settings = ("finetune.train=head", "finetune.parts=encoder")
    refused("E_CONFIG", "the decoder would stay random", lambda: probe(*settings))
    content = checkpoint.load(file)
    del content["network_weights"]["decoder.stages.0.convs.0.conv.weight"]
    del content["network_weights"]["decoder.stages.0.convs.0.all_modules.0.weight"]
    checkpoint.save(content, file)
    message = "1 tensors did not come from the checkpoint and would stay random, e.g. decoder.stages.0"
    refused("E_CONFIG", message, lambda: probe("finetune.train=head"))
    assert not list(here.results.rglob("*.pth"))


def test_each_gpu_needs_a_crop(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfm_nnunet.jobs.train.pick_device", lambda name: torch.device(name))
    overrides = ("finetune.batch_size=3",)
    call = lambda: run_training(here, tiny.NAME, "3d_fullres", 0, overrides=overrides, num_gpus=4)  # noqa: E731
    refused("E_CONFIG", "finetune.batch_size=3: -num_gpus 4", call)
    call = lambda: run_training(here, tiny.NAME, "3d_fullres", 0, device="cuda:1")  # noqa: E731
    refused("E_CONFIG", "CUDA_VISIBLE_DEVICES", call)


def test_a_dice_over_all_gpus_needs_batches_of_one_size(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net gathers the sums of all processes into tensors of its own batch's size."""
    monkeypatch.setattr("mfm_nnunet.jobs.train.pick_device", lambda name: torch.device(name))
    plans = here.preprocessed / tiny.NAME / "mfmPlans.json"
    plans.write_text(plans.read_text().replace('"batch_dice": false', '"batch_dice": true'))
    call = lambda: run_training(here, tiny.NAME, "3d_fullres", 0, overrides=("finetune.batch_size=3",), num_gpus=2)  # noqa: E731
    refused("E_CONFIG", "a multiple of -num_gpus 2", call)


# Smaller settings


def test_batch_size_and_mirroring(here: Workspace) -> None:
    settings = dataclasses.replace(tiny.FINETUNE, batch_size=3, mirroring=False)
    trainer = make_trainer(block=MFMBlock(finetune=settings, num_workers=0))
    trainer.initialize()
    loader = first_batches(trainer)
    assert next(loader)["data"].shape[0] == 3
    assert trainer.inference_allowed_mirroring_axes is None
    assert trainer.plans_manager.plans["configurations"]["3d_fullres"]["batch_size"] == 2

    def transforms(trainer: MFMTrainer) -> str:
        return " ".join(type(t).__name__ for t in make_loaders(trainer)[0].transforms.transforms)

    assert "MirrorTransform" not in transforms(trainer)
    stock = make_trainer()
    stock.initialize()
    assert "MirrorTransform" in transforms(stock)
    assert stock.inference_allowed_mirroring_axes == (0, 1, 2)


def test_a_batch_of_one_crop_sees_foreground_by_chance(here: Workspace) -> None:
    """nnU-Net rounds the share of such crops to none there; a third of them it is in larger batches too."""
    settings = dataclasses.replace(tiny.FINETUNE, batch_size=1)
    trainer = make_trainer(block=MFMBlock(finetune=settings, num_workers=0))
    trainer.initialize()
    loader = make_loaders(trainer)[0]
    with seeded(5):
        chosen = [loader.get_do_oversample(0) for _ in range(300)]
    with seeded(5):
        assert chosen == [loader.get_do_oversample(0) for _ in range(300)]
    assert 70 < sum(chosen) < 130
    pair = make_trainer()
    pair.initialize()
    assert [make_loaders(pair)[0].get_do_oversample(index) for index in (0, 1)] == [False, True]  # as nnU-Net's


def test_what_only_a_checkpoint_gives_an_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    given, about = ("finetune.transfer=adapt", "seed=1"), {"name": "a.pth", "sha256": "00", "pretext": "mae"}
    with caplog.at_level("INFO"):
        require_effect(given, FinetuneSettings(transfer="adapt", checkpoint=about), "cuda")
        require_effect((), FinetuneSettings(transfer="adapt"), "cuda")
        require_effect((), FinetuneSettings(compile=False), "cpu")
        assert not caplog.text
        require_effect(given, FinetuneSettings(transfer="adapt"), "cuda")
    assert "finetune.transfer has no effect" in caplog.text
    assert "compile" not in caplog.text


def test_a_network_is_compiled_on_cuda_only_and_the_run_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        require_effect((), FinetuneSettings(compile=True), "cpu")
    assert "finetune.compile=true has no effect" in caplog.text
    trainer = object.__new__(MFMTrainer)
    trainer.device, trainer.settings = torch.device("cpu"), FinetuneSettings(compile=True)
    assert not trainer._do_i_compile()


# Advice


@pytest.mark.parametrize(
    ("family", "num_cases", "pretext", "has_decoder", "parts", "reason"),
    [
        ("resenc", 100, "mae", True, "encoder_decoder", "mae trained the decoder"),
        ("resenc", 100, "voco", False, "encoder", "left no weights of a decoder"),
        ("primus", 5, None, True, "encoder_decoder", "with 5 cases finetune.train=lora"),
        ("primus", 50, "mae", True, "encoder_decoder", "one rate for all blocks"),
    ],
)
def test_advice(family: Any, num_cases: int, pretext: str | None, has_decoder: bool, parts: str, reason: str) -> None:
    given = advise(family_named(family), num_cases, pretext, has_decoder)
    assert {item.name: item.value for item in given} == {"parts": parts, "layer_decay": 1.0}
    assert reason in " ".join(item.reason for item in given)


def test_advice_is_for_what_is_open_only() -> None:
    given = advise(family_named("resenc"), 9, "mae", True)
    assert resolve(MFMBlock(), (), None, given).finetune.parts == "encoder_decoder"
    chosen = resolve(MFMBlock(), ("finetune.parts=encoder", "finetune.layer_decay=0.5"), None, given).finetune
    assert (chosen.parts, chosen.layer_decay) == ("encoder", 0.5)
    assert resolve(MFMBlock(), (), None).finetune.parts == "auto"


def test_what_a_continued_run_leaves_open_again_is_as_it_began() -> None:
    about = {"name": "a.pth", "sha256": "00", "pretext": "mae"}
    command = ("finetune.parts=auto", "finetune.layer_decay=none", "finetune.learning_rate=none")
    sawtooth = ("finetune.schedule=sawtooth", "finetune.decoder_epochs=none")
    given = advise(family_named("resenc"), 9, "mae", False)
    begun = resolve(MFMBlock(), (*command, *sawtooth), about, given)
    assert resolve(begun, (*command, *sawtooth), about, advise_as_begun(begun.finetune)) == begun
    other = resolve(begun, ("finetune.parts=all_but_heads",), about, advise_as_begun(begun.finetune))
    refused("E_CONFIG", "finetune.parts was encoder, is all_but_heads", lambda: require_same(begun, other, Path()))


def test_what_was_open_is_printed_with_its_reason_and_saved(
    here: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pretrained_file(tmp_path)
    content = checkpoint.load(file)
    weights = {name: tensor for name, tensor in content["network_weights"].items() if name.startswith("encoder.")}
    checkpoint.save({**content, "network_weights": weights}, file)
    monkeypatch.setattr(MFMTrainer, "run_training", lambda self: self._start())
    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", lambda self, save_probabilities=False: None)
    with caplog.at_level("INFO"):
        folder = train(here, "finetune.layer_decay=1.0", pretrained_weights=file)
    assert "finetune.parts=encoder: mae left no weights of a decoder" in caplog.text
    assert "finetune.layer_decay=1.0:" not in caplog.text  # it was given
    assert json.loads((folder / "settings.json").read_text())["settings"]["finetune"]["parts"] == "encoder"
    (log,) = folder.glob("training_log*.txt")
    assert "parameters are trained (100.0%)" in log.read_text()


@pytest.mark.parametrize(
    ("network", "optimizer", "scratch", "pretrained"),
    [("resenc", "sgd", 1e-2, 1e-3), ("resenc", "adamw", 3e-4, 1e-4), ("primus", "adamw", 3e-4, 1e-4)],
)
def test_an_open_learning_rate_is_that_of_the_start(
    here: Workspace, network: Any, optimizer: Any, scratch: float, pretrained: float
) -> None:
    """Scratch on a plan that was made for a checkpoint is a fair baseline."""
    block = MFMBlock(network=network, finetune=FinetuneSettings(optimizer=optimizer))
    about = {"name": "a.pth", "sha256": "00", "pretext": "mae"}
    assert resolve(block, (), None).finetune.learning_rate == scratch
    resolved = resolve(block, (), about)
    assert resolved.finetune.learning_rate == pretrained
    assert resolve(resolved, (), None).finetune.learning_rate == pretrained  # continued
    assert resolve(block, ("finetune.learning_rate=0.5",), about).finetune.learning_rate == 0.5
    assert make_trainer(block=block).initial_lr == scratch  # by stock's command, which resolves nothing


def test_an_open_learning_rate_that_nobody_published_is_refused() -> None:
    block = MFMBlock(network="primus", finetune=FinetuneSettings(optimizer="sgd"))
    refused("E_CONFIG", "Set finetune.learning_rate", lambda: resolve(block, (), None))
    assert resolve(block, ("finetune.learning_rate=0.1",), None).finetune.learning_rate == 0.1


def test_from_a_checkpoint_a_plan_that_is_not_like_it_has_the_rate_for_it_too(
    here: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stock plan, or the dataset's own: neither says a rate."""
    (here.preprocessed / tiny.NAME / "stockPlans.json").write_text(json.dumps(tiny.plans("stockPlans")))
    short = (
        "finetune.epochs=1",
        "finetune.iterations_per_epoch=1",
        "finetune.validation_iterations=1",
        "num_workers=0",
    )
    with caplog.at_level("INFO"):
        folder = train(here, *short, plans_name="stockPlans", pretrained_weights=pretrained_file(tmp_path))
    assert "finetune.learning_rate=0.001: the published rate of resenc with sgd from a checkpoint" in caplog.text
    assert json.loads((folder / "settings.json").read_text())["settings"]["finetune"]["learning_rate"] == 1e-3
