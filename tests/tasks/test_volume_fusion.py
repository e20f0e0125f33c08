"""Volume Fusion: the three published variants as published, and what is ours about them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch

from mfm_nnunet.tasks.image_operations import apply_gamma, map_percentiles, resize_linear, standardise
from mfm_nnunet.tasks.losses import soft_dice
from mfm_nnunet.tasks.masks import cell_limits
from mfm_nnunet.tasks.volume_fusion import VolumeFusion, VolumeFusionConfig, VolumeFusionTransform, draw_label, fuse
from tests.builders.tasks import make_batch, make_task

PATCH = (24, 32, 40)
VARIANTS = ("grid", "boxes", "two_image")


def config_of(variant: Any, **settings: Any) -> VolumeFusionConfig:
    return VolumeFusionConfig(variant=variant, **settings)


def crops_for(transform: VolumeFusionTransform, rng: np.random.Generator, channels: int = 1) -> list[np.ndarray]:
    return [rng.standard_normal((channels, *r.size)).astype(np.float32) for r in transform.requests(rng)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patch", [PATCH, (40, 48)])
def test_fused_patch_is_bit_exact_for_the_drawn_label(variant: str, patch: tuple[int, ...]) -> None:
    config = config_of(variant)
    rng = np.random.default_rng(0)
    foreground, background = rng.standard_normal((2, 3, *patch)).astype(np.float32)
    label = draw_label(config, patch, rng)
    assert label.dtype == np.uint8
    assert label.max() <= 4
    fused = fuse(foreground, background, label, 4)
    assert fused.dtype == np.float32
    for level in range(5):
        share = np.float32(level / 4)
        expected = share * foreground + (np.float32(1) - share) * background
        where = label == level
        assert np.array_equal(fused[:, where], expected[:, where])
    np.testing.assert_allclose(fuse(foreground, foreground, label, 4), foreground, rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_item_is_the_fusion_of_its_two_views(variant: str) -> None:
    transform = VolumeFusion.transform(config_of(variant), PATCH)
    crops = crops_for(transform, np.random.default_rng(1), channels=2)
    item = transform([crop.copy() for crop in crops], np.random.default_rng(2))
    rng = np.random.default_rng(2)
    foreground, background = transform.prepare([crop.copy() for crop in crops], rng)
    assert np.array_equal(item["label"], draw_label(transform.config, PATCH, rng))
    fused = fuse(foreground, background, item["label"], 4)
    assert item["image"].shape == (2, *PATCH)
    assert item["image"].dtype == np.float32
    if variant == "grid":
        assert min(foreground.min(), background.min()) >= -1e-6
        assert max(foreground.max(), background.max()) <= 1 + 1e-6
        np.testing.assert_allclose(item["image"].mean((1, 2, 3)), 0, atol=1e-4)
        np.testing.assert_allclose(item["image"].std((1, 2, 3)), 1, atol=1e-4)
        scale, offset = np.polyfit(fused[0].ravel(), item["image"][0].ravel(), 1)
        np.testing.assert_allclose(item["image"][0], scale * fused[0] + offset, atol=1e-4)
    else:
        assert np.array_equal(item["image"], fused)


@pytest.mark.parametrize(
    ("variant", "patch", "zero", "other"),
    [
        ("grid", (64, 128, 128), 0.46, 0.135),
        ("boxes", (64, 128, 128), 0.47, 0.13),
        ("two_image", (160,) * 3, 0.64, 0.09),
    ],
)
def test_class_frequencies_are_the_published_ones(
    variant: str, patch: tuple[int, ...], zero: float, other: float
) -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(5)
    for _ in range(100):
        counts += np.bincount(draw_label(config_of(variant), patch, rng).ravel(), minlength=5)
    share = counts / counts.sum()
    assert share[0] == pytest.approx(zero, abs=0.02)
    assert share[1:] == pytest.approx(np.full(4, other), abs=0.02)


@pytest.mark.parametrize("patch", [PATCH, (64, 64, 64), (16, 96)])
def test_lattice_has_exactly_its_share_of_mixed_cells(patch: tuple[int, ...]) -> None:
    for seed in range(8):
        label = draw_label(config_of("grid"), patch, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        sides = [int(rng.integers(*cell_limits(size, (8, 32)), endpoint=True)) for size in patch]
        offsets = [int(rng.integers(size % side, endpoint=True)) for size, side in zip(patch, sides)]
        counts = [size // side for size, side in zip(patch, sides)]
        starts = tuple(slice(o, o + n * s, s) for o, n, s in zip(offsets, counts, sides))
        cells = label[starts]
        assert (cells > 0).sum() == int(0.7 * cells.size) > 0
        grown = cells
        for axis, side in enumerate(sides):
            grown = grown.repeat(side, axis)
        whole = np.zeros_like(label)
        whole[tuple(slice(o, o + n * s) for o, n, s in zip(offsets, counts, sides))] = grown
        assert np.array_equal(label, whole)  # cells are uniform, and the margin is class 0


@pytest.mark.parametrize(
    ("size", "limits"),
    [(160, (8, 32)), (64, (8, 32)), (40, (5, 20)), (32, (4, 16)), (16, (2, 8)), (3, (1, 1)), (1, (1, 1))],
)
def test_cells_shrink_with_short_axes(size: int, limits: tuple[int, int]) -> None:
    assert cell_limits(size, (8, 32)) == limits
    assert size == 1 or size // limits[1] >= 2


class Recorder:
    """A generator that keeps the bounds it was asked for."""

    def __init__(self) -> None:
        self.bounds: set[tuple[int, ...]] = set()
        self._rng = np.random.default_rng(0)

    def integers(self, *bounds: int, endpoint: bool = False) -> int:
        self.bounds.add(bounds)
        return int(self._rng.integers(*bounds, endpoint=endpoint))


@pytest.mark.parametrize(
    ("variant", "patch", "sides", "count", "classes"),
    [
        ("boxes", (64, 128, 128), {(8, 40), (8, 80)}, (10, 40), (1, 4)),
        ("two_image", (160, 160, 160), {(8, 100)}, (10, 39), (0, 4)),
        ("boxes", (16, 256), {(2, 10), (8, 160)}, (10, 40), (1, 4)),
    ],
)
def test_boxes_have_the_published_sizes_numbers_and_classes(
    variant: str, patch: tuple[int, ...], sides: set, count: tuple[int, int], classes: tuple[int, int]
) -> None:
    recorder = Recorder()
    draw_label(config_of(variant), patch, recorder)  # type: ignore[arg-type]
    assert {bounds for bounds in recorder.bounds if len(bounds) == 2} == {*sides, count, classes}


def test_grid_asks_for_two_crops_of_one_volume_scaled_per_axis() -> None:
    transform = VolumeFusion.transform(config_of("grid"), (100, 100, 100))
    rng = np.random.default_rng(0)
    requests = [request for _ in range(300) for request in transform.requests(rng)]
    assert all(request.volume == 0 and not request.pad for request in requests)
    sizes = np.array([request.size for request in requests])
    assert sizes.min() in (70, 71)
    assert sizes.max() in (148, 149)
    assert abs(sizes.mean() - 109.5) < 1.5
    assert (sizes[:, 0] != sizes[:, 1]).mean() > 0.9  # drawn per axis ...
    assert (sizes[::2] != sizes[1::2]).any(1).mean() > 0.9  # ... and per crop
    for variant in ("boxes", "two_image"):
        requests = VolumeFusion.transform(config_of(variant), PATCH).requests(rng)
        assert [(r.size, r.volume, r.pad) for r in requests] == [(PATCH, 0, True), (PATCH, 1, True)]


def test_grid_takes_crops_of_any_size_a_small_image_leaves() -> None:
    transform = VolumeFusion.transform(config_of("grid"), PATCH)
    rng = np.random.default_rng(0)
    crops = [rng.standard_normal((1, *size)).astype(np.float32) for size in ((1, 20, 60), (36, 48, 1))]
    item = transform(crops, rng)
    assert item["image"].shape == (1, *PATCH)
    assert np.isfinite(item["image"]).all()


def test_inverting_flips_both_views_or_none() -> None:
    transform = VolumeFusion.transform(config_of("grid"), (8, 8))
    ramp = np.arange(64, dtype=np.float32).reshape(1, 8, 8) ** 2  # most voxels are dark
    inverted = []
    for seed in range(200):
        views = transform.prepare([ramp.copy(), ramp.copy()], np.random.default_rng(seed))
        is_bright = [bool((view > 0.5).mean() > 0.5) for view in views]
        assert is_bright[0] == is_bright[1]
        inverted.append(is_bright[0])
    assert np.mean(inverted) == pytest.approx(0.25, abs=0.06)


def test_mirroring_is_independent_per_axis_and_view() -> None:
    transform = VolumeFusion.transform(config_of("grid"), (8, 8))
    ramp = (10 * np.arange(8)[:, None] + np.arange(8)[None] * 1.0).astype(np.float32)[None]
    seen = []
    for seed in range(200):
        views = transform.prepare([ramp.copy(), ramp.copy()], np.random.default_rng(seed))
        # Whether both axes were treated alike can be seen in spite of a possible inversion.
        seen.append(tuple(bool(v[0, 0, 0] > v[0, -1, 0]) == bool(v[0, 0, 0] > v[0, 0, -1]) for v in views))
    shares = [np.mean([pair == (a, b) for pair in seen]) for a in (False, True) for b in (False, True)]
    np.testing.assert_allclose(shares, 0.25, atol=0.08)


@pytest.mark.parametrize(
    ("before", "after"), [((20, 33, 7), (24, 32, 40)), ((24, 1, 41), (12, 5, 40)), ((9, 9), (9, 14))]
)
def test_resizing_equals_scipys_linear_zoom(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal((2, *before)).astype(np.float32)
    expected = np.stack([scipy.ndimage.zoom(c, [b / a for a, b in zip(before, after)], order=1) for c in x])
    result = resize_linear(x, after)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_percentiles_are_mapped_piecewise_and_per_channel() -> None:
    x = np.random.default_rng(0).standard_normal((2, 30, 30)).astype(np.float32) * np.array([1, 50])[:, None, None]
    mapped = map_percentiles(x.astype(np.float32), 1, 99)
    for channel, original in zip(mapped, x):
        v0, v1 = np.percentile(original, [1, 99])
        expected = np.interp(original, [original.min(), v0, v1, original.max()], [0, 0.1, 0.9, 1])
        np.testing.assert_allclose(channel, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["constant", "nearly", "saturated"])
def test_air_and_saturated_crops_stay_finite(kind: str) -> None:
    x = np.full((1, 16, 16), -0.7, np.float32)
    if kind == "nearly":
        x[0, 0, 0] = 5
    if kind == "saturated":
        x[0] = np.random.default_rng(0).standard_normal((16, 16)).clip(-0.5, 0.5)
    mapped = apply_gamma(map_percentiles(x, 1, 99), 1.3)
    assert np.isfinite(mapped).all()
    assert mapped.min() >= 0
    assert mapped.max() <= 1
    if kind == "constant":
        assert (mapped == 0).all()
        assert (standardise(mapped) == 0).all()
    if kind == "saturated":  # what is clipped is no outlier
        assert mapped.max() == pytest.approx(0.1 + 0.8, abs=1e-3)
    transform = VolumeFusion.transform(config_of("grid"), (16, 16))
    assert np.isfinite(transform([x, x.copy()], np.random.default_rng(0))["image"]).all()


def test_gamma_keeps_the_range() -> None:
    x = np.random.default_rng(0).uniform(-2, 5, (2, 20, 20)).astype(np.float32)
    y = apply_gamma(x, 1.4)
    np.testing.assert_allclose(y.min((1, 2)), x.min((1, 2)), atol=1e-5)
    np.testing.assert_allclose(y.max((1, 2)), x.max((1, 2)), atol=1e-5)
    assert (y < x - 0.01).mean() > 0.5


@pytest.mark.parametrize(
    ("variant", "volumes", "augmentation"), [("grid", 1, "none"), ("boxes", 2, "none"), ("two_image", 2, "mirror")]
)
def test_what_each_variant_needs(variant: str, volumes: int, augmentation: str) -> None:
    config = config_of(variant)
    assert VolumeFusion.volumes_per_item(config) == volumes  # the stream refuses a corpus with fewer
    assert VolumeFusion.augmentation(config) == augmentation
    assert VolumeFusion.num_outputs(config, 3) == 5
    assert VolumeFusion.restoring == "none"


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_of_each_variant_on_a_batch_of_one_and_two(variant: str) -> None:
    task = make_task("volume_fusion", "resenc", PATCH, settings=[f"variant={variant}"]).eval()
    for batch_size in (1, 2):
        batch = make_batch(task, batch_size)
        with torch.no_grad():
            output = task(batch)
            logits = task.backbone(batch["image"])
        probabilities, label = logits.softmax(1).numpy(), batch["label"].numpy()
        axes = (1, 2, 3) if variant == "two_image" else None
        dice = []
        for k in range(5):
            p, t = probabilities[:, k], label == k
            dice.append((2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5))
        entropy = -np.log(np.take_along_axis(probabilities, label[:, None].astype(int), 1)).mean()
        factor = 1 if variant == "two_image" else 0.5
        assert output.loss.item() == pytest.approx(factor * (1 - np.mean(dice) + entropy), rel=1e-4)
        assert output.pictures is not None
        assert {key: tuple(p.shape) for key, p in output.pictures.items()} == dict.fromkeys(
            ("fused", "label", "prediction"), (1, *PATCH)
        )


def test_soft_dice_of_the_perfect_and_the_absent_class() -> None:
    label = torch.tensor([[[0, 1], [1, 0]]])
    logits = 1000.0 * torch.stack([label == 0, label == 1, torch.zeros_like(label)], 1).float()
    for over_batch in (True, False):
        assert soft_dice(logits, label, over_batch).item() == pytest.approx(1)
