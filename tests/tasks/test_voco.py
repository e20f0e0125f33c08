"""VoCo: overlaps that add up, a loss equal to one written by hand, finite gradients, crops in their places."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.tasks.losses import cosines, overlap_loss, spread_loss
from mfm_nnunet.tasks.voco import VoCo, VoCoConfig, base_places, overlaps, region_size
from tests.builders.tasks import geometry, make_batch, make_task
from tests.builders.tiny_run import prepare, run

PATCH = (16, 32, 32)


def resolved(patch: tuple[int, ...] = PATCH, cell: int = 4, **settings: Any) -> VoCoConfig:
    return VoCo.resolve(VoCoConfig(**settings), geometry(patch, cell))


# Places and overlaps


def test_the_published_grid() -> None:
    config = resolved((64, 256, 256), 32, crop_size=(64,))
    assert (config.grid, config.quarter_turn) == ((1, 4, 4), 0.3)
    assert region_size(config) == (64, 256, 256)
    bases = base_places(config)
    assert bases.shape == (16, 3)
    covered = np.zeros(region_size(config), np.uint8)
    for start in bases:
        covered[tuple(slice(low, low + 64) for low in start)] += 1
    assert (covered == 1).all(), "base crops must tile the region"


@pytest.mark.parametrize(("grid", "crop"), [((1, 4, 4), (8, 8, 8)), ((2, 2, 2), (8, 12, 16)), ((4, 4), (16, 8))])
def test_overlaps_of_each_target_sum_to_one(grid: tuple[int, ...], crop: tuple[int, ...]) -> None:
    config = VoCoConfig(crop_size=crop, grid=grid, num_targets=50, quarter_turn=0.0)
    region = np.zeros((1, *region_size(config)), np.float32)
    item = VoCo.transform(config, PATCH)([region], np.random.default_rng(0))
    num_bases = math.prod(grid)
    assert item["overlap"].shape == (50, num_bases)
    assert item["overlap"].dtype == np.float32
    np.testing.assert_allclose(item["overlap"].sum(1), 1, atol=1e-6)
    assert item["image"].shape == (num_bases + 50, 1, *crop)


def test_overlaps_are_counted_voxels_and_an_identical_crop_overlaps_wholly() -> None:
    config = VoCoConfig(crop_size=(4, 6), grid=(2, 3))
    bases = base_places(config)
    assert np.array_equal(overlaps(bases, bases, (4, 6)), np.eye(6, dtype=np.float32))
    targets = np.array([[1, 4], [4, 12], [0, 0], [3, 11]])
    counted = np.zeros((4, 6))
    for t, target in enumerate(targets):
        for n, base in enumerate(bases):
            painted = np.zeros((8, 18), int)
            for start in (target, base):
                painted[start[0] : start[0] + 4, start[1] : start[1] + 6] += 1
            counted[t, n] = (painted == 2).sum() / 24
    np.testing.assert_allclose(overlaps(targets, bases, (4, 6)), counted, rtol=1e-6)


def test_views_are_the_voxels_of_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each voxel holds its own position; bases come first, and the labels are those of the targets as cut."""
    monkeypatch.setattr("mfm_nnunet.tasks.views.change_view", lambda view, rng, quarter_turn: view)
    config = resolved(crop_size=(8,), grid=(1, 4, 4))
    transform = VoCo.transform(config, PATCH)
    (request,) = transform.requests(np.random.default_rng(0))
    assert (request.size, request.pad, request.volume) == ((8, 32, 32), True, 0)
    region = np.stack(np.meshgrid(*map(np.arange, request.size), indexing="ij")).astype(np.float32)
    seen = set()
    for seed in range(60):
        item = transform([region.copy()], np.random.default_rng(seed))
        starts = item["image"][:, :, 0, 0, 0].astype(int)
        assert (item["image"][:, :, -1, -1, -1] == starts + 7).all()
        assert np.array_equal(starts[:16], base_places(config))
        np.testing.assert_allclose(item["overlap"], overlaps(starts[16:], starts[:16], (8, 8, 8)))
        seen |= set(starts[16:, 1].tolist())
    assert (min(seen), max(seen)) == (0, 24)


# The losses


def by_hand(cosine: Tensor, overlap: Tensor) -> float:
    losses = []
    for cosines_of, overlaps_of in zip(cosine.tolist(), overlap.tolist()):
        near, weight, apart = 0.0, 0.0, []
        for row, labels in zip(cosines_of, overlaps_of):
            for value, label in zip(row, labels):
                s = max(value, 0.0)
                if label > 0:
                    near += label * -math.log(1 - abs(label - s) + 1e-6)
                    weight += label
                else:
                    apart.append(s * s)
        losses.append(near / weight + (sum(apart) / len(apart) if apart else 0))
    return sum(losses) / len(losses)


def labels_of(batch: int, targets: int) -> Tensor:
    config = VoCoConfig(crop_size=(8, 8), grid=(2, 4))
    rng = np.random.default_rng(0)
    places = rng.integers(0, base_places(config)[-1], (batch, targets, 2), endpoint=True)
    return torch.from_numpy(np.stack([overlaps(rows, base_places(config), (8, 8)) for rows in places]))


def test_the_loss_equals_one_written_by_hand() -> None:
    overlap = labels_of(3, 4)
    assert (overlap == 0).any()
    cosine = torch.rand(3, 4, 8) * 1.6 - 0.8
    assert overlap_loss(cosine, overlap).item() == pytest.approx(by_hand(cosine, overlap), rel=1e-4)
    assert overlap_loss(overlap, overlap).item() == pytest.approx(0, abs=1e-5)
    everywhere = torch.full((1, 2, 2), 0.5)
    assert overlap_loss(cosine[:1, :2, :2], everywhere).item() == pytest.approx(
        by_hand(cosine[:1, :2, :2], everywhere), rel=1e-4
    )


def test_the_regulariser_is_the_mean_over_pairs_of_bases() -> None:
    bases = torch.randn(2, 5, 3)
    cosine = cosines(bases, bases)
    expected = sum(max(float(cosine[b, i, j]), 0.0) for b in range(2) for i in range(5) for j in range(i)) / 2
    assert spread_loss(cosine).item() == pytest.approx(expected * 2 / (5 * 4), rel=1e-5)
    assert spread_loss(cosines(torch.eye(4)[None], torch.eye(4)[None])).item() == 0
    assert spread_loss(torch.ones(1, 4, 4)).item() == 1


@pytest.mark.parametrize("kind", ["orthogonal", "zero", "equal"])
def test_loss_and_gradients_are_finite_at_the_extremes(kind: str) -> None:
    bases, targets = torch.eye(12)[None, :8].clone(), torch.eye(12)[None, 8:].clone()
    if kind != "orthogonal":
        bases, targets = (torch.full_like(x, float(kind == "equal")) for x in (bases, targets))
    bases.requires_grad_(), targets.requires_grad_()
    overlap = torch.zeros(1, 4, 8)
    overlap[0, 0, 0] = overlap[0, 1, 1] = overlap[0, 2, 2] = 1
    overlap[0, 3, :2] = 0.5
    cosine = cosines(targets, bases)
    if kind != "equal":
        assert (cosine == 0).all()
    loss = overlap_loss(cosine, overlap) + spread_loss(cosines(bases, bases))
    loss.backward()
    assert math.isfinite(loss.item())
    for rows in (bases, targets):
        assert rows.grad is not None
        assert torch.isfinite(rows.grad).all()


def test_cosines_just_above_one_have_a_loss() -> None:
    """As TF32 rounds them: 1 - s is below 0 by more than the 1e-6 in the logarithm."""
    cosine = torch.full((1, 1, 2), 1 + 2e-5, requires_grad=True)
    loss = overlap_loss(cosine, torch.tensor([[[0.0, 1.0]]]))
    loss.backward()
    assert math.isfinite(loss.item())
    assert cosine.grad is not None
    assert torch.isfinite(cosine.grad).all()


# The task


def tiny_task(*settings: str) -> VoCo:
    return make_task("voco", "resenc", PATCH, 1, ["projector_width=16", *settings])


def test_permuting_base_crops_permutes_nothing_else() -> None:
    task = tiny_task().eval()
    batch = make_batch(task)
    count = batch["overlap"].shape[2]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    image = torch.cat([batch["image"][:, :count][:, order], batch["image"][:, count:]], 1)
    with torch.no_grad():
        plain, permuted = task(batch), task({"image": image, "overlap": batch["overlap"][..., order]})
    assert permuted.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    assert plain.pictures is not None
    assert permuted.pictures is not None
    torch.testing.assert_close(permuted.pictures["predicted"], plain.pictures["predicted"][..., order])
    assert torch.equal(permuted.pictures["targets"], plain.pictures["targets"])


def test_bases_are_detached_for_the_prediction_but_not_for_the_regulariser() -> None:
    """With the gradient of the loss to the embeddings, caught behind the projector."""
    gradients = {}
    for weight in (0.0, 1.0):
        task = tiny_task(f"regularizer_weight={weight}").train()
        caught: list[Tensor] = []
        task.projector.register_forward_hook(lambda module, inputs, output, caught=caught: caught.append(output))
        batch = make_batch(task)
        loss = task(batch).loss
        (gradient,) = torch.autograd.grad(loss, caught)
        gradients[weight] = gradient.unflatten(0, batch["image"].shape[:2]).abs().sum(2)
    count = batch["overlap"].shape[2]
    assert (gradients[0.0][:, :count] == 0).all()
    assert (gradients[0.0][:, count:] > 0).all()
    assert (gradients[1.0] > 0).all()


def test_the_loss_is_the_weighted_sum_and_pictures_show_it() -> None:
    task = tiny_task("prediction_weight=2", "regularizer_weight=0.5").eval()
    batch = make_batch(task)
    with torch.no_grad():
        output = task(batch)
    expected = 2 * output.metrics["prediction_loss"] + 0.5 * output.metrics["regularizer"]
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert task.config.grid == (2, 2, 2)
    assert output.pictures is not None
    assert output.pictures["base crops"].shape == (1, *region_size(task.config))
    assert torch.equal(output.pictures["base crops"][:, :8, :16, 16:], batch["image"][0, 1])
    assert torch.equal(output.pictures["overlaps"][0, 0], batch["overlap"][0])
    assert 0 <= output.pictures["predicted"].min() <= output.pictures["predicted"].max() <= 1 + 1e-6


# Settings


@pytest.mark.parametrize(
    ("patch", "cell", "crop", "grid"),
    [
        ((160, 160, 160), 32, (64, 64, 64), (2, 2, 2)),
        ((256, 256, 256), 32, (64, 64, 64), (1, 4, 4)),
        ((512, 512), 64, (128, 128), (4, 4)),
        ((128, 128), 32, (64, 64), (2, 2)),
        ((40, 56, 40), 8, (16, 24, 16), (2, 2, 2)),
        ((16, 16, 16), 8, (8, 8, 16), (2, 2, 1)),
        ((8, 24, 16), 8, (8, 16, 8), (1, 1, 2)),
    ],
)
def test_automatic_grids_fit_the_patch(
    patch: tuple[int, ...], cell: int, crop: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    config = resolved(patch, cell)
    assert (config.crop_size, config.grid) == (crop, grid)
    assert all(region <= size for region, size in zip(region_size(config), patch))


def test_volumes_may_lack_half_a_crop_on_each_side() -> None:
    config = resolved((40, 56, 40), 8, crop_size=(16,))
    assert region_size(config) == (32, 32, 32)
    assert VoCo.smallest_volume(config) == (16, 16, 16)
    published = resolved((64, 256, 256), 32, crop_size=(64,))
    assert VoCo.smallest_volume(published) == (64, 192, 192)


def test_a_crop_as_large_as_the_patch_leaves_no_grid() -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*pretext\.grid=.*pretext\.crop_size"):
        resolved(crop_size=PATCH)


def test_volumes_smaller_than_that_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """The volumes are 20 x 18 x 24: four crops of 8 voxels leave more than half a crop of zeros on each side."""
    with pytest.raises(MFMError, match=r"(?s)E_CONFIG.*case0"):
        run(prepare(tmp_path), "voco", ("pretext.crop_size=8", "pretext.grid=1,4,4"))
