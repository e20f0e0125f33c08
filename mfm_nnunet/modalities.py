"""Kinds of images, recognised by the words for them, and the normalisation of each kind."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mfm_nnunet.plan_rules import CT as WINDOW
from mfm_nnunet.plan_rules import INTENSITIES, PERCENTILES

Z_SCORE = "ZScoreNormalization"
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
SUV = 1.0, 100.0
"""Limits of the 99.5 percentile of PET images in standardised uptake values; those in Bq/ml are far above."""


def kind_of(word: str) -> str:
    """Return the kind of image that a source's word for a modality means: ``ct``, ``mr``, ``pet``, ``xray``, ``us``.

    Any other word is a kind of its own, e.g. ``fundus``; "" if there is no word.
    """
    return kind_of_channel(word) or _letters(word)


def kind_of_channel(name: str) -> str:
    """Return the kind that a channel's name in dataset.json means, e.g. ``CT`` or ``MR T1``; "" for other names."""
    words = re.findall(r"[^\W_]+", name.casefold())
    named = {_KINDS.get(word) for word in (_letters(name), *words, *map("".join, itertools.pairwise(words)))} - {None}
    return str(named.pop()) if len(named) == 1 else ""


def kind_of_folder(name: str) -> str:
    """Return the kind that a folder's whole name means, such as ``CT`` or ``X-ray``; "" for other names."""
    return _FOLDERS.get(_letters(name), "")


def has_window(kind: str) -> bool:
    """Return whether images of a kind are clipped to one window, instead of being normalised one by one."""
    return kind in _WITH_WINDOW


def rule_for(kind: str, intensities: Mapping[str, Any], pet: str | None = None) -> dict[str, Any]:
    """Return the normalisation of a kind: its scheme and, where that uses them, the intensities of each channel.

    ``pet`` is ``suv`` (one window) or ``percentile`` (each image by its own); None chooses by the level of the values.
    """
    if not has_window(kind):
        return {"scheme": Z_SCORE}
    is_suv = all(SUV[0] <= known["percentile_99_5"] <= SUV[1] for known in intensities.values())
    if kind == "pet" and (pet or ("suv" if is_suv else "percentile")) == "percentile":
        return {"scheme": PERCENTILES}
    return {"scheme": WINDOW, "intensities": dict(intensities)}


def with_rule(plans: Mapping[str, Any], rule: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan in which all images have one rule, as stock nnU-Net reads it, and no table of kinds."""
    content = copy.deepcopy(dict(plans))
    del content["mfm"]["modalities"]
    if rule.get("intensities"):
        content[INTENSITIES] = copy.deepcopy(rule["intensities"])
    for own in content["configurations"].values():
        if "normalization_schemes" in own:
            own["normalization_schemes"] = [rule["scheme"]] * len(own["normalization_schemes"])
            own["use_mask_for_norm"] = [mask and rule["scheme"] != WINDOW for mask in own["use_mask_for_norm"]]
    return content


def kind_of_path(folders: Sequence[str]) -> str:
    """Return the kind that the last of the ``folders`` with a known name means; "" if none has one."""
    return next(filter(None, map(kind_of_folder, reversed(folders))), "")


def _letters(word: str) -> str:
    return re.sub(r"[\W_]+", "", word.casefold())
