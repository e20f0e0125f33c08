"""Kinds of images, recognised by the words for them, and the normalisation of each kind."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

Z_SCORE, WINDOW = "ZScoreNormalization", "CTNormalization"
_WORDS = {
    "ct": "ct cta cbct ldct cect ncct computedtomography",
    "mr": "mr mri mra t1 t1w t1ce t1gd t1c t1rho t2 t2w t2star t2starw flair pd pdw pdt2 inplanet1 inplanet2 angio "
    "unit1 mp2rage dwi adc asl swi bold cbv sbref m0scan magneticresonance",
    "pet": "pet suv fdg fdgpet ptsuv",
    "xray": "xray cxr dx cr dr mg radiograph radiography mammography",
    "us": "us ultrasound ultrasonography sonography echocardiography",
}
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_FOLDERS = {word: word for word in _WORDS} | {"mri": "mr", "cxr": "xray", "ultrasound": "us", "xrays": "xray"}
_WITH_WINDOW = frozenset(("ct", "pet"))
"""Kinds with a physical scale (Hounsfield units, standardised uptake): one window for all images."""


def kind_of(word: str) -> str:
    """Return the kind of image that a source's word for a modality means: ``ct``, ``mr``, ``pet``, ``xray``, ``us``.

    Any other word is a kind of its own, e.g. ``fundus``; "" if there is no word.
    """
    return kind_of_channel(word) or _plain(word)


def kind_of_channel(name: str) -> str:
    """Return the kind that a channel's name in dataset.json means, e.g. ``CT`` or ``MR T1``; "" for other names."""
    words = re.findall(r"[^\W_]+", name.casefold())
    named = {_KINDS.get(word) for word in (_plain(name), *words, *map("".join, itertools.pairwise(words)))} - {None}
    return str(named.pop()) if len(named) == 1 else ""


def kind_of_folder(name: str) -> str:
    """Return the kind that a folder's whole name means, such as ``CT`` or ``X-ray``; "" for other names."""
    return _FOLDERS.get(_plain(name), "")


def has_window(kind: str) -> bool:
    """Return whether images of a kind are clipped to one window, instead of being normalised one by one."""
    return kind in _WITH_WINDOW


def rule_for(kind: str, intensities: Mapping[str, Any]) -> dict[str, Any]:
    """Return the normalisation of a kind: nnU-Net's scheme and, where it uses them, the intensities of each channel."""
    if not has_window(kind):
        return {"scheme": Z_SCORE}
    return {"scheme": WINDOW, "intensities": dict(intensities)}


def _plain(word: str) -> str:
    return re.sub(r"[\W_]+", "", word.casefold())
