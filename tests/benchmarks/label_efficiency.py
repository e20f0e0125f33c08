"""How many labels does pretraining save? ``mfm_study`` on the hippocampus set, from the scans to the picture.

126 scans are the unlabelled corpus, 74 others are labelled: 42 of them test, and 4 to 32 of the other 32 train. The
split is by subject (one scan each) and fixed; the tested scans are those of the other hippocampus studies. MAE and
Volume Fusion pretrain once each; Volume Fusion travels whole, and with its encoder alone. It continues where it was
stopped; the result is ``study/table.md`` and ``study/study.png``.

    python -m tests.benchmarks.label_efficiency --data ../shared/data/Dataset004_Hippocampus --work labels \\
        --pretrain pretrain.epochs=40 pretrain.precision=bf16 --finetune finetune.epochs=16 finetune.precision=bf16
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.study import Study, base_parser

NUM_CORPUS, NUM_POOL = 126, 32
LABELLED = "004_Hippocampus"
ARMS = {
    "mae": ("mae", ""),
    "vf": ("volume_fusion", ""),
    "vf_encoder": ("volume_fusion", ",finetune.parts=encoder"),
}
"""Arms beside scratch: the pretext task, and settings of the arm alone as ``mfm_study`` takes them."""
PLANS = "mfmPlans"


def parse() -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.add_argument("--labels", nargs="+", default=["4", "8", "16", "32"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="beside scratch")
    parser.add_argument("--disable-tta", action="store_true", help="predict the test scans without mirroring")
    return parser.parse_args()


class LabelStudy(Study):
    """The steps from the scans to the call of ``mfm_study``."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        names = [*self.corpus, *self.train, *self.test]
        self.corpus, self.pool = names[:NUM_CORPUS], names[NUM_CORPUS : NUM_CORPUS + NUM_POOL]
        self.test = names[NUM_CORPUS + NUM_POOL :]

    def prepare(self) -> None:
        """The corpus, planned and preprocessed; the labelled dataset and the names of who tests."""
        super().prepare()
        self.dataset(LABELLED, [*self.pool, *self.test])
        (self.folder / "test_cases.txt").write_text("\n".join(sorted(self.test)) + "\n")
        self.plan_corpus()

    def pretrain(self, pretext: str, core: int) -> None:
        words = ("-p", PLANS, "--pretext", pretext, "--run-name", "labels", "--set", *self.arguments.pretrain, "seed=0")
        self.pretrain_once(self.weights(pretext), *words, core=core, log=pretext)

    def compare(self) -> None:
        """Everything else is ``mfm_study``'s."""
        chosen = {name: ARMS[name] for name in self.arguments.arms}
        arms = ("scratch", *(f"{name}={self.weights(task)}{own}" for name, (task, own) in chosen.items()))
        settings = ("--set", *self.arguments.finetune) if self.arguments.finetune else ()
        tta = ("--disable_tta",) if self.arguments.disable_tta else ()
        self.command(
            "mfm_study", LABELLED[:3], "3d_fullres", "--labels", *self.arguments.labels, "--arms", *arms,
            "--seeds", self.arguments.seeds, "--test", self.folder / "test_cases.txt", "--jobs", self.arguments.jobs,
            "-o", self.folder / "study", *tta, *settings, log="study",
        )  # fmt: skip
        print((self.folder / "study" / "table.md").read_text())

    def weights(self, pretext: str) -> Path:
        return self.checkpoint(pretext, PLANS, "labels")


def main() -> None:
    study = LabelStudy(parse())
    study.prepare()
    study.parallel(study.pretrain, [(task,) for task in sorted({ARMS[name][0] for name in study.arguments.arms})])
    study.compare()


if __name__ == "__main__":
    main()
