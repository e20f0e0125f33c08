"""Rank images to label next: those on which teachers disagree, unlike each other and unlike the labelled ones.

Greedy k-centre (arXiv 1708.00489) in the feature space of a teacher's encoder, weighted by disagreement. Legend: N
images, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from mfm_nnunet.files import write_csv

LEAST = 1e-3
"""Smallest disagreement that counts: with teachers that agree everywhere, diversity alone ranks."""


@dataclass(frozen=True)
class Ranking:
    """Images in the order in which to label them; reasons are words for a person."""

    rows: list[tuple[str, float, float, str]]
    """Case, agreement, distance to what is labelled or ranked before (1 is the usual distance), reason."""

    def write(self, file: Path) -> None:
        """Write the table."""
        header = ["rank", "case", "agreement of the teachers", "distance", "reason"]
        write_csv(file, header, [[number, *row] for number, row in enumerate(self.rows, start=1)])


def rank(entries: Sequence[dict[str, Any]], labelled: Sequence[dict[str, Any]]) -> Ranking:
    """Rank images by disagreement times distance to the nearest image that is labelled or ranked before.

    Entries hold "case", "feature" and, if unlabelled, "agreement".
    """
    if not entries:
        return Ranking([])
    x_NF = np.array([entry["feature"] for entry in [*entries, *labelled]], float)
    x_NF = (x_NF - x_NF.mean(0)) / np.maximum(x_NF.std(0), 1e-8)
    own_NF, known = x_NF[: len(entries)], [entry["case"] for entry in labelled]
    agreement_N = np.array([entry["agreement"] for entry in entries], float)
    usual = _usual_distance(x_NF)
    nearest_N = np.full(len(entries), np.inf)
    name_N = [""] * len(entries)

    def approach(to_F: np.ndarray, name: str) -> None:
        distance_N = np.linalg.norm(own_NF - to_F, axis=1) / usual
        for index in np.flatnonzero(distance_N < nearest_N):
            nearest_N[index], name_N[index] = distance_N[index], name

    for to_F, name in zip(x_NF[len(entries) :], known):
        approach(to_F, name)
    left, rows, order = list(range(len(entries))), [], np.sort(agreement_N)
    while left:
        distance = np.where(np.isfinite(nearest_N), nearest_N, 1.0)
        score_N = np.maximum(1 - agreement_N, LEAST) * distance
        chosen = max(left, key=lambda index: (score_N[index], -index))
        place = float(np.searchsorted(order, agreement_N[chosen])) / len(order)
        reason = _give_reason(
            agreement_N[chosen], place, float(distance[chosen]), name_N[chosen], name_N[chosen] in known
        )
        rows.append((entries[chosen]["case"], float(agreement_N[chosen]), float(distance[chosen]), reason))
        left.remove(chosen)
        approach(own_NF[chosen], entries[chosen]["case"])
    return Ranking(rows)


def _usual_distance(x_NF: np.ndarray) -> float:
    """Return the median distance from an image to its nearest neighbour; 1 if all are equal."""
    if len(x_NF) < 2:
        return 1.0
    distance_NN = cdist(x_NF, x_NF)
    np.fill_diagonal(distance_NN, np.inf)
    return float(np.median(distance_NN.min(1))) or 1.0


def _give_reason(agreement: float, place: float, distance: float, nearest: str, is_labelled: bool) -> str:
    words = "the teachers agree here at least as well as usual"
    if place < 0.2:
        words = "the teachers disagree here more than on most images"
    elif place < 0.5:
        words = "the teachers disagree more than usual"
    where = f"{nearest}, which is labelled" if is_labelled else f"{nearest}, which is ranked before"
    if not nearest:
        far = "nothing like it is labelled yet"
    elif distance >= 1.5:
        far = f"it is unlike all others (nearest: {where})"
    else:
        far = f"it is {'rather' if distance >= 0.75 else 'much'} like {where}"
    return f"{words} (agreement {agreement:.2f}); {far}"
