"""The probe: it ranks good features above bad ones, and the run is the same with and without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.data.cases import Case
from mfm_nnunet.engine import probe as probing
from mfm_nnunet.engine.engine import Engine
from mfm_nnunet.engine.probe import (
    RETIRED,
    LabelledVolume,
    Probe,
    draw_voxels,
    features_at,
    fit_logistic,
    in_words,
    label_volume,
    linear_labeller,
    prepare,
)
from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.pretrain import check, launch
from mfm_nnunet.metrics import dice
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.reports.progress import plot_progress
from mfm_nnunet.requests import PretrainRequest
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny_run
from tests.builders.tiny_run import same, weights

NAME = "Dataset004_Few"
CPU = torch.device("cpu")


def add_labelled(here: Workspace, shared_data: Path, num_cases: int = 6, **changes: Any) -> None:
    """A dataset of hippocampus scans that stay where they are."""
    source = shared_data / "Dataset004_Hippocampus"
    content = json.loads((source / "dataset.json").read_text())
    cases = [file.name.removesuffix(".nii.gz") for file in sorted((source / "labelsTr").glob("*.nii.gz"))[:num_cases]]
    content["dataset"] = {
        case: {
            "images": [str(source / "imagesTr" / f"{case}_0000.nii.gz")],
            "label": str(source / "labelsTr" / f"{case}.nii.gz"),
        }
        for case in cases
    }
    (here.raw / NAME).mkdir(parents=True, exist_ok=True)
    (here.raw / NAME / "dataset.json").write_text(json.dumps({**content, **changes}))


@pytest.fixture
def here(tmp_path: Path, shared_data: Path) -> Workspace:
    """Volumes to pretrain on, and six labelled scans."""
    here = tiny_run.prepare(tmp_path)
    add_labelled(here, shared_data)
    return here


def request(*settings: str, **changes: Any) -> PretrainRequest:
    return tiny_run.request("mae", settings, **{"probe": 4, **changes})


def prepared(here: Workspace, *settings: str, **changes: Any) -> Probe:
    """A probe whose cases are preprocessed."""
    probe = check(here, request(*settings, **changes)).probe
    assert probe is not None
    prepare(probe)
    return probe


def random_network(probe: Probe, num_outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return build_network(dict(probe.plan.content), probe.configuration, 1, num_outputs)


def patch_size(probe: Probe) -> tuple[int, ...]:
    return probe.plan.configuration(probe.configuration).patch_size


def rows(final: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]


def timeless(final: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows(final)]


# A run with a probe


def test_the_run_is_the_same_with_and_without(here: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run.prepare(here.raw.parent, "primus")
    settings = ("pretrain.epochs=2", "probe.every=2", "probe.kind=linear", "probe.max_cases=2")
    probed = tiny_run.run(here, settings=settings, probe=4, run_name="probed")
    printed = capsys.readouterr().err
    plain = tiny_run.run(here, settings=settings[:1], run_name="plain")
    assert same(weights(probed), weights(plain))
    names = ["probe_dice", "probe_dice_Anterior", "probe_dice_Posterior", "probe_seconds"]
    assert [[name for name in row if name.startswith("probe")] for row in rows(probed)] == [[], names]
    row = rows(probed)[1]
    assert all(0 <= row[name] <= 1 for name in names[:3])
    assert row["probe_dice"] == pytest.approx((row[names[1]] + row[names[2]]) / 2)
    assert row["probe_seconds"] > 0
    assert [{k: v for k, v in row.items() if "probe" not in k} for row in timeless(probed)] == timeless(plain)
    assert printed.count("probe: Dice") == 1
    assert json.loads((probed.parent / "settings.json").read_text())["probe"]["dataset"] == NAME
    assert b"hippocampus_0" not in probed.read_bytes()


def test_a_run_that_was_killed_goes_on_with_its_probe(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("pretrain.epochs=2", "probe.every=1", "probe.max_cases=3")
    whole = tiny_run.run(here, settings=settings, probe=4, run_name="whole")
    step = Engine.step
    killed = iter(range(9))

    def dying(self: Engine, batch: dict[str, Tensor], number: int) -> float:
        if next(killed, None) is None:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(Engine, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        tiny_run.run(here, settings=settings, probe=4, run_name="broken")
    monkeypatch.setattr(Engine, "step", step)
    other = ("pretrain.epochs=2", "probe.every=1", "probe.max_cases=4")
    with pytest.raises(MFMError, match=r"probe\.max_cases was 3, is 4"):
        tiny_run.run(here, settings=other, probe=4, run_name="broken", continue_training=True)
    broken = tiny_run.run(here, settings=settings, probe=4, run_name="broken", continue_training=True)
    assert same(weights(whole), weights(broken))
    assert timeless(whole) == timeless(broken)
    assert all("probe_dice" in row for row in rows(whole))


def test_only_the_main_process_probes(here: Workspace) -> None:
    settings = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=2", "probe.max_cases=2")
    alone = tiny_run.run(here, settings=settings, probe=4)
    shared = launch(here, request(*settings, run_name="two", num_gpus=2))
    assert rows(shared)[0]["probe_dice"] == pytest.approx(rows(alone)[0]["probe_dice"], abs=0.02)


# What a probe measures


def test_trained_features_probe_higher_than_random_ones(here: Workspace) -> None:
    probe = prepared(here, "probe.max_cases=3")
    network, trained = random_network(probe), random_network(probe, 3)
    learn(trained, probe)
    trained_dice, random_dice = (measured(probe, net)["probe_dice"] or 0.0 for net in (trained, network))
    assert random_dice < 0.25
    assert trained_dice > random_dice + 0.1


def learn(network: nn.Module, probe: Probe) -> None:
    """Train on whole-patch crops of all labelled cases, also the held-out ones: the features then know the labels."""
    volumes = [probe._open(case, patch_size(probe)) for case in (*probe.fit, *probe.held_out)]
    patches = [
        (volume.patch(window), torch.from_numpy(volume.labels[window]).long())
        for volume in volumes
        for window in volume.windows()
        if (volume.labels[window] > 0).mean() > 0.1
    ]
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    rng = np.random.default_rng(0)
    for _ in range(120):
        x, y = (torch.stack(parts) for parts in zip(*(patches[i] for i in rng.choice(len(patches), 2))))
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y, ignore_index=-1).backward()
        optimizer.step()


def measured(probe: Probe, network: nn.Module) -> dict[str, float | None]:
    return probe.measure(make_backbone(network, patch_size(probe), "none"), CPU)


def test_runs_begun_when_probes_could_fine_tune_are_continued(here: Workspace) -> None:
    """They saved two more settings, without effect on a linear probe."""
    probe = check(here, request()).probe
    assert probe is not None
    saved = {"every": 10, "kind": "linear", "max_cases": 20, "steps": 200, "learning_rate": 1e-3}
    assert {name: value for name, value in probe.description().items() if name in saved} == saved
    assert set(RETIRED) == {"steps", "learning_rate"}


def test_a_probe_is_a_function_of_weights_and_seed_and_leaves_no_trace(here: Workspace) -> None:
    probe = prepared(here, "probe.max_cases=2")
    network = random_network(probe)
    backbone = make_backbone(network, patch_size(probe), "none").train()
    backbone.network.encoder.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in backbone.modules()]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = probe.measure(backbone, CPU)
    torch.rand(7)
    state = torch.get_rng_state()
    second = probe.measure(backbone, CPU)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())
    assert {**first, "probe_seconds": 0} == {**second, "probe_seconds": 0}
    other = replace(probe, seed=1).measure(backbone, CPU)
    assert other["probe_dice"] != first["probe_dice"]


def test_2d(here: Workspace) -> None:
    probe = prepared(here, "probe.max_cases=2", configuration="2d")
    values = measured(probe, random_network(probe))
    assert 0 <= (values["probe_dice"] or -1) <= 1


def labelled_boxes(shape: tuple[int, ...], seed: int, patch: tuple[int, ...], ignored: bool = False) -> LabelledVolume:
    """A volume whose image is made from its labels."""
    labels = np.kron(np.random.default_rng(seed).integers(0, 3, (4, 4, 4)), np.ones((8, 8, 8)))
    labels = labels[tuple(slice(size) for size in shape)].astype(np.int16)
    image = labels[None].astype(np.float32)
    if ignored:
        labels[:, : shape[1] // 2] = -1
        image[:, :, : shape[1] // 2] = 2 - image[:, :, : shape[1] // 2]
    return LabelledVolume(image, labels, patch)


class _Oracle:
    """Features that hold the label: one channel per class, and a coarse map of noise."""

    def __init__(self, patch: tuple[int, ...]) -> None:
        self.patch_size = patch

    def __call__(self, x_BCDHW: Tensor) -> list[Tensor]:
        fine = torch.cat([(x_BCDHW - k).abs() < 0.5 for k in range(3)], dim=1).float()
        shape = (len(x_BCDHW), 2, *(size // 4 for size in self.patch_size))
        return [fine, torch.randn(shape, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("patch", [(16, 16, 16), (32, 24, 8), (16, 16), (40, 8)])
@pytest.mark.parametrize("ignored", [False, True])
def test_features_that_contain_the_label_give_a_dice_of_one(patch: tuple[int, ...], ignored: bool) -> None:
    """Patches, places, standardisation and the way back all fit together, at every border."""
    shapes = [(30, 31, 13), (9, 32, 32), (5, 5, 5)]
    volumes = [labelled_boxes(shape, i, patch, ignored) for i, shape in enumerate(shapes)]
    label = linear_labeller(_Oracle(patch), volumes, 3, np.random.default_rng(0))
    for volume in volumes:
        with torch.no_grad():
            predicted = label_volume(label, volume)
        for value in (1, 2):
            score = dice(volume.labels, predicted, (value,), ignore=-1)
            assert score == 1 or np.isnan(score)
        is_inside = volume.labels >= 0
        assert (predicted[is_inside] == volume.labels[is_inside]).all()


def test_shapes_below_the_patch_are_padded_around_the_image() -> None:
    volume = labelled_boxes((5, 6, 20), 0, (8, 8, 8))
    assert volume.labels.shape == (8, 8, 20)
    assert (volume.labels[2:7, 1:7] >= 0).all()
    assert (volume.labels >= 0).sum() == 5 * 6 * 20
    (first, *_) = volume.windows()
    inside = volume.labels[first] >= 0
    assert (volume.patch(first)[0].numpy()[inside] == volume.labels[first][inside]).all()


def test_voxels_are_drawn_from_every_class_alike() -> None:
    volume = labelled_boxes((30, 31, 32), 0, (16, 16, 16), ignored=True)
    volume.labels[volume.labels == 2] = 0
    volume.labels[20:23, 20:23, 20:23] = 2
    drawn = draw_voxels(volume, 3, 12, np.random.default_rng(0))
    labels = np.concatenate([labels for _, _, labels in drawn])
    assert set(labels) == {0, 1, 2}
    assert all(12 <= (labels == k).sum() <= 24 for k in range(3))
    for window, places, values in drawn:
        assert (volume.labels[window][tuple(places.T)] == values).all()


@pytest.mark.parametrize("patch", [(16, 8, 24), (24, 16)])
def test_features_of_a_voxel_are_those_of_the_enlarged_map(patch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    maps = [torch.randn(1, 3, *(size // factor for size in patch)) for factor in (1, 2, 8)]
    mode = "trilinear" if len(patch) == 3 else "bilinear"
    dense = torch.cat([functional.interpolate(m, size=patch, mode=mode, align_corners=False) for m in maps], dim=1)[0]
    places = torch.stack([torch.randint(size, (50,)) for size in patch], dim=1)
    torch.testing.assert_close(features_at(maps, places, patch), dense[(slice(None), *places.T)].T, atol=1e-5, rtol=0)


def test_rare_classes_weigh_what_they_are_told() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 1])
    _, bias = fit_logistic(x, y, torch.tensor([1.0, 1.0]))
    assert abs(float(bias[0] - bias[1])) < 1e-6
    _, bias = fit_logistic(x, y, torch.tensor([3.0, 1.0]))
    assert float(bias[0] - bias[1]) == pytest.approx(np.log(3), abs=0.02)


def test_a_label_that_is_nowhere_has_no_dice() -> None:
    row = {"probe_dice": 0.5, "probe_dice_a": 0.5, "probe_dice_b": None, "probe_seconds": 1.0}
    assert in_words(row) == "probe: Dice 0.500 (a 0.500, b none)  1.0 s"


def test_the_picture_has_the_probe(tmp_path: Path) -> None:
    rows = [
        {"epoch": i, "train_loss": 1.0, "validation_loss": 1.0, "learning_rate": 1.0, "seconds": 1} for i in range(3)
    ]
    probed = {"probe_dice": 0.5, "probe_dice_a": 0.5, "probe_dice_b": None, "probe_seconds": 1.0}
    nothing = {"probe_dice": None, "probe_dice_a": None, "probe_dice_b": None, "probe_seconds": 1.0}
    pictures = []
    for extra in ({}, nothing, probed):
        plot_progress([rows[0], {**rows[1], **extra}, rows[2]], tmp_path / "picture", "title")
        pictures.append((tmp_path / "picture").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


# Which cases


def test_split_by_subject(here: Workspace, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case(f"{subject}{scan}", (), Path("label"), subject) for subject in "abcdefg" for scan in range(2)]
    monkeypatch.setattr(probing.corpus, "load_cases", lambda folder: cases)

    def split(*settings: str) -> list[tuple[Case, ...]]:
        probe = check(here, request(*settings)).probe
        assert probe is not None
        return [probe.fit, probe.held_out]

    first = split("probe.max_cases=12")
    fit, held_out = ({case.subject for case in part} for part in first)
    assert (len(fit), len(held_out), fit & held_out) == (4, 2, set())
    assert first == split("probe.max_cases=12")
    assert first[1] != split("probe.max_cases=12", "seed=1")[1]
    cases[2:] = []
    cases[1] = replace(cases[1], subject="b")
    assert [len(part) for part in split()] == [1, 1]


def test_preprocessed_cases_are_reused(here: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mfm_nnunet")
    prepared(here, "probe.max_cases=4")
    assert "3 cases to fit, 1 to measure; 4 preprocessed, 0 reused" in caplog.text
    prepared(here, "probe.max_cases=3", "seed=2")
    probe = prepared(here, "probe.max_cases=4")
    assert "0 preprocessed, 4 reused" in caplog.messages[-1].replace("0 preprocessed, 5", "0 preprocessed, 4")
    assert "has no more" not in caplog.text
    assert not any(record.levelname == "WARNING" for record in caplog.records)
    assert probe.folder == here.preprocessed / NAME / "mfm_tiny"


def test_data_of_another_plan_are_not_replaced(here: Workspace) -> None:
    probe = prepared(here, "probe.max_cases=2")
    before = sorted((file.name, file.stat().st_mtime_ns) for file in probe.folder.iterdir())
    with pytest.raises(MFMError, match=r"E_EXISTS.*preprocessed with other settings"):
        prepared(here, configuration="2d")
    assert before == sorted((file.name, file.stat().st_mtime_ns) for file in probe.folder.iterdir())


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": "Dataset004_Fwe"}, "E_NOT_FOUND.*Did you mean 'Dataset004_Few'"),
        ({"probe": tiny_run.NAME}, "E_NOT_FOUND.*dataset.json"),
        ({"settings": ("probe.steps=9",)}, r"E_CONFIG.*probe\.steps.*mfm_train"),
        ({"settings": ("probe.kind=finetune",)}, "E_CONFIG.*mfm_train.*mfm_study"),
        ({"settings": ("probe.every=3",), "probe": None}, r"E_CONFIG.*probe\.every is set.*--probe DATASET"),
    ],
)
def test_wrong_arguments_are_one_clear_error(here: Workspace, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MFMError, match=message):
        tiny_run.run(here, **{"probe": 4, **changes})
    assert not here.results.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0}}, "E_CONFIG.*has no labels"),
        ({"channel_names": {"0": "T1", "1": "T2"}}, "E_CHANNELS.*has 2 channels.*takes 1"),
        ({"num_cases": 1}, "E_CONFIG.*labels of 1 subject"),
        ({"labels": {"background": 0, "Anterior": 1}}, r"(?s)E_LABEL_VALUE.*6 of 6 labelled cases.*hippocampus_0"),
    ],
)
def test_wrong_datasets_are_one_clear_error(
    here: Workspace, shared_data: Path, changes: dict[str, Any], message: str
) -> None:
    add_labelled(here, shared_data, **changes)
    with pytest.raises(MFMError, match=message):
        tiny_run.run(here, probe=4)
    assert not here.results.exists()
