"""The memory estimate against sums done by hand; ``test_families.py`` compares it with what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mfm_nnunet.models.memory import estimate_training_memory, num_parameters
from tests.builders.tiny_plans import tiny_network

PATCH = (16, 24, 16)


def test_the_parts_of_a_single_layer() -> None:
    layer = nn.Linear(10, 20)
    weights = (10 * 20 + 20) * 4
    estimate = estimate_training_memory(layer, (8, 10), "sgd")
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (weights, weights, weights)
    assert estimate.activations == (8 * 10 + 8 * 20) * 4  # input and output
    assert estimate.working == 2 * 8 * 20 * 4
    assert estimate.total == 3 * weights + 960 + 1280
    assert estimate_training_memory(layer, (8, 10), "adamw").optimizer == 2 * weights
    half = estimate_training_memory(layer, (8, 10), "sgd", half=True)  # and a copy of the weights
    assert half.activations * 2 == estimate.activations
    assert half.weights * 2 == estimate.weights * 3
    assert half.optimizer == estimate.optimizer


def test_frozen_weights_need_neither_gradient_nor_optimizer_state() -> None:
    network = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    network[0].requires_grad_(False)
    estimate = estimate_training_memory(network, (8, 10), "adamw")
    assert estimate.gradients * 2 == estimate.weights
    assert estimate.optimizer == estimate.weights


def test_memory_grows_with_batch_and_patch() -> None:
    network = tiny_network("resenc", PATCH)
    small, batch, patch = (
        estimate_training_memory(network, shape, "sgd").activations
        for shape in ((1, 1, 16, 16, 16), (4, 1, 16, 16, 16), (1, 1, 32, 32, 16))
    )
    assert batch == pytest.approx(4 * small, rel=1e-3)
    assert patch == pytest.approx(4 * small, rel=1e-2)


def test_attention_does_not_keep_its_square_matrix() -> None:
    small, large = (
        estimate_training_memory(tiny_network("primus", patch), (1, 1, *patch), "adamw").activations
        for patch in ((32, 32, 32), (64, 64, 64))
    )
    assert large == pytest.approx(8 * small, rel=1e-2)  # 8 times the tokens; the matrix would be 64 times as large


def test_tensors_with_two_names_count_once() -> None:
    network = tiny_network("resenc", PATCH)
    state = network.state_dict()
    assert len(state) > len(list(network.parameters()))
    assert num_parameters(network) < sum(t.numel() for t in state.values())
    assert estimate_training_memory(network, (1, 1, *PATCH), "sgd").weights == 4 * num_parameters(network)


def test_the_network_is_left_alone_and_needs_no_memory() -> None:
    network = tiny_network("primus", PATCH).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    estimate = estimate_training_memory(network, (2, 1, *PATCH), "adamw")
    assert not network.training
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    with torch.device("meta"):
        ghost = tiny_network("primus", PATCH)
    assert estimate_training_memory(ghost, (2, 1, *PATCH), "adamw") == estimate
