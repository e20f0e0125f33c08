"""The memory estimate against what autograd really keeps, and against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mfm_nnunet.models.memory import estimate_training_memory, num_parameters, training_memory_bytes
from mfm_nnunet.models.networks import build_network
from tests.benchmarks.memory_estimate import primus_architecture, resenc_architecture

NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "resenc 3D": (resenc_architecture(8, 32, (1, 2, 2), 3), (16, 24, 16)),
    "resenc 2D": (resenc_architecture(8, 32, (1, 2, 2), 2), (32, 48)),
    "primus 3D": (primus_architecture("CPU", (16, 24, 32)), (16, 24, 32)),
    "primus 2D": (primus_architecture("CPU", (32, 48)), (32, 48)),
}


def build(name: str, deep_supervision: bool = False) -> nn.Module:
    """One of NETWORKS with two inputs and three outputs."""
    architecture, patch = NETWORKS[name]
    plans = {"configurations": {"only": {"patch_size": list(patch), "architecture": architecture}}}
    return build_network(plans, "only", 2, 3, deep_supervision)


def really_kept(network: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct memory that autograd keeps in a real forward pass, weights and buffers excluded."""
    kept = [x]
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = network(x)
    kept += [output] if isinstance(output, torch.Tensor) else output
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_activations_are_what_autograd_keeps(name: str, deep_supervision: bool) -> None:
    network = build(name, deep_supervision).train()
    shape = (2, 2, *NETWORKS[name][1])
    estimate = estimate_training_memory(network, shape, "sgd")
    assert estimate.activations == pytest.approx(really_kept(network, torch.randn(shape)), rel=0.02)


def test_the_parts_of_a_single_layer() -> None:
    layer = nn.Linear(10, 20)
    weights = (10 * 20 + 20) * 4
    estimate = estimate_training_memory(layer, (8, 10), "sgd")
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (weights, weights, weights)
    assert estimate.activations == (8 * 10 + 8 * 20) * 4  # input and output
    assert estimate.working == 2 * 8 * 20 * 4
    assert training_memory_bytes(layer, (8, 10), "sgd") == estimate.total == 3 * weights + 960 + 1280
    assert estimate_training_memory(layer, (8, 10), "adamw").optimizer == 2 * weights


def test_half_precision_halves_activations_and_adds_a_copy_of_the_weights() -> None:
    full = estimate_training_memory(nn.Linear(10, 20), (8, 10), "sgd")
    half = estimate_training_memory(nn.Linear(10, 20), (8, 10), "sgd", half=True)
    assert half.activations * 2 == full.activations
    assert half.weights * 2 == full.weights * 3
    assert half.optimizer == full.optimizer


def test_frozen_weights_need_neither_gradient_nor_optimizer_state() -> None:
    network = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    network[0].requires_grad_(False)
    estimate = estimate_training_memory(network, (8, 10), "adamw")
    assert estimate.gradients * 2 == estimate.weights
    assert estimate.optimizer == estimate.weights


def test_memory_grows_with_batch_and_patch() -> None:
    network = build("resenc 3D")
    small, batch, patch = (
        estimate_training_memory(network, shape, "sgd").activations
        for shape in ((1, 2, 16, 16, 16), (4, 2, 16, 16, 16), (1, 2, 32, 32, 16))
    )
    assert batch == pytest.approx(4 * small, rel=1e-3)
    assert patch == pytest.approx(4 * small, rel=1e-2)


def test_attention_does_not_keep_its_square_matrix() -> None:
    small, large = (
        estimate_training_memory(_primus_of(patch), (1, 1, *patch), "adamw").activations
        for patch in ((32, 32, 32), (64, 64, 64))
    )
    assert large == pytest.approx(8 * small, rel=1e-2)  # 8 times the tokens; the matrix would be 64 times as large


def test_tensors_with_two_names_count_once() -> None:
    network = build("resenc 3D")
    state = network.state_dict()
    assert len(state) > len(list(network.parameters()))
    assert num_parameters(network) < sum(t.numel() for t in state.values())
    assert estimate_training_memory(network, (1, 2, 16, 24, 16), "sgd").weights == 4 * num_parameters(network)


def test_the_network_is_left_alone() -> None:
    network = build("primus 3D").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    training_memory_bytes(network, (2, 2, 16, 24, 32), "adamw")
    assert not network.training
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_network_without_memory_can_be_estimated() -> None:
    with torch.device("meta"):
        network = build("resenc 2D")
    estimate = training_memory_bytes(network, (2, 2, 32, 48), "sgd")
    assert estimate == training_memory_bytes(build("resenc 2D"), (2, 2, 32, 48), "sgd")


def _primus_of(patch: tuple[int, ...]) -> nn.Module:
    architecture = primus_architecture("CPU", patch)
    plans = {"configurations": {"only": {"patch_size": list(patch), "architecture": architecture}}}
    with torch.device("meta"):
        return build_network(plans, "only", 1, 1)
