"""Tasks with pseudo labels: losses equal nnU-Net's where the labels are true, and labels are made without traces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from mfm_nnunet.tasks.consistency import ConsistencyTask, turn
from mfm_nnunet.tasks.mean_teacher import MeanTeacherTask, largest_components
from mfm_nnunet.tasks.mixing import downsample_targets
from mfm_nnunet.tasks.pseudo_labels import CONFIDENT, PseudoLabelTask
from mfm_nnunet.tasks.segmentation import SegmentationTask

CLASSES, IGNORED = 3, 3
BOX = torch.tensor([[1, 5], [2, 6], [0, 4]])


class Pyramid(nn.Module):
    """Two outputs, as with deep supervision, and a dropout that would show in labels made in training mode."""

    def __init__(self, is_deep: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.dropout, self.is_deep = nn.Conv3d(1, CLASSES, 3, padding=1), nn.Dropout(0.5), is_deep

    def forward(self, x: Tensor) -> Any:
        output = self.dropout(self.convolution(x))
        return [output, nn.functional.avg_pool3d(output, 2)] if self.is_deep else output


class Entropy(nn.Module):
    """The mean cross-entropy of all voxels that count."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target[:, 0].long(), ignore_index=IGNORED)


def nnunets_loss(has_regions: bool, ignore: int | None, is_deep: bool) -> Callable[[Any, Any], Tensor]:
    dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False}
    if has_regions:
        loss: nn.Module = DC_and_BCE_loss({}, {**dice, "do_bg": True}, use_ignore_label=ignore is not None)
    else:
        loss = DC_and_CE_loss({**dice, "do_bg": False}, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, [0.7, 0.3]) if is_deep else loss


def make(method: str, has_regions: bool = False, ignore: int | None = None, is_deep: bool = False) -> PseudoLabelTask:
    network = Pyramid(is_deep)
    parts = nnunets_loss(has_regions, ignore, is_deep), has_regions, ignore
    if method == "consistency":
        return ConsistencyTask(network, *parts)
    partial = nnunets_loss(has_regions, IGNORED, is_deep)
    return MeanTeacherTask(network, partial, IGNORED, contextlib.nullcontext, False, *parts)


def target_of(values: Tensor, has_regions: bool, ignore: int | None, is_deep: bool) -> Any:
    """A target as nnU-Net's loaders make it; ``values`` (B, 1, D, H, W) are labels, 3 is ignored."""
    whole = values.to(torch.int16)
    if has_regions:
        channels = [values == 1, values == 2, values > 0, *([values == IGNORED] if ignore is not None else [])]
        whole = torch.cat(channels, 1)
    return downsample_targets(whole, [[1] * 3, [0.5] * 3]) if is_deep else whole


def draw_batch(
    has_regions: bool = False, ignore: int | None = None, is_deep: bool = False, is_empty: bool = False
) -> dict[str, Any]:
    torch.manual_seed(1)
    values = torch.randint(0, 1 if is_empty else CLASSES, (2, 1, 8, 8, 8))
    if ignore is not None:
        values[0, :, :4] = IGNORED
    weak = torch.randn(2, 1, 8, 8, 8)
    unlabelled = {"weak": weak, "strong": weak.clone(), "turns": torch.zeros(2, 4, dtype=torch.int64)}
    target = target_of(values, has_regions, ignore, is_deep)
    return {
        "data": torch.randn(2, 1, 8, 8, 8),
        "target": target,
        "unlabelled": {**unlabelled, "box": BOX, "weight": 1.0},
    }


KINDS = [(False, None, False), (False, IGNORED, True), (True, None, True), (True, IGNORED, False)]
METHODS = ("consistency", "mean_teacher")


@pytest.fixture
def no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.parametrize("is_deep", [False, True])
def test_true_pseudo_labels_equal_supervised_training_on_all(
    is_deep: bool, no_dropout: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, batch = make("consistency", is_deep=is_deep), draw_batch(is_deep=is_deep)
    truth = torch.randint(0, CLASSES, (2, 1, 8, 8, 8))
    monkeypatch.setattr(task, "label", lambda images: truth)
    supervised = SegmentationTask(task.network, task.loss, False, None)
    both = [torch.cat(pair) for pair in zip(as_list(batch["target"]), as_list(target_of(truth, False, None, is_deep)))]
    images = torch.cat([batch["data"], batch["unlabelled"]["strong"]])
    expected = supervised({"data": images, "target": both if is_deep else both[0]}).loss
    torch.testing.assert_close(task(batch).loss, expected)


def as_list(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def test_mean_teacher_counts_each_voxel_of_the_mixed_crops_once(no_dropout: None, monkeypatch: Any) -> None:
    """With true pseudo labels, the two losses together are the ordinary loss of all voxels."""
    task, batch = make("mean_teacher"), draw_batch()
    truth = torch.randint(0, CLASSES, (2, 1, 8, 8, 8))
    monkeypatch.setattr(task, "label", lambda images: truth)
    entropy = Entropy()
    monkeypatch.setattr(task, "_partial_loss", entropy)
    true, pseudo = task.losses(batch["data"], batch["target"], batch["unlabelled"])
    box = (..., *(slice(low, high) for low, high in BOX.tolist()))
    images, others = batch["data"].clone(), batch["unlabelled"]["strong"].clone()
    images[box], others[box] = batch["unlabelled"]["strong"][box], batch["data"][box]
    labels, other_labels = batch["target"].clone(), truth.to(torch.int16)
    labels[box], other_labels[box] = truth.to(torch.int16)[box], batch["target"][box]
    whole = entropy(task.network(torch.cat([images, others])), torch.cat([labels, other_labels]))
    torch.testing.assert_close((true + pseudo) / 2, whole)  # both label half of the voxels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_empty", [False, True])
def test_losses_and_gradients_are_finite_with_and_without_foreground(
    method: str, kind: tuple[bool, int | None, bool], is_empty: bool
) -> None:
    task, batch = make(method, *kind), draw_batch(*kind, is_empty=is_empty)
    if is_empty:
        batch["unlabelled"]["weak"].zero_()
        with torch.no_grad():
            task.network.convolution.bias.copy_(torch.tensor([9.0, -9, -9]))  # type: ignore[union-attr, operator]
        assert not task.label(batch["unlabelled"]["weak"])[:, 1 if kind[0] else 0].any()
    loss = task(batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    gradient = task.network.convolution.weight.grad  # type: ignore[union-attr]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_weight_0_and_a_batch_without_unlabelled_crops_are_the_supervised_loss(method: str, no_dropout: None) -> None:
    task, batch = make(method), draw_batch()
    alone = {name: batch[name] for name in ("data", "target")}
    supervised = SegmentationTask(task.network, task.loss, False, None)
    assert torch.equal(task(alone).loss, supervised(alone).loss)


def test_labels_are_made_in_eval_mode_without_gradient_and_modes_are_kept() -> None:
    task = make("consistency")
    task.network.dropout.eval()  # type: ignore[union-attr]
    task.network.convolution.train()  # type: ignore[union-attr]
    images = torch.randn(2, 1, 8, 8, 8)
    labels = task.label(images)
    assert torch.equal(labels, task.network.convolution(images).argmax(1, keepdim=True))  # type: ignore[union-attr, operator]
    assert not labels.requires_grad
    assert [task.network.dropout.training, task.network.convolution.training] == [False, True]  # type: ignore[union-attr]


def test_the_average_makes_the_labels_of_mean_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    task, batch, inside = make("mean_teacher"), draw_batch(), []

    @contextlib.contextmanager
    def averaged() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    seen = []
    original = task.label
    monkeypatch.setattr(task, "_averaged", averaged)
    monkeypatch.setattr(task, "label", lambda images: (seen.append(list(inside)), original(images))[1])
    task(batch)
    assert seen == [[True]]
    assert not inside


def test_validation_measures_confidence_and_volume() -> None:
    task, batch = make("consistency").eval(), draw_batch()
    with torch.no_grad():
        task.network.convolution.weight.zero_()  # type: ignore[union-attr, operator]
        task.network.convolution.bias.copy_(torch.tensor([0.0, 8, 0]))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        output = task(batch)
    assert output.metrics["confident"] == 1
    assert output.metrics["volume"].tolist() == [1, 0]
    assert set(output.pictures or {}) == {"unlabelled crop", "predicted labels"}
    values = {"loss": output.loss[None], **{name: value[None] for name, value in output.metrics.items()}}
    assert task.summarise(values)["volume"] == [1, 0]
    with torch.no_grad():
        task.network.convolution.bias.zero_()  # type: ignore[union-attr, operator]
    assert task(batch).metrics["confident"] == 0 < CONFIDENT


@pytest.mark.parametrize("axes", [2, 3])
def test_turns_move_voxels_and_labels_alike(axes: int) -> None:
    x = torch.arange(2 * 4**axes).reshape(2, 1, *[4] * axes)
    still = torch.zeros(2, 1 + axes, dtype=torch.int64)
    assert torch.equal(turn(x, still), x)
    quarter, flip = still.clone(), still.clone()
    quarter[1, 0], flip[0, 1] = 1, 1
    assert torch.equal(turn(x, quarter)[0], x[0])
    assert torch.equal(turn(x, quarter)[1], torch.rot90(x[1], 1, (-2, -1)))
    assert torch.equal(turn(x, flip)[0], x[0].flip(1))
    back = quarter.clone()
    back[1, 0] = 3
    assert torch.equal(turn(turn(x, quarter), back), x)


def test_the_largest_component_of_each_class_is_kept() -> None:
    labels = torch.zeros(2, 1, 6, 6, dtype=torch.int16)
    labels[0, 0, 0, :3], labels[0, 0, 5, 5], labels[0, 0, 3, 3] = 1, 1, 2
    kept = largest_components(labels, has_regions=False)
    assert kept[0, 0, 5, 5] == 0
    kept[0, 0, 5, 5] = 1
    assert torch.equal(kept, labels)
    regions = torch.cat([labels == 1, labels > 0], 1)
    assert largest_components(regions, has_regions=True).sum((-2, -1))[0].tolist() == [3, 3]
