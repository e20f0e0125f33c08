"""The crop stream: a pure function of (seed, index), the same for any number of workers, zero outside the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from mfm_nnunet.data.augment import SpatialParameters, apply_spatial, draw_spatial
from mfm_nnunet.data.crops import CropStream, StreamSettings, batches, read_box
from mfm_nnunet.errors import MFMError


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

    def __call__(self, crops: list[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {**{f"image{i}": crop for i, crop in enumerate(crops)}, "draw": np.float64(rng.random())}


def make(files: list[Path], *sizes: tuple[int, ...], **settings: Any) -> CropStream:
    return CropStream(files, Keep(tuple(Request(size) for size in sizes)), StreamSettings(**settings))


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
