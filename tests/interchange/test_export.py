"""Ours out: round trips without a bit of difference, what readers of the layout need, nothing that names a machine."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor

from mfm_nnunet import api, checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.interchange import nnssl_export
from mfm_nnunet.interchange.folder import model_card, stated_licence
from mfm_nnunet.interchange.read import convert, find_checkpoint, read_checkpoint
from mfm_nnunet.interchange.verify import require_complete
from mfm_nnunet.models.families import family_of_architecture
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.primus import PRIMUS_SIZES
from mfm_nnunet.reports.progress import plot_progress
from mfm_nnunet.settings import MFMBlock, to_dict
from tests.builders import foreign, tiny
from tests.builders.architectures import plain, resenc

PATCH = (16, 16, 32)
ARCHITECTURES = {
    "resenc": resenc(features=foreign.FEATURES),
    "plain": plain(),
    "primus": foreign.primus_architecture(PATCH),
}
CHANNELS = (1, 3)


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Primus-M with a width of 72, so that its name can be written without its 150 million parameters."""
    monkeypatch.setitem(PRIMUS_SIZES, "M", {"embed_dim": foreign.EMBED, "eva_depth": 2, "eva_numheads": foreign.HEADS})


def ours(family: str, num_inputs: int, folder: Path, **changes: Any) -> Path:
    """A checkpoint as pretraining writes it."""
    configuration = {**tiny.configuration(ARCHITECTURES[family], PATCH), "batch_size": 2, **changes}
    configuration["normalization_schemes"] = ["ZScoreNormalization"] * num_inputs
    configuration["use_mask_for_norm"] = [False] * num_inputs
    block = MFMBlock(network="primus" if family == "primus" else "resenc")
    plans = tiny.plans(block=block, **{"3d_fullres": configuration})
    torch.manual_seed(3)
    network = build_network(plans, "3d_fullres", num_inputs, 1)
    mfm = {
        "format": 1, "kind": "pretrained", "pretext": "mae", "plans": plans, "configuration": "3d_fullres",
        "patch_size": list(PATCH), "num_inputs": num_inputs, "num_outputs": 1, "trained": "network",
        "corpus": {"num_cases": 9, "num_subjects": 7, "hash": "ab" * 32}, "epoch": 5,
        "citations": foreign.CITATIONS, "versions": {"mfm_nnunet": "0.1.0"},
    }  # fmt: skip
    checkpoint.save({"network_weights": checkpoint.cpu_weights(network.state_dict()), "mfm": mfm}, folder / "a.pth")
    return folder / "a.pth"


def refused(place: Path, code: str, words: str | None = None, action: Any = read_checkpoint) -> None:
    """The action on the checkpoint is refused with the code; ``words`` are in the message."""
    with pytest.raises(MFMError, match=words) as caught:
        action(place)
    assert caught.value.code == code


def require_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_inputs", CHANNELS)
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("layout", ["folder", "nnssl"])
def test_round_trip(layout: str, family: str, num_inputs: int, tmp_path: Path) -> None:
    file = ours(family, num_inputs, tmp_path)
    before = read_checkpoint(file)
    convert(file, tmp_path / "out", layout)
    after = read_checkpoint(find_checkpoint(tmp_path / "out"))
    require_equal(before.content["network_weights"], after.content["network_weights"])
    assert after.mfm == json.loads(json.dumps(before.mfm))
    require_complete(after.content)


@pytest.mark.parametrize("num_inputs", CHANNELS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_reader_that_knows_nnssl_alone_gets_the_same(family: str, num_inputs: int, tmp_path: Path) -> None:
    """Without our key: the plan and the tensors must be enough."""
    file = ours(family, num_inputs, tmp_path, spacing=[3.0, 1.0, 1.0])
    convert(file, tmp_path / "out", "nnssl")
    content = checkpoint.load(tmp_path / "out" / "checkpoint_final.pth")
    del content["mfm"]
    torch.save(content, tmp_path / "foreign.pth")
    before = read_checkpoint(file)
    if family == "primus":
        with pytest.raises(MFMError, match="--token-order"):
            read_checkpoint(tmp_path / "foreign.pth")
    after = read_checkpoint(tmp_path / "foreign.pth", "whd")
    configurations = [reading.mfm["plans"]["configurations"]["3d_fullres"] for reading in (before, after)]
    for key in ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm"):
        assert configurations[0][key] == configurations[1][key]
    assert after.mfm["num_inputs"] == num_inputs
    one, other = (build_network(r.mfm["plans"], "3d_fullres", num_inputs, 1).eval() for r in (before, after))
    one.load_state_dict(before.content["network_weights"])
    other.load_state_dict(after.content["network_weights"], strict=False)
    x = torch.randn(1, num_inputs, *PATCH)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))


def exported(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Plan and weights in nnssl's layout."""
    folder = file.parent
    convert(file, folder / "out", "nnssl")
    content = checkpoint.load(folder / "out" / "checkpoint_final.pth")
    assert {entry.name for entry in (folder / "out").iterdir()} == {
        "checkpoint_final.pth", "adaptation_plan.json", "config.json", "README.md",
    }  # fmt: skip
    return content["nnssl_adaptation_plan"], content["network_weights"]


def load_strictly(file: Path, plan: dict[str, Any], weights: dict[str, Tensor], num_inputs: int = 1) -> None:
    """As nnU-Net's development code does it: names by the file's word, where they go by the network's.

    For several channels each name of the stem's layer gets the weights of the first of these names, repeated.
    """
    network = build_network(read_checkpoint(file).mfm["plans"], "3d_fullres", num_inputs, 1)
    repeated = weights[f"{plan['keys_to_in_proj'][0]}.weight"].repeat(1, num_inputs, 1, 1, 1) / num_inputs
    for key in ("key_to_encoder", "key_to_stem"):
        prefix = plan[key]
        chosen = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if key == "key_to_stem":
            chosen |= {f"{name}.weight": repeated for name in plan["keys_to_in_proj"]}
        bare = {name.replace(prefix, "").removeprefix("."): tensor for name, tensor in chosen.items()}
        network.get_submodule(getattr(network, key)).load_state_dict(bare)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_readers_of_the_layout_need(family: str, tmp_path: Path) -> None:
    """All fields, plain lists, names that begin with the keys and hold them once."""
    file = ours(family, 1, tmp_path)
    plan, weights = exported(file)
    json.dumps(plan)
    checkpoint.require_plain(plan)
    assert {"architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
            "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe"} <= set(plan)  # fmt: skip
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert len(configuration["spacing"]) == len(configuration["patch_size"]) == 3
    for num_inputs in (1,) if family == "plain" else (1, 3):  # a plain U-Net's stem is a stage, which is not repeated
        load_strictly(file, plan, weights, num_inputs)
    assert all(f"{key}.weight" in weights for key in plan["keys_to_in_proj"])
    assert (plan["key_to_lpe"] in weights) if family == "primus" else plan["key_to_lpe"] is None
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    expected = {"resenc": "ResidualEncoderUNet", "plain": "PlainConvUNet", "primus": "PrimusM"}
    assert plan["architecture_plans"]["arch_class_name"] == expected[family]


@pytest.mark.parametrize(("trained", "left_out"), [("network", ".all_modules."), ("encoder", ".conv.")])
def test_layers_of_one_name_get_the_other(trained: str, left_out: str, tmp_path: Path) -> None:
    file = ours("resenc", 1, tmp_path)
    content = checkpoint.load(file)
    before = content["network_weights"]
    if trained == "encoder":
        before = {name: tensor for name, tensor in before.items() if name.startswith("encoder.")}
    content["network_weights"] = {name: tensor for name, tensor in before.items() if left_out not in name}
    content["mfm"]["trained"] = trained
    torch.save(content, file)
    plan, weights = exported(file)
    load_strictly(file, plan, weights)
    require_equal(*({n: t for n, t in w.items() if not n.startswith("decoder.encoder.")} for w in (before, weights)))


def test_the_old_name_of_a_resenc_u_net_is_todays(tmp_path: Path) -> None:
    name = "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"
    plan, _ = exported(trained(resenc() | {"network_class_name": name}, (16, 16, 16), tmp_path))
    assert plan["architecture_plans"]["arch_class_name"] == "ResidualEncoderUNet"


@pytest.mark.parametrize(
    ("spacing", "style", "said"),
    [
        ([1.0, 1.0, 1.0], "onemmiso", "spacing 1 x 1 x 1 mm"),
        ([3.0, 1.0, 1.0], "median", "spacing 3 x 1 x 1 mm"),
        ([None, None, None], "noresample", "not resampled"),
        (None, "noresample", "not resampled"),
    ],
)
def test_the_style_of_a_spacing(spacing: list[Any] | None, style: str, said: str, tmp_path: Path) -> None:
    file = ours("resenc", 1, tmp_path, spacing=spacing)
    plan, _ = exported(file)
    ((name, configuration),) = plan["pretrain_plan"]["configurations"].items()
    assert name == configuration["spacing_style"] == style
    assert configuration["spacing"] == (None if style == "noresample" else spacing)
    assert said in api.describe_checkpoint(file)


def nnssl_name(architecture: dict[str, Any]) -> Any:
    """Class, arguments and imports in nnssl's words, or the reason why it has none."""
    class_name = architecture["network_class_name"]
    layout = family_of_architecture({"network_class_name": class_name}).layout(class_name)
    assert layout is not None
    return layout.nnssl_architecture(architecture)


def test_resenc_l_has_its_name() -> None:
    architecture = resenc(features=(32, 64, 128, 256, 320, 320), blocks=(1, 3, 4, 6, 6, 6))
    assert nnssl_name(architecture) == ("ResEncL", None, None)
    for other in ({"nonlin": "torch.nn.ReLU"}, {"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, {"conv_bias": False}):
        kwargs = {**architecture["arch_kwargs"], **other}
        name, said, _ = nnssl_name({**architecture, "arch_kwargs": kwargs})
        assert (name, said) == ("ResidualEncoderUNet", kwargs)


@pytest.mark.parametrize(
    ("architecture", "patch", "changes", "expected"),
    [
        (resenc(2), (32, 32), {}, "2D"),
        (resenc(), (16, 16, 16), {"previous_stage": "3d_lowres"}, "cascade"),
        ({**foreign.primus_architecture((16, 16, 16))}, (16, 16, 16), {}, "width|embed_dim"),
    ],
)
def test_what_the_layout_cannot_express_is_refused(
    architecture: dict, patch: tuple, changes: dict, expected: str
) -> None:
    kwargs = architecture["arch_kwargs"]
    if "embed_dim" in kwargs:
        kwargs["eva_depth"] = 7
    name = "2d" if len(patch) == 2 else "3d_fullres"
    plans = tiny.plans(**{name: tiny.configuration(architecture, patch) | changes})
    mfm = {"plans": plans, "configuration": name, "patch_size": list(patch), "num_inputs": 1}
    with pytest.raises(MFMError, match=expected) as caught:
        nnssl_export.adaptation_plan(mfm)
    assert caught.value.code == "E_CONFIG"


@pytest.mark.parametrize(
    ("changes", "is_refused"),
    [({}, False), ({"init_values": 1e-5}, False), ({"init_values": None}, True), ({"scale_attn_inner": False}, True)],
)
def test_the_name_of_a_primus_stands_for_its_function(changes: dict[str, Any], is_refused: bool) -> None:
    architecture = foreign.primus_architecture((16, 16, 16))
    architecture["arch_kwargs"] |= changes
    named = nnssl_name(architecture)
    assert next(iter(changes)) in named if is_refused else named == ("PrimusM", None, None)


# Weights for programs that do not have this package

PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OTHER_PROGRAM = """
import os, sys
sys.modules["mfm_nnunet"] = sys.modules["nnunetv2"] = None  # as where they are not installed
import torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    names, x = {}, torch.load("x.pt")
    exec(open("lines.py").read(), names)
    network = names["network"]
    with torch.no_grad():
        if hasattr(network, "eva"):
            grid = network.down_projection(x)
            features = [network.eva(grid.flatten(2).transpose(1, 2))[0]]
        else:
            features = [*network.encoder(x), network(x)]
    torch.save(features, "features.pt")
"""


def write_lines(folder: Path, x: Tensor) -> None:
    (lines,) = PYTHON.findall((folder / "README.md").read_text())
    assert len(lines.splitlines()) <= 16
    torch.save(x, folder / "x.pt")
    (folder / "lines.py").write_text(lines)


def features_here(file: Path, x: Tensor) -> list[Tensor]:
    content = read_checkpoint(file).content
    mfm = content["mfm"]
    configuration = mfm["plans"]["configurations"]["3d_fullres"]
    configuration["patch_size"] = mfm["patch_size"]
    if "input_shape" in configuration["architecture"]["arch_kwargs"]:
        configuration["architecture"]["arch_kwargs"]["input_shape"] = mfm["patch_size"]
    network = build_network(mfm["plans"], "3d_fullres", mfm["num_inputs"], mfm["num_outputs"]).eval()
    network.load_state_dict(content["network_weights"], strict=False)
    with torch.no_grad():
        if hasattr(network, "eva"):
            tokens = network.down_projection(x).flatten(2).transpose(1, 2)  # type: ignore[operator]
            return [network.eva(tokens)[0]]  # type: ignore[operator]
        return [*network.encoder(x), network(x)]  # type: ignore[operator]


FOREIGN = {
    "ResEncL-OpenMind-VoCo": (),
    "PrimusM-SimCLR": (),
    "PrimusM-OpenMind-SimMIM": ("gamma_1", "gamma_2"),
    "PrimusM-OpenMind-MAE": ("attn.norm.weight", "attn.norm.bias"),
}
"""Released layouts, and the tensors that are taken out of them: what is left decides what a Primus is."""


def foreign_file(name: str, left_out: tuple[str, ...], folder: Path) -> Path:
    """Its patch is not the one to fine-tune on, and a U-Net may be an encoder alone."""
    released = {**foreign.OPENMIND, **foreign.OTHERS}[name]()
    released.content["nnssl_adaptation_plan"]["recommended_downstream_patchsize"] = (32, 32, 32)
    weights = released.content["network_weights"]
    released.content["network_weights"] = {n: t for n, t in weights.items() if not n.endswith(left_out or "mask_token")}
    return released.write(folder)


def test_the_lines_of_the_card_make_the_weights_usable_without_us(tmp_path: Path) -> None:
    """Ours and foreign ones: a process without this package runs the lines and gets the same features."""
    layouts, expected = [*((family, "folder") for family in ARCHITECTURES), ("primus", "nnssl")], {}
    for name, layout in [*layouts, *((name, "folder") for name in FOREIGN)]:
        (place := tmp_path / f"{name}_{layout}").mkdir()
        file = foreign_file(name, FOREIGN[name], place) if name in FOREIGN else ours(name, 1, place)
        convert(file, place / "out", layout)
        mfm = json.loads((place / "out" / "config.json").read_text())["mfm"]
        kwargs = mfm["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        if name in FOREIGN and name.startswith("Primus"):
            assert (kwargs["init_values"] is None) == ("gamma_1" in FOREIGN[name])
            assert kwargs["scale_attn_inner"] == ("attn.norm.weight" not in FOREIGN[name])
        x = torch.randn(1, 1, *mfm["patch_size"])
        write_lines(place / "out", x)
        expected[place / "out"] = features_here(file, x)
    program = [sys.executable, "-c", OTHER_PROGRAM, *map(str, expected)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for folder, here in expected.items():
        elsewhere = torch.load(folder / "features.pt", weights_only=True)
        assert len(elsewhere) == len(here)
        compared = len(here) - ("VoCo" in str(folder))  # without a decoder, the output is random
        for mine, theirs in zip(elsewhere[:compared], here):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, msg=str(folder))


def test_the_reference_has_the_lines_of_the_card(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "documentation" / "reference" / "checkpoint.md").read_text()
    convert(ours("resenc", 1, tmp_path), tmp_path / "out", "folder")
    assert PYTHON.findall(page) == PYTHON.findall((tmp_path / "out" / "README.md").read_text())


@pytest.mark.parametrize(("layout", "family"), [("folder", "resenc"), ("folder", "primus"), ("nnssl", "primus")])
def test_the_folder_is_a_hubs(layout: str, family: str, tmp_path: Path) -> None:
    """Licence and papers on the card, each parameter counted and stored once, no path, and a warning for nnssl."""
    file = ours(family, 1, tmp_path)
    convert(file, tmp_path / "out", layout, licence="cc-by-4.0")
    card = (tmp_path / "out" / "README.md").read_text()
    distinct = {tensor.data_ptr(): tensor.numel() for tensor in checkpoint.load(file)["network_weights"].values()}
    for text in ("license: cc-by-4.0", "Doe, J. (2022)", "not a medical device", "9 volumes of 7 subjects",
                 f"{sum(distinct.values()):,} parameters"):  # fmt: skip
        assert text in card
    assert ("exchanges the first two axes" in card) == (layout == "nnssl")
    weights = max((tmp_path / "out").iterdir(), key=lambda entry: entry.stat().st_size)
    assert layout == "nnssl" or weights.stat().st_size < 1.05 * 4 * sum(distinct.values()) + 40_000
    assert not [entry for entry in (tmp_path / "out").iterdir() if str(tmp_path).encode() in entry.read_bytes()]


def test_words_of_a_foreign_file_are_words_in_the_card(tmp_path: Path) -> None:
    """A trainer, papers and a licence that would be HTML, a row of the table or a line of the head of the page."""
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    released.content.update({"trainer_name": "MAE | <script>", "citations": ["<img src=x>\n# title [a](http://x)"]})
    convert(released.write(tmp_path), tmp_path / "out", "folder", licence="mit\npipeline_tag: x")
    card = (tmp_path / "out" / "README.md").read_text()
    assert not [word for word in ("<script", "<img", "\n# title", "](http", "\npipeline_tag") if word in card]
    assert r"(trainer MAE \| &lt;script>)" in card


@pytest.mark.parametrize(("name", "planned"), [("3d_lowres", "3d_fullres"), ("2d", "2d")])
def test_the_commands_of_a_card_name_what_is_planned_like_it(name: str, planned: str) -> None:
    plans = tiny.plans(**{"3d_lowres": tiny.configuration(resenc())})
    patch = plans["configurations"][name]["patch_size"]
    card = model_card({"plans": plans, "configuration": name, "patch_size": patch, "num_inputs": 1}, 1)
    assert f"mfm_train DATASET {planned} 0" in card


@pytest.mark.parametrize("layout", ["folder", "nnssl"])
def test_the_licence_of_an_edited_card_counts_where_none_was_given(layout: str, tmp_path: Path) -> None:
    convert(ours("resenc", 1, tmp_path), tmp_path / "out", layout)
    place = find_checkpoint(tmp_path / "out")
    assert "licence" not in read_checkpoint(place).mfm
    (tmp_path / "out" / "README.md").write_text("---\nlicense: cc-by-sa-4.0\n---\n")
    assert read_checkpoint(place).mfm["licence"] == "cc-by-sa-4.0"


def test_a_licence_is_not_replaced_by_another(tmp_path: Path) -> None:
    convert(ours("resenc", 1, tmp_path), tmp_path / "one.pth", "pth", licence="cc-by-sa-4.0")
    action = lambda place: convert(place, tmp_path / "two.pth", "pth", licence="mit")  # noqa: E731
    refused(tmp_path / "one.pth", "E_CONFIG", r"cc-by-sa-4\.0.*--licence mit", action)
    assert not (tmp_path / "two.pth").exists()
    convert(tmp_path / "one.pth", tmp_path / "two.pth", "pth", licence="CC-BY-SA-4.0")


def test_a_folder_is_found_by_its_weights_and_beside_files_of_others(tmp_path: Path) -> None:
    file = ours("resenc", 1, tmp_path)
    convert(file, tmp_path / "out", "folder")
    assert find_checkpoint(tmp_path / "out" / "model.safetensors") == tmp_path / "out"
    (tmp_path / "out" / "config.json").write_text('{"architectures": ["of others"]}')
    refused(tmp_path / "out", "E_NOT_FOUND", r"model\.safetensors.*config\.json", find_checkpoint)
    (tmp_path / "out" / "checkpoint_final.pth").write_bytes(file.read_bytes())
    assert find_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint_final.pth"


@pytest.mark.parametrize("layout", ["folder", "nnssl", "pth"])
def test_nothing_is_overwritten(layout: str, tmp_path: Path) -> None:
    file = ours("resenc", 1, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(file, "E_EXISTS", None, lambda place: convert(place, tmp_path / "out", layout))
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["mine.txt"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def exchange_aliases(file: Path) -> None:
    """Aliases of another kind, and no SHA-256, as in older exports."""
    save_file({"a": torch.zeros(1)}, file, {"aliases": json.dumps({"b": ["a"]})})
    config = json.loads(file.with_name("config.json").read_text())
    del config["sha256"]
    file.with_name("config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda file: file.write_bytes(b"x" * 100)),
        ("model.safetensors", flip_a_bit),
        ("model.safetensors", exchange_aliases),
        ("config.json", lambda file: file.write_text("{}")),
        ("config.json", lambda file: file.write_text("{")),
    ],
)
def test_a_damaged_folder_is_refused(name: str, damage: Any, tmp_path: Path) -> None:
    convert(ours("resenc", 1, tmp_path), tmp_path / "out", "folder")
    damage(tmp_path / "out" / name)
    refused(tmp_path / "out", "E_MODEL_CORRUPT")


@pytest.mark.parametrize(
    ("edit", "code", "expected"),
    [
        (lambda w: w.pop("encoder.stages.0.blocks.0.conv1.conv.weight"), None, ""),  # its other name is there
        (lambda w: [w.pop(n) for n in list(w) if "stages.0.blocks.0.conv1" in n], "E_MODEL_CORRUPT", "missing"),
        (lambda w: w.update(other=torch.zeros(1)), "E_MODEL_CORRUPT", "not in its network"),
        (lambda w: w.update({"decoder.seg_layers.0.bias": torch.zeros(7)}), "E_MODEL_CORRUPT", "another shape"),
        (lambda w: w["decoder.seg_layers.0.bias"].fill_(float("nan")), "E_NONFINITE", "seg_layers"),
    ],
)
def test_verify(edit: Any, code: str | None, expected: str, tmp_path: Path) -> None:
    file = ours("resenc", 1, tmp_path)
    content = checkpoint.load(file)
    edit(content["network_weights"])
    torch.save(content, file)
    if code is None:
        api.describe_checkpoint(file, verify=True)
        return
    refused(file, code, expected, lambda place: api.describe_checkpoint(place, verify=True))
    api.describe_checkpoint(file)


@pytest.mark.parametrize("key", ["plans", "configuration", "num_outputs"])
def test_a_description_that_is_not_whole(key: str, tmp_path: Path) -> None:
    file = ours("resenc", 1, tmp_path)
    content = checkpoint.load(file)
    del content["mfm"][key]
    torch.save(content, file)
    refused(file, "E_MODEL_MISMATCH", r"a\.pth", api.describe_checkpoint)


@pytest.mark.parametrize(
    ("entry", "code", "expected"),
    [
        ({"plans": [1]}, "E_MODEL_CORRUPT", "plans"),
        ({"corpus": {"num_cases": 9}}, "E_MODEL_CORRUPT", "corpus"),
        ({"source": {"notes": "none"}}, "E_MODEL_CORRUPT", "source.notes"),
        ({"format": 2}, "E_MODEL_MISMATCH", "newer"),
    ],
)
def test_a_description_that_cannot_be(entry: dict[str, Any], code: str, expected: str, tmp_path: Path) -> None:
    """In a file and in a folder."""
    file = ours("resenc", 1, tmp_path)
    convert(file, tmp_path / "out", "folder")
    content, config = checkpoint.load(file), json.loads((tmp_path / "out" / "config.json").read_text())
    for mfm in (content["mfm"], config["mfm"]):
        mfm |= entry
    torch.save(content, file)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    for place in (file, tmp_path / "out"):
        refused(place, code, expected)


# Models that were trained with labels


def trained(
    architecture: dict[str, Any], patch: tuple[int, ...], folder: Path, planned: Any = None, **changes: Any
) -> Path:
    """A file of a stock trainer; ``planned`` is what its plan says of the network instead."""
    plans = tiny.plans(**{"3d_fullres": tiny.configuration(architecture, patch)})
    network = build_network(plans, "3d_fullres", 1, 3)
    plans["configurations"]["3d_fullres"] |= planned or {}
    init_args = {"plans": plans, "configuration": "3d_fullres", "dataset_json": {"names": foreign.SUBJECT}}
    content = {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer", "init_args": init_args}
    torch.save({**content, **changes}, folder / "checkpoint_final.pth")
    return folder / "checkpoint_final.pth"


def test_a_stock_model_is_supervised_pretraining(tmp_path: Path) -> None:
    reading = read_checkpoint(trained(resenc(), (16, 16, 16), tmp_path))
    assert (reading.layout, reading.mfm["pretext"], reading.mfm["num_outputs"]) == ("nnU-Net", "supervised", 3)
    assert reading.mfm["plans"]["configurations"]["3d_fullres"]["architecture"] == resenc()
    assert foreign.SUBJECT not in str(reading.content)
    require_complete(reading.content)


def test_only_the_papers_of_what_other_planners_noted_are_kept(tmp_path: Path) -> None:
    """nnU-Net's development planner writes the path of the checkpoint into the plan, and whom to cite."""
    file = trained(resenc(), (16, 16, 16), tmp_path)
    content = torch.load(file, weights_only=True)
    noted = {"checkpoint_path": f"/home/{foreign.SUBJECT}/a.pth", "citations": foreign.CITATIONS}
    content["init_args"]["plans"]["pretrain_info"] = noted
    torch.save(content, file)
    for layout in ("pth", "folder", "nnssl"):
        convert(file, tmp_path / f"out_{layout}", layout)
        assert read_checkpoint(find_checkpoint(tmp_path / f"out_{layout}")).mfm["citations"] == foreign.CITATIONS
    written = [entry for out in tmp_path.glob("out_*") for entry in (out.iterdir() if out.is_dir() else [out])]
    assert len(written) == 8
    assert not [entry.name for entry in written if foreign.SUBJECT.encode() in entry.read_bytes()]


@pytest.mark.parametrize(
    "planned",
    [
        {"architecture": {"network_class_name": "ResEncL", "arch_kwargs": None, "_kw_requires_import": None}},
        {"architecture": None, "UNet_class_name": "ResidualEncoderUNet"},
    ],
)
def test_a_network_that_the_plan_does_not_describe_is_inferred(planned: dict[str, Any], tmp_path: Path) -> None:
    """As nnU-Net's development trainer leaves a fine-tuned ResEnc-L, and as older plans name a network."""
    file = trained(resenc(), (16, 16, 16), tmp_path, planned)
    made = read_checkpoint(file).mfm["plans"]["configurations"]["3d_fullres"]["architecture"]
    assert made == resenc()


def test_a_stock_primus_is_asked_for_its_token_order(tmp_path: Path) -> None:
    """Stock's Primus trainers leave the U-Net in the plan."""
    network = foreign.primus((16, 16, 16), num_outputs=3)
    file = trained(resenc(), (16, 16, 16), tmp_path, network_weights=network.state_dict())
    with pytest.raises(MFMError, match="--token-order"):
        read_checkpoint(file)
    reading = read_checkpoint(file, "whd")
    assert reading.mfm["plans"]["mfm"] == to_dict(MFMBlock(network="primus"))
    require_equal(
        {n: t for n, t in network.state_dict().items() if not n.startswith("up_projection")},
        {n: t for n, t in reading.content["network_weights"].items() if not n.startswith("up_projection")},
    )


def test_our_own_fine_tuned_primus_needs_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architecture = foreign.primus_architecture((16, 16, 16))
    place = trained(architecture, (16, 16, 16), tmp_path, mfm={"kind": "finetuned"})
    reading = read_checkpoint(place)
    assert reading.mfm["plans"]["mfm"]["network"] == "primus"
    require_complete(reading.content)
    with caplog.at_level(logging.INFO):
        read_checkpoint(place, "hwd")
    assert "--token-order hwd has no effect" in caplog.text


@pytest.mark.parametrize("layout", ["folder", "nnssl"])
@pytest.mark.parametrize("pictures", [False, True])
def test_the_card_shows_the_curve_and_scans_only_on_request(pictures: bool, layout: str, tmp_path: Path) -> None:
    """The head of the card is read by huggingface_hub as it was written."""
    file = ours("resenc", 1, tmp_path)
    history = [
        {"epoch": epoch, "train_loss": 1 / (epoch + 1), "validation_loss": 1.0, "learning_rate": 0.1, "seconds": 1.0}
        for epoch in range(3)
    ]
    plot_progress(history, tmp_path / "progress.png", "mae")
    plot_progress(history, tmp_path / "examples.png", "stands for a crop")
    api.convert_checkpoint(file, tmp_path / "out", layout=layout, licence="cc-by-4.0", pictures=pictures)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "mfm_nnunet")
    assert "self-supervised-learning" in card.data.tags
    shown = re.findall(r"!\[[^]]+\]\((.*)\)", card.text)
    assert shown == (["progress.png", "examples.png"] if pictures else ["progress.png"])
    for name in shown:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert (tmp_path / "out" / "examples.png").exists() == pictures
    assert ("no images but the crop above" in card.text) == pictures
    again = tmp_path / "again"
    convert(find_checkpoint(tmp_path / "out"), again, "folder")
    assert (again / "progress.png").exists()


def test_a_card_names_the_repository_that_the_weights_came_from(tmp_path: Path) -> None:
    file = foreign.OPENMIND["ResEncL-OpenMind-MAE"]().write(tmp_path)
    place = tmp_path / "models--AnonRes--A-B" / "snapshots" / ("a" * 40)
    place.mkdir(parents=True)
    file.rename(place / file.name)
    convert(place / file.name, tmp_path / "out", "folder")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "AnonRes/A-B"
    assert f"hf://AnonRes/A-B@{'a' * 40}" in card.text


@pytest.mark.parametrize(
    ("head", "licence"),
    [
        ("license: other\nlicense_name: dinov3-license", "dinov3-license"),
        ("license: [mit, bsd]", None),
        ("license: {a: 1", None),
        ("- a list", None),
        ("license: other", None),
    ],
)
def test_licences_of_foreign_cards(head: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# Title\n")
    assert stated_licence(tmp_path) == licence
