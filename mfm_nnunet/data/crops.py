"""The seeded stream of crops: item ``i`` is a pure function of (seed, i), for any number of workers.

So a run resumes exactly by starting the stream at the next item; nothing of the loader needs to be saved. Only the
voxels that a crop needs are read from the blosc2 files that nnU-Net's preprocessing (and ours) writes.

Legend: C channels, D H W voxels. Axis order is the plan's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from mfm_nnunet.data.augment import apply_spatial, draw_spatial
from mfm_nnunet.data.loading import read_in_order
from mfm_nnunet.data.volumes import anatomy_of, anonymised_of, open_volume, read_box
from mfm_nnunet.errors import MFMError


class Request(Protocol):
    """One crop that an item needs: its size in voxels, of which of the item's volumes, padded with 0 or cut short."""

    size: tuple[int, ...]
    volume: int
    pad: bool


class Transform(Protocol):
    """Makes one item from its crops; a pretext task's ``ItemTransform``."""

    def requests(self, rng: np.random.Generator) -> Sequence[Any]:
        """The crops to read for one item."""
        ...

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The item; ``valid`` as in :class:`CropStream`."""
        ...


@dataclass(frozen=True)
class StreamSettings:
    """How items are drawn: from ``num_volumes`` different volumes each, with ``augmentation`` as in
    :func:`mfm_nnunet.data.augment.draw_spatial`. Streams of one seed are independent: 0 training, 1 validation."""

    num_volumes: int = 1
    augmentation: str = "none"
    seed: int = 0
    stream: int = 0
    with_valid: bool = False
    """Whether transforms get ``valid``; the same for all items of a run, whichever of its volumes has a mask."""
    anatomy_fraction: float = 0.0
    """Share of the volumes with an anatomy mask that are cropped around a voxel of it instead of anywhere."""


@dataclass(frozen=True)
class Source:
    """One volume of an item: its voxels (C, D, H, W), and where its crops come from.

    ``anonymised`` is its mask (1, D, H, W) or None. ``anatomy`` are voxels (n, 3), at least one, to centre crops on;
    None: crops from anywhere. ``slice`` is the place along the first axis that two-dimensional crops are cut at.
    """

    volume: Any
    anonymised: Any
    anatomy: np.ndarray | None
    slice: int


class CropStream(Dataset):
    """Item ``index``: the transform of random crops (C, *size) float32, 0 outside the image.

    ``files`` are the preprocessed ``.b2nd`` volumes; their masks lie beside their folder
    (:mod:`mfm_nnunet.data.masks`). ``weights`` are the probabilities of the cases by name; None: all alike. In 2D
    configurations (requests of two axes on volumes of three) one slice along the first axis is drawn per volume.

    With ``settings.with_valid`` the transform gets ``valid``, a boolean array (1, *size) per crop, False where voxels
    were anonymised: rotated, scaled and mirrored as the crop is, True outside the image.

    Raises MFMError (E_CONFIG) when there are fewer volumes than an item needs, and (E_SHORT_DATA) naming the file when
    a preprocessed volume or mask cannot be read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        transform: Transform,
        settings: StreamSettings,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if len(files) < settings.num_volumes:
            raise MFMError(
                "E_CONFIG",
                f"this pretext task mixes {settings.num_volumes} volumes per item, but there are {len(files)}. "
                "Add scans, hold out more with pretrain.validation_fraction, or choose a variant that uses one volume.",
            )
        self.files = [str(file) for file in sorted(files)]
        self.transform = transform
        self.settings = settings
        self.weights: np.ndarray | None = None
        if weights is not None:
            of_files = np.array([weights[Path(file).stem] for file in self.files])
            self.weights = of_files / of_files.sum()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = self._rng(index)
        sources = self._sources(rng)
        crops, valid = [], []
        for request in self.transform.requests(rng):
            crop, is_valid = self._crop(sources[request.volume], request, rng)
            crops.append(crop)
            valid.append(is_valid)
        # Transforms of corpora without masks need not know of them.
        return self.transform(crops, rng, valid) if self.settings.with_valid else self.transform(crops, rng)

    def case_names(self, index: int) -> list[str]:
        """The names of the cases behind item ``index``, for messages."""
        return [Path(self.files[i]).stem for i in self._choose(self._rng(index))]

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, self.settings.stream, index])

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self.files), self.settings.num_volumes, replace=False, p=self.weights)

    def _sources(self, rng: np.random.Generator) -> list[Source]:
        """The volumes of an item. Without anatomy the same numbers are drawn as in a corpus without masks."""
        files = [self.files[i] for i in self._choose(rng)]
        volumes = [open_volume(file) for file in files]
        slices = [int(rng.integers(volume.shape[1])) for volume in volumes]
        points: list[np.ndarray | None] = [None] * len(files)
        if self.settings.anatomy_fraction > 0:
            for i, file in enumerate(files):
                is_guided, place = rng.random() < self.settings.anatomy_fraction, rng.random()
                found = anatomy_of(file)
                if is_guided and len(found):
                    points[i], slices[i] = found, int(found[int(place * len(found)), 0])
        masks = [anonymised_of(file) if self.settings.with_valid else None for file in files]
        return [Source(*parts) for parts in zip(volumes, masks, points, slices)]

    def _crop(self, source: Source, request: Request, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One crop (C, *size), and where it is valid (1, *size); the latter is empty unless it is asked for."""
        is_slice = len(request.size) == source.volume.ndim - 2
        leading = (source.slice,) if is_slice else ()
        shape = source.volume.shape[1 + len(leading) :]
        size = request.size if request.pad else tuple(min(want, limit) for want, limit in zip(request.size, shape))
        lower = _lower(shape, size, rng) if source.anatomy is None else _around(
            source.anatomy, leading, shape, size, rng)  # fmt: skip
        parameters = draw_spatial(rng, size, self.settings.augmentation)
        read = parameters.read_size(size)
        lower = [start - (more - want) // 2 for start, more, want in zip(lower, read, size)]
        crop = apply_spatial(read_box(source.volume, lower, read, leading), parameters, size)
        if not self.settings.with_valid:
            return crop, _NOTHING
        if source.anonymised is None:
            return crop, np.ones((1, *size), bool)
        hidden = apply_spatial(read_box(source.anonymised, lower, read, leading), parameters, size, order=0)
        return crop, hidden == 0


_NOTHING = np.zeros(0, bool)


def _lower(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The lower corner of a crop anywhere in a volume; smaller volumes lie in the middle of it."""
    return [
        int(rng.integers(limit - want + 1)) if limit > want else (limit - want) // 2 for limit, want in zip(shape, size)
    ]


def _around(
    anatomy: np.ndarray, leading: tuple[int, ...], shape: Sequence[int], size: Sequence[int], rng: np.random.Generator
) -> list[int]:
    """The lower corner of a crop around one of the voxels ``anatomy``, those in the slice ``leading`` if it is 2D.

    The crop is moved into the volume at both ends, so the voxel is in its middle only as far as it can be.
    """
    if leading:
        anatomy = anatomy[anatomy[:, 0] == leading[0]]
    centre = anatomy[int(rng.integers(len(anatomy)))][len(leading) :]
    return [
        min(max(int(middle) - want // 2, 0), limit - want) if limit > want else (limit - want) // 2
        for middle, limit, want in zip(centre, shape, size)
    ]


def batches(
    stream: CropStream,
    batch_size: int,
    first: int,
    last: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    pin: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches ``first`` to ``last - 1`` of a stream, in order; rank ``rank`` gets every ``world_size``-th item.

    Batch ``b`` holds the items ``b * batch_size`` to ``(b + 1) * batch_size - 1``, whatever the number of workers.
    ``pin`` puts them where a GPU copies from.
    """
    indices = [
        list(range(batch * batch_size + rank, (batch + 1) * batch_size, world_size)) for batch in range(first, last)
    ]
    ahead = 4 if num_workers else None
    return read_in_order(stream, num_workers, pin, default_collate, batch_sampler=indices, prefetch_factor=ahead)
