"""Slices are shown the radiological way, with true proportions, whatever the order of the axes in the file."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.images.geometry import letters_of
from mfm_nnunet.reports.views import Plane, choose_planes, largest_cross_section, read_oriented, reorient


def marked() -> np.ndarray:
    """A volume (x to the right, y to anterior, z to superior), its ends marked."""
    volume = np.zeros((6, 7, 8), np.float32)
    volume[0, 3, 3], volume[3, 6, 3], volume[3, 3, 7] = 10, 20, 30  # leftmost, most anterior, highest
    return volume


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("flips", list(itertools.product((False, True), repeat=3)))
def test_superior_and_anterior_are_up_and_left_is_right(
    tmp_path: Path, axes: tuple[int, ...], flips: tuple[bool, ...]
) -> None:
    affine = np.diag([1.5, 2, 3, 1])[:, [*axes, 3]] @ np.diag([*(-1 if flip else 1 for flip in flips), 1])
    array = np.flip(marked().transpose(axes), [axis for axis, flip in enumerate(flips) if flip])
    nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "image.nii.gz")
    seen = read_oriented(tmp_path / "image.nii.gz")
    same = sitk.DICOMOrient(sitk.ReadImage(str(tmp_path / "image.nii.gz")), "LPS")
    np.testing.assert_array_equal(seen.voxels, sitk.GetArrayFromImage(same))
    assert seen.spacing == pytest.approx(same.GetSpacing()[::-1])
    axial, coronal, sagittal = Plane(0, 3), Plane(1, 3), Plane(2, 2)
    assert axial.cut(seen.voxels)[3, 5] == 10, "the patient's left is on the right"
    assert axial.cut(seen.voxels)[0, 2] == 20, "anterior is up"
    assert coronal.cut(seen.voxels)[0, 2] == 30, "superior is up"
    assert sagittal.cut(seen.voxels)[0, 3] == 30
    assert [plane.pixel(seen.spacing) for plane in (axial, coronal, sagittal)] == [(2, 1.5), (3, 1.5), (3, 2)]


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_letters_of_a_readers_array(tmp_path: Path, reader: str) -> None:
    """The letters turn nnU-Net's array into what the report shows."""
    import nnunetv2.imageio.reader_writer_registry as registry

    affine = np.array([[0, 0, -3.0, 0], [1.5, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(marked(), affine), tmp_path / "image.nii.gz")
    image, properties = registry.recursive_find_reader_writer_by_name(reader)().read_images(
        [str(tmp_path / "image.nii.gz")]
    )
    letters = letters_of(properties)
    assert letters is not None
    seen = read_oriented(tmp_path / "image.nii.gz")
    np.testing.assert_array_equal(reorient(image[0], letters, properties["spacing"])[0], seen.voxels)
    assert letters_of({"spacing": (999, 1, 1)}) is None


def test_units(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.uint8), np.diag([2, 2, 5, 1])), tmp_path / "a.nii")
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 1), np.uint8), np.diag([2, 3, 5, 1])), tmp_path / "b.nii")
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5), np.uint8)), str(tmp_path / "c.png"))
    sizes = {name: read_oriented(tmp_path / name) for name in ("a.nii", "b.nii", "c.png")}
    assert [(seen.unit, seen.voxel_size) for seen in sizes.values()] == [("ml", 0.02), ("mm²", 6), ("pixels", 1)]
    assert sizes["b.nii"].voxels.shape == (5, 4)


def test_colours_become_grey(tmp_path: Path) -> None:
    rgb = sitk.GetImageFromArray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3), isVector=True)
    sitk.WriteImage(rgb, str(tmp_path / "a.png"))
    assert read_oriented(tmp_path / "a.png").voxels.shape == (4, 5)
    assert read_oriented(tmp_path / "a.png", is_label=True).voxels[0, 1] == 3


def test_cross_section_is_the_largest() -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[3, 1:5, 2:6] = True
    mask[1, 2, 3] = True
    assert [largest_cross_section(mask, axis) for axis in range(3)] == [3, 2, 3]
    assert [plane.index for plane in choose_planes(mask.shape, mask)] == [3, 2, 3]
    assert [plane.index for plane in choose_planes(mask.shape)] == [2, 3, 3]


def test_cross_section_of_a_block_full_of_labels_is_its_middle() -> None:
    """A little more at the border is no reason to show the border."""
    mask = np.ones((9, 20, 20), bool)
    mask[1:, :6] = False
    assert largest_cross_section(mask, 0) == 4
