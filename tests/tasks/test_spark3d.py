"""SparK: nothing hidden leaks, the network stays the plain one, norms count what is visible, masks fit every stride.

The faults of the published code are tests here: an image that is not masked itself, layers doubled by the conversion,
a mask shared by all models, counts of the first sample for all, empty masks with anisotropic strides.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of
from mfm_nnunet.tasks.masks import MaskingConfig, draw_hidden
from mfm_nnunet.tasks.spark3d import Densify, SparK, masked_instance_norm, shrink_hidden
from tests.builders.tiny_plans import tiny_backbone, tiny_network

PATCH, CELL = (16, 24, 16), (4, 6, 4)
FLAT = {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
"""A network for thick slices: the first axis is pooled later than the others."""
SHAPES = [
    pytest.param(PATCH, CELL, {}, id="3D"),
    pytest.param((24, 32), (6, 8), {}, id="2D"),
    pytest.param((20, 28, 20), (5, 7, 5), {}, id="cells across places"),
    pytest.param((16, 16, 16), (2, 2, 2), {}, id="cells finer than places"),
    pytest.param((8, 32, 32), (2, 8, 8), FLAT, id="anisotropic"),
]


def spark(
    patch: tuple[int, ...] = PATCH, cell: tuple[int, ...] = CELL, channels: int = 1, seed: int = 0, **changes: Any
) -> SparK:
    """The task on a tiny network of three stages, in which no weight is 0, 1 or another's."""
    backbone = tiny_backbone("resenc", patch, channels, channels, **changes)
    config = SparK.resolve(MaskingConfig(cell_size=cell), backbone.geometry())
    task = SparK(config, backbone)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in task.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return task


def masks(patch: tuple[int, ...], cell: tuple[int, ...], ratios: tuple[float, ...] = (0.75, 0.5)) -> Tensor:
    drawn = [draw_hidden(patch, cell, ratio, np.random.default_rng(i)) for i, ratio in enumerate(ratios)]
    return torch.from_numpy(np.stack(drawn))


def batch_of(task: SparK, seed: int = 1, channels: int = 1) -> dict[str, Tensor]:
    assert task.config.cell_size
    patch = task.backbone.patch_size
    image = torch.randn(2, channels, *patch, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "hidden": masks(patch, task.config.cell_size)}


def gradients(task: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in task.named_parameters() if weight.grad is not None}


# What is hidden


@pytest.mark.parametrize(("patch", "cell", "changes"), SHAPES)
def test_what_is_hidden_has_no_influence_at_all(
    patch: tuple[int, ...], cell: tuple[int, ...], changes: dict[str, Any]
) -> None:
    task = spark(patch, cell, 2, **changes).eval()
    batch = batch_of(task, channels=2)
    x, hidden = batch["image"], batch["hidden"]
    with torch.no_grad():
        restored = task.restore(x, hidden)
        for lie in (100 * torch.randn_like(x), torch.full_like(x, torch.nan)):
            assert torch.equal(task.restore(torch.where(hidden, lie, x), hidden), restored)
        seen = torch.where(hidden, x, x + 0.1)
        assert (task.restore(seen, hidden) - restored).abs().max() > 1e-4


@pytest.mark.parametrize(("patch", "cell", "changes"), SHAPES)
def test_every_feature_map_is_empty_where_nothing_is_visible(
    patch: tuple[int, ...], cell: tuple[int, ...], changes: dict[str, Any]
) -> None:
    task = spark(patch, cell, **changes)
    encoder: Any = task.backbone.network.encoder
    found: list[Tensor] = []
    watched = [m for m in encoder.modules() if m is not encoder and not isinstance(m, nn.LeakyReLU)]
    for module in watched:
        module.register_forward_hook(lambda module, inputs, output: found.append(output.clone()))
    batch = batch_of(task)
    maps = task._encode(batch["image"], batch["hidden"])
    assert len(found) == len(watched) - 1  # the list of the stages is not called itself
    for output in (*found, *maps):
        inactive = task._encode.inactive(tuple(output.shape[2:]))
        assert inactive.shape == (2, 1, *output.shape[2:])
        assert (output.masked_select(inactive) == 0).all()
        assert (output.masked_select(~inactive) != 0).float().mean() > 0.9
    assert task._encode.inactive(maps[0].shape[2:]).any()


def test_the_fill_value_is_what_visible_voxels_see_beside_them() -> None:
    task = spark()
    batch = batch_of(task)
    before = task.restore(batch["image"], batch["hidden"])
    task.config = MaskingConfig(cell_size=CELL, fill_value=-2.0)
    assert not torch.equal(task.restore(batch["image"], batch["hidden"]), before)


@pytest.mark.parametrize(
    ("patch", "cell", "size"),
    [
        ((8, 8, 8), (2, 2, 2), (8, 8, 8)),
        ((8, 8, 8), (2, 2, 2), (2, 2, 2)),
        ((8, 16, 16), (2, 4, 4), (8, 4, 4)),
        # Coarser than the cells on the first axis only, and on the others only.
        ((8, 16, 16), (2, 8, 8), (2, 8, 8)),
        ((8, 16, 16), (4, 2, 2), (4, 2, 2)),
        ((12, 20), (5, 3), (6, 5)),
    ],
)
def test_a_place_is_active_if_any_voxel_under_it_is_visible(
    patch: tuple[int, ...], cell: tuple[int, ...], size: tuple[int, ...]
) -> None:
    hidden = masks(patch, cell, (0.9, 0.75, 0.5))
    inactive = shrink_hidden(hidden, size)
    steps = [whole // part for whole, part in zip(patch, size)]
    for sample, *place in itertools.product(range(3), *map(range, size)):
        under = tuple(slice(i * step, (i + 1) * step) for i, step in zip(place, steps))
        assert inactive[(sample, 0, *place)] == hidden[(sample, 0, *under)].all()
    assert not inactive.flatten(1).all(1).any()


# Norm and densification


def test_the_norm_is_that_of_the_gathered_voxels() -> None:
    x = torch.randn(3, 4, *PATCH) * 5 + 20
    hidden = masks(PATCH, CELL, (0.9, 0.75, 0.25))
    weight, bias = torch.randn(4), torch.randn(4)
    normed = masked_instance_norm(torch.where(hidden, torch.nan, x), hidden, weight, bias)
    assert len(set(hidden.flatten(1).sum(1).tolist())) == 3
    for sample in range(3):
        gathered = x[sample][(~hidden[sample]).expand(4, *PATCH)].reshape(1, 4, -1)
        wanted = nn.functional.instance_norm(gathered, weight=weight, bias=bias)
        found = normed[sample][(~hidden[sample]).expand(4, *PATCH)].reshape(1, 4, -1)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (normed.masked_select(hidden) == 0).all()
    low = (x + 100).to(torch.float16)  # computed in float32 whatever comes in
    normed = masked_instance_norm(low, hidden)
    assert normed.dtype == torch.float16
    torch.testing.assert_close(normed.float(), masked_instance_norm(low.float(), hidden), rtol=2e-3, atol=2e-3)


def test_the_gradient_of_the_norm_is_that_of_the_gathered_voxels() -> None:
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    hidden = masks((4, 6), (2, 2), (0.5,))
    upstream = torch.randn_like(x)
    (found,) = torch.autograd.grad((masked_instance_norm(x, hidden) * upstream).sum(), x)
    visible = (~hidden).expand_as(x)
    gathered = nn.functional.instance_norm(x[visible].reshape(1, 2, -1)).flatten()
    (wanted,) = torch.autograd.grad((gathered * upstream[visible]).sum(), x)
    torch.testing.assert_close(found, wanted)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without data know no values, so a mask that is read, or an index made of it, is an error."""
    with torch.device("meta"):
        hidden = torch.zeros(2, 1, *PATCH, dtype=torch.bool)
        x = torch.zeros(2, 1, *PATCH)
    task = spark().to("meta")
    assert task.restore(x, hidden).shape == x.shape


def test_hidden_places_become_the_mask_token_and_coarser_maps_are_convolved() -> None:
    task = spark().eval()
    finest, *coarser = task.densify
    assert isinstance(finest.convolution, nn.Identity)
    assert [m.convolution.kernel_size for m in coarser] == [(3, 3, 3)] * 2
    assert [tuple(m.mask_token.shape) for m in task.densify] == [(1, width, 1, 1, 1) for width in (8, 16, 16)]
    hidden = masks(PATCH, CELL)
    x = torch.randn(2, 8, *PATCH)
    dense = finest(x, hidden)
    token = finest.mask_token.expand_as(dense)
    assert torch.equal(dense.masked_select(hidden), token.masked_select(hidden))
    assert torch.equal(dense.masked_select(~hidden), masked_instance_norm(x, hidden).masked_select(~hidden))
    fresh = Densify(5000, 2, has_convolution=False).mask_token
    assert fresh.shape == (1, 5000, 1, 1)
    assert (fresh.mean().item(), fresh.std().item()) == pytest.approx((0, 0.02), abs=1e-3)


# The network stays what it is


def test_the_network_is_the_plain_one_after_a_training_step() -> None:
    plain: Any = tiny_network("resenc", PATCH, num_outputs=1)
    task = spark()
    optimizer = torch.optim.SGD([w for w in task.parameters() if w.requires_grad], 0.01)
    before = {name: value.clone() for name, value in task.backbone.network.state_dict().items()}
    task(batch_of(task)).loss.backward()
    optimizer.step()
    network: Any = task.backbone.network
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [type(m) for m in network.modules()] == [type(m) for m in plain.modules()]
    blocks = [module for module in network.encoder.modules() if hasattr(module, "all_modules")]
    assert blocks
    for block in blocks:
        assert block.conv is block.all_modules[0]
        assert block.norm is block.all_modules[1]
    after = network.state_dict()
    for name in family_of(network).encoder_names(network):
        # The bias of a convolution before a norm has no effect, so it has no gradient either.
        assert "conv.bias" in name or not torch.equal(after[name], before[name]), name
    # The task's own weights are trained and resumed, but are none of the network's.
    own = [name for name, _ in task.named_parameters() if not name.startswith("backbone.")]
    assert {name.split(".")[0] for name in own} == {"densify"}
    assert not [name for name in task.state_dict() if not name.startswith(("backbone.network.", "densify."))]


@pytest.mark.parametrize(("patch", "cell", "changes"), SHAPES)
def test_with_everything_visible_the_encoder_is_the_plain_one(
    patch: tuple[int, ...], cell: tuple[int, ...], changes: dict[str, Any]
) -> None:
    task = spark(patch, cell, **changes)
    x = batch_of(task)["image"]
    with torch.no_grad():
        sparse = task._encode(x, torch.zeros(2, 1, *patch, dtype=torch.bool))
        dense = task.backbone.features(x)
    for one, other in zip(sparse, dense):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_outside_of_the_task_the_network_is_dense() -> None:
    task = spark().eval()
    plain = tiny_network("resenc", PATCH, num_outputs=1).eval()
    plain.load_state_dict(task.backbone.network.state_dict())
    batch = batch_of(task)
    with torch.no_grad():
        task(batch)
        wanted = plain(batch["image"])
        assert torch.equal(task.backbone(batch["image"]), wanted)
        assert torch.equal(copy.deepcopy(task.backbone.network)(batch["image"]), wanted)
        with pytest.raises(AssertionError, match="not a sparse one"):
            task._encode.inactive(PATCH)


def test_tasks_do_not_disturb_each_other_nor_their_copies() -> None:
    one, other = spark(seed=1), spark(seed=2)
    batch = batch_of(one)
    swapped = {**batch, "hidden": batch["hidden"].flip(0)}
    alone = one(batch).loss
    alone.backward()
    wanted = gradients(one)
    one.zero_grad()
    loss = one(batch).loss
    other(swapped).loss.backward()
    loss.backward()
    assert torch.equal(loss, alone)
    assert all(torch.equal(value, wanted[name]) for name, value in gradients(one).items())
    # Two tasks on one network as well: each sees its own mask.
    both = SparK(one.config, one.backbone)
    both.densify.load_state_dict(one.densify.state_dict())
    assert torch.equal(both(batch).loss, alone)
    assert torch.equal(one(batch).loss, alone)
    twin = copy.deepcopy(one)
    one(swapped)
    assert torch.equal(twin(batch).loss, alone)
    twin.load_state_dict(other.state_dict())
    assert torch.equal(twin(batch).loss, other(batch).loss)
    assert torch.equal(one(batch).loss, alone)


def test_layers_can_be_traced_whole_and_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **words: compile_(self, backend="eager", **words))
    task = spark()
    batch = batch_of(task)
    other = {**batch, "hidden": batch["hidden"].flip(0)}
    wanted = task(batch).loss, task(other).loss
    wanted[1].backward()
    gradient = gradients(task)
    task.zero_grad()
    task.backbone.recompute_activations()
    task.backbone.compile_blocks()
    found = task(batch).loss, task(other).loss
    found[1].backward()
    assert [loss.item() for loss in found] == pytest.approx([loss.item() for loss in wanted], rel=1e-6)
    for name, value in gradients(task).items():
        torch.testing.assert_close(value, gradient[name], rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


# Settings, items and loss


def test_networks_that_cannot_work_sparsely_are_refused() -> None:
    config = MaskingConfig(cell_size=CELL)
    with pytest.raises(MFMError, match=r"E_CONFIG.*BatchNorm3d"):
        SparK(config, tiny_backbone("resenc", PATCH, norm_op="torch.nn.BatchNorm3d", norm_op_kwargs={}))
    running = {"affine": True, "track_running_stats": True}
    with pytest.raises(MFMError, match=r"E_CONFIG.*InstanceNorm3d"):
        SparK(config, tiny_backbone("resenc", PATCH, norm_op_kwargs=running))
