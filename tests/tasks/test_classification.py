"""The task of labels of whole images: losses, heads on every network, and what does not learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mfm_nnunet.models.classifier import AttentivePooling, Classifier
from mfm_nnunet.requests import HEADS
from mfm_nnunet.tasks.classification import ClassificationTask
from tests.builders.tiny_plans import NETWORKS, tiny_backbone


def task_of(
    kind: str, weights: list[float], head: str = "linear", family: str = "resenc", patch: tuple[int, ...] = (16, 16)
) -> ClassificationTask:
    backbone = tiny_backbone(family, patch, restoring="none")
    torch.manual_seed(0)
    num_outputs = 1 if kind == "regression" else len(weights)
    return ClassificationTask(Classifier(backbone, head, num_outputs), kind, torch.tensor(weights))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", ["flat", "cubic"])
def test_every_head_on_every_network(network: str, head: str, shape: str) -> None:
    patch = getattr(NETWORKS[network], shape)
    task = task_of("classification", [1.0, 1.0, 1.0], head, network, patch)
    batch = {"data": torch.randn(2, 3, 1, *patch), "target": torch.tensor([[0.0], [2.0]])}
    output = task(batch)
    output.loss.backward()
    assert output.metrics == {}
    assert all(p.grad is not None for p in task.classifier.head.parameters())
    encoder = task.classifier.backbone.family.encoder_names(task.network)
    assert all(p.requires_grad == (name in encoder) for name, p in task.network.named_parameters())
    task.eval()
    with torch.no_grad():
        metrics = task({"data": batch["data"][:1], "target": batch["target"][:1]}).metrics
        one_by_one = task.classifier.embed_views(batch["data"][0])
    assert metrics["logits"].shape == (3,)
    assert torch.allclose(task.classifier.head(one_by_one[None])[0], metrics["logits"], atol=1e-4)


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_weights_survive_their_file(family: str) -> None:
    one, other = (Classifier(tiny_backbone(family, (16, 16), restoring="none"), "mil", 2) for _ in range(2))
    for parameter in one.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(one.weights())
    x = torch.randn(1, 2, 1, 16, 16)
    one.eval(), other.eval()
    assert torch.equal(one(x), other(x))
    with pytest.raises(RuntimeError):
        other.load_state_dict({name: value for name, value in one.weights().items() if "bias" not in name})


def test_losses_equal_torch() -> None:
    logits, index = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 1])
    task = task_of("classification", [1.0, 1.0, 1.0])
    assert torch.allclose(task.loss(logits, index[:, None].float()), functional.cross_entropy(logits, index))
    weighted = task_of("classification", [2.0, 0.0, 1.0])
    one = functional.cross_entropy(logits, index, reduction="none") * torch.tensor([2.0, 0, 1, 2, 0, 0])
    assert torch.allclose(weighted.loss(logits, index[:, None].float()), one.mean())
    numbers = torch.randn(6, 1)
    found = task_of("regression", [1.0]).loss(logits[:, :1], numbers)
    assert torch.allclose(found, functional.smooth_l1_loss(logits[:, :1], numbers))


def test_unknown_labels_have_no_gradient() -> None:
    task = task_of("multilabel", [3.0, 1.0])
    logits = torch.randn(3, 2, requires_grad=True)
    target = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")], [0.0, 1.0]])
    task.loss(logits, target).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).tolist() == [[False, True], [True, True], [False, False]]
    alone = functional.binary_cross_entropy_with_logits(logits[0, :1], target[0, :1], pos_weight=task.weights[:1])
    assert torch.allclose(task.loss(logits[:1], target[:1]), alone)


def test_a_frozen_encoder_is_in_eval_mode() -> None:
    task = task_of("classification", [1.0, 1.0])
    task.is_frozen = True
    task.train()
    assert task.classifier.head.training
    assert not task.classifier.backbone.training


def test_attention_of_zero_queries_is_the_mean() -> None:
    pooling = AttentivePooling(12)
    nn.init.zeros_(pooling.queries)
    x = torch.randn(2, 5, 12)
    assert torch.allclose(pooling(x), x.mean(1), atol=1e-6)
    assert len(pooling.queries) == 6


def test_the_summary_is_the_score_of_all_cases() -> None:
    task = task_of("classification", [1.0, 1.0])
    values = {"loss": torch.tensor([1.0, 3.0]), "logits": torch.tensor([[2.0, 0.0], [0.0, 1.0]])}
    values["target"] = torch.tensor([[0.0], [1.0]])
    assert task.summarise(values) == {"loss": 2.0, "auroc": 1.0}
    one_class = task.summarise({**values, "target": torch.zeros(2, 1)})
    assert np.isnan(one_class["auroc"])
