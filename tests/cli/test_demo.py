"""The demo: data, comparison, page, refusals, and (long) all steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.cli import demo as command
from mfm_nnunet.data.corpus import load_cases
from mfm_nnunet.data.sources import index_source
from mfm_nnunet.demo import data, run
from mfm_nnunet.demo.run import PRETEXT, SCRATCH, DemoResult, compare_starts, format_result
from mfm_nnunet.metrics import dice, mean_dice
from mfm_nnunet.reports.html import render

TEMPLATE_SHAPE = (197, 233, 189)
AFFINE = np.array([[1, 0, 0, -98], [0, 1, 0, -134], [0, 0, 1, -72], [0, 0, 0, 1]], float)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> data.Split:
    """The demo's own data."""
    pytest.importorskip("nilearn", reason="the extra 'demo' is not installed")
    return data.split_template(tmp_path_factory.mktemp("scans"))


def test_blocks_share_no_voxel_and_mirror_each_other() -> None:
    counts, sides = np.zeros(TEMPLATE_SHAPE, int), {}
    for hemisphere, place, where in data.template_blocks(AFFINE):
        assert counts[where].shape == data.BLOCK
        counts[where] += 1
        x_mm = AFFINE[0, 0] * np.arange(where[0].start, where[0].stop) + AFFINE[0, 3]
        assert (x_mm < 0).all() if hemisphere == "left" else (x_mm > 0).all()
        sides[hemisphere, place] = set(x_mm)
    assert counts.max() == 1
    for _, place in sides:
        assert sides["left", place] == {-x for x in sides["right", place]}


def test_no_tested_voxel_was_trained_on_not_even_mirrored(template: data.Split) -> None:
    """The template is left-right symmetric to the bit, so another hemisphere alone would be the same data."""
    trained, tested = world_voxels(template.train), world_voxels(template.test)
    assert (trained[:, 0] < 0).all()
    assert (tested[:, 0] > 0).all()
    mirrored = trained * [-1, 1, 1]
    everything = np.concatenate([trained, mirrored, tested])
    assert len(tested)
    assert len(np.unique(everything, axis=0)) == len(everything)


def world_voxels(cases: list[Any]) -> np.ndarray:
    """The world coordinates (mm, right positive) of all voxels of the cases, (N, 3)."""
    images = [nibabel.load(case.images[0]) for case in cases]
    indices = [np.indices(image.shape).reshape(3, -1).T for image in images]
    places = [nibabel.affines.apply_affine(image.affine, index) for image, index in zip(images, indices)]
    return np.rint(np.concatenate(places)).astype(np.int16)


def test_template_cases_are_real_and_complete(template: data.Split) -> None:
    assert len(template.train) >= run.SEEDS * data.NUM_LABELS
    assert len(template.test) >= 4
    folds = template.folds(run.SEEDS)
    used = [name for fold in folds for name in fold["train"]]
    assert len(used) == len(set(used)) == run.SEEDS * data.NUM_LABELS, "each seed has labels of its own"
    for case in [*template.train, *template.test]:
        label = np.asarray(nibabel.load(case.label).dataobj)
        assert set(np.unique(label)) == {0, 1, 2}
        assert (label > 0).mean() >= data.MIN_TISSUE
        assert np.asarray(nibabel.load(case.images[0]).dataobj).std() > 10
    assert not template.is_2d


def test_tissue_labels() -> None:
    grey = np.array([0, 100, 63, 200, 100, 0], np.uint8)
    white = np.array([0, 100, 64, 55, 155, 255], np.uint8)
    assert data.tissue_labels(grey, white).tolist() == [0, 1, 0, 1, 2, 2]


def make_dataset(folder: Path, num_cases: int, is_2d: bool = False) -> Path:
    """A labelled dataset in nnU-Net's raw format: a bright block in noise."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    ending, shape = (".png", (64, 80)) if is_2d else (".nii.gz", (20, 24, 28))
    for number in range(num_cases):
        rng = np.random.default_rng(number)
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(4 + number, 14 + number) for _ in shape)] = 1
        image = (rng.integers(0, 60, shape) + 120 * label).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / "imagesTr" / f"case{number}_0000{ending}"))
        sitk.WriteImage(sitk.GetImageFromArray(label), str(folder / "labelsTr" / f"case{number}{ending}"))
    content = {"channel_names": {"0": "X"}, "labels": {"background": 0, "block": 1}, "numTraining": num_cases}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ending}))
    return folder


@pytest.mark.parametrize(("num_cases", "tested"), [(3, ["case2"]), (5, ["case4"]), (10, ["case4", "case9"])])
def test_folder_is_split_by_case(tmp_path: Path, num_cases: int, tested: list[str]) -> None:
    split = data.split_folder(make_dataset(tmp_path / "Dataset001_X", num_cases))
    assert [case.name for case in split.test] == tested
    assert len(split.train) == num_cases - len(tested)
    assert not {case.name for case in split.train} & set(tested)
    for fold in split.folds(3):
        assert fold["val"] == tested
        assert len(fold["train"]) == len(set(fold["train"])) == min(data.NUM_LABELS, num_cases - len(tested))
        assert not set(fold["train"]) & set(tested)


def test_large_datasets_test_few_cases_and_labels_are_spread(tmp_path: Path) -> None:
    split = data.split_folder(make_dataset(tmp_path / "Dataset001_X", 60, is_2d=True))
    assert len(split.test) == data.MOST_TEST
    assert len(split.train) == 52
    names = [case.name for case in split.train]
    for fold in split.folds(3):
        places = [names.index(name) for name in fold["train"]]
        assert places == sorted(places)
        assert places[-1] - places[0] > 40


@pytest.mark.parametrize("is_2d", [False, True])
def test_what_is_written_can_be_read_as_corpus_and_dataset(tmp_path: Path, is_2d: bool) -> None:
    split = data.split_folder(make_dataset(tmp_path / "Dataset001_X", 6, is_2d))
    assert split.is_2d == is_2d
    data.write_corpus(split, tmp_path / "corpus.csv")
    data.write_dataset(split, tmp_path / "Dataset902_Y")
    data.write_test_folder(split, tmp_path / "test")
    assert [case.images for case in index_source(tmp_path / "corpus.csv")] == [case.images for case in split.train]
    written = {case.name: (case.images, case.label) for case in load_cases(tmp_path / "Dataset902_Y")}
    assert written == {case.name: (case.images, case.label) for case in (*split.train, *split.test)}
    ending = ".png" if is_2d else ".nii.gz"
    assert [file.name for file in (tmp_path / "test").iterdir()] == [f"case4_0000{ending}"]


def make_result(pretrained: list[list[float]], scratch: list[list[float]], ends: list[list[float]]) -> DemoResult:
    """A result with Dice by epoch and seed of both starts, and their Dice at the end by seed."""
    curves = {PRETEXT: pretrained, SCRATCH: scratch}
    return DemoResult(curves, dict(zip(curves, ends)), {"train scratch": 4}, steps_per_epoch=5, num_labels=8)


SLOW = [[0.1, 0.3, 0.6, 0.7], [0.2, 0.4, 0.6, 0.8], [0.1, 0.3, 0.7, 0.8]]
FAST = [[0.4, 0.5, 0.8, 0.7], [0.5, 0.5, 0.8, 0.8], [0.3, 0.6, 0.7, 0.8]]


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        (
            (FAST, SLOW),
            ["after 5 to 10 steps", "worst training after MAE", "At all other steps", "this takes 15 steps"],
        ),
        ((SLOW, FAST), ["after 5 to 10 steps", "worst training from scratch", "this takes 20 steps"]),
        ((SLOW, SLOW), ["At no step", "noise", "this takes 20 steps"]),
        (([[0.1, 0.2]] * 3, [[0.3, 0.4]] * 3), ["after 5 to 10 steps", "it is not reached"]),
        (([[float("nan")]] * 3, [[0.4]] * 3), ["At no step", "it is not reached"]),
    ],
)
def test_what_is_above_the_spread_is_said_and_the_rest_is_noise(
    curves: tuple[list[list[float]], list[list[float]]], words: list[str]
) -> None:
    texts = " ".join(compare_starts(make_result(*curves, [[0.8, 0.9, 0.7], [0.75, 0.7, 0.85]])))
    assert all(word in texts for word in words), texts
    assert "+0.033 Dice: within the spread" in texts
    apart = compare_starts(make_result(*curves, [[0.8, 0.9, 0.9], [0.7, 0.6, 0.7]]))
    assert any("+0.200 Dice: above the spread" in text for text in apart)


def test_steps_apart_from_each_other_are_listed() -> None:
    assert run._in_ranges([1, 2, 3, 5, 8, 9], 5) == "5 to 15, 25, 40 to 45"


@pytest.mark.parametrize("is_2d", [False, True])
def test_the_page_shows_curve_numbers_and_masks(tmp_path: Path, is_2d: bool) -> None:
    split = data.split_folder(make_dataset(tmp_path / "Dataset001_X", 5, is_2d))
    result = make_result(FAST, SLOW, [[0.8, 0.9, 0.7], [0.75, 0.7, 0.85]])
    result.masks = [Path(case.label or "") for case in split.test]
    page = render(run.make_demo_report(result, split))
    assert page.count("<img ") == (2 if is_2d else 6)
    assert "case4" in page
    assert page.count("<svg") == 1
    drawing = page[page.index("<svg") : page.index("</svg>")]
    assert drawing.count("FillBetweenPolyCollection") == 2, "a band for each start"
    assert all(text in drawing for text in ("after MAE", "from scratch", ">steps<"))
    assert "worst training after MAE" in page
    row = '<th scope="row">after MAE</th><td>0.40 (0.30 to 0.50)</td><td>0.53 (0.50 to 0.60)</td>'
    assert row in page
    table = format_result(result)
    row = next(line for line in table.splitlines() if line.startswith("from scratch"))
    assert row.split("  ")[-1].strip() == "0.77 (0.70 to 0.85)"


def test_what_a_training_left_is_read(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "log.jsonl").write_text('{"epoch": 0, "dice_mean": null}\n{"epoch": 1, "dice_mean": 0.5}\n')
    (tmp_path / "validation" / "summary.json").write_text('{"foreground_mean": {"Dice": 0.75}}')
    result = DemoResult()
    run.read_training(result, SCRATCH, tmp_path)
    np.testing.assert_array_equal(result.curves[SCRATCH], [[np.nan, 0.5]])
    assert result.scores == {SCRATCH: [0.75]}


def test_dice() -> None:
    reference, predicted = np.array([0, 1, 1, 2, 9]), np.array([0, 1, 2, 2, 1])
    assert dice(reference, predicted, (1,)) == 2 / 4
    assert dice(reference, predicted, (1,), ignore=9) == 2 / 3
    assert dice(reference, predicted, (1, 2), ignore=9) == 1
    assert dice(reference, predicted, (5,)) != dice(reference, predicted, (5,))  # NaN: in neither
    assert dice(reference, predicted, (9,)) == 0
    assert mean_dice([0.5, float("nan"), 1.0]) == 0.75


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for extra in ([], ["--overwrite"]):
        assert command.main(["--workspace", str(tmp_path), *extra]) == 2
        assert "E_EXISTS" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_overwrite_removes_only_what_the_demo_made(tmp_path: Path) -> None:
    folder = tmp_path / "ws"
    run.prepare_folder(folder, overwrite=False)
    kept = ["nnUNet_raw/Dataset004_Mine/dataset.json", "notes.txt", "nnUNet_results/Dataset004_Mine/model.pth"]
    gone = ["nnUNet_raw/Dataset902_DemoLabelled/dataset.json", "predictions/a.nii.gz", "corpus.csv"]
    for name in [*kept, *gone]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    run.prepare_folder(folder, overwrite=True)
    assert all((folder / name).is_file() for name in kept)
    assert not any((folder / name).exists() for name in gone)


def test_nothing_is_written_after_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--workspace", str(tmp_path / "ws")]
    small = make_dataset(tmp_path / "Dataset001_X", 2)
    for more, hint in (
        (["--data", str(tmp_path / "none")], "dataset.json"),
        (["--data", str(small)], "at least three"),
        (["--set", "finetune.epoch=3"], "'finetune.epochs'?"),
    ):
        assert command.main([*line, *more]) == 2
        assert hint in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.main(line) == 2
    assert "mfm_nnunet[demo]" in capsys.readouterr().err
    assert not (tmp_path / "ws").exists()


SHORT = [
    *("pretrain.epochs=1", "pretrain.iterations_per_epoch=2", "pretrain.validation_iterations=1"),
    *("finetune.epochs=2", "finetune.iterations_per_epoch=1", "finetune.validation_iterations=1", "num_workers=0"),
]


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["template", "2d"])
def test_the_whole_way(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ws"
    line = ["--workspace", str(folder), "-device", "cpu", "--set", *SHORT]
    if kind != "template":
        line += ["--data", str(make_dataset(tmp_path / "Dataset001_X", 5, is_2d=kind == "2d"))]
    assert command.main(line) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    cases = sorted(file.name.partition("_0000")[0] for file in (folder / "test_images").iterdir())
    assert cases
    masks = sorted((folder / "predictions").glob("*.png" if kind == "2d" else "*.nii.gz"))
    assert [mask.name.partition(".")[0] for mask in masks] == cases
    assert all(f"  {mask}" in printed.splitlines() for mask in masks)
    assert f"in a browser: {folder / 'report.html'}" in printed
    page = (folder / "report.html").read_text()
    record = json.loads((folder / run.RECORD).read_text())
    for start, title in run.STARTS.items():
        assert title in printed
        assert title in page
        assert [len(curve) for curve in record["curves"][start]] == [2] * run.SEEDS
        assert len(record["scores"][start]) == run.SEEDS
    assert command.main(line) == 2
    assert "--overwrite" in capsys.readouterr().err
