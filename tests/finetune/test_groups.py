"""Who learns with each ``finetune.train``, at which rates; adapters and averaged weights; what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from torch import nn

from mfm_nnunet import checkpoint
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.loading import make_loaders, seeded
from mfm_nnunet.finetune.settings import advise, advise_as_begun, require_effect, require_same, resolve
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.models.families import family_named, family_of
from mfm_nnunet.prediction.model import load_model
from mfm_nnunet.settings import FinetuneSettings, MFMBlock
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny
from tests.builders.tiny import run_training
from tests.builders.tiny_plans import tiny_network
from tests.builders.training import (
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
from tests.models.test_transfer import primus, resenc


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
    assert [g.scale for g in groups.group_parameters(deep, FinetuneSettings(layer_decay=0.5), None)] == [
        0.5**i for i in range(6)
    ]


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
        trainer = initialised(file=pretrained_file(tmp_path), train="decoder", gradient_clip=0.01, weight_decay=0.1)
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
    trainer = initialised(
        configuration, file=pretrained_file(tmp_path, architecture), train=train, weight_decay=0.1, ema_decay=0.5
    )
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
    """And equally large batches for a Dice over all GPUs: nnU-Net gathers sums into tensors of its own batch's size."""
    monkeypatch.setattr("mfm_nnunet.jobs.train.pick_device", lambda name: torch.device(name))
    for num_gpus, message in ((4, "finetune.batch_size=3: -num_gpus 4"), (2, "a multiple of -num_gpus 2")):
        options: dict[str, Any] = {"overrides": ("finetune.batch_size=3",), "num_gpus": num_gpus}
        call = functools.partial(run_training, here, tiny.NAME, "3d_fullres", 0, **options)
        refused("E_CONFIG", message, call)
    call = lambda: run_training(here, tiny.NAME, "3d_fullres", 0, device="cuda:1")  # noqa: E731
    refused("E_CONFIG", "CUDA_VISIBLE_DEVICES", call)


# Smaller settings


def test_batch_size_and_mirroring(here: Workspace) -> None:
    trainer = initialised(batch_size=3, mirroring=False)
    loader = first_batches(trainer)
    assert next(loader)["data"].shape[0] == 3
    assert trainer.inference_allowed_mirroring_axes is None
    assert trainer.plans_manager.plans["configurations"]["3d_fullres"]["batch_size"] == 2

    def transforms(trainer: MFMTrainer) -> str:
        return " ".join(type(t).__name__ for t in make_loaders(trainer)[0].transforms.transforms)

    assert "MirrorTransform" not in transforms(trainer)
    stock = initialised()
    assert "MirrorTransform" in transforms(stock)
    assert stock.inference_allowed_mirroring_axes == (0, 1, 2)


def test_a_batch_of_one_crop_sees_foreground_by_chance(here: Workspace) -> None:
    """nnU-Net rounds the share of such crops to none there; a third of them it is in larger batches too."""
    trainer = initialised(batch_size=1)
    loader = make_loaders(trainer)[0]
    with seeded(5):
        chosen = [loader.get_do_oversample(0) for _ in range(300)]
    with seeded(5):
        assert chosen == [loader.get_do_oversample(0) for _ in range(300)]
    assert 70 < sum(chosen) < 130
    pair = initialised()
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
    """On a stock plan, which says no rate either."""
    (here.preprocessed / tiny.NAME / "mfmPlans.json").write_text(json.dumps(tiny.plans()))
    file = pretrained_file(tmp_path)
    content = checkpoint.load(file)
    weights = {name: tensor for name, tensor in content["network_weights"].items() if name.startswith("encoder.")}
    checkpoint.save({**content, "network_weights": weights}, file)
    monkeypatch.setattr(MFMTrainer, "run_training", lambda self: self._start())
    with caplog.at_level("INFO"):
        folder = train(here, "finetune.layer_decay=1.0", pretrained_weights=file)
    assert "finetune.parts=encoder: mae left no weights of a decoder" in caplog.text
    assert "finetune.learning_rate=0.001: the published rate of resenc with sgd from a checkpoint" in caplog.text
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


# Adapters and averages

SHORT = (
    *("finetune.epochs=3", "finetune.iterations_per_epoch=2", "finetune.validation_iterations=1", "num_workers=0"),
    *("finetune.optimizer=adamw", "finetune.learning_rate=1e-3"),
)
LORA = ("finetune.train=lora", "finetune.lora_rank=2", "finetune.lora_alpha=4")
EMA = ("finetune.ema_decay=0.5",)


def with_adapters(seed: int = 3) -> torch.nn.Module:
    """A Primus whose adapters are not at their start."""
    network = primus()
    groups.add_adapters(network, 2, 4.0)
    torch.manual_seed(seed)
    parameters = dict(network.named_parameters())
    for name in sorted(groups.adapter_names(network)):
        torch.nn.init.normal_(parameters[name], std=0.2)
    return network.eval()


# Adapters


def test_at_first_the_network_is_the_pretrained_one() -> None:
    x, network = torch.randn(1, 1, 16, 16, 16), primus().eval()
    before = network(x)
    groups.add_adapters(network, 2, 4.0)
    assert torch.equal(network(x), before)


def test_merged_weights_are_the_adapted_network_under_its_own_names() -> None:
    adapted, plain = with_adapters(), primus(seed=9).eval()
    merged = groups.merged_state(adapted)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    x = torch.randn(1, 1, 16, 16, 16)
    assert torch.allclose(plain(x), adapted(x), atol=1e-6)
    original = primus().state_dict()
    assert not torch.allclose(original["eva.blocks.0.attn.proj.weight"], merged["eva.blocks.0.attn.proj.weight"])
    weight = original["eva.blocks.0.mlp.fc2.weight"]
    adapter = adapted.get_submodule("eva.blocks.0.mlp.fc2.parametrizations.weight.0")
    expected = weight + 4 / 2 * adapter.up @ adapter.down
    assert torch.allclose(merged["eva.blocks.0.mlp.fc2.weight"], expected, atol=1e-6)


def test_mixed_precision_does_not_round_what_is_added() -> None:
    adapted = with_adapters()
    layer = adapted.get_submodule("eva.blocks.0.attn.proj")
    outside = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, outside)


def test_attention_and_mlp_have_adapters_and_nothing_else() -> None:
    network = with_adapters()
    layers = {name.partition(".parametrizations")[0] for name in groups.adapter_names(network)}
    attention = {f"eva.blocks.0.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")}
    assert attention < layers
    assert {name.rpartition(".")[2] for name in layers - attention} == {"fc1_g", "fc1_x", "fc2"}
    assert groups.adapter_names(primus()) == set()


def trainer_with(tmp_path: Path, **changes: Any) -> MFMTrainer:
    file = pretrained_file(tmp_path, tiny.drop_path_primus())
    return initialised("primus", file, learning_rate=1e-2, optimizer="adamw", **changes)


def test_only_adapters_and_decoder_learn(here: Workspace, tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, train="lora", lora_rank=2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    batch = next(first_batches(trainer))
    for _ in range(2):  # with B at zero, A has no gradient in the first step
        take_step(trainer, batch)
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(before[name], p)}
    adapters = groups.adapter_names(trainer.network)
    of_encoder = family_of(trainer.network).encoder_names(trainer.network)
    assert moved & of_encoder <= adapters
    assert moved - of_encoder == before.keys() - of_encoder
    assert len(adapters - moved) <= len(adapters) / 2  # drop path may leave a block out
    encoder = sum(before[name].numel() for name in of_encoder - adapters)
    assert sum(before[name].numel() for name in adapters) < 0.5 * encoder
    shipped = trainer.make_checkpoint()["network_weights"]
    plain = initialised("primus")
    assert shipped.keys() == plain.network.state_dict().keys()


# Runs


def run(here: Workspace, *settings: str, configuration: str = "primus", **options: Any) -> Path:
    return train(here, *settings, configuration=configuration, **options)


def test_resuming_is_exact(here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, settings = pretrained_file(tmp_path, tiny.drop_path_primus()), (*SHORT, *LORA, *EMA)
    folder = run(here, *settings, pretrained_weights=file)
    wanted = state_of(folder)
    folder.parent.rename(here.results / "unbroken")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)  # the first step of the third epoch
        with pytest.raises(Killed):
            run(here, *settings, pretrained_weights=file)
    run(here, continue_training=True)
    require_equal(state_of(folder), wanted)
    model = load_model(folder.parent, device="cpu")  # as prediction reads it: plain names, nothing missing
    model.network.load_state_dict(model.weights[0])
    content = checkpoint.load(folder / "checkpoint_final.pth")
    assert not torch.equal(*(first(content[key]) for key in ("network_weights", "trained_weights")))
    del content["trained_weights"]
    checkpoint.save(content, folder / "checkpoint_final.pth")
    refused("E_MODEL_CORRUPT", "trained_weights", lambda: run(here, continue_training=True))


def test_the_stock_predictor_gives_the_masks_that_were_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters and average together: merged and averaged weights, without mirroring, loaded by stock nnU-Net."""
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *args: None)
    tiny.make(tmp_path)
    file = pretrained_file(tmp_path, tiny.drop_path_primus())
    with use(tmp_path) as here:
        folder = run(here, *SHORT, *LORA, *EMA, "finetune.mirroring=false", pretrained_weights=file)
        predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder.parent), (0,))
        assert predictor.allowed_mirroring_axes is None
        data = nnUNetDatasetBlosc2(str(here.preprocessed / tiny.NAME / "mfm_tiny"))
    masks = sorted((folder / "validation").glob("*.nii.gz"))
    assert len(masks) == 2
    for mask_file in masks:
        image = data.load_case(mask_file.name.removesuffix(".nii.gz"))[0][:]
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        mask = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).argmax(0).numpy()
        assert (mask == sitk.GetArrayFromImage(sitk.ReadImage(str(mask_file)))).all()


def first(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A weight that adapters or the average change."""
    names = ("eva.blocks.0.attn.proj.weight", "eva.blocks.0.attn.proj.parametrizations.weight.original")
    return next(weights[name] for name in (*names, "encoder.stem.convs.0.conv.weight") if name in weights)


def test_the_average_is_validated_and_shipped(here: Workspace, tmp_path: Path) -> None:
    trainer = initialised(ema_decay=0.9)
    weight = next(trainer.network.parameters())
    expected = weight.detach().clone()
    training, engine = first_batches(trainer), trainer.make_engine()
    for step in range(3):
        engine.step(next(training), step)
        expected = expected + (1 - min(0.9, (1 + step) / (10 + step))) * (weight.detach() - expected)
    raw = weight.detach().clone()
    with trainer.optimisation.averaged():
        assert torch.allclose(weight, expected, atol=1e-7)
    seen = []
    trainer.network.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    engine._run.training_batches(0)
    engine.validate(0)
    assert torch.allclose(seen[0], expected, atol=1e-7)
    assert torch.equal(weight, raw)
    content = trainer.make_checkpoint()
    name = next(iter(dict(trainer.network.named_parameters())))
    assert torch.allclose(content["network_weights"][name], expected, atol=1e-7)
    assert torch.equal(content["trained_weights"][name], raw)


def test_the_average_keeps_still_what_waits(here: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pretrained_file(tmp_path)
    name, shipped = "encoder.stem.convs.0.conv.weight", {}
    save = MFMTrainer.save_checkpoint

    def recording(self: MFMTrainer, filename: str) -> None:
        shipped[self.current_epoch] = self.make_checkpoint()["network_weights"][name].clone()
        save(self, filename)

    monkeypatch.setattr(MFMTrainer, "save_checkpoint", recording)
    sawtooth = ("finetune.schedule=sawtooth", "finetune.decoder_epochs=2", "finetune.warmup_epochs=0")
    run(here, *SHORT, *sawtooth, *EMA, configuration="3d_fullres", pretrained_weights=file)
    source = checkpoint.load_weights(file)["network_weights"][name]
    assert [torch.equal(shipped[epoch], source) for epoch in (0, 1, 2)] == [True, True, False]
