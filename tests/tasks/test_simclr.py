"""SimCLR: pairs that overlap, a loss equal to one written by hand, and settings that cannot be wrong silently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfm_nnunet.errors import MFMError
from mfm_nnunet.tasks.image_operations import JITTER, jitter
from mfm_nnunet.tasks.losses import cosines, nt_xent
from mfm_nnunet.tasks.simclr import SimCLR, SimCLRConfig, draw_pairs
from mfm_nnunet.tasks.views import VIEW_JITTER, change_view, resolve_crop_size, side_by_side, tile
from tests.builders.tasks import geometry, make_task
from tests.builders.tiny_run import prepare, run

PATCH = (24, 32, 32)


def resolved(patch: tuple[int, ...] = PATCH, cell: int | tuple[int, ...] = 4, **settings: Any) -> SimCLRConfig:
    return SimCLR.resolve(SimCLRConfig(**settings), geometry(patch, cell))


# The loss


def test_nt_xent_equals_one_written_by_hand_on_three_pairs() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 3, 4))
    rows = [*first, *second]
    total = 0.0
    for i in range(6):
        exponentials = {}
        for j in range(6):
            if j != i:
                cosine = rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
                exponentials[j] = math.exp(cosine / 0.2)
        total -= math.log(exponentials[(i + 3) % 6] / sum(exponentials.values()))
    loss = nt_xent(torch.tensor(first), torch.tensor(second), 0.2)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("pairs", [2, 5])
def test_equal_embeddings_give_the_logarithm_of_the_others(pairs: int) -> None:
    """Of any number of pairs: no size of a batch is frozen in, so a last, incomplete one works."""
    rows = torch.ones(pairs, 7)
    assert nt_xent(rows, rows, 0.5).item() == pytest.approx(math.log(2 * pairs - 1), rel=1e-5)


def test_cosines_are_float32_also_under_autocast_and_finite_at_zero() -> None:
    first, second = torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosines(first.bfloat16(), second.bfloat16())
        loss = nt_xent(first, second, 0.1)
    assert inside.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(inside, cosines(first.bfloat16(), second.bfloat16()), rtol=0, atol=0)
    assert loss == nt_xent(first, second, 0.1)
    nothing = torch.zeros(2, 3, requires_grad=True)
    cosines(nothing, torch.ones(2, 3)).sum().backward()
    assert nothing.grad is not None
    assert torch.isfinite(nothing.grad).all()


# The crops


@pytest.mark.parametrize(("region", "crop"), [((64, 192, 192), 64), ((24, 24, 24), 16), ((20, 40), 16), ((16, 17), 16)])
def test_pairs_lie_inside_and_overlap(region: tuple[int, ...], crop: int) -> None:
    size = (crop,) * len(region)
    config = SimCLRConfig(crop_size=size, num_references=3)
    rng = np.random.default_rng(0)
    far = np.zeros(len(region))
    for _ in range(300):
        references, partners = draw_pairs(config, region, rng)
        assert references.shape == partners.shape == (3, len(region))
        for starts in (references, partners):
            assert (starts >= 0).all()
            assert (starts + crop <= region).all()
        far = np.maximum(far, np.abs(references - partners).max(0))
        overlap = (crop - np.abs(references - partners)).prod(1) / crop ** len(region)
        assert (overlap >= 0.5 ** len(region)).all()
    assert far.tolist() == [min(crop // 2, size - crop) for size in region]


def test_views_are_the_voxels_of_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each voxel holds its own position, so a view tells where it was cut; nothing is read from outside."""
    monkeypatch.setattr("mfm_nnunet.tasks.views.change_view", lambda view, rng, quarter_turn: view)
    config = resolved(crop_size=(8,), num_references=2)
    transform = SimCLR.transform(config, PATCH)
    (request,) = transform.requests(np.random.default_rng(0))
    assert (request.size, request.pad, request.volume) == (config.region_size, False, 0)
    region = np.stack(np.meshgrid(*map(np.arange, request.size), indexing="ij")).astype(np.float32)
    views = transform([region.copy()], np.random.default_rng(1))["image"]
    references, partners = draw_pairs(config, request.size, np.random.default_rng(1))
    assert views.shape == (4, 3, 8, 8, 8)
    for view, start in zip(views, [*references, *partners]):
        assert view[:, 0, 0, 0].tolist() == start.tolist()
        assert view[:, -1, -1, -1].tolist() == (start + 7).tolist()


def test_small_volumes_are_used_whole_and_too_small_ones_never_reach_the_task() -> None:
    config = resolved((160, 160, 160), 32)
    assert (config.crop_size, config.region_size) == ((64, 64, 64), (64, 160, 160))
    assert SimCLR.smallest_volume(config) == (64, 64, 64)
    small = np.zeros((1, 64, 70, 64), np.float32)
    assert SimCLR.transform(config, (160, 160, 160))([small], np.random.default_rng(0))["image"].shape[0] == 4
    with pytest.raises(AssertionError, match="smaller than a crop"):
        draw_pairs(config, (64, 63, 64), np.random.default_rng(0))


def test_every_view_is_changed_on_its_own_and_the_region_stays() -> None:
    config = resolved(crop_size=(16,), num_references=2)
    transform = SimCLR.transform(config, PATCH)
    region = np.random.default_rng(0).normal(size=(2, *transform.requests(np.random.default_rng(0))[0].size))
    kept = region.astype(np.float32)
    items = [transform([kept.copy()], np.random.default_rng(seed))["image"] for seed in (5, 5, 6)]
    assert items[0].dtype == np.float32
    assert items[0].flags.c_contiguous
    assert np.array_equal(items[0], items[1])
    assert not np.array_equal(items[0], items[2])
    given = kept.copy()
    transform([given], np.random.default_rng(5))
    assert np.array_equal(given, kept), "overlapping crops were changed in their common voxels"


@pytest.mark.parametrize(("chances", "low_resolution"), [(JITTER, 0.25), (VIEW_JITTER, 0.1)])
def test_jitter_fires_as_often_as_published(chances: dict[str, float], low_resolution: float) -> None:
    """The first for Volume Fusion, the second for views."""
    x = np.random.default_rng(0).normal(size=(1, 6, 6)).astype(np.float32)
    rng = np.random.default_rng(1)
    results = [jitter(x.copy(), rng, chances) for _ in range(1500)]
    assert all(r.shape == x.shape and r.dtype == np.float32 and np.isfinite(r).all() for r in results)
    unchanged = np.mean([np.array_equal(result, x) for result in results])
    untouched = 0.9 * 0.8 * 0.85 * 0.85 * (1 - low_resolution) * 0.9 * 0.7
    assert unchanged == pytest.approx(untouched, abs=0.04)
    assert math.prod(1 - chance for chance in chances.values()) == pytest.approx(untouched)


def test_mirroring_and_quarter_turns_keep_size_and_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mfm_nnunet.tasks.views.jitter", lambda view, rng, chances: view)
    x = np.arange(3 * 5 * 5, dtype=np.float32).reshape(1, 3, 5, 5)
    rng = np.random.default_rng(0)
    views = [change_view(x.copy(), rng, 0.3) for _ in range(2000)]
    assert all(view.shape == x.shape and np.array_equal(np.unique(view), np.unique(x)) for view in views)
    # Axis 0 is never left: what was one slice of the plane stays one.
    assert all({int(v) // 25 for v in np.unique(view[0, 0])} <= {0, 2} for view in views)
    assert all(len({int(v) // 25 for v in np.unique(view[0, 0])}) == 1 for view in views)
    swapped = np.mean([abs(view[0, 0, 0, 1] - view[0, 0, 0, 0]) == 5 for view in views])
    assert swapped == pytest.approx(0.3 * 2 / 3, abs=0.03)  # a half turn looks like mirroring twice
    mirrored = np.mean([view[0, 0, 0, 0] >= 50 for view in views])
    assert mirrored == pytest.approx(0.5, abs=0.04)
    never = [change_view(x.copy(), rng, 0.0) for _ in range(200)]
    assert all(abs(view[0, 0, 0, 1] - view[0, 0, 0, 0]) == 1 for view in never)


def test_pictures_of_views_keep_their_places() -> None:
    tiles = torch.arange(6.0).reshape(6, 1, 1, 1, 1).expand(6, 1, 2, 2, 2)
    picture = tile(tiles, (1, 2, 3))
    assert picture.shape == (1, 2, 4, 6)
    assert picture[0, 0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert side_by_side(tiles).shape == (1, 2, 2, 12)
    flat = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 2, 2)
    assert tile(flat, (2, 3))[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]


# Settings


@pytest.mark.parametrize(
    ("patch", "cell", "crop"),
    [
        ((160, 160, 160), 32, (64, 64, 64)),
        ((128, 96, 96), 16, (64, 48, 48)),
        ((16, 320, 320), (4, 64, 64), (8, 64, 64)),
        ((40, 56, 40), 8, (16, 24, 16)),
        ((16, 16, 16), 8, (8, 8, 16)),
        ((8, 24, 16), 8, (8, 16, 8)),
        ((512, 256), 128, (256, 128)),
        ((24, 24), 8, (8, 16)),
    ],
)
def test_automatic_crops(patch: tuple[int, ...], cell: int | tuple[int, ...], crop: tuple[int, ...]) -> None:
    assert resolve_crop_size(None, geometry(patch, cell)) == crop


def test_resolving_gives_numbers_for_everything() -> None:
    config = resolved((64, 192, 192), 32)
    assert config.region_size == (32, 192, 192)
    assert config.quarter_turn == 0.3
    flat = resolved((16, 96, 128), (4, 16, 16))
    assert (flat.crop_size, flat.region_size, flat.quarter_turn) == ((8, 48, 64), (8, 96, 128), 0.0)
    assert resolved((256, 256), 32).region_size == (192, 192)
    assert resolved(crop_size=(8,), region_size=(20,)).region_size == (20, 20, 20)
    hippocampus = resolved((40, 56, 40), 8, crop_size=(16,))
    assert SimCLR.smallest_volume(hippocampus) == (16, 16, 16)


def test_a_plane_that_is_not_square_cannot_be_turned() -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*pretext\.quarter_turn=0\.3"):
        resolved(crop_size=(16, 16, 8), quarter_turn=0.3)
    assert resolved(crop_size=(16, 16, 8), quarter_turn=0.0).quarter_turn == 0


def test_a_step_needs_two_pairs() -> None:
    assert [SimCLR.smallest_batch(SimCLRConfig(num_references=n)) for n in (1, 2, 3)] == [2, 1, 1]
    task = make_task("simclr", "resenc", (16, 16, 16), 1, ["num_references=1", "projector_width=8"])
    with pytest.raises(AssertionError, match="single pair"):
        task({"image": torch.randn(1, 2, 1, 8, 8, 8)})


def test_a_batch_of_one_pair_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*pretrain\.batch_size=1.*at least 2"):
        run(prepare(tmp_path), "simclr", ("pretrain.batch_size=1", "pretext.num_references=1"))


# The task


def test_the_loss_is_nt_xent_of_the_projected_pooled_features() -> None:
    task = make_task("simclr", "resenc", (16, 32, 32), 1, ["projector_width=12", "temperature=0.3"]).eval()
    config = task.config
    image = torch.randn(3, 4, 1, *config.crop_size)
    with torch.no_grad():
        output = task({"image": image})
        embedded = []
        for item in image:
            features = [f.flatten(2).mean(2) for f in task.backbone.features(item)]
            embedded.append(task.projector(torch.cat(features, 1)))
        first, second = (torch.cat([e[part] for e in embedded]) for part in (slice(0, 2), slice(2, 4)))
    assert output.loss.item() == pytest.approx(nt_xent(first, second, 0.3).item(), rel=1e-4)
    assert output.pictures is not None
    assert output.pictures["crops"].shape == (1, *config.crop_size[:2], 2 * config.crop_size[2])
    assert torch.equal(output.pictures["their partners"], torch.cat([image[0, 2], image[0, 3]], -1))
    rows = torch.cat([first, second])
    torch.testing.assert_close(output.pictures["cosines"][0, 0], cosines(rows, rows), rtol=1e-4, atol=1e-5)
    assert 0 <= output.metrics["partner_found"] <= 1
    assert task.projector[0].in_features == 40
