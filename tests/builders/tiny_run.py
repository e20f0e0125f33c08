"""A whole pretraining run that takes seconds: six small volumes, a plan, the engine; as a script it can be killed.

python -m tests.builders.tiny_run FOLDER TASK NETWORK [--c] [NAME=VALUE ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch

from mfm_nnunet import checkpoint, workspace
from mfm_nnunet.jobs.pretrain import pretrain_here
from mfm_nnunet.requests import PretrainRequest
from mfm_nnunet.workspace import Workspace
from tests.builders import tiny
from tests.builders.tiny_plans import NETWORKS

NAME = "Dataset700_Tiny"
CONFIGURATION = "3d_fullres"
SETTINGS = ("pretrain.epochs=3", "pretrain.iterations_per_epoch=6", "pretrain.validation_iterations=1",
            "pretrain.validation_fraction=0.3")  # fmt: skip


def prepare(folder: Path, network: str = "resenc", num_cases: int = 6) -> Workspace:
    """Preprocessed volumes and a plan, as planning and preprocessing leave them."""
    with workspace.use(folder) as here:
        data = here.preprocessed / NAME / "mfm_tiny"
        data.mkdir(parents=True, exist_ok=True)
        architecture = NETWORKS[network].architecture((16, 16, 16))
        plans = tiny.plans(**{CONFIGURATION: tiny.configuration(architecture)})
        plans |= {"dataset_name": NAME, "mfm": {"pretrain": {"epochs": 3}}}
        file = data.parent / "mfmPlans.json"
        if (
            not file.exists()
        ):  # two processes of one run may be here at once, and one must not read what the other writes
            file.write_text(json.dumps(plans))
        for case in range(num_cases):
            volume = np.random.default_rng(case).normal(size=(1, 20, 18, 24)).astype(np.float32)
            volume = np.cumsum(volume, axis=1) / 4
            file = data / f"case{case}.b2nd"
            if not file.exists():
                blosc2.asarray(volume, urlpath=str(file))
    return here


def run(here: Workspace, task: str = "mae", settings: tuple[str, ...] = (), **changes: Any) -> Path:
    return pretrain_here(here, request(task, settings, **changes))


def request(task: str = "mae", settings: tuple[str, ...] = (), **changes: Any) -> PretrainRequest:
    """The request of a tiny run."""
    options = {"pretext": task, "settings": (*SETTINGS, *settings), "device": "cpu", **changes}
    return PretrainRequest(options.pop("dataset", NAME), options.pop("configuration", CONFIGURATION), **options)


def run_folder(folder: Path, task: str = "mae") -> Path:
    return folder / "nnUNet_results" / NAME / f"mfm_pretrain__{task}__mfmPlans__3d_fullres"


def weights(file: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_weights(file)["network_weights"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    folder, task, network, *rest = sys.argv[1:]
    run(
        prepare(Path(folder), network),
        task,
        tuple(word for word in rest if "=" in word),
        continue_training="--c" in rest,
    )
