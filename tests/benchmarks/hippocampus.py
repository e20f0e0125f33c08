"""Does pretraining help on the hippocampus set? From scratch, MAE and Volume Fusion on one schedule, several seeds.

150 scans are the unlabelled corpus, 8 labelled ones train and the other 42 test; a fourth arm trains from scratch with
32 labels (8 and 24 of the corpus's), which shows that the schedule is long enough to measure labels and not steps.
Everything runs through the four commands, each cell in a process of its own on one core; finished cells are kept, so
the script continues where it was stopped.

    python tests/benchmarks/hippocampus.py --data ../shared/data/Dataset004_Hippocampus --work study
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # it is called as a script
from tests.benchmarks.study import LABELLED, Study, base_parser

NUM_MORE, MORE = 24, "705_Hippocampus32"
PRETEXTS = ("mae", "volume_fusion")
PLANS, STUDY_PLANS = "mfmPlans", "mfmStudyPlans"
ARMS = {
    "scratch, 8 labels": (LABELLED, None),
    "MAE, 8 labels": (LABELLED, "mae"),
    "Volume Fusion, 8 labels": (LABELLED, "volume_fusion"),
    "scratch, 32 labels": (MORE, None),
}


def main() -> None:
    study = HippocampusStudy(parse())
    study.prepare()
    study.pretrain()
    study.finetune()
    study.summarise()


def parse() -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    return parser.parse_args()


class HippocampusStudy(Study):
    """The steps of the study."""

    def prepare(self) -> None:
        """Split the cases, register the corpus and plan it."""
        super().prepare()
        self.dataset(MORE, self.train + self.corpus[:NUM_MORE])
        self.plan_corpus()

    def pretrain(self) -> None:
        """Each pretext task with each seed; then the labelled sets are planned to fit."""
        cells = [(pretext, seed) for seed in range(self.arguments.seeds) for pretext in PRETEXTS]
        self.parallel(self.pretrain_cell, cells)
        for dataset in (LABELLED, MORE):
            self.plan_like(dataset, self.checkpoint("mae", PLANS, "seed0"), STUDY_PLANS)

    def pretrain_cell(self, pretext: str, seed: int, core: int) -> None:
        words = ("--pretext", pretext, "--run-name", f"seed{seed}", "--set", *self.arguments.pretrain, f"seed={seed}")
        self.pretrain_once(self.checkpoint(pretext, PLANS, f"seed{seed}"), *words, core=core)

    def finetune(self) -> None:
        """Each arm with each seed: train, predict the test cases, evaluate."""
        cells = [(arm, seed) for seed in range(self.arguments.seeds) for arm in self.arguments.arms]
        self.parallel(self.finetune_cell, cells)

    def finetune_cell(self, arm: str, seed: int, core: int) -> None:
        dataset, pretext = ARMS[arm]
        weights = self.checkpoint(pretext, PLANS, f"seed{seed}") if pretext else None
        about = {"arm": arm, "seed": seed}
        self.finetune_once(self.cell(arm, seed), about, dataset=dataset, plans=STUDY_PLANS, weights=weights, core=core)

    def summarise(self) -> None:
        """The table: Dice per label and mean over the test cases, mean and spread over the seeds."""
        import numpy as np

        lines = ["| arm | anterior | posterior | mean | seeds' means | minutes |", "|---|---|---|---|---|---|"]
        for arm in self.arguments.arms:
            cells = [json.loads((self.cell(arm, s) / "result.json").read_text()) for s in range(self.arguments.seeds)]
            values = np.array([[cell["dice"][name] for name in self.test] for cell in cells])  # seeds, cases, labels
            per_seed = values.mean(axis=1)
            columns = [f"{m:.4f} ± {s:.4f}" for m, s in zip(per_seed.mean(0), per_seed.std(0, ddof=1))]
            means = per_seed.mean(1)
            columns += [f"{means.mean():.4f} ± {means.std(ddof=1):.4f}", " ".join(f"{m:.4f}" for m in means)]
            minutes = np.mean([cell["seconds"] for cell in cells]) / 60
            lines.append(f"| {arm} | {' | '.join(columns)} | {minutes:.1f} |")
        self.write_table(lines)


if __name__ == "__main__":
    main()
