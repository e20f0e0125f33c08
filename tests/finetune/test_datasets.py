"""A preprocessed file that is damaged in its middle is named when its voxels are read, in training and validation."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.datasets import NamingDataset
from tests.damage import overwrite_middle

SHAPE = (1, 20, 24, 30)


def overwrite_start(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:2] + bytes(30) + content[32:])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture
def dataset(tmp_path: Path) -> NamingDataset:
    """A case of a cascade's second stage."""
    voxels = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    for file in ("a.b2nd", "a_seg.b2nd", "before/a.b2nd"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        blosc2.asarray((voxels // 7).astype(np.int16 if file != "a.b2nd" else np.float32), urlpath=str(tmp_path / file))
    properties = {"spacing": [1.0, 1.0, 1.0], "class_locations": {1: voxels[0, :, :2].astype(int)}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(properties))
    return NamingDataset(nnUNetDatasetBlosc2(str(tmp_path), ["a"], str(tmp_path / "before")))


def read(dataset: NamingDataset) -> None:
    with dataset.reading():
        image, labels, before, _ = dataset.load_case("a")
        assert all(stored[:].shape == SHAPE for stored in (image, labels, before))


VOLUMES = ("a.b2nd", "a_seg.b2nd", "before/a.b2nd")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, damage) for file in VOLUMES for damage in (overwrite_middle, cut, Path.unlink)),
        # What lies in the middle of a pickle are the bytes of arrays, of which any are legal.
        *(("a.pkl", damage) for damage in (overwrite_start, cut, Path.unlink)),
    ],
)
def test_the_damaged_file_is_named(dataset: NamingDataset, file: str, damage: Callable[[Path], None]) -> None:
    read(dataset)
    path = Path(dataset.dataset.source_folder) / file
    damage(path)
    with pytest.raises(MFMError, match="the preprocessed file cannot be read") as caught:
        read(dataset)
    assert (caught.value.code, caught.value.message.partition(":")[0]) == ("E_SHORT_DATA", str(path))
    assert ("mfm_train --val" if path.parent.name == "before" else "mfm_plan_and_preprocess") in caught.value.message


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_files_of_nnunets_older_layout(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    voxels = np.zeros(SHAPE, np.float32)
    nnUNetDatasetNumpy.save_case(voxels, voxels.astype(np.int8), {}, str(tmp_path / "a"))
    dataset = NamingDataset(nnUNetDatasetNumpy(str(tmp_path), ["a"]))
    dataset.load_case("a")
    damage(tmp_path / "a.npz")
    named = r"E_SHORT_DATA  .*a\.npz: the preprocessed file cannot be read"
    with pytest.raises(MFMError, match=named), dataset.reading():
        dataset.load_case("a")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), MemoryError(), MFMError("E_OOM", "too large.")])
def test_errors_that_no_file_explains_stay_as_they_are(dataset: NamingDataset, error: Exception) -> None:
    with pytest.raises(type(error)) as before_any_case, dataset.reading():
        raise error
    dataset.load_case("a")
    with pytest.raises(type(error)) as caught, dataset.reading():
        raise error
    assert caught.value is error is before_any_case.value
