"""PCT-Net: the paper's sizes to the last parameter, attention against a dense one, and the authors' files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.pretrained import transfer
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.interchange.read import convert, read_checkpoint
from mfm_nnunet.interchange.verify import require_complete
from mfm_nnunet.models.families import Sizing, family_named, family_of
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.pctnet import PCTNet
from mfm_nnunet.models.pctnet_family import choose_window, expand_table
from mfm_nnunet.models.windows import WindowAttention
from mfm_nnunet.tasks.losses import class_shares, cross_entropy, halving_weights, soft_dice
from mfm_nnunet.workspace import use
from tests.builders import tiny, tiny_model
from tests.builders.architectures import pctnet
from tests.builders.tasks import make_batch, make_task
from tests.builders.tiny_plans import tiny_network, tiny_plans
from tests.builders.training import initialised, take_step

CHANNELS = (24, 48, 128, 256, 512)
TINY = (4, 4, 8, 8, 8)


def paper_arguments(mode: int, features: Sequence[int] = CHANNELS, num_heads: Sequence[int] = (4, 8, 16)) -> Any:
    """The published network for patches of 64 x 128 x 128; ``mode`` is its resolution mode."""
    flat = [mode >= 1, mode == 2]
    return {
        "features_per_stage": list(features),
        "strides": [[1, 1, 1], *([1 if is_flat else 2, 2, 2] for is_flat in flat), [2, 2, 2], [2, 2, 2]],
        "kernel_sizes": [*([1 if is_flat else 3, 3, 3] for is_flat in flat), *[[3, 3, 3]] * 3],
        "num_heads": list(num_heads),
        "windows": [[6] * 3, [6] * 3, [6 if mode else 4] * 3],
        "norm": "batch",
        "attends_to_padding": True,
        "unshifted": [] if mode else [4],
    }


@pytest.mark.parametrize(
    ("features", "num_heads", "expected"),
    [
        (CHANNELS, (4, 8, 16), (44_235_018, 44_199_386, 43_905_242)),
        ((8, 16, 32, 64, 128), (1, 2, 4), (2_818_102, 2_818_438, 2_786_438)),
        ((12, 24, 48, 96, 192), (2, 4, 8), (6_325_834, 6_324_722, 6_252_722)),
    ],
)
def test_the_published_network_to_the_last_parameter(
    features: Sequence[int], num_heads: Sequence[int], expected: tuple[int, ...]
) -> None:
    """One embedding and one head of the original, whose five layer norms behind the blocks are never used."""
    unused = 2 * (2 * features[2] + 2 * features[3] + features[4])
    for mode, count in enumerate(expected):
        with torch.device("meta"):
            network = PCTNet(1, 2, **paper_arguments(mode, features, num_heads), deep_supervision=True)
        assert sum(weight.numel() for weight in network.parameters()) + unused == count


def dense_attention(layer: WindowAttention, x_BDHWE: Tensor) -> Tensor:
    """Attention of all places of a map to each other, masked to those of the same window."""
    size = x_BDHWE.shape[1:4]
    window = [min(pair) for pair in zip(layer.window, size)]
    shift = [w // 2 if layer.is_shifted and n > w else 0 for n, w in zip(size, window)]
    places = list(itertools.product(*map(range, size)))
    padded = [-(-n // w) * w for n, w in zip(size, window)]
    cells = [tuple(((p - s) % n // w, p < s) for p, s, n, w in zip(place, shift, padded, window)) for place in places]
    bias, hidden = torch.zeros(layer.num_heads, len(places), len(places)), torch.zeros(len(places), len(places)).bool()
    for (i, first), (j, second) in itertools.product(enumerate(places), repeat=2):
        if cells[i] != cells[j]:
            hidden[i, j] = True
            continue
        dz, dy, dx = (a - b + w - 1 for a, b, w in zip(first, second, layer.window))
        row = (dz * (2 * layer.window[1] - 1) + dy) * (2 * layer.window[2] - 1) + dx
        bias[:, i, j] = layer.relative_position_bias_table[row]
    batch, width = len(x_BDHWE), x_BDHWE.shape[-1]
    qkv = layer.qkv(x_BDHWE).reshape(batch, len(places), 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].transpose(-1, -2) * (width // layer.num_heads) ** -0.5 + bias
    attended = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ qkv[2]
    return layer.proj(attended.transpose(1, 2).reshape(x_BDHWE.shape))


@torch.no_grad()
@pytest.mark.parametrize("is_shifted", [False, True])
@pytest.mark.parametrize(
    ("size", "window"),
    [((4, 6, 4), (2, 3, 4)), ((5, 4, 7), (3, 3, 2)), ((2, 7, 4), (4, 4, 4)), ((1, 8, 6), (4, 3)), ((1, 7, 5), (4, 4))],
)
def test_attention_is_that_within_windows_and_never_to_padding(
    size: tuple[int, ...], window: tuple[int, ...], is_shifted: bool
) -> None:
    torch.manual_seed(0)
    layer = WindowAttention(8, 2, window, is_shifted).eval()
    nn.init.normal_(layer.relative_position_bias_table)
    x_BDHWE = torch.randn(2, *size, 8)
    torch.testing.assert_close(layer(x_BDHWE), dense_attention(layer, x_BDHWE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [(32, 16, 48), (16, 48)])
def test_every_weight_learns_and_outputs_halve(patch: tuple[int, ...]) -> None:
    plans = tiny_plans("pctnet", patch, dropout=0.2, drop_path=0.2)
    network = build_network(plans, "3d_fullres", 1, 2, deep_supervision=True).train()
    outputs = network(torch.randn(2, 1, *patch))
    assert [tuple(out.shape[2:]) for out in outputs] == [tuple(n >> level for n in patch) for level in range(3)]
    sum(out.square().mean() for out in outputs).backward()
    assert not [name for name, weight in network.named_parameters() if weight.grad is None]


@torch.no_grad()
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_any_tile_predicts_in_every_resolution_mode(mode: int) -> None:
    arguments = {**paper_arguments(mode, TINY, (2, 2, 2)), "norm": "instance", "attends_to_padding": False}
    network = PCTNet(1, 3, **arguments).eval()
    steps = family_named("pctnet").steps(arguments, 3)
    assert steps == [[16, 16, 16], [8, 16, 16], [4, 16, 16]][mode]
    for cells in ((1, 2, 1), (2, 1, 3)):
        tile = [cell * step for cell, step in zip(cells, steps)]
        assert network(torch.randn(1, 1, *tile)).shape == (1, 3, *tile)


def test_windows_divide_the_maps_that_are_planned() -> None:
    assert [choose_window(edge, 3) for edge in (1, 3, 6, 7, 8, 10, 12, 14, 16, 20, 26)] == [
        *(1, 3, 6, 7, 4, 5, 6, 7, 4, 5, 6),
    ]
    assert [choose_window(edge, 2) for edge in (8, 10, 28, 32, 40, 64)] == [8, 5, 7, 8, 8, 8]


@pytest.mark.parametrize("memory_gb", [None, 0.5, 24.0])
def test_it_is_sized_by_memory_with_the_strides_of_nnunet(memory_gb: float | None) -> None:
    strides = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    stock = {"architecture": {"arch_kwargs": {"strides": strides, "kernel_sizes": kernels}}}
    sizing = Sizing("pctnet", (10.0, 100.0, 90.0), (10.0, 1.4, 1.4), memory_gb, 1, 4, stock)
    family = family_named("pctnet")
    planned = family.plan_network(sizing)
    kwargs = planned.architecture["arch_kwargs"]
    assert kwargs["strides"] == strides[:5]
    assert kwargs["kernel_sizes"] == kernels[:5]
    assert kwargs["features_per_stage"] == ([8, 16, 32, 64, 128] if memory_gb != 24 else list(CHANNELS))
    assert not family.patch_problem(kwargs, planned.patch_size)
    assert planned.patch_size[0] == 12
    edges = [edge // step for edge, step in zip(planned.patch_size, (1, 4, 4))]
    assert all(edge % size == 0 for edge, size in zip(edges, kwargs["windows"][0]))
    assert "5 levels" in family.describe(planned.architecture)


@pytest.mark.parametrize(
    "changes", [{"num_heads": [3, 3]}, {"windows": [[9, 9, 9]] * 2}, {"norm": "layer"}, {"num_heads": [2]}]
)
def test_a_plan_with_impossible_arguments_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MFMError) as caught:
        tiny_network("pctnet", (16, 16, 16), **changes)
    assert caught.value.code == "E_CONFIG"


def test_layers_nearer_to_the_image_learn_slower_and_adapters_start_as_nothing() -> None:
    network = tiny_network("pctnet", (16, 16, 16)).eval()
    family = family_of(network)
    names = ["encoder.project.weight", "encoder.blocks.0.2.weight", "encoder.downs.0.1.2.weight", "encoder.blocks.3"]
    assert [family.layers_after(f"{name}.conv", network) for name in names] == [4, 4, 3, 1]
    assert not family.layer_decay_problem()
    x_BCDHW = torch.randn(1, 1, 16, 16, 16)
    before = network(x_BCDHW)
    groups.add_adapters(network, rank=2, alpha=4)
    assert len(groups.adapter_names(network)) == 2 * len(family.adapted_layers(network)) == 2 * 2 * 2 * 4
    torch.testing.assert_close(network(x_BCDHW), before)


def test_volume_fusion_supervises_all_outputs() -> None:
    """Weights 1, 1/2, 1/4 over their sum, and soft labels by average pooling."""
    task = make_task("volume_fusion", "pctnet", (16, 16, 16)).eval()
    batch = make_batch(task, 2)
    outputs = task.backbone.outputs(batch["image"])
    assert len(outputs) == 3
    labels = nn.functional.one_hot(batch["label"].long(), 5).movedim(-1, 1).float()
    losses = []
    for level, out in enumerate(outputs):
        shares = nn.functional.avg_pool3d(labels, 2**level)
        torch.testing.assert_close(class_shares(batch["label"], 5, out.shape[2:]), shares)
        losses.append(0.5 * (1 - soft_dice(out, shares, over_batch=True) + cross_entropy(out, shares)))
    expected = (losses[0] + losses[1] / 2 + losses[2] / 4) / 1.75
    torch.testing.assert_close(task(batch).loss, expected)
    assert halving_weights(4) == pytest.approx([8 / 15, 4 / 15, 2 / 15, 1 / 15])


def test_fine_tuning_trains_the_coarsest_output_too(tmp_path: Path) -> None:
    """Which nnU-Net's loss leaves out."""
    tiny.make(tmp_path)
    with use(tmp_path):
        plan = {"configurations": {"3d_fullres": tiny.configuration(pctnet((16, 16, 16)))}}
        trainer = initialised(plan=plan, deep_supervision=True)
        assert trainer.loss.weight_factors == pytest.approx([4 / 7, 2 / 7, 1 / 7])
        before = {name: weight.clone() for name, weight in trainer.network.named_parameters()}
        take_step(trainer)
    heads = [name for name in before if name.startswith("decoder.heads.") and name.endswith("weight")]
    assert len(heads) == 3
    assert not [name for name in heads if torch.equal(before[name], trainer.network.get_parameter(name))]


# Files of the paper's authors


def published_index(window: int) -> Tensor:
    """The row that the published code reads for each pair of places: 17, 11 and 1 per step for windows of 6."""
    axes = torch.meshgrid(*[torch.arange(window)] * 3, indexing="ij")
    places = torch.stack(axes).flatten(1)
    offsets = places[:, :, None] - places[:, None] + window - 1
    return (3 * window - 1) * offsets[0] + (2 * window - 1) * offsets[1] + offsets[2]


@pytest.mark.parametrize("window", [4, 6])
def test_an_expanded_table_gives_what_the_published_index_reads(window: int) -> None:
    table = torch.randn((2 * window - 1) ** 3, 2)
    layer = WindowAttention(8, 2, (window,) * 3, is_shifted=False)
    with torch.no_grad():
        layer.relative_position_bias_table.copy_(expand_table(table))
    expected = table[published_index(window)].permute(2, 0, 1)[None]
    torch.testing.assert_close(layer.position_bias((window,) * 3), expected, rtol=0, atol=1e-6)
    assert len(published_index(6).unique()) == 291


def published_names() -> dict[str, str]:
    """Prefixes of ours by those of MIS-FM's file, without mode."""
    names = {"embeddings.proj": "encoder.project"}
    for level in range(2):
        names[f"embeddings.conv{level}.conv_conv"] = f"encoder.blocks.{level}"
        names[f"pred_heads.conv{level}.conv_conv"] = f"decoder.blocks.{level}"
    for level, part in itertools.product((2, 3, 4), ("encoder", "decoder")):
        theirs = f"pyramid_ct.convtrans_{part[0]}{level}"
        names[f"{theirs}.conv.conv_conv"] = f"{part}.blocks.{level}.conv"
        names[f"{theirs}.trans.blocks"] = f"{part}.blocks.{level}.attention"
    for level in range(4):
        names[f"{'embeddings' if level < 2 else 'pyramid_ct'}.down{level + 1}.conv"] = f"encoder.downs.{level}.1"
        upper = "pred_heads" if level < 2 else "pyramid_ct"
        names[f"{upper}.up{level + 1}.up"] = f"decoder.ups.{level}"
        names[f"{upper}.up{level + 1}.conv"] = f"decoder.merges.{level}"
        for index in range(3):
            ours = f"decoder.activations.{level}.{index}" if index < 2 else f"decoder.heads.{level}"
            names[f"{upper}.out_conv{level}.conv.{index}"] = ours
    return names


def published_state(networks: Sequence[nn.Module], features: Sequence[int] = TINY) -> dict[str, Tensor]:
    """The state dict of the original: three embeddings and heads, one pyramid, buffers, and norms without use."""
    state: dict[str, Tensor] = {}
    for mode, network in enumerate(networks):
        for theirs, ours in published_names().items():
            part, _, rest = theirs.partition(".")
            place = theirs if part == "pyramid_ct" else f"{part}.{mode}.{rest}"
            for name, tensor in network.state_dict().items():
                if name.startswith(f"{ours}."):
                    state.setdefault(f"{place}{name[len(ours) :]}", tensor.clone())
    for letter, level in (("e", 2), ("e", 3), ("e", 4), ("d", 2), ("d", 3)):
        block = f"pyramid_ct.convtrans_{letter}{level}"
        for kind in ("weight", "bias"):
            state[f"{block}.norm_layer.{kind}"] = torch.ones(features[level])
        for index in range(2):
            name = f"{block}.trans.blocks.{index}.attn.relative_position"
            window = (round(len(state[f"{name}_bias_table"]) ** (1 / 3)) + 1) // 2
            state[f"{name}_index"] = published_index(window)
    return state


def trained_network(mode: int, num_outputs: int = 5) -> nn.Module:
    """The original's function in mode ``mode``, with random values everywhere."""
    torch.manual_seed(1)
    network = PCTNet(1, num_outputs, **paper_arguments(mode, TINY, (2, 2, 2)), deep_supervision=True).eval()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name else torch.randn_like(value) * 0.3)
    return network


def write_published(folder: Path, mode: int) -> tuple[Path, nn.Module]:
    """A file of the original and its network, whose mode alone was trained; the others have the norms of the start."""
    networks = [PCTNet(1, 5, **paper_arguments(m, TINY, (2, 2, 2)), deep_supervision=True) for m in range(3)]
    networks[mode] = trained = trained_network(mode)
    pyramid = {n: t for n, t in published_state([trained]).items() if n.startswith("pyramid_ct.")}
    state = published_state(networks) | pyramid
    file = folder / "pctnet_pretrain.pt"
    torch.save({"iteration": 9, "valid_pred": 0.5, "model_state_dict": state, "optimizer_state_dict": {}}, file)
    return file, trained


def target_network(reading: Reading, num_outputs: int = 2) -> nn.Module:
    torch.manual_seed(5)
    return build_network(reading.mfm["plans"], "3d_fullres", 1, num_outputs, deep_supervision=True).eval()


@torch.no_grad()
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_published_file_gives_the_function_that_was_trained(mode: int, tmp_path: Path) -> None:
    file, trained = write_published(tmp_path, mode)
    assert len(torch.load(file)["model_state_dict"]) == 684
    reading = read_checkpoint(file)
    require_complete(reading.content)
    assert any(f"embedding and head {mode}" in note for note in reading.notes)
    assert (reading.mfm["patch_size"], reading.mfm["num_outputs"]) == ([64, 128, 128], 5)
    network = target_network(reading)
    report = transfer(reading, network)
    assert report.encoder_share == 1
    assert not report.adapted
    assert {entry.name.rpartition(".")[0] for entry in report.new} == {f"decoder.heads.{level}" for level in range(4)}
    ignored = {entry.name for entry in report.ignored}
    assert {f"embeddings.{other}.proj.weight" in ignored for other in {0, 1, 2} - {mode}} == {True}
    assert "pyramid_ct.convtrans_e2.norm_layer.weight" in ignored

    if mode == 1:  # the others have its blocks, with less to compute
        return
    for level in range(4):
        network.decoder.heads[level] = trained.decoder.heads[level]
    for module in trained.modules():
        if isinstance(module, WindowAttention):
            rows = published_index(module.window[0])
            bias = module.relative_position_bias_table[rows].permute(2, 0, 1)[None]
            module.position_bias = lambda window, bias=bias: bias  # type: ignore[method-assign]
    x_BCDHW = torch.randn(1, 1, *((64, 80, 80) if mode == 0 else (28, 112, 112)))
    for expected, got in zip(trained(x_BCDHW), network(x_BCDHW)):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_another_mode_gives_the_pyramid(tmp_path: Path) -> None:
    file, _ = write_published(tmp_path, 1)
    reading = read_checkpoint(file)
    arguments = paper_arguments(0, TINY, (2, 2, 2)) | {"windows": [[6] * 3] * 3, "norm": "instance"}
    network = PCTNet(1, 2, **arguments)
    report = transfer(reading, network)
    new = {entry.name for entry in report.new}
    stem = {name for name, _ in network.named_parameters() if ".0." in name[:18] or ".1." in name[:18]}
    assert all(name.startswith(("encoder.project", "decoder.heads", "decoder.act")) or name in stem for name in new)
    assert {"encoder.project.weight", "encoder.blocks.1.2.weight", "decoder.blocks.1.2.weight"} <= new
    loaded = {entry.name for entry in report.loaded}
    assert {name for name, _ in network.named_parameters() if ".attention." in name} <= loaded
    assert "encoder.blocks.1.2.weight" in {entry.name for entry in report.ignored}


def test_a_file_whose_mode_is_unknown_is_refused(tmp_path: Path) -> None:
    state = published_state([trained_network(mode) for mode in (0, 1, 2)])
    torch.save({"model_state_dict": state}, tmp_path / "three.pt")
    with pytest.raises(MFMError, match="3 of them look trained") as caught:
        read_checkpoint(tmp_path / "three.pt")
    assert caught.value.code == "E_MODEL_MISMATCH"


def test_a_file_with_a_hole_is_refused(tmp_path: Path) -> None:
    file, _ = write_published(tmp_path, 1)
    content = torch.load(file)
    del content["model_state_dict"]["pyramid_ct.down3.conv.2.weight"]
    torch.save(content, file)
    with pytest.raises(MFMError, match="lacks the tensor") as caught:
        read_checkpoint(file)
    assert caught.value.code == "E_MODEL_MISMATCH"


def test_an_imported_file_is_written_as_ours(tmp_path: Path) -> None:
    file, _ = write_published(tmp_path, 1)
    convert(file, tmp_path / "ours.pth", "pth")
    again = read_checkpoint(tmp_path / "ours.pth")
    assert again.layout == "mfm_nnunet"
    assert again.mfm["plans"]["mfm"]["network"] == "pctnet"
    own = read_checkpoint(file).content["network_weights"]
    assert all(torch.equal(again.content["network_weights"][name], own[name]) for name in own)
    with pytest.raises(MFMError, match="PCT-Net"):
        convert(file, tmp_path / "nnssl", "nnssl")


def test_a_model_of_ours_is_read_under_its_own_names(tmp_path: Path) -> None:
    """Files of others have other names, so nothing of it is taken for one of theirs."""
    plans = tiny_model.tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"] = pctnet((16, 16, 16))
    content = {
        "network_weights": tiny_network("pctnet", (16, 16, 16), num_outputs=3).state_dict(),
        "trainer_name": "MFMTrainer",
        "init_args": {"configuration": "3d_fullres", "fold": 0, "plans": plans, "dataset_json": {}},
    }
    torch.save(content, tmp_path / "checkpoint_final.pth")
    reading = read_checkpoint(tmp_path / "checkpoint_final.pth")
    assert (reading.layout, reading.mfm["plans"]["mfm"]["network"], reading.others) == ("nnU-Net", "pctnet", {})
    require_complete(reading.content)
