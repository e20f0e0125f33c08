"""The loader that reads only what a crop needs, against nnU-Net's own on the same data and seeds."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mfm_nnunet.finetune.augmentation import Spatial, TightLoader
from mfm_nnunet.finetune.loading import make_deterministic, seeded

SHAPES = [(30, 44, 40), (12, 60, 33)]
"""The second volume is smaller than some of the patches."""
KINDS = {"3d": ((24, 20, 28), False), "flat": ((6, 28, 32), True), "2d": ((30, 26), False)}
"""Patch, and whether slices are augmented one by one (nnU-Net's dummy 2D)."""

NOT_SEEDED = (ApplyRandomBinaryOperatorTransform, RemoveRandomConnectedComponentFromOneHotEncodingTransform)
"""Of a cascade. They shuffle a list that they keep, so with stock's loader too a batch depends on those before it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases with two channels and 7 labels, -1 outside of the body."""
    place = tmp_path_factory.mktemp("cases")
    for number, shape in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        scores = scipy.ndimage.gaussian_filter(rng.normal(size=(8, *shape)), [0, 2, 2, 2])
        labels = (scores.argmax(0) - 1).astype(np.int8)[None]
        places = {label: np.argwhere(labels == label)[::3] for label in range(1, 7)}
        places[(-1, *range(7))] = np.argwhere(labels >= 0)[::5]
        image = scipy.ndimage.gaussian_filter(rng.normal(size=(2, *shape)), [0, 1, 1, 1]).astype(np.float32)
        nnUNetDatasetBlosc2.save_case(image, labels, {"class_locations": places}, str(place / f"case{number}"))
    return place


class Cascade(nnUNetDatasetBlosc2):
    """Cases with a mask of the previous stage."""

    def load_case(self, identifier: str) -> tuple[Any, ...]:
        image, labels, _, properties = super().load_case(identifier)
        return image, labels, np.maximum(labels[0], 0), properties


def make_pair(folder: Path, kind: str, only_spatial: bool = False, **options: Any) -> list[nnUNetDataLoader]:
    """Stock's loader and ours. Every second crop is rotated, and every second one scaled."""
    patch, is_flat = KINDS[kind]
    angle = np.pi if kind == "flat" else np.pi / 6
    initial = get_patch_size(patch, *[(-angle, angle)] * 3, (0.85, 1.25))
    if is_flat:
        initial[0] = patch[0]
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-angle, angle), [[1.0] * len(patch), [0.5] * len(patch)], tuple(range(len(patch))), is_flat,
        use_mask_for_norm=[True, False], foreground_labels=range(1, 7), **options,
    )  # fmt: skip
    make_deterministic(transforms)
    steps = transforms.transforms[: 3 if is_flat else 1] if only_spatial else transforms.transforms
    spatial = steps[1 if is_flat else 0]
    spatial.p_rotation = spatial.p_scaling = 0.5
    for step in steps:
        if isinstance(getattr(step, "transform", None), NOT_SEEDED):
            step.apply_probability = 0.0
    labels = types.SimpleNamespace(all_labels=list(range(7)), has_ignore_label=options.get("ignore_label") is not None)
    data = (Cascade if options.get("is_cascaded") else nnUNetDatasetBlosc2)(str(folder))
    return [
        make(data, 2, initial, patch, labels, 0.5, transforms=ComposeTransforms(list(steps)))
        for make in (nnUNetDataLoader, TightLoader)
    ]


def draw(loader: nnUNetDataLoader, seed: int) -> tuple[dict[str, Any], float]:
    """Return a batch, and the next random number."""
    with seeded(seed):
        return loader.generate_train_batch(), np.random.random()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"regions": [(1, 2, 3), (2, 3), 3], "ignore_label": 6}, {"ignore_label": 6}, {"is_cascaded": True}],
    ids=["labels", "regions", "ignore", "cascade"],
)
def test_batches_are_stocks(folder: Path, kind: str, options: dict[str, Any]) -> None:
    stock, ours = make_pair(folder, kind, **options)
    assert Spatial.of(ours.transforms) is not None
    for seed in range(12):
        (expected, after), (got, then) = draw(stock, seed), draw(ours, seed)
        assert after == then, "other random numbers were drawn"
        assert list(got["keys"]) == list(expected["keys"])
        assert got["data"].dtype == expected["data"].dtype
        difference = (got["data"] - expected["data"]).abs()
        assert difference[:, :2].max() < 0.01
        assert (difference[:, 2:] > 0).float().mean().nan_to_num() < 1e-4, "maps of the previous stage"
        for target, wanted in zip(got["target"], expected["target"], strict=True):
            assert (target.dtype, target.shape) == (wanted.dtype, wanted.shape)
            assert (target != wanted).float().mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_crops_that_are_not_rotated_are_equal_and_others_nearly(folder: Path, kind: str) -> None:
    """Later steps sum up the voxels in another order, so only the crops themselves can be equal bit for bit."""
    stock, ours = make_pair(folder, kind, only_spatial=True)
    num_equal = 0
    for seed in range(30):
        (expected, _), (got, _) = draw(stock, seed), draw(ours, seed)
        for image, wanted, target, labels in zip(got["data"], expected["data"], got["target"], expected["target"]):
            num_equal += torch.equal(image, wanted) and torch.equal(target, labels)
            assert (image - wanted).abs().max() < 0.005
            assert (target != labels).float().mean() < 1e-4
    assert 5 < num_equal < 30, "a quarter of the crops is not transformed"


def test_fewer_voxels_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 0]
    for number, loader in enumerate(make_pair(folder, "3d")):
        load = loader._data.load_case

        def counted(key: str, load: Any = load, number: int = number) -> tuple[Any, ...]:
            image, *rest = load(key)
            return Counted(image, counts, number), *rest

        monkeypatch.setattr(loader._data, "load_case", counted)
        for seed in range(20):
            draw(loader, seed)
        monkeypatch.undo()
    assert counts[1] < 0.75 * counts[0]


class Counted:
    """An array that counts the voxels that are read."""

    def __init__(self, array: Any, counts: list[int], number: int) -> None:
        self._array, self._counts, self._number = array, counts, number
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, key: Any) -> np.ndarray:
        found = self._array[key]
        self._counts[self._number] += found.size
        return found


def test_other_transforms_are_left_to_stock(folder: Path) -> None:
    """A spatial transform with elastic deformation, and none at all."""
    stock, ours = make_pair(folder, "3d")
    for loader in (stock, ours):
        loader.transforms.transforms[0].p_elastic_deform = 1.0
    assert Spatial.of(ours.transforms) is None
    (expected, _), (got, _) = draw(stock, 0), draw(ours, 0)
    assert torch.equal(got["data"], expected["data"])
    ours.transforms = None
    assert Spatial.of(None) is None
    assert draw(ours, 0)[0]["data"].shape == (2, 2, *ours.patch_size)
