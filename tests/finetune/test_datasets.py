"""Cases as nnU-Net loads them, from files that are named when they are damaged and refused when they could run code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset, nnUNetDatasetBlosc2, nnUNetDatasetNumpy
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module

from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.loading import CheckedBlosc2, CheckedNumpy, check_next_stage, find_dataset_class
from tests.builders import crafted

SHAPE = (1, 20, 24, 30)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def dataset(tmp_path: Path) -> nnUNetBaseDataset:
    """A case of a cascade's second stage."""
    voxels = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for file in ("a.b2nd", "a_seg.b2nd", "before/a.b2nd"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        blosc2.asarray((voxels // 7).astype(np.int16 if file != "a.b2nd" else np.float32), urlpath=str(tmp_path / file))
    properties = {"spacing": [1.0, 1.0, 1.0], "class_locations": {1: voxels[0, :, :4, 0].astype(int)}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(properties))
    return CheckedBlosc2(str(tmp_path), ["a"], str(tmp_path / "before"))


def read(dataset: nnUNetBaseDataset) -> None:
    image, labels, before, _ = dataset.load_case("a")
    assert all(stored[:].shape == SHAPE for stored in (image, labels, before))


VOLUMES = ("a.b2nd", "a_seg.b2nd", "before/a.b2nd")


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_files_of_nnunets_older_layout(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    voxels = np.zeros(SHAPE, np.float32)
    nnUNetDatasetNumpy.save_case(voxels, voxels.astype(np.int8), {"class_locations": {}}, str(tmp_path / "a"))
    dataset = CheckedNumpy(str(tmp_path), ["a"])
    dataset.load_case("a")
    damage(tmp_path / "a.npz")
    named = r"E_SHORT_DATA  .*a\.npz: the preprocessed file cannot be read"
    with pytest.raises(MFMError, match=named):
        dataset.load_case("a")


def test_cases_are_those_that_stock_loads(tmp_path: Path) -> None:
    """In both layouts, with stock's own files."""
    rng = np.random.default_rng(0)
    image, labels = rng.normal(size=SHAPE).astype(np.float32), rng.integers(0, 3, SHAPE).astype(np.int16)
    properties = {"spacing": [1.0, 1.0, 1.0], "class_locations": {1: rng.integers(0, 20, (9, 4)), 2: []}}
    for stock, ours in ((nnUNetDatasetBlosc2, CheckedBlosc2), (nnUNetDatasetNumpy, CheckedNumpy)):
        folder, before = tmp_path / ours.__name__, tmp_path / f"{ours.__name__}_before"
        folder.mkdir()
        before.mkdir()
        sizes = {"chunks": SHAPE, "blocks": (1, 8, 8, 8)} if ours is CheckedBlosc2 else {}
        stock.save_case(image, labels, properties, str(folder / "a"), **sizes)
        ours.save_seg(labels[0], str(before / "a"))
        assert find_dataset_class("", stock) is ours
        one, other = (kind(str(folder), None, str(before)).load_case("a") for kind in (ours, stock))
        assert all(np.array_equal(mine[:], theirs[:]) for mine, theirs in zip(one[:3], other[:3]))
        assert repr(one[3]) == repr(other[3])
        box = [[-2, 9], [3, 22], [25, 40]]  # beyond the image on two sides
        assert np.array_equal(crop_and_pad_nd(one[0], box, 0), crop_and_pad_nd(other[0], box, 0))


@pytest.mark.parametrize("file", VOLUMES)
def test_volumes_that_could_run_code_are_refused(dataset: nnUNetBaseDataset, tmp_path: Path, file: str) -> None:
    crafted.volumes(tmp_path / "mark", tmp_path / "here")["a function"](tmp_path / file)
    with pytest.raises(MFMError) as caught:
        read(dataset)
    assert (caught.value.code, caught.value.message.partition(":")[0]) == ("E_DATA_UNSAFE", str(tmp_path / file))
    assert ("mfm_train --val" if "before" in file else "mfm_plan_and_preprocess") in caught.value.message
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file", ["a.npz", "a.npy", "a_seg.npy", "before/a.npz", "before/a.npy"])
def test_arrays_of_objects_are_refused(tmp_path: Path, file: str) -> None:
    voxels = np.zeros(SHAPE, np.float32)
    nnUNetDatasetNumpy.save_case(voxels, voxels.astype(np.int8), {"class_locations": {}}, str(tmp_path / "a"))
    (tmp_path / "before").mkdir()
    nnUNetDatasetNumpy.save_seg(voxels[0], str(tmp_path / "before" / "a"))
    dataset = CheckedNumpy(str(tmp_path), ["a"], str(tmp_path / "before"))
    dataset.load_case("a")
    (tmp_path / "made").mkdir()
    made = crafted.object_arrays(tmp_path / "mark", tmp_path / "made", "a", ("data", "seg"))
    made[file.endswith("npz")].replace(tmp_path / file)
    with pytest.raises(MFMError) as caught:
        dataset.load_case("a")
    assert (caught.value.code, caught.value.message.partition(":")[0]) == ("E_DATA_UNSAFE", str(tmp_path / file))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "places",
    [None, [], {1: None}, {1: 5}, {1: [[0, 1, 2, 3]]}, {1: np.zeros((3, 3), int)}, {1: np.zeros((3, 4))}, {1: "abcd"}],
)
def test_places_that_are_no_voxels_are_named(dataset: nnUNetBaseDataset, tmp_path: Path, places: object) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"class_locations": places}))
    with pytest.raises(MFMError, match=r"E_SHORT_DATA  .*a\.pkl: .*class_locations"):
        read(dataset)


def test_stocks_validation_infers_our_class(dataset: nnUNetBaseDataset, tmp_path: Path) -> None:
    """It looks the function up in its module, so it is found there while it validates, and only then."""
    validate = trainer_module.nnUNetTrainer.perform_actual_validation
    assert "infer_dataset_class" in validate.__code__.co_names
    assert validate.__globals__ is vars(trainer_module)
    before = trainer_module.infer_dataset_class
    with check_next_stage():
        assert trainer_module.infer_dataset_class(str(tmp_path)) is CheckedBlosc2
    assert trainer_module.infer_dataset_class is before
