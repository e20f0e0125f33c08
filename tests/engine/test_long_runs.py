"""What long runs need: batches in parts, activations computed again, averaged weights, bf16, compiled blocks, encoders.

A setting that is off changes nothing; a setting that is on changes what it says and nothing else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfm_nnunet import checkpoint
from mfm_nnunet.device import require_sound_bf16
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.pretrained import transfer
from mfm_nnunet.interchange.read import read_checkpoint
from mfm_nnunet.jobs import pretrain
from mfm_nnunet.jobs.plan import read_source
from mfm_nnunet.models import backbone as backbones
from mfm_nnunet.models.backbone import AbstractBackbone
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.planning.like import plan_like
from mfm_nnunet.tasks.base import PretextTask, list_tasks
from mfm_nnunet.tasks.mae import MAE
from tests.builders.tasks import make_batch, make_task
from tests.builders.tiny_plans import NETWORKS, tiny_backbone, tiny_network
from tests.builders.tiny_run import CONFIGURATION, prepare, request, run, run_folder, same, weights
from tests.builders.training import refused

PATCH = (16, 16, 16)
ONE_EPOCH = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=3", "num_workers=0")
PAIRS = [(info.name, family) for info in list_tasks() for family in info.backbones]


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def task_of(name: str, family: str) -> PretextTask:
    return make_task(name, family, NETWORKS[family].cubic if family == "timm" else PATCH)


# Accumulation


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """And the number of parts is not ignored: with others than four items per step the weights are others."""
    here = prepare(tmp_path)
    batch = (*ONE_EPOCH, "pretrain.batch_size=4")
    whole = run(here, settings=batch, run_name="whole")
    parts = [run(here, settings=(*batch, f"pretrain.accumulation={n}"), run_name=f"parts{n}") for n in (2, 4)]
    for final in parts:
        assert largest_difference(weights(whole), weights(final)) < 1e-6
        logs = [json.loads((file.parent / "log.jsonl").read_text()) for file in (whole, final)]
        for name in ("train_loss", "validation_loss"):
            assert logs[1][name] == pytest.approx(logs[0][name], abs=1e-5), name
        assert logs[0].keys() == logs[1].keys()
    smaller = run(here, settings=(*ONE_EPOCH, "pretrain.batch_size=2"), run_name="smaller")
    assert largest_difference(weights(whole), weights(smaller)) > 1e-4


def test_a_bad_part_stops_before_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever part it is: the good gradients of the others are not applied either."""
    forward, calls, kept = MAE.forward, [], []

    def second_is_bad(self: MAE, batch: dict[str, Tensor]) -> Any:
        calls.append(1)
        kept.append({name: weight.detach().clone() for name, weight in self.state_dict().items()})
        broken = {**batch, "image": batch["image"] * float("nan")} if len(calls) == 2 else batch
        return forward(self, broken)

    monkeypatch.setattr(MAE, "forward", second_is_bad)
    with pytest.raises(FloatingPointError, match=r"loss became non-finite at step 0.*case\d"):
        run(prepare(tmp_path), settings=(*ONE_EPOCH, "pretrain.accumulation=2"))
    assert len(calls) == 2
    assert same(kept[0], kept[1])


@pytest.mark.parametrize(("accumulation", "num_gpus", "of"), [(3, 1, "accumulation=3"), (2, 3, "3 processes")])
def test_a_batch_must_be_shared_evenly(tmp_path: Path, accumulation: int, num_gpus: int, of: str) -> None:
    settings = ("pretrain.batch_size=4", f"pretrain.accumulation={accumulation}")
    with pytest.raises(MFMError, match=rf"batch_size=4: not a multiple of .*{of}") as caught:
        pretrain.launch(prepare(tmp_path), request("mae", settings, num_gpus=num_gpus))
    assert caught.value.code == "E_CONFIG"
    assert not run_folder(tmp_path).exists()


class _TwoAtLeast(MAE):
    """A task that compares items."""

    @classmethod
    def smallest_batch(cls, config: Any) -> int:
        return 3


def test_a_batch_too_small_to_compare_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "find_task", lambda name: _TwoAtLeast)
    for size, parts, message in ((2, 1, "Use a larger batch."), (4, 2, "smaller pretrain.accumulation")):
        settings = (f"pretrain.batch_size={size}", f"pretrain.accumulation={parts}")
        refused("E_CONFIG", message, functools.partial(run, prepare(tmp_path), settings=settings))
        assert not run_folder(tmp_path).exists()
    assert run(prepare(tmp_path), settings=(*ONE_EPOCH, "pretrain.batch_size=3")).exists()


# Activation checkpointing


def gradients(task: PretextTask, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    task.zero_grad()
    torch.manual_seed(5)
    loss = task(batch).loss
    torch.rand(3)  # what draws after the forward pass must not reach what is drawn again in the backward pass
    loss.backward()
    return loss.item(), {name: w.grad.clone() for name, w in task.named_parameters() if w.grad is not None}


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_computing_activations_again_changes_no_gradient(name: str, family: str) -> None:
    task = task_of(name, family).train()
    batch = make_batch(task)
    names = list(task.state_dict())
    loss, expected = gradients(task, batch)
    task.backbone.recompute_activations()
    again, found = gradients(task, batch)
    assert again == pytest.approx(loss, abs=1e-6)
    assert largest_difference(expected, found) < 1e-6
    assert list(task.state_dict()) == names


def test_drop_path_is_drawn_as_before() -> None:
    """With a rate at which other draws would give other gradients."""
    backbone = tiny_backbone("primus", PATCH, restoring="none", drop_path_rate=0.5, eva_depth=4).train()
    image, results = torch.randn(4, 1, *PATCH), []
    for seed, is_recomputed in ((1, False), (2, False), (1, True)):
        if is_recomputed:
            backbone.recompute_activations()
        backbone.zero_grad()
        torch.manual_seed(seed)
        loss = backbone(image).square().mean()
        torch.rand(3)
        loss.backward()
        results.append({name: weight.grad.clone() for name, weight in backbone.named_parameters()})
    assert largest_difference(results[0], results[1]) > 1e-4
    assert largest_difference(results[0], results[2]) < 1e-6


def bytes_kept(module: nn.Module, run_it: Callable[[], Tensor]) -> int:
    """Memory of the activations that wait for the backward pass; weights are there anyway."""
    own = {weight.untyped_storage().data_ptr() for weight in (*module.parameters(), *module.buffers())}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run_it()
    del output
    return sum(seen.values())


@pytest.mark.parametrize(
    ("family", "changes"), [("resenc", {"n_blocks_per_stage": [3, 3, 3]}), ("primus", {"eva_depth": 6})]
)
def test_less_is_kept_for_the_backward_pass(family: str, changes: dict[str, Any]) -> None:
    backbone = tiny_backbone(family, PATCH, restoring="none", **changes).train()
    image = torch.randn(2, 1, *PATCH)
    before = bytes_kept(backbone, lambda: backbone(image).square().mean())
    backbone.recompute_activations()
    after = bytes_kept(backbone, lambda: backbone(image).square().mean())
    assert after < 0.5 * before


def test_running_statistics_would_be_updated_twice() -> None:
    norm = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}
    with pytest.raises(MFMError, match=r"activation_checkpointing.*running statistics"):
        tiny_backbone("resenc", PATCH, **norm).recompute_activations()


# Averaged weights


def test_the_average_is_validated_and_shipped_and_the_weights_go_on(tmp_path: Path) -> None:
    here = prepare(tmp_path)
    plain = run(here, settings=ONE_EPOCH, run_name="plain")
    averaged = run(here, settings=(*ONE_EPOCH, "pretrain.ema_decay=0.9"), run_name="averaged")
    states = [checkpoint.load(file.with_name("resume.pth")) for file in (plain, averaged)]
    assert "average" not in states[0]
    assert same(states[0]["task"], states[1]["task"]), "the average must not touch the training"
    shipped = weights(averaged)
    average = {name.removeprefix("backbone.network."): tensor for name, tensor in states[1]["average"].items()}
    assert largest_difference({name: shipped[name] for name in average}, average) == 0
    assert not same(shipped, weights(plain))
    rows = [json.loads(file.with_name("log.jsonl").read_text()) for file in (plain, averaged)]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    assert rows[0]["validation_loss"] != rows[1]["validation_loss"]
    assert checkpoint.load(averaged)["mfm"]["pretrain"]["ema_decay"] == 0.9


# Precision


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_bf16_gives_a_finite_loss_in_float32(name: str, family: str) -> None:
    task = task_of(name, family).train()
    batch = make_batch(task)
    torch.manual_seed(0)
    exact = task(batch).loss.item()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        output = task(batch)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact, rel=0.2, abs=0.05)
    try:
        size = batch["image"].shape[-len(PATCH) :]
        require_sound_bf16(task.backbone.network, size, torch.device("cpu"), "pretrain.precision")
    except MFMError:
        return  # torch's gradients are wrong for these crops, and a run is refused
    output.loss.backward()
    assert all(torch.isfinite(w.grad).all() for w in task.parameters() if w.grad is not None)


# Compilation


def compiler_problem() -> str:
    """Why nothing can be compiled here; "" if it can."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception as error:
        return type(error).__name__
    return ""


AMPLIFIED = {("simclr", "pctnet"), ("voco", "pctnet")}
"""Pairs whose instance norms see so few values that rounding shows: gradients of a shaken batch set the tolerance."""


def shake(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch whose image differs by a millionth."""
    noise = torch.randn(batch["image"].shape, generator=torch.Generator().manual_seed(0))
    return {**batch, "image": batch["image"] * (1 + 1e-6 * noise)}


@pytest.mark.timeout(600)
@pytest.mark.long
@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_compiled_blocks_give_the_same_gradients(name: str, family: str) -> None:
    if problem := compiler_problem():
        pytest.skip(f"torch.compile does not work on this computer: {problem}")
    task = task_of(name, family).train()
    batches = [make_batch(task, seed=seed) for seed in (0, 1)]
    names = list(task.state_dict())
    for module in task.modules():  # what is compiled draws from another generator
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    plain = [gradients(task, batch) for batch in batches]
    roundings = [0.0 for _ in batches]
    if (name, family) in AMPLIFIED:
        shaken = [gradients(task, shake(batch))[1] for batch in batches]
        roundings = [largest_difference(expected, other) for (_, expected), other in zip(plain, shaken)]
    task.backbone.compile_blocks()
    # The second batch: nothing of the first is built in.
    for batch, (loss, expected), rounding in zip(batches, plain, roundings):
        again, found = gradients(task, batch)
        assert again == pytest.approx(loss, abs=1e-5)
        assert largest_difference(expected, found) < 1e-4 + rounding
    assert list(task.state_dict()) == names


def compile_with(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile blocks with a backend that needs no compiler."""
    torch._dynamo.reset()
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **words: compile_(self, backend=backend, **words))


def test_blocks_really_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and a backend that fails is not passed over in silence."""
    backbone = tiny_backbone("resenc", PATCH, restoring="none")
    graphs: list[Any] = []
    compile_with(lambda graph, examples: (graphs.append(graph), graph.forward)[1], monkeypatch)
    names = list(backbone.state_dict())
    expected = backbone(torch.ones(1, 1, *PATCH))
    backbone.compile_blocks()
    assert torch.allclose(backbone(torch.ones(1, 1, *PATCH)), expected, atol=1e-6)
    assert len(graphs) == len(backbone.blocks())
    assert list(backbone.state_dict()) == names


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_a_compiled_run_trains_validates_and_computes_again(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mode of the blocks is traced whole, and results are the same."""
    compile_with("eager", monkeypatch)
    here, settings = prepare(tmp_path, family), (*ONE_EPOCH, "pretrain.ema_decay=0.9")
    plain = run(here, settings=settings, run_name="plain")
    settings += ("pretrain.compile=true", "pretrain.activation_checkpointing=true")
    compiled = run(here, settings=settings, run_name="compiled")
    assert largest_difference(weights(plain), weights(compiled)) < 1e-5


def test_a_missing_compiler_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no working C++ compiler")

    steps: list[int] = []
    compile_with(broken, monkeypatch)
    monkeypatch.setattr(Engine, "step", lambda *_: steps.append(1))
    with pytest.raises(MFMError, match=r"pretrain\.compile=true.*no working C\+\+ compiler") as caught:
        run(prepare(tmp_path), settings=(*ONE_EPOCH, "pretrain.compile=true"))
    assert caught.value.code == "E_CONFIG"
    assert not steps


# Checkpoints of tasks that train the encoder alone


class _EncoderOnly(MAE):
    """MAE that leaves the decoder as it was drawn."""

    trains_decoder = False


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_an_untrained_decoder_is_not_shipped(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(prepare(tmp_path, family), settings=ONE_EPOCH, run_name="whole")
    monkeypatch.setattr(pretrain, "find_task", lambda name: _EncoderOnly)
    final = run(prepare(tmp_path, family), settings=ONE_EPOCH)
    content = checkpoint.load_weights(final)
    assert content["mfm"]["trained"] == "encoder"
    assert checkpoint.load(whole)["mfm"]["trained"] == "network"
    tops = {name.partition(".")[0] for name in content["network_weights"]}
    assert tops == ({"encoder"} if family == "resenc" else {"down_projection", "eva"})

    architecture = content["mfm"]["plans"]["configurations"][CONFIGURATION]["architecture"]
    assert read_source(final).trained.name == CONFIGURATION
    planned = plan_like(_own_plan(content["mfm"]["plans"]), read_source(final))
    assert planned["configurations"][CONFIGURATION]["architecture"] == architecture

    network = build_network(content["mfm"]["plans"], CONFIGURATION, 1, 3, deep_supervision=family == "resenc")
    report = transfer(read_checkpoint(final), network)
    assert report.encoder_share == 1
    assert not report.ignored
    assert report.new
    assert all(e.name.startswith(("decoder.", "up_projection.")) for e in report.new)
    assert not any(e.name.startswith(("decoder.stages", "up_projection.")) for e in (*report.loaded, *report.adapted))
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in content["network_weights"].items())


def _own_plan(plans: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(plans))


def test_the_encoder_of_a_network_is_named_whole() -> None:
    """Both names of a U-Net's layers, which nnU-Net registers twice; not the third one under the decoder."""
    for family in ("resenc", "primus"):
        network = tiny_network(family, PATCH)
        state = backbones.make_backbone(network, PATCH, "none").encoder_state()
        kept = {tensor.data_ptr() for tensor in state.values() if tensor.numel()}
        outside = {n for n, t in network.state_dict().items() if t.data_ptr() in kept and n not in state}
        assert all(name.startswith("decoder.encoder.") for name in outside)
        assert isinstance(backbones.make_backbone(network, PATCH, "none"), AbstractBackbone)


def test_memory_that_runs_out_is_an_error_with_the_settings_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(Engine, "train", too_much)
    with pytest.raises(MFMError, match=r"20 GiB.*pretrain\.accumulation=2") as caught:
        run(prepare(tmp_path), settings=ONE_EPOCH)
    assert caught.value.code == "E_OOM"
