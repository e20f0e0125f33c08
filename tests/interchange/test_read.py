"""Foreign checkpoints come in: names, repairs, plans; equal outputs before and after; refusals that say why."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import sha256
from mfm_nnunet.finetune.pretrained import transfer
from mfm_nnunet.interchange.folder import citations
from mfm_nnunet.interchange.read import convert, find_checkpoint, read_checkpoint
from mfm_nnunet.interchange.verify import require_complete
from mfm_nnunet.jobs.plan import read_source
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.transfer import transfer_weights
from tests.builders import foreign
from tests.builders.architectures import resenc

EVERY = {**foreign.OPENMIND, **foreign.OTHERS}
TASKS = {
    "MAE": "mae", "SimMIM": "simmim", "MG": "models_genesis", "S3D": "spark3d", "VF": "volume_fusion", "VoCo": "voco",
    "SimCLR": "simclr", "SwinUNETR": "swin_unetr", "nnFoundationCNN": None,
}  # fmt: skip


def refused(place: Path, code: str, words: str = "") -> None:
    """Reading is refused with the code; ``words`` are in the message."""
    with pytest.raises(MFMError, match=words) as caught:
        read_checkpoint(place)
    assert caught.value.code == code


def network_for(mfm: dict[str, Any], num_inputs: int = 1, num_outputs: int = 3) -> nn.Module:
    """The network that the converted plan describes, untrained, for a labelled dataset."""
    torch.manual_seed(99)
    return build_network(mfm["plans"], mfm["configuration"], num_inputs, num_outputs).eval()


def encoded(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if hasattr(network, "eva"):
        return foreign.new_order(network, x)
    return network.encoder(x)[-1]  # type: ignore[operator]


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_every_released_layout_gives_the_function_that_was_pretrained(name: str, tmp_path: Path) -> None:
    released = EVERY[name]()
    file = released.write(tmp_path)
    reading = read_checkpoint(file)
    assert reading.mfm["pretext"] == TASKS[name.rpartition("-")[2]]
    mfm = reading.mfm
    configuration = mfm["plans"]["configurations"]["3d_fullres"]
    x = torch.randn(2, 1, *(released.patch if "S3D" not in name else (16, 16, 16)))
    if hasattr(released.network, "eva"):  # the table is for the patch that was seen
        configuration["patch_size"] = configuration["architecture"]["arch_kwargs"]["input_shape"] = mfm["patch_size"]
    target = network_for(mfm)
    report = transfer_weights(reading.content["network_weights"], target, source_patch_size=mfm["patch_size"])
    assert report.encoder_share == 1.0
    assert not report.adapted
    expected = foreign.old_order(released.network, x) if released.is_old_order else encoded(released.network, x)
    torch.testing.assert_close(encoded(target, x), expected, rtol=1e-5, atol=1e-5)
    require_complete(reading.content)
    source = read_source(file)
    assert source.family.name == ("primus" if name.startswith("Primus") else "resenc")
    assert source.configuration == "3d_fullres"
    assert source.trained.is_resampled == (name != "nnFoundationCNN")


@torch.no_grad()
def test_positions_alone_would_not_be_enough() -> None:
    """The channels that turn with the first two axes must be exchanged as well, and 5 % of error is not rounding."""
    released = foreign.OPENMIND["PrimusM-OpenMind-MAE"]()
    x = torch.randn(1, 1, *released.patch)
    expected = foreign.old_order(released.network, x)
    naive = foreign.new_order(released.network, x)
    grid = [size // 8 for size in released.patch]
    half = foreign.primus(released.patch)
    table = half.eva.pos_embed  # type: ignore[union-attr]
    table.copy_(table.reshape(1, *grid, -1).transpose(1, 2).flatten(1, 3))  # type: ignore[operator, union-attr]
    for wrong in (naive, foreign.new_order(half, x)):
        assert (wrong - expected).norm() > 0.02 * expected.norm()


@pytest.mark.parametrize("num_inputs", [1, 3])
def test_stale_copies_of_sparse_pretraining_are_replaced_under_both_names(num_inputs: int, tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-S3D"]()
    reading = read_checkpoint(released.write(tmp_path))
    assert any("untrained copies" in note for note in reading.notes)
    trained = released.network.state_dict()
    for name, tensor in reading.content["network_weights"].items():
        assert torch.equal(tensor, trained[name]), name
    target = network_for(reading.mfm, num_inputs)
    transfer_weights(reading.content["network_weights"], target)
    state = target.state_dict()
    for name in ("conv", "all_modules.0"):
        stem = state[f"encoder.stem.convs.0.{name}.weight"]
        assert torch.equal(stem, trained["encoder.stem.convs.0.conv.weight"].expand_as(stem) / num_inputs)


def test_decoders_come_along_where_there_are_any(tmp_path: Path) -> None:
    reading = read_checkpoint(foreign.OPENMIND["ResEncL-OpenMind-VF"]().write(tmp_path))
    report = transfer_weights(reading.content["network_weights"], network_for(reading.mfm))
    assert "decoder.transpconvs.0.weight" in {entry.name for entry in report.loaded}
    assert {entry.name.split(".")[1] for entry in report.new} == {"seg_layers"}


def test_what_is_not_ours_is_reported_by_name(tmp_path: Path) -> None:
    file = foreign.OPENMIND["ResEncL-OpenMind-VoCo"]().write(tmp_path)
    reading = read_checkpoint(file)
    report = transfer(reading, network_for(reading.mfm))
    assert reading.layout == "nnssl"
    assert "projector.layer1.0.weight" in {entry.name for entry in report.ignored}


@pytest.mark.parametrize("last", [16, 24])
def test_a_patch_decoder_comes_along_where_both_widths_of_each_layer_are_ours(last: int, tmp_path: Path) -> None:
    released = foreign.OPENMIND["PrimusM-OpenMind-SimMIM"]()
    weights = released.content["network_weights"]
    own = {n: t for n, t in released.network.state_dict().items() if n.startswith("up_projection.")}
    weights |= {n: torch.zeros([last if size == 16 else size for size in t.shape]) for n, t in own.items()}
    reading = read_checkpoint(released.write(tmp_path))
    assert set(own) <= set(reading.content["network_weights"] if last == 16 else reading.others)
    require_complete(reading.content)


# Files as they are


def test_wrappers_are_stripped(tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    weights = released.content["network_weights"]
    released.content["network_weights"] = {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}
    assert set(read_checkpoint(released.write(tmp_path)).content["network_weights"]) == {
        name for name in weights if not name.startswith("decoder.encoder.")
    }


def test_an_encoder_of_another_name_is_found_by_the_files_own_words(tmp_path: Path) -> None:
    """Wrappers inside too; a second encoder (a teacher) is not taken."""
    released = foreign.OPENMIND["ResEncL-OpenMind-VoCo"]()
    weights = {n: t for n, t in released.content["network_weights"].items() if n.startswith("encoder.")}
    named = {f"online_encoder._orig_mod.{name.removeprefix('encoder.')}": tensor for name, tensor in weights.items()}
    teacher = {f"teacher.{name.removeprefix('encoder.')}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    released.content["network_weights"] = {**teacher, **named}
    plan = released.content["nnssl_adaptation_plan"]
    plan |= {"key_to_encoder": "online_encoder.stages", "key_to_stem": "online_encoder.stem"}
    reading = read_checkpoint(released.write(tmp_path))
    assert all(torch.equal(reading.content["network_weights"][name], tensor) for name, tensor in weights.items())
    assert set(reading.others) == set(teacher)
    plan["key_to_encoder"] = "student.stages"
    refused(released.write(tmp_path), "E_MODEL_MISMATCH", r"student\.stages")  # what is there is not what is meant
    del released.content["nnssl_adaptation_plan"]
    refused(released.write(tmp_path), "E_MODEL_MISMATCH", "teacher")


def test_the_files_own_words_may_be_any(tmp_path: Path) -> None:
    released = foreign.OPENMIND["PrimusM-OpenMind-SimMIM"]()
    weights = released.content["network_weights"]
    released.content["network_weights"] = {f"student.{n.replace('eva.', 'vit.')}": t for n, t in weights.items()}
    released.content["network_weights"] |= {f"teacher.{n}": torch.zeros_like(t) for n, t in weights.items()}
    plan = released.content["nnssl_adaptation_plan"]
    plan |= {"key_to_encoder": "student.vit", "key_to_stem": "student.down_projection"}
    found = read_checkpoint(released.write(tmp_path)).content["network_weights"]
    assert all(torch.equal(found[name], weights[name]) for name in weights if name.startswith(("eva.", "down_")))


@torch.no_grad()
@pytest.mark.parametrize(
    "said",
    [
        {"nonlin": "torch.nn.ReLU"},
        {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d", "norm_op_kwargs": {"eps": 1e-3}},
    ],
)
def test_norms_and_activations_are_those_that_the_file_says(said: dict[str, Any], tmp_path: Path) -> None:
    architecture = resenc(features=foreign.FEATURES, blocks=foreign.BLOCKS)
    architecture["arch_kwargs"] |= said
    plans = {"configurations": {"3d_fullres": {"patch_size": [16] * 3, "architecture": architecture}}}
    network = build_network(plans, "3d_fullres", 1, 1)
    network(torch.randn(2, 1, 16, 16, 16) + 3)  # running statistics that matter
    plan = foreign.adaptation_plan("", (16, 16, 16))
    plan["architecture_plans"] = {
        "arch_class_name": architecture["network_class_name"],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    content = foreign.full(network.state_dict(), plan, "BaseMAETrainer")
    reading = read_checkpoint(foreign.Released(content, network, (16, 16, 16)).write(tmp_path))
    assert reading.notes == ()
    require_complete(reading.content)
    target = network_for(reading.mfm)
    transfer_weights(reading.content["network_weights"], target)
    x = torch.randn(2, 1, 16, 16, 16)
    torch.testing.assert_close(encoded(target, x), encoded(network.eval(), x), rtol=1e-5, atol=1e-5)


MISSING = object()


@pytest.mark.parametrize(
    ("spacing", "is_resampled", "is_noted"),
    [
        (MISSING, True, True),
        (None, False, False),
        ((None, None, None), False, False),
        ([None, None, None], False, False),
        (torch.tensor([1.0, 1.0, 2.0]), True, False),
    ],
)
def test_a_spacing_may_be_missing_or_none(spacing: Any, is_resampled: bool, is_noted: bool, tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    configuration = released.content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["onemmiso"]
    configuration["spacing"] = spacing
    if spacing is MISSING:
        del configuration["spacing"]
    file = released.write(tmp_path)
    assert read_source(file).trained.is_resampled == is_resampled
    assert any(note.startswith("spacing: 1 mm") for note in read_checkpoint(file).notes) == is_noted


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_sequences_of_any_kind(kind: Callable[[Any], Any], tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    plan = released.content["nnssl_adaptation_plan"]
    plan["recommended_downstream_patchsize"] = kind([32, 32, 32])
    plan["pretrain_plan"]["configurations"]["onemmiso"]["spacing"] = kind([1.0, 1.0, 2.0])
    mfm = read_checkpoint(released.write(tmp_path)).mfm
    configuration = mfm["plans"]["configurations"]["3d_fullres"]
    assert (configuration["patch_size"], configuration["spacing"]) == ([32, 32, 32], [1.0, 1.0, 2.0])


@pytest.mark.parametrize("missing", ["architecture_plans", "key_to_encoder"])
@pytest.mark.parametrize("name", ["ResEncL-OpenMind-MAE", "PrimusM-OpenMind-MAE"])
def test_fields_may_be_missing(name: str, missing: str, tmp_path: Path) -> None:
    released = foreign.OPENMIND[name]()
    del released.content["nnssl_adaptation_plan"][missing], released.content["citations"]
    file = released.write(tmp_path)
    if name.startswith("Primus") and missing == "architecture_plans":  # how many heads has a width of 72?
        refused(file, "E_MODEL_MISMATCH", "how many heads")
        return
    assert read_checkpoint(file).mfm["citations"] == []


def test_a_file_without_a_plan_is_read_off_its_tensors_and_says_so(tmp_path: Path) -> None:
    reading = read_checkpoint(foreign.OPENMIND["ResEncL-OpenMind-S3D"]().write(tmp_path))
    kwargs = reading.mfm["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert kwargs["features_per_stage"] == list(foreign.FEATURES)
    assert kwargs["n_blocks_per_stage"] == list(foreign.BLOCKS)
    assert kwargs["strides"] == [[1] * 3, [2] * 3, [2] * 3]
    assert [note.partition(":")[0] for note in reading.notes] == [
        "the file has no plan",
        "12 tensors were untrained copies of sparse pretraining and were replaced by the trained",
        "norms and activations",
        "patch",
        "normalisation",
        "spacing",
        "axes",
    ]


def spark_run(folder: Path, **init_args: Any) -> Path:
    """The checkpoint of S3D in the folder of its run, which holds ``fold_all/checkpoint_final.pth``."""
    released = foreign.OPENMIND["ResEncL-OpenMind-S3D"]()
    released.content["init_args"] |= init_args
    return released.write(folder / "Dataset745_Corpus" / "SparkMAETrainer_BS8__nnsslPlans__median" / "fold_all")


def prepared_with(mfm: dict[str, Any]) -> dict[str, Any]:
    configuration = mfm["plans"]["configurations"]["3d_fullres"]
    return {name: configuration[name] for name in ("spacing", "normalization_schemes", "patch_size")} | {
        "seen": mfm["patch_size"],
        "axes": mfm["plans"]["transpose_forward"],
    }


OF_THE_RUN = {
    "spacing": [3.0, 1.0, 0.5],
    "normalization_schemes": ["ZScoreNormalization"],
    "patch_size": [32, 48, 16],
    "seen": [32, 48, 16],
    "axes": [2, 0, 1],
}


@pytest.mark.parametrize("is_relative", [True, False])
def test_the_plan_of_a_run_is_found_above_its_fold(
    is_relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's ``adaptation_plan.json`` is beside ``fold_all``, also for a file of the current folder."""
    file = spark_run(tmp_path)
    plan = foreign.adaptation_plan("ResEncL", (32, 48, 16))
    plan["pretrain_plan"] |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    plan["pretrain_plan"]["configurations"]["onemmiso"]["spacing"] = [3.0, 1.0, 0.5]
    (file.parent.parent / "adaptation_plan.json").write_text(json.dumps(plan))
    if is_relative:
        monkeypatch.chdir(file.parent)
        file = Path(file.name)
    reading = read_checkpoint(file)
    assert prepared_with(reading.mfm) == OF_THE_RUN
    assert len(reading.notes) == 1
    assert "untrained copies" in reading.notes[0]


def test_a_plan_above_any_other_folder_is_not_taken(tmp_path: Path) -> None:
    file = foreign.OPENMIND["ResEncL-OpenMind-S3D"]().write(tmp_path / "weights")
    (tmp_path / "adaptation_plan.json").write_text(json.dumps(foreign.adaptation_plan("ResEncL", (32, 48, 16))))
    assert any(note.startswith("the file has no plan") for note in read_checkpoint(file).notes)


def test_what_a_training_began_with_is_used_where_there_is_no_plan_for_others(tmp_path: Path) -> None:
    """The configuration that was trained, not the first; and nothing of the corpus' index."""
    file = spark_run(tmp_path, **foreign.training_plan("median", (32, 48, 16), (3.0, 1.0, 0.5), (2, 0, 1)))
    reading = read_checkpoint(file)
    assert prepared_with(reading.mfm) == OF_THE_RUN
    assert not [note for note in reading.notes if "does not say" in note and "norms and activations" not in note]
    assert foreign.SUBJECT not in str(reading.content)
    convert(file, tmp_path / "imported.pth", "pth")
    assert foreign.SUBJECT.encode() not in (tmp_path / "imported.pth").read_bytes()


def test_a_training_without_resampling_is_no_training_at_a_millimetre(tmp_path: Path) -> None:
    file = spark_run(tmp_path, **foreign.training_plan("noresample", (32, 48, 16), None))
    assert not read_source(file).trained.is_resampled


@pytest.mark.parametrize(
    "init_args",
    [{"plan": 3}, {"plan": {"configurations": []}}, {"configuration_name": ["median"]}, {"configuration_name": "x"}],
)
def test_arguments_of_a_training_that_say_nothing(init_args: dict[str, Any], tmp_path: Path) -> None:
    usual = foreign.training_plan("median", (32, 48, 16), (3.0, 1.0, 0.5))
    reading = read_checkpoint(spark_run(tmp_path, **(usual | init_args)))
    assert {"spacing", "axes", "patch", "normalisation"} <= {note.partition(":")[0] for note in reading.notes}


def test_a_field_that_the_plan_for_others_lacks_is_the_trainings(tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    del released.content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["onemmiso"]["spacing"]
    released.content["init_args"] |= foreign.training_plan("onemmiso", (64, 64, 64), (2.0, 2.0, 2.0))
    reading = read_checkpoint(released.write(tmp_path))
    configuration = reading.mfm["plans"]["configurations"]["3d_fullres"]
    assert (configuration["spacing"], configuration["patch_size"]) == ([2.0, 2.0, 2.0], [32, 32, 32])
    assert reading.notes == ()


def test_the_folder_of_a_run_names_its_fold(tmp_path: Path) -> None:
    file = spark_run(tmp_path)
    with pytest.raises(MFMError, match="fold_all") as caught:
        find_checkpoint(file.parent.parent)
    assert caught.value.code == "E_NOT_FOUND"


@pytest.mark.parametrize(
    ("without", "is_none"),
    [(("nnssl_adaptation_plan",), True), (("nnssl_adaptation_plan", "trainer_name"), False)],
)
def test_the_plan_beside_a_file_is_used(without: tuple[str, ...], is_none: bool, tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    plan = dict(released.content["nnssl_adaptation_plan"])
    plan["pretrain_plan"]["configurations"]["onemmiso"]["spacing"] = [3.0, 1.0, 1.0]
    for key in without:
        released.content[key] = None
        if not is_none:
            del released.content[key]
    file = released.write(tmp_path)
    assert any(note.startswith("the file has no plan") for note in read_checkpoint(file).notes)
    (tmp_path / "adaptation_plan.json").write_text(json.dumps({**plan, "trainer_name": "BaseMAETrainer"}))
    reading = read_checkpoint(find_checkpoint(tmp_path))
    assert reading.mfm["plans"]["configurations"]["3d_fullres"]["spacing"] == [3.0, 1.0, 1.0]
    assert (reading.mfm["pretext"], reading.notes) == ("mae", ())


def test_the_trainer_beside_a_file_tells_the_token_order(tmp_path: Path) -> None:
    released = foreign.OPENMIND["PrimusM-OpenMind-MAE"]()
    trainer = released.content.pop("trainer_name")
    file = released.write(tmp_path)
    (tmp_path / "adaptation_plan.json").write_text(json.dumps({"trainer_name": trainer}))
    assert read_checkpoint(file).notes == ("token order repaired: axis 1 was outermost",)


def test_files_of_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    """The tag of the device stands in the file's pickle; it is rewritten here as a GPU's."""
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    plain, tagged = released.write(tmp_path), tmp_path / "cuda.pth"
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tagged, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
                assert b"cuda:0" in data
            new.writestr(entry, data)
    read_checkpoint(tagged)


# Token order


@pytest.mark.parametrize("trainer", [None, "MyTrainer"])
def test_an_unknown_token_order_is_asked_for(trainer: str | None, tmp_path: Path) -> None:
    released = foreign.OPENMIND["PrimusM-OpenMind-MAE"]()
    released.content.pop("trainer_name")
    if trainer:
        released.content["trainer_name"] = trainer
    file = released.write(tmp_path)
    refused(file, "E_MODEL_MISMATCH", "--token-order")
    weights = [read_checkpoint(file, order).content["network_weights"]["eva.pos_embed"] for order in ("whd", "hwd")]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("is_ours", [True, False])
def test_an_order_that_nobody_needs_is_told_to_have_no_effect(
    is_ours: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A U-Net has no tokens; ours have one order."""
    file = foreign.OPENMIND["PrimusM-OpenMind-MAE" if is_ours else "ResEncL-OpenMind-MAE"]().write(tmp_path)
    with caplog.at_level(logging.INFO):
        if is_ours:
            convert(file, tmp_path / "ours.pth", "pth", token_order="hwd")
            file = tmp_path / "ours.pth"
        assert "no effect" not in caplog.text
        read_checkpoint(file, "hwd")
    assert "--token-order hwd has no effect" in caplog.text


def test_unequal_first_axes_cannot_be_repaired(tmp_path: Path) -> None:
    network = foreign.primus((16, 24, 16))
    plan = foreign.adaptation_plan("PrimusM", (16, 24, 16))
    file = foreign.Released(foreign.full(network.state_dict(), plan, "BaseEvaMAETrainer"), network, (16, 24, 16))
    refused(file.write(tmp_path), "E_MODEL_MISMATCH", "first two axes")
    file.content["trainer_name"] = "SimMIMEvaTrainer"
    assert read_checkpoint(file.write(tmp_path)).mfm["patch_size"] == [16, 24, 16]


def test_the_position_table_decides_about_its_grid(tmp_path: Path) -> None:
    """Crops of 16 voxels under a plan that says 160."""
    released = foreign.OTHERS["PrimusM-SimCLR"]()
    plan = released.content["nnssl_adaptation_plan"]
    plan["recommended_downstream_patchsize"] = (160, 160, 160)
    plan["pretrain_plan"]["configurations"]["onemmiso"]["patch_size"] = (160, 160, 160)
    reading = read_checkpoint(released.write(tmp_path))
    assert reading.mfm["patch_size"] == [16, 16, 16]
    assert any(note.startswith("positions: 8 rows") for note in reading.notes)
    configuration = reading.mfm["plans"]["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == configuration["architecture"]["arch_kwargs"]["input_shape"] == [160] * 3


# What is refused


def test_a_layout_nobody_knows_lists_those_that_are_known(tmp_path: Path) -> None:
    torch.save({"state": {"a": torch.zeros(1)}, "iteration": 3}, tmp_path / "other.pth")
    known = "other.pth.*state, iteration.*model.safetensors.*nnssl_adaptation_plan.*init_args"
    refused(tmp_path / "other.pth", "E_MODEL_CORRUPT", known)


def planned(content: dict[str, Any]) -> dict[str, Any]:
    return content["nnssl_adaptation_plan"]["pretrain_plan"]


def without(content: dict[str, Any], part: str) -> None:
    content["network_weights"] = {name: w for name, w in content["network_weights"].items() if part not in name}


def trained_with(content: dict[str, Any], **changes: Any) -> None:
    planned(content)["configurations"]["onemmiso"].update(changes)


@pytest.mark.parametrize(
    ("edit", "code", "hint"),
    [
        (lambda c: c.update(network_weights={"a": torch.zeros(1)}), "E_MODEL_MISMATCH", "no encoder"),
        (lambda c: without(c, "stages.1.blocks.0.c"), "E_MODEL_MISMATCH", "stage 1"),
        (lambda c: without(c, "encoder.stem"), "E_MODEL_MISMATCH", "stem"),
        (lambda c: trained_with(c, normalization_schemes=["CTNormalization"]), "E_MODEL_MISMATCH", "CTNormalization"),
        (lambda c: trained_with(c, spacing=(None, 1.0, 1.0)), "E_MODEL_CORRUPT", "spacing"),
        (lambda c: trained_with(c, spacing=(None,)), "E_MODEL_CORRUPT", "spacing"),
        (lambda c: planned(c).update(transpose_forward=[0, 1, 5]), "E_MODEL_CORRUPT", "transpose_forward"),
        (lambda c: planned(c).update(configurations={"onemmiso": 3}), "E_MODEL_CORRUPT", "onemmiso"),
        (lambda c: c.update(nnssl_adaptation_plan=[1]), "E_MODEL_CORRUPT", "nnssl_adaptation_plan"),
        *(
            (lambda c, key=key, value=value: c["nnssl_adaptation_plan"].update({key: value}), "E_MODEL_CORRUPT", key)
            for key, value in {
                "pretrain_plan": 3,
                "key_to_stem": 3,
                "recommended_downstream_patchsize": "x",
                "pretrain_num_input_channels": True,
            }.items()
        ),
    ],
)
def test_broken_contents_are_refused(edit: Callable, code: str, hint: str, tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    edit(released.content)
    file = released.write(tmp_path)
    refused(file, code, f"{re.escape(str(file))}.*{hint}")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match="no checkpoint in this folder") as caught:
        find_checkpoint(tmp_path)
    assert caught.value.code == "E_NOT_FOUND"


# Import


@pytest.mark.parametrize("name", ["PrimusM-OpenMind-MAE", "ResEncL-OpenMind-S3D"])
def test_what_is_imported_names_nobody_and_is_ours(name: str, tmp_path: Path) -> None:
    file = EVERY[name]().write(tmp_path)
    assert foreign.SUBJECT.encode() in file.read_bytes()
    assert read_checkpoint(file).names_subjects
    convert(file, tmp_path / "ours.pth", "pth", licence="cc-by-4.0")
    assert foreign.SUBJECT.encode() not in (tmp_path / "ours.pth").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "ours.pth").read_bytes()
    reading = read_checkpoint(tmp_path / "ours.pth")
    assert reading.layout == "mfm_nnunet"
    assert reading.mfm["licence"] == "cc-by-4.0"
    assert reading.mfm["citations"] == foreign.CITATIONS
    before = read_checkpoint(file).content["network_weights"]
    after = reading.content["network_weights"]
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    source = reading.mfm["source"]
    assert (source["file"], source["sha256"]) == (file.name, sha256(file))
    assert reading.notes == tuple(source["notes"]) == read_checkpoint(file).notes != ()
    distinct = {tensor.data_ptr(): tensor.numel() * 4 for tensor in after.values()}
    assert (tmp_path / "ours.pth").stat().st_size < 1.2 * sum(distinct.values()) + 300 * len(after) + 20_000
    checkpoint.require_plain(reading.content)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("Doe, J. (2022)", "Doe, J. (2022)"),
        ({"apa_citations": "Doe, J. (2022)"}, "Doe, J. (2022)"),
        (tuple(foreign.CITATIONS), "Doe, J. (2022). A paper."),
        ([{"type": "Pretraining", "bibtex_citations": ["@article{doe2022}"]}], "@article{doe2022}"),
        (2022, None),
    ],
)
def test_citations_of_any_kind_are_ours_after_import(said: Any, text: str | None, tmp_path: Path) -> None:
    released = foreign.OPENMIND["ResEncL-OpenMind-MAE"]()
    released.content["citations"] = said
    convert(released.write(tmp_path), tmp_path / "ours.pth", "pth")
    reading = read_checkpoint(tmp_path / "ours.pth")
    assert list(citations(reading.mfm)) == ([text] if text else [])
    assert any("citations" in note for note in reading.notes) == (text is None)


@pytest.mark.parametrize(("card", "licence"), [("---\nlicense: cc-by-4.0\n---\n", "cc-by-4.0"), ("license: mit", None)])
def test_the_licence_of_the_card_beside_a_file_goes_along(card: str, licence: str | None, tmp_path: Path) -> None:
    file = foreign.OPENMIND["ResEncL-OpenMind-MAE"]().write(tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert read_checkpoint(file).mfm.get("licence") == licence
    convert(file, tmp_path / "ours.pth", "pth")
    (tmp_path / "README.md").write_text("---\nlicense: other-1.0\n---\n")
    assert read_checkpoint(tmp_path / "ours.pth").mfm["licence"] == (licence or "other-1.0")
