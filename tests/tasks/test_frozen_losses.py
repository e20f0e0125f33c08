"""Seeded losses of every task on every built-in family, written down: a refactor may not move them.

``python -m tests.tasks.test_frozen_losses`` adds those of new tasks and families. A deliberate change renews the named
ones in the same commit: ``python -m tests.tasks.test_frozen_losses "mae primus"``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_nnunet.tasks.base import find_task, list_tasks
from tests.builders.tiny_plans import NETWORKS, tiny_backbone

FILE = Path(__file__).parent / "frozen_losses.json"
CASES = [f"{task.name} {family}" for task in list_tasks() for family in task.backbones]


def losses(case: str) -> list[float]:
    """The losses of three SGD steps on three batches of two items."""
    name, family = case.split()
    tiny = NETWORKS[family]
    torch.set_num_threads(1)
    task_class = find_task(name)
    config = task_class.Config()
    outputs = task_class.num_outputs(config, 1)
    backbone = tiny_backbone(family, tiny.uneven, 1, outputs, restoring=task_class.restoring, **tiny.deterministic)
    config = task_class.resolve(config, backbone.geometry())
    task, transform = task_class(config, backbone).train(), task_class.transform(config, tiny.uneven)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.01)
    rng = np.random.default_rng(7)
    values = []
    for _ in range(3):
        items = []
        for _ in range(2):
            crops = [
                np.cumsum(rng.normal(size=(1, *r.size)), axis=1).astype(np.float32) for r in transform.requests(rng)
            ]
            items.append(transform(crops, rng))
        batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}
        loss = task(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(round(loss.item(), 6))
    return values


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_written_down(case: str) -> None:
    # Processors order sums differently; a change of the method moves the losses far more than this.
    assert losses(case) == pytest.approx(json.loads(FILE.read_text())[case], rel=2e-3)


def test_every_task_is_written_down() -> None:
    assert sorted(json.loads(FILE.read_text())) == sorted(CASES)


if __name__ == "__main__":
    known = {case: values for case, values in json.loads(FILE.read_text()).items() if case not in sys.argv[1:]}
    FILE.write_text(json.dumps({case: known.get(case) or losses(case) for case in CASES}, indent=1) + "\n")
