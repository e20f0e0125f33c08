"""Training with unlabelled images: the task of each method, its weight in each step, and the crops and their views.

Crops are cut and augmented by nnU-Net's own loader and transforms. Each batch depends on (seed, stream, step) alone, so
labels alone, ramp and full weight resume alike.

To add a method: name it in ``SemiSettings.method`` and PUBLISHED, and write its entry in MAKERS.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor
from torch.utils.data import Dataset

from mfm_nnunet.data.volumes import Volume, open_array
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.augmentation import TightLoader
from mfm_nnunet.finetune.loading import Batch, Loaded, make_deterministic, read_batches, seed_of, seeded
from mfm_nnunet.finetune.student import make_student_batches, soft_targets_of
from mfm_nnunet.settings import SemiSettings, to_dict
from mfm_nnunet.tasks.consistency import ConsistencyTask, turn
from mfm_nnunet.tasks.mean_teacher import MeanTeacherTask
from mfm_nnunet.tasks.mixing import draw_box
from mfm_nnunet.tasks.segmentation import SegmentationTask
from mfm_nnunet.tasks.student import StudentTask

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer

STRONGER = 2.0
"""The stronger view has each change of intensity with so many times nnU-Net's probability."""


# The task and its weight


def make_unlabelled_task(trainer: MFMTrainer) -> SegmentationTask:
    """Make the task of the trainer's method; plain segmentation without one."""
    method = trainer.block.semi.method
    return SegmentationTask(*_parts(trainer)) if method is None else MAKERS[method](trainer)


def _parts(trainer: MFMTrainer) -> tuple[Any, Any, Any, Any]:
    labels = trainer.label_manager
    return trainer.network, trainer.loss, labels.has_regions, labels.ignore_label


def _mean_teacher(trainer: MFMTrainer) -> MeanTeacherTask:
    """Make the task; without an ignore label in the dataset, the loss of the mixed crops gets one."""
    labels, partial = trainer.label_manager, copy.copy(trainer)
    ignored = labels.ignore_label
    if ignored is None:
        ignored = labels.num_segmentation_heads
        partial.label_manager = types.SimpleNamespace(has_regions=labels.has_regions, ignore_label=ignored)
    average, keeps_largest = trainer.optimisation.averaged, trainer.block.semi.largest_component
    network, *parts = _parts(trainer)
    return MeanTeacherTask(network, partial._build_loss(), ignored, average, keeps_largest, *parts)


MAKERS: dict[str, Callable[[MFMTrainer], SegmentationTask]] = {
    "consistency": lambda trainer: ConsistencyTask(*_parts(trainer)),
    "mean_teacher": _mean_teacher,
    "student": lambda trainer: StudentTask(*_parts(trainer), soft_targets_of(trainer)),
}
"""Maker of the task of each method."""


def require_images(trainer: MFMTrainer) -> None:
    """Raise MFMError (E_CONFIG) if a run with unlabelled images would train without them, e.g. in stock's command."""
    is_semi = trainer.block.semi.method is not None
    if (is_semi or trainer.watch.history) and not (is_semi and trainer.unlabelled):
        raise MFMError(
            "E_CONFIG",
            f"{trainer.output_folder}: this run learns from unlabelled images too, which only mfm_train reads. Train "
            "or continue it with: mfm_train --unlabelled CORPUS --set semi.method=NAME",
        )


def describe_unlabelled(trainer: MFMTrainer) -> dict[str, Any]:
    """Return what a checkpoint says about the unlabelled images: settings and rows of the watch; empty without any."""
    semi = trainer.block.semi
    return {} if semi.method is None else {"semi": to_dict(semi), "unlabelled_history": trainer.watch.history}


def weight_at(semi: SemiSettings, step: int, total_steps: int) -> float:
    """Return the weight of the unlabelled crops: 0 before ``start``, then w exp(-5 (1 - t)^2) with t from 0 to 1.

    A student's last steps have weight 0 too. The ramp is that of arXiv 1610.02242.
    """
    assert semi.weight is not None, "the settings are resolved"
    assert semi.ramp is not None, "the settings are resolved"
    assert semi.start is not None, "the settings are resolved"
    first, length = round(semi.start * total_steps), semi.ramp * total_steps
    is_last = semi.method == "student" and step >= round((1 - semi.finish) * total_steps)
    if step < first or is_last:
        return 0.0
    time = min(1.0, (step - first) / length) if length else 1.0
    return semi.weight * math.exp(-5 * (1 - time) ** 2)


# Crops


@dataclass(frozen=True)
class UnlabelledCases:
    """Preprocessed images as nnU-Net's loader reads a dataset. The label map is 0, and -1 outside of a masked image."""

    folder: str
    identifiers: Sequence[str]
    masked: bool
    """The plan normalises inside the non-zero region, and nnU-Net keeps the outside at 0 after augmentation."""

    def load_case(self, identifier: str) -> Loaded:
        """Open a case. Its voxels are read when the arrays are sliced."""
        image = open_array(str(Path(self.folder) / f"{identifier}.b2nd"))
        labels = _Outside(image) if self.masked else np.broadcast_to(np.int8(0), (1, *image.shape[1:]))
        return image, labels, None, {"class_locations": {}}


class _Outside:
    """A label map that is -1 where all channels of an image are 0, read when it is sliced."""

    def __init__(self, image: Volume) -> None:
        self._image = image
        self.shape = (1, *image.shape[1:])

    def __getitem__(self, key: Any) -> np.ndarray:
        return -(self._image[key] == 0).all(0, keepdims=True).astype(np.int8)


@dataclass(frozen=True)
class Views:
    """Make the stronger view of crops, turned and mirrored or of other intensities, and draw a box to exchange."""

    turns: bool
    quarters: int
    """Step between turns: 1 for multiples of 90 degrees, 2 for 180, if the last two axes differ."""
    flips: tuple[bool, ...]
    """Axes that may be mirrored."""
    intensities: ComposeTransforms
    box: float
    """Sides of the box, as a share of the crop's."""

    def __call__(self, weak_BCDHW: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return the stronger view, how it was turned, and the box (axes, 2).

        Changes of intensity draw from the global generators.
        """
        turns = torch.zeros(len(weak_BCDHW), 1 + len(self.flips), dtype=torch.int64)
        if self.turns:
            for drawn in turns:
                flips = (rng.random(len(self.flips)) < 0.5) & self.flips
                drawn[:] = torch.tensor([self.quarters * int(rng.integers(4)) % 4, *flips.tolist()])
            strong = turn(weak_BCDHW, turns)
        else:
            strong = torch.stack([self.intensities(image=weak.clone())["image"] for weak in weak_BCDHW])
        box = draw_box(weak_BCDHW.shape[2:], self.box, rng)
        return {"strong": strong, "turns": turns, "box": torch.tensor([[side.start, side.stop] for side in box])}


@dataclass(frozen=True)
class UnlabelledBatches(Dataset):
    """The endless stream of unlabelled crops, indexed by the step; each batch is drawn under its own seed."""

    loader: nnUNetDataLoader
    seed: int
    stream: str
    views: Views | None = None

    def __getitem__(self, index: int) -> Batch:
        seed = seed_of(self.seed, self.stream, index)
        with seeded(seed):
            drawn = self.loader.generate_train_batch()
            batch = {"weak": drawn["data"], "keys": [str(key) for key in drawn["keys"]]}
            return batch if self.views is None else batch | self.views(batch["weak"], np.random.default_rng(seed))


def join(
    trainer: MFMTrainer, training: Iterator[Batch], validation: Iterator[Batch], first_step: int, num_workers: int
) -> tuple[Iterator[Batch], Iterator[Batch]]:
    """Add unlabelled crops to the training batches of the steps that use them, and to all validation batches."""
    semi, settings, rank = trainer.block.semi, trainer.settings, trainer.local_rank
    total = settings.epochs * settings.iterations_per_epoch
    epoch, pin = first_step // settings.iterations_per_epoch, trainer.device.type == "cuda"
    augmentation = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    augmented, plain = make_unlabelled_loaders(trainer, augmentation)
    streams: Iterator[Batch] = iter(())
    if steps := [step for step in range(first_step, total) if weight_at(semi, step, total)]:
        source: Dataset
        if semi.method == "student":
            source = make_student_batches(trainer, augmentation)
        else:
            views = choose_views(trainer, augmentation)
            source = UnlabelledBatches(augmented, trainer.block.seed, f"unlabelled {rank}", views)
        streams = read_batches(source, steps[0], steps[-1] + 1, num_workers, pin)
    measured = UnlabelledBatches(plain, trainer.block.seed, f"unlabelled validation {rank}")
    begin, end = (n * settings.validation_iterations for n in (epoch, settings.epochs))
    watched = read_batches(measured, begin, end, (num_workers + 1) // 2, pin)
    weights = (weight_at(semi, step, total) for step in range(first_step, total))
    return (
        (_with(batch, next(streams), weight) if weight else batch for batch, weight in zip(training, weights)),
        (_with(batch, other, 0.0) for batch, other in zip(validation, watched)),
    )


def _with(batch: Batch, unlabelled: Batch, weight: float) -> Batch:
    keys = [*batch["keys"], *unlabelled["keys"]]
    return {**batch, "keys": keys, "unlabelled": {**unlabelled, "weight": weight}}


def make_unlabelled_loaders(
    trainer: MFMTrainer, augmentation: tuple[Any, ...]
) -> tuple[nnUNetDataLoader, nnUNetDataLoader]:
    """Make loaders of unlabelled crops: with nnU-Net's augmentation for training, and without for validation.

    ``augmentation`` is what the trainer configured: rotation, augmentation in 2D, first patch and mirror axes.
    """
    assert trainer.unlabelled is not None, "require_images was called"
    manager = trainer.configuration_manager
    rotation, do_dummy_2d, initial, mirror = augmentation
    augment = trainer.get_training_transforms(
        manager.patch_size, rotation, None, mirror, do_dummy_2d, use_mask_for_norm=manager.use_mask_for_norm
    )
    make_deterministic(augment)
    masked = any(manager.use_mask_for_norm)
    cases = UnlabelledCases(str(trainer.unlabelled.folder), trainer.unlabelled.cases, masked)
    labels = types.SimpleNamespace(all_labels=[0], has_ignore_label=False)
    shared = (manager.patch_size, labels, 0.0)
    return (
        TightLoader(cases, trainer.batch_size, initial, *shared, transforms=augment),
        nnUNetDataLoader(cases, trainer.batch_size, manager.patch_size, *shared),
    )


def choose_views(trainer: MFMTrainer, augmentation: tuple[Any, ...]) -> Views:
    """Choose the stronger view. Crops are turned where nnU-Net turns them fully and mirrors them anyway.

    Elsewhere, e.g. in 3D, classes may be told apart by their direction, as anterior and posterior hippocampus are.
    """
    manager, settings = trainer.configuration_manager, trainer.block.semi
    rotation, do_dummy_2d, _, mirror = augmentation
    patch, spacing = manager.patch_size, manager.spacing or (1.0, 1.0)
    is_square = patch[-1] == patch[-2] and math.isclose(spacing[-1], spacing[-2], rel_tol=0.05)
    allowed = settings.strong == "turn" or (
        settings.strong == "auto" and bool(mirror) and max(np.atleast_1d(rotation)) >= math.pi
    )
    turns = allowed and settings.method == "consistency"  # a mixed crop has one geometry
    transforms = trainer.get_training_transforms(patch, rotation, None, mirror, do_dummy_2d)
    changes = [step for step in transforms.transforms if isinstance(step, RandomTransform)]
    for change in changes:
        change.apply_probability = min(1.0, STRONGER * change.apply_probability)
    intensities = ComposeTransforms(changes)
    make_deterministic(intensities)
    flips = tuple(axis in (mirror or ()) for axis in range(len(patch)))
    if trainer.local_rank == 0:
        kind = "turned and mirrored" if turns else "of other intensities"
        trainer.print_to_log_file(f"unlabelled crops: the stronger view is {kind} (semi.strong={settings.strong})")
    return Views(turns, 1 if is_square else 2, flips, intensities, settings.box)
