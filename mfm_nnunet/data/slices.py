"""Slices and pictures in one corpus for 2D plans: the axis, choice and colours that its settings ask for.

A picture is an image without spacing, as nnU-Net's readers mark it. Legend: C channels, D H W voxels of the reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mfm_nnunet.data.cases import Case
from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import reading
from mfm_nnunet.settings import SliceSettings, from_dict

_LUMINANCE = np.array((0.299, 0.587, 0.114), np.float32)
"""Weights of red, green and blue (ITU-R BT.601)."""
_PICTURE_FROM = 998
"""nnU-Net's readers set the missing spacing of a picture to 999 times the others."""


def is_picture(spacing: Sequence[float]) -> bool:
    """Return whether an image is a picture without a size in mm; ``spacing`` is the reader's."""
    return spacing[0] >= _PICTURE_FROM * max(spacing[1:])


def reader_of(case: Case, reader: str, settings: Mapping[str, Any]) -> str:
    """Return the reader of a case: its own in a corpus of slices, which may mix volumes and pictures, else the plan's.

    Raises MFMError as :func:`mfm_nnunet.images.reading.reader_for`.
    """
    return reading.reader_for(case.images[0]) if "slices" in settings else reader


def as_in_corpus(
    image_CDHW: np.ndarray, properties: Mapping[str, Any], case: Case, settings: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return an image with the colours of its corpus and, in a corpus of slices, with the slice axis first.

    ``settings`` are ``mfm`` in the corpus' dataset.json. Raises MFMError (E_CHANNELS) for an image that is neither grey
    nor RGB in a corpus with a setting for colours.
    """
    colour, spacing = settings.get("colour"), [float(mm) for mm in properties["spacing"]]
    if colour and len(image_CDHW) not in (1, 3):
        text = f"{case.images[0]}: has {len(image_CDHW)} channels, and --colour {colour} takes grey and RGB images."
        raise MFMError("E_CHANNELS", f"{text} Save it as one of these.")
    if colour == "grey" and len(image_CDHW) == 3:
        image_CDHW = np.tensordot(_LUMINANCE, image_CDHW, 1)[None]
    elif colour == "rgb" and len(image_CDHW) == 1:
        image_CDHW = np.repeat(image_CDHW, 3, 0)
    if "slices" in settings and not is_picture(spacing):
        axis = settings["slices"]["axis"]
        image_CDHW = np.moveaxis(image_CDHW, 1 + axis, 1)
        spacing.insert(0, spacing.pop(axis))
    return image_CDHW, {**properties, "spacing": spacing}


def at_natural_size(properties: Mapping[str, Any], target: Sequence[float]) -> dict[str, Any]:
    """Return the properties with the plan's spacing for a picture, so that it is not resampled to millimetres."""
    spacing = properties["spacing"]
    return {**properties, "spacing": [spacing[0], *target] if is_picture(spacing) else spacing}


def choose_slices(image_CDHW: np.ndarray, box: Sequence[int], settings: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers, from the box on, of the slices to use: every n-th in the box, with enough foreground.

    ``box`` are the first and the last slice + 1 that are not all zero. The foreground are voxels brighter than the mean
    of the image, in any channel. Raises MFMError (E_CONFIG) if no slice has enough of it.
    """
    first, last = box
    wanted = from_dict(SliceSettings, settings["slices"], "slices.")
    numbers = np.arange(0, last - first, wanted.every)
    if image_CDHW.shape[1] == 1 or not wanted.foreground:
        return numbers
    means = image_CDHW.mean((1, 2, 3), keepdims=True)
    is_bright_DHW = (image_CDHW > means).any(0)
    numbers = numbers[is_bright_DHW.mean((1, 2))[first + numbers] >= wanted.foreground]
    if not len(numbers):
        share = f"foreground={wanted.foreground:g}"
        raise MFMError("E_CONFIG", f"no slice has as much foreground as --slices {share} asks for. Lower it.")
    return numbers
