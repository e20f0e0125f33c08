"""MFMTrainer: nnU-Net's contract, settings, transfer, seeded batches, checkpoints, validation, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from mfm_nnunet import checkpoint
from mfm_nnunet.device import require_scaled_fp16
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.errors import StoppedError
from mfm_nnunet.files import sha256
from mfm_nnunet.finetune import validation
from mfm_nnunet.finetune.fold import FoldRun
from mfm_nnunet.finetune.loading import SeededBatches, make_loaders, read_batches, seed_of
from mfm_nnunet.finetune.trainer import MFMTrainer
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.settings import MFMBlock
from mfm_nnunet.signals import stop_on_signal
from mfm_nnunet.workspace import Workspace, use
from tests.builders import tiny
from tests.builders.architectures import resenc
from tests.builders.tiny import run_training
from tests.builders.training import (
    CPU,
    STEM,
    first_batches,
    initialised,
    make_trainer,
    pretrained_file,
    refused,
    take_step,
    train,
)

SHORT = ("finetune.epochs=1", "finetune.iterations_per_epoch=1")


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Workspace]:
    tiny.make(tmp_path)
    with use(tmp_path) as workspace:
        yield workspace


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (*strings_in(key), *strings_in(item))]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in strings_in(item)]
    return [value] if isinstance(value, str) else []


# nnU-Net's contract


def test_constructor_is_nnunets() -> None:
    ours, stock = (inspect.signature(cls.__init__).parameters for cls in (MFMTrainer, nnUNetTrainer))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [(p.name, p.default, p.kind) for p in stock.values()]


def test_stock_plan_trains_with_the_defaults(here: Workspace) -> None:
    plans = {**tiny.plans(), "continue_training": False}
    assert "mfm" not in plans
    trainer = MFMTrainer(plans, "3d_fullres", 0, make_trainer().dataset_json, CPU)
    stock = nnUNetTrainer({**tiny.plans(), "continue_training": False}, "3d_fullres", 0, trainer.dataset_json, CPU)
    for name in (
        "initial_lr",
        "weight_decay",
        "num_epochs",
        "num_iterations_per_epoch",
        "num_val_iterations_per_epoch",
    ):
        assert getattr(trainer, name) == getattr(stock, name)
    trainer.initialize()
    trainer.lr_scheduler.step(49)
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2
    trainer.lr_scheduler.step(0)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 50)


@pytest.mark.parametrize("configuration", ["primus", "two_stages"])
def test_networks_without_pyramid_train_without_deep_supervision(here: Workspace, configuration: str) -> None:
    configurations = tiny.plans()["configurations"]
    configurations["two_stages"] = tiny.configuration(resenc(features=(4, 8)))
    trainer = initialised(configuration, plan={"configurations": configurations})
    assert not trainer.enable_deep_supervision
    trainer.set_deep_supervision_enabled(True)
    log = Path(trainer.log_file).read_text()
    assert "deep supervision is off" in log
    x = torch.zeros(1, 1, 16, 16, 16)
    assert trainer.network(x).shape == (1, 3, 16, 16, 16)
    assert torch.isfinite(trainer.loss(trainer.network(x), torch.zeros(1, 1, 16, 16, 16)))


def test_gradients_are_clipped_as_the_settings_say(here: Workspace) -> None:
    norms = []
    for clip in (0.01, 100.0):
        trainer = initialised(gradient_clip=clip)
        take_step(trainer)
        gradients = [p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None]
        norms.append(float(torch.linalg.vector_norm(torch.cat(gradients))))
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.1


def test_scaled_losses_that_stay_nonfinite_end_the_training(here: Workspace) -> None:
    """As on GPUs, where nnU-Net's scaler skips such steps, for ever if need be."""
    trainer = initialised()
    trainer.optimisation.scaler = torch.amp.GradScaler("cpu")
    before = next(trainer.network.parameters()).detach().clone()
    batch = next(first_batches(trainer))
    good = batch["data"].clone()
    batch["data"][:] = float("nan")
    for _ in range(16):
        take_step(trainer, batch)
    with pytest.raises(FloatingPointError, match=r"gradient became non-finite .*Cases of the batch: subject-\d"):
        take_step(trainer, batch)
    assert torch.equal(before, next(trainer.network.parameters()))
    trainer.optimisation.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    take_step(trainer, {**batch, "data": good})
    assert not torch.equal(before, next(trainer.network.parameters()))


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_fp16_is_refused_where_losses_are_not_scaled(here: Workspace, device: str) -> None:
    refused("E_CONFIG", f"this is {device}", lambda: require_scaled_fp16("fp16", torch.device(device)))
    refused("E_CONFIG", "precision=bf16", lambda: train(here, overrides=("finetune.precision=fp16",)))
    assert not list(here.results.rglob("*"))
    trainer = make_trainer(block=MFMBlock(finetune=dataclasses.replace(tiny.FINETUNE, precision="fp16")))
    refused("E_CONFIG", "only for CUDA", trainer._start)  # by stock's command
    require_scaled_fp16("fp16", torch.device("cuda"))


# Transfer


def test_transfer_after_initialize_keeps_the_optimizers_tensors(here: Workspace, tmp_path: Path) -> None:
    trainer = initialised(file=pretrained_file(tmp_path))
    source = checkpoint.load_weights(trainer.pretrained_checkpoint)["network_weights"]
    state = trainer.network.state_dict()
    assert all(torch.equal(state[name], source[name]) for name in state if "seg_layers" not in name)
    assert {id(p) for p in trainer.optimizer.param_groups[0]["params"]} == {id(p) for p in trainer.network.parameters()}
    take_step(trainer)
    assert not torch.equal(next(trainer.network.parameters()), source["encoder.stem.convs.0.conv.weight"])
    log = Path(trainer.log_file).read_text()
    assert "100.0% of the encoder's parameters" in log
    assert "loaded   encoder.stem.convs.0.conv.weight" in log
    report = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())
    assert (report["checkpoint"], report["sha256"]) == ("some_pretrained.pth", sha256(trainer.pretrained_checkpoint))
    assert report["notes"] == []
    assert {entry["name"].rsplit(".", 1)[0] for entry in report["new"]} == {f"decoder.seg_layers.{i}" for i in (0, 1)}


def test_what_the_plan_has_otherwise_than_the_checkpoint_is_told(here: Workspace, tmp_path: Path) -> None:
    """Everything fits, and the network sees images that it was not trained on."""
    file = pretrained_file(tmp_path)
    content = checkpoint.load(file)
    plans = content["mfm"]["plans"]
    plans["transpose_forward"], plans["transpose_backward"] = [2, 0, 1], [1, 2, 0]
    intensities = dict.fromkeys(("mean", "std", "percentile_00_5", "percentile_99_5"), 1.0)
    plans["foreground_intensity_properties_per_channel"] = {"0": intensities}
    plans["configurations"]["pretrained"] |= {"spacing": [3.0, 1.0, 1.0], "normalization_schemes": ["CTNormalization"]}
    checkpoint.save(content, file)
    trainer = initialised(file=file)
    notes = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())["notes"]
    assert [note.split(":")[1].strip() for note in notes] == ["spacing in mm", "normalisation", "order of the axes"]
    assert "[3.0, 1.0, 1.0] in the checkpoint's" in notes[0]
    assert all(note in Path(trainer.log_file).read_text() for note in notes)


def test_weights_from_stocks_command_are_warned_of(here: Workspace, tmp_path: Path) -> None:
    for file in (None, pretrained_file(tmp_path)):
        trainer = initialised()
        if file is not None:
            load_pretrained_weights(trainer.network, str(file))
        trainer._start()
        assert ("weights into the network" in Path(trainer.log_file).read_text()) == (file is not None)


def test_primus_of_dna_trains(here: Workspace) -> None:
    """Its classes know nothing of deep supervision, which nnU-Net's trainer passes to all."""
    architecture = tiny.drop_path_primus()
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.primus.Primus"
    trainer = initialised(plan={"configurations": {"3d_fullres": tiny.configuration(architecture)}})
    loss = take_step(trainer)
    assert np.isfinite(loss)


def test_primus_positions_use_the_checkpoints_patch(here: Workspace, tmp_path: Path) -> None:
    file = pretrained_file(tmp_path, tiny.drop_path_primus((24, 8, 16)))
    content = checkpoint.load(file)
    content["mfm"]["plans"]["configurations"]["pretrained"]["patch_size"] = [24, 8, 16]
    checkpoint.save(content, file)
    trainer = initialised("primus", file=file)
    report = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())
    assert [entry["name"] for entry in report["adapted"]] == ["eva.pos_embed"]


# Batches


def same(a: Any, b: Any) -> bool:
    targets = zip(a["target"], b["target"]) if isinstance(a["target"], list) else [(a["target"], b["target"])]
    return torch.equal(a["data"], b["data"]) and all(torch.equal(x, y) for x, y in targets)


@pytest.fixture
def source(here: Workspace) -> SeededBatches:
    trainer = initialised()
    return SeededBatches(make_loaders(trainer)[0], 5, "training 0")


def test_batches_are_the_same_for_any_number_of_workers(source: SeededBatches) -> None:
    alone, together = (list(read_batches(source, 0, 6, num_workers)) for num_workers in (0, 2))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert not same(alone[0], alone[1])
    (late,) = read_batches(source, 4, 5, 1)
    assert same(late, alone[4])


def test_a_batch_is_nnunets_own_under_its_seed(source: SeededBatches) -> None:
    seed = seed_of(5, "training 0", 3)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    assert same(source.loader.generate_train_batch(), source[3])


def test_reading_leaves_the_global_generators_alone(source: SeededBatches) -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    threads = torch.get_num_threads()
    next(read_batches(source, 0, 1, 0))
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.get_num_threads() == threads


def test_seeds_and_streams_are_independent(source: SeededBatches) -> None:
    others = [SeededBatches(source.loader, 6, "training 0"), SeededBatches(source.loader, 5, "training 1")]
    assert not any(same(source[0], other[0]) for other in others)


def test_nothing_is_chosen_by_timing(source: SeededBatches) -> None:
    inner = [getattr(t, "transform", t) for t in source.loader.transforms.transforms]
    assert [t.benchmark for t in inner if hasattr(t, "benchmark")] == [False]


# Checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Workspace, Path]]:
    """A finished run from a pretrained checkpoint: (root, workspace, fold folder)."""
    root = tmp_path_factory.mktemp("trained")
    tiny.make(root)
    file = pretrained_file(root)
    with use(root) as workspace:
        folder = train(workspace, pretrained_weights=file, overrides=("finetune.epochs=2", "seed=11"))
    return root, workspace, folder


def test_checkpoint_loads_safely_and_names_nobody(trained: tuple[Path, Workspace, Path]) -> None:
    root, _, folder = trained
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        content = torch.load(folder / name, map_location="cpu", weights_only=True)
        texts = strings_in(content)
        assert not [text for text in texts if "subject" in text.lower() or str(root) in text or text.startswith("/")]
    assert content["mfm"]["kind"] == "finetuned"
    about = content["mfm"]["finetune"]["checkpoint"]
    assert (about["name"], about["pretext"]) == ("some_pretrained.pth", "mae")
    assert about["sha256"] == sha256(root / "some_pretrained.pth")


def test_the_block_travels_everywhere(trained: tuple[Path, Workspace, Path]) -> None:
    _, _, folder = trained
    stated = json.loads((folder / "settings.json").read_text())["settings"]
    assert stated["finetune"]["epochs"] == 2
    assert stated["seed"] == 11
    assert json.loads((folder.parent / "plans.json").read_text())["mfm"] == stated
    final = checkpoint.load(folder / "checkpoint_final.pth")
    assert final["init_args"]["plans"]["mfm"] == stated
    assert final["current_epoch"] == 2
    assert not (folder / "checkpoint_latest.pth").exists()


def test_stock_nnunet_reads_and_continues_the_checkpoint(trained: tuple[Path, Workspace, Path]) -> None:
    root, _, folder = trained
    with use(root):
        plans = json.loads((folder.parent / "plans.json").read_text())
        dataset_json = json.loads((folder.parent / "dataset.json").read_text())
        for load in (
            lambda trainer: maybe_load_checkpoint(trainer, True, False),
            lambda trainer: nnUNetTrainer.load_checkpoint(trainer, str(folder / "checkpoint_final.pth")),
        ):
            trainer = MFMTrainer({**plans, "continue_training": True}, "3d_fullres", 0, dataset_json, CPU)
            load(trainer)
            wanted = checkpoint.load(folder / "checkpoint_final.pth")
            assert trainer.current_epoch == 2
            state = trainer.network.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in wanted["network_weights"].items())
            momenta = trainer.optimizer.state_dict()["state"]
            assert all(
                torch.equal(momenta[i]["momentum_buffer"], entry["momentum_buffer"])
                for i, entry in wanted["optimizer_state"]["state"].items()
            )


def test_stock_pretrained_loading_accepts_our_file(trained: tuple[Path, Workspace, Path]) -> None:
    _, _, folder = trained
    kwargs = resenc()
    network = get_network_from_plans(
        kwargs["network_class_name"], kwargs["arch_kwargs"], kwargs["_kw_requires_import"], 1, 7, deep_supervision=False
    )
    load_pretrained_weights(network, str(folder / "checkpoint_final.pth"))
    wanted = checkpoint.load(folder / "checkpoint_final.pth")["network_weights"][STEM]
    assert torch.equal(network.state_dict()[STEM], wanted)


def test_validation_summary_equals_nnunets(trained: tuple[Path, Workspace, Path]) -> None:
    root, workspace, folder = trained
    ours = json.loads((folder / "validation" / "summary.json").read_text())
    compute_metrics_on_folder(
        str(workspace.preprocessed / tiny.NAME / "gt_segmentations"), str(folder / "validation"),
        str(root / "stock.json"), SimpleITKIO(), ".nii.gz", [1, 2], None, num_processes=1,
    )  # fmt: skip
    assert ours == json.loads((root / "stock.json").read_text())
    assert len(ours["metric_per_case"]) == 2


def test_a_label_that_nothing_has_is_named_and_leaves_the_mean_of_the_others(tmp_path: Path) -> None:
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[:2], labels[2:3] = 1, 2
    for name, voxels in (("truth", labels), ("mask", np.where(labels == 2, 0, labels))):
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / f"{name}.nii.gz"))
    pairs = [(tmp_path / "truth.nii.gz", tmp_path / "mask.nii.gz")]
    dataset_json = {"labels": {"background": 0, "liver": 1, "spleen": 2, "cyst": 3, "ignore": 4}}
    summary = validation.summarise(pairs, "SimpleITKIO", [1, 2, 3], 4)
    assert summary["mean"][3]["Dice"] != summary["mean"][3]["Dice"]
    assert [summary["mean"][label]["Dice"] for label in (1, 2)] == [1.0, 0.0]
    assert summary["foreground_mean"]["Dice"] == 0.5
    line = validation.format_dice(summary, dataset_json)
    assert line == "Mean Validation Dice: 0.5 (without cyst, which neither masks nor references have)"
    summary = validation.summarise(pairs, "SimpleITKIO", [1, 2], None)
    assert validation.format_dice(summary, dataset_json) == "Mean Validation Dice: 0.5"
    regions = {"labels": {"background": 0, "organs": [1, 2], "cysts": [3, 5]}}
    summary = validation.summarise(pairs, "SimpleITKIO", [(1, 2), (3, 5)], None)
    assert "without cysts" in validation.format_dice(summary, regions)
    summary = validation.summarise(pairs, "SimpleITKIO", [3], None)
    assert validation.format_dice(summary, dataset_json).startswith("Mean Validation Dice: nan (without cyst")


def test_validating_again_gives_the_same(trained: tuple[Path, Workspace, Path]) -> None:
    root, _, folder = trained
    before = (folder / "validation" / "summary.json").read_text()
    final = sha256(folder / "checkpoint_final.pth")
    (folder / "validation" / "summary.json").unlink()
    with use(root) as workspace:
        assert train(workspace, only_validate=True, save_probabilities=True) == folder
    assert (folder / "validation" / "summary.json").read_text() == before
    assert list((folder / "validation").glob("*.npz"))
    assert sha256(folder / "checkpoint_final.pth") == final


# What is refused


def test_several_gpus_are_no_other_device(here: Workspace) -> None:
    call = functools.partial(run_training, here, tiny.NAME, "3d_fullres", 0, num_gpus=2)
    for device in ("cpu", "cuda:1"):
        refused("E_CONFIG", f"not -device {device}", functools.partial(call, device=device))


def test_memory_that_runs_out_is_an_error_with_advice_that_can_be_followed(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MFMTrainer, "perform_actual_validation", exhausted)
    refused("E_OOM", "Validate it with --val", lambda: train(here, *SHORT))
    refused("E_OOM", "Validate it with --val", lambda: train(here, only_validate=True))
    monkeypatch.setattr(Engine, "step", exhausted)
    refused("E_OOM", "move the fold's folder away first", lambda: train(here, *SHORT, fold=1))


def test_a_cascade_needs_its_first_stage(here: Workspace) -> None:
    stages = {"3d_lowres": tiny.configuration(resenc()) | {"next_stage": "3d_cascade_fullres"}}
    stages["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans = tiny.plans("mfmCascade", **stages)
    (here.preprocessed / tiny.NAME / "mfmCascade.json").write_text(json.dumps(plans))
    cascade = lambda: train(here, configuration="3d_cascade_fullres", plans_name="mfmCascade")  # noqa: E731
    refused("E_NOT_FOUND", "all folds of 3d_lowres", cascade)


def test_a_run_is_never_overwritten_nor_continued_differently(here: Workspace, tmp_path: Path) -> None:
    folder = train(here, *SHORT)
    before = sha256(folder / "checkpoint_final.pth")
    other = lambda **options: train(here, continue_training=True, **options)  # noqa: E731
    file = pretrained_file(tmp_path)
    refused("E_CONFIG", "finetune.checkpoint", lambda: other(pretrained_weights=file))
    left_open = ("finetune.parts=auto", "finetune.warmup_epochs=none", "finetune.learning_rate=none")
    assert other(overrides=(*SHORT, *left_open)) == folder
    (folder / ".checkpoint_latest.pth.0123abcd.tmp").touch()  # as a kill in the middle of a save leaves it
    assert other(overrides=(*SHORT, "num_workers=1")) == folder
    assert not list(folder.glob(".*.tmp"))
    assert sha256(folder / "checkpoint_final.pth") == before


def test_a_signal_stops_after_the_step(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls, number = Engine.step, [], signal.SIGUSR1

    def take_step(self: Engine, batch: Any, at: int) -> float:
        calls.append(at)
        if at == 2:  # the first step of the second epoch
            os.kill(os.getpid(), number)
        return step(self, batch, at)

    monkeypatch.setattr(Engine, "step", take_step)
    before = signal.getsignal(number)
    with pytest.raises(StoppedError) as caught:
        train(here)
    assert caught.value.exit_code == 128 + number
    assert calls == [0, 1, 2]
    (latest,) = here.results.rglob("checkpoint_latest.pth")
    assert checkpoint.load(latest)["current_epoch"] == 1
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("epoch", "advice"), [(0, "Start it again."), (1, "Continue with --c.")])
def test_a_stopped_run_says_how_it_goes_on(here: Workspace, epoch: int, advice: str) -> None:
    trainer = make_trainer()
    trainer.current_epoch = epoch
    assert advice in FoldRun(trainer).save_early()


def test_a_signal_stops_the_validation_within_a_case(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the tile is finished; the mask under way does not appear, and the training is saved."""
    train(here, *SHORT)
    tiles = []

    def predicting(self: Model, tile: torch.Tensor, axes: object) -> torch.Tensor:
        tiles.append(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(100):  # handlers run between two instructions
            tiles.append(1)
        return tile

    monkeypatch.setattr(Model, "_mirrored", predicting)
    (folder,) = here.results.rglob("validation")
    shutil.rmtree(folder)
    with pytest.raises(StoppedError, match="final validation") as caught:
        train(here, *SHORT, only_validate=True)
    assert caught.value.exit_code == 128 + signal.SIGUSR1
    assert len(tiles) < 101
    assert not list(folder.iterdir())


def test_a_signal_stops_a_validation_by_nnunet_too(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of cascades, of stages before one and of several GPUs, which does not look at the flag."""
    finished = []

    def predicting(self: nnUNetTrainer, save_probabilities: bool = False) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):  # handlers run between two instructions
            finished.append(0)

    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", predicting)
    trainer = initialised()
    trainer.is_cascaded = True
    with stop_on_signal() as flag:
        with pytest.raises(StoppedError, match="final validation") as caught:
            trainer.perform_actual_validation()
        assert caught.value.exit_code == flag.exit_code == 128 + signal.SIGTERM
        assert len(finished) < 100
        finished.clear()
        with pytest.raises(StoppedError, match="Continue"):
            trainer.perform_actual_validation()
        assert not finished


@pytest.mark.parametrize("fold", ["all", 0])
def test_a_removed_case_is_in_no_dataset(here: Workspace, fold: int | str) -> None:
    """The trainer alone, as stock nnU-Net's command makes it: the list of the last planning counts, not the folder."""
    file = here.preprocessed / tiny.NAME / "dataset_fingerprint.json"
    names = [f"subject-{number:02d}" for number in range(5)]
    file.write_text(json.dumps({**json.loads(file.read_text()), "mfm": {"case_names": names}}))
    trainer = make_trainer()
    trainer.fold = fold
    training, held_out = trainer.get_tr_and_val_datasets()
    assert {*training.identifiers, *held_out.identifiers} == set(names)
    assert isinstance(training, nnUNetDatasetBlosc2)


def test_data_of_a_plan_that_were_never_preprocessed(here: Workspace) -> None:
    for file in (here.preprocessed / tiny.NAME / "mfm_tiny").iterdir():
        file.unlink()
    refused("E_NOT_FOUND", "mfm_plan_and_preprocess -d Dataset007_Tiny -c 3d_fullres", lambda: train(here))
