"""From logits to files: against nnU-Net's own export, and with the geometry of the scan byte for byte."""

from __future__ import annotations

import errno
import os
from collections import namedtuple
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.data.storage import staging
from mfm_nnunet.errors import MFMError
from mfm_nnunet.prediction import export
from mfm_nnunet.prediction.export import ResampledLogits, logits_to_mask, logits_to_probabilities
from tests.builders.tiny_model import REGIONS, SPLINE, THREE_LABELS, dataset_json, tiny_plans, voxels_of

LABELS = {
    "few": {**THREE_LABELS, "c": 3, "d": 4},
    "one": {"background": 0, "a": 1},
    "regions": REGIONS,
    "ignore": {**THREE_LABELS, "ignore": 3},
    "regions and ignore": {**REGIONS, "ignore": 4},
}
TORCH = ("resample_torch_fornnunet", {"is_seg": False})
NONE = ("no_resampling_hack", {})
GRIDS: dict[str, dict[str, Any]] = {
    "finer": {"shape": (12, 14, 10), "cropped": (17, 20, 13)},
    "twice": {"shape": (8, 9, 7), "cropped": (16, 18, 14)},
    "coarser": {"shape": (17, 20, 13), "cropped": (12, 14, 10)},
    "same": {"shape": (12, 14, 10), "cropped": (12, 14, 10)},
    "anisotropic": {"shape": (6, 14, 10), "cropped": (9, 20, 15), "spacing": (5.0, 1.0, 1.0)},
    "anisotropic, same slices": {"shape": (9, 14, 10), "cropped": (9, 20, 15), "spacing": (5.0, 1.0, 1.0)},
    "transposed": {"shape": (12, 14, 10), "cropped": (17, 20, 13), "transpose": (2, 0, 1)},
}


def _case(
    grid: dict[str, Any], num_outputs: int, seed: int = 0, scale: float = 4.0
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Random half-precision logits on the plan's grid, and the properties of their case."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn((num_outputs, *grid["shape"]), generator=generator)).half()
    cropped, transpose = grid["cropped"], grid.get("transpose", (0, 1, 2))
    spacing = grid.get("spacing", (1.0, 1.0, 1.0))
    properties = {
        "spacing": [spacing[i] for i in np.argsort(transpose)],
        "shape_before_cropping": tuple(n + 5 for n in cropped),
        "bbox_used_for_cropping": [[2, 2 + n] for n in cropped],
        "shape_after_cropping_and_before_resampling": cropped,
    }
    return logits, properties


def _managers(plans: dict[str, Any], labels: dict[str, Any]) -> tuple[Any, Any, Any]:
    manager = PlansManager(plans)
    configuration = manager.get_configuration(next(iter(plans["configurations"])))
    return manager, configuration, manager.get_label_manager(dataset_json(labels))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Stock exports with ``nnUNet_def_n_proc`` threads; the last bit of a softmax depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("labels", "grid"), [*product(LABELS, ["anisotropic"]), *product(["few"], GRIDS)])
@pytest.mark.parametrize("resampling", [(SPLINE, {"is_seg": False, "order": 1, "order_z": 0}), TORCH])
def test_masks_are_those_of_stock_voxel_for_voxel(labels: str, grid: str, resampling: tuple[str, dict]) -> None:
    plans = tiny_plans(
        transpose=GRIDS[grid].get("transpose", (0, 1, 2)), spacing=GRIDS[grid].get("spacing"), probabilities=resampling
    )
    managers = _managers(plans, LABELS[labels])
    logits, properties = _case(GRIDS[grid], managers[2].num_segmentation_heads)
    stock = convert_predicted_logits_to_segmentation_with_correct_shape
    expected, expected_probabilities = stock(logits.numpy(), *managers, properties, return_probabilities=True)
    mask, probabilities = logits_to_probabilities(logits, properties, managers)
    assert mask.dtype == expected.dtype
    assert (mask != expected).sum() == 0
    assert probabilities.dtype == expected_probabilities.dtype == np.float32
    assert np.array_equal(probabilities, expected_probabilities)

    expected = stock(logits.numpy(), *managers, properties)
    mask = logits_to_mask(logits, properties, managers)
    assert mask.dtype == expected.dtype == np.uint8
    assert len(np.unique(mask)) > 1
    assert (mask != expected).sum() == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 9.0, 1.0)])
def test_classes_that_differ_by_a_rounding_are_decided_as_by_stock(
    spacing: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    managers = _managers(tiny_plans(spacing=spacing), LABELS["few"])
    logits, properties = _case({"shape": (30, 22, 30), "cropped": (45, 33, 45), "spacing": spacing}, 5)
    steps = torch.randint(-1, 2, logits.shape[1:], generator=torch.Generator().manual_seed(1))
    logits[3] = (logits[1].view(torch.int16) + steps).to(torch.int16).view(torch.half)  # at most one step of half apart
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(logits.numpy(), *managers, properties)
    mask = logits_to_mask(logits, properties, managers)
    print(f"{(mask != expected).sum()} of {mask.size} voxels differ from stock")
    assert (mask != expected).sum() == 0
    # And it is the second look that does it.
    monkeypatch.setattr(ResampledLogits, "exactly", lambda self, k, at: self[k][at])
    assert 0 < (logits_to_mask(logits, properties, managers) != expected).sum() < 0.01 * mask.size


def test_2d_plans_and_plans_without_resampling() -> None:
    slices = {"shape": (4, 12, 10), "cropped": (4, 17, 13), "spacing": (7.0, 1.0, 1.0)}
    for plans, grid in ((tiny_plans(2), slices), (tiny_plans(probabilities=NONE), GRIDS["same"])):
        managers = _managers(plans, LABELS["few"])
        logits, properties = _case(grid, 5)
        expected = convert_predicted_logits_to_segmentation_with_correct_shape(logits.numpy(), *managers, properties)
        assert np.array_equal(logits_to_mask(logits, properties, managers), expected)


def test_more_than_255_labels_need_two_bytes() -> None:
    managers = _managers(tiny_plans(), {"background": 0} | {f"l{k}": k for k in range(1, 300)})
    logits, properties = _case({"shape": (4, 5, 6), "cropped": (6, 7, 8)}, 300)
    expected = convert_predicted_logits_to_segmentation_with_correct_shape(logits.numpy(), *managers, properties)
    mask = logits_to_mask(logits, properties, managers)
    assert mask.dtype == expected.dtype == np.uint16
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("save_probabilities", [False, True])
def test_validation_cases_are_the_files_that_stock_writes(tmp_path: Path, save_probabilities: bool) -> None:
    dataset = dataset_json(LABELS["few"])
    managers = _managers(tiny_plans(), LABELS["few"])
    logits, properties = _case(GRIDS["finer"], 5)
    identity = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    properties["sitk_stuff"] = {"spacing": (1.0, 1.0, 1.0), "origin": (1.0, 2.0, 3.0), "direction": identity}
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    for folder in (stock, ours):
        folder.mkdir()
    export_prediction_from_logits(
        logits.numpy(), properties, managers[1], managers[0], dataset, str(stock / "case.1"), save_probabilities, 1
    )
    target = ours / "case.1"
    export.write_case(logits, properties, managers, target, ".nii.gz", save_probabilities=save_probabilities)
    names = sorted(file.name for file in stock.iterdir())
    assert sorted(file.name for file in ours.iterdir()) == names
    assert len(names) == (3 if save_probabilities else 1)
    for name in names:
        assert (ours / name).read_bytes() == (stock / name).read_bytes(), name


GEOMETRY_FIELDS = (
    "dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
    "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


def _random_affine(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Voxel sizes 0.3 to 4 mm; the axes along the world's in any order and direction, or rotated at will."""
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1.0, 1.0], 3)
    if kind == "oblique":
        rotation, upper = np.linalg.qr(rng.standard_normal((3, 3)))
        axes = rotation * np.sign(np.diag(upper))
    affine = np.eye(4)
    affine[:3, :3] = axes * rng.uniform(0.3, 4, 3)
    affine[:3, 3] = rng.uniform(-300, 300, 3)
    return affine


def _random_scan(file: Path, seed: int, reader: str) -> np.ndarray:
    """A scan with an arbitrary but legal header, written to ``file``; returns its voxels (X, Y, Z)."""
    rng = np.random.default_rng(seed)
    nifti2 = reader != "SimpleITKIO" and seed % 5 == 0  # SimpleITK does not read NIfTI-2
    image_class = nibabel.Nifti2Image if nifti2 else nibabel.Nifti1Image
    header = image_class.header_class(endianness="<>"[seed % 2])
    dtype = [np.int16, np.uint8, np.float32, np.float64][seed % 4]
    header.set_data_dtype(dtype)
    voxels = rng.integers(0, 200, rng.integers(4, 12, 3)).astype(dtype)
    affine = _random_affine(rng, "oblique" if seed % 3 else "aligned")
    image = image_class(voxels, affine, header)
    qform, sform = [(1, 1), (1, 0), (0, 2), (2, 4), (3, 1)][seed % 5]
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    image.header.set_xyzt_units(*[("mm", "sec"), ("mm", None), (None, None)][seed % 3])
    image.header["descrip"] = b"Jane Doe"
    image.header["cal_max"], image.header["cal_min"] = 255, 3
    image.header["pixdim"][4:] = rng.uniform(0, 3, 4)
    image.header["toffset"] = 2.5
    nibabel.save(image, file)
    return voxels


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_masks_have_the_geometry_of_the_scan_byte_for_byte(tmp_path: Path, reader: str, ending: str) -> None:
    manager = PlansManager(tiny_plans(reader=reader))
    for seed in range(15):
        source, target = tmp_path / f"scan{seed}{ending}", tmp_path / f"mask{seed}{ending}"
        voxels_XYZ = _random_scan(source, seed, reader)
        image, properties = manager.image_reader_writer_class().read_images([str(source)])
        before = export.read_header(source)
        export.write_mask((image[0] > 100).astype(np.uint8), properties, manager, target, before)
        after = export.read_header(target)
        assert type(after) is type(before)
        assert after.endianness == before.endianness
        for field in GEOMETRY_FIELDS:
            assert after[field].tobytes() == before[field].tobytes(), f"seed {seed}, {field}"
        mask = nibabel.load(target)
        assert mask.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(mask.dataobj), voxels_XYZ > 100), f"seed {seed}"
        assert np.array_equal(mask.affine, nibabel.load(source).affine)
        assert b"Jane" not in bytes(after.binaryblock)
        scaling = [float(after[name]) for name in ("scl_slope", "scl_inter", "cal_max", "cal_min")]
        assert scaling == [1, 0, 0, 0]
        again, _ = manager.image_reader_writer_class().read_images([str(target)])
        assert np.array_equal(again[0], image[0] > 100)


def test_labels_that_a_writer_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), np.int16), np.diag([-1, 1, 2, 1])), source)
    for reader, largest, is_legal in (
        ("SimpleITKIOWithReorient", 255, True),
        ("SimpleITKIOWithReorient", 256, False),
        ("SimpleITKIO", 300, True),
    ):
        manager, target = PlansManager(tiny_plans(reader=reader)), tmp_path / f"{reader}_{largest}.nii.gz"
        image, properties = manager.image_reader_writer_class().read_images([str(source)])
        mask = np.zeros(image.shape[1:], np.uint16)
        mask[0, 1, 2] = largest
        arguments = (mask, properties, manager, target, export.read_header(source))
        if is_legal:
            export.write_mask(*arguments)
            assert voxels_of(target).max() == largest
        else:
            with pytest.raises(MFMError, match=r"E_CONFIG.*SimpleITKIOWithReorient.*256"):
                export.write_mask(*arguments)
            assert not target.exists()


def test_oddities_that_a_loader_would_repair_stay_as_they_are(tmp_path: Path) -> None:
    source, target = tmp_path / "scan.nii", tmp_path / "mask.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5), np.int16), np.diag([1, 1, 2, 1])), source)
    content = bytearray(source.read_bytes())
    pixdim = 76
    content[pixdim : pixdim + 4] = bytes(4)  # qfac 0, as some tools write it, means 1
    source.write_bytes(content)
    assert float(nibabel.load(source).header["pixdim"][0]) == 1
    export.write_like(np.ones((3, 4, 5), np.uint16), export.read_header(source), target)
    assert target.read_bytes()[pixdim : pixdim + 32] == bytes(content[pixdim : pixdim + 32])
    assert nibabel.load(target).get_data_dtype() == np.uint16


def test_a_header_of_another_shape_is_refused(tmp_path: Path) -> None:
    """As many voxels are not enough: a replaced scan may be the same, turned."""
    source = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 4, 5, 1), np.int16), np.eye(4)), source)
    header = export.read_header(source)
    export.write_like(np.ones((3, 4, 5), np.uint8), header, tmp_path / "mask.nii")
    with pytest.raises(MFMError, match=r"E_GEOMETRY.*other\.nii"):
        export.write_like(np.ones((5, 4, 3), np.uint8), header, tmp_path / "other.nii")


def test_equal_masks_are_equal_files(tmp_path: Path) -> None:
    source = tmp_path / "scan.nii.gz"
    _random_scan(source, 3, "NibabelIO")
    header = export.read_header(source)
    for name in ("a.nii.gz", "b.nii.gz"):
        export.write_like(np.ones(header.get_data_shape(), np.uint8), header, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_source_that_is_no_nifti_is_named(tmp_path: Path) -> None:
    file = tmp_path / "scan.nii"
    file.write_bytes(b"no header" * 100)
    with pytest.raises(MFMError, match=r"E_HEADER.*scan\.nii"):
        export.read_header(file)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_volumes_keep_their_geometry(tmp_path: Path, ending: str) -> None:
    source, target = tmp_path / f"scan{ending}", tmp_path / f"mask{ending}"
    image = sitk.GetImageFromArray(np.arange(60, dtype=np.float32).reshape(3, 4, 5))
    image.SetSpacing((0.7, 1.3, 2.1))
    image.SetOrigin((-3.3, 4.4, 5.5))
    image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
    sitk.WriteImage(image, str(source))
    manager = PlansManager(tiny_plans())
    voxels, properties = manager.image_reader_writer_class().read_images([str(source)])
    export.write_mask((voxels[0] > 20).astype(np.uint8), properties, manager, target)
    mask = sitk.ReadImage(str(target))
    assert mask.GetSpacing() == image.GetSpacing()
    assert mask.GetOrigin() == image.GetOrigin()
    assert mask.GetDirection() == image.GetDirection()
    assert np.array_equal(voxels_of(target), voxels[0] > 20)


@pytest.mark.parametrize(("reader", "ending"), [("NaturalImage2DIO", ".png"), ("Tiff3DIO", ".tif")])
def test_pictures_and_stacks_are_written_by_stock(tmp_path: Path, reader: str, ending: str) -> None:
    manager = PlansManager(tiny_plans(reader=reader))
    shape = (1, 7, 9) if ending == ".png" else (4, 7, 9)
    mask = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    with staging(tmp_path) as stage:
        export.write_mask(mask, {"spacing": (999, 1, 1)}, manager, stage / f"case{ending}")
        export.publish(stage, tmp_path)
    written, _ = manager.image_reader_writer_class().read_seg(str(tmp_path / f"case{ending}"))
    assert np.array_equal(written.reshape(shape), mask)
    extra = ["case.json"] if ending == ".tif" else []  # that writer keeps the spacing in a file of its own
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([f"case{ending}", *extra])


def test_a_mask_that_reads_back_differently_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = PlansManager(tiny_plans())
    writer = manager.image_reader_writer_class
    monkeypatch.setattr(writer, "write_seg", lambda self, seg, file, properties: sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros_like(seg)), file
    ))  # fmt: skip
    with pytest.raises(OSError, match="reads back"):
        export.write_mask(np.ones((3, 4, 5), np.uint8), {}, manager, tmp_path / "case.nrrd")


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case.nii.gz").write_bytes(b"from before")

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work() -> None:
        with staging(tmp_path) as stage:
            (stage / "case.nii.gz").write_bytes(b"new")
            export.publish(stage, tmp_path)

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(MFMError, match="E_DISK_FULL"):
                work()
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"from before"]
    work()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"]


def test_a_full_disk_is_recognised_behind_a_librarys_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    manager = PlansManager(tiny_plans())

    def fails(*arguments: Any) -> None:
        raise RuntimeError("ITK ERROR: could not write")

    monkeypatch.setattr(manager.image_reader_writer_class, "write_seg", fails)
    for free, expected in ((10, MFMError), (10**9, RuntimeError)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage(10**9, 0, free))
        with pytest.raises(expected) as caught:
            export.write_mask(np.ones((3, 4, 5), np.uint8), {}, manager, tmp_path / "case.nrrd")
        assert isinstance(caught.value, MFMError) == (free == 10)
