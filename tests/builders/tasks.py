"""Pretext tasks on tiny networks, and batches of smooth "tissue" for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.models.backbone import Geometry
from mfm_nnunet.tasks.base import CropRequest, ItemTransform, PretextTask, find_task
from tests.builders.tiny_plans import tiny_backbone

Reader = Callable[[CropRequest, int, np.random.Generator], np.ndarray]
"""Makes a crop (C, *size) from a request, the number of channels and a generator."""


def geometry(patch: tuple[int, ...], crop_cell: int | tuple[int, ...] = 4, mask_cell: int = 1) -> Geometry:
    cells = (crop_cell,) * len(patch) if isinstance(crop_cell, int) else crop_cell
    return Geometry(patch, (mask_cell,) * len(patch), cells)


def make_task(
    task: str | type[PretextTask],
    family: str,
    patch: tuple[int, ...],
    channels: int = 1,
    settings: Iterable[str] = (),
    **network: Any,
) -> Any:
    """A task on a tiny network; ``settings`` are ``name=value``, ``network`` changes the architecture."""
    task_class = find_task(task) if isinstance(task, str) else task
    config = mfm_settings.override(task_class.Config(), settings)
    outputs = task_class.num_outputs(config, channels)
    backbone = tiny_backbone(family, patch, channels, outputs, restoring=task_class.restoring, **network)
    return task_class(task_class.resolve(config, backbone.geometry()), backbone)


def tissue(request: CropRequest, channels: int, rng: np.random.Generator, smallest: int = 20) -> np.ndarray:
    """A crop as the stream would give it, of smooth waves; small images are padded or cut."""
    size = request.size if request.pad else tuple(min(side, smallest) for side in request.size)
    axes = np.meshgrid(*(np.linspace(0, 3, n) for n in size), indexing="ij")
    waves = [np.sin(sum(rng.uniform(1, 3) * axis for axis in axes) + rng.uniform(0, 6)) for _ in range(channels)]
    return np.stack(waves).astype(np.float32)


def tissue_for(task: PretextTask) -> Reader:
    """Tissue of images that hold two cells of the task's network along each axis, and at least 20 voxels."""
    return functools.partial(tissue, smallest=max(20, *(2 * cell for cell in task.backbone.crop_cell())))


def noise(request: CropRequest, channels: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((channels, *request.size)).astype(np.float32)


def make_item(
    transform: ItemTransform, channels: int, rng: np.random.Generator, read: Reader = noise
) -> dict[str, np.ndarray]:
    return transform([read(request, channels, rng) for request in transform.requests(rng)], rng)


def stack(items: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def make_batch(task: PretextTask, size: int = 2, seed: int = 0, read: Reader | None = None) -> dict[str, Tensor]:
    """A batch of ``size`` items, each with a generator of its own."""
    transform = task.transform(task.config, task.backbone.patch_size)
    rngs = [np.random.default_rng([seed, index]) for index in range(size)]
    read = read or tissue_for(task)
    return stack([make_item(transform, task.backbone.num_inputs, rng, read) for rng in rngs])
