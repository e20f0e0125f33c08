"""Views: what a classifier sees of a case, patches of one size.

``whole``: the whole image, shrunk into the patch if it is larger (one factor for all axes, so shapes are kept), padded
with zeros if it is smaller. ``tiles``: patches that cover the image at the plan's spacing. A 2D patch on a volume sees
its slices. Legend: N views, C channels, D H W voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from mfm_nnunet.data.sizes import sliding_windows
from mfm_nnunet.data.volumes import read_box

Kind = Literal["whole", "tiles"]
Place = tuple[slice | int, ...]
"""Index of a view in an image (D, H, W): a number per leading axis, then a slice per axis of the patch."""


def list_places(shape: Sequence[int], patch_size: Sequence[int], kind: Kind) -> list[Place]:
    """Return the places of all views of an image (D, H, W); tiles do not overlap more than they must."""
    num_leading = len(shape) - len(patch_size)
    if kind == "whole":
        whole = tuple(slice(0, size) for size in shape[num_leading:])
        return [(*index, *whole) for index in np.ndindex(*shape[:num_leading])]
    padded = [*shape[:num_leading], *map(max, zip(shape[num_leading:], patch_size))]
    return sliding_windows(padded, tuple(patch_size), 1.0)


def read_views(image: Any, places: Sequence[Place], patch_size: Sequence[int]) -> torch.Tensor:
    """Return the views (N, C, *patch), float32, at ``places`` of an image (C, D, H, W) in memory or in a file."""
    return torch.stack([_read_view(image, place, patch_size) for place in places])


def choose_places(places: Sequence[Place], number: int, rng: np.random.Generator) -> list[Place]:
    """Draw ``number`` places spread over all of them; if there are fewer, some come again."""
    edges = np.linspace(0, len(places), number + 1)
    return [places[min(int(rng.uniform(low, high)), len(places) - 1)] for low, high in itertools.pairwise(edges)]


def _read_view(image: Any, place: Place, patch_size: Sequence[int]) -> torch.Tensor:
    leading = tuple(index for index in place if isinstance(index, int))
    slices = [index for index in place if isinstance(index, slice)]
    size = [part.stop - part.start for part in slices]
    shape = image.shape[1 + len(leading) :]
    factor = min(1.0, *(wanted / own for wanted, own in zip(patch_size, size)))
    if factor < 1:
        x = torch.from_numpy(np.asarray(image[(slice(None), *leading, *slices)], np.float32))
        small = [max(1, round(own * factor)) for own in size]
        image, leading, shape = functional.interpolate(x[None], small, mode="area")[0].numpy(), (), small
        slices = [slice(0, own) for own in small]
    # An image smaller than the patch is centred in it.
    lower = [
        part.start if own >= wanted else (own - wanted) // 2 for part, own, wanted in zip(slices, shape, patch_size)
    ]
    return torch.from_numpy(read_box(image, lower, patch_size, leading))
