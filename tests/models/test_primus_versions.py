"""Primus V2 and V3: DNA's encoders with our decoder, 3D and 2D; nothing hidden gets through their overlapping stems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import PrimusV2, PrimusV3
from torch import Tensor, nn

from mfm_nnunet import checkpoint, workspace
from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.plan import check_request, plan
from mfm_nnunet.models import transfer
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.families import Sizing, family_named, family_of
from mfm_nnunet.models.memory import estimate_training_memory, num_parameters
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.primus import PRIMUS_SIZES, REFERENCE_OUTPUTS, PrimusSeg, primus_kwargs
from mfm_nnunet.models.primus_family import _token_size, primus_architecture
from mfm_nnunet.models.tokens import TokenBackbone
from mfm_nnunet.models.transfer import transfer_weights
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.tasks.base import find_task
from mfm_nnunet.tasks.masks import draw_hidden
from tests.builders import tiny as finetune_tiny
from tests.builders import tiny_run
from tests.builders.architectures import primus
from tests.builders.tasks import make_batch
from tests.builders.tiny import run_training
from tests.builders.tiny_data import HIPPOCAMPUS, pretrained_checkpoint, workspace_with
from tests.builders.tiny_plans import CONFIGURATION, tiny_backbone, tiny_network, tiny_plans
from tests.models.test_memory import really_kept

PATCH = (16, 24, 16)
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 48,
    "patch_embed_size": (8, 8, 8),
    "input_shape": PATCH,
    "eva_depth": 2,
    "eva_numheads": 2,
}
THEIRS = {2: PrimusV2, 3: PrimusV3}
VERSIONS = [2, 3]
SMALL = {2: [4, 4, 8, 8], 3: [4, 8, 8, 16]}
CASES = [(version, patch) for version in VERSIONS for patch in (PATCH, (16, 24))]


def tiny(version: int) -> dict[str, Any]:
    """What makes a tiny Primus one of this version."""
    return {"version": version, "stem_features": SMALL[version]}


def backbone_of(version: int, patch: tuple[int, ...], restoring: Any = "drop", **changes: Any) -> TokenBackbone:
    changes = {"drop_path_rate": 0.0, **tiny(version), **changes}
    backbone = tiny_backbone("primus", patch, 2, 2, restoring=restoring, **changes)
    assert isinstance(backbone, TokenBackbone)
    return backbone


def hidden_mask(patch: tuple[int, ...], batch: int) -> Tensor:
    masks = [draw_hidden(patch, (8,) * len(patch), 0.5, np.random.default_rng(i)) for i in range(batch)]
    return torch.from_numpy(np.stack(masks))


# The network


@pytest.mark.parametrize("version", VERSIONS)
def test_equals_dna_with_the_same_weights_and_as_many_outputs_as_the_reference(version: int) -> None:
    theirs = THEIRS[version](
        input_channels=2, num_classes=REFERENCE_OUTPUTS, init_values=0.1, scale_attn_inner=True, **ARGUMENTS
    )
    ours = PrimusSeg(2, REFERENCE_OUTPUTS, version=version, **ARGUMENTS)
    weights = theirs.state_dict()
    del weights["mask_token"]
    assert set(weights) == set(ours.state_dict())
    ours.load_state_dict(weights)
    if version == 3:
        for scale in [*ours.down_projection.scale_proj_to_tokens, *theirs.down_projection.scale_proj_to_tokens]:
            nn.init.constant_(scale, 0.3)  # else the skips would be too small to compare
    x = torch.randn(1, 2, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    assert _token_size(ours) == _token_size(theirs) == (8, 8, 8)
    convolutions = [name for name, module in ours.named_modules() if isinstance(module, nn.Conv3d)]
    seeing = {name for name in convolutions if ours.get_submodule(name).in_channels == 2}
    assert set(ours.keys_to_in_proj) >= seeing, "a convolution that sees the image would not be adapted to channels"


@pytest.mark.parametrize("version", VERSIONS)
def test_initialisation_is_he_and_starts_without_skips(version: int) -> None:
    stem = PrimusSeg(4, 2, version=version, stem_features=[32, 32, 48, 64], **ARGUMENTS).down_projection
    for name, module in stem.named_modules():
        if isinstance(module, nn.Conv3d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.2), name
            assert module.bias is None or not module.bias.any()
    scales = [weight.item() for name, weight in stem.named_parameters() if "scale_" in name]
    assert scales == pytest.approx([] if version == 2 else [1e-5] * 3)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("size", PRIMUS_SIZES)
def test_every_size_can_be_built(size: str, num_axes: int, version: int) -> None:
    patch = (16,) * num_axes
    with torch.device("meta"):
        kwargs = primus_kwargs(size, num_axes, version)
        network = PrimusSeg(1, 3, patch_embed_size=(8,) * num_axes, input_shape=patch, **kwargs)
        assert network(torch.zeros(2, 1, *patch)).shape == (2, 3, *patch)
    if size == "CPU":
        assert num_parameters(network) < 6e6
    else:
        assert "stem_features" not in kwargs
    assert json.loads(json.dumps(kwargs)) == kwargs


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("token", [(4, 8, 8), (4, 4, 4), (1, 8, 8), (16, 16, 16), (8, 8)])
def test_other_tokens(token: tuple[int, ...], version: int) -> None:
    patch = tuple(2 * size for size in token)
    with torch.device("meta"):
        network = PrimusSeg(1, 2, 48, token, patch, 1, 2, version=version)
        x = torch.zeros(1, 1, *patch)
        assert network.down_projection(x).shape == (1, 48, *(2,) * len(token))
        assert network(x).shape == (1, 2, *patch)
    assert _token_size(network) == token


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 4},
        {"version": 1, "stem_features": [4, 4, 8, 8]},
        {"version": 2, "stem_features": [4, 4, 8]},
        {"version": 3, "stem_features": [4, 0, 8, 8]},
        {"version": 2, "input_shape": (8, 8, 8)},
        {"version": 2, "patch_embed_size": (128,) * 3, "input_shape": (256,) * 3},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MFMError, match=f"E_CONFIG.*version={changes['version']}"):
        PrimusSeg(1, 2, **{**ARGUMENTS, **changes})


@pytest.mark.parametrize(("version", "patch"), CASES)
def test_encoder_head_and_what_depends_on_the_number_of_outputs(version: int, patch: tuple[int, ...]) -> None:
    few, many = (tiny_network("primus", patch, num_outputs=k, **tiny(version)) for k in (1, 9))
    changed = {n for (n, a), (_, b) in zip(few.named_parameters(), many.named_parameters()) if a.shape != b.shape}
    assert changed == family_of(few).head_names(few) == {"up_projection.decode.2.weight", "up_projection.decode.2.bias"}
    names = {name for name, _ in few.named_parameters()}
    assert family_of(few).encoder_names(few) == {name for name in names if not name.startswith("up_projection.")}


@pytest.mark.parametrize(("version", "patch"), CASES)
def test_the_memory_estimate_is_what_autograd_keeps(version: int, patch: tuple[int, ...]) -> None:
    network = tiny_network("primus", patch, 2, 3, **tiny(version)).train()
    estimate = estimate_training_memory(network, (2, 2, *patch), "adamw")
    assert estimate.activations == pytest.approx(really_kept(network, torch.randn(2, 2, *patch)), rel=0.02)


# Hiding


@pytest.mark.parametrize(("version", "patch"), CASES)
@pytest.mark.parametrize("restoring", ["drop", "replace"])
@pytest.mark.parametrize("fill_value", [0.0, -3.0])
def test_what_is_hidden_has_no_influence_at_all(
    version: int, patch: tuple[int, ...], restoring: str, fill_value: float
) -> None:
    backbone = backbone_of(version, patch, restoring).eval()
    hidden, (x, other) = hidden_mask(patch, 2), torch.randn(2, 2, 2, *patch)
    with torch.no_grad():
        a = backbone.restore(x, hidden, fill_value)
        assert (backbone.restore(torch.where(hidden, 100 * other, x), hidden, fill_value) - a).abs().max() == 0
        seen = torch.where(hidden, x, x + 0.5 * other)
        assert (backbone.restore(seen, hidden, fill_value) - a).abs().max() > 1e-4
        # The kernels do overlap: without filling, the visible tokens would know what is hidden.
        visible = backbone.visible_tokens(hidden)
        leaking = backbone.encode(torch.where(hidden, 100 * other, x), visible) - backbone.encode(x, visible)
        assert leaking.abs().max() > 1e-3


@pytest.mark.parametrize(("version", "patch"), CASES)
def test_hidden_tokens_never_enter_the_transformer(version: int, patch: tuple[int, ...]) -> None:
    backbone = backbone_of(version, patch).eval()
    seen: list[int] = []
    backbone.network.eva.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    hidden = hidden_mask(patch, 2)
    with torch.no_grad():
        backbone.restore(torch.randn(2, 2, *patch), hidden)
    total = backbone.num_tokens
    assert seen == [total - int(0.5 * total)]


@pytest.mark.parametrize(("version", "patch"), CASES)
def test_with_nothing_hidden_the_encoder_is_the_plain_one(version: int, patch: tuple[int, ...]) -> None:
    backbone = backbone_of(version, patch).eval()
    x, nothing = torch.randn(2, 2, *patch), torch.zeros(2, 1, *patch, dtype=torch.bool)
    with torch.no_grad():
        tokens = backbone.encode(x, backbone.visible_tokens(nothing))
        grid = tokens.transpose(1, 2).reshape(2, -1, *backbone.token_grid)
        torch.testing.assert_close(backbone.network.up_projection(grid), backbone(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(backbone.features(x)[0], grid, rtol=1e-4, atol=1e-5)
        smaller = backbone.features(x[:, :, :8])[0]
        assert smaller.shape[2:] == (1, *backbone.token_grid[1:])


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        backbone = backbone_of(3, PATCH, "none").train()
        if recompute:
            backbone.recompute_activations()
        torch.manual_seed(1)
        backbone(torch.randn(2, 2, *PATCH)).square().mean().backward()
        gradients.append([weight.grad for weight in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# Pretext tasks


@pytest.mark.parametrize("name", ["mae", "simmim", "volume_fusion"])
@pytest.mark.parametrize(("version", "patch"), CASES)
def test_pretext_tasks_train_every_weight_and_lower_their_loss(name: str, version: int, patch: tuple[int, ...]) -> None:
    task_class = find_task(name)
    outputs = task_class.num_outputs(task_class.Config(), 1)
    network = tiny_network("primus", patch, 1, outputs, drop_path_rate=0.0, **tiny(version))
    backbone = make_backbone(network, patch, task_class.restoring)
    task = task_class(task_class.resolve(task_class.Config(), backbone.geometry()), backbone).train()
    batch = make_batch(task)
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = task(batch).loss
        loss.backward()
        losses.append(loss.item())
        missing = [name for name, weight in task.named_parameters() if weight.grad is None]
        assert not missing, missing
        optimizer.step()
    assert task(batch).loss.item() < losses[0]
    assert list(network.state_dict()) == list(tiny_network("primus", patch, 1, 3, **tiny(version)).state_dict())


# Transfer


@pytest.mark.parametrize(("version", "patch"), CASES)
def test_weights_travel_with_decoder_channels_and_positions(version: int, patch: tuple[int, ...]) -> None:
    source = tiny_network("primus", patch, 1, 1, **tiny(version))
    for weight in source.parameters():
        nn.init.normal_(weight, std=0.1)
    larger = tuple(size + 8 for size in patch)
    target = tiny_network("primus", larger, 3, 5, **tiny(version))
    report = transfer_weights(source.state_dict(), target, source_patch_size=patch)
    assert report.encoder_share == 1
    assert {entry.name for entry in report.new} == family_of(target).head_names(target)
    assert not [entry for entry in report.ignored if entry.how == "not in this network"]
    adapted = {entry.name: entry.how for entry in report.adapted}
    stem = "down_projection.stem.blocks.0."
    assert set(adapted) == {f"{stem}conv1.conv.weight", f"{stem}skip.0.conv.weight", "eva.pos_embed"}
    grids = [tuple(size // 8 for size in shape) for shape in (patch, larger)]
    assert str(grids[0]) in adapted["eva.pos_embed"]
    assert str(grids[1]) in adapted["eva.pos_embed"]
    # Equal channels give what the single one gave.
    x = torch.randn(1, 1, *larger)
    same = tiny_network("primus", larger, 1, 5, **tiny(version))
    transfer_weights(source.state_dict(), same, source_patch_size=patch)
    with torch.no_grad():
        torch.testing.assert_close(
            target.down_projection(x.expand(-1, 3, *larger)), same.down_projection(x), rtol=1e-3, atol=1e-3
        )


def test_a_checkpoint_of_another_version_gives_its_transformer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MINIMUM_ENCODER_SHARE", 0.0)
    source, target = (tiny_network("primus", PATCH, version=version) for version in (1, 2))
    report = transfer_weights(source.state_dict(), target, source_patch_size=PATCH)
    new = {entry.name for entry in report.new}
    stem = {name for name, _ in target.named_parameters() if name.startswith("down_projection.")}
    assert new == stem | family_of(target).head_names(target)


def test_dnas_own_class_takes_weights_of_another_patch() -> None:
    plans = []
    for patch in (PATCH, (16, 32, 16)):
        plan_of = tiny_plans("primus", patch)
        path = "dynamic_network_architectures.architectures.primus.PrimusV2"
        plan_of["configurations"][CONFIGURATION]["architecture"]["network_class_name"] = path
        plans.append(plan_of)
    source, target = (build_network(plan_of, CONFIGURATION, 1, 2) for plan_of in plans)
    report = transfer_weights(source.state_dict(), target, source_patch_size=PATCH)
    assert "eva.pos_embed" in {entry.name for entry in report.adapted}
    assert report.encoder_share == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_from_pretraining_to_a_fine_tuned_model(version: int, tmp_path: Path) -> None:
    architecture = primus((16, 16, 16), **tiny(version))
    corpus, labelled = tiny_run.prepare(tmp_path / "a"), finetune_tiny.make(tmp_path / "b")
    for file in (
        corpus.preprocessed / tiny_run.NAME / "mfmPlans.json",
        labelled.preprocessed / finetune_tiny.NAME / "mfmPlans.json",
    ):
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"]["architecture"] = architecture
        file.write_text(json.dumps(plans))
    short = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "num_workers=0")
    weights = tiny_run.run(corpus, "mae", short)
    overrides = ("finetune.epochs=1", "finetune.iterations_per_epoch=1")
    with workspace.use(tmp_path / "b"):
        folder = run_training(
            labelled, finetune_tiny.NAME, "3d_fullres", 0, device="cpu", pretrained_weights=weights, overrides=overrides
        )
    trained = checkpoint.load_weights(folder / "checkpoint_final.pth")["network_weights"]
    assert any(name.startswith("down_projection.stages.2.") for name in trained)
    report = json.loads((folder / "transfer.json").read_text())
    assert {entry["name"] for entry in report["new"]} == {
        f"up_projection.decode.2.{kind}" for kind in ("weight", "bias")
    }


# Plans


def make(root: Path, network: Any, **request: Any) -> Any:
    with workspace_with(root, "Dataset004_X", **HIPPOCAMPUS) as here:
        wanted = PlanRequest(["Dataset004_X"], network=network, **request)
        return plan(here, "Dataset004_X", wanted, check_request(wanted))


@pytest.mark.parametrize(("network", "version"), [("primus_v2", 2), ("primus_v3", 3)])
def test_plans_name_their_version_and_build(tmp_path: Path, network: str, version: int) -> None:
    result = make(tmp_path, network)
    assert result.file.name == f"mfmPrimusV{version}Plans.json"
    plans = json.loads(result.file.read_text())
    block = mfm_settings.block_of(plans)
    assert block.network == "primus"
    assert (block.pretrain.optimizer, block.pretrain.learning_rate, block.finetune.gradient_clip) == ("adamw", 1e-3, 1)
    for name, patch in (("3d_fullres", (40, 56, 40)), ("2d", (56, 40))):
        kwargs = plans["configurations"][name]["architecture"]["arch_kwargs"]
        assert (kwargs["version"], tuple(kwargs["input_shape"])) == (version, patch)
        network_of_plan = build_network(plans, name, 1, 3, deep_supervision=True)
        assert isinstance(network_of_plan, PrimusSeg)
        assert num_parameters(network_of_plan) < 6e6
        with torch.no_grad():
            assert network_of_plan(torch.zeros(1, 1, *patch)).shape == (1, 3, *patch)
    assert any(f"Primus V{version} 192 wide" in decision.value for decision in result.decisions)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_budget_counts_the_stem(version: int) -> None:
    """At full size the stem has 32 channels, so the same memory holds less of the rest."""
    shape, spacing = (64.0,) * 3, (1.0,) * 3
    batches = []
    for name in ("primus", f"primus_v{version}"):
        planned = family_named(name).plan_network(Sizing(name, shape, spacing, 24.0, 1, 3, stock={}))
        assert planned.patch_size == (64, 64, 64)
        batches.append(planned.batch_size * planned.architecture["arch_kwargs"]["embed_dim"])
    assert batches[1] < batches[0]
    assert "stem_features" not in primus_architecture("S", (64, 64, 64), version)["arch_kwargs"]


def test_a_plan_has_one_version(tmp_path: Path) -> None:
    make(tmp_path, "primus_v2", plans_name="mfmX")
    mixed = make(tmp_path, "primus_v3", plans_name="mfmX", configurations=("3d_fullres",)).plans
    assert set(mixed["configurations"]) == {"3d_fullres"}
    kept = make(tmp_path, "primus_v3", plans_name="mfmX", configurations=("2d",)).plans
    assert set(kept["configurations"]) == {"2d", "3d_fullres"}


def test_a_plan_like_a_checkpoint_has_its_version(tmp_path: Path) -> None:
    theirs = make(tmp_path, "primus_v2").plans
    file = pretrained_checkpoint(tmp_path / "checkpoint_final.pth", theirs, "3d_fullres")
    result = make(tmp_path, "resenc", like=file)
    assert result.file.name == "mfmLikePrimusV2Plans.json"
    kwargs = result.plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs == theirs["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert make(tmp_path, "primus_v2", like=file).file == result.file
    for other in ("primus", "primus_v3"):
        with pytest.raises(MFMError, match=rf"--network {other} and --like.*primus_v2"):
            make(tmp_path, other, like=file)
