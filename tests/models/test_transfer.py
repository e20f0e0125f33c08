"""Weight transfer: every tensor once and in place, adapted where meaningful, reported in full, refused as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.primus import PrimusSeg
from mfm_nnunet.models.transfer import Topology, transfer_weights


def resenc(
    num_inputs: int = 1, num_outputs: int = 2, features: tuple[int, ...] = (4, 8), dimensions: int = 3, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    conv, norm = (nn.Conv3d, nn.InstanceNorm3d) if dimensions == 3 else (nn.Conv2d, nn.InstanceNorm2d)
    stages = len(features)
    return ResidualEncoderUNet(
        num_inputs, stages, features, conv, [3] * stages, [1] + [2] * (stages - 1), [1] * stages, num_outputs,
        [1] * (stages - 1), conv_bias=True, norm_op=norm, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip


def primus(
    shape: tuple[int, ...] = (16, 16, 16), num_inputs: int = 1, num_outputs: int = 2, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    return PrimusSeg(num_inputs, num_outputs, 24, (8,) * len(shape), shape, eva_depth=1, eva_numheads=2)


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def names(entries: tuple) -> set[str]:
    return {entry.name for entry in entries}


def test_everything_but_the_head_travels() -> None:
    source, target = resenc(num_outputs=1, seed=1), resenc(num_outputs=3)
    report = transfer_weights(source.state_dict(), target)
    heads = {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    parameters, wanted = dict(target.named_parameters()), dict(source.named_parameters())
    assert names(report.loaded) == set(parameters) - heads
    assert all(torch.equal(parameters[name], wanted[name]) for name in names(report.loaded))
    assert names(report.new) == names(report.ignored) == heads
    assert report.encoder_share == 1.0
    # Also a head of equal shape.
    target = resenc()
    before = values(target)
    report = transfer_weights(resenc(seed=1).state_dict(), target)
    assert torch.equal(before["decoder.seg_layers.0.weight"], target.state_dict()["decoder.seg_layers.0.weight"])
    assert {entry.how for entry in report.new} == {entry.how for entry in report.ignored} == {"head"}


def test_aliases_are_written_once_and_agree() -> None:
    source, target = resenc(seed=1), resenc()
    assert len(target.state_dict()) > len(list(target.named_parameters()))
    report = transfer_weights(source.state_dict(), target)
    counted = sum(entry.num_parameters for entry in (*report.loaded, *report.adapted, *report.new))
    assert counted == sum(parameter.numel() for parameter in target.parameters())
    state, wanted = target.state_dict(), source.state_dict()
    assert all(torch.equal(state[n], wanted[n]) for n in state if "seg_layers" not in n)


def test_a_file_from_disk_counts_aliases_once(tmp_path: Path) -> None:
    checkpoint.save(
        {"network_weights": checkpoint.cpu_weights(resenc(features=(4, 8, 8), seed=1).state_dict())}, tmp_path / "w.pth"
    )
    report = transfer_weights(checkpoint.load_weights(tmp_path / "w.pth")["network_weights"], resenc())
    deeper = [entry.name for entry in report.ignored if entry.name.startswith("encoder.stages.2")]
    assert deeper
    assert not [entry.name for entry in report.ignored if ".all_modules." in entry.name]
    assert not [entry.name for entry in report.ignored if entry.name.startswith("decoder.encoder.")]


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize(("source_stages", "stages"), [(5, 4), (4, 5), (4, 4)])
def test_levels_of_a_decoder_are_matched_from_full_resolution_down(
    source_stages: int, stages: int, wrapper: str
) -> None:
    """nnU-Net numbers them from the deepest up, where all widths are equal and another level would fit as well."""
    widths = (4, 8, 8, 8, 8)
    source, target = resenc(features=widths[:source_stages], seed=1), resenc(features=widths[:stages])
    fresh = values(target)
    weights = {wrapper + name: tensor for name, tensor in source.state_dict().items()}
    report = transfer_weights(weights, target, topology="adapt")
    theirs, ours = dict(source.named_parameters()), dict(target.named_parameters())
    for part in ("decoder.stages", "decoder.transpconvs"):
        for level in range(stages - 1):  # 0 is full resolution
            mine = {name for name in ours if name.startswith(f"{part}.{stages - 2 - level}.")}
            assert mine
            for name in mine:
                other = name.replace(f"{part}.{stages - 2 - level}.", f"{part}.{source_stages - 2 - level}.")
                expected = theirs[other] if level < source_stages - 1 else fresh[name]
                assert torch.equal(ours[name], expected), (name, other)
    assert {e.how.partition(" of ")[0] for e in report.loaded if "transpconvs.1.weight" in e.name} == {
        "" if stages == source_stages else f"decoder.transpconvs.{1 + source_stages - stages}.weight"
    }
    deepest = {f"decoder.transpconvs.0.{kind}" for kind in ("weight", "bias")}
    assert deepest <= names(report.new) or stages <= source_stages
    assert deepest <= names(report.ignored) or source_stages <= stages


def test_parameters_stay_the_same_objects() -> None:
    target = resenc()
    optimizer = torch.optim.SGD(target.parameters(), 0.1)
    transfer_weights(resenc(seed=1).state_dict(), target)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in target.parameters()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_are_stripped(prefix: str) -> None:
    source = {prefix + name: tensor for name, tensor in resenc(seed=1).state_dict().items()}
    assert transfer_weights(source, resenc()).encoder_share == 1.0


def test_a_compiled_target_is_unwrapped() -> None:
    source, target = resenc(seed=1), resenc()
    assert transfer_weights(source.state_dict(), torch.compile(target)).encoder_share == 1.0  # type: ignore[arg-type]
    assert torch.equal(target.state_dict()["encoder.stem.convs.0.conv.weight"], next(source.parameters()))


@pytest.mark.parametrize(("channels", "wanted"), [(1, 3), (3, 1), (3, 2)])
@pytest.mark.parametrize("make", [resenc, primus])
def test_stem_for_other_channels_keeps_its_response(make, channels: int, wanted: int) -> None:
    source, target = make(num_inputs=channels, seed=1), make(num_inputs=wanted)
    report = transfer_weights(source.state_dict(), target)
    (entry,) = report.adapted
    assert f"{channels} -> {wanted} input channels" in entry.how
    old, new = (network.get_submodule(network.keys_to_in_proj[0]) for network in (source, target))
    x = torch.randn(1, 1, 16, 16, 16)
    torch.testing.assert_close(new(x.expand(-1, wanted, -1, -1, -1)), old(x.expand(-1, channels, -1, -1, -1)))


@pytest.mark.parametrize(
    ("channels", "wanted", "images"), [(1, 3, (None, 1)), (3, 3, (None, 1)), (3, 1, (1, None)), (3, 4, (2, 1))]
)
@pytest.mark.parametrize("make", [resenc, primus])
def test_labels_of_a_cascade_are_no_images(make, channels: int, wanted: int, images: tuple) -> None:
    """Those of the checkpoint stay behind and those of the network begin with zero: without them all is as before."""
    source, target = make(num_inputs=channels, seed=1), make(num_inputs=wanted)
    report = transfer_weights(source.state_dict(), target, images=images)
    (entry,) = report.adapted
    assert ("begin with zero" in entry.how, "stay behind" in entry.how) == (
        images[1] is not None,
        images[0] is not None,
    )
    old, new = (network.get_submodule(network.keys_to_in_proj[0]) for network in (source, target))
    x, labels = torch.randn(1, 1, 16, 16, 16), torch.ones(1, 1, 16, 16, 16)

    def given(number: int, own: int | None) -> torch.Tensor:
        num_images = own or number
        return torch.cat([x.expand(-1, num_images, -1, -1, -1), labels.expand(-1, number - num_images, -1, -1, -1)], 1)

    without_labels = given(channels, images[0])
    without_labels[:, images[0] or channels :] = 0
    torch.testing.assert_close(new(given(wanted, images[1])), old(without_labels))


def of_kernels(kernels: list[list[int]], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ResidualEncoderUNet(
        1, 2, [4, 8], nn.Conv3d, kernels, [[1, 1, 1], [1, 2, 2]], [1, 1], 2, [1], conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip


FLAT, CUBIC = [[1, 3, 3], [1, 3, 3]], [[3, 3, 3], [3, 3, 3]]


@torch.no_grad()
def test_kernels_that_grow_keep_their_response() -> None:
    source, target = of_kernels(FLAT, seed=1), of_kernels(CUBIC)
    report = transfer_weights(source.state_dict(), target, topology="adapt")
    assert any("1x3x3 -> 3x3x3" in entry.how for entry in report.adapted)
    assert report.encoder_share == 1.0
    x = torch.randn(1, 1, 6, 8, 8)
    torch.testing.assert_close(target.encoder(x)[-1], source.encoder(x)[-1])  # type: ignore[operator]


@torch.no_grad()
def test_kernels_that_become_flat_respond_alike_to_what_is_constant_along_the_axis() -> None:
    source, target = of_kernels(CUBIC, seed=1), of_kernels(FLAT)
    transfer_weights(source.state_dict(), target, topology="adapt")
    x = torch.randn(1, 1, 1, 8, 8).expand(-1, -1, 9, -1, -1)
    stem = [network.encoder.stem.convs[0].conv(x)[:, :, 4] for network in (source, target)]  # type: ignore[union-attr, index]
    torch.testing.assert_close(*stem)


def test_kernels_stay_new_unless_they_may_be_adapted() -> None:
    source = of_kernels(CUBIC, seed=1).state_dict()
    with pytest.raises(MFMError, match=r"finetune\.transfer=adapt") as caught:
        transfer_weights(source, of_kernels(FLAT))
    assert caught.value.code == "E_MODEL_MISMATCH"


def test_channels_and_kernel_of_a_stem_are_adapted_together() -> None:
    source, target = of_kernels(CUBIC, seed=1), resenc(num_inputs=3)
    state = {name: tensor.sum(2, keepdim=True) if name.startswith("encoder.stem") and tensor.ndim == 5 else tensor
             for name, tensor in source.state_dict().items()}  # fmt: skip
    report = transfer_weights(state, target, topology="adapt")
    (entry,) = report.adapted
    assert "kernel 1x3x3 -> 3x3x3" in entry.how
    assert "1 -> 3 input channels" in entry.how


@pytest.mark.parametrize("topology", ["fit", "adapt"])
def test_tokens_of_another_size_are_not_kernels(topology: Topology) -> None:
    source, target = primus(seed=1), PrimusSeg(1, 2, 24, (1, 8, 8), (2, 16, 16), eva_depth=1, eva_numheads=2)
    report = transfer_weights(source.state_dict(), target, topology=topology)
    assert "down_projection.proj.weight" in names(report.new)


@pytest.mark.parametrize(
    ("old", "new", "known"),
    [((16, 16, 16), (24, 16, 8), False), ((16, 8, 24), (24, 8, 16), True), ((16, 16), (24, 8), False)],
)
def test_positions_are_interpolated(old: tuple, new: tuple, known: bool) -> None:
    source, target = primus(old, seed=1), primus(new)
    axes = [torch.linspace(0, 1, size // 8) for size in old]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # (axes, T)
    with torch.no_grad():
        source.eva.pos_embed[0, :, : len(old)] = coordinates.T  # type: ignore[index, union-attr]
    report = transfer_weights(source.state_dict(), target, source_patch_size=old if known else None)
    assert names(report.adapted) == {"eva.pos_embed"}
    grid = target.eva.pos_embed[0, :, : len(old)].T.reshape(len(old), *[size // 8 for size in new])  # type: ignore[index, union-attr]
    for axis in range(len(old)):
        # Coordinates along an axis must stay constant along the others and not fall along their own.
        assert torch.all(torch.diff(grid[axis], dim=axis) >= -1e-6)
        for other in set(range(len(old))) - {axis}:
            torch.testing.assert_close(
                torch.diff(grid[axis], dim=other), torch.zeros(()).expand_as(torch.diff(grid[axis], dim=other))
            )


@pytest.mark.parametrize(
    ("old", "told", "expected"),
    [
        ((16, 16, 16), (16, 16, 16), "loaded"),
        ((16, 16, 16), (160, 160, 160), "loaded"),  # what is told yields to the tensor
        ((24, 16, 8), None, "new"),
    ],
)
def test_positions_of_equal_and_of_unknown_grids(old: tuple, told: tuple | None, expected: str) -> None:
    report = transfer_weights(primus(old, seed=1).state_dict(), primus(), source_patch_size=told)
    assert "eva.pos_embed" in names(getattr(report, expected))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (lambda: resenc(features=(6, 12), seed=1), "encoder.stem.convs.0.conv.weight"),
        (lambda: primus(seed=1), "only in the checkpoint"),
        (lambda: resenc(dimensions=2, seed=1), "2D"),
    ],
)
def test_another_network_is_refused_and_nothing_is_written(source, expected: str) -> None:
    target = resenc()
    before = values(target)
    with pytest.raises(MFMError) as caught:
        transfer_weights(source().state_dict(), target, source_network="some.module.OtherNet")
    assert caught.value.code == "E_MODEL_MISMATCH"
    assert expected in caught.value.message
    assert "OtherNet" in caught.value.message
    assert ("--like CHECKPOINT" in caught.value.message) == (expected != "2D")
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_nonfinite_weights_are_refused() -> None:
    source, target = values(resenc(seed=1)), resenc()
    source["decoder.transpconvs.0.weight"][0] = float("nan")
    before = values(target)
    with pytest.raises(MFMError) as caught:
        transfer_weights(source, target)
    assert caught.value.code == "E_NONFINITE"
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize(("topology", "is_advised"), [("fit", True), ("adapt", False)])
def test_an_encoder_that_stays_random_in_part_is_warned_of(topology: Topology, is_advised: bool) -> None:
    """By parameters it may be a hundredth, and stand before all the others."""
    source, target = resenc(features=(4, 16, 16), seed=1), resenc(features=(6, 16, 16))
    summary = transfer_weights(source.state_dict(), target, topology=topology).summary()
    assert "WARNING" in summary
    assert "encoder.stem.convs.0.conv.weight: shape (4, 1, 3, 3, 3) in the checkpoint, (6, 1, 3, 3, 3) here" in summary
    assert ("finetune.transfer=adapt" in summary) == is_advised
    assert "WARNING" not in transfer_weights(source.state_dict(), resenc(features=(4, 16, 16))).summary()


def test_summary_and_dict_name_every_tensor() -> None:
    report = transfer_weights(resenc(seed=1).state_dict(), resenc(num_inputs=2, num_outputs=3))
    summary, details, as_dict = report.summary(), report.details(), report.to_dict()
    assert "adapted encoder.stem.convs.0.conv.weight" in summary
    for kind in ("loaded", "adapted", "new", "ignored"):
        entries = getattr(report, kind)
        assert f"{kind:<10}{len(entries):>8}" in summary
        assert all(f"{kind:<8} {entry.name}" in details for entry in entries)
        assert len(as_dict[kind]) == len(entries)  # type: ignore[arg-type]
    checkpoint.require_plain(as_dict)


@pytest.mark.parametrize("make", [resenc, primus])
def test_parts_that_are_left_out_are_named(make: Callable[..., nn.Module]) -> None:
    target = make()
    before, source = values(target), make(seed=1).state_dict()
    report = transfer_weights(source, target, parts="encoder")
    encoder = family_of(target).encoder_names(target)
    assert names(report.loaded) == encoder
    heads = family_of(target).head_names(target)
    left_out = {entry.name for entry in report.new if entry.how == "left out by finetune.parts=encoder"}
    assert left_out == set(dict(target.named_parameters())) - encoder - heads
    assert left_out <= names(report.ignored)
    assert report.encoder_share == 1.0
    after = target.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in left_out)
    assert all(torch.equal(after[name], source[name]) for name in encoder)


@pytest.mark.parametrize("make", [resenc, primus])
def test_for_our_networks_encoder_and_decoder_are_all_but_the_heads(make: Callable[..., nn.Module]) -> None:
    reports = [
        transfer_weights(make(seed=1).state_dict(), make(), parts=parts)
        for parts in ("encoder_decoder", "all_but_heads")
    ]
    assert reports[0] == reports[1]


def test_what_is_neither_encoder_nor_decoder_travels_with_all_but_heads_alone() -> None:
    def make(seed: int) -> nn.Module:
        network = resenc(seed=seed)
        network.extra = nn.Linear(2, 2)
        return network

    for parts, travels in (("encoder_decoder", False), ("all_but_heads", True)):
        report = transfer_weights(make(1).state_dict(), make(0), parts=parts)  # type: ignore[arg-type]
        assert ("extra.weight" in names(report.loaded)) == travels


def test_running_statistics_belong_to_their_part() -> None:
    def make() -> nn.Module:
        return ResidualEncoderUNet(
            1, 2, [4, 8], nn.Conv3d, 3, [1, 2], [1, 1], 2, [1], norm_op=nn.BatchNorm3d, nonlin=nn.ReLU
        )

    report = transfer_weights(make().state_dict(), make(), parts="encoder")
    statistics = {name for name in make().state_dict() if name.endswith("running_mean")}
    assert names(report.loaded) & statistics == {name for name in names(report.loaded) if "running_mean" in name}
    assert any(name.startswith("encoder.") for name in names(report.loaded) & statistics)
    assert any(name.startswith("decoder.stages.") for name in names(report.new) & statistics)
    assert not any(name.startswith("decoder.") for name in names(report.loaded))
