"""Swin U-Nets: the papers' numbers, windows, masked restoration, other tiles, transfer, files of VISION-MAE."""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange.read import read_checkpoint
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.families import PlannedNetwork, Sizing, family_named
from mfm_nnunet.models.memory import num_parameters
from mfm_nnunet.models.networks import build_architecture, build_network
from mfm_nnunet.models.swin import SwinUNet, resize_table
from mfm_nnunet.models.swin_family import SWIN, common_window, divides, map_sizes
from mfm_nnunet.models.transfer import transfer_weights
from mfm_nnunet.models.windows import table_rows
from tests.builders.architectures import swin
from tests.builders.tiny_plans import CONFIGURATION, tiny_backbone, tiny_network

FAMILY = family_named("swin")
PAPER: dict[str, Any] = {
    "embed_dim": 96,
    "depths": [2, 2, 2, 2],
    "num_heads": [3, 6, 12, 24],
    "stem": [4, 4],
    "merging": [[2, 2]] * 3,
    "window": [7, 7],
}


def paper(inputs: int, outputs: int, **changes: Any) -> SwinUNet:
    torch.manual_seed(0)
    return SwinUNet(inputs, outputs, **{**PAPER, **changes})


def small(width: int, heads: int = 1) -> dict[str, Any]:
    return {"embed_dim": width, "num_heads": [heads * 2**stage for stage in range(4)]}


@pytest.mark.parametrize(
    ("inputs", "outputs", "changes", "expected"),
    [
        (3, 3, {"skips": False}, 26_635_860 - 96),  # without the mask token, which the backbone has
        (1, 1, {"skips": False}, 26_629_684 - 96),
        (3, 2, {}, 27_166_692),
        (1, 2, {}, 27_163_620),
        (3, 2, {"depths": [2, 2, 6, 2]}, 41_378_628 - 4 * 1_776_492),  # theirs has six blocks in the decoder too
        (1, 2, small(24), 1_715_900),
        (1, 2, small(32), 3_037_516),
        (1, 2, small(48, heads=3), 6_823_812),
    ],
)
def test_parameters_are_those_of_the_papers_networks(
    inputs: int, outputs: int, changes: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        assert num_parameters(paper(inputs, outputs, **changes)) == expected


def test_the_parts_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        network = paper(3, 3, skips=False)
    stages = [num_parameters(layer) for layer in network.encoder.layers]
    assert stages == [299_190, 1_188_204, 4_735_704, 14_183_856]
    assert num_parameters(network.encoder.patch_embed) == 4_896
    decoder = network.decoder.layers
    assert num_parameters(decoder[0]["expand"]) == 1_180_416
    blocks = [num_parameters(layer["blocks"]) for layer in decoder]
    expanding = [num_parameters(layer["expand"]) for layer in decoder][1:]
    assert [a + b for a, b in zip(blocks, [*expanding, 0])] == [3_848_280, 965_676, 224_694]
    assert num_parameters(network.head) == 4_656
    # 14 tables of indices, positions that are never used and the mask token make the 224 of their file.
    assert len(network.state_dict()) + 14 + 2 == 224
    with torch.device("meta"):
        assert len(paper(3, 2).state_dict()) + 14 == 230


def random_weights(network: nn.Module) -> None:
    """Weights so large that a wrong offset, order or mask is seen."""
    for name, weight in network.named_parameters():
        nn.init.normal_(weight, 1.0 if name.endswith("norm.weight") else 0.0, 0.3 if "table" not in name else 2.0)


def reference(weights: dict[str, Tensor], image: Tensor, heads: list[int], shifts_all: bool) -> Tensor:
    """Section by section from the specification; attention over all pairs of tokens instead of windows."""

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def attention(x: Tensor, name: str, number: int, shift: int) -> Tensor:
        height, width = x.shape[1:3]
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        shifted = (places - shift) % torch.tensor([height, width])
        group = torch.cat([shifted // 7, places < shift], 1)
        is_seen = (group[:, None] == group[None]).all(-1)
        offset = (shifted[:, None] - shifted[None]).clamp(-6, 6) + 6
        bias = weights[f"{name}.relative_position_bias_table"][offset[..., 0] * 13 + offset[..., 1]].permute(2, 0, 1)
        q, k, v = linear(x, f"{name}.qkv").reshape(1, len(places), 3, number, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + bias
        mixed = scores.masked_fill(~is_seen, -math.inf).softmax(-1) @ v
        return linear(mixed.transpose(1, 2).reshape(x.shape), f"{name}.proj")

    x = functional.conv2d(image, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    for stage, number in enumerate(heads):
        for block in range(2):
            name = f"layers.{stage}.blocks.{block}"
            shift = 3 if block and (min(x.shape[1:3]) > 7 or shifts_all) else 0
            x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn", number, shift)
            x = x + linear(functional.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
        if stage < len(heads) - 1:
            corners = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
            name = f"layers.{stage}.downsample"
            x = linear(norm(corners, f"{name}.norm"), f"{name}.reduction")
    return x


THREE_STAGES: dict[str, Any] = {"depths": [2] * 3, "merging": [[2, 2]] * 2, "embed_dim": 12, "num_heads": [1, 2, 4]}


def in_their_names(network: SwinUNet) -> dict[str, Tensor]:
    """The encoder as VISION-MAE's files have it."""
    return {name.removeprefix("encoder."): value for name, value in network.state_dict().items() if "encoder." in name}


@pytest.mark.parametrize("always_shift", [False, True])
@torch.no_grad()
def test_the_encoder_is_the_specified_one(always_shift: bool) -> None:
    network = paper(1, 2, **THREE_STAGES, always_shift=always_shift).eval()
    random_weights(network)
    image = torch.randn(1, 1, 112, 112)
    _, outputs = network.encoder(network.encoder.patch_embed(image))
    expected = reference(in_their_names(network), image, THREE_STAGES["num_heads"], always_shift)
    torch.testing.assert_close(outputs[-1][:, 0], expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("always_shift", [False, True])
@torch.no_grad()
def test_the_encoder_is_timms(always_shift: bool) -> None:
    network = paper(3, 2, **small(24), always_shift=always_shift).eval()
    random_weights(network)
    size = (224, 448) if not always_shift else (224, 224)
    theirs = SwinTransformer(
        size, 4, 3, 0, "", 24, (2, 2, 2, 2), (1, 2, 4, 8), window_size=7,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), always_partition=always_shift,
    )  # fmt: skip
    renamed = {}
    for name, value in in_their_names(network).items():
        if ".downsample." in name:
            layer = int(name.split(".")[1])
            name = name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
        renamed[name] = value
    missing, unexpected = theirs.eval().load_state_dict(renamed, strict=False)
    assert not unexpected
    assert set(missing) == {"norm.weight", "norm.bias"}
    theirs.norm = nn.Identity()
    image = torch.randn(1, 3, *size)
    _, outputs = network.encoder(network.encoder.patch_embed(image))
    expected = theirs.forward_features(image)
    torch.testing.assert_close(outputs[-1][:, 0], expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("patch", [(64, 96), (32, 16, 48)])
@pytest.mark.parametrize("restoring", ["drop", "replace"])
@torch.no_grad()
def test_hidden_voxels_reach_nothing(patch: tuple[int, ...], restoring: Any) -> None:
    backbone = tiny_backbone("swin", patch, 2, 2, restoring).eval()
    random_weights(backbone)
    cell = backbone.mask_cell()
    assert cell == (8,) * len(patch)  # 4 tokens of two voxels
    image, other = torch.randn(2, 1, 2, *patch)
    hidden = torch.zeros(1, 1, *patch, dtype=torch.bool)
    hidden[(..., *(slice(8, 24) if size > 16 else slice(8) for size in patch))] = True
    restored = backbone.restore(image, hidden)
    assert torch.equal(restored, backbone.restore(torch.where(hidden, other, image), hidden))
    assert not torch.equal(restored, backbone.restore(torch.where(hidden, image, other), hidden))
    assert not torch.equal(restored, backbone(image))


def test_windows_divide_all_maps_of_the_sizes_listed() -> None:
    """m is the tokens of the last of four maps."""
    windows = {m: common_window([8 * m, 4 * m, 2 * m, m], 2) for m in range(1, 17)}
    assert {m for m, window in windows.items() if window} == {*range(1, 9), 10, 12, 14, 15, 16}
    assert (windows[7], windows[10], windows[12]) == (7, 5, 6)


def planned(shape: tuple[int, ...], spacing: tuple[float, ...], memory_gb: float | None = None) -> PlannedNetwork:
    return FAMILY.plan_network(Sizing("swin", shape, spacing, memory_gb, 1, 2, stock={}))


@pytest.mark.parametrize(
    ("shape", "spacing", "stem", "mergings"),
    [
        ((512, 512), (1, 1), (4, 4), (8, 8)),
        ((540, 800), (1, 1), (4, 4), (8, 8)),
        ((100, 300), (0.5, 0.5), (4, 4), (8, 8)),
        ((40, 56, 40), (1, 1, 1), (2, 2, 2), (8, 8, 8)),
        ((160, 200, 180), (1, 1, 1), (4, 4, 4), (8, 8, 8)),
        ((10, 176, 176), (10, 1.4, 1.4), (1, 4, 4), (4, 8, 8)),
        ((20, 320, 320), (3, 0.6, 0.6), (1, 4, 4), (8, 8, 8)),
        ((1, 64, 64), (1, 1, 1), (2, 2, 2), (1, 8, 8)),
    ],
)
@torch.no_grad()
def test_a_plan_follows_image_and_spacing(
    shape: tuple[int, ...], spacing: tuple[float, ...], stem: tuple[int, ...], mergings: tuple[int, ...]
) -> None:
    result = planned(shape, spacing)
    kwargs = result.architecture["arch_kwargs"]
    assert tuple(kwargs["stem"]) == stem
    assert tuple(math.prod(along) for along in zip(*kwargs["merging"])) == mergings
    assert FAMILY.patch_problem(kwargs, result.patch_size) == ""
    for edge, first, along, window in zip(result.patch_size, stem, zip(*kwargs["merging"]), kwargs["window"]):
        assert divides(window, map_sizes(edge, (first, *along)))
    network = build_architecture(result.architecture, 1, 2).eval()
    assert network(torch.zeros(1, 1, *result.patch_size)).shape == (1, 2, *result.patch_size)


def test_a_budget_decides_channels_and_patch() -> None:
    widths = []
    for memory_gb in (24.0, 2.0, 0.5):
        result = planned((320, 320), (1, 1), memory_gb)
        widths.append(result.architecture["arch_kwargs"]["embed_dim"])
        assert result.batch_size >= 2
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == 96
    assert planned((128, 128, 128), (1, 1, 1), 24.0).architecture["arch_kwargs"]["embed_dim"] == 96
    with pytest.raises(MFMError) as caught:
        planned((128, 128, 128), (1, 1, 1), 0.01)
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("patch", "expected"), [((288, 224), "448 x 224"), ((200, 224), "224 x 224"), ((224, 350), "224 x 448")]
)
def test_a_patch_that_no_window_divides_is_refused_with_the_next(patch: tuple[int, int], expected: str) -> None:
    architecture = {"network_class_name": SWIN, "arch_kwargs": PAPER, "_kw_requires_import": []}
    plans = {"plans_name": "p", "configurations": {"2d": {"patch_size": list(patch), "architecture": architecture}}}
    with pytest.raises(MFMError, match=f"next legal size is {expected}") as caught:
        build_network(plans, "2d", 1, 2)
    assert caught.value.code == "E_CONFIG"


def test_impossible_windows_and_arguments_are_refused() -> None:
    assert "at most 512" in FAMILY.patch_problem(swin((36, 36, 36), window=[9, 9, 9])["arch_kwargs"], (36, 36, 36))
    for wrong in ({"depths": [2, 2]}, {"num_heads": [5, 5, 5]}, {"stem": [2]}, {"no_such": 1}):
        plans = {"patch_size": [16, 16, 16], "architecture": swin((16, 16, 16), **wrong)}
        with pytest.raises(MFMError) as caught:
            build_network({"plans_name": "p", "configurations": {CONFIGURATION: plans}}, CONFIGURATION, 1, 2)
        assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("shape", "spacing"), [((64, 96), (1, 1)), ((40, 56, 40), (1, 1, 1)), ((10, 64, 64), (8, 1, 1))]
)
def test_every_parameter_gets_a_gradient(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    result = planned(shape, spacing)
    backbone = make_backbone(build_architecture(result.architecture, 1, 1), result.patch_size, "drop").eval()
    hidden = torch.zeros(1, 1, *result.patch_size, dtype=torch.bool)
    hidden[(..., *(slice(cell) for cell in backbone.mask_cell()))] = True
    backbone.restore(torch.randn(1, 1, *result.patch_size), hidden).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in backbone.parameters())


@pytest.mark.parametrize("size", [(8, 24), (40, 56), (64, 32)])
@torch.no_grad()
def test_another_tile_is_predicted(size: tuple[int, int]) -> None:
    """What windows reach beyond the map is hidden: the last tokens see what they see in a window of their own."""
    network = tiny_network("swin", (16, 32)).eval()
    assert isinstance(network, SwinUNet)
    random_weights(network)
    image = torch.randn(1, 1, *size)
    output = network(image)
    assert output.shape == (1, 2, *size)
    assert output.isfinite().all()
    block = network.encoder.layers[2]["blocks"][0]  # of windows that are not shifted
    tokens = torch.randn(1, 1, 5, 4, 48)
    torch.testing.assert_close(block(tokens)[:, :, 4:], block(tokens[:, :, 4:]))


def test_tables_keep_the_bias_of_each_offset() -> None:
    table = torch.randn(7 * 5, 3)
    for window in ((2, 3), (4, 2), (4, 3)):
        smaller = resize_table(table, (4, 3), window)
        assert torch.equal(smaller[table_rows((1, *window), (1, *window))], table[table_rows((1, 4, 3), (1, *window))])
    larger = resize_table(table, (4, 3), (5, 3)).reshape(9, 5, 3)
    assert torch.equal(larger[1:-1], table.reshape(7, 5, 3))
    assert torch.equal(larger[0], larger[1])


def test_everything_but_the_head_is_transferred() -> None:
    source, target = paper(3, 3, skips=False), paper(3, 2)
    report = transfer_weights(source.state_dict(), target, source_patch_size=(224, 224))
    loaded = sum(entry.num_parameters for entry in report.loaded)
    assert report.encoder_share == 1
    assert loaded / num_parameters(target) >= 0.98
    assert {entry.name.rpartition(".")[0] for entry in report.new} == {
        *(f"decoder.layers.{layer}.skip" for layer in range(3)), "decoder.final.expand", "decoder.final.norm", "head"
    }  # fmt: skip
    report = transfer_weights(paper(3, 3).state_dict(), target, source_patch_size=(224, 224))
    assert {entry.name for entry in report.new} == {"head.weight"}


def test_positions_of_another_window_are_adapted() -> None:
    target = paper(1, 2, **THREE_STAGES, window=[5, 6])
    report = transfer_weights(paper(1, 2, **THREE_STAGES).state_dict(), target, source_patch_size=(224, 224))
    assert len(report.adapted) == 10
    assert report.encoder_share == 1


def test_a_2d_checkpoint_does_not_fit_a_3d_plan() -> None:
    source = tiny_network("swin", (16, 32)).state_dict()
    with pytest.raises(MFMError, match="is 2D, this network is 3D") as caught:
        transfer_weights(source, tiny_network("swin", (16, 16, 16)))
    assert caught.value.code == "E_MODEL_MISMATCH"


def test_layers_count_from_the_last_and_adapters_are_in_attention() -> None:
    network = tiny_network("swin", (16, 32))
    names = ("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight", "layers.0.downsample.norm.weight",
             "layers.2.blocks.1.mlp.fc1.weight")  # fmt: skip
    assert [FAMILY.layers_after(f"encoder.{name}", network) for name in names] == [7, 6, 5, 1]
    adapted = FAMILY.adapted_layers(network)
    found = [name for name, module in network.named_modules() if any(module is layer for layer in adapted)]
    assert len(found) == 12
    assert all(name.startswith("encoder.") and name.endswith((".attn.qkv", ".attn.proj")) for name in found)


def published_file(folder: Path, network: SwinUNet, more: dict[str, Tensor]) -> Path:
    """A file as VISION-MAE's scripts write it, of the facts of its layout."""
    model = in_their_names(network) | more
    model |= {
        f"{name.rpartition('.')[0]}.relative_position_index": torch.zeros(49, 49, dtype=torch.long)
        for name in list(model)
        if name.endswith("relative_position_bias_table")
    }
    content = {"model": model, "optimizer": {}, "epoch": 3, "scaler": {}, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, folder / "theirs.pth")
    return folder / "theirs.pth"


@pytest.mark.parametrize(
    ("depths", "more"),
    [
        ([2, 2, 2, 2], ("mask_token", "first_patch_expanding.expand.weight", "layers_up.0.blocks.0.norm1.weight")),
        ([2, 2, 6, 2], ("layers_up.0.blocks.0.attn.qkv.weight", "output.weight")),
        ([2, 2, 2, 2], ("norm.weight", "norm.bias", "head.weight", "head.bias")),
    ],
    ids=["mae", "segmentation", "classifier"],
)
def test_a_file_of_vision_mae_is_read(depths: list[int], more: tuple[str, ...], tmp_path: Path) -> None:
    network = paper(3, 3, **small(24), depths=depths)
    reading = read_checkpoint(published_file(tmp_path, network, {name: torch.randn(2) for name in more}))
    assert set(reading.others) == set(more)
    mfm = reading.mfm
    assert (mfm["num_inputs"], mfm["patch_size"], mfm["trained"]) == (3, [224, 224], "encoder")
    rebuilt = build_network(mfm["plans"], "2d", 3, 2)
    assert rebuilt.encoder.layers[3]["blocks"][1].attn.always_shift  # type: ignore[union-attr, index, operator]
    report = transfer_weights(reading.content["network_weights"], rebuilt, source_patch_size=(224, 224))
    assert report.encoder_share == 1
    assert not report.ignored
    assert all(
        torch.equal(rebuilt.state_dict()[name], value)
        for name, value in network.state_dict().items()
        if "encoder." in name
    )


def test_a_3d_swin_of_others_is_refused(tmp_path: Path) -> None:
    network = tiny_network("swin", (16, 16, 16))
    assert isinstance(network, SwinUNet)
    with pytest.raises(MFMError, match="2D") as caught:
        read_checkpoint(published_file(tmp_path, network, {}))
    assert caught.value.code == "E_MODEL_MISMATCH"
