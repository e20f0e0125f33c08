"""Every pretext task on every network, on the hippocampus set: does it beat scratch with an equal compute budget?

150 scans are the unlabelled corpus, 8 labelled ones train and the other 42 test. Each pair of task and network is
pretrained for ``--budget`` CPU seconds of one core: the CPU seconds of a step are measured at the beginning, the budget
is divided by them. All arms of a network share one plan and one schedule of fine-tuning, scratch included. Cells run
seed by seed, and a pretraining is followed at once by its fine-tuning, so a study that is stopped leaves a fair table;
it continues where it was stopped. Losers stay in the table.

    python -m tests.benchmarks.pretext_pairs --data ../shared/data/Dataset004_Hippocampus --work pairs --budget 120
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mfm_nnunet.study.summary import compare_paired, correct_by_holm
from mfm_nnunet.tasks.registry import list_tasks
from tests.benchmarks.study import LABELLED, LABELS, Study, base_parser

EXTRA: dict[str, tuple[str, ...]] = {
    # Contrastive losses tell an item from the others of its batch: more of them, and so fewer steps. The volumes are
    # 31 x 40 x 24 voxels and larger; crops of half the patch, the default, lie in all of them.
    "simclr": ("pretrain.batch_size=8",),
    "swin_unetr": ("pretrain.batch_size=4",),
    # torch 2.14 on AVX512-BF16: the weight gradient of a 3x3x3 convolution of 2 x 3 x 2 voxels, the coarsest map of a
    # crop of 16 x 24 x 16, is garbage in bf16.
    "simclr on resenc": ("pretrain.precision=fp32",),
    "voco on resenc": ("pretrain.precision=fp32",),
}
"""Settings of a task beside its defaults, by ``task`` or ``task on network``; they win over ``--pretrain``."""
FINETUNE: dict[str, tuple[str, ...]] = {
    # A step costs a quarter of the U-Net's, and a transformer from scratch needs more of them: with the 12 epochs of
    # documentation/benchmarks both networks fine-tune for about as many CPU seconds.
    "primus": ("finetune.epochs=48",),
}
"""Settings of fine-tuning by network, the same for all of its arms; they win over ``--finetune``."""
PLANS = {"resenc": "mfmPlans", "primus": "mfmPrimusPlans"}
STUDY_PLANS = {"resenc": "mfmPairsPlans", "primus": "mfmPairsPrimusPlans"}
LIKE = "mae"
"""The task whose checkpoint of one step the labelled set is planned like; it works on all networks."""
DEFAULTS = ("pretrain.iterations_per_epoch=25", "pretrain.validation_iterations=1")
COST_STEPS, COST_WARMUP, COST_ROUNDS = 24, 4, 2


def all_pairs() -> list[str]:
    """``task on network`` for every registered task."""
    return [f"{task.name} on {network}" for network in PLANS for task in list_tasks() if network in task.backbones]


def parse() -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.add_argument("--budget", type=float, required=True, help="CPU seconds of pretraining per pair and seed")
    parser.add_argument("--pairs", nargs="+", default=all_pairs(), choices=all_pairs(), metavar="'TASK on NETWORK'")
    parser.add_argument("--disable-tta", action="store_true", help="predict the test scans without mirroring")
    parser.add_argument("--table", action="store_true", help="only write the table of what is finished")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    study = PairsStudy(arguments)
    if arguments.measure:
        print(json.dumps(study.measure_here(arguments.measure)))
        return
    if not arguments.table:
        study.prepare()
        study.measure_costs()
        study.run_cells()
    study.summarise()


class PairsStudy(Study):
    """The steps of the study. ``costs`` are the CPU seconds of a step of each pair."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.networks = [network for network in PLANS if any(pair.endswith(network) for pair in arguments.pairs)]
        self.costs: dict[str, float] = {}
        if self.costs_file.exists():
            self.costs = json.loads(self.costs_file.read_text())
        self.failed: dict[str, str] = {}
        self.lock = threading.Lock()

    @property
    def costs_file(self) -> Path:
        return self.folder / "costs.json"

    def prepare(self) -> None:
        """Split, register and plan."""
        super().prepare()
        for network in self.networks:
            self.plan_corpus("--network", network)
            self.parallel(self.plan_network, [(network,)])

    def settings_of_all(self) -> dict[str, Any]:
        names = ("budget", "pretrain", "finetune", "disable_tta")
        return {**{name: getattr(self.arguments, name) for name in names}, "networks": FINETUNE}

    def notes(self) -> dict[str, Any]:
        return {"extra": EXTRA}  # of single tasks, which may join later

    def plan_network(self, network: str, core: int) -> None:
        """The labelled set is planned like a checkpoint of one step, so that all arms of a network share the plan."""
        checkpoint = self.checkpoint(LIKE, PLANS[network], "plan")
        settings = ("--set", "pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "pretrain.validation_iterations=1")
        words = ("-p", PLANS[network], "--pretext", LIKE, "--run-name", "plan", *settings)
        self.pretrain_once(checkpoint, *words, core=core, log=f"plan_{network}")
        self.plan_like(LABELLED, checkpoint, STUDY_PLANS[network])

    def settings(self, pair: str) -> list[str]:
        """Settings of a pair's pretraining, but for its length and seed."""
        task = pair.partition(" on ")[0]
        return [*DEFAULTS, *self.arguments.pretrain, *EXTRA.get(task, ()), *EXTRA.get(pair, ())]

    def epochs(self, pair: str) -> tuple[int, int]:
        """Epochs, and steps per epoch, that the budget pays for."""
        values = dict(setting.split("=") for setting in self.settings(pair))
        per_epoch = int(values["pretrain.iterations_per_epoch"])
        return max(1, round(self.arguments.budget / self.costs[pair] / per_epoch)), per_epoch

    # Costs

    def measure_costs(self) -> None:
        """CPU seconds per step of all pairs that were not measured yet: the mean of several rounds of all of them."""
        pairs = [pair for pair in self.arguments.pairs if pair not in self.costs]
        self.measured: dict[str, list[float]] = {pair: [] for pair in pairs}
        self.parallel(self.measure, [(pair,) for _ in range(COST_ROUNDS) for pair in pairs])
        self.costs |= {pair: sum(values) / len(values) for pair, values in self.measured.items() if values}
        self.costs_file.write_text(json.dumps(self.costs, indent=1))
        for pair in self.arguments.pairs:
            if pair in self.costs:
                epochs, per_epoch = self.epochs(pair)
                print(f"{pair:32}{self.costs[pair]:8.3f} s per step{epochs * per_epoch:8} steps", flush=True)

    def measure(self, pair: str, core: int) -> None:
        """Measure a pair in a process of its own on one core."""
        given = [word for setting in ("pretrain",) for word in (f"--{setting}", *getattr(self.arguments, setting))]
        line = [sys.executable, "-m", "tests.benchmarks.pretext_pairs", "--data", str(self.data), "--work"]
        line += [str(self.folder), "--budget", str(self.arguments.budget), "--measure", pair, *given]
        log = f"cost_{pair.replace(' ', '_')}"
        try:
            self.process(line, log, core, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])})
        except subprocess.CalledProcessError:
            self.note(pair, f"its cost could not be measured, see logs/{log}.txt")
            return
        seconds = float((self.folder / "logs" / f"{log}.txt").read_text().splitlines()[-1])
        with self.lock:
            self.measured[pair].append(seconds)

    def measure_here(self, pair: str) -> float:
        """CPU seconds of a step with all that belongs to it (reading, augmentation, optimiser) in this process."""
        from mfm_nnunet import api
        from mfm_nnunet.engine.engine import Engine

        task, _, network = pair.partition(" on ")
        times: list[float] = []
        step = Engine.step

        def timed_step(engine: Engine, batch: Any, number: int) -> float:
            loss = step(engine, batch, number)
            times.append(time.process_time())
            return loss

        Engine.step = timed_step  # type: ignore[method-assign, assignment]
        run_name = f"cost{os.getpid()}"
        length = ["pretrain.epochs=1", f"pretrain.iterations_per_epoch={COST_WARMUP + COST_STEPS + 1}"]
        api.pretrain(
            "701", "3d_fullres", plans_name=PLANS[network], pretext=task, settings=[*self.settings(pair), *length],
            run_name=run_name, workspace=self.folder, device="cpu",
        )  # fmt: skip
        shutil.rmtree(self.checkpoint(task, PLANS[network], run_name).parent)
        return (times[-1] - times[COST_WARMUP]) / COST_STEPS

    # Cells

    def run_cells(self) -> None:
        """Scratch and all pairs of the first seed, then of the next."""
        scratch = [f"scratch {network}" for network in self.networks]
        pairs = [pair for pair in self.arguments.pairs if pair in self.costs]
        cells = [(arm, seed) for seed in range(self.arguments.seeds) for arm in scratch + pairs]
        for _ in range(2):  # what failed is tried once more
            self.parallel(self.run_cell, cells)

    def run_cell(self, arm: str, seed: int, core: int) -> None:
        """Pretrain, fine-tune, predict and score; a cell that fails is reported and the others go on."""
        if (self.cell(arm, seed) / "result.json").exists():
            return
        log, name = f"{arm.replace(' ', '_')}_{seed}", f"{arm}, seed {seed}"
        try:
            weights, steps = (None, 0) if arm.startswith("scratch") else self.pretrain_cell(arm, seed, core, log)
            self.finetune_once(
                self.cell(arm, seed), {"arm": arm, "seed": seed, "steps": steps}, dataset=LABELLED,
                plans=STUDY_PLANS[arm.split()[-1]], weights=weights, core=core, log=log,
                settings=FINETUNE.get(arm.split()[-1], ()),
                predict=("--disable_tta",) if self.arguments.disable_tta else (),
            )  # fmt: skip
        except subprocess.CalledProcessError:
            self.note(name, f"failed, see logs/{log}.txt")
            return
        with self.lock:
            self.failed.pop(name, None)
            self.summarise()

    def pretrain_cell(self, pair: str, seed: int, core: int, log: str) -> tuple[Path, int]:
        """The checkpoint of a pair, and its number of steps."""
        task, _, network = pair.partition(" on ")
        epochs, per_epoch = self.epochs(pair)
        settings = ("--set", *self.settings(pair), f"pretrain.epochs={epochs}", f"seed={seed}")
        words = ("-p", PLANS[network], "--pretext", task, "--run-name", f"seed{seed}", *settings)
        checkpoint = self.checkpoint(task, PLANS[network], f"seed{seed}")
        self.pretrain_once(checkpoint, *words, core=core, log=log)
        return checkpoint, epochs * per_epoch

    def note(self, name: str, failure: str) -> None:
        with self.lock:
            self.failed[name] = failure
        print(f"{name}: {failure}", flush=True)

    # The table

    def summarise(self) -> None:
        """``table.md`` and ``result.json`` of the arms that have finished cells."""
        rows = []
        for network in PLANS:
            scratch = self.results(f"scratch {network}")
            pairs = [pair for pair in all_pairs() if pair.endswith(f" on {network}")]
            compared = [compare(pair, self.results(pair), scratch) for pair in pairs if self.results(pair)]
            rows += [describe(f"scratch {network}", scratch)] if scratch else []
            rows += sorted(compared, key=lambda row: -row.get("difference", -1.0))
        correct_by_holm([row for row in rows if "p" in row])
        result = {"costs": self.costs, "arms": rows, "failed": self.failed, "test_cases": self.test}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        columns = [
            "arm",
            "steps",
            "seeds",
            *LABELS.values(),
            "mean",
            "against scratch",
            "bootstrap 95 %",
            "better",
            "p",
        ]
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        failed = [f"* {name}: {failure}" for name, failure in self.failed.items()]
        self.write_table([*lines, *map(format_row, rows), *(["", *failed] if failed else [])])

    def results(self, arm: str) -> dict[int, dict[str, Any]]:
        """The finished cells of an arm by seed."""
        files = {seed: self.cell(arm, seed) / "result.json" for seed in range(self.arguments.seeds)}
        return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def describe(arm: str, cells: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Dice per label and their mean: mean and standard deviation over the seeds' means over the test cases."""
    import numpy as np

    values = np.array([list(cell["dice"].values()) for cell in cells.values()])  # seeds, cases, labels
    values = np.concatenate([values, values.mean(2, keepdims=True)], axis=2)
    per_seed = values.mean(axis=1)
    spread = per_seed.std(0, ddof=1).tolist() if len(cells) > 1 else None
    steps = sorted({cell["steps"] for cell in cells.values()})
    seeds = {"seeds": list(cells), "per_seed": per_seed.tolist()}
    return {"arm": arm, "steps": steps, **seeds, "dice": per_seed.mean(0).tolist(), "sd": spread}


def compare(
    arm: str, cells: dict[int, dict[str, Any]], scratch: dict[int, dict[str, Any]]
) -> dict[str, Any]:  # fmt: skip
    """The arm, and its difference to scratch: each case averaged over the labels and the seeds that both have."""
    import numpy as np

    row, seeds = describe(arm, cells), [seed for seed in cells if seed in scratch]
    if not seeds:
        return row
    mine, theirs = (np.array([list(c[seed]["dice"].values()) for seed in seeds]).mean((0, 2)) for c in (cells, scratch))
    paired = compare_paired(mine, theirs)
    p = paired.pop("p")
    return {**row, **paired, "seeds_compared": seeds, "p": p}


def format_row(row: dict[str, Any]) -> str:
    spread = row["sd"] or [None] * len(row["dice"])
    dice = [f"{m:.4f}" + (f" ± {s:.4f}" if s is not None else "") for m, s in zip(row["dice"], spread)]
    cells = [row["arm"], ", ".join(map(str, row["steps"])), str(len(row["seeds"])), *dice]
    if "difference" in row:
        low, high = row["interval"]
        cells += [f"{row['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{row['better']} of {row['cases']}"]
        cells += [f"{row['p_holm']:.2g}"]
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
