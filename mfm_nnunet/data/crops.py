"""The seeded stream of crops: item ``i`` is a pure function of (seed, i), for any number of workers.

So a run resumes exactly by starting the stream at the next item; nothing of the loader needs to be saved. Only the
voxels that a crop needs are read from the blosc2 files that nnU-Net's preprocessing (and ours) writes.

Legend: C channels, D H W voxels. Axis order is the plan's.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import blosc2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mfm_nnunet.data.augment import apply_spatial, draw_spatial
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

    def __call__(self, crops: list[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The item."""
        ...


@dataclass(frozen=True)
class StreamSettings:
    """How items are drawn: from ``num_volumes`` different volumes each, with ``augmentation`` as in
    :func:`mfm_nnunet.data.augment.draw_spatial`. Streams of one seed are independent: 0 training, 1 validation."""

    num_volumes: int = 1
    augmentation: str = "none"
    seed: int = 0
    stream: int = 0


class CropStream(Dataset):
    """Item ``index``: the transform of random crops (C, *size) float32, 0 outside the image.

    ``files`` are the preprocessed ``.b2nd`` volumes. In 2D configurations (requests of two axes on volumes of three)
    one slice along the first axis is drawn per volume. Raises MFMError (E_CONFIG) when there are fewer volumes than an
    item needs, and (E_SHORT_DATA) naming the file when a preprocessed volume cannot be read.
    """

    def __init__(self, files: Sequence[Path], transform: Transform, settings: StreamSettings) -> None:
        if len(files) < settings.num_volumes:
            raise MFMError(
                "E_CONFIG",
                f"this pretext task mixes {settings.num_volumes} volumes per item, but there are {len(files)}. "
                "Add scans, hold out more with pretrain.validation_fraction, or choose a variant that uses one volume.",
            )
        self.files = [str(file) for file in sorted(files)]
        self.transform = transform
        self.settings = settings

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = self._rng(index)
        volumes = [_open(self.files[i]) for i in self._choose(rng)]
        slices = [int(rng.integers(volume.shape[1])) for volume in volumes]
        crops = [
            self._crop(volumes[request.volume], slices[request.volume], request, rng)
            for request in self.transform.requests(rng)
        ]
        return self.transform(crops, rng)

    def case_names(self, index: int) -> list[str]:
        """The names of the cases behind item ``index``, for messages."""
        return [Path(self.files[i]).stem for i in self._choose(self._rng(index))]

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, self.settings.stream, index])

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self.files), self.settings.num_volumes, replace=False)

    def _crop(self, volume: Any, chosen_slice: int, request: Request, rng: np.random.Generator) -> np.ndarray:
        is_slice = len(request.size) == volume.ndim - 2
        leading = (chosen_slice,) if is_slice else ()
        shape = volume.shape[1 + len(leading) :]
        size = request.size if request.pad else tuple(min(want, limit) for want, limit in zip(request.size, shape))
        lower = [
            int(rng.integers(limit - want + 1)) if limit > want else (limit - want) // 2
            for limit, want in zip(shape, size)
        ]
        parameters = draw_spatial(rng, size, self.settings.augmentation)
        read = parameters.read_size(size)
        lower = [start - (more - want) // 2 for start, more, want in zip(lower, read, size)]
        return apply_spatial(read_box(volume, lower, read, leading), parameters, size)


def read_box(volume: Any, lower: Sequence[int], size: Sequence[int], leading: tuple[int, ...] = ()) -> np.ndarray:
    """The box of ``size`` voxels at ``lower`` (which may lie outside) of all channels, 0 outside the image."""
    shape = volume.shape[1 + len(leading) :]
    inside = [(max(start, 0), min(start + extent, limit)) for start, extent, limit in zip(lower, size, shape)]
    box = np.zeros((volume.shape[0], *size), np.float32)
    if all(start < stop for start, stop in inside):
        target = tuple(slice(start - low, stop - low) for (start, stop), low in zip(inside, lower))
        source = (slice(None), *leading, *(slice(start, stop) for start, stop in inside))
        box[(slice(None), *target)] = volume[source]
    return box


def batches(
    stream: CropStream, batch_size: int, first: int, last: int, num_workers: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches ``first`` to ``last - 1`` of a stream, in order; rank ``rank`` gets every ``world_size``-th item.

    Batch ``b`` holds the items ``b * batch_size`` to ``(b + 1) * batch_size - 1``, whatever the number of workers.
    """
    indices = [
        list(range(batch * batch_size + rank, (batch + 1) * batch_size, world_size)) for batch in range(first, last)
    ]
    loader = DataLoader(
        stream,
        batch_sampler=indices,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_parent if num_workers else None,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # else the loader draws from the global generator
    )
    return iter(loader)


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the parent saves first and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@functools.lru_cache(maxsize=256)
def _open(file: str) -> Any:
    try:
        return blosc2.open(urlpath=file, mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    except (RuntimeError, OSError, ValueError) as error:
        raise MFMError("E_SHORT_DATA", f"{file}: the preprocessed volume cannot be read ({error}). Delete it and run "
                       "mfm_plan_and_preprocess again; it makes only what is missing.") from error  # fmt: skip
