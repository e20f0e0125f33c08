"""Mixing of crops: boxes, foreground, components; label maps, regions and ignored voxels, in 2D and 3D."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from mfm_nnunet.tasks.mixing import (
    Mixing,
    downsample_targets,
    draw_box,
    mix_box,
    paste_component,
    replace_box,
)

SIZES = {2: (20, 24), 3: (12, 16, 20)}
LABELS = Mixing("copy_paste", 1.0, 0.5, (1, 2), False, (), False, None)
REGIONS = dataclasses.replace(LABELS, labels=(0, 1), has_regions=True)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make_batch(axes: int, number: int = 4, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in which each voxel names its crop, and label maps (int16) with a blob of each of the labels 1 and 2."""
    size = SIZES[axes]
    images = (
        torch.arange(number, dtype=torch.float32).reshape(-1, *[1] * (axes + 1))
        + torch.rand(number, channels, *size, generator=torch.Generator().manual_seed(0)) / 2
    )
    targets = torch.zeros(number, 1, *size, dtype=torch.int16)
    for crop in range(number):
        for label in (1, 2):
            start = [int(s) for s in rng(10 * crop + label).integers(0, np.array(size) - 5)]
            targets[(crop, 0, *(slice(s, s + 4) for s in start))] = label
    return images, targets


def to_regions(targets: torch.Tensor, ignore: int | None = None) -> torch.Tensor:
    """Regions (1, 2) and (2), and the ignored voxels, as nnU-Net's loader has them."""
    parts = [(targets == 1) | (targets == 2), targets == 2]
    return torch.cat(parts if ignore is None else [*parts, targets == ignore], 1)


@pytest.mark.parametrize("axes", [2, 3])
def test_boxes_have_their_share_and_stay_inside(axes: int) -> None:
    size, starts = SIZES[axes], set()
    for seed in range(50):
        box = draw_box(size, 0.5, rng(seed))
        assert [part.stop - part.start for part in box] == [length // 2 for length in size]
        assert all(part.start >= 0 and part.stop <= length for part, length in zip(box, size))
        starts.add(tuple(part.start for part in box))
    assert len(starts) > 20
    assert min(start[0] for start in starts) == 0
    assert max(start[0] for start in starts) == size[0] - size[0] // 2
    assert [part.stop - part.start for part in draw_box((3,) * axes, 0.01, rng())] == [1] * axes


@pytest.mark.parametrize("axes", [2, 3])
def test_a_box_carries_image_target_and_weights(axes: int) -> None:
    images, targets = make_batch(axes)
    other, other_targets = images.flip(0), targets.flip(0)
    weights = torch.ones(len(images), *SIZES[axes])
    box = draw_box(SIZES[axes], 0.667, rng())
    mixed, mixed_targets = mix_box(images, targets, other, other_targets, box)
    mixed_weights = replace_box(weights, weights / 2, box)
    inside = mixed_weights == 0.5
    assert inside[0].sum() == np.prod([part.stop - part.start for part in box])
    assert torch.equal(mixed, torch.where(inside[:, None], other, images))
    assert torch.equal(mixed_targets, torch.where(inside[:, None], other_targets, targets))
    assert torch.equal(images, make_batch(axes)[0])  # the inputs are unchanged


@pytest.mark.parametrize("scales", [[[1, 1, 1], [0.5, 0.5, 0.5], [0.25, 0.5, 0.25]], [[0.5, 1, 0.5]]])
@pytest.mark.parametrize("dtype", [torch.int16, torch.bool])
def test_targets_are_reduced_as_by_nnunet(scales: list[list[float]], dtype: torch.dtype) -> None:
    targets = torch.randint(0, 5, (3, 2, 12, 14, 22), generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = (
        downsample_targets(targets, scales),
        [DownsampleSegForDSTransform(scales)(segmentation=t) for t in targets],
    )
    for scale, found in enumerate(ours):
        assert found.dtype is dtype
        assert torch.equal(found, torch.stack([sample["segmentation"][scale] for sample in theirs]))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kind", ["cutmix", "copy_paste", "lesion_paste"])
@pytest.mark.parametrize("has_regions", [False, True])
def test_mixing_is_a_function_of_its_generator(axes: int, kind: Any, has_regions: bool) -> None:
    mixing = dataclasses.replace(REGIONS if has_regions else LABELS, kind=kind, probability=0.9)
    images, targets = make_batch(axes)
    targets = to_regions(targets) if has_regions else targets
    before = images.clone(), targets.clone()
    first, again, other = (mixing.mix(images, targets, rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[0], other[0])
    assert all(torch.equal(x, y) for x, y in zip(before, (images, targets)))
    assert first[1].dtype == targets.dtype
    assert first[0].shape == images.shape
    nothing = dataclasses.replace(mixing, probability=0.0).mix(images, targets, rng(1))
    assert all(torch.equal(x, y) for x, y in zip(before, nothing))


@pytest.mark.parametrize("kind", ["cutmix", "copy_paste"])
@pytest.mark.parametrize("has_regions", [False, True])
def test_every_voxel_keeps_its_target(kind: Any, has_regions: bool) -> None:
    """Nothing moves, so each voxel has the image and the target of one crop, at its own place."""
    mixing = dataclasses.replace(REGIONS if has_regions else LABELS, kind=kind)
    images, targets = make_batch(3)
    targets = to_regions(targets) if has_regions else targets
    mixed, mixed_targets = mixing.mix(images, targets, rng(3))
    origin = mixed[:, 0].floor().long()
    assert {len(crop.unique()) for crop in origin} == {2}
    crops = torch.stack([(origin == crop) for crop in range(len(images))])
    wanted = sum(crops[crop][:, None] * targets[crop].to(torch.int16) for crop in range(len(images)))
    assert torch.equal(mixed_targets.to(torch.int16), wanted)


def test_all_crops_are_used_once() -> None:
    images, targets = make_batch(2, number=5)
    mixed, _ = dataclasses.replace(LABELS, kind="cutmix").mix(images, targets, rng())
    origin = mixed[:, 0].floor()
    others = [int(next(value for value in crop.unique() if value != number)) for number, crop in enumerate(origin)]
    assert sorted(others) == list(range(5))


def test_copy_paste_moves_the_foreground_that_was_asked_for() -> None:
    images, targets = make_batch(3, number=2)
    for labels, is_one in (((1, 2), False), ((2,), False), ((1, 2), True)):
        mixing = dataclasses.replace(LABELS, labels=labels, is_one_label=is_one)
        found = set()
        for seed in range(12):
            mixed, mixed_targets = mixing.mix(images, targets, rng(seed))
            pasted = mixed[0, 0].floor() == 1
            values = set(targets[1, 0][pasted].tolist())
            found |= {frozenset(values)}
            assert torch.equal(pasted, torch.isin(targets[1, 0], torch.tensor([*values], dtype=torch.int16)))
            assert torch.equal(mixed_targets[0, 0][pasted], targets[1, 0][pasted])
        assert found == ({frozenset({1}), frozenset({2})} if is_one else {frozenset(labels)})


def test_ignored_voxels_are_not_pasted() -> None:
    images, targets = make_batch(3, number=2)
    targets[1, 0, 0] = 3
    for mixing, of in (
        (dataclasses.replace(LABELS, ignored=3), targets),
        (dataclasses.replace(REGIONS, ignored=2), to_regions(targets, 3)),
    ):
        mixed, mixed_targets = mixing.mix(images, of, rng())
        assert (mixed[0, 0, 0].floor() == 0).all()
        assert torch.equal(mixed_targets[0][:, 0], of[0][:, 0])


@pytest.mark.parametrize("axes", [2, 3])
def test_one_component_goes_to_a_place_that_is_allowed(axes: int) -> None:
    """Hosts are label 1; components of label 2 keep shape, intensities and labels."""
    images, targets = make_batch(axes, number=2)
    targets[1] = 0
    pieces = [tuple(slice(s, s + side) for s in (2,) * axes) for side in (2, 3)]
    targets[(1, 0, *pieces[1])] = 2
    targets[(1, 0, *(slice(8, 10) for _ in range(axes)))] = 2
    places = targets[0, 0] == 1
    sizes = set()
    for seed in range(20):
        image, target = paste_component(
            (images[0], targets[0]), (images[1], targets[1]), targets[1, 0] == 2, places, rng(seed)
        )
        pasted = image[0].floor() == 1
        where = np.argwhere(pasted.numpy())
        sizes.add(len(where))
        assert (target[0][pasted] == 2).all()
        assert torch.equal(target[0][~pasted], targets[0, 0][~pasted])
        _, number = scipy.ndimage.label(pasted.numpy(), np.ones((3,) * axes))
        assert number == 1
        middle = tuple((where.min(0) + where.max(0) + 1) // 2)
        assert places[middle], middle
        values = {tuple(v) for v in image[:, pasted].T.tolist()}
        assert values <= {tuple(v) for v in images[1][:, targets[1, 0] == 2].T.tolist()}
    assert sizes == {2**axes, 3**axes}


def test_a_component_stays_inside_the_crop() -> None:
    images, targets = make_batch(3, number=2)
    corner = torch.zeros(SIZES[3], dtype=torch.bool)
    corner[-1, -1, -1] = True
    image, target = paste_component(
        (images[0], targets[0] * 0), (images[1], targets[1]), targets[1, 0] == 2, corner, rng()
    )
    assert (target == 2).sum() == (targets[1] == 2).sum()
    assert target[0, -1, -1, -1] == 2
    assert (image[0].floor() == 1).sum() == (targets[1] == 2).sum()


def test_places_are_hosts_or_the_body_but_never_ignored() -> None:
    images, targets = make_batch(3, number=2)
    ignored = (slice(0, 1), slice(None), slice(0, 6))
    targets[(slice(None), slice(None), *ignored)] = 3
    lesions = dataclasses.replace(LABELS, kind="lesion_paste", labels=(2,), ignored=3)
    with_hosts = dataclasses.replace(lesions, hosts=(1,))
    places = with_hosts._find_places(images[0], targets[0])
    assert torch.equal(places, targets[0, 0] == 1)
    body = lesions._find_places(images[0], targets[0])
    bright = images[0, 0] > images[0, 0].mean()
    assert torch.equal(body, bright & (targets[0, 0] != 2) & (targets[0, 0] != 3))
    regions = dataclasses.replace(lesions, labels=(1,), hosts=(0,), has_regions=True, ignored=2)
    assert torch.equal(regions._find_places(images[0], to_regions(targets, 3)[0]), targets[0, 0] == 1)


@pytest.mark.parametrize("kind", ["copy_paste", "lesion_paste"])
@pytest.mark.parametrize("is_one", [False, True])
def test_crops_without_foreground_stay_as_they_are(kind: Any, is_one: bool) -> None:
    images, targets = make_batch(3)
    for mixing in (LABELS, REGIONS):
        empty = to_regions(targets * 0) if mixing.has_regions else targets * 0
        mixed, mixed_targets = dataclasses.replace(mixing, kind=kind, is_one_label=is_one).mix(images, empty, rng())
        assert torch.equal(mixed, images)
        assert torch.equal(mixed_targets, empty)
