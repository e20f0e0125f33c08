"""How many labels does pretraining save? ``mfm_study`` on real scans, from the files to the picture.

``hippocampus``: 126 MR scans are the unlabelled corpus, 74 others are labelled: 42 of them test, and 4 to 32 of the
other 32 train. The tested scans are those of the other hippocampus studies. They are split by scan: the set has left
and right hippocampi and does not tell which are of one person, so the other side of a tested person may be in the
corpus or among the training scans, equally for all arms, and the 42 tested scans may not be 42 independent people.

``sarcoma``: tumours in PET. The corpus is the PET, CT and MR of 24 patients, and 3 other scans; 3 to 24 of these
patients' PET scans are labelled. 14 other patients test, of whom nothing is in the corpus. ``--data`` is the PET
dataset; CT, MR and ``unlabelled`` lie beside it.

The sarcomas are split by patient; both splits are fixed. MAE and Volume Fusion pretrain once each; Volume Fusion
travels whole, and with its encoder alone. Other ways to pretrain and to fine-tune are ``--arms`` too, also later in the
same folder (layer-wise rates are for ``--network primus``); ``--scratch-labels`` are numbers that scratch alone is
trained with, the other end of a claim about n labels. It continues where it was stopped; the result is
``study/table.md`` and ``study/study.png``.

    python -m tests.benchmarks.label_efficiency --data ../shared/data/Dataset004_Hippocampus --work labels \\
        --pretrain pretrain.epochs=40 pretrain.precision=bf16 --finetune finetune.epochs=16 finetune.precision=bf16
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.study import Study, base_parser, case_names


class Start(NamedTuple):
    """A start beside scratch: one pretraining, and how it is fine-tuned."""

    pretext: str
    finetune: str = ""
    """Settings of this arm alone, as ``mfm_study`` takes them."""
    run_name: str = "labels"
    pretrain: tuple[str, ...] = ()
    """Settings of this pretraining alone, instead of those of ``--pretrain`` with the same names."""


ENCODER, SLOW, LAYERS = ",finetune.parts=encoder", ",finetune.learning_rate=3e-4", ",finetune.layer_decay=0.75"
VF_SCALED = Start("volume_fusion", ENCODER, "vf_scaled", ("pretext.scale_range=0.5,2.0",))
ARMS = {
    "mae": Start("mae"),
    "vf": Start("volume_fusion"),
    "vf_encoder": Start("volume_fusion", ENCODER),
    "mae_encoder": Start("mae", ENCODER),
    "vf_encoder_sawtooth": Start("volume_fusion", ENCODER + ",finetune.schedule=sawtooth"),
    "vf_encoder_slow": Start("volume_fusion", ENCODER + SLOW),
    "vf_long_encoder": Start("volume_fusion", ENCODER, "vf_long", ("pretrain.epochs=120",)),
    "vf_scaled_encoder": VF_SCALED,
    "vf_scaled_encoder_slow": VF_SCALED._replace(finetune=ENCODER + SLOW),
    "mae_range_encoder": Start("mae", ENCODER, "mae_range", ("pretext.mask_ratio=0.5,0.9",)),
    "mae_layers": Start("mae", LAYERS),
    "vf_encoder_layers": Start("volume_fusion", ENCODER + LAYERS),
}
DEFAULT_ARMS = ("mae", "vf", "vf_encoder")
PLANS = {"resenc": "mfmPlans", "primus": "mfmPrimusPlans"}


def parse() -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.add_argument("--scans", default="hippocampus", choices=STUDIES)
    parser.add_argument("--network", default="resenc", choices=PLANS)
    parser.add_argument("--labels", nargs="+", help="numbers of labelled patients (default: those above)")
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT_ARMS), choices=ARMS, help="beside scratch")
    parser.add_argument("--scratch-labels", nargs="+", default=[], help="further numbers of labels, for scratch alone")
    parser.add_argument("--disable-tta", action="store_true", help="predict the test scans without mirroring")
    return parser.parse_args()


class LabelStudy(Study):
    """The steps from the scans to the call of ``mfm_study``, for the hippocampus."""

    labelled = "004_Hippocampus"
    labels: tuple[str, ...] = ("4", "8", "16", "32")
    tolerance_mm = 1.0

    def split(self) -> None:
        """The other studies' tests; more cases train, and fewer pretrain."""
        super().split()
        rest, size = [*self.corpus, *self.train], int(self.labels[-1])
        self.corpus, self.train = rest[:-size], rest[-size:]

    def settings_of_all(self) -> dict[str, Any]:
        """Those of pretraining, of what, and of whom; ``mfm_study`` minds the rest."""
        return {name: getattr(self.arguments, name) for name in ("pretrain", "network", "scans")}

    def prepare(self) -> None:
        """The corpus, planned and preprocessed; the labelled dataset and the names of who tests."""
        super().prepare()
        self.dataset(self.labelled, [*self.train, *self.test])
        (self.folder / "test_cases.txt").write_text("\n".join(sorted(self.test)) + "\n")
        self.plan_corpus("--network", self.arguments.network)

    def starts(self) -> list[Start]:
        """One of the arms for each checkpoint that they need."""
        asked = [ARMS[name] for name in self.arguments.arms]
        return list({self.weights(start): start for start in asked}.values())

    def pretrain(self, start: Start, core: int) -> None:
        by_name = {setting.partition("=")[0]: setting for setting in [*self.arguments.pretrain, *start.pretrain]}
        words = ("--pretext", start.pretext, "--run-name", start.run_name, "--set", *by_name.values(), "seed=0")
        log = f"{start.pretext}_{start.run_name}"
        self.pretrain_once(self.weights(start), "-p", PLANS[self.arguments.network], *words, core=core, log=log)

    def compare(self) -> None:
        """Everything else is ``mfm_study``'s."""
        starts = [f"{name}={self.weights(ARMS[name])}{ARMS[name].finetune}" for name in self.arguments.arms]
        self.compare_with(self.arguments.labels or self.labels, "scratch", *starts)
        if self.arguments.scratch_labels:  # the folder has its plan by now
            self.compare_with(self.arguments.scratch_labels, "scratch")
        print((self.folder / "study" / "table.md").read_text())

    def compare_with(self, labels: Sequence[str], *arms: str) -> None:
        settings = ("--set", *self.arguments.finetune) if self.arguments.finetune else ()
        tta = ("--disable_tta",) if self.arguments.disable_tta else ()
        self.command(
            "mfm_study", self.labelled[:3], "3d_fullres", "--labels", *labels, "--arms", *arms,
            "--seeds", self.arguments.seeds, "--test", self.folder / "test_cases.txt",
            "--tolerance-mm", self.tolerance_mm, "--jobs", self.arguments.jobs, "-o", self.folder / "study",
            *tta, *settings, log="study",
        )  # fmt: skip

    def weights(self, start: Start) -> Path:
        return self.checkpoint(start.pretext, PLANS[self.arguments.network], start.run_name)


class SarcomaStudy(LabelStudy):
    """Tumours in PET, with a corpus of PET, CT and MR."""

    labelled = "051_STSPET"
    labels = ("3", "6", "12", "24")
    tolerance_mm = 4.0  # about a voxel

    def split(self) -> None:
        """Who tests is drawn from the patients of whom there is PET alone, so that no CT or MR is lost."""
        names = case_names(self.data)
        with_more = {name for dataset in self.others.values() for name in case_names(dataset)}
        pet_alone = [name for name in names if name not in with_more]
        random.Random(0).shuffle(pet_alone)
        self.test = pet_alone[: len(names) - int(self.labels[-1])]
        self.train = self.corpus = [name for name in names if name not in self.test]

    @property
    def others(self) -> dict[str, Path]:
        """The datasets of the same patients by modality."""
        return {"CT": self.data.parent / "Dataset052_STSCT", "MR": self.data.parent / "Dataset053_STSMR"}

    def corpus_rows(self) -> list[tuple[str, Path, str]]:
        rows = [(f"PET_{name}", self.image(name), "PET") for name in self.corpus]
        for modality, dataset in self.others.items():
            images = [dataset / "imagesTr" / f"{name}_0000.nii.gz" for name in case_names(dataset)]
            images += sorted((self.data.parent / "unlabelled" / modality).glob("*.nii.gz"))
            rows += [(f"{modality}_{file.name.partition('.')[0]}", file, modality) for file in images]
        return rows


STUDIES = {"hippocampus": LabelStudy, "sarcoma": SarcomaStudy}


def main() -> None:
    arguments = parse()
    study = STUDIES[arguments.scans](arguments)
    study.prepare()
    study.parallel(study.pretrain, [(start,) for start in study.starts()])
    study.compare()


if __name__ == "__main__":
    main()
