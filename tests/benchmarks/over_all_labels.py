"""Each start of a study against scratch, over all numbers of labels and seeds together.

``mfm_study`` compares at each number of labels; a small difference that is there at all of them shows better here. Each
case is averaged over the cells that both starts have, and paired over the cases; p is corrected for the starts.

    python -m tests.benchmarks.over_all_labels labels/study
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.study.arms import SCRATCH
from mfm_nnunet.study.design import Cell, cells_of
from mfm_nnunet.study.evaluation import METRICS
from mfm_nnunet.study.folder import read_record
from mfm_nnunet.study.statistics import compare_paired, correct_by_holm
from mfm_nnunet.study.summary import Tested, read_results


def rows(folder: Path, metric: str) -> list[dict[str, Any]]:
    """A comparison per start, as :func:`compare_paired` makes it, with ``arm``, ``cells`` and ``better_cells``."""
    record = read_record(folder)
    results = read_results(folder, cells_of(record))
    tested = Tested.of([*results.values()], record["question"]["subjects"])
    scores = {cell: tested.scores(result, metric) for cell, result in results.items()}
    found = []
    for arm in dict.fromkeys(cell.arm for cell in scores if cell.arm != SCRATCH):
        pairs = [
            (values, scores[partner])
            for cell, values in scores.items()
            if cell.arm == arm and (partner := Cell(cell.num_labels, cell.seed, SCRATCH)) in scores
        ]
        mine, theirs = (np.mean(of_cells, 0) for of_cells in zip(*pairs))
        better = sum(bool(one.mean() > other.mean()) for one, other in pairs)
        found.append({**compare_paired(mine, theirs), "arm": arm, "cells": len(pairs), "better_cells": better})
    correct_by_holm(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of a study")
    folder = parser.parse_args().study
    for metric in METRICS:
        print(f"\n| start | {metric} against scratch | bootstrap 95 % | cells better | p |\n|---|---|---|---|---|")
        for row in rows(folder, metric):
            low, high = row["interval"]
            better = f"{row['better_cells']} of {row['cells']}"
            interval = f"{low:+.4f} to {high:+.4f}"
            print(f"| {row['arm']} | {row['difference']:+.4f} | {interval} | {better} | {row['p_holm']:.2g} |")


if __name__ == "__main__":
    main()
