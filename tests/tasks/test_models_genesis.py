"""Models Genesis: damage as published but in normalised units, every channel, any patch, and an untouched target."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mfm_nnunet.tasks import models_genesis
from mfm_nnunet.tasks.image_operations import CURVE_POINTS, UNIT_KNOTS, apply_curve, draw_curve, intensity_knots
from mfm_nnunet.tasks.models_genesis import (
    MARGIN,
    ModelsGenesis,
    ModelsGenesisConfig,
    corrupt,
    draw_inpainting,
    draw_outpainting,
    draw_shuffle,
)
from tests.builders.tasks import make_task

PATCH = (24, 32, 40)
SHUFFLE = ModelsGenesisConfig(shuffle_probability=1, curve_probability=0, paint_probability=0)
CURVE = ModelsGenesisConfig(shuffle_probability=0, curve_probability=1, paint_probability=0)
INPAINT = ModelsGenesisConfig(0, 0, 1, 1)
OUTPAINT = ModelsGenesisConfig(0, 0, 1, 0)
EVERYTHING = ModelsGenesisConfig(1, 1, 1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """A z-scored image: two thirds of its values lie outside of [0, 1]."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# Intensities


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_keeps_range_order_and_distinct_values_of_a_z_scored_image(seed: int) -> None:
    """The published code bends z-scored images as if they lay in [0, 1], so all negative values become one."""
    image, rng = normal(1, *PATCH, seed=seed), np.random.default_rng(seed)
    bent = corrupt(image, CURVE, rng)
    assert bent.dtype == np.float32
    assert image.min() <= bent.min()
    assert bent.max() <= image.max()
    assert len(np.unique(bent)) > 0.99 * len(np.unique(image))
    assert len(np.unique(bent[image < 0])) > 0.99 * len(np.unique(image[image < 0]))
    along = bent.reshape(-1)[image.reshape(-1).argsort()]
    steps = np.diff(along)
    assert (steps >= 0).all() or (steps <= 0).all()
    assert np.abs(bent - image).max() > 0.05


def test_half_of_the_curves_fall_and_all_join_the_corners() -> None:
    rng = np.random.default_rng(0)
    curves = [draw_curve(rng) for _ in range(1000)]
    rises = [bool(curve[0] < curve[-1]) for curve in curves]
    assert np.mean(rises) == pytest.approx(0.5, abs=0.04)
    for curve, is_rising in zip(curves, rises):
        assert len(curve) == CURVE_POINTS == 1024
        assert curve[[0, -1]].tolist() == pytest.approx([0, 1] if is_rising else [1, 0])
        assert (np.diff(curve) * (1 if is_rising else -1) >= 0).all()


def test_a_curve_is_the_bezier_curve_of_its_control_points() -> None:
    class Fixed(np.random.Generator):
        """Control points (0.2, 0.9) and (0.6, 0.3), a rising curve."""

        def random(self, size: Any = None, *_: Any, **__: Any) -> Any:
            return 0.7 if size is None else np.array([[0.2, 0.9], [0.6, 0.3]])

    curve = draw_curve(Fixed(np.random.PCG64(0)))
    for t in (0.1, 0.4, 0.5, 0.8):
        x = 3 * t * (1 - t) ** 2 * 0.2 + 3 * t**2 * (1 - t) * 0.6 + t**3
        y = 3 * t * (1 - t) ** 2 * 0.9 + 3 * t**2 * (1 - t) * 0.3 + t**3
        assert np.interp(x, np.linspace(0, 1, 1024), curve) == pytest.approx(y, abs=1e-4)


def test_percentiles_are_robust_and_nothing_is_cut_off() -> None:
    image = normal(*PATCH)
    image[0, 0, 0] = 1000
    knots = intensity_knots(image)
    assert knots[[0, 3]].tolist() == [image.min(), 1000]
    assert knots[[1, 2]] == pytest.approx([-2.6, 2.6], abs=0.1)
    straight = np.linspace(0, 1, CURVE_POINTS)
    np.testing.assert_allclose(apply_curve(image, knots, straight), image, atol=1e-4, rtol=1e-4)
    inverted = apply_curve(image, knots, straight[::-1])
    assert inverted[0, 0, 0] == pytest.approx(image.min())
    assert np.median(np.abs(inverted + image)) < 0.1, "one bright voxel squeezes all the others"


@pytest.mark.parametrize("config", [EVERYTHING, OUTPAINT, CURVE])
def test_constant_channels_and_air_with_a_rim_of_tissue(config: ModelsGenesisConfig) -> None:
    image = np.zeros((2, *PATCH), np.float32)
    image[1] = -3
    image[1, 0, :3, :3] = np.arange(9).reshape(3, 3)
    for seed in range(5):
        corrupted = corrupt(image, config, np.random.default_rng(seed))
        assert np.isfinite(corrupted).all()
        assert (corrupted[0] == 0).all()
        assert corrupted[1].min() >= -3
        assert corrupted[1].max() <= 8
        assert not np.array_equal(corrupted[1], image[1])


# Shuffling


def test_one_window_keeps_its_voxels_and_all_others_stay() -> None:
    moved_sides = set()
    for seed in range(300):
        source = draw_shuffle(PATCH, 0.25, 1e-9, np.random.default_rng(seed))
        places = np.arange(source.size)
        assert np.array_equal(np.sort(source), places), "voxels are lost or doubled"
        moved = np.stack(np.unravel_index(places[source != places], PATCH))
        came_from = np.stack(np.unravel_index(source[source != places], PATCH))
        assert sorted(map(tuple, moved.T)) == sorted(map(tuple, came_from.T)), "voxels enter or leave the window"
        if moved.size:
            sides = np.ptp(moved, axis=1) + 1
            assert (sides <= [6, 8, 10]).all()
            moved_sides.add(int(sides[2]))
    assert moved_sides == set(range(1, 11))


@pytest.mark.parametrize("patch", [(40, 40, 40), PATCH, (64, 64), (20, 160, 160)])
def test_windows_hold_the_same_share_of_any_patch_and_read_nearby(patch: tuple[int, ...]) -> None:
    limits = [max(4, size // 10) for size in patch]
    shares = []
    for seed in range(3):
        source = draw_shuffle(patch, 0.1, 1.5, np.random.default_rng(seed))
        places = np.arange(source.size)
        shares.append((source != places).mean())
        distance = np.abs(np.stack(np.unravel_index(source, patch)) - np.stack(np.unravel_index(places, patch)))
        assert (distance.max(1) < limits).all()
    assert np.mean(shares) == pytest.approx(0.7, abs=0.1)


def test_all_channels_are_shuffled_alike() -> None:
    """The published code shuffles channel 0 only."""
    first = normal(*PATCH)
    image = np.stack([first, 2 * first + 1, -first])
    for config in (SHUFFLE, INPAINT, OUTPAINT):
        corrupted = corrupt(image, config, np.random.default_rng(1))
        changed = corrupted != image
        assert changed.any()
        if config is SHUFFLE:
            assert np.array_equal(corrupted[1], 2 * corrupted[0] + 1)
            assert np.array_equal(corrupted[2], -corrupted[0])
        assert (changed == changed[0]).mean() > 0.999, "channels are corrupted at different places"


# Painting


@pytest.mark.parametrize(
    ("draw", "least", "low", "high"),
    [
        (draw_inpainting, 0, lambda n: n // 6, lambda n: n // 3),
        (draw_outpainting, 1, lambda n: n - 4 * n // 7, lambda n: n - 3 * n // 7),
    ],
)
def test_boxes_have_the_published_numbers_and_sides_and_lie_within_the_margin(
    draw: Any, least: int, low: Any, high: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes: list[tuple[slice, ...]] = []
    draw_box = models_genesis._draw_box
    monkeypatch.setattr(models_genesis, "_draw_box", lambda *args: boxes.append(draw_box(*args)) or boxes[-1])
    rng, counts, sides = np.random.default_rng(0), Counter[int](), [set[int]() for _ in PATCH]
    for _ in range(200):
        boxes.clear()
        painted = draw(PATCH, rng)
        inside = np.zeros(PATCH, bool)
        for box in boxes:
            inside[box] = True
            for seen, side, size in zip(sides, box, PATCH):
                seen.add(side.stop - side.start)
                assert MARGIN <= side.start < side.stop <= size - MARGIN
        assert np.array_equal(painted, inside if draw is draw_inpainting else ~inside)
        counts[len(boxes)] += 1
    assert sides == [set(range(low(size), high(size) + 1)) for size in PATCH]
    assert set(counts) == set(range(least, 6))
    assert counts[5] / 200 == pytest.approx(0.95 ** (5 - least), abs=0.06)


@pytest.mark.parametrize("config", [INPAINT, OUTPAINT])
def test_noise_is_uniform_between_the_percentiles_and_the_rest_is_exact(config: ModelsGenesisConfig) -> None:
    image = normal(2, *PATCH) * 5 - 20
    corrupted = corrupt(image, config, np.random.default_rng(3))
    painted = (corrupted != image).any(0)
    assert 0 < painted.mean() < 0.95
    for channel, original in zip(corrupted, image):
        assert original.min() <= channel.min()
        assert channel.max() <= original.max()
        unit = np.interp(channel[painted], intensity_knots(original), UNIT_KNOTS)
        assert np.histogram(unit, 5, (0, 1))[0] / unit.size == pytest.approx([0.2] * 5, abs=0.03)
    assert np.array_equal(corrupted[:, ~painted], image[:, ~painted])
    assert not np.array_equal(corrupted[0][painted], corrupted[1][painted])


# Items


def test_probabilities_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ModelsGenesisConfig() == ModelsGenesisConfig(0.5, 0.9, 0.9, 0.2, 0.1, 1.5)
    fired: Counter[str] = Counter()

    def count(name: str) -> None:
        original = getattr(models_genesis, name)

        def counted(*args: Any) -> Any:
            fired[name] += 1
            return original(*args)

        monkeypatch.setattr(models_genesis, name, counted)

    for name in ("draw_shuffle", "draw_curve", "draw_inpainting", "draw_outpainting"):
        count(name)
    rng, image, unchanged = np.random.default_rng(0), normal(1, 16, 16), 0
    for _ in range(1000):
        unchanged += np.array_equal(corrupt(image, ModelsGenesisConfig(), rng), image)
    assert fired["draw_shuffle"] == pytest.approx(500, abs=40)
    assert fired["draw_curve"] == pytest.approx(900, abs=30)
    assert fired["draw_inpainting"] + fired["draw_outpainting"] == pytest.approx(900, abs=30)
    assert fired["draw_inpainting"] == pytest.approx(180, abs=35)
    assert unchanged < 20


@pytest.mark.parametrize("patch", [(3, 20, 20), (1, 16, 16), (2, 2, 2), (8, 40)])
def test_short_axes_and_2d(patch: tuple[int, ...]) -> None:
    """In the published code an axis shorter than 10 voxels ends the run."""
    image = normal(2, *patch)
    for config in (SHUFFLE, CURVE, INPAINT, OUTPAINT, EVERYTHING):
        results = [corrupt(image, config, np.random.default_rng(seed)) for seed in range(10)]
        assert all(result.shape == image.shape and np.isfinite(result).all() for result in results)
        assert any(not np.array_equal(result, image) for result in results)


def test_the_target_is_the_crop_and_never_modified() -> None:
    transform = ModelsGenesis.transform(EVERYTHING, PATCH)
    for seed in range(10):
        crop, rng = normal(2, *PATCH), np.random.default_rng(seed)
        kept = crop.copy()
        assert [(request.size, request.pad) for request in transform.requests(rng)] == [(PATCH, True)]
        valid = np.random.default_rng(seed).random((1, *PATCH)) < 0.5
        item = transform([crop], rng, [valid.copy()])
        assert np.array_equal(item["target"], kept)
        assert np.array_equal(item["valid"], valid)
        assert not np.shares_memory(item["image"], item["target"])
        assert not np.array_equal(item["image"], item["target"])
    nothing = transform.__class__(ModelsGenesisConfig(0, 0, 0), PATCH)([kept], rng)
    assert np.array_equal(nothing["image"], kept)
    assert not np.shares_memory(nothing["image"], nothing["target"])
    # Input and target are mirrored as one, before: by the stream of crops.
    assert ModelsGenesis.augmentation(ModelsGenesisConfig()) == "mirror"


# The network


def test_the_plain_network_restores_the_whole_patch() -> None:
    task = make_task("models_genesis", "resenc", PATCH, 2).eval()
    assert {name.split(".")[1] for name, _ in task.named_parameters()} == {"network"}
    batch = {"image": torch.randn(3, 2, *PATCH), "target": torch.randn(3, 2, *PATCH)}
    outputs: list[torch.Tensor] = []
    task.network.register_forward_hook(lambda module, args, output: outputs.append(output))
    output = task(batch)
    outputs[0].retain_grad()
    output.loss.backward()
    assert (outputs[0].grad != 0).float().mean() > 0.999, "part of the patch does not count"
    expected = (outputs[0] - batch["target"]).square().mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    corruption = (batch["image"] - batch["target"]).square().mean()
    assert output.metrics["corruption"].item() == pytest.approx(corruption.item(), rel=1e-5)
    explained = 1 - expected / batch["target"].square().mean()
    assert output.metrics["explained_variance"].item() == pytest.approx(explained.item(), abs=1e-5)
    assert output.pictures is not None
    assert list(output.pictures) == ["original", "corrupted", "restored"]
    for name, expected_picture in zip(output.pictures, (batch["target"], batch["image"], outputs[0])):
        assert torch.equal(output.pictures[name], expected_picture[0])


def test_anonymised_voxels_are_left_out_per_sample() -> None:
    task = make_task("models_genesis", "resenc", (16, 16)).eval()
    batch = {"image": torch.randn(2, 1, 16, 16), "target": torch.randn(2, 1, 16, 16)}
    valid = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    valid[0, :, :12] = False
    with torch.no_grad():
        loss = task({**batch, "valid": valid}).loss
        errors = (task.backbone(batch["image"]) - batch["target"]).square()
    assert loss.item() == pytest.approx(((errors[0, :, 12:].mean() + errors[1].mean()) / 2).item(), rel=1e-5)
