"""NIfTI headers that readers take differently: refused, or read by the one that takes them as they are meant."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import nifti
from mfm_nnunet.images.geometry import difference, geometry_of, properties_for, require_sane
from mfm_nnunet.images.integrity import check_image_file
from mfm_nnunet.images.reading import read_image
from tests.builders.nifti import save_nifti

VOXELS = np.random.default_rng(0).integers(-300, 300, (9, 8, 7)).astype(np.int16)
SIZES = (1.0, 1.5, 2.0)


@pytest.fixture(autouse=True)
def quiet_itk() -> None:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def save(path: Path, voxels: np.ndarray = VOXELS, affine: np.ndarray | None = None, **fields: Any) -> Path:
    return save_nifti(path, voxels, affine, **fields)


def stock(file: Path, reader: str) -> tuple[np.ndarray, dict]:
    return recursive_find_reader_writer_by_name(reader)().read_images((str(file),))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"scl_slope": 0, "scl_inter": 5}, "E_HEADER"),
        ({"scl_slope": np.nan, "scl_inter": 5}, "E_HEADER"),
        ({"scl_slope": 1e-20, "scl_inter": 0}, "E_HEADER"),
        ({"vox_offset": 0}, "E_HEADER"),
        ({"sform_code": -1}, "E_HEADER"),
        ({"qform_code": 99, "sform_code": 0}, "E_HEADER"),
        ({"qform_code": 1, "sform_code": 0, "pixdim": [-3, 1, 1.5, 2, 0, 0, 0, 0]}, "E_GEOMETRY"),
    ],
)
def test_fields_that_itk_and_nibabel_take_differently(tmp_path: Path, fields: dict[str, Any], code: str) -> None:
    file = save(tmp_path / "x.nii.gz", **fields)
    with pytest.raises(MFMError) as error:
        check_image_file(file)
    assert error.value.code == code


@pytest.mark.parametrize(
    "fields",
    [
        {"scl_slope": 0, "scl_inter": 0},
        {"scl_slope": np.nan, "scl_inter": np.nan},
        {"scl_slope": -2, "scl_inter": 3},
        {"scl_slope": 1e-6, "scl_inter": 0},
        {"qform_code": 1, "sform_code": 0, "pixdim": [5, 1, 1.5, 2, 0, 0, 0, 0]},
        {"qform_code": 1, "sform_code": 0, "pixdim": [-1, 1, 1.5, 2, 0, 0, 0, 0]},
        {"qform_code": 0, "sform_code": 0},
        {"qform_code": 0, "quatern_b": np.nan, "qoffset_x": np.nan},
        {"qform_code": 1, "sform_code": 0, "srow_x": [np.nan] * 4},
        {"toffset": np.nan, "cal_max": np.inf, "slice_end": 99, "xyzt_units": 26},
    ],
)
def test_both_readers_agree_about_what_passes(tmp_path: Path, fields: dict[str, Any]) -> None:
    file = save(tmp_path / "x.nii.gz", **fields)
    check_image_file(file)
    (one, properties), (other, other_properties) = stock(file, "SimpleITKIO"), stock(file, "NibabelIO")
    np.testing.assert_allclose(one, other, rtol=1e-6)
    if fields.get("qform_code", 1) or fields.get("sform_code", 1):  # without any, the readers choose another origin
        assert not difference(geometry_of(properties_for("NibabelIO", properties)), geometry_of(other_properties))
    header = nifti.nifti_header(file, nifti.read_start(file))
    np.testing.assert_allclose(one[0], VOXELS.T * header.slope + header.inter, rtol=1e-6)


# --- which reader ---------------------------------------------------------------------------------------------------


def turned(*angles: float) -> np.ndarray:
    """A rotation about x, y and z."""
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        one, two = [index for index in range(3) if index != axis]
        turn = np.eye(3)
        turn[[one, two], [one, two]] = np.cos(angle)
        turn[one, two], turn[two, one] = -np.sin(angle), np.sin(angle)
        result = turn @ result
    return result


def by_sform(path: Path, axes: np.ndarray, qform_code: int = 0) -> Path:
    """A file whose sform has the given axes, and the voxel size that they have."""
    sizes = np.linalg.norm(axes, axis=0)
    rows = {f"srow_{name}": [*axes[index], 5.0] for index, name in enumerate("xyz")}
    pixdim = [1, *sizes, 0, 0, 0, 0]
    return save(path, VOXELS[:2, :2, :2], sform_code=1, qform_code=qform_code, pixdim=pixdim, **rows)


def itk_reads(file: Path) -> bool:
    try:
        sitk.ReadImage(str(file))
    except RuntimeError:
        return False
    return True


def test_rounded_axes_are_those_that_itk_refuses(tmp_path: Path) -> None:
    """ITK's criterion, found by experiment, against ITK."""
    rng = np.random.default_rng(1)
    outcomes = []
    for trial in range(150):
        axes = np.round(turned(*rng.uniform(-3, 3, 3)), 3 + trial % 4) + rng.choice([0, 2e-5]) * rng.normal(size=(3, 3))
        if trial % 2:
            axes *= rng.uniform(0.5, 3, 3)
        file = by_sform(tmp_path / "x.nii.gz", axes)
        reads = itk_reads(file)
        unit = axes / np.linalg.norm(axes, axis=0)
        off = np.max(np.abs(unit @ unit.T - np.eye(3)))
        if abs(off - 1e-4) > 2e-6:
            assert (nifti.choose_nifti_reader(file, "SimpleITKIO") == "NibabelIO") == (not reads), (trial, off)
        outcomes.append(reads)
        check_image_file(file)
        q = by_sform(tmp_path / "q.nii.gz", axes, qform_code=1)
        assert nifti.choose_nifti_reader(q, "SimpleITKIO") == "SimpleITKIO"
        assert itk_reads(tmp_path / "q.nii.gz")  # it takes the qform then
    assert 30 < sum(outcomes) < 120


def test_sheared_axes_are_not_rounded(tmp_path: Path) -> None:
    axes = np.eye(3)
    axes[0, 1] = 0.01
    file = by_sform(tmp_path / "x.nii.gz", axes)
    assert nifti.choose_nifti_reader(file, "SimpleITKIO") == "SimpleITKIO"
    assert not itk_reads(file)
    with pytest.raises(MFMError, match="E_GEOMETRY  "):
        check_image_file(file)


def rounded(path: Path) -> Path:
    affine = np.eye(4)
    affine[:3, :3] = np.round(turned(0.2, 0, 0.3), 3)
    affine[:3, 3] = 1, 20, 300
    return save(path, affine=affine, qform_code=0)


def long_quaternion(path: Path) -> Path:
    return save(path, qform_code=1, sform_code=0, quatern_b=1 + 1e-5)


ONE_READER = {
    "rounded axes": (rounded, "NibabelIO"),
    "trailing axes of one": (lambda path: save(path, VOXELS[..., None, None]), "SimpleITKIO"),
    "metres": (lambda path: in_units(path, 1, 1e-3), "SimpleITKIO"),
    "micrometres": (lambda path: in_units(path, 3, 1e3), "SimpleITKIO"),
    "a long quaternion": (long_quaternion, "SimpleITKIO"),
}


def in_units(path: Path, code: int, factor: float) -> Path:
    affine = np.diag([*(factor * size for size in SIZES), 1])
    affine[:3, 3] = np.array([10, 20, 30]) * factor
    return save(path, affine=affine, xyzt_units=code)


@pytest.mark.parametrize("kind", ONE_READER)
@pytest.mark.parametrize("wanted", ["SimpleITKIO", "NibabelIO"])
def test_the_reader_that_takes_a_file_as_meant(tmp_path: Path, kind: str, wanted: str) -> None:
    write, expected = ONE_READER[kind]
    file = write(tmp_path / "x.nii.gz")
    check_image_file(file)
    assert nifti.choose_nifti_reader(file, wanted) == expected
    array, properties = stock(file, expected)
    np.testing.assert_array_equal(array[0], VOXELS.T)
    converted = properties_for(wanted, properties)
    geometry = geometry_of(converted)
    require_sane(file, array, geometry)
    if kind != "rounded axes":
        assert geometry.spacing == pytest.approx(SIZES[::-1])
    assert set(converted) == {"spacing", "sitk_stuff" if wanted == "SimpleITKIO" else "nibabel_stuff"}
    mask = tmp_path / "mask.nii"
    through_the_gate = read_image([file], wanted)
    np.testing.assert_array_equal(through_the_gate[0], array)
    assert through_the_gate[1].keys() == converted.keys()
    assert not difference(geometry_of(through_the_gate[1]), geometry)
    # Whoever trains or predicts with this plan writes masks by the wanted reader.
    recursive_find_reader_writer_by_name(wanted)().write_seg((VOXELS.T > 0).astype(np.uint8), str(mask), converted)
    np.testing.assert_array_equal(np.asarray(nibabel.load(mask).dataobj), VOXELS > 0)  # type: ignore[attr-defined]


def test_a_flat_image_with_nibabel(tmp_path: Path) -> None:
    file = save(tmp_path / "x.nii", VOXELS[:, :, 0], np.diag([2, 3, 1, 1]))
    assert nifti.choose_nifti_reader(file, "NibabelIO") == "SimpleITKIO"
    array, properties = stock(file, "SimpleITKIO")
    converted = properties_for("NibabelIO", properties)
    np.testing.assert_allclose(converted["nibabel_stuff"]["original_affine"][:2, :2], np.diag([2, 3]))
    require_sane(file, array, geometry_of(converted))


def test_a_reader_that_can_stays(tmp_path: Path) -> None:
    plain = save(tmp_path / "x.nii.gz")
    two = tmp_path / "two.nii.gz"
    nibabel.save(nibabel.Nifti2Image(VOXELS, np.eye(4)), two)
    for reader in ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient", "Other"):
        assert nifti.choose_nifti_reader(plain, reader) == reader
    assert nifti.choose_nifti_reader(two, "SimpleITKIO") == "NibabelIO"
    for name, content in (("text.nii.gz", b"text"), ("empty.nii", b""), ("cut.nii.gz", plain.read_bytes()[:40])):
        (tmp_path / name).write_bytes(content)
        assert nifti.choose_nifti_reader(tmp_path / name, "NibabelIO") == "NibabelIO"
        assert nifti.choose_nifti_reader(tmp_path / name, "SimpleITKIO") == "SimpleITKIO"
    assert nifti.choose_nifti_reader(tmp_path / "gone.nii.gz", "NibabelIO") == "NibabelIO"
    assert nifti.choose_nifti_reader(tmp_path, "NibabelIO") == "NibabelIO"


def test_units_that_no_reader_converts(tmp_path: Path) -> None:
    two = tmp_path / "two.nii.gz"
    image = nibabel.Nifti2Image(VOXELS, np.diag([1500.0, 1500, 1500, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, two)
    metres = in_units(tmp_path / "x.nii", 1, 1e-3)
    for file, reader in ((two, "NibabelIO"), (two, "SimpleITKIO"), (metres, "NibabelIOWithReorient")):
        if reader == "SimpleITKIO":  # which cannot read NIfTI-2 at all, and says so
            assert nifti.choose_nifti_reader(file, reader) == reader
            continue
        with pytest.raises(MFMError, match=r"E_SPACING .*xyzt_units"):
            nifti.choose_nifti_reader(file, reader)


def test_properties_are_those_of_the_other_reader(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[:3, :3] = turned(0.2, -0.4, 3) * SIZES
    affine[:3, 3] = 1, -20, 300
    file = save(tmp_path / "x.nii.gz", affine=affine)
    by_itk, by_nibabel = stock(file, "SimpleITKIO")[1], stock(file, "NibabelIO")[1]
    found = properties_for("NibabelIO", by_itk)
    np.testing.assert_allclose(
        found["nibabel_stuff"]["original_affine"], by_nibabel["nibabel_stuff"]["original_affine"], atol=1e-4
    )
    np.testing.assert_allclose(found["spacing"], by_nibabel["spacing"], rtol=1e-6)
    found = properties_for("SimpleITKIO", by_nibabel)
    assert found.keys() == by_itk.keys()
    for name, value in by_itk["sitk_stuff"].items():
        assert isinstance(found["sitk_stuff"][name], tuple)
        np.testing.assert_allclose(found["sitk_stuff"][name], value, atol=1e-4)
    assert properties_for("SimpleITKIO", by_itk) == by_itk


# --- qform and sform ------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    monkeypatch.setattr(nifti, "_warned", set())
    with caplog.at_level(logging.WARNING, "mfm_nnunet.images.nifti"):
        yield caplog


def warn(file: Path) -> None:
    nifti.warn_of_contradiction(file, nifti.contradiction(nifti.read_start(file)))


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    "5 mm": {"qoffset_x": 5},
    "mirrored": {"srow_x": [-1, 0, 0, 0]},
    "qfac": {"pixdim": [-1, *SIZES, 0, 0, 0, 0]},
    "180 degrees": {"quatern_c": 1},
    "5 degrees": {"quatern_d": np.sin(np.radians(2.5))},
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_logged_once(tmp_path: Path, name: str, warnings: pytest.LogCaptureFixture) -> None:
    codes = {"qform_code": 1, "sform_code": 2}
    file = save(tmp_path / "x.nii.gz", **{**CONTRADICTIONS[name], **codes})
    check_image_file(file)
    for _ in range(2):
        warn(file)
    assert warnings.text.count(str(file)) == 1
    for one in codes:
        warnings.clear()
        alone = save(tmp_path / f"{one}.nii.gz", **{**CONTRADICTIONS[name], **codes, one: 0})
        warn(alone)
        assert not warnings.records


def test_rounding_is_no_contradiction(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(2)
    for trial in range(50):
        affine = np.eye(4)
        affine[:3, :3] = turned(*rng.uniform(-3, 3, 3)) * rng.uniform(0.3, 5, 3) * rng.choice([-1, 1], 3)
        affine[:3, 3] = rng.uniform(-1000, 1000, 3)
        image = nibabel.Nifti1Image(VOXELS, affine)
        image.set_qform(affine, 1)
        image.set_sform(np.round(affine, 4), 1)
        file = tmp_path / f"{trial}.nii.gz"
        nibabel.save(image, file)
        warn(file)
    assert not warnings.records


def test_many_contradictions_do_not_flood_the_log(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    for number in range(nifti.MAX_WARNINGS + 5):
        warn(save(tmp_path / f"{number}.nii.gz", qform_code=1, sform_code=1, qoffset_x=5))
    assert len(warnings.records) == nifti.MAX_WARNINGS
    assert "No more files" in warnings.text


def test_real_scans_do_not_contradict_themselves(shared_data: Path, warnings: pytest.LogCaptureFixture) -> None:
    files = sorted(shared_data.rglob("*.nii.gz"))[::8]
    assert len(files) > 50
    for file in files:
        warn(file)
        assert nifti.choose_nifti_reader(file, "SimpleITKIO") == "SimpleITKIO"
        assert nifti.choose_nifti_reader(file, "NibabelIO") == "NibabelIO"
        nifti.nifti_header(file, nifti.read_start(file))
    assert not warnings.records
