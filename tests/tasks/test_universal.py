"""The loss of partial labels equals nnU-Net's where nothing is missing, and ignores what is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn

from mfm_nnunet.tasks.universal import PartialLabelLoss, UniversalTask, hide

NUM = 3
"""Classes."""
SHAPE = (6, 5, 4)


def batch(has_regions: bool, has_ignore: bool, seed: int = 0) -> tuple[Tensor, Tensor, int | None]:
    """Logits and a target of two samples, and the ignore label."""
    torch.manual_seed(seed)
    logits = torch.randn(2, NUM + (not has_regions), *SHAPE, dtype=torch.float32, requires_grad=True)
    if has_regions:
        return logits, torch.rand(2, NUM + has_ignore, *SHAPE) > 0.7, NUM + 1 if has_ignore else None
    target = torch.randint(0, NUM + 1 + has_ignore, (2, 1, *SHAPE)).float()
    return logits, target, NUM + 1 if has_ignore else None


def all_valid(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("has_regions", [False, True])
@pytest.mark.parametrize("has_ignore", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_with_all_classes_it_is_the_loss_of_nnunet(has_regions: bool, has_ignore: bool, batch_dice: bool) -> None:
    logits, target, ignore = batch(has_regions, has_ignore)
    kwargs = {"batch_dice": batch_dice, "smooth": 1e-5, "ddp": False}
    if has_regions:
        stock: nn.Module = DC_and_BCE_loss(
            {}, {**kwargs, "do_bg": True}, use_ignore_label=has_ignore, dice_class=MemoryEfficientSoftDiceLoss
        )
    else:
        stock = DC_and_CE_loss(
            {**kwargs, "do_bg": False}, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss
        )
    weights = (0.6, 0.4, 0.0)
    ours = PartialLabelLoss(has_regions, ignore, batch_dice, NUM, weights)
    assert ours(logits, target, all_valid(logits)).item() == pytest.approx(stock(logits, target).item(), abs=1e-6)
    scales = [logits, 2 * logits, 3 * logits], [target] * 3
    wrapped = DeepSupervisionWrapper(stock, weights)(*scales)
    found = ours(*scales, all_valid(logits))
    assert found.item() == pytest.approx(wrapped.item(), abs=1e-6)
    (own,), (theirs,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (found, wrapped))
    torch.testing.assert_close(own, theirs, atol=1e-6, rtol=0)


def test_a_sigmoid_that_is_not_annotated_gets_no_gradient() -> None:
    logits, target, _ = batch(True, False)
    valid = torch.tensor([[True, False, True], [True, True, False]])
    (gradient,) = torch.autograd.grad(PartialLabelLoss(True, None, True, 2.0)(logits, target, valid), logits)
    assert torch.equal(gradient[~valid], torch.zeros_like(gradient[~valid]))
    assert (gradient[valid].flatten(1).abs().sum(1) > 0).all()


def test_a_hidden_class_of_a_softmax_shares_the_gradient_of_the_background() -> None:
    logits, target, _ = batch(False, False)
    target = torch.where(target == 2, 0, target)  # as on disk: what is not annotated is background
    valid = torch.tensor([[True, True, False, True]] * 2)
    (gradient,) = torch.autograd.grad(PartialLabelLoss(False, None, True, 2.0)(logits, target, valid), logits)
    share = torch.stack([logits[:, 0], logits[:, 2]], 1).softmax(1)
    whole = gradient[:, 0] + gradient[:, 2]
    torch.testing.assert_close(torch.stack([gradient[:, 0], gradient[:, 2]], 1), share * whole[:, None])
    assert gradient[:, 2].abs().sum() > 0


def test_as_if_each_dataset_had_a_head_of_its_own() -> None:
    """Without merging, a hidden class changes nothing: the loss is that of a network without it."""
    logits, target, _ = batch(False, False)
    target = torch.where(target == 2, 0, target)
    valid = torch.tensor([[True, True, False, True]] * 2)
    loss = PartialLabelLoss(False, None, False, 2.0, merge=False)
    (gradient,) = torch.autograd.grad(loss(logits, target, valid), logits)
    assert torch.equal(gradient[:, 2], torch.zeros_like(gradient[:, 2]))
    fewer = torch.where(target == 3, 2, target)
    alone = PartialLabelLoss(False, None, False, 2.0)(logits[:, [0, 1, 3]], fewer, all_valid(logits)[:, :3])
    assert loss(logits, target, valid).item() == pytest.approx(alone.item(), abs=1e-6)


@pytest.mark.parametrize("has_regions", [False, True])
def test_a_batch_without_a_class_has_no_term_of_it(has_regions: bool) -> None:
    logits, target, _ = batch(has_regions, False)
    valid = all_valid(logits)
    valid[:, -1] = False
    target = target.clone()
    target[(slice(None), NUM - 1) if has_regions else target == NUM] = 0
    loss = PartialLabelLoss(has_regions, None, True, 2.0)
    assert torch.isfinite(loss(logits, target, valid))
    changed = logits.detach().clone()
    changed[:, -1] -= 50  # the class never gets a voxel
    expected = loss(changed[:, :-1], target[:, : NUM - 1] if has_regions else target, valid[:, :-1])
    torch.testing.assert_close(loss(changed, target, valid), expected, atol=1e-6, rtol=0)


def test_a_class_keeps_its_weight_however_many_others_are_there() -> None:
    """Its gradient does not depend on which further classes the datasets of a batch annotate."""
    logits, target, _ = batch(True, False)
    loss = PartialLabelLoss(True, None, True, 2.0)
    both = [torch.tensor([[True, False, other]] * 2) for other in (False, True)]
    one, other = (torch.autograd.grad(loss(logits, target, valid), logits)[0][:, 0] for valid in both)
    torch.testing.assert_close(one, other)


def test_hidden_probability_belongs_to_the_background() -> None:
    logits = torch.randn(2, 4, 3, 3)
    valid = torch.tensor([[True, False, True, False], [True, True, True, True]])
    p, q = logits.softmax(1), hide(logits, valid, False).softmax(1)
    torch.testing.assert_close(q[0, 0], p[0, 0] + p[0, 1] + p[0, 3])
    torch.testing.assert_close(q[0, 2], p[0, 2])
    assert q[0, [1, 3]].eq(0).all()
    assert torch.equal(hide(logits, valid, False)[1], logits[1])


def make_task(keys: tuple[str, str]) -> UniversalTask:
    valid = {keys[0]: (True, True, False), keys[1]: (True, False, True)}
    return UniversalTask(nn.Identity(), PartialLabelLoss(False, None, True, 1.0), valid, ("a", "b"))


def sample(keys: tuple[str, str]) -> dict[str, Any]:
    torch.manual_seed(1)
    target = torch.zeros(2, 1, 4, 4)
    target[0, 0, :2], target[1, 0, 2:] = 1, 2
    return {"data": torch.randn(2, 3, 4, 4), "target": target, "keys": [f"{key}_case" for key in keys]}


def test_renaming_and_reordering_datasets_changes_nothing() -> None:
    first, second = make_task(("004", "053"))(sample(("004", "053"))), make_task(("700", "001"))(sample(("700", "001")))
    assert torch.equal(first.loss, second.loss)
    other = sample(("004", "053"))
    other = {name: value[::-1] if name == "keys" else value.flip(0) for name, value in other.items()}
    assert make_task(("004", "053"))(other).loss.item() == pytest.approx(first.loss.item(), abs=1e-6)


def test_steps_per_class_are_counted_and_rare_classes_named() -> None:
    task, own = make_task(("004", "053")), sample(("004", "053"))
    task(own)
    own["target"][1] = 0
    task({**own, "keys": ["004_case", "004_case"]})
    counted, rare = task.describe_epoch()[0], make_task(("004", "053"))
    assert "a 2 (2), b 1 (1)" in counted
    assert "of 4" in counted
    assert task.describe_epoch()[0].endswith("a 0 (0), b 0 (0)")
    rare({**own, "keys": ["004_case", "004_case"]})
    assert rare.describe_epoch()[1].endswith(": b")


def test_the_validation_does_not_count_what_is_not_annotated() -> None:
    """A voxel of class b in a case where b is not annotated is no error."""
    task, own = make_task(("004", "053")).eval(), sample(("004", "053"))
    own["data"] = torch.zeros(2, 3, 4, 4)
    own["data"][0, 2], own["data"][1, 2, 2:] = 9, 9
    counts = task(own).metrics
    assert counts["excess"].tolist() == [0, 0]
    assert counts["hits"].tolist() == [0, 8]
    assert counts["missed"].tolist() == [8, 0]
