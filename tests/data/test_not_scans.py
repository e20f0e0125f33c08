"""Masks among scans: what names say, what values say, and that no real scan is taken for a mask."""

from __future__ import annotations

from pathlib import Path, PurePath

import numpy as np
import pytest

from mfm_nnunet.data.cases import image_files, is_named_mask, require_scan
from mfm_nnunet.images.reading import read_image, reader_for
from tests.builders.corpora import refusal


@pytest.mark.parametrize(
    "name",
    [
        "masks/a.nii.gz", "labelsTr/a.nii", "labelsTs/x.png", "Annotations/a.png", "GT/a.png", "lung_masks/a.png",
        "p1/segmentations/liver.nii.gz", "p1/Segmentation.nii.gz", "a_mask.nii.gz", "a-seg.nii", "a.seg.nrrd",
        "p_gt_2.png", "a_labels_0000.nii.gz", "label0001.nii.gz", "segmentation-0.nii", "a_annotation.png",
    ],
)  # fmt: skip
def test_names_of_masks(name: str) -> None:
    assert is_named_mask(PurePath(name))


@pytest.mark.parametrize(
    "name",
    [
        "a.nii.gz", "images/a.nii", "no_mask/a.nii", "without_labels/a.nii", "unlabelled/US/a.png", "segundo.nii",
        "labelled/x.nii", "maskless.png", "labels_project/a.nii", "masked/a.nii", "imagesTr/gtx.nii", "non-seg.nii",
    ],
)  # fmt: skip
def test_names_of_scans(name: str) -> None:
    assert not is_named_mask(PurePath(name))


def blocks(num_values: int, shape: tuple[int, ...] = (1, 24, 24, 24)) -> np.ndarray:
    """A label map of cubes of 4 voxels, the values of which come round."""
    grid = np.indices(shape[1:]) // 4
    return (np.ravel_multi_index(grid, tuple(-(-n // 4) for n in shape[1:])) % num_values)[None].astype(np.float32)


@pytest.mark.parametrize("num_values", [2, 5, 20])
def test_few_whole_numbers_are_a_mask(num_values: int) -> None:
    noise = np.random.default_rng(0).integers(0, num_values, (1, 16, 16, 16)).astype(np.float32)
    for image in (
        noise,
        blocks(num_values),
        255 * (blocks(num_values) > 0),
        np.zeros((1, 8, 8, 8)) + (noise[:, :8, :8, :8] > 0),
    ):
        assert "a.nii" in refusal("E_MASK", require_scan, Path("a.nii"), image)


def test_a_small_structure_in_a_large_volume() -> None:
    image = np.zeros((1, 200, 200, 200), np.float32)
    image[0, 77, 91, 3:9] = 1
    refusal("E_MASK", require_scan, Path("a.nii"), image)


def test_many_labels_are_a_mask_where_they_are_areas() -> None:
    areas = np.repeat(np.random.default_rng(0).integers(0, 117, (1, 20, 20, 4)), 10, axis=3).astype(np.float32)
    refusal("E_MASK", require_scan, Path("a.nii"), areas)


def test_scans_pass() -> None:
    rng = np.random.default_rng(0)
    eight_bits = rng.integers(0, 200, (3, 1, 64, 64)).astype(np.float32)
    for image in (eight_bits, blocks(5) + 0.5, blocks(5) - 1, rng.normal(size=(1, 9, 9, 9)), blocks(5) + 100):
        require_scan(Path("a.nii"), image)


@pytest.mark.parametrize("folder", ["unlabelled", "single_pairs", "Dataset051_STSPET", "Dataset053_STSMR"])
def test_real_scans_pass_and_their_masks_do_not(shared_data: Path, folder: str) -> None:
    for file in sorted(image_files(shared_data / folder))[::3]:
        image, _ = read_image((file,), reader_for(file))
        if is_named_mask(file.relative_to(shared_data)):
            refusal("E_MASK", require_scan, file, image)
        else:
            require_scan(file, image)
