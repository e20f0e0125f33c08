"""PrimusSeg in its versions: DNA's encoders where it should be, a decoder that is the same for all outputs, plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2, PrimusV3
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode
from torch import nn

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.plan import check_request, plan
from mfm_nnunet.models import transfer
from mfm_nnunet.models.families import Sizing, family_named, family_of
from mfm_nnunet.models.memory import num_parameters
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.primus import (
    PRIMUS_SIZES,
    REFERENCE_OUTPUTS,
    PatchDecoder,
    PrimusSeg,
    decoder_widths,
    primus_kwargs,
)
from mfm_nnunet.models.primus_family import primus_architecture
from mfm_nnunet.models.transfer import transfer_weights
from mfm_nnunet.requests import PlanRequest
from tests.builders.tiny_data import HIPPOCAMPUS, pretrained_checkpoint, workspace_with
from tests.builders.tiny_plans import CONFIGURATION, tiny_network, tiny_plans

PATCH = (16, 24, 16)
ARGUMENTS: dict[str, Any] = {
    "embed_dim": 48,
    "patch_embed_size": (8, 8, 8),
    "input_shape": PATCH,
    "eva_depth": 2,
    "eva_numheads": 2,
}
THEIRS = {1: Primus, 2: PrimusV2, 3: PrimusV3}
CASES = [(f"primus_v{version}", patch) for version in (2, 3) for patch in (PATCH, (16, 24))]


# The network


@pytest.mark.parametrize("version", THEIRS)
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
    convolutions = [name for name, module in ours.named_modules() if isinstance(module, nn.Conv3d)]
    seeing = {name for name in convolutions if ours.get_submodule(name).in_channels == 2}
    assert set(ours.keys_to_in_proj) >= seeing, "a convolution that sees the image would not be adapted to channels"


@pytest.mark.parametrize("network", ["primus", "primus_v2", "primus_v3"])
def test_only_the_last_layer_depends_on_the_number_of_outputs(network: str) -> None:
    built = tiny_network(network, PATCH)
    assert family_of(built).head_names(built) == {"up_projection.decode.2.weight", "up_projection.decode.2.bias"}
    names = {name for name, _ in built.named_parameters()}
    assert family_of(built).encoder_names(built) == {name for name in names if not name.startswith("up_projection.")}


@pytest.mark.parametrize("token", [(8, 8, 8), (4, 8, 8), (16, 16, 16), (1, 4, 4), (2, 2, 2)])
def test_decoder_is_dnas_for_the_reference_number_of_outputs(token: tuple[int, ...]) -> None:
    ours, theirs = PatchDecoder(token, 864, REFERENCE_OUTPUTS), PatchDecode(token, 864, REFERENCE_OUTPUTS)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert tuple(ours(torch.zeros(1, 864, 1, 1, 1)).shape) == (1, REFERENCE_OUTPUTS, *token)


def test_initialisation_is_he_once() -> None:
    torch.manual_seed(0)
    network = PrimusSeg(1, 2, **{**ARGUMENTS, "embed_dim": 192})
    gain = (2 / (1 + 1e-4)) ** 0.5
    stem = network.down_projection.proj
    assert stem.weight.std().item() == pytest.approx(gain / 512**0.5, rel=0.05)
    assert not stem.bias.any()
    for layer in (network.up_projection.decode[0][0], network.up_projection.decode[2]):
        assert layer.weight.std().item() == pytest.approx(gain / layer.in_channels**0.5, rel=0.15)
        assert not layer.bias.any()
    assert not hasattr(network, "initialize")  # else nnU-Net's factory would initialise a second time
    with torch.no_grad():
        assert 0.3 < network.eval()(torch.randn(1, 1, *PATCH)).std() < 3


@pytest.mark.parametrize("version", [2, 3])
def test_initialisation_of_stems_is_he_and_starts_without_skips(version: int) -> None:
    stem = PrimusSeg(4, 2, version=version, stem_features=[32, 32, 48, 64], **ARGUMENTS).down_projection
    for name, module in stem.named_modules():
        if isinstance(module, nn.Conv3d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.2), name
            assert module.bias is None or not module.bias.any()
    scales = [weight.item() for name, weight in stem.named_parameters() if "scale_" in name]
    assert scales == pytest.approx([] if version == 2 else [1e-5] * 3)


@pytest.mark.parametrize("version", THEIRS)
@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("size", PRIMUS_SIZES)
def test_every_size_can_be_built(size: str, num_axes: int, version: int) -> None:
    patch = (16,) * num_axes
    with torch.device("meta"):
        kwargs = primus_kwargs(size, num_axes, version)
        network = PrimusSeg(1, 3, patch_embed_size=(8,) * num_axes, input_shape=patch, **kwargs)
        assert network(torch.zeros(2, 1, *patch)).shape == (2, 3, *patch)
    if size == "CPU":
        assert 1e6 < num_parameters(network) < (3e6 if version == 1 and num_axes == 3 else 6e6)
    else:
        assert "stem_features" not in kwargs
    assert version > 1 or num_axes == 2 or kwargs == PRIMUS_SIZES[size]
    assert json.loads(json.dumps(kwargs)) == kwargs


def test_primus_m_has_the_published_number_of_encoder_weights() -> None:
    with torch.device("meta"):
        network = PrimusSeg(1, 2, patch_embed_size=(8,) * 3, input_shape=(160,) * 3, **PRIMUS_SIZES["M"])
    weights = network.state_dict()
    encoder = {name: w for name, w in weights.items() if name.startswith(("eva.", "down_projection."))}
    assert len(encoder) == 373
    assert sum(w.numel() for w in encoder.values()) == pytest.approx(151.0e6, rel=0.001)
    assert weights["eva.pos_embed"].shape == (1, 8000, 864)
    assert set(weights) - set(encoder) == {n for n in weights if n.startswith("up_projection.")}
    assert decoder_widths(864, 3) == [864, 192, 48]


@pytest.mark.parametrize("version", THEIRS)
@pytest.mark.parametrize("token", [(4, 8, 8), (4, 4, 4), (1, 8, 8), (16, 16, 16), (8, 8)])
def test_other_tokens(token: tuple[int, ...], version: int) -> None:
    patch = tuple(2 * size for size in token)
    with torch.device("meta"):
        network = PrimusSeg(1, 2, 48, token, patch, 1, 2, version=version, deep_supervision=True)
        x = torch.zeros(1, 1, *patch)
        assert network.down_projection(x).shape == (1, 48, *(2,) * len(token))
        assert network(x).shape == (1, 2, *patch)


def test_2d_positions_are_of_both_axes() -> None:
    rotary = PrimusSeg(1, 1, 48, (8, 8), (24, 32), 1, 2).eva.rope.get_embed()
    assert rotary.shape == (12, 48)
    assert len({tuple(row.tolist()) for row in rotary}) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 50},
        {"eva_numheads": 5},
        {"input_shape": (24, 32, 41)},
        {"patch_embed_size": (6, 8, 8)},
        {"patch_embed_size": (8, 8)},
        {"patch_embed_size": (1, 1, 1)},
        {"version": 4},
        {"version": 1, "stem_features": [4, 4, 8, 8]},
        {"version": 2, "stem_features": [4, 4, 8]},
        {"version": 3, "stem_features": [4, 0, 8, 8]},
        {"version": 2, "input_shape": (8, 8, 8)},
        {"version": 2, "patch_embed_size": (128,) * 3, "input_shape": (256,) * 3},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    expected = f"E_CONFIG.*version={changes['version']}" if "version" in changes else "E_CONFIG"
    with pytest.raises(MFMError, match=expected):
        PrimusSeg(1, 2, **{**ARGUMENTS, **changes})


def test_another_patch_is_refused() -> None:
    with pytest.raises(AssertionError):
        PrimusSeg(1, 2, **ARGUMENTS)(torch.zeros(1, 1, 32, 32, 40))


# Transfer


@pytest.mark.parametrize(("network", "patch"), CASES)
def test_weights_travel_with_decoder_channels_and_positions(network: str, patch: tuple[int, ...]) -> None:
    source = tiny_network(network, patch, 1, 1)
    for weight in source.parameters():
        nn.init.normal_(weight, std=0.1)
    larger = tuple(size + 8 for size in patch)
    target = tiny_network(network, larger, 3, 5)
    report = transfer_weights(source.state_dict(), target, source_patch_size=patch)
    assert report.encoder_share == 1
    assert {entry.name for entry in report.new} == family_of(target).head_names(target)
    assert not [entry for entry in report.ignored if entry.how == "not in this network"]
    adapted = {entry.name: entry.how for entry in report.adapted}
    stem = "down_projection.stem.blocks.0."
    assert set(adapted) == {f"{stem}conv1.conv.weight", f"{stem}skip.0.conv.weight", "eva.pos_embed"}
    grids = [tuple(size // 8 for size in shape) for shape in (patch, larger)]
    assert all(str(grid) in adapted["eva.pos_embed"] for grid in grids)
    # Equal channels give what the single one gave.
    x = torch.randn(1, 1, *larger)
    same = tiny_network(network, larger, 1, 5)
    transfer_weights(source.state_dict(), same, source_patch_size=patch)
    with torch.no_grad():
        torch.testing.assert_close(
            target.down_projection(x.expand(-1, 3, *larger)), same.down_projection(x), rtol=1e-3, atol=1e-3
        )


def test_a_checkpoint_of_another_version_gives_its_transformer_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MINIMUM_ENCODER_SHARE", 0.0)
    source, target = (tiny_network(network, PATCH) for network in ("primus", "primus_v2"))
    report = transfer_weights(source.state_dict(), target, source_patch_size=PATCH)
    new = {entry.name for entry in report.new}
    stem = {name for name, _ in target.named_parameters() if name.startswith("down_projection.")}
    assert new == stem | family_of(target).head_names(target)


def test_dnas_own_class_takes_weights_of_another_patch() -> None:
    networks = []
    for patch in (PATCH, (16, 32, 16)):
        plans = tiny_plans("primus", patch)
        path = "dynamic_network_architectures.architectures.primus.PrimusV2"
        plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"] = path
        networks.append(build_network(plans, CONFIGURATION, 1, 2))
    report = transfer_weights(networks[0].state_dict(), networks[1], source_patch_size=PATCH)
    assert "eva.pos_embed" in {entry.name for entry in report.adapted}
    assert report.encoder_share == 1


# Plans


def make(root: Path, network: Any, **request: Any) -> Any:
    with workspace_with(root, "Dataset004_X", **HIPPOCAMPUS) as here:
        wanted = PlanRequest(["Dataset004_X"], network=network, **request)
        return plan(here, "Dataset004_X", wanted, check_request(wanted))


def test_plans_name_their_version_and_so_does_a_plan_like_their_checkpoint(tmp_path: Path) -> None:
    for version in (2, 3):
        result = make(tmp_path, f"primus_v{version}")
        assert result.file.name == f"mfmPrimusV{version}Plans.json"
        plans = json.loads(result.file.read_text())
        block = mfm_settings.block_of(plans)
        assert block.network == "primus"
        assert (block.pretrain.optimizer, block.pretrain.learning_rate) == ("adamw", 1e-3)
        assert block.finetune.gradient_clip == 1
        for name, patch in (("3d_fullres", (40, 56, 40)), ("2d", (56, 40))):
            kwargs = plans["configurations"][name]["architecture"]["arch_kwargs"]
            assert (kwargs["version"], tuple(kwargs["input_shape"])) == (version, patch)
        assert any(f"Primus V{version} 192 wide" in decision.value for decision in result.decisions)
    file = pretrained_checkpoint(tmp_path / "checkpoint_final.pth", plans, "3d_fullres")
    result = make(tmp_path, "resenc", like=file)
    assert result.file.name == "mfmLikePrimusV3Plans.json"
    architectures = [p["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] for p in (plans, result.plans)]
    assert architectures[0] == architectures[1]
    assert make(tmp_path, "primus_v3", like=file).file == result.file
    for other in ("primus", "primus_v2"):
        with pytest.raises(MFMError, match=rf"--network {other} and --like.*primus_v3"):
            make(tmp_path, other, like=file)


def test_a_budget_counts_the_stem() -> None:
    """At full size the stem has 32 channels, so the same memory holds less of the rest."""
    batches = []
    for name in ("primus", "primus_v3"):
        planned = family_named(name).plan_network(Sizing(name, (64.0,) * 3, (1.0,) * 3, 24.0, 1, 3, stock={}))
        assert planned.patch_size == (64, 64, 64)
        batches.append(planned.batch_size * planned.architecture["arch_kwargs"]["embed_dim"])
    assert batches[1] < batches[0]
    assert "stem_features" not in primus_architecture("S", (64, 64, 64), 3)["arch_kwargs"]


def test_a_plan_has_one_version(tmp_path: Path) -> None:
    make(tmp_path, "primus_v2", plans_name="mfmX")
    mixed = make(tmp_path, "primus_v3", plans_name="mfmX", configurations=("3d_fullres",)).plans
    assert set(mixed["configurations"]) == {"3d_fullres"}
    kept = make(tmp_path, "primus_v3", plans_name="mfmX", configurations=("2d",)).plans
    assert set(kept["configurations"]) == {"2d", "3d_fullres"}
