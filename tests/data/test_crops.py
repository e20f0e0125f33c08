"""The crop stream: a pure function of (seed, index), the same for any number of workers, zero outside the image."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.crops import (
    Augmentation,
    CropRequest,
    CropStream,
    SpatialParameters,
    StreamSettings,
    apply_spatial,
    batches,
    case_weights,
    describe_shares,
    draw_spatial,
    require_legal_balance,
)
from mfm_nnunet.data.volumes import mask_file, read_box
from mfm_nnunet.data.warp import Order
from mfm_nnunet.errors import MFMError
from tests.builders.damage import overwrite_middle
from tests.builders.volumes import Keep, write_volume


def make(files: list[Path], *sizes: tuple[int, ...], **settings: Any) -> CropStream:
    return CropStream(files, Keep(tuple(CropRequest(size) for size in sizes)), StreamSettings(**settings))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0)
    shapes = [(1, 20, 24, 30), (1, 9, 40, 12), (1, 33, 18, 25)]
    return [write_volume(folder, f"case{i}", rng.normal(size=shape)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_with_a_damaged_middle_is_named(tmp_path: Path, num_workers: int) -> None:
    """Its header and size are right, so nothing is noticed before its voxels are read."""
    file = write_volume(tmp_path, "a", np.arange(14400).reshape(1, 20, 24, 30) // 7)
    overwrite_middle(file)
    with pytest.raises(MFMError, match=r"E_SHORT_DATA  .*a\.b2nd"):
        next(batches(make([file], (20, 24, 30)), 1, 0, 1, num_workers))


def test_ranks_share_the_items_of_a_batch(files: list[Path]) -> None:
    stream = make(files, (8, 8, 8), seed=1)
    whole = next(batches(stream, 4, 5, 6, 0))["draw"]
    parts = [next(batches(stream, 4, 5, 6, 0, rank, 2))["draw"] for rank in range(2)]
    assert torch.equal(whole[0::2], parts[0])
    assert torch.equal(whole[1::2], parts[1])


def test_seed_and_stream_change_the_items(files: list[Path]) -> None:
    draws = {float(make(files, (8, 8, 8), seed=seed, stream=stream)[0]["draw"]) for seed in (0, 1) for stream in (0, 1)}
    assert len(draws) == 4


def test_small_images_are_centred_and_padded_with_zero(files: list[Path]) -> None:
    crop = make(files[1:2], (16, 16, 16))[0]["image0"]
    assert crop.shape == (1, 16, 16, 16)
    filled = np.nonzero(crop[0].any(axis=(1, 2)))[0]
    assert (filled.min(), filled.max()) == (4, 12)  # 9 voxels in the middle of 16


def test_two_dimensional_crops_are_slices(files: list[Path]) -> None:
    volume = blosc2.open(str(files[0]))[:]
    crop = make(files[:1], (24, 30))[2]["image0"]
    assert any(np.array_equal(crop[0], volume[0, z]) for z in range(20))


def test_read_box_equals_padding_the_whole_volume() -> None:
    volume = np.random.default_rng(1).normal(size=(2, 7, 8, 9)).astype(np.float32)
    padded = np.pad(volume, [(0, 0), (10, 10), (10, 10), (10, 10)])
    for lower in ([-3, 0, 2], [5, -9, 4], [0, 0, 0]):
        expected = padded[(slice(None), *(slice(low + 10, low + 16) for low in lower))]
        assert np.array_equal(read_box(volume, lower, (6, 6, 6)), expected)
    assert not read_box(volume, [20, 0, 0], (6, 6, 6)).any()


def test_two_volumes_of_an_item_differ(files: list[Path]) -> None:
    transform = Keep((CropRequest((8, 8, 8), 0), CropRequest((8, 8, 8), 1)))
    stream = CropStream(files, transform, StreamSettings(num_volumes=2))
    assert all(len(set(stream.case_names(i))) == 2 for i in range(20))
    with pytest.raises(MFMError, match="mixes 2 volumes"):
        CropStream(files[:1], transform, StreamSettings(num_volumes=2))


def test_two_crops_of_one_volume_and_unpadded_requests(files: list[Path]) -> None:
    transform = Keep((CropRequest((8, 8, 8)), CropRequest((8, 8, 8)), CropRequest((16, 16, 16), pad=False)))
    item = CropStream(files[1:2], transform, StreamSettings())[0]
    assert not np.array_equal(item["image0"], item["image1"])
    assert item["image2"].shape == (1, 9, 16, 12)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("patch_size", [(12, 16, 20), (6, 40, 40), (24, 30)])
def test_spatial_augmentation_reads_enough_and_keeps_the_scale(patch_size: tuple[int, ...], order: Order) -> None:
    """A constant image stays constant; where too little was read, a corner would fall to 0."""
    for seed in range(40):
        parameters = draw_spatial(np.random.default_rng(seed), patch_size, "spatial")
        ones = np.ones((1, *parameters.read_size(patch_size, order)), np.float32)
        assert apply_spatial(ones, parameters, patch_size, order).min() > 0.99


def test_identity_and_flips() -> None:
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    assert np.array_equal(apply_spatial(image, SpatialParameters(None, (False,) * 3), (2, 3, 4)), image)
    turned = SpatialParameters(np.eye(3), (True, False, True))
    assert turned.read_size((2, 3, 4)) == (4, 5, 6)
    flipped = apply_spatial(np.pad(image, [(0, 0), (1, 1), (1, 1), (1, 1)]), turned, (2, 3, 4))
    assert np.allclose(flipped, image[:, ::-1, :, ::-1], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", "850ff8e7570ffbe7c0045d0de284ae83a5b7ac08096924875efd4a0f1c672396"),
        ("mirror", "2a33fb638485581f2055b6398caca689effc45e40c033f99d6c80778247ccd0d"),
    ],
)
def test_items_of_a_corpus_without_masks_stay_as_they_were(
    files: list[Path], kind: Augmentation, expected: str
) -> None:
    """Frozen before masks and balance existed, so that runs begun then resume bit for bit."""
    sizes = (((16, 16, 16), 0), ((12, 16, 10), 1), ((14, 20), 0), ((16,) * 3, 1, False))
    stream = CropStream(files, Keep(tuple(CropRequest(*size) for size in sizes)), StreamSettings(2, kind, 5, 1))
    digest = hashlib.sha256()
    for item in (stream[index] for index in range(12)):
        for name in sorted(item):
            digest.update(np.ascontiguousarray(item[name]).tobytes())
    assert digest.hexdigest() == expected


# --- masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "mirror", "spatial"])
def test_valid_follows_its_image_through_rotation_scaling_mirroring_and_padding(tmp_path: Path, kind: str) -> None:
    """The image is its own mask, 8 inside and 0 outside: wherever the crop is clearly one of the two, valid says so."""
    hidden = np.zeros((1, 24, 28, 20), bool)
    hidden[:, 4:15, 10:, 6:13] = True
    stream = make([write_volume(tmp_path, "a", 8.0 * hidden, hidden)], (16, 20, 24), augmentation=kind, with_valid=True)
    num_hidden = 0
    for index in range(60):
        image, valid = stream[index]["image0"], stream[index]["valid0"]
        assert valid.dtype == bool
        assert valid.shape == image.shape
        assert not valid[image > 6].any()
        assert valid[np.abs(image) < 0.02].mean() > 0.999 if kind == "spatial" else valid[image == 0].all()
        num_hidden += int((~valid).sum())
    assert num_hidden > 0
    assert valid[:, :, :, :2].all(), "padding is valid"


def test_all_items_have_the_same_keys_whichever_volume_has_a_mask(tmp_path: Path) -> None:
    ones = np.ones((1, 12, 12, 12))
    files = [write_volume(tmp_path, "a", ones, ones), write_volume(tmp_path, "b", ones)]
    masked, plain = make(files, (8,) * 3, with_valid=True), make(files, (8,) * 3)
    items = [masked[i] for i in range(12)]
    assert {tuple(item) for item in items} == {("image0", "draw", "valid0")}
    assert {(bool(item["valid0"].any()), bool(item["valid0"].all())) for item in items} == {(0, 0), (1, 1)}
    assert "valid0" not in plain[0]
    # What is drawn does not depend on whether masks are used.
    assert all(np.array_equal(plain[i]["image0"], items[i]["image0"]) for i in range(12))
    assert all(plain[i]["draw"] == items[i]["draw"] for i in range(12))


def test_valid_in_two_dimensions_is_of_the_same_slice(tmp_path: Path) -> None:
    volume = np.broadcast_to(np.arange(10.0)[None, :, None, None], (1, 10, 14, 14))
    stream = make([write_volume(tmp_path, "a", volume, volume % 3 == 0)], (8, 8), with_valid=True)
    for item in (stream[index] for index in range(20)):
        assert item["valid0"].shape == (1, 8, 8)
        assert item["valid0"].all() == (item["image0"][0, 0, 0] % 3 != 0)


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    file = write_volume(tmp_path / "data", "a", np.ones((1, 9, 9, 9)), np.ones((1, 9, 9, 9)))
    mask_file(file.parent, "a").write_bytes(b"x")
    with pytest.raises(MFMError, match="data_anonymised/a"):
        make([file], (8,) * 3, with_valid=True)[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_masks_and_weights_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    rng, shape = np.random.default_rng(1), (1, 14, 14, 14)
    volumes = [
        write_volume(tmp_path, f"case{i}", rng.normal(size=shape), rng.random(shape) < 0.5 if i else None)
        for i in range(3)
    ]
    settings = StreamSettings(augmentation="spatial", seed=3, with_valid=True)
    weights = {f"case{i}": i + 1.0 for i in range(3)}
    stream = CropStream(volumes, Keep((CropRequest((8, 8, 8)),)), settings, weights)
    items = [stream[i] for i in range(2, 10)]
    for num_workers in (0, 1, 3):
        got = list(batches(stream, 2, 1, 5, num_workers))
        for name in ("image0", "valid0", "draw"):
            whole = torch.cat([batch[name] for batch in got]).numpy()
            assert np.array_equal(whole, np.stack([item[name] for item in items]))


# --- weights and balance ------------------------------------------------------------------------------------------


def test_items_draw_different_volumes_by_weight(files: list[Path]) -> None:
    one = Keep((CropRequest((4,) * 3),))
    stream = CropStream(files, one, StreamSettings(), {"case0": 0.5, "case1": 0.5, "case2": 0.0, "elsewhere": 7.0})
    drawn = [stream.case_names(index)[0] for index in range(400)]
    assert "case2" not in drawn
    assert 150 < drawn.count("case0") < 250
    two = Keep((CropRequest((4,) * 3, 0), CropRequest((4,) * 3, 1)))
    stream = CropStream(files, two, StreamSettings(num_volumes=2), {"case0": 0.98, "case1": 0.01, "case2": 0.01})
    pairs = [stream.case_names(index) for index in range(200)]
    assert all(len(set(pair)) == 2 for pair in pairs)
    assert np.mean([pair[0] == "case0" for pair in pairs]) > 0.9
    assert {name for pair in pairs for name in pair} == {"case0", "case1", "case2"}


CASES = [
    *(Case(f"t1_{i}", (), None, f"s{i // 2}", "T1w", "brains") for i in range(6)),
    *(Case(f"ct_{i}", (), None, f"l{i}", "CT", "lungs") for i in range(2)),
    Case("t1_lungs", (), None, "l0", "T1w", "lungs"),
]


def test_groups_are_drawn_equally_often_and_cases_within_a_group_too() -> None:
    weights = case_weights(CASES, ("modality",))
    assert weights["ct_0"] == weights["ct_1"] == pytest.approx(1 / 4)
    assert weights["t1_0"] == weights["t1_lungs"] == pytest.approx(1 / 14)
    assert sum(weights.values()) == pytest.approx(1)
    of_both = case_weights(CASES, ("modality", "dataset"))
    assert [of_both[name] for name in ("t1_0", "ct_0", "t1_lungs")] == pytest.approx([1 / 18, 1 / 6, 1 / 3])
    of_subjects = case_weights(CASES, ("subject",))
    assert of_subjects["t1_0"] + of_subjects["t1_1"] == pytest.approx(of_subjects["ct_1"])
    assert of_subjects["ct_0"] + of_subjects["t1_lungs"] == pytest.approx(of_subjects["ct_1"]) == 1 / 5


def test_description_names_groups_but_no_subject() -> None:
    assert describe_shares(CASES, ("modality",)) == "balanced by modality, 2 groups: CT 50.0%, T1w 50.0%"
    line = describe_shares([*CASES, Case("x", (), None, "l9", "", "lungs")], ("dataset", "modality"))
    assert "4 groups: brains T1w 25.0%" in line
    assert "lungs unknown modality 25.0%" in line
    line = describe_shares(CASES, ("subject", "modality"))
    assert line == "balanced by subject and modality, 6 groups: T1w 66.7%, CT 33.3%"
    assert describe_shares(CASES, ("subject",)) == "balanced by subject, 5 groups: 20.00% each"


def test_balance_that_is_impossible() -> None:
    nameless = [Case("a", ()), Case("b", ())]
    require_legal_balance(("subject",), nameless)
    for kinds, cases, words in (
        (("modalty",), CASES, "pretrain.balance_by=modalty: .*Did you mean 'modality'"),
        (("subject", "modality"), nameless, "pretrain.balance_by=modality: .*no modality for any case"),
    ):
        with pytest.raises(MFMError, match=f"E_CONFIG .*{words}"):
            require_legal_balance(kinds, cases)
