"""Losses over several processes: two of B items each equal one of 2 B, in loss and gradients.

Two gloo processes run once for the whole file; each case below compares what they left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from mfm_nnunet.tasks.base import CropRequest, PretextTask
from mfm_nnunet.tasks.losses import gather_batch, nt_xent, soft_dice
from tests.builders.tasks import make_item, make_task, stack
from tests.builders.tiny_plans import NETWORKS

PATCH = (16, 16, 16)
ITEMS = 4
TASKS = [
    ("volume_fusion", "resenc", "variant=grid"),
    ("volume_fusion", "primus", "variant=two_image"),
    ("simclr", "resenc", "projector_width=32"),
    ("voco", "primus", "projector_width=32"),
    ("swin_unetr", "resenc", "heads=token"),
]
Result = dict[str, Any]


def test_alone_the_batch_is_the_batch() -> None:
    rows = torch.randn(3, 2, 5)
    assert gather_batch(rows) is rows


class Rows(nn.Module):
    """Losses of plain numbers: a table of weights is the input, so that its gradient is checked itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.scale = nn.Parameter(torch.randn(6))
        self.classes = nn.Parameter(torch.randn(3))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        first, second = (gather_batch(batch[name] * self.scale) for name in ("first", "second"))
        logits = batch["logits"] * self.classes[:, None]
        return nt_xent(first, second, 0.3) + 1 - soft_dice(logits, batch["labels"], over_batch=True)


def rows_batch() -> dict[str, Tensor]:
    """Classes are spread unevenly over the items, so that means of the processes' Dice are not the batch's."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.zeros(ITEMS, 10, dtype=torch.long)
    labels[0], labels[1, :3] = 1, 2
    shapes = {"first": (ITEMS, 6), "second": (ITEMS, 6), "logits": (ITEMS, 3, 10)}
    numbers = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**numbers, "labels": labels}


def task_of(name: str, family: str, setting: str) -> PretextTask:
    return make_task(name, family, PATCH, settings=[setting], **NETWORKS[family].deterministic).train()


def task_batch(task: PretextTask) -> dict[str, Tensor]:
    transform = task.transform(task.config, PATCH)
    items = []
    for index in range(ITEMS):
        # Structure of another size in each item: white noise would give all of them nearly one embedding.
        def read(request: CropRequest, channels: int, rng: np.random.Generator, index: int = index) -> np.ndarray:
            waves = rng.normal(0, 0.2 + index, (channels, *request.size))
            return np.cumsum(waves, axis=1 + index % 3).astype(np.float32)

        items.append(make_item(transform, 1, np.random.default_rng(index), read))
    return stack(items)


def step(module: nn.Module, batch: dict[str, Tensor]) -> Result:
    """Loss and gradients of the items of this process, as DistributedDataParallel leaves them."""
    if dist.is_initialized():
        batch = {name: rows[dist.get_rank() :: dist.get_world_size()] for name, rows in batch.items()}
        module = nn.parallel.DistributedDataParallel(module)
    output = module(batch)
    loss = getattr(output, "loss", output)
    loss.backward()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    inner = getattr(module, "module", module)
    return {"loss": total, **{name: w.grad for name, w in inner.named_parameters() if w.requires_grad}}


def all_results() -> dict[str, Result]:
    torch.set_num_threads(1)
    results = {"rows": step(Rows(), rows_batch())}
    for names in TASKS:
        task = task_of(*names)
        results[" ".join(names)] = step(task, task_batch(task))
    return results


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    everything = torch.arange(2.0) + 10 * rank
    results = all_results()
    results["order"] = {"rows": gather_batch(everything[:, None])}
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> dict[str, Result]:
    return all_results()


def test_rows_come_in_the_order_of_the_ranks(two: list[dict[str, Result]]) -> None:
    for results in two:
        assert results["order"]["rows"].flatten().tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("name", ["rows", *(" ".join(names) for names in TASKS)])
def test_two_processes_equal_one_with_the_double_batch(
    name: str, one: dict[str, Result], two: list[dict[str, Result]]
) -> None:
    expected = one[name]
    largest = max(float(value.abs().max()) for key, value in expected.items() if key != "loss")
    assert largest > 1e-3, "there is no gradient to compare"
    for results in two:
        assert results[name].keys() == expected.keys()
        for key, value in expected.items():
            difference = float((results[name][key] - value).abs().max())
            assert difference < 1e-5 * max(1.0, float(value.abs().max())), f"{key} differs by {difference}"


def test_the_mean_of_the_parts_is_another_loss(one: dict[str, Result]) -> None:
    """Else the test above would hold without any gathering."""
    batch = rows_batch()
    parts = [step(Rows(), {name: rows[rank::2] for name, rows in batch.items()})["loss"] for rank in range(2)]
    assert abs(sum(parts) / 2 - one["rows"]["loss"]) > 0.1
    task = task_of(*TASKS[0])
    whole = task_batch(task)
    parts = [task({name: rows[rank::2] for name, rows in whole.items()}).loss.detach() for rank in range(2)]
    assert abs(sum(parts) / 2 - task(whole).loss.detach()) > 1e-4
