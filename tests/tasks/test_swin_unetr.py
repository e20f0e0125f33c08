"""SwinUNETR's tasks: rotations that can be undone, uncut targets, heads that see everything, and no silent change.

The defects of the published code are tests here: heads that read single corner tokens, noise in [0, 1] on z-scored
images, a crash on planes that are not square, a batch size fixed when the loss was made, a second forward path.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mfm_nnunet.errors import MFMError
from mfm_nnunet.tasks import swin_unetr
from mfm_nnunet.tasks.image_operations import cut_out, draw_share, mix_in, rotate, rotation_plane
from mfm_nnunet.tasks.swin_unetr import CoarseDecoder, SwinUNETR, SwinUNETRConfig
from tests.builders.tasks import geometry, stack
from tests.builders.tiny_plans import tiny_backbone

PATCH = (8, 16, 16)


def config_for(patch: tuple[int, ...] = PATCH, **settings: Any) -> SwinUNETRConfig:
    return SwinUNETR.resolve(SwinUNETRConfig(**settings), geometry(patch, 8))


def item_of(
    seed: int, config: SwinUNETRConfig, patch: tuple[int, ...] = PATCH, valid: np.ndarray | None = None
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The crops of a reading and the item made of copies of them."""
    rng = np.random.default_rng(seed)
    transform = SwinUNETR.transform(config, patch)
    crops = [rng.normal(3 * r.volume, 1, (2, *r.size)).astype(np.float32) for r in transform.requests(rng)]
    masks = None if valid is None else [valid] * len(crops)
    return crops, transform([crop.copy() for crop in crops], rng, masks)


def task_of(patch: tuple[int, ...] = PATCH, **settings: Any) -> SwinUNETR:
    backbone = tiny_backbone("resenc", patch, num_inputs=2, restoring="none")
    return SwinUNETR(SwinUNETR.resolve(SwinUNETRConfig(**settings), backbone.geometry()), backbone)


def batch_of(task: SwinUNETR, size: int = 2, **masks: np.ndarray) -> dict[str, Tensor]:
    return stack([item_of(seed, task.config, task.backbone.patch_size, **masks)[1] for seed in range(size)])


# Rotation


def test_labels_are_the_rotations_and_turning_back_restores_the_image() -> None:
    config = config_for(cut_out_budget=0.0, mix=False)
    assert config.rotation_plane == (1, 2)
    seen = set()
    for seed in range(12):
        (crop,), item = item_of(seed, config)
        assert item["image"].shape == item["target"].shape == (2, 2, *PATCH)
        for view, target, turns in zip(item["image"], item["target"], item["rotation"]):
            seen.add(int(turns))
            assert np.array_equal(np.rot90(view, -int(turns), axes=(2, 3)), crop)
            assert np.array_equal(view, target)
            others = set(range(4)) - {int(turns)}
            assert not any(np.array_equal(np.rot90(view, -k, axes=(2, 3)), crop) for k in others)
    assert seen == {0, 1, 2, 3}


def test_the_two_views_are_rotated_independently_and_uniformly() -> None:
    config = config_for((8, 8), cut_out_budget=0.0, mix=False)
    pairs = [tuple(item_of(seed, config, (8, 8))[1]["rotation"]) for seed in range(800)]
    counts = np.array([pairs.count((a, b)) for a in range(4) for b in range(4)])
    assert counts.min() > 25
    assert counts.max() < 80


@pytest.mark.parametrize(
    ("patch", "plane"),
    [
        ((160, 160, 160), (1, 2)),
        ((8, 16, 16), (1, 2)),
        ((40, 56, 40), (0, 2)),
        ((16, 16, 8), (0, 1)),
        ((8, 24, 16), ()),
        ((24, 24), (0, 1)),
        ((16, 32), ()),
    ],
)
def test_the_plane_is_the_last_pair_of_equal_axes(patch: tuple[int, ...], plane: tuple[int, ...]) -> None:
    assert rotation_plane(patch) == plane
    config = config_for(patch)
    assert config.rotation_plane == plane
    assert SwinUNETR.resolve(config, geometry(patch, 8)) == config


@pytest.mark.parametrize("patch", [(8, 24, 16), (16, 32)])
def test_without_equal_axes_rotation_is_off_with_one_message(
    patch: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger=swin_unetr.__name__):
        config_for()
        config_for((8, 24, 16), rotation_plane=())
        assert not caplog.records
        task = task_of(patch)
        assert SwinUNETR.resolve(task.config, task.backbone.geometry()) == task.config
    (record,) = caplog.records
    assert "x".join(map(str, patch)) in record.getMessage().replace(" x ", "x")
    assert task.classifier is None
    batch = batch_of(task)
    assert not batch["rotation"].any()
    assert torch.equal(batch["target"][:, 0], batch["target"][:, 1])
    output = task(batch)
    assert set(output.metrics) == {"restoration", "contrast"}
    assert output.loss.item() == pytest.approx(sum(value.item() for value in output.metrics.values()), rel=1e-5)
    output.loss.backward()
    assert all(weight.grad is not None for weight in task.parameters() if weight.requires_grad)


# Cut-out and mixing


def test_the_target_is_the_rotated_uncut_image() -> None:
    config = config_for()
    changed = []
    for seed in range(10):
        crops, item = item_of(seed, config)
        for view, target, turns in zip(item["image"], item["target"], item["rotation"]):
            assert np.array_equal(np.rot90(target, -int(turns), axes=(2, 3)), crops[0])
            differs = (view != target).any(0)
            # The noise in a box begins and ends with the image's own extremes, which may lie in it.
            assert (differs & (view == target).any(0)).sum() <= 2, "channels are cut in different places"
            changed.append(differs.mean())
    assert 0.05 < np.mean(changed) < 0.45
    assert len(set(changed)) == len(changed), "the views are cut alike"


@pytest.mark.parametrize("patch", [(16, 32, 32), (4, 64, 48), (48, 64)])
def test_boxes_sum_up_to_the_drawn_share(patch: tuple[int, ...]) -> None:
    shares, largest = [], math.prod(max(1, int(0.25 * size)) for size in patch)
    for seed in range(200):
        boxes = list(draw_share(patch, 0.3, (0.05, 0.25), np.random.default_rng(seed)))
        volumes = [math.prod(part.stop - part.start for part in box) for box in boxes]
        for box in boxes:
            for part, size in zip(box, patch):
                assert 0 <= part.start < part.stop <= size
                assert part.stop - part.start <= max(1, int(0.25 * size))
                assert part.stop - part.start >= max(1, int(0.05 * size))
        # The budget is reached by the last box, not before.
        wanted = np.random.default_rng(seed).uniform(0, 0.3) * math.prod(patch)
        assert sum(volumes[:-1]) < wanted <= sum(volumes) < wanted + largest
        shares.append(wanted / math.prod(patch))
    assert 0.13 < np.mean(shares) < 0.17
    assert not list(draw_share(patch, 0.0, (0.05, 0.25), np.random.default_rng(0)))


@pytest.mark.parametrize(("low", "high"), [(-1.5, 4.0), (-1000.0, 2000.0), (0.0, 1.0)])
def test_noise_lies_in_the_range_of_the_image_and_fills_it(low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    image = np.stack([rng.uniform(low, high, (16, 16, 16)), rng.uniform(10 * high, 11 * high, (16, 16, 16))])
    image = image.astype(np.float32)
    view = cut_out(image.copy(), 0.5, (0.2, 0.3), rng)
    is_noise = view != image
    assert is_noise.any()
    for channel, before, noise in zip(view, image, is_noise):
        assert channel[noise].min() == pytest.approx(before.min(), abs=1e-3 * float(np.ptp(before)))
        assert channel[noise].max() == pytest.approx(before.max(), abs=1e-3 * float(np.ptp(before)))
        middle = (channel[noise].mean() - before.min()) / np.ptp(before)
        assert 0.4 < middle < 0.6


def test_a_constant_image_and_boxes_of_one_voxel_are_no_trouble() -> None:
    view = cut_out(np.full((1, 8, 8), 7, np.float32), 0.9, (0.01, 0.01), np.random.default_rng(0))
    assert (view == 7).all()
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    cut = cut_out(ramp.copy(), 0.9, (0.01, 0.01), np.random.default_rng(0))
    assert set(np.unique(cut[cut != ramp])) == {np.float32(0.5)}


def test_mixed_boxes_are_the_same_region_of_the_other_image() -> None:
    view, other = np.zeros((2, 16, 16, 16), np.float32), np.arange(2 * 16**3, dtype=np.float32).reshape(2, 16, 16, 16)
    mixed = mix_in(view.copy(), other + 1, 0.3, (0.05, 0.25), np.random.default_rng(1))
    assert 0 < (mixed != 0).mean() < 0.35
    assert np.array_equal(mixed[mixed != 0], (other + 1)[mixed != 0])


def test_how_often_views_are_mixed_and_with_what() -> None:
    """With a constant second volume each voxel tells where it comes from."""
    settings = {"cut_out_budget": 0.0, "mix_probability": 0.5}
    transform = SwinUNETR.transform(config_for((8, 8), **settings), (8, 8))
    assert [request.volume for request in transform.requests(np.random.default_rng(0))] == [0, 1]
    mixed = 0
    for seed in range(200):
        crops = [np.full((1, 8, 8), value, np.float32) for value in (0, 1)]
        item = transform(crops, np.random.default_rng(seed))
        assert not item["target"].any()
        mixed += int((item["image"].reshape(2, -1) == 1).any(1).sum())
    assert 150 < mixed < 250
    alone = SwinUNETR.transform(config_for(mix=False), PATCH)
    assert [request.volume for request in alone.requests(np.random.default_rng(0))] == [0]
    assert [SwinUNETR.volumes_per_item(SwinUNETRConfig(mix=mix)) for mix in (True, False)] == [2, 1]


# Heads and losses


@pytest.mark.parametrize("heads", ["pooled", "token"])
def test_pooled_heads_see_every_place_and_token_heads_one_corner(heads: str) -> None:
    coarsest = torch.randn(2, 16, 2, 3, 2, requires_grad=True)
    for index, summary in enumerate(swin_unetr.summaries(coarsest, heads)):  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(summary.sum(), coarsest, retain_graph=True)
        places = gradient.abs().sum(1).flatten(1) > 0
        assert places.sum(1).tolist() == ([12, 12] if heads == "pooled" else [1, 1])
        if heads == "token":
            assert places.nonzero()[:, 1].tolist() == [index, index]


def test_the_loss_is_the_weighted_sum_of_three_written_by_hand() -> None:
    task = task_of(restoration_weight=2.0, contrast_weight=0.5, rotation_weight=3.0, temperature=0.3).eval()
    batch = batch_of(task, 3)
    with torch.no_grad():
        output = task(batch)
        image, target = batch["image"].flatten(0, 1), batch["target"].flatten(0, 1)
        features = task.backbone.features(image)
        pooled = features[-1].flatten(2).mean(2)
        l1 = (task.decoder(features) - target).abs().mean()  # type: ignore[misc]
        vectors = functional.normalize(task.projection(pooled), dim=1)  # type: ignore[misc]
        contrast = torch.zeros(())
        for row in range(6):
            others = [vectors[row] @ vectors[k] / 0.3 for k in range(6) if k != row]
            contrast += torch.stack(others).logsumexp(0) - vectors[row] @ vectors[row ^ 1] / 0.3
        logits = task.classifier(pooled)  # type: ignore[misc]
        rotation = -logits.log_softmax(1)[range(6), batch["rotation"].flatten()].mean()
    expected = {"restoration": l1, "contrast": contrast / 6, "rotation": rotation}
    for name, value in expected.items():
        assert output.metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name
    found = (logits.argmax(1) == batch["rotation"].flatten()).float().mean()
    assert output.metrics["rotation_found"].item() == pytest.approx(found.item())
    assert output.loss.item() == pytest.approx((2 * l1 + contrast / 12 + 3 * rotation).item(), rel=1e-4)
    assert output.pictures is not None
    assert torch.equal(output.pictures["target"], target[0])
    assert torch.equal(output.pictures["view"], image[0])
    assert output.pictures["restored"].shape == (2, *PATCH)


@pytest.mark.parametrize("without", ["restoration", "contrast", "rotation"])
def test_a_loss_without_weight_is_left_out_with_its_layers(without: str) -> None:
    task = task_of(**{f"{without}_weight": 0.0}).train()
    output = task(batch_of(task))
    assert without not in output.metrics
    output.loss.backward()
    for name, weight in task.named_parameters():
        assert not weight.requires_grad or weight.grad is not None, name
    assert SwinUNETR.smallest_batch(task.config) == (1 if without == "contrast" else 2)


def test_anonymised_voxels_are_turned_with_the_view_and_left_out_of_the_restoration() -> None:
    valid = np.ones((1, *PATCH), bool)
    valid[:, :, :5, :3] = False
    task = task_of().eval()
    batch = batch_of(task, valid=valid)
    assert batch["valid"].shape == (2, 2, 1, *PATCH)
    for masks, turns in zip(batch["valid"].numpy(), batch["rotation"]):
        for mask, turn in zip(masks, turns):
            assert np.array_equal(np.rot90(mask, -int(turn), axes=(2, 3)), valid)
    spoilt = torch.where(batch["valid"], batch["target"], batch["target"] + 100)
    touched = torch.where(batch["valid"], batch["target"] + 100, batch["target"])
    with torch.no_grad():
        plain, same, other = (task({**batch, "target": target}) for target in (batch["target"], spoilt, touched))
        bare = task({key: value for key, value in batch.items() if key != "valid"})
    assert same.loss == plain.loss
    assert other.metrics["restoration"] > plain.metrics["restoration"] + 50
    assert bare.metrics["restoration"] != plain.metrics["restoration"]
    assert all(bare.metrics[name] == plain.metrics[name] for name in ("contrast", "rotation"))


# The decoder


@pytest.mark.parametrize(
    ("family", "patch", "widths"),
    [
        ("resenc", PATCH, [16, 16, 8]),
        ("primus", (16, 24), [48, 24, 12, 6]),
    ],
)
def test_the_decoder_reverses_the_encoder_and_has_no_skips(
    family: str, patch: tuple[int, ...], widths: list[int]
) -> None:
    backbone = tiny_backbone(family, patch, restoring="none")
    decoder = CoarseDecoder(backbone, 3)
    assert [stage[0].in_channels for stage in decoder.stages] == widths[:-1]  # type: ignore[index, union-attr]
    assert decoder.output.in_channels == widths[-1]
    features = [feature.detach().requires_grad_() for feature in backbone.features(torch.randn(2, 1, *patch))]
    restored = decoder(features)
    assert restored.shape == (2, 3, *patch)
    gradients = torch.autograd.grad(restored.square().sum(), features, allow_unused=True)
    assert all(gradient is None for gradient in gradients[:-1])
    assert (gradients[-1].abs().flatten(2).sum((0, 1)) > 0).all()


def test_tokens_that_are_short_on_one_axis() -> None:
    backbone = tiny_backbone("primus", (8, 24, 16), restoring="none", patch_embed_size=[4, 8, 8])
    assert CoarseDecoder(backbone, 1)(backbone.features(torch.randn(2, 1, 8, 24, 16))).shape == (2, 1, 8, 24, 16)


def test_published_widths() -> None:
    backbone = tiny_backbone("primus", (16, 16, 16), restoring="none", embed_dim=864, eva_numheads=12, eva_depth=1)
    decoder = CoarseDecoder(backbone, 1)
    layers = [*(stage[0] for stage in decoder.stages), decoder.output]  # type: ignore[index, union-attr]
    assert [layer.in_channels for layer in layers] + [layers[-1].out_channels] == [864, 432, 216, 108, 1]
    with torch.device("meta"):
        projection = SwinUNETR(SwinUNETR.resolve(SwinUNETRConfig(), backbone.geometry()), backbone).projection
    assert projection is not None
    assert (projection.in_features, projection.out_features) == (864, 512)


# Settings


def test_two_places_are_needed_for_token_heads_and_some_loss_without_rotation() -> None:
    with pytest.raises(MFMError, match=r"pretext\.heads=token"):
        config_for((8, 8, 8), heads="token")
    with pytest.raises(MFMError, match="no loss is left"):
        config_for((8, 24, 16), restoration_weight=0.0, contrast_weight=0.0)


def test_crops_come_as_they_are() -> None:
    """Mirroring would turn a rotation by 180 degrees into none: its labels would be noise."""
    assert SwinUNETR.augmentation(SwinUNETRConfig()) == "none"
    image = np.arange(16, dtype=np.float32).reshape(1, 4, 4)
    assert np.array_equal(np.flip(image, (1, 2)), rotate(image, 2, (0, 1)))
