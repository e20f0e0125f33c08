"""Crops for pretraining and for supervised training: ours against nnU-Net's way, in CPU seconds of one core.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.augmentation [--rounds 5] [--patches 96 128] [--labels 4 40]

Both sides make as many items, of which 36 % are rotated or scaled as in training, in turn (A B A B ...) after one round
that does not count. Reading from blosc2 files counts; the volumes are synthetic. Results are compared: pretraining
crops with scipy on the same draws, supervised crops with those of nnU-Net's loader on the same seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from mfm_nnunet.data import crops
from mfm_nnunet.data.crops import CropRequest, CropStream, StreamSettings
from mfm_nnunet.data.volumes import open_volume
from mfm_nnunet.data.warp import Order
from mfm_nnunet.finetune.augmentation import Spatial, TightLoader
from mfm_nnunet.finetune.loading import make_deterministic, seeded
from tests.builders.volumes import Keep

SHAPE = (220, 230, 240)
ITEMS, TRANSFORMED = 11, 4
"""4 of 11 is 36 %, the share of nnU-Net's probabilities."""
Work = Callable[[int], Any]


def write_volumes(folder: Path, patch: tuple[int, ...], num_labels: int) -> None:
    """Two volumes of smooth tissue with noise; labels are blobs of equal size in every crop."""
    for number in range(2):
        rng = np.random.default_rng(number)
        image = scipy.ndimage.zoom(rng.normal(size=[n // 8 for n in SHAPE]), [n / (n // 8) for n in SHAPE], order=1)
        image = (image + 0.2 * rng.normal(size=SHAPE)).astype(np.float32)[None]
        places = rng.integers(1, num_labels, [n // 16 for n in SHAPE])
        blobs = np.kron(places, np.ones((16, 16, 16), np.int8))
        inside = scipy.ndimage.gaussian_filter(rng.normal(size=blobs.shape).astype(np.float32), 8) > 0
        labels = np.zeros((1, *SHAPE), np.int8)
        labels[0][tuple(slice(length) for length in blobs.shape)] = blobs * inside
        sizes = [comp_blosc2_params(array.shape, patch, array.itemsize) for array in (image, labels)]
        found = {label: np.argwhere(labels == label)[::500] for label in range(1, num_labels)}
        nnUNetDatasetBlosc2.save_case(
            image, labels, {"class_locations": found}, str(folder / f"case{number}"),
            chunks=sizes[0][1], blocks=sizes[0][0], chunks_seg=sizes[1][1], blocks_seg=sizes[1][0],
        )  # fmt: skip


def choose(is_transformed: Callable[[int], bool]) -> list[int]:
    """Return the first seeds with the share of transformed items."""
    kinds = [is_transformed(seed) for seed in range(60)]
    moved, still = np.flatnonzero(kinds)[:TRANSFORMED], np.flatnonzero(~np.array(kinds))[: ITEMS - TRANSFORMED]
    return sorted([*moved.tolist(), *still.tolist()])


@contextlib.contextmanager
def noting(owner: Any, name: str) -> Iterator[list[Any]]:
    """Note arguments and results of a function."""
    calls: list[Any] = []
    original = getattr(owner, name)

    def noted(*arguments: Any) -> Any:
        calls.append((arguments, original(*arguments)))
        return calls[-1][1]

    setattr(owner, name, noted)
    yield calls
    setattr(owner, name, original)


def measure(ours: tuple[Work, list[int]], stock: tuple[Work, list[int]], rounds: int) -> str:
    """Time both sides in turn; return milliseconds per item and the ratio with its range."""
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for (work, seeds), times in zip((ours, stock), seconds):
            start = time.process_time()
            for seed in seeds:
                work(seed)
            times.append((time.process_time() - start) / len(seeds))
    ratios = sorted(b / a for a, b in zip(*(times[1:] for times in seconds)))
    mine, theirs = (1e3 * statistics.median(times[1:]) for times in seconds)
    return f"{mine:.1f} | {theirs:.1f} | {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"


def pretraining(folder: Path, size: int, rounds: int) -> Iterator[str]:
    """Items of one crop, against an enlarged crop, SpatialTransform and MirrorTransform."""
    patch, angle = (size,) * 3, np.pi / 6
    enlarged = get_patch_size(patch, *[(-angle, angle)] * 3, (0.85, 1.25))
    spatial = SpatialTransform(
        patch, 0, False, p_rotation=0.2, rotation=(-angle, angle), p_scaling=0.2, scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1,
    )  # fmt: skip
    transforms, dataset = ComposeTransforms([spatial, MirrorTransform((0, 1, 2))]), nnUNetDatasetBlosc2(str(folder))

    def stock(seed: int) -> torch.Tensor:
        with seeded(seed):
            volume = dataset.load_case(f"case{seed % 2}")[0]
            margins = enlarged - patch
            lower = [np.random.randint(-(m // 2), n + m // 2 - e) for m, n, e in zip(margins, SHAPE, enlarged)]
            crop = crop_and_pad_nd(volume, [[low, low + e] for low, e in zip(lower, enlarged)], 0)
            return transforms(image=torch.from_numpy(crop).float())["image"]

    def is_transformed(seed: int) -> bool:
        with seeded(seed):
            np.random.randint(9, size=3)
            return bool((np.random.uniform(size=2) < 0.2).any())

    files = [folder / f"case{number}.b2nd" for number in range(2)]
    keep, settings = Keep((CropRequest(patch),)), StreamSettings(augmentation="spatial")
    orders: tuple[tuple[str, Order], ...] = (("linear", 1), ("cubic", 3))
    for name, order in orders:
        stream = CropStream(files, keep, replace(settings, order=order))
        with noting(crops, "draw_spatial") as draws:

            def is_moved(seed: int, stream: CropStream = stream, draws: list[Any] = draws) -> bool:
                return bool(stream[seed]) and draws[-1][1].matrix is not None

            seeds = choose(is_moved)
        with noting(crops, "apply_spatial") as calls:
            for seed in seeds:
                stream[seed]
        worst = max(distance_from_scipy(given, got, order) for given, got in calls if given[1].matrix is not None)
        result = measure((stream.__getitem__, seeds), (stock, choose(is_transformed)), rounds)
        yield f"| pretraining item, {size} cubed, {name} | {result} | {worst:.1e} of the standard deviation (scipy) |"


def distance_from_scipy(arguments: Any, got: np.ndarray, order: int) -> float:
    (crop, parameters), size = arguments[:2], np.array(got.shape[1:])
    offset = (np.array(crop.shape[1:]) - 1) / 2 - parameters.matrix @ (size - 1) / 2
    moved = scipy.ndimage.affine_transform(crop[0].astype(float), parameters.matrix, offset, tuple(size), order=order)
    return float(np.abs(np.flip(moved, tuple(np.flatnonzero(parameters.flips))) - got[0]).max() / crop.std())


def supervised(folder: Path, patch: tuple[int, ...], num_labels: int, rounds: int) -> Iterator[str]:
    """Batches of one crop with all of nnU-Net's transforms."""
    is_flat = len(patch) == 3 and max(patch) / patch[0] > 3
    angle = np.pi if is_flat or len(patch) == 2 else np.pi / 6
    enlarged = get_patch_size(patch, *[(-angle, angle)] * 3, (0.85, 1.25))
    if is_flat:
        enlarged[0] = patch[0]
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-angle, angle), [[1 / 2**i] * len(patch) for i in range(5)], tuple(range(len(patch))), is_flat,
        use_mask_for_norm=[False],
    )  # fmt: skip
    make_deterministic(transforms)
    labels = types.SimpleNamespace(all_labels=list(range(num_labels)), has_ignore_label=False)
    data = nnUNetDatasetBlosc2(str(folder))
    mine, theirs = (
        kind(data, 1, enlarged, patch, labels, 0.33, transforms=transforms) for kind in (TightLoader, nnUNetDataLoader)
    )

    def draw(loader: nnUNetDataLoader) -> Work:
        def work(seed: int) -> Any:
            with seeded(seed):
                return loader.generate_train_batch()

        return work

    with noting(Spatial, "draw") as draws:
        seeds = choose(lambda seed: bool(draw(mine)(seed)) and draws[-1][1] is not None)
    pairs = [(draw(mine)(seed), draw(theirs)(seed)) for seed in seeds]
    image = max(float((a["data"] - b["data"]).abs().max()) for a, b in pairs)
    voxels = sum(int((a["target"][0] != b["target"][0]).sum()) for a, b in pairs)
    result = measure((draw(mine), seeds), (draw(theirs), seeds), rounds)
    shape = "x".join(map(str, patch))
    share = f"{image:.1e}; {voxels} of {len(pairs) * math.prod(patch):,} labels differ"
    yield f"| supervised crop, {shape}, {num_labels} labels | {result} | {share} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, nargs="+", default=[96, 128])
    parser.add_argument("--labels", type=int, nargs="+", default=[4, 40])
    parser.add_argument("--no-flat", action="store_true", help="leave out patches that are flat or two-dimensional")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| job | ours, CPU ms | nnU-Net, CPU ms | times faster | largest difference |\n|---|---|---|---|---|")
    for num_labels, size in itertools.product(arguments.labels, arguments.patches):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_volumes(folder, (size,) * 3, num_labels)
            rows = [supervised(folder, (size,) * 3, num_labels, arguments.rounds)]
            if num_labels == arguments.labels[0]:
                rows.insert(0, pretraining(folder, size, arguments.rounds))
            if size == arguments.patches[0] and not arguments.no_flat:
                rows += [
                    supervised(folder, patch, num_labels, arguments.rounds) for patch in ((20, 160, 160), (192, 192))
                ]
            for row in itertools.chain(*rows):
                print(row, flush=True)
            open_volume.cache_clear()
    packages = ("mfm_nnunet", "nnunetv2", "batchgeneratorsv2", "torch", "numpy", "scipy", "blosc2")
    print({name: version(name) for name in packages}, "load", os.getloadavg())


if __name__ == "__main__":
    main()
