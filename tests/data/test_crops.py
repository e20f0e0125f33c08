"""The crop stream: a pure function of (seed, index), the same for any number of workers, zero outside the image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from mfm_nnunet.data.crops import (
    CropStream,
    SpatialParameters,
    StreamSettings,
    apply_spatial,
    batches,
    draw_spatial,
    read_box,
)
from mfm_nnunet.data.volumes import anatomy_points, mask_file
from mfm_nnunet.errors import MFMError
from tests.builders.damage import overwrite_middle


@dataclass(frozen=True)
class Request:
    size: tuple[int, ...]
    volume: int = 0
    pad: bool = True


@dataclass(frozen=True)
class Keep:
    """A transform that hands its crops on."""

    wanted: tuple[Request, ...]

    def requests(self, rng: np.random.Generator) -> tuple[Request, ...]:
        return self.wanted

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        return {**{f"image{i}": crop for i, crop in enumerate(crops)}, "draw": np.float64(rng.random())}


def make(
    files: list[Path], *sizes: tuple[int, ...], transform: type[Keep] | None = None, **settings: Any
) -> CropStream:
    requests = tuple(Request(size) for size in sizes)
    return CropStream(files, (transform or Keep)(requests), StreamSettings(**settings))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("volumes")
    rng = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate([(1, 20, 24, 30), (1, 9, 40, 12), (1, 33, 18, 25)]):
        path = folder / f"case{i}.b2nd"
        blosc2.asarray(rng.normal(size=shape).astype(np.float32), urlpath=str(path))
        paths.append(path)
    return paths


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_with_a_damaged_middle_is_named(tmp_path: Path, num_workers: int) -> None:
    """Its header and size are right, so nothing is noticed before its voxels are read."""
    file = tmp_path / "a.b2nd"
    blosc2.asarray(np.arange(14400, dtype=np.float32).reshape(1, 20, 24, 30) // 7, urlpath=str(file))
    overwrite_middle(file)
    with pytest.raises(MFMError, match=r"E_SHORT_DATA  .*a\.b2nd: the preprocessed file cannot be read"):
        next(batches(make([file], (20, 24, 30)), 1, 0, 1, num_workers))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_same_batches_for_any_number_of_workers(files: list[Path], num_workers: int) -> None:
    stream = make(files, (16, 16, 16), augmentation="spatial", seed=3)
    reference = [stream[i] for i in range(4, 12)]
    got = list(batches(stream, 2, 2, 6, num_workers))
    images = torch.cat([batch["image0"] for batch in got]).numpy()
    assert np.array_equal(images, np.stack([item["image0"] for item in reference]))
    assert np.array_equal(torch.cat([b["draw"] for b in got]).numpy(), np.stack([item["draw"] for item in reference]))


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
    stream = make(files[1:2], (16, 16, 16))
    crop = stream[0]["image0"]
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
    for lower in ([-3, 0, 2], [5, -9, 4], [20, 0, 0], [0, 0, 0]):
        expected = padded[(slice(None), *(slice(low + 10, low + 16) for low in lower))]
        if lower[0] == 20:
            expected = np.zeros((2, 6, 6, 6), np.float32)
        assert np.array_equal(read_box(volume, lower, (6, 6, 6)), expected)


def test_two_volumes_of_an_item_differ(files: list[Path]) -> None:
    transform = Keep((Request((8, 8, 8), 0), Request((8, 8, 8), 1)))
    stream = CropStream(files, transform, StreamSettings(num_volumes=2))
    assert all(len(set(stream.case_names(i))) == 2 for i in range(20))
    with pytest.raises(MFMError, match="mixes 2 volumes"):
        CropStream(files[:1], transform, StreamSettings(num_volumes=2))


def test_two_crops_of_one_volume_and_unpadded_requests(files: list[Path]) -> None:
    transform = Keep((Request((8, 8, 8)), Request((8, 8, 8)), Request((16, 16, 16), pad=False)))
    item = CropStream(files[1:2], transform, StreamSettings())[0]
    assert not np.array_equal(item["image0"], item["image1"])
    assert item["image2"].shape == (1, 9, 16, 12)


def test_damaged_volume_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "patient.b2nd"
    broken.write_bytes(b"not a volume")
    with pytest.raises(MFMError, match=r"patient\.b2nd"):
        make([broken], (8, 8, 8))[0]


@pytest.mark.parametrize("patch_size", [(12, 16, 20), (6, 40, 40), (24, 30)])
def test_spatial_augmentation_reads_enough_and_keeps_the_scale(patch_size: tuple[int, ...]) -> None:
    """A linear ramp stays linear under the affine map; where the box was too small a corner would fall to 0."""
    for seed in range(40):
        parameters = draw_spatial(np.random.default_rng(seed), patch_size, "spatial")
        read = parameters.read_size(patch_size)
        ones = np.ones((1, *read), np.float32)
        assert apply_spatial(ones, parameters, patch_size).min() > 0.99


def test_without_rotation_only_the_patch_is_read() -> None:
    sizes = [
        draw_spatial(np.random.default_rng(s), (32, 32, 32), "spatial").read_size((32, 32, 32)) for s in range(500)
    ]
    share = np.mean([size == (32, 32, 32) for size in sizes])
    assert 0.58 < share < 0.70  # 0.8 * 0.8 = 64 %


def test_identity_and_flips() -> None:
    image = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    assert np.array_equal(apply_spatial(image, SpatialParameters(None, (False,) * 3), (2, 3, 4)), image)
    flipped = apply_spatial(image, SpatialParameters(np.eye(3), (True, False, True)), (2, 3, 4))
    assert np.allclose(flipped, image[:, ::-1, :, ::-1], atol=1e-5)


# --- as before ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", "850ff8e7570ffbe7c0045d0de284ae83a5b7ac08096924875efd4a0f1c672396"),
        ("mirror", "2a33fb638485581f2055b6398caca689effc45e40c033f99d6c80778247ccd0d"),
    ],
)
def test_items_of_a_corpus_without_masks_stay_as_they_were(files: list[Path], kind: str, expected: str) -> None:
    """Written down before masks, anatomy and balance were known: runs that were begun then go on bit for bit."""
    wanted = (Request((16, 16, 16), 0), Request((12, 16, 10), 1), Request((14, 20), 0), Request((16,) * 3, 1, False))
    stream = CropStream(files, Keep(wanted), StreamSettings(2, kind, 5, 1))
    digest = hashlib.sha256()
    for item in (stream[index] for index in range(12)):
        for name in sorted(item):
            digest.update(np.ascontiguousarray(item[name]).tobytes())
    assert digest.hexdigest() == expected


# --- masks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeepValid(Keep):
    """Hands on what is valid as well; the keys tell whether it was given."""

    def __call__(
        self, crops: list[np.ndarray], rng: np.random.Generator, valid: list[np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        given = {} if valid is None else {f"valid{i}": array for i, array in enumerate(valid)}
        return {**super().__call__(crops, rng), **given}


def write_masks(folder: Path, name: str, **masks: np.ndarray) -> None:
    """Masks (1, D, H, W) beside the folder of the volumes, as preprocessing leaves them."""
    for kind, array in masks.items():
        file = mask_file(folder, kind, name)
        file.parent.mkdir(exist_ok=True)
        if kind == "anatomy":
            np.save(file, anatomy_points(array))
        else:
            blosc2.asarray(array.astype(np.uint8), urlpath=str(file))


def masked_volume(folder: Path, name: str, volume: np.ndarray, **masks: np.ndarray) -> Path:
    """A preprocessed volume (C, D, H, W) with its masks."""
    folder.mkdir(exist_ok=True)
    blosc2.asarray(volume.astype(np.float32), urlpath=str(folder / f"{name}.b2nd"))
    write_masks(folder, name, **masks)
    return folder / f"{name}.b2nd"


@pytest.mark.parametrize("kind", ["none", "mirror", "spatial"])
def test_valid_follows_its_image_through_rotation_scaling_mirroring_and_padding(tmp_path: Path, kind: str) -> None:
    """The image is its own mask, 8 inside and 0 outside: wherever the crop is clearly one of the two, valid says so."""
    hidden = np.zeros((1, 24, 28, 20), bool)
    hidden[:, 4:15, 10:, 6:13] = True
    file = masked_volume(tmp_path / "data", "a", 8.0 * hidden, anonymised=hidden)
    stream = make([file], (16, 20, 24), augmentation=kind, with_valid=True, transform=KeepValid)
    num_hidden = 0
    for index in range(60):
        item = stream[index]
        image, valid = item["image0"], item["valid0"]
        assert valid.dtype == bool
        assert valid.shape == image.shape
        assert not valid[image > 6].any()
        assert valid[np.abs(image) < 0.02].mean() > 0.999 if kind == "spatial" else valid[image == 0].all()
        num_hidden += int((~valid).sum())
    assert num_hidden > 0
    assert valid[:, :, :, :2].all(), "padding is valid"


def test_all_items_have_the_same_keys_whichever_volume_has_a_mask(tmp_path: Path) -> None:
    volume, hidden = np.ones((1, 12, 12, 12)), np.ones((1, 12, 12, 12), bool)
    with_mask = masked_volume(tmp_path / "data", "a", volume, anonymised=hidden)
    without = masked_volume(tmp_path / "data", "b", volume)
    items = [make([with_mask, without], (8,) * 3, with_valid=True, transform=KeepValid)[i] for i in range(12)]
    assert {tuple(item) for item in items} == {("image0", "draw", "valid0")}
    assert {bool(item["valid0"].any()) for item in items} == {bool(item["valid0"].all()) for item in items} == {
        True, False
    }  # fmt: skip
    plain = make([with_mask, without], (8,) * 3, transform=KeepValid)
    assert "valid0" not in plain[0]
    # What is drawn does not depend on whether masks are used.
    assert all(np.array_equal(plain[i]["image0"], items[i]["image0"]) for i in range(12))
    assert all(plain[i]["draw"] == items[i]["draw"] for i in range(12))


def test_valid_in_two_dimensions_is_of_the_same_slice(tmp_path: Path) -> None:
    volume = np.broadcast_to(np.arange(10.0)[None, :, None, None], (1, 10, 14, 14))
    hidden = np.broadcast_to((np.arange(10) % 3 == 0)[None, :, None, None], (1, 10, 14, 14))
    file = masked_volume(tmp_path / "data", "a", volume, anonymised=hidden)
    stream = make([file], (8, 8), with_valid=True, transform=KeepValid)
    for item in (stream[index] for index in range(20)):
        assert item["valid0"].shape == (1, 8, 8)
        assert item["valid0"].all() == (item["image0"][0, 0, 0] % 3 != 0)


def test_crops_around_anatomy_contain_it_and_never_lie_in_padding(tmp_path: Path) -> None:
    """Published code took 0 for anatomy and bounded the crop below but not above (G4)."""
    anatomy = np.zeros((1, 40, 40, 40), bool)
    anatomy[:, 37:, 1:3, 20:22] = True  # in a corner, so that both ends are needed
    file = masked_volume(tmp_path / "data", "a", 1.0 + anatomy, anatomy=anatomy)
    guided = make([file], (16, 16, 16), anatomy_fraction=1.0)
    for index in range(40):
        crop = guided[index]["image0"]
        assert (crop > 0).all(), "part of the crop is padding"
        assert (crop == 2).any(), "no anatomy in the crop"
    share = np.mean([(make([file], (16,) * 3, anatomy_fraction=0.3)[i]["image0"] == 2).any() for i in range(300)])
    alone = np.mean([(make([file], (16,) * 3)[i]["image0"] == 2).any() for i in range(300)])
    assert alone < 0.05
    assert 0.22 < share < 0.40


def test_anatomy_is_in_the_middle_where_there_is_room_and_slices_contain_it(tmp_path: Path) -> None:
    anatomy = np.zeros((1, 30, 40, 40), bool)
    anatomy[:, 7, 18:20, 21] = True
    file = masked_volume(tmp_path / "data", "a", anatomy, anatomy=anatomy)
    crop = make([file], (9, 10, 10), anatomy_fraction=1.0)[0]["image0"]
    assert crop[0, 4, 4:7, 5].any()
    flat = make([file], (10, 10), anatomy_fraction=1.0)
    assert all((flat[index]["image0"] == 1).any() for index in range(20))


def test_cases_without_anatomy_are_cropped_anywhere_and_small_ones_padded(tmp_path: Path) -> None:
    volume = np.ones((1, 6, 30, 30))
    empty = masked_volume(tmp_path / "data", "a", volume, anatomy=np.zeros((1, 6, 30, 30), bool))
    full = masked_volume(tmp_path / "data", "b", volume, anatomy=np.ones((1, 6, 30, 30), bool))
    for file in (empty, full, masked_volume(tmp_path / "data", "c", volume)):
        crop = make([file], (12, 12, 12), anatomy_fraction=1.0)[0]["image0"]
        assert np.flatnonzero(crop[0].any(axis=(1, 2))).tolist() == list(range(3, 9))


def test_anatomy_crops_are_the_same_every_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    file = masked_volume(
        tmp_path / "data", "a", rng.normal(size=(1, 30, 30, 30)), anatomy=rng.random((1, 30, 30, 30)) < 0.1
    )
    one, other = (make([file], (8,) * 3, anatomy_fraction=0.5, augmentation="spatial") for _ in range(2))
    assert all(np.array_equal(one[i]["image0"], other[i]["image0"]) for i in range(10))


def test_a_damaged_mask_is_named(tmp_path: Path) -> None:
    file = masked_volume(tmp_path / "data", "a", np.ones((1, 9, 9, 9)), anatomy=np.ones((1, 9, 9, 9), bool),
                         anonymised=np.ones((1, 9, 9, 9), bool))  # fmt: skip
    for kind, settings in (("anatomy", {"anatomy_fraction": 1.0}), ("anonymised", {"with_valid": True})):
        mask_file(file.parent, kind, "a").write_bytes(b"x")
        with pytest.raises(MFMError, match=f"data_{kind}/a"):
            make([file], (8,) * 3, transform=KeepValid, **settings)[0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_masks_anatomy_and_weights_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    masks = {"anatomy": rng.random((1, 14, 14, 14)) < 0.1, "anonymised": rng.random((1, 14, 14, 14)) < 0.5}
    volumes = [
        masked_volume(tmp_path / "data", f"case{i}", rng.normal(size=(1, 14, 14, 14)), **(masks if i else {}))
        for i in range(3)
    ]
    settings = StreamSettings(augmentation="spatial", with_valid=True, anatomy_fraction=0.5)
    stream = CropStream(volumes, KeepValid((Request((8, 8, 8)),)), settings, {f"case{i}": i + 1.0 for i in range(3)})
    one, two = (list(batches(stream, 2, 1, 5, workers)) for workers in (0, 2))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, two) for name in ("image0", "valid0", "draw"))


# --- weights ------------------------------------------------------------------------------------------------------


def test_weights_decide_how_often_a_volume_is_drawn(files: list[Path]) -> None:
    weights = {"case0": 0.5, "case1": 0.5, "case2": 0.0, "elsewhere": 7.0}
    stream = CropStream(files, Keep((Request((4,) * 3),)), StreamSettings(), weights)
    drawn = [stream.case_names(index)[0] for index in range(400)]
    assert "case2" not in drawn
    assert 150 < drawn.count("case0") < 250


def test_items_of_several_volumes_draw_different_ones_by_weight(files: list[Path]) -> None:
    transform = Keep((Request((4,) * 3, 0), Request((4,) * 3, 1)))
    weights = {"case0": 0.98, "case1": 0.01, "case2": 0.01}
    stream = CropStream(files, transform, StreamSettings(num_volumes=2), weights)
    pairs = [stream.case_names(index) for index in range(200)]
    assert all(len(set(pair)) == 2 for pair in pairs)
    assert np.mean([pair[0] == "case0" for pair in pairs]) > 0.9
    assert {name for pair in pairs for name in pair} == {"case0", "case1", "case2"}
