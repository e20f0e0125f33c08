"""Estimate the memory of a training step without running one.

The network runs once on PyTorch's meta device, where tensors have shapes but no values, so nothing is allocated or
computed. The tensors that autograd keeps for the backward pass are counted. This works for any network that a plan can
build. ``tests/benchmarks/memory_estimate.py`` compares the estimate with real steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

OPTIMIZER_COPIES = {"sgd": 1, "adamw": 2}
"""Values per weight that an optimizer keeps: momentum; first and second moment."""

WORKING_TENSORS = 2
"""Size of the backward buffers in units of the largest kept tensor: its gradient and a reordered copy."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a training step by part, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors kept by autograd for the backward pass, including input and outputs."""
    working: int
    """Buffers of the backward pass: gradients between operations, reordered copies."""

    @property
    def total(self) -> int:
        """Total memory that a device must have free."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def estimate_training_memory(
    network: nn.Module, input_shape_BCDHW: Sequence[int], optimizer: Literal["sgd", "adamw"], half: bool = False
) -> MemoryEstimate:
    """Estimate the memory that one training step of ``network`` takes, including backward buffers.

    ``input_shape_BCDHW`` is (B, C, D, H, W), or (B, C, H, W) in 2D. ``half`` estimates mixed precision: activations
    of 2 bytes, plus a 2-byte copy of the weights. The network may be on any device and is not changed. The estimate is
    for train mode.
    """
    ghost = _meta_copy(network).train()
    parameters = list(ghost.parameters())
    trained = _num_bytes(p for p in parameters if p.requires_grad)
    own = {_storage(t) for t in [*parameters, *ghost.buffers()]}
    kept: list[Tensor] = [torch.empty(tuple(input_shape_BCDHW), device="meta")]

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = ghost(kept[0])
    kept += _tensors_in(output)
    activations = _storage_bytes((t for t in kept if _storage(t) not in own), half)
    return MemoryEstimate(
        weights=_num_bytes([*parameters, *ghost.buffers()]) + (_num_bytes(parameters, half=True) if half else 0),
        gradients=trained,
        optimizer=trained * OPTIMIZER_COPIES[optimizer],
        activations=sum(activations.values()),
        working=WORKING_TENSORS * max(activations.values()),
    )


def num_parameters(network: nn.Module) -> int:
    """Count the parameters of ``network``, each once (nnU-Net's modules register some under several names)."""
    return sum(p.numel() for p in network.parameters())


class _FusedAttention(TorchFunctionMode):
    """Use the fused attention of CPUs and GPUs on the meta device.

    There PyTorch falls back to the textbook formula, which keeps the T x T attention matrix of every head. Fused
    kernels keep only inputs, output and one number per row. The CPU's fused kernel has a meta version, so it is called
    directly.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            query, key, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return func(*args, **kwargs)


def _meta_copy(network: nn.Module) -> nn.Module:
    """Copy the modules with meta tensors. The memo keeps ``deepcopy`` from copying the weights."""
    memo: dict[int, Any] = {}
    for tensor in [*network.parameters(), *network.buffers()]:
        ghost = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost
    return copy.deepcopy(network, memo)


def _storage(tensor: Tensor) -> int:
    # data_ptr() is 0 for every meta tensor, so the address of the storage object identifies it while it is alive.
    return tensor.untyped_storage()._cdata


def _num_bytes(tensors: Iterable[Tensor], half: bool = False) -> int:
    """Sum the bytes of distinct storages; with ``half``, floating-point values take 2 bytes each."""
    return sum(_storage_bytes(tensors, half).values())


def _storage_bytes(tensors: Iterable[Tensor], half: bool) -> dict[int, int]:
    """Return bytes by storage. The caller must keep ``tensors`` alive, or addresses are reused."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        size = tensor.untyped_storage().nbytes()
        shrink = half and tensor.is_floating_point() and tensor.element_size() > 2
        sizes[_storage(tensor)] = size * 2 // tensor.element_size() if shrink else size
    return sizes


def _tensors_in(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors_in(item)]
