"""Training batches that are a pure function of (seed, stream, index), for any number of worker processes.

nnU-Net's own loader and transforms make each batch; here every batch gets its own seed. So workers never draw the
same numbers, a run resumes exactly by starting at the next index, and nothing of the loader needs to be saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.utils.data import Dataset

from mfm_nnunet.data.loading import read_in_order

Batch = dict[str, Any]
"""nnU-Net's batch: "data" (B, C, D, H, W) float32, "target" a tensor or one per scale, "keys" the case names."""


@dataclass(frozen=True)
class SeededBatches(Dataset):
    """Batch ``index`` of a loader's endless stream, drawn under its own seed.

    Raises MFMError (E_SHORT_DATA, E_DATA_UNSAFE) naming a preprocessed file that cannot be read.
    """

    loader: nnUNetDataLoader
    seed: int
    stream: str

    def __getitem__(self, index: int) -> Batch:
        with seeded(seed_of(self.seed, self.stream, index)):
            return self.loader.generate_train_batch()


def batches(
    source: SeededBatches, first: int, last: int, num_workers: int, pin_memory: bool = False
) -> Iterator[Batch]:
    """Batches ``first`` to ``last - 1``, in order."""
    return read_in_order(source, num_workers, pin_memory, _as_it_is, batch_size=None, sampler=range(first, last))


def nnunet_loaders(trainer: nnUNetTrainer) -> tuple[nnUNetDataLoader, nnUNetDataLoader]:
    """nnU-Net's loaders for training and validation, as its trainer would build them, with equal transforms."""
    rotation, do_dummy_2d, initial_patch, mirror_axes = (
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    )
    labels, patch = trainer.label_manager, trainer.configuration_manager.patch_size
    scales = trainer._get_deep_supervision_scales()
    shared = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": labels.foreground_labels,
        "regions": labels.foreground_regions if labels.has_regions else None,
        "ignore_label": labels.ignore_label,
    }
    training = trainer.get_training_transforms(
        patch, rotation, scales, mirror_axes, do_dummy_2d,
        use_mask_for_norm=trainer.configuration_manager.use_mask_for_norm, **shared,
    )  # fmt: skip
    validation = trainer.get_validation_transforms(scales, **shared)
    make_deterministic(training)
    datasets = trainer.get_tr_and_val_datasets()
    return tuple(
        nnUNetDataLoader(
            dataset, trainer.batch_size, size, patch, labels, trainer.oversample_foreground_percent,
            probabilistic_oversampling=trainer.probabilistic_oversampling, transforms=transforms,
        )
        for dataset, size, transforms in zip(datasets, (initial_patch, patch), (training, validation))
    )  # fmt: skip


def make_deterministic(transform: Any) -> None:
    """Switch off the choice of implementations by timing them: the winner, and with it the bits, differs by run."""
    if hasattr(transform, "benchmark"):
        transform.benchmark = False
    for inner in [*getattr(transform, "transforms", ()), getattr(transform, "transform", None)]:
        if inner is not None:
            make_deterministic(inner)


def seed_of(seed: int, stream: str, index: int) -> int:
    """A 64-bit seed for item ``index`` of a stream; different for all seeds, streams and indices."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global CPU generators seeded and one torch thread for the duration, both restored after.

    One thread, because sums over several threads differ in the last bits from those of a worker, which has one.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.get_num_threads()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(states[3])


def _as_it_is(batch: Any) -> Any:
    return batch
