"""Images and masks are paired by name; what cannot be paired or learned is refused, all of it at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.pairs import find_values, name_labels, pair_folders
from mfm_nnunet.errors import CasesFailedError
from tests.builders.corpora import refusal, touch


def found(root: Path, images: str = "images", labels: str = "labels") -> dict[str, tuple[list[str], str]]:
    cases = pair_folders(root / images, root / labels)
    return {case.name: ([file.name for file in case.images], case.label.name) for case in cases if case.label}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.nii.gz", "a.nii.gz"),
        ("a_0000.nii.gz", "a.nii.gz"),
        ("a_0000.nii.gz", "a_0000.nii.gz"),
        ("a.nrrd", "a_seg.nrrd"),
        ("a.png", "a-mask.png"),
        ("a_image.mha", "a_label.mha"),
        ("img0001.nii.gz", "label0001.nii.gz"),
        ("image_a.jpg", "mask_a.png"),
        ("a.tif", "a_ground_truth.png"),
    ],
)
def test_names_that_mean_the_same(image: str, mask: str, tmp_path: Path) -> None:
    touch(tmp_path / "images", image)
    touch(tmp_path / "labels", mask)
    assert [*found(tmp_path).values()] == [([image], mask)]


def test_channels_and_numbers_of_cases(tmp_path: Path) -> None:
    """Four digits at the end are channels only if the masks do not have them."""
    touch(tmp_path / "images", *(f"p{case}_{channel:04d}.nii.gz" for case in (1, 2) for channel in (0, 1)))
    touch(tmp_path / "labels", "p1.nii.gz", "p2_seg.nii.gz")
    assert found(tmp_path)["p2"] == (["p2_0000.nii.gz", "p2_0001.nii.gz"], "p2_seg.nii.gz")
    touch(tmp_path / "other", "p_0000.nii.gz", "p_0001.nii.gz", "p_0007.nii.gz")
    touch(tmp_path / "masks", "p_0000.nii.gz", "p_0001.nii.gz", "p_0007.nii.gz")
    assert sorted(found(tmp_path, "other", "masks")) == ["p_0000", "p_0001", "p_0007"]
    (tmp_path / "images" / "p1_0001.nii.gz").unlink()
    refusal("E_CHANNELS", pair_folders, tmp_path / "images", tmp_path / "labels", words=("p1_0001",))


def test_folders(tmp_path: Path) -> None:
    """One folder for both, one inside the other, and a folder for each patient."""
    touch(tmp_path / "both", "a.nrrd", "a_seg.nrrd", "b.nrrd", "b_seg.nrrd")
    assert found(tmp_path, "both", "both") == {"a": (["a.nrrd"], "a_seg.nrrd"), "b": (["b.nrrd"], "b_seg.nrrd")}
    touch(tmp_path / "data", "a.nrrd", "masks/a.nrrd")
    assert found(tmp_path, "data", "data/masks") == {"a": (["a.nrrd"], "a.nrrd")}
    touch(tmp_path / "images", "p1/ct.nii.gz", "p2/ct.nii.gz")
    touch(tmp_path / "labels", "p1/seg.nii.gz", "p2/seg.nii.gz")
    assert found(tmp_path) == {name: (["ct.nii.gz"], "seg.nii.gz") for name in ("p1", "p2")}
    touch(tmp_path / "CT", "sub-01/a.nii.gz", "sub-02/a.nii.gz")
    touch(tmp_path / "gt", "sub-01/a.nii.gz", "sub-02/a.nii.gz")
    cases = pair_folders(tmp_path / "CT", tmp_path / "gt")
    assert [(case.subject, case.modality) for case in cases] == [("sub-01", "ct"), ("sub-02", "ct")]
    assert all(case.label and case.label.parent.name == case.images[0].parent.name for case in cases)


def test_what_has_no_partner(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.png", "b.png", "c.png")
    touch(tmp_path / "labels", "b_mask.png", "d.png")
    words = ("3 files", "no mask for a", "no mask for c", "no image for d.png")
    refusal("E_NOT_FOUND", pair_folders, tmp_path / "images", tmp_path / "labels", words=words)
    refusal("E_NOT_FOUND", pair_folders, tmp_path / "images", tmp_path / "nowhere", words=("--labels",))
    (tmp_path / "empty").mkdir()
    refusal("E_NOT_FOUND", pair_folders, tmp_path / "empty", tmp_path / "labels", words=("no image",))
    refusal("E_NOT_FOUND", pair_folders, tmp_path / "images", tmp_path / "empty", words=("no mask",))


@pytest.mark.parametrize(
    ("images", "masks"), [(("a.png",), ("a_seg.png", "a_mask.png")), (("a.png", "a.tif"), ("a.png",))]
)
def test_two_candidates_for_one_name(images: tuple[str, ...], masks: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path / "images", *images)
    touch(tmp_path / "labels", *masks)
    words = max(images, masks, key=len)
    refusal("E_CONFIG", pair_folders, tmp_path / "images", tmp_path / "labels", words=words)


def mask(file: Path, values: np.ndarray) -> Case:
    sitk.WriteImage(sitk.GetImageFromArray(values), str(file))
    return Case(file.stem, (file,), file)


def test_values(tmp_path: Path) -> None:
    grid = np.zeros((4, 5, 6), np.uint8)
    one, two = grid.copy(), grid.copy()
    one[1], two[2] = 255, 7
    cases = [mask(tmp_path / "a.nrrd", one), mask(tmp_path / "b.nrrd", two)]
    assert find_values(cases, 1) == {0, 7, 255}
    refusal("E_LABEL_VALUE", find_values, [mask(tmp_path / "c.nrrd", grid)], 1)
    refusal(
        "E_LABEL_VALUE", find_values, [mask(tmp_path / "d.nrrd", np.arange(300, dtype=np.int16).reshape(3, 10, 10))], 1
    )
    bad = [mask(tmp_path / "e.nrrd", one.astype(np.float32) / 2), mask(tmp_path / "f.nrrd", -one.astype(np.int16))]
    sitk.WriteImage(sitk.GetImageFromArray(one[0]), str(tmp_path / "g.jpg"))
    bad.append(Case("g", (tmp_path / "g.jpg",), tmp_path / "g.jpg"))
    with pytest.raises(CasesFailedError) as caught:
        find_values([*cases, *bad], 1)
    assert {failure.case: failure.code for failure in caught.value.failures} == dict.fromkeys("efg", "E_LABEL_VALUE")


def test_names_of_labels() -> None:
    assert name_labels({0, 255}, {255: "lung"}) == ({"background": 0, "lung": 1}, {0: 0, 255: 1})
    assert name_labels({1, 2}, {}) == ({"background": 0, "label_1": 1, "label_2": 2}, {0: 0, 1: 1, 2: 2})
    labels, new = name_labels({0, 1, 5, 7}, {1: "ignore"})
    assert (labels, new[1]) == ({"background": 0, "label_1": 1, "label_2": 2, "ignore": 3}, 3)
    refusal("E_CONFIG", name_labels, {0, 1}, {2: "tumour"}, words=("2=tumour", "0 1"))
    refusal("E_CONFIG", name_labels, {0, 1, 2}, {1: "a", 2: "a"})
    refusal("E_CONFIG", name_labels, {0, 1}, {1: "background"})
