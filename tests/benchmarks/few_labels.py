"""The heart in MR with few labelled patients: what do pretraining, mixing and unlabelled scans save?

20 of the 79 patients of ACDC test; they are none of the first 28 of the published order, which is the order in which
the first seed takes its labelled patients. The other 59 patients are the corpus of masked autoencoding, and, but for
those that a subset labels, the unlabelled scans of ``semi.method``. Everything is in 2D at 2.8 mm, with the CPU preset.

    python -m tests.benchmarks.few_labels --data DATA/Dataset071_ACDC --work heart

It continues where it was stopped; the result is ``study/table.md``, and ``over_all_labels`` compares with scratch with
four times the labels.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from tests.benchmarks.study import Study, base_parser

NUM_TEST, NUM_PUBLISHED = 20, 28
SPACING = ("--spacing", "10", "2.8", "2.8")
PRETRAIN = ("pretrain.epochs=40", "pretrain.batch_size=8", "pretrain.precision=bf16")
FINETUNE = (
    "finetune.batch_size=4", "finetune.precision=bf16", "finetune.ema_decay=0.99", "finetune.epochs=24",
    "finetune.validation_iterations=1",
)  # fmt: skip
CONSISTENCY, CUTMIX = "semi.method=consistency", "finetune.mix=cutmix"


class HeartStudy(Study):
    def split(self) -> None:
        with open(self.data / "subjects.csv", newline="") as file:
            self.subjects = {row["case"]: row["subject"] for row in csv.DictReader(file)}
        patients = sorted(set(self.subjects.values()))
        published = [line for line in (self.data / "published_order.txt").read_text().split() if line in patients]
        rest = [patient for patient in patients if patient not in published[:NUM_PUBLISHED]]
        random.Random(0).shuffle(rest)
        self.tests = set(rest[:NUM_TEST])

    def prepare(self) -> None:
        """Write who tests, the corpus, and the labelled dataset as links; plan both alike."""
        test = sorted(case for case, patient in self.subjects.items() if patient in self.tests)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "test_cases.txt").write_text("\n".join(test) + "\n")
        with open(self.folder / "corpus.csv", "w", newline="") as file:
            rows = [(case, self.image(case), "MR", p) for case, p in self.subjects.items() if p not in self.tests]
            csv.writer(file).writerows([("case", "image", "modality", "subject"), *rows])
        raw = self.folder / "nnUNet_raw" / "Dataset071_ACDC"
        for source in [*self.data.glob("*Tr/*"), self.data / "dataset.json", self.data / "subjects.csv"]:
            target = raw / source.relative_to(self.data)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)
        if not self.weights.exists():
            self.command("mfm_plan_and_preprocess", "-d", "71", "-c", "2d", *SPACING)
            images = ("--images", self.folder / "corpus.csv", "--name", "Cine")
            self.command("mfm_plan_and_preprocess", "-d", "701", "-c", "2d", *images, *SPACING)
            self.command("mfm_pretrain", "701", "2d", "--pretext", "mae", "--set", *PRETRAIN, *self.arguments.pretrain)

    @property
    def weights(self) -> Path:
        run = "mfm_pretrain__mae__mfmPlans__2d"
        return self.folder / "nnUNet_results" / "Dataset701_Cine" / run / "checkpoint_final.pth"

    def compare(self, labels: list[str], *arms: str) -> None:
        """Train and test some arms with these numbers of labelled patients."""
        unlabelled: tuple[Any, ...] = ("--unlabelled", "71") if any("semi." in arm for arm in arms) else ()
        self.command(
            "mfm_study", "71", "2d", "-p", "mfmPlans", "--labels", *labels, "--arms", *arms, *unlabelled,
            "--seeds", self.arguments.seeds, "--test", self.folder / "test_cases.txt",
            "--order", self.data / "published_order.txt", "--disable_tta", "--jobs", self.arguments.jobs,
            "-o", self.folder / "study", "--set", *FINETUNE, *self.arguments.finetune, log="study",
        )  # fmt: skip


def main() -> None:
    study = HeartStudy(base_parser(__doc__).parse_args())
    study.prepare()
    mae = study.weights
    study.compare(["3", "7", "14", "28"], "scratch")
    study.compare(["7"], f"consistency=scratch,{CONSISTENCY}")
    study.compare(["3", "7", "28"], f"cutmix=scratch,{CUTMIX}")
    study.compare(["7"], f"mae={mae}")
    print((study.folder / "study" / "table.md").read_text())


if __name__ == "__main__":
    main()
