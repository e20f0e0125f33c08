"""The student's task: soft losses equal nnU-Net's for true labels, boxes from labelled crops, nothing that is NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from mfm_nnunet.tasks.segmentation import SegmentationTask
from mfm_nnunet.tasks.student import SoftTargets, StudentTask

CLASSES = 3
WEIGHTS = (0.6, 0.4, 0.0)


def stock_loss(regions: bool, ignore: bool, over_batch: bool) -> nn.Module:
    dice = {"batch_dice": over_batch, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(
        dice, {}, ignore_label=CLASSES if ignore else None, dice_class=MemoryEfficientSoftDiceLoss
    )  # fmt: skip


def true_labels(regions: bool, ignore: bool, size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A target as nnU-Net's loaders make it."""
    draw = torch.Generator().manual_seed(seed)
    if regions:
        return torch.randint(0, 2, (2, CLASSES + ignore, *size), generator=draw).bool()
    return torch.randint(0, CLASSES + ignore, (2, 1, *size), generator=draw).to(torch.int16)


def soft_targets(regions: bool = False, ignore: bool = False, over_batch: bool = False) -> SoftTargets:
    return SoftTargets(regions, ignore, over_batch, sure=0.8, unsure=0.3)


KINDS = [(r, i, b) for r in (False, True) for i in (False, True) for b in (False, True)]


@pytest.mark.parametrize("size", [(8, 10), (4, 6, 5)])
@pytest.mark.parametrize(("regions", "ignore", "over_batch"), KINDS)
def test_true_labels_give_the_loss_and_gradient_of_nnunet(
    regions: bool, ignore: bool, over_batch: bool, size: tuple[int, ...]
) -> None:
    target, how = true_labels(regions, ignore, size), soft_targets(regions, ignore, over_batch)
    one, other = (torch.randn(2, CLASSES, *size, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    stock = stock_loss(regions, ignore, over_batch)(one.requires_grad_(), target)
    ours = how.loss(other.requires_grad_(), *how.split(how.soften(target, CLASSES)))
    stock.backward(), ours.backward()
    assert ours.item() == pytest.approx(stock.item(), abs=1e-6)
    assert torch.allclose(one.grad, other.grad, atol=1e-6)  # type: ignore[arg-type]


def test_unsure_voxels_count_less_and_ignored_ones_nothing() -> None:
    how = soft_targets(ignore=True)
    soft = torch.tensor([[0.9, 0.1, 0, 0], [0.6, 0.2, 0.2, 0], [0.9, 0.1, 0, 1]]).T[None, :, :, None]
    classes, weight = how.split(soft)
    assert classes.shape == (1, 3, 3, 1)
    assert weight.flatten().tolist() == pytest.approx([1, 0.3, 0])
    logits = torch.randn(1, 3, 3, 1, requires_grad=True)
    how.loss(logits, classes, weight).backward()
    assert (logits.grad[0, :, 2] == 0).all()  # type: ignore[index]
    regions = soft_targets(regions=True)
    _, weight = regions.split(torch.tensor([[0.9, 0.05], [0.9, 0.5]]).T[None, :, :, None])
    assert weight.flatten().tolist() == pytest.approx([1, 0.3])


class Scales(nn.Module):
    """A network of one layer with three outputs, as with deep supervision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, CLASSES, 3, padding=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        whole = self.layer(x)
        return [whole, *(nn.functional.avg_pool2d(whole, step) for step in (2, 4))]


def batch_of(regions: bool, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    whole = true_labels(regions, False, (16, 16), seed)
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    smaller = [nn.functional.interpolate(whole.float(), (size, size), mode="nearest-exact") for size in (8, 4)]
    return images, [whole, *(target.to(whole.dtype) for target in smaller)]


def student(regions: bool, network: nn.Module) -> StudentTask:
    loss = DeepSupervisionWrapper(stock_loss(regions, False, False), WEIGHTS)
    return StudentTask(network, loss, regions, None, soft_targets(regions))


@pytest.mark.parametrize("regions", [False, True])
def test_a_teacher_that_tells_the_truth_is_supervised_training_on_all(regions: bool) -> None:
    networks = Scales(), Scales()
    loss = DeepSupervisionWrapper(stock_loss(regions, False, False), WEIGHTS)
    supervised, task = SegmentationTask(networks[0], loss, regions, None), student(regions, networks[1])
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in networks]
    for step in range(5):
        (first, target), (second, truth) = batch_of(regions, step), batch_of(regions, 100 + step)
        everything = [torch.cat(pair) for pair in zip(target, truth)]
        unlabelled = {
            "strong": second,
            "soft": task._soft.soften(truth[0], CLASSES),
            "boxes": torch.zeros(2, 2, 2, dtype=torch.int64),
            "weight": 1.0,
        }
        losses = [
            supervised({"data": torch.cat([first, second]), "target": everything}).loss,
            task({"data": first, "target": target, "unlabelled": unlabelled}).loss,
        ]
        assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-6)
        for optimizer, value in zip(optimizers, losses):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for one, other in zip(*(network.parameters() for network in networks)):
        assert torch.allclose(one, other, atol=1e-6)


def test_boxes_come_from_labelled_crops_with_their_labels() -> None:
    task = student(False, Scales())
    images, target = batch_of(False, 3)
    boxes = torch.tensor([[[2, 9], [0, 16]], [[0, 0], [0, 0]]])
    given: dict[str, Any] = {"strong": torch.zeros(2, 1, 16, 16), "soft": torch.full((2, 3, 16, 16), 1 / 3)}
    crops, soft = task._paste(images, target[0], {**given, "boxes": boxes})
    assert torch.equal(crops[0, :, 2:9], images[0, :, 2:9])
    assert torch.equal(soft[0, :, 2:9].argmax(0), target[0][0, 0, 2:9].long())
    assert not crops[0, :, :2].any()
    assert not crops[1].any()
    assert (given["strong"] == 0).all()


def test_a_crop_without_foreground_and_one_that_is_all_ignored_give_no_nan() -> None:
    for regions in (False, True):
        how = soft_targets(regions, ignore=True)
        empty = torch.zeros(2, CLASSES + 1, 6, 6)
        empty[:, 0] = 0 if regions else 1
        empty[1, -1] = 1
        for target in (empty, torch.cat([empty[1:], empty[1:]])):
            logits = torch.randn(2, CLASSES, 6, 6, requires_grad=True)
            loss = how.loss(logits, *how.split(target))
            loss.backward()
            assert torch.isfinite(loss)
            assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]
