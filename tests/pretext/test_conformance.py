"""One suite over every registered pretext task, both families of networks, channels, shapes and axes.

A new task is tested here before its author writes a test: it only needs its file in ``mfm_nnunet/pretext``. Settings
that change what a task does are listed in VARIANTS.
"""

from __future__ import annotations

import json
import math
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.plans import schema
from mfm_nnunet.pretext.base import CropRequest, ItemTransform, PretextTask, find_task, list_tasks
from tests.models.tiny_plans import tiny_network

VARIANTS: dict[str, list[str]] = {
    "mae": ["mask_ratio=0.75", "mask_ratio=0.5"],
    "volume_fusion": ["variant=grid", "variant=boxes", "variant=two_image"],
}
PATCHES = [(16, 16, 16), (8, 24, 16), (24, 24), (16, 32)]
BATCH = 2


class Case(NamedTuple):
    """One combination of the suite."""

    task: type[PretextTask]
    setting: str
    family: str
    channels: int
    patch: tuple[int, ...]


def cases() -> list[Any]:
    found = []
    for info in list_tasks():
        task = find_task(info.name)
        for setting in VARIANTS.get(info.name, [""]):
            for family in task.backbones:
                for channels in (1, 2):
                    for patch in PATCHES:
                        name = f"{info.name}-{setting}-{family}-{channels}c-{'x'.join(map(str, patch))}"
                        found.append(pytest.param(Case(task, setting, family, channels, patch), id=name))
    return found


def make_task(case: Case) -> PretextTask:
    config = schema.override(case.task.Config(), [case.setting] if case.setting else [])
    num_outputs = case.task.num_outputs(config, case.channels)
    network = tiny_network(case.family, case.patch, case.channels, num_outputs)
    backbone = make_backbone(network, case.patch, case.task.restoring)
    return case.task(case.task.resolve(config, backbone.geometry()), backbone)


def read(request: CropRequest, channels: int, rng: np.random.Generator) -> np.ndarray:
    """A crop as the stream would give it: of smooth "tissue", small images padded or cut."""
    image_size = [20] * len(request.size)
    size = request.size if request.pad else tuple(map(min, request.size, image_size))
    axes = np.meshgrid(*(np.linspace(0, 3, n) for n in size), indexing="ij")
    waves = [np.sin(sum(rng.uniform(1, 3) * axis for axis in axes) + rng.uniform(0, 6)) for _ in range(channels)]
    return np.stack(waves).astype(np.float32)


def make_batch(task: PretextTask, patch: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    transform = task.transform(task.config, patch)
    items = []
    for index in range(BATCH):
        rng = np.random.default_rng([seed, index])
        requests = transform.requests(rng)
        assert {request.volume for request in requests} == set(range(task.volumes_per_item(task.config)))
        assert all(len(request.size) == len(patch) for request in requests)
        items.append(transform([read(request, task.backbone.num_inputs, rng) for request in requests], rng))
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def drop_path_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_conforms(case: Case) -> None:
    task = make_task(case).train()
    batch = make_batch(task, case.patch)
    assert batch["image"].shape == (BATCH, case.channels, *case.patch)
    assert batch["image"].dtype == torch.float32
    kept = {key: value.clone() for key, value in batch.items()}
    weights = list(task.backbone.network.state_dict())

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
    assert sum(w.numel() for w in task.parameters() if not w.requires_grad) < 0.05 * sum(
        w.numel() for w in task.parameters()
    )

    before = output.loss.item()
    optimizer = torch.optim.AdamW([w for w in task.parameters() if w.requires_grad], lr=2e-3)
    for step in range(8):
        optimizer.zero_grad()
        task(batch).loss.backward()
        optimizer.step()
        task.after_step((step + 1) / 8)
    drop_path_seed()
    assert task(batch).loss.item() < before, "a few steps on one batch do not lower the loss"

    with torch.no_grad():
        shown = task.eval()(batch)
        assert torch.equal(task(batch).loss, shown.loss), "eval mode is random"
    assert shown.pictures
    assert all(p.dim() == 1 + len(case.patch) and not p.requires_grad for p in shown.pictures.values())
    assert list(shown.metrics) == list(output.metrics)

    assert list(task.backbone.network.state_dict()) == weights
    assert weights == list(tiny_network(case.family, case.patch, case.channels).state_dict())


def test_config_survives_json_and_items_their_transport(case: Case) -> None:
    task = make_task(case)
    through_json = schema.from_dict(case.task.Config, json.loads(json.dumps(schema.to_dict(task.config))))
    assert through_json == task.config
    assert task.resolve(task.config, task.backbone.geometry()) == task.config, "resolving twice changes the settings"

    transform = task.transform(task.config, case.patch)
    assert isinstance(transform, ItemTransform)
    travelled = pickle.loads(pickle.dumps(transform))
    items = []
    for one in (transform, travelled):
        rng = np.random.default_rng(7)
        crops = [read(request, case.channels, rng) for request in one.requests(rng)]
        items.append(one(crops, rng))
    assert items[0].keys() == items[1].keys()
    assert all(np.array_equal(items[0][key], items[1][key]) for key in items[0])
    other = make_batch(task, case.patch, seed=1)
    same = make_batch(task, case.patch, seed=1)
    assert all(torch.equal(other[key], same[key]) for key in other)
    first = make_batch(task, case.patch, seed=0)
    assert any(not torch.equal(first[key], other[key]) for key in other)


def test_every_setting_is_documented() -> None:
    import ast
    import inspect
    import sys

    for info in list_tasks():
        config = find_task(info.name).Config
        source = ast.parse(inspect.getsource(sys.modules[config.__module__]))
        (definition,) = [n for n in source.body if isinstance(n, ast.ClassDef) and n.name == config.__name__]
        body = definition.body
        for here, after in zip(body, [*body[1:], None]):
            if isinstance(here, ast.AnnAssign):
                assert isinstance(after, ast.Expr), f"{config.__name__}.{here.target.id} has no docstring"
