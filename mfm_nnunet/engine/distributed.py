"""Rank, world size and reductions under torchrun; with one process all of this is trivial."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mfm_nnunet.errors import MFMError


@dataclass(frozen=True)
class World:
    """Who this process is among how many."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


ALONE = World()


def join_world(device: torch.device) -> World:
    """Join the process group that torchrun announced in the environment; alone without one."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


def leave_world(world: World) -> None:
    """Leave the process group again; whoever wrapped a module for it must have let go of that before."""
    if world.size > 1 and dist.is_initialized():
        # A wrapper left in a reference cycle keeps the group's threads beyond the interpreter's end, which aborts.
        gc.collect()
        dist.destroy_process_group()


def mean(value: torch.Tensor, world: World) -> torch.Tensor:
    """The mean of ``value`` over all processes."""
    if world.size == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world.size


def require_divisible(batch_size: int, accumulation: int, num_processes: int) -> None:
    """Raise MFMError (E_CONFIG) unless each part of a batch has equally many items, at least one, in each process."""
    if accumulation < 1 or batch_size < 1 or batch_size % (accumulation * num_processes):
        raise MFMError(
            "E_CONFIG",
            f"pretrain.batch_size={batch_size}: must be a multiple of pretrain.accumulation={accumulation} x the "
            f"{num_processes} process{'es' * (num_processes > 1)}, for parts of equal size. Change one of them.",
        )


def any_true(flag: bool, world: World, device: torch.device) -> bool:
    """Return whether ``flag`` is true in any process, so that all processes decide alike."""
    return bool(largest(int(flag), world, device))


def largest(value: int, world: World, device: torch.device) -> int:
    """Return the largest ``value`` of all processes."""
    if world.size == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def gather(values: torch.Tensor, world: World) -> torch.Tensor:
    """Join the values of all processes along the first axis; each has equally many."""
    if world.size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world.size)]
    dist.all_gather(parts, values)
    return torch.cat(parts)
