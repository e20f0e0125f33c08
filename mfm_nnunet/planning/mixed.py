"""Planning of corpora that mix modalities, or slices and pictures: kinds, normalisation, sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.class_table import union_of
from mfm_nnunet.data.slices import is_picture
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.modalities import has_window, kind_of, kind_of_channel, rule_for
from mfm_nnunet.plan import INTENSITIES, Plan
from mfm_nnunet.plan_rules import PERCENTILES
from mfm_nnunet.planning.derive import BY_PERCENTILES, Decision
from mfm_nnunet.planning.like import Template


def spacing_of_volumes(spacings: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the median spacing, before transposing, of a corpus of slices; pictures have none, and do not count."""
    return np.median([own for own in spacings if not is_picture(own)] or spacings, 0)


def as_slices(fingerprint: Mapping[str, Any], target: Sequence[float], is_resampled: bool) -> dict[str, Any]:
    """Return the fingerprint of a corpus of slices as one of 2D images, as large as the ``target`` makes them.

    Pictures keep their size.
    """
    shapes = []
    for own, shape in zip(fingerprint["spacings"], fingerprint["shapes_after_crop"]):
        is_same = is_picture(own) or not is_resampled
        factors = [1.0 if is_same else have / want for have, want in zip(own[1:], target[1:])]
        shapes.append([1, *(max(1, round(size * factor)) for size, factor in zip(shape[1:], factors))])
    return {**fingerprint, "spacings": [list(target)] * len(shapes), "shapes_after_crop": shapes}


def count_slices(fingerprint: Mapping[str, Any], every: int) -> int:
    """Return the number of slices of a corpus, which nnU-Net takes for its number of cases."""
    return sum(math.ceil(shape[0] / every) for shape in fingerprint["shapes_after_crop"])


def modalities_of(
    fingerprint: Mapping[str, Any], source: Template | None, is_mixed: bool, pet: str | None = None
) -> dict[str, Any] | None:
    """Return the normalisation of each kind of image in a dataset of several, else None.

    A plan that must fit a checkpoint, ``source``, has the checkpoint's, and its own for other kinds.
    """
    measured = fingerprint.get("mfm", {}).get("modalities") or {}
    own = {kind: rule_for(kind, intensities, pet) for kind, intensities in measured.items()}
    if source is not None:
        own = {**own, **source.plan.modalities} if is_mixed and source.plan.modalities else {}
    return own or None


def for_dataset(
    source: Template, modality: str, dataset_json: Mapping[str, Any], intensities: Mapping[str, Any]
) -> Template:
    """Return the checkpoint's template for a dataset of one modality: the given one, else that of its first channel.

    ``intensities`` are the dataset's own. Raises MFMError (E_CONFIG) if a modality is needed and not known.
    """
    modality = modality or kind_of_channel(DatasetJson.of(dataset_json).channels[0])
    return replace(source, plan=source.plan.for_modality(modality, intensities))


def normalise_by(plans: Mapping[str, Any], kind: str, pet: str | None = None) -> dict[str, Any]:
    """Return the plan of a labelled dataset with the normalisation of the kind of image that was asked for."""
    table = {kind: rule_for(kind, plans[INTENSITIES], pet)}
    return {**Plan.of({**plans, "mfm": {"modalities": table}}).for_modality(kind).content}


def explain_modalities(table: Mapping[str, Any]) -> list[Decision]:
    """Explain the normalisation of each kind of image in a dataset of several."""
    decisions = []
    for kind, rule in table.items():
        reason = "no fixed intensity scale: each image to mean 0, std 1"
        if rule["scheme"] == PERCENTILES:
            reason = BY_PERCENTILES
        if windows := list((rule.get("intensities") or {}).values()):
            low, high = windows[0]["percentile_00_5"], windows[0]["percentile_99_5"]
            reason = f"fixed scale: clip to {low:.4g} ... {high:.4g} (0.5 and 99.5 percentiles), then mean 0, std 1"
        decisions.append(Decision(f"modality {kind}", rule["scheme"], reason))
    return decisions


def kinds_of(cases: Sequence[Case], dataset_json: Mapping[str, Any]) -> list[str]:
    """List the kinds of images of a dataset that is normalised by modality; empty for others.

    This is a corpus of several kinds, one that was registered with ``--modality``, and a labelled dataset, or a union
    of them, of several kinds of which one has a window. Raises MFMError (E_CONFIG) if the kind of one of its images is
    not known.
    """
    if union_of(dataset_json) is not None:
        found = sorted({case.modality for case in cases})
        return found if len(found) > 1 and any(map(has_window, found)) else []
    kinds = Counter(kind_of(case.modality) for case in cases)
    is_asked = "modality" in dataset_json.get("mfm", {})
    if not (is_asked or len(set(kinds) - {""}) > 1):
        return []
    if any(case.label is not None for case in cases):
        channel = kind_of_channel(DatasetJson.of(dataset_json).channels[0])
        if not any(map(has_window, {channel, *kinds})):
            return []  # nnU-Net normalises such images one by one anyway
        if kinds[""]:
            unknown = next(case.name for case in cases if not kind_of(case.modality))
            raise MFMError(
                "E_CONFIG",
                f"case {unknown} has no modality, nor have {kinds[''] - 1} others, and the dataset is of several "
                f"({', '.join(sorted(set(kinds) - {''}))}). Fill the column 'modality' of subjects.csv.",
            )
    if kinds[""]:
        example = next(case for case in cases if not kind_of(case.modality))
        raise MFMError(
            "E_CONFIG",
            f"{example.images[0]}: its modality is not known, nor that of {kinds[''] - 1} other images, and this "
            f"corpus of {', '.join(sorted(set(kinds) - {''}))} is normalised by modality. Register it again with "
            "--modality for these, a CSV with a column 'modality', or folders named CT, MR, PET, Xray or US.",
        )
    return sorted(kinds)
