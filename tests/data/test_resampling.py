"""Resampling gives what nnU-Net's own function gives: label maps exactly, images up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape
from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

from mfm_nnunet.data import resampling
from mfm_nnunet.data.resampling import resample_image, resampling_function

ONE = (1.0, 1.0, 1.0)
SPACINGS = [ONE, (4.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 6.0), (999.0, 1.0, 1.0), (1.0, 4.0, 4.0)]


def stock(x: np.ndarray, shape: Any, spacing: Any, new_spacing: Any = ONE, **kwargs: Any) -> np.ndarray:
    return resample_data_or_seg_to_shape(x, shape, spacing, new_spacing, **{"force_separate_z": None, **kwargs})


def random_cases(seed: int, count: int) -> Iterator[tuple[np.random.Generator, tuple[int, ...], tuple[int, ...], Any]]:
    """Shapes up and down, doubled (all boundaries tie), and 2D data with one slice; with a current spacing."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        old, new = rng.integers(1, 22, 3), rng.integers(1, 28, 3)
        kind = rng.integers(4)
        if kind == 0:
            old[0] = new[0] = 1
        elif kind == 1:
            new = old * 2
        elif kind == 2:
            new[rng.integers(3)] = old[rng.integers(3)]
        yield rng, tuple(map(int, old)), tuple(map(int, new)), SPACINGS[rng.integers(len(SPACINGS))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 5e-7), (np.float64, 1e-14)])
@pytest.mark.parametrize(("order", "order_z"), [(3, 0), (1, 0), (0, 0), (3, 1)])
def test_images_equal_stock(dtype: Any, tolerance: float, order: int, order_z: int) -> None:
    for rng, old, new, spacing in random_cases(order, 25):
        x = rng.normal(size=(2, *old)).astype(dtype)
        ours = resample_image(x, new, spacing, ONE, order=order, order_z=order_z)
        expected = stock(x, new, spacing, order=order, order_z=order_z)
        assert ours.dtype == expected.dtype
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=f"{old} -> {new} at {spacing}")


@pytest.mark.parametrize(
    ("old", "new"), [((3, 2, 300), (3, 3, 411)), ((2, 500, 3), (2, 333, 3)), ((260, 2, 2), (130, 4, 4))]
)
def test_long_axes_are_done_in_blocks_without_loss(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(1, *old))
    assert max(len(resampling._operator_blocks(n, m, 3, x.dtype.str)) for n, m in zip(old, new)) > 1
    np.testing.assert_allclose(resample_image(x, new, ONE, ONE), stock(x, new, ONE), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.float32])
@pytest.mark.parametrize("order", [0, 1])
def test_labels_equal_stock_exactly(dtype: Any, order: int) -> None:
    for rng, old, new, spacing in random_cases(10 + order, 40):
        labels = rng.integers(-1, rng.integers(1, 8), (1, *old))
        if rng.random() < 0.5:  # blobs instead of noise
            labels = np.rint(3 * scipy.ndimage.gaussian_filter(labels.astype(float), (0, 1, 1, 1)))
        labels = labels.astype(dtype)
        ours = resample_image(labels, new, spacing, ONE, is_seg=True, order=order)
        expected = stock(labels, new, spacing, is_seg=True, order=order)
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected, err_msg=f"{old} -> {new} at {spacing}")


def test_many_labels_in_small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "MIXED_VOXELS_AT_ONCE", 100)
    labels = np.random.default_rng(1).integers(0, 300, (1, 9, 10, 11)).astype(np.int16)
    ours = resample_image(labels, (14, 15, 16), ONE, ONE, is_seg=True, order=1)
    np.testing.assert_array_equal(ours, stock(labels, (14, 15, 16), ONE, is_seg=True, order=1))


def test_a_tie_goes_to_the_nearest_label_not_to_the_lowest() -> None:
    labels = np.array([0, 0, 5, 5, 0, 3, 3], dtype=np.int8).reshape(1, 1, 1, -1)
    ours = resample_image(labels, (1, 1, 14), ONE, ONE, is_seg=True, order=1)
    assert ours.ravel().tolist() == [0, 0, 0, 0, 5, 5, 5, 5, 0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("force", [None, False])
def test_separate_slices_are_decided_as_in_stock(spacing: Any, force: bool | None) -> None:
    x = np.random.default_rng(2).normal(size=(1, 6, 7, 8))
    ours = resample_image(x, (9, 10, 11), ONE, spacing, force_separate_z=force)
    np.testing.assert_allclose(ours, stock(x, (9, 10, 11), ONE, spacing, force_separate_z=force), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("array", "kwargs"),
    [
        (np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5), {}),
        (np.arange(60, dtype=np.int8).reshape(1, 3, 4, 5) % 3, {"is_seg": True, "order": 3}),
        (np.arange(60, dtype=np.int8).reshape(1, 3, 4, 5) % 3, {"is_seg": True, "order": 1, "order_z": 1}),
    ],
)
def test_what_the_fast_path_does_not_cover_is_stock(array: np.ndarray, kwargs: dict[str, Any]) -> None:
    spacing = (5.0, 1.0, 1.0)
    ours = resample_image(array, (5, 5, 6), spacing, ONE, **kwargs)
    np.testing.assert_array_equal(ours, stock(array, (5, 5, 6), spacing, **kwargs))


def test_same_shape_returns_the_input_and_inputs_are_not_changed() -> None:
    x = np.random.default_rng(3).normal(size=(1, 4, 5, 6)).astype(np.float32)
    before = x.copy()
    assert resample_image(x, (4, 5, 6), ONE, (2.0, 2.0, 2.0)) is x
    resample_image(x.transpose(0, 3, 2, 1), (7, 5, 3), ONE, ONE)
    np.testing.assert_array_equal(x, before)


def test_the_plan_chooses_the_function() -> None:
    kwargs = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    assert resampling_function("resample_data_or_seg_to_shape", kwargs).func is resample_image
    other = resampling_function("resample_torch_fornnunet", {"is_seg": False, "force_separate_z": False})
    assert other.func is resample_torch_fornnunet
    with_threshold = resampling_function("resample_data_or_seg_to_shape", {"separate_z_anisotropy_threshold": 5})
    assert with_threshold.func is resample_data_or_seg_to_shape
    # Without force_separate_z in the plan nnU-Net's default counts, which is not to separate.
    x = np.random.default_rng(5).normal(size=(1, 6, 7, 8))
    ours = resampling_function("resample_data_or_seg_to_shape", {})(x, (9, 8, 7), (5.0, 1.0, 1.0), ONE)
    np.testing.assert_allclose(ours, resample_data_or_seg_to_shape(x, (9, 8, 7), (5.0, 1.0, 1.0), ONE), atol=1e-14)


def test_real_scan_and_label_equal_stock(shared_data: Path) -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    folder, spacing = shared_data / "single_pairs", (0.8, 0.9, 1.1)
    image, properties = SimpleITKIO().read_images([str(folder / "sct_t2.nii.gz")])
    label, _ = SimpleITKIO().read_seg(str(folder / "sct_t2_label.nii.gz"))
    shape = compute_new_shape(image.shape[1:], properties["spacing"], spacing)
    image = (image - image.mean()) / image.std()
    ours = resample_image(image, shape, properties["spacing"], spacing)
    np.testing.assert_allclose(ours, stock(image, shape, properties["spacing"], spacing), rtol=0, atol=1e-5)
    ours = resample_image(label, shape, properties["spacing"], spacing, is_seg=True, order=1)
    np.testing.assert_array_equal(ours, stock(label, shape, properties["spacing"], spacing, is_seg=True, order=1))
