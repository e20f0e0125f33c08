"""The embeddings of all processes, for losses that compare each item with every other one.

Under torchrun each process holds a part of the batch. With the rows of all, each computes the loss of the whole batch,
and the mean of the gradients over the processes, which DistributedDataParallel takes, is the whole batch's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_batch(x_BE: Tensor) -> Tensor:
    """The rows of all processes (each has equally many) in the order of the ranks; in a single one ``x_BE`` itself."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x_BE
    return _Gather.apply(x_BE)


def is_first_process() -> bool:
    """Whether this process is the one that talks: the only one, or that of rank 0."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class _Gather(torch.autograd.Function):
    """dist.all_gather with a gradient: what the processes' losses ask of this process's rows is added up."""

    @staticmethod
    def forward(context: Any, x_BE: Tensor) -> Tensor:
        parts = [torch.empty_like(x_BE) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_BE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]
