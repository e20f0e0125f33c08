"""Crops and soft labels of a student: nnU-Net's own loader and transforms, with stronger changes of intensity.

Each batch depends on (seed, stream, step) alone. Shapes: B batch, K classes or regions (and one of ignored voxels),
C channels, D H W voxels.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch import Tensor
from torch.utils.data import Dataset

from mfm_nnunet.data.volumes import open_array
from mfm_nnunet.finetune.loading import Batch, Loaded, make_deterministic, seed_of, seeded
from mfm_nnunet.tasks.mixing import draw_box
from mfm_nnunet.tasks.student import SoftTargets

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer

STRONGER = 2.0
"""Changes of intensity have so many times nnU-Net's probability."""
BOX = 2 / 3
"""Sides of a pasted box as a share of the crop's."""
FINISH_RATE = 0.1
"""Largest rate of the last steps, on labels alone, as a share of the peak."""


@dataclass(frozen=True)
class PseudoLabelledCases:
    """Preprocessed images, with their soft labels (0 to 255) in the place of label maps."""

    folder: str
    identifiers: Sequence[str]
    labels: Mapping[str, Path]

    def load_case(self, identifier: str) -> Loaded:
        """Open a case. Its voxels are read when the arrays are sliced."""
        image = open_array(str(Path(self.folder) / f"{identifier}.b2nd"))
        return image, open_array(str(self.labels[identifier])), None, {"class_locations": {}}


@dataclass(frozen=True)
class SoftTransforms:
    """Apply nnU-Net's transforms to a crop and its soft labels, which are interpolated linearly."""

    transforms: BasicTransform
    has_regions: bool
    has_ignore: bool
    masked: bool
    """The plan normalises inside the non-zero region, and nnU-Net keeps the outside at 0 after augmentation."""

    def __call__(self, image: Tensor, segmentation: Tensor) -> dict[str, Tensor]:
        """Return the crop, and its soft labels as "segmentation", float32; voxels outside the image are background."""
        outside = segmentation[:1] < 0
        if self.masked:
            outside = outside | (image == 0).all(0, keepdim=True)
        soft = segmentation.clamp(min=0).float() / 255
        found = self.transforms(image=image, segmentation=-outside.to(torch.int16), regression_target=soft)
        soft = found["regression_target"]
        if not self.has_regions:
            classes = soft[:-1] if self.has_ignore else soft
            ignored = soft[-1] if self.has_ignore else 0.0
            missing = (1 - classes.sum(0) - ignored).clamp(min=0)
            classes[0] += missing
            classes /= classes.sum(0, keepdim=True).clamp(min=1e-6)
        return {"image": found["image"], "segmentation": soft}


@dataclass(frozen=True)
class StudentBatches(Dataset):
    """The endless stream of pseudo-labelled crops, indexed by the step, with the boxes to paste."""

    loader: nnUNetDataLoader
    seed: int
    stream: str
    cutmix: float

    def __getitem__(self, index: int) -> Batch:
        seed = seed_of(self.seed, self.stream, index)
        with seeded(seed):
            drawn = self.loader.generate_train_batch()
        rng, size = np.random.default_rng(seed), drawn["data"].shape[2:]
        boxes = np.zeros((len(drawn["data"]), len(size), 2), np.int64)
        for number in np.flatnonzero(rng.random(len(boxes)) < self.cutmix):
            boxes[number] = [(part.start, part.stop) for part in draw_box(size, BOX, rng)]
        keys = [str(key) for key in drawn["keys"]]
        return {"strong": drawn["data"], "soft": drawn["target"], "boxes": torch.from_numpy(boxes), "keys": keys}


def make_student_batches(trainer: MFMTrainer, augmentation: tuple[Any, ...]) -> StudentBatches:
    """Make the stream of a trainer; ``augmentation`` is as in :func:`semi.make_unlabelled_loaders`."""
    images, manager, labels = trainer.unlabelled, trainer.configuration_manager, trainer.label_manager
    assert images is not None, "require_images was called"
    assert images.labels is not None, "the images were labelled"
    rotation, do_dummy_2d, initial, mirror = augmentation
    transforms: Any = trainer.get_training_transforms(
        manager.patch_size, rotation, None, mirror, do_dummy_2d, use_mask_for_norm=manager.use_mask_for_norm
    )
    make_deterministic(transforms)
    for change in (step for step in transforms.transforms if isinstance(step, RandomTransform)):
        change.apply_probability = min(1.0, STRONGER * change.apply_probability)
    masked = any(manager.use_mask_for_norm)
    soft = SoftTransforms(transforms, labels.has_regions, labels.has_ignore_label, masked)
    cases = PseudoLabelledCases(str(images.folder), images.cases, images.labels)
    plain = types.SimpleNamespace(all_labels=[0], has_ignore_label=False)
    loader = nnUNetDataLoader(cases, trainer.batch_size, initial, manager.patch_size, plain, 0.0, transforms=soft)
    return StudentBatches(
        loader, trainer.block.seed, f"pseudo-labelled {trainer.local_rank}", trainer.block.semi.cutmix
    )


def soft_targets_of(trainer: MFMTrainer) -> SoftTargets:
    """Return how soft targets become the trainer's loss."""
    labels, semi = trainer.label_manager, trainer.block.semi
    over_batch = trainer.configuration_manager.batch_dice
    return SoftTargets(labels.has_regions, labels.has_ignore_label, over_batch, semi.sure, semi.unsure)


def finish_rates(trainer: MFMTrainer, epoch: int) -> None:
    """Lower the rates of the last epochs, which are on labels alone: from FINISH_RATE of the peak to 0."""
    semi, epochs = trainer.block.semi, trainer.settings.epochs
    first = math.ceil((1 - semi.finish) * epochs - 1e-9)
    if semi.method != "student" or not semi.weight or epoch < first:
        return
    left = ((epochs - epoch) / (epochs - first)) ** 0.9
    schedule = trainer.lr_scheduler
    for description, group in zip(schedule.groups, trainer.optimizer.param_groups):
        group["lr"] = schedule.peak * description.scale * FINISH_RATE * left
