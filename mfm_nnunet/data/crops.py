"""The seeded stream of crops: item ``i`` is a pure function of (seed, i), for any number of workers.

A run resumes exactly by starting the stream at the next item, so no loader state is saved. Only the voxels of a crop
are read from the blosc2 files that nnU-Net's preprocessing (and ours) writes.

Legend: C channels, D H W voxels. Axis order is the plan's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loading import read_in_order
from mfm_nnunet.data.volumes import anonymised_of, open_volume, read_box
from mfm_nnunet.data.warp import Order, warp_image, warp_labels
from mfm_nnunet.errors import MFMError, nearest

Augmentation = Literal["none", "mirror", "spatial"]
"""none; mirror: mirroring; spatial: rotation, scaling and mirroring."""


@dataclass(frozen=True)
class CropRequest:
    """A crop that an item needs, at a uniformly drawn position."""

    size: tuple[int, ...]
    """Voxels per axis."""
    volume: int = 0
    """Index of the volume within the item, from 0; different indices are different volumes."""
    pad: bool = True
    """True: pad a volume smaller than ``size`` with zeros. False: return a crop as small as the volume."""


class ItemTransform(ABC):
    """Make an item from its crops, in a worker process: picklable, NumPy only, stateless."""

    @abstractmethod
    def requests(self, rng: np.random.Generator) -> list[CropRequest]:
        """Return the crops to read for one item. Called before ``__call__``, with the same generator."""

    @abstractmethod
    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Make the item from its crops (C, D, H, W), float32, normalised by the plan, in the order of the requests.

        ``item["image"]`` is the network's input, (C, *patch), or (V, C, *crop) for tasks with several views. Tasks may
        add arrays of their own. The crops may be modified in place. ``valid`` is a boolean array (1, D, H, W) per crop,
        False where voxels were anonymised, or None in a corpus without such masks. Tasks that restore voxels return it
        as ``item["valid"]``, transformed like the image, and exclude invalid voxels from the loss. All items of a run
        have the same keys, shapes and types, so a batch is ``np.stack``.
        """


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream.

    Each item uses ``num_volumes`` different volumes; ``augmentation`` as in :func:`draw_spatial`. Streams of one seed
    are independent: 0 training, 1 validation.
    """

    num_volumes: int = 1
    augmentation: Augmentation = "none"
    seed: int = 0
    stream: int = 0
    with_valid: bool = False
    """Pass a validity mask to the transform. Constant within a run, even for volumes without a mask."""
    order: Order = 1
    """Of the spline that rotated and scaled crops are interpolated with."""


class _Source(NamedTuple):
    """A volume (C, D, H, W) of an item, its mask (1, D, H, W) or None, and its slice for two-dimensional crops."""

    volume: Any
    anonymised: Any
    slice: int


class CropStream(Dataset):
    """A dataset whose item ``index`` is the transform of random crops (C, *size), float32, 0 outside the image.

    ``files`` are the preprocessed ``.b2nd`` volumes; their masks lie beside their folder
    (:mod:`mfm_nnunet.data.volumes`). ``weights`` are the probabilities of the cases by name; None for equal ones. In 2D
    configurations (2D requests on 3D volumes) a slice along the first axis is drawn per volume.

    With ``settings.with_valid`` the transform gets ``valid``, a boolean array (1, *size) per crop, False where voxels
    were anonymised. It is rotated, scaled and mirrored like the crop, and True outside the image.
    """

    def __init__(
        self,
        files: Sequence[Path],
        transform: ItemTransform,
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
        # Transforms need not support masks if the corpus has none.
        return self.transform(crops, rng, valid) if self.settings.with_valid else self.transform(crops, rng)

    def case_names(self, index: int) -> list[str]:
        """Return the names of the cases in item ``index``, for messages."""
        return [Path(self.files[i]).stem for i in self._choose(self._rng(index))]

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, self.settings.stream, index])

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self.files), self.settings.num_volumes, replace=False, p=self.weights)

    def _sources(self, rng: np.random.Generator) -> list[_Source]:
        files = [self.files[i] for i in self._choose(rng)]
        volumes = [open_volume(file) for file in files]
        slices = [int(rng.integers(volume.shape[1])) for volume in volumes]
        masks = [anonymised_of(file) if self.settings.with_valid else None for file in files]
        return [_Source(*parts) for parts in zip(volumes, masks, slices)]

    def _crop(self, source: _Source, request: CropRequest, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Read a crop (C, *size) and its validity (1, *size), which is empty unless requested."""
        is_slice = len(request.size) == source.volume.ndim - 2
        leading = (source.slice,) if is_slice else ()
        shape = source.volume.shape[1 + len(leading) :]
        size = request.size if request.pad else tuple(min(want, limit) for want, limit in zip(request.size, shape))
        lower = _lower(shape, size, rng)
        parameters, order = draw_spatial(rng, size, self.settings.augmentation), self.settings.order
        read = parameters.read_size(size, order)
        lower = [start - (more - want) // 2 for start, more, want in zip(lower, read, size)]
        crop = apply_spatial(read_box(source.volume, lower, read, leading), parameters, size, order)
        if not self.settings.with_valid:
            return crop, np.zeros(0, bool)
        if source.anonymised is None:
            return crop, np.ones((1, *size), bool)
        hidden = apply_spatial(read_box(source.anonymised, lower, read, leading), parameters, size, "labels")
        return crop, hidden == 0


def _lower(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Draw the lower corner of a crop; along axes that are smaller than the crop, centre the volume in it."""
    return [
        int(rng.integers(limit - want + 1)) if limit > want else (limit - want) // 2 for limit, want in zip(shape, size)
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
    """Yield batches ``first`` to ``last - 1`` of a stream, in order; ``rank`` gets every ``world_size``-th item.

    Batch ``b`` holds the items ``b * batch_size`` to ``(b + 1) * batch_size - 1``, for any number of workers. ``pin``
    puts them into pinned memory.
    """
    indices = [
        list(range(batch * batch_size + rank, (batch + 1) * batch_size, world_size)) for batch in range(first, last)
    ]
    ahead = 4 if num_workers else None
    return read_in_order(stream, num_workers, pin, default_collate, batch_sampler=indices, prefetch_factor=ahead)


ROTATION_DEGREES = 30.0
SCALE_RANGE = (0.7, 1.4)
PROBABILITY = 0.2
ANISOTROPY = 3.0


@dataclass(frozen=True)
class SpatialParameters:
    """Parameters of one draw.

    ``matrix`` maps centred output to centred input voxels (None: identity). ``flips`` has a flag per axis.
    """

    matrix: np.ndarray | None
    flips: tuple[bool, ...]

    def read_size(self, patch_size: Sequence[int], order: Order = 1) -> tuple[int, ...]:
        """Return the number of voxels per axis to read for the transformed patch."""
        if self.matrix is None:
            return tuple(patch_size)
        return tuple(int(np.ceil(extent)) + 2 * order for extent in np.abs(self.matrix) @ np.asarray(patch_size))


def draw_spatial(rng: np.random.Generator, patch_size: Sequence[int], kind: Augmentation) -> SpatialParameters:
    """Draw rotation (up to 30 degrees, p 0.2), isotropic scale 0.7-1.4 (p 0.2) and flips (p 0.5 per axis).

    ``kind``: "spatial", "mirror" (flips only) or "none". Flat patches (more than 3:1) rotate only in plane, as in
    nnU-Net. The same number of random values is consumed whatever the outcome.
    """
    num_axes = len(patch_size)
    flips = rng.random(num_axes) < 0.5
    rotates, scales = rng.random(2) < PROBABILITY
    angles = np.deg2rad(rng.uniform(-ROTATION_DEGREES, ROTATION_DEGREES, 3))
    scale = rng.uniform(*SCALE_RANGE)
    if kind == "none":
        return SpatialParameters(None, (False,) * num_axes)
    matrix: np.ndarray | None = None
    if kind == "spatial" and (rotates or scales):
        matrix = _rotation(angles, patch_size) if rotates else np.eye(num_axes)
        if scales:
            matrix = matrix * scale
            if _is_flat(patch_size):
                matrix[0, 0] = 1.0
    return SpatialParameters(matrix, tuple(bool(flip) for flip in flips))


def apply_spatial(
    crop_CDHW: np.ndarray,
    parameters: SpatialParameters,
    patch_size: Sequence[int],
    order: Order | Literal["labels"] = 1,
) -> np.ndarray:
    """Transform a crop of ``parameters.read_size(patch_size, order)`` into the patch (C, *patch_size), float32.

    ``order`` of the spline for images; "labels" for masks.
    """
    flips = np.array(parameters.flips)
    if parameters.matrix is None:
        return np.ascontiguousarray(np.flip(crop_CDHW, tuple(np.flatnonzero(flips) + 1)), dtype=np.float32)
    matrix = parameters.matrix * np.where(flips, -1, 1)
    offset = (np.asarray(crop_CDHW.shape[1:]) - 1) / 2 - matrix @ (np.asarray(patch_size) - 1) / 2
    if order == "labels":
        return warp_labels(crop_CDHW, matrix, offset, patch_size)
    return warp_image(crop_CDHW, matrix, offset, patch_size, order)


def _is_flat(patch_size: Sequence[int]) -> bool:
    return len(patch_size) == 3 and max(patch_size) / patch_size[0] > ANISOTROPY


def _rotation(angles: np.ndarray, patch_size: Sequence[int]) -> np.ndarray:
    if len(patch_size) == 2:
        return _plane_rotation(2, 0, 1, angles[0])
    if _is_flat(patch_size):
        return _plane_rotation(3, 1, 2, angles[0])
    return (
        _plane_rotation(3, 1, 2, angles[0]) @ _plane_rotation(3, 0, 2, angles[1]) @ _plane_rotation(3, 0, 1, angles[2])
    )


def _plane_rotation(num_axes: int, first: int, second: int, angle: float) -> np.ndarray:
    matrix = np.eye(num_axes)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


KINDS = ("subject", "dataset", "modality")
"""Fields of :class:`Case` available for balancing."""


def require_legal_balance(kinds: Sequence[str], cases: Sequence[Case]) -> None:
    """Raise MFMError (E_CONFIG) if the cases cannot be balanced by ``kinds``."""
    for kind in kinds:
        if kind not in KINDS:
            raise MFMError("E_CONFIG", f"pretrain.balance_by={kind}: legal are {', '.join(KINDS)}. "
                                       f"{nearest(kind, KINDS)}")  # fmt: skip
        if not any(getattr(case, kind) for case in cases):
            raise MFMError(
                "E_CONFIG",
                f"pretrain.balance_by={kind}: the corpus has no {kind} for any case. Register it again from a source "
                f"that has it, e.g. a CSV with the column '{kind}', or leave {kind} out.",
            )


def case_weights(cases: Sequence[Case], kinds: Sequence[str]) -> dict[str, float]:
    """Return the probability of each case by name: equal for all groups, and for all cases within a group."""
    groups = [tuple(getattr(case, kind) for kind in kinds) for case in cases]
    counts = Counter(groups)
    return {case.name: (1 / len(counts)) / counts[group] for case, group in zip(cases, groups)}


def describe_shares(cases: Sequence[Case], kinds: Sequence[str]) -> str:
    """Describe the shares of modalities and datasets in a line: the largest twenty, without subjects."""
    groups = {tuple(getattr(case, kind) for kind in kinds) for case in cases}
    merged = Counter(
        " ".join(word or f"unknown {kind}" for kind, word in zip(kinds, group) if kind != "subject") for group in groups
    )
    largest = sorted(sorted(merged.items()), key=lambda item: -item[1])[:20]
    listed = ", ".join(f"{name} {count / len(groups):.1%}" for name, count in largest if name)
    rest = f", {len(merged) - 20} more" if len(merged) > 20 else ""
    return f"balanced by {' and '.join(kinds)}, {len(groups)} groups: {listed or f'{1 / len(groups):.2%} each'}{rest}"
