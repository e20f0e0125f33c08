"""Each start of a study against scratch: over all numbers of labels together, or with fewer labels than scratch.

``mfm_study`` compares at each number of labels. A small difference that is there at all of them shows better over all
of them; and whether a start with n labels is as good as scratch with 4n is asked with ``--scratch-labels``. Each case
is averaged over the cells that both have, and paired over the cases; p is corrected for the rows.

    python -m tests.benchmarks.over_all_labels labels/study
    python -m tests.benchmarks.over_all_labels labels/study --scratch-labels 32
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.study.design import SCRATCH, Cell
from mfm_nnunet.study.evaluation import METRICS
from mfm_nnunet.study.folder import read_study
from mfm_nnunet.study.summary import Tested, compare_paired, correct_by_holm, read_results

Pairs = list[tuple[np.ndarray, np.ndarray]]


def rows(folder: Path, metric: str, scratch_labels: int | None = None) -> list[dict[str, Any]]:
    """A comparison per start, as :func:`compare_paired` makes it, with ``start``, ``cells`` and ``better_cells``."""
    study = read_study(folder)
    results = read_results(folder, study.asked)
    tested = Tested.of([*results.values()], study.question.subjects)
    scores = {cell: tested.scores(result, metric) for cell, result in results.items()}
    found = []
    for start, pairs in over_all(scores) if scratch_labels is None else with_fewer(scores, scratch_labels):
        if not pairs:
            continue
        mine, theirs = (np.mean(of_cells, 0) for of_cells in zip(*pairs))
        better = sum(bool(one.mean() > other.mean()) for one, other in pairs)
        found.append({**compare_paired(mine, theirs), "start": start, "cells": len(pairs), "better_cells": better})
    correct_by_holm(found)
    return found


def over_all(scores: dict[Cell, np.ndarray]) -> Iterator[tuple[str, Pairs]]:
    """The cells of each start, each beside scratch's with as many labels and the same seed."""
    for arm in dict.fromkeys(cell.arm for cell in scores if cell.arm != SCRATCH):
        partners = {cell: Cell(cell.num_labels, cell.seed, SCRATCH) for cell in scores if cell.arm == arm}
        yield arm, pairs_of(scores, partners)


def with_fewer(scores: dict[Cell, np.ndarray], scratch_labels: int) -> Iterator[tuple[str, Pairs]]:
    """The cells of each start (scratch too) with fewer labels, each beside scratch's with ``scratch_labels``."""
    fewer = [cell for cell in sorted(scores) if cell.num_labels < scratch_labels]
    for arm, num_labels in dict.fromkeys((cell.arm, cell.num_labels) for cell in fewer):
        cells = [cell for cell in fewer if (cell.arm, cell.num_labels) == (arm, num_labels)]
        partners = {cell: Cell(scratch_labels, cell.seed, SCRATCH) for cell in cells}
        yield f"{arm}, {num_labels} labels", pairs_of(scores, partners)


def pairs_of(scores: dict[Cell, np.ndarray], partners: dict[Cell, Cell]) -> Pairs:
    """The scores of cells and of their partners, of those that both are there."""
    return [(scores[cell], scores[partner]) for cell, partner in partners.items() if partner in scores]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of a study")
    parser.add_argument("--scratch-labels", type=int, help="compare with scratch with this many labels")
    arguments = parser.parse_args()
    n = arguments.scratch_labels
    against = "scratch" if n is None else f"scratch with {n} labels"
    for metric in METRICS["segmentation"]:
        print(f"\n| start | {metric} against {against} | bootstrap 95 % | cells better | p |\n|---|---|---|---|---|")
        for row in rows(arguments.study, metric, n):
            low, high = row["interval"]
            better = f"{row['better_cells']} of {row['cells']}"
            interval = f"{low:+.4f} to {high:+.4f}"
            print(f"| {row['start']} | {row['difference']:+.4f} | {interval} | {better} | {row['p_holm']:.2g} |")


if __name__ == "__main__":
    main()
