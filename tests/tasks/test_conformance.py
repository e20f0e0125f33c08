"""One suite over every built-in pretext task on every family of networks, with a cubic and a flat patch.

A new task is tested here before its author writes a test: it needs its file and its entry in ``mfm_nnunet/tasks``.
A new family needs its entries in ``mfm_nnunet.models.families`` and in ``tests/builders/tiny_plans.py``.
Settings that change what a task does are listed in VARIANTS.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import pickle
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.models.families import family_named, family_of
from mfm_nnunet.models.transfer import transfer_weights
from mfm_nnunet.tasks.base import ItemTransform, PretextTask, find_task, list_tasks
from tests.builders.tasks import make_batch, make_item, make_task, tissue_for
from tests.builders.tiny_plans import NETWORKS, tiny_network

VARIANTS: dict[str, list[str]] = {
    "mae": ["mask_ratio=0.75", "mask_ratio=0.5"],
    "models_genesis": ["", "inpainting_share=1"],
    "simclr": ["projector_width=32"],
    "simmim": ["loss=mse", "loss=l1", "mask_ratio=0.4,0.9"],
    "spark3d": ["mask_ratio=0.75", "mask_ratio=0.6,0.9"],
    "swin_unetr": ["heads=pooled", "heads=token", "mix=false"],
    "voco": ["projector_width=8"],
    "volume_fusion": ["variant=grid", "variant=boxes", "variant=two_image"],
}
MOST_STEPS = {"voco": 150}
"""Optimiser steps after which the loss must have fallen, 8 if not named. Untrained U-Nets embed all crops nearly alike,
where VoCo's loss is flat."""
BATCH = 2


class Case(NamedTuple):
    """One combination of the suite."""

    task: type[PretextTask]
    setting: str
    network: str
    channels: int
    patch: tuple[int, ...]

    def make(self) -> PretextTask:
        return make_task(self.task, self.network, self.patch, self.channels, [self.setting] if self.setting else [])


def cases() -> list[Any]:
    """One channel with the cubic patch and two with the flat one; one for further settings or versions."""
    found = []
    for info in list_tasks():
        for number, setting in enumerate(VARIANTS.get(info.name, [""])):
            for network in [network for network in NETWORKS if family_named(network).meets(info.needs)]:
                grid = [(1, NETWORKS[network].cubic), (2, NETWORKS[network].flat)]
                is_version = network != family_named(network).name
                chosen = grid[number % 2 :][: 1 - is_version] if number else grid[: 2 - is_version]
                for channels, patch in chosen:
                    name = f"{info.name}-{setting}-{network}-{channels}c-{'x'.join(map(str, patch))}"
                    found.append(pytest.param(Case(find_task(info.name), setting, network, channels, patch), id=name))
    return found


def require_image(image: Tensor, task: PretextTask, case: Case) -> None:
    """A patch per item, or views that ``backbone.features`` can see."""
    assert image.dtype == torch.float32
    if image.dim() == 2 + len(case.patch):
        assert image.shape == (BATCH, case.channels, *case.patch)
    else:
        batch, _, channels, *crop = image.shape
        assert (batch, channels) == (BATCH, case.channels)
        assert all(
            side % cell == 0 and side <= size for side, cell, size in zip(crop, task.backbone.crop_cell(), case.patch)
        )


def require_frozen(task: PretextTask) -> None:
    """Nothing but what cannot be used is left untrained: single output layers, or the whole decoder."""
    frozen = {name for name, weight in task.named_parameters() if not weight.requires_grad}
    if task.trains_decoder:
        count = sum(weight.numel() for name, weight in task.named_parameters() if name in frozen)
        assert count < 0.05 * sum(weight.numel() for weight in task.parameters())
    else:
        network = task.backbone.network
        decoder = {name for name, _ in network.named_parameters()} - family_of(network).encoder_names(network)
        assert frozen == {f"backbone.network.{name}" for name in decoder}


def drop_path_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_conforms(case: Case) -> None:
    task = case.make().train()
    batch = make_batch(task, BATCH)
    requests = task.transform(task.config, case.patch).requests(np.random.default_rng(0))
    assert {request.volume for request in requests} == set(range(task.volumes_per_item(task.config)))
    assert all(len(request.size) == len(case.patch) for request in requests)
    assert task.smallest_batch(task.config) <= BATCH
    require_image(batch["image"], task, case)
    kept = {key: value.clone() for key, value in batch.items()}
    weights = {name: weight.clone() for name, weight in task.backbone.network.state_dict().items()}

    drop_path_seed()
    output = task(batch)
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float32
    assert math.isfinite(output.loss.item())
    assert output.pictures is None
    assert all(value.shape == () and not value.requires_grad for value in output.metrics.values())
    assert all(torch.equal(batch[key], kept[key]) for key in kept), "the task changed its batch"

    drop_path_seed()
    assert torch.equal(task(batch).loss, output.loss), "the loss is not a function of batch and weights"

    output.loss.backward()
    for name, weight in task.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, f"{name} gets no gradient"
            assert torch.isfinite(weight.grad).all(), name
    require_frozen(task)

    before = output.loss.item()
    optimizer = torch.optim.AdamW([w for w in task.parameters() if w.requires_grad], lr=2e-3)
    most = MOST_STEPS.get(task.name, 8)
    for step in range(most):
        optimizer.zero_grad()
        loss = task(batch).loss
        if step >= 8 and loss.item() < 0.98 * before:
            break
        loss.backward()
        optimizer.step()
        task.after_step((step + 1) / most)
    drop_path_seed()
    assert task(batch).loss.item() < before, "a few steps on one batch do not lower the loss"

    with torch.no_grad():
        shown = task.eval()(batch)
        assert torch.equal(task(batch).loss, shown.loss), "eval mode is random"
    assert shown.pictures
    assert all(p.dim() == 1 + len(case.patch) and not p.requires_grad for p in shown.pictures.values())
    assert list(shown.metrics) == list(output.metrics)

    trained = task.backbone.network.state_dict()
    assert list(trained) == list(weights) == list(tiny_network(case.network, case.patch, case.channels).state_dict())
    frozen = [name for name, weight in task.backbone.network.named_parameters() if not weight.requires_grad]
    assert all(torch.equal(trained[name], weights[name]) for name in frozen), "frozen weights have moved"

    again = case.make().eval()
    again.load_state_dict(task.state_dict())
    with torch.no_grad():
        assert torch.equal(again(batch).loss, shown.loss), "the task's state is not all that it needs to continue"


def test_what_is_shipped_fits_the_network_that_is_fine_tuned(case: Case) -> None:
    """Another number of outputs there: all weights but the output layers are transferred, or only the encoder's."""
    task = case.make()
    backbone = task.backbone
    shipped = dict(task.shipped_weights())
    target = tiny_network(case.network, case.patch, case.channels, num_outputs=4)
    with torch.no_grad():
        for weight in target.parameters():
            weight.fill_(0.5)
    report = transfer_weights(shipped, target, source_patch_size=case.patch)
    assert report.encoder_share == 1
    assert not report.adapted
    encoder, heads = family_of(target).encoder_names(target), family_of(target).head_names(target)
    for name, weight in target.named_parameters():
        is_transferred = name in encoder or (task.trains_decoder and name not in heads)
        assert torch.equal(weight, backbone.network.state_dict()[name]) if is_transferred else (weight == 0.5).all(), (
            name
        )


def test_anonymised_voxels_are_passed_on_and_left_out(case: Case) -> None:
    """Only by tasks that say so; with nothing anonymised the loss is the same to the bit."""
    task = case.make().eval()
    transform = task.transform(task.config, case.patch)
    batches = []
    for given in (None, True):
        rng = np.random.default_rng(3)
        crops = [tissue_for(task)(request, case.channels, rng) for request in transform.requests(rng)]
        valid = None if given is None else [np.ones((1, *crop.shape[1:]), bool) for crop in crops]
        item = transform(crops, rng, valid)
        batches.append({key: torch.from_numpy(np.ascontiguousarray(value))[None] for key, value in item.items()})
    assert ("valid" in batches[1]) == task.uses_valid
    assert "valid" not in batches[0]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0]), "the mask changes the draws"
    if task.uses_valid:
        mask = batches[1]["valid"]
        assert mask.dtype == torch.bool
        lead = batches[1]["image"].shape[: -1 - len(case.patch)]  # the batch, and the views where there are several
        assert mask.shape == (*lead, 1, *case.patch)
        assert mask.all(), "voxels that were valid are not"
        with torch.no_grad():
            losses = [task(batch).loss.item() for batch in batches]
            assert losses[0] == losses[1]
            everything = {**batches[1], "valid": torch.zeros_like(mask)}
            assert math.isfinite(task(everything).loss.item()), "a sample with no valid voxel breaks the loss"


def test_config_survives_json_and_items_their_transport(case: Case) -> None:
    task = case.make()
    through_json = mfm_settings.from_dict(case.task.Config, json.loads(json.dumps(mfm_settings.to_dict(task.config))))
    assert through_json == task.config
    assert task.resolve(task.config, task.backbone.geometry()) == task.config, "resolving twice changes the settings"

    transform = task.transform(task.config, case.patch)
    assert isinstance(transform, ItemTransform)
    unpickled = pickle.loads(pickle.dumps(transform))
    items = [
        make_item(one, case.channels, np.random.default_rng(7), tissue_for(task)) for one in (transform, unpickled)
    ]
    assert items[0].keys() == items[1].keys()
    assert all(np.array_equal(items[0][key], items[1][key]) for key in items[0])
    other, same, first = (make_batch(task, seed=seed) for seed in (1, 1, 0))
    assert all(torch.equal(other[key], same[key]) for key in other)
    assert any(not torch.equal(first[key], other[key]) for key in other)


def test_every_setting_is_documented() -> None:
    configs = {cls for info in list_tasks() for cls in find_task(info.name).Config.__mro__ if cls is not object}
    for config in configs:
        source = ast.parse(inspect.getsource(sys.modules[config.__module__]))
        (definition,) = [n for n in source.body if isinstance(n, ast.ClassDef) and n.name == config.__name__]
        body = definition.body
        for here, after in zip(body, [*body[1:], None]):
            if isinstance(here, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{config.__name__}.{here.target.id} has no docstring"
