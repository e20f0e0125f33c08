"""The input gate: what is whole passes and equals nnU-Net's own reading; what is damaged is refused with its code."""

from __future__ import annotations

import errno
import gzip
import json
import os
import sys
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from PIL import Image

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import IMAGE_ENDINGS
from mfm_nnunet.images.integrity import check_image_file, files_of
from mfm_nnunet.images.reading import check_label, read_image, read_label, reader_for
from tests.builders.nifti import save_nifti

RNG = np.random.default_rng(0)
SHAPE = (9, 8, 7)


def volume(dtype: str = "int16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (RNG.normal(size=shape) * 100).astype(dtype)


def affine(*spacing: float) -> np.ndarray:
    return np.diag([*(spacing or (1.0, 1.5, 2.0)), 1.0])


def code_of(action: Callable[[], Any]) -> str:
    with pytest.raises(MFMError) as error:
        action()
    return error.value.code


def refused(path: Path) -> str:
    return code_of(lambda: check_image_file(path))


def stock(file: Path, reader: str) -> tuple[np.ndarray, dict]:
    return recursive_find_reader_writer_by_name(reader)().read_images((str(file),))


def require_as_stock(file: Path) -> None:
    reader = reader_for(file)
    array, properties = read_image([file], reader)
    expected, expected_properties = stock(file, reader)
    assert array.dtype == np.float32
    assert array.ndim == 4
    np.testing.assert_array_equal(array, expected)
    assert list(properties["spacing"]) == list(expected_properties["spacing"])
    assert properties.keys() == expected_properties.keys()


# --- real scans ---------------------------------------------------------------------------------------------------


def real_files(shared_data: Path) -> list[Path]:
    files = sorted((shared_data / "Dataset004_Hippocampus" / "imagesTr").glob("*.nii.gz"))[::40]
    for folder in sorted(shared_data.glob("Dataset05*/imagesTr")):
        files += sorted(folder.iterdir())[:2]
    files += sorted((shared_data / "single_pairs").glob("*.nii.gz"))
    for folder in sorted((shared_data / "unlabelled").iterdir()):
        files += sorted(folder.iterdir())[:2]
    return files


def test_real_scans_pass_and_equal_nnunets_reading(shared_data: Path) -> None:
    files = real_files(shared_data)
    assert len(files) > 20
    for file in files:
        if "_label" in file.name:
            check_image_file(file)
        else:
            require_as_stock(file)


def test_real_labels_fit_their_images(shared_data: Path) -> None:
    folder, ending = shared_data / "Dataset057_CXRLung", ".png"
    dataset_json = json.loads((folder / "dataset.json").read_text())
    for file in sorted((folder / "labelsTr").iterdir())[:10]:
        name = file.name.removesuffix(ending)
        image_file = folder / "imagesTr" / f"{name}_0000{ending}"
        reader = reader_for(image_file, dataset_json)
        label, label_properties = read_label(file, reader)
        assert label.shape[0] == 1
        assert label.max() > 0
        check_label(label, label_properties, *read_image([image_file], reader), dataset_json, name)


@pytest.fixture(scope="module")
def real_nifti(shared_data: Path) -> Path:
    return shared_data / "Dataset004_Hippocampus" / "imagesTr" / "hippocampus_001_0000.nii.gz"


def test_every_truncation_of_a_real_scan_is_refused(real_nifti: Path, tmp_path: Path) -> None:
    data = real_nifti.read_bytes()
    broken = tmp_path / "cut.nii.gz"
    for length in (*(len(data) * percent // 100 for percent in (1, 20, 50, 99)), len(data) - 8, len(data) - 1):
        broken.write_bytes(data[:length])
        assert refused(broken) == "E_GZIP_TRUNCATED", length
        assert code_of(lambda: read_image([broken], "SimpleITKIO")) == "E_GZIP_TRUNCATED"


# --- what is no image ---------------------------------------------------------------------------------------------


def test_files_that_are_no_regular_files(tmp_path: Path) -> None:
    fifo, folder, link = (tmp_path / f"{name}.nii.gz" for name in ("fifo", "folder", "link"))
    os.mkfifo(fifo)
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    assert refused(fifo) == "E_NOT_REGULAR"
    assert refused(folder) == "E_NOT_REGULAR"
    assert refused(link) == "E_NOT_FOUND"
    assert refused(tmp_path / "missing.nii.gz") == "E_NOT_FOUND"
    assert refused(tmp_path / ("x" * 300 + ".nii.gz")) == "E_NOT_FOUND"
    assert code_of(lambda: read_image([fifo], "SimpleITKIO")) == "E_NOT_REGULAR"


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
def test_empty_text_and_foreign_content(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"x{ending}"
    file.write_bytes(b"")
    assert refused(file) == "E_EMPTY"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    for content, hint in ((pointer, "git lfs pull"), (b"<!DOCTYPE html><html></html>", "."), (b"hello", ".")):
        file.write_bytes(content)
        with pytest.raises(MFMError, match=hint) as error:
            check_image_file(file)
        assert error.value.code in ("E_FORMAT", "E_HEADER")
        assert str(file) in error.value.message
    for content in (os.urandom(700), b"\0" * 700):
        file.write_bytes(content)
        refused(file)


def test_wrong_and_unknown_endings(tmp_path: Path) -> None:
    save_nifti(tmp_path / "x.nii", volume()).rename(tmp_path / "x.nii.gz")
    assert refused(tmp_path / "x.nii.gz") == "E_FORMAT"
    save_nifti(tmp_path / "y.nii.gz", volume()).rename(tmp_path / "y.nii")
    assert refused(tmp_path / "y.nii") == "E_FORMAT"
    (tmp_path / "z.docx").write_bytes(b"PK")
    with pytest.raises(MFMError, match=r"\.nii\.gz .*\.nrrd"):
        check_image_file(tmp_path / "z.docx")
    (tmp_path / "t.nii.gz").write_bytes(gzip.compress(b"text " * 500))
    assert refused(tmp_path / "t.nii.gz") == "E_HEADER"


# --- NIfTI headers ------------------------------------------------------------------------------------------------

DAMAGE = [
    ("E_HEADER", {"dim": [0, 9, 8, 7, 1, 1, 1, 1]}),
    ("E_HEADER", {"dim": [3, 9, -8, 7, 1, 1, 1, 1]}),
    ("E_SHORT_DATA", {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}),
    ("E_SHORT_DATA", {"dim": [3, 9, 8, 8, 1, 1, 1, 1]}),
    ("E_HEADER", {"dim": [3, 9, 8, 6, 1, 1, 1, 1]}),
    ("E_DIM", {"dim": [1, 504, 1, 1, 1, 1, 1, 1]}),
    ("E_DIM", {"dim": [4, 9, 8, 1, 7, 1, 1, 1]}),
    ("E_DATATYPE", {"datatype": 128, "bitpix": 24}),
    ("E_DATATYPE", {"datatype": 32, "bitpix": 64}),
    ("E_DATATYPE", {"datatype": 12345}),
    ("E_HEADER", {"bitpix": 8}),
    ("E_HEADER", {"vox_offset": np.nan}),
    ("E_HEADER", {"vox_offset": 100}),
    ("E_SHORT_DATA", {"vox_offset": 1e9}),
    ("E_HEADER", {"magic": b"ni1"}),
    ("E_HEADER", {"sizeof_hdr": 349}),
    ("E_HEADER", {"scl_slope": np.inf}),
    ("E_HEADER", {"scl_slope": 2, "scl_inter": np.nan}),
    ("E_SPACING", {"pixdim": [1, 0, 1.5, 2, 0, 0, 0, 0]}),
    ("E_SPACING", {"pixdim": [1, np.nan, 1.5, 2, 0, 0, 0, 0]}),
    ("E_GEOMETRY", {"pixdim": [1, 1, 1, 1, 0, 0, 0, 0], "qform_code": 0}),
    ("E_GEOMETRY", {"pixdim": [1, 1, 1.5, 2.1, 0, 0, 0, 0], "qform_code": 1, "sform_code": 1}),
    ("E_GEOMETRY", {"srow_x": [np.nan, 0, 0, 0]}),
    ("E_GEOMETRY", {"srow_x": [1, 0, 0, np.inf]}),
    ("E_GEOMETRY", {"srow_x": [1, 0.04, 0, 0]}),
    ("E_GEOMETRY", {"quatern_b": 5, "qform_code": 1}),
]


@pytest.mark.parametrize(("code", "fields"), DAMAGE)
def test_damaged_nifti_header(tmp_path: Path, code: str, fields: dict[str, Any]) -> None:
    file = save_nifti(tmp_path / ("x.nii" if code == "E_SHORT_DATA" else "x.nii.gz"), volume(), **fields)
    assert refused(file) == code
    assert code_of(lambda: read_image([file], reader_for(file))) == code


ODDITIES: dict[str, Callable[[Path], Path]] = {
    "scl_slope 0": lambda p: save_nifti(p / "x.nii.gz", volume(), scl_slope=0),
    "scl_slope NaN": lambda p: save_nifti(p / "x.nii.gz", volume(), scl_slope=np.nan, scl_inter=np.nan),
    "scaled": lambda p: save_nifti(p / "x.nii.gz", volume(), scl_slope=2, scl_inter=-7),
    "codes 0/0": lambda p: save_nifti(p / "x.nii.gz", volume(), qform_code=0, sform_code=0),
    "qfac 0": lambda p: save_nifti(p / "x.nii.gz", volume(), pixdim=[0, 1, 1.5, 2, 0, 0, 0, 0]),
    "trailing axes of length 1": lambda p: save_nifti(p / "x.nii.gz", volume(shape=(*SHAPE, 1, 1))),
    "2D": lambda p: save_nifti(p / "x.nii.gz", volume(shape=(9, 8))),
    "one slice": lambda p: save_nifti(p / "x.nii.gz", volume(shape=(9, 8, 1))),
    "upper-case ending": lambda p: save_nifti(p / "x.nii.gz", volume()).rename(p / "x.NII.GZ"),
    "space, bracket, newline, dash": lambda p: save_nifti(p / "x.nii.gz", volume()).rename(p / "-a b<s>\n.nii.gz"),
    "umlaut": lambda p: save_nifti(p / "x.nii.gz", volume()).rename(p / "Schädel.nii.gz"),
    **{
        dtype: lambda p, d=dtype: save_nifti(p / ("x.nii" if d[0] == "u" else "x.nii.gz"), volume(d))
        for dtype in ("uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
    },
}


@pytest.mark.parametrize("name", ODDITIES)
def test_legitimate_oddities_pass(tmp_path: Path, name: str) -> None:
    require_as_stock(ODDITIES[name](tmp_path))


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_big_endian_and_nifti_2(tmp_path: Path, ending: str) -> None:
    array = volume("float32")
    big = tmp_path / f"big{ending}"
    nibabel.save(nibabel.Nifti1Image(array, affine(), nibabel.Nifti1Header(endianness=">")), big)
    assert nibabel.load(big).header.endianness == ">"
    require_as_stock(big)
    two = tmp_path / f"two{ending}"
    nibabel.save(nibabel.Nifti2Image(array, affine()), two)
    assert reader_for(two) == "NibabelIO"
    require_as_stock(two)
    image, properties = read_image([two], "SimpleITKIO")  # nibabel stands in
    np.testing.assert_array_equal(image, stock(two, "NibabelIO")[0])
    assert set(properties) == {"sitk_stuff", "spacing"}


def test_one_stem_with_two_endings(tmp_path: Path) -> None:
    """SimpleITK by itself reads the voxels of x.nii for x.nii.gz."""
    ones, twos = volume(), volume()
    files = [save_nifti(tmp_path / "x.nii", ones), save_nifti(tmp_path / "x.nii.gz", twos)]
    for file, array in zip(files, (ones, twos)):
        for reader in ("SimpleITKIO", "NibabelIO"):
            np.testing.assert_array_equal(read_image([file], reader)[0][0], array.T.astype(np.float32))


def test_header_extension_and_gzip_members(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(volume(), affine())
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"hello " * 50))
    raw = image.to_bytes()
    parts = [raw[:100], raw[100:101], raw[101:400], raw[400:]]
    file = tmp_path / "x.nii.gz"
    file.write_bytes(b"".join(gzip.compress(part) for part in parts) + b"\0" * 700)
    require_as_stock(file)
    file.write_bytes(gzip.compress(raw) + b"garbage")
    assert refused(file) == "E_GZIP_CRC"
    file.write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:])[:-3])
    assert refused(file) == "E_GZIP_TRUNCATED"


def test_a_gzip_bomb_is_stopped_at_the_size_that_the_header_promises(tmp_path: Path) -> None:
    file = save_nifti(tmp_path / "x.nii", volume())
    bomb = tmp_path / "bomb.nii.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as handle:
        handle.write(file.read_bytes())
        for _ in range(100):
            handle.write(b"\0" * (1 << 20))
    tracemalloc.start()
    try:
        assert refused(bomb) == "E_HEADER"
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# --- NRRD, MetaImage, GIPL ----------------------------------------------------------------------------------------


def save_itk(path: Path, array: np.ndarray, compress: bool = False, vector: bool = False) -> Path:
    image = sitk.GetImageFromArray(array, isVector=vector)
    image.SetSpacing([1.0, 1.5, 2.0, 1.0][: image.GetDimension()])
    sitk.WriteImage(image, str(path), compress)
    return path


VOLUMES = [("x.nrrd", False), ("x.nrrd", True), ("x.nhdr", False), ("x.nhdr", True), ("x.gipl", False)]
VOLUMES += [("x.mha", False), ("x.mha", True), ("x.mhd", False), ("x.mhd", True)]


@pytest.mark.parametrize(("name", "compress"), VOLUMES)
def test_other_volumes_pass_and_their_truncations_do_not(tmp_path: Path, name: str, compress: bool) -> None:
    array = volume("float32" if compress else "int16")
    file = save_itk(tmp_path / name, array, compress)
    require_as_stock(file)
    np.testing.assert_array_equal(read_image([file], "SimpleITKIO")[0][0], array.astype(np.float32))
    payload = next((other for other in tmp_path.iterdir() if other != file), file)
    data = payload.read_bytes()
    for length in (1, len(data) // 2, len(data) - 8, len(data) - 1):
        payload.write_bytes(data[:length])
        assert refused(file) in ("E_SHORT_DATA", "E_GZIP_TRUNCATED", "E_HEADER", "E_DATATYPE", "E_FORMAT"), length
    payload.write_bytes(data + b"xx")
    assert refused(file) in ("E_HEADER", "E_GZIP_CRC")
    if compress:
        for offset in np.random.default_rng(3).integers(len(data) // 2, len(data), 20):
            flipped = bytearray(data)
            flipped[offset] ^= 4
            payload.write_bytes(flipped)
            refused(file)
    if payload != file:
        payload.unlink()
        assert refused(file) == "E_NOT_FOUND"


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_other_volumes_with_wrong_content(tmp_path: Path, name: str) -> None:
    assert refused(save_itk(tmp_path / name, volume(shape=(*SHAPE, 3)), vector=True)) in ("E_DIM", "E_DATATYPE")
    assert refused(save_itk(tmp_path / name, volume(shape=(9, 8, 3)), vector=True)) == "E_DATATYPE"
    assert refused(save_itk(tmp_path / name, volume(shape=(3, *SHAPE)), vector=False)) in ("E_DIM", "E_DATATYPE")
    array = volume("float32")
    array[1, 2, 3] = np.nan
    assert refused(save_itk(tmp_path / name, array)) == "E_NONFINITE"


@pytest.mark.parametrize(
    ("name", "old", "new", "code"),
    [
        ("x.nrrd", b"sizes: 7 8 9", b"sizes: 7 8 99", "E_SHORT_DATA"),
        ("x.nrrd", b"sizes: 7 8 9", b"sizes: 7 x 9", "E_HEADER"),
        ("x.nrrd", b"sizes: 7 8 9", b"sizes: 7 72", "E_HEADER"),
        ("x.nrrd", b"dimension: 3\n", b"", "E_HEADER"),
        ("x.nrrd", b"encoding: raw", b"encoding: hex", "E_FORMAT"),
        ("x.nrrd", b"type: short", b"type: block", "E_DATATYPE"),
        ("x.nrrd", b"encoding: raw", b"encoding: raw\ndata file: LIST", "E_FORMAT"),
        ("x.mha", b"DimSize = 7 8 9", b"DimSize = 7 8 -9", "E_HEADER"),
        ("x.mha", b"NDims = 3", b"NDims = 2", "E_HEADER"),
        ("x.mha", b"MET_SHORT", b"MET_STRING", "E_DATATYPE"),
        ("x.mha", b"BinaryData = True", b"BinaryData = False", "E_FORMAT"),
        ("x.mha", b"LOCAL", b"slice%03d.raw 1 9 1", "E_FORMAT"),
        ("x.mha", b"LOCAL", b"../other.raw", "E_NOT_FOUND"),
        ("x.mha", b"ElementDataFile = LOCAL", b"ElementDataFile =", "E_HEADER"),
        ("x.mha", b"ElementDataFile = LOCAL", b"", "E_HEADER"),
    ],
)
def test_damaged_text_headers(tmp_path: Path, name: str, old: bytes, new: bytes, code: str) -> None:
    file = save_itk(tmp_path / name, volume())
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    assert refused(file) == code


def test_what_belongs_to_an_image(tmp_path: Path) -> None:
    for name, voxels in (("x.mhd", "x.raw"), ("y.nhdr", "y.raw")):
        file = save_itk(tmp_path / name, volume())
        assert files_of(file) == [file, tmp_path / voxels]
        (tmp_path / voxels).unlink()
        assert files_of(file) == [file]
    for name in ("z.mha", "z.nrrd"):
        assert files_of(save_itk(tmp_path / name, volume())) == [tmp_path / name]
    image, label, spacing = (tmp_path / name for name in ("case_0000.tif", "case.tif", "case.json"))
    assert files_of(image) == [image]
    spacing.write_text("{}")
    assert files_of(image) == [image, spacing]
    assert files_of(label, is_label=True) == [label, spacing]
    pipe = tmp_path / "pipe.mhd"
    os.mkfifo(pipe)
    for file in (pipe, tmp_path / "gone.nrrd", tmp_path / "scan.nii.gz"):
        assert files_of(file) == [file]


def test_data_files_with_skipped_bytes(tmp_path: Path) -> None:
    array = volume()
    for header_size, skipped in (("HeaderSize = 100\n", 100), ("HeaderSize = -1\n", 37)):
        file = save_itk(tmp_path / "x.mhd", array)
        raw = tmp_path / "x.raw"
        raw.write_bytes(b"h" * skipped + raw.read_bytes())
        file.write_text(file.read_text().replace("ElementDataFile", header_size + "ElementDataFile"))
        np.testing.assert_array_equal(read_image([file], "SimpleITKIO")[0][0], array)
    file = save_itk(tmp_path / "y.nhdr", array)
    raw = tmp_path / "y.raw"
    raw.write_bytes(b"h" * 10 + raw.read_bytes())
    file.write_text(file.read_text() + "byte skip: 10\n")
    np.testing.assert_array_equal(read_image([file], "SimpleITKIO")[0][0], array)


# --- pictures -----------------------------------------------------------------------------------------------------


def save_picture(path: Path, array: np.ndarray) -> Path:
    if path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, array, compression="zlib")
    else:
        Image.fromarray(array).save(path)
    return path


PICTURE = RNG.integers(0, 255, (40, 30), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "colour"), [("x.png", True), ("x.jpg", False), ("x.jpeg", True), ("x.bmp", False), ("x.tif", True)]
)
def test_pictures(tmp_path: Path, name: str, colour: bool) -> None:
    array = np.stack([PICTURE, PICTURE // 2, PICTURE // 3], -1) if colour else PICTURE
    file = save_picture(tmp_path / name, array)
    assert reader_for(file) == "NaturalImage2DIO"
    require_as_stock(file)
    image, properties = read_image([file], "NaturalImage2DIO")
    assert image.shape == (3 if colour else 1, 1, 40, 30)
    assert tuple(properties["spacing"]) == (999, 1, 1)
    data = file.read_bytes()
    for length in (1, len(data) // 2, len(data) - 8, len(data) - 1):
        file.write_bytes(data[:length])
        refused(file)


def test_tiff_stacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    array = volume("float32")
    file = save_picture(tmp_path / "case_0000.tif", array)
    assert reader_for(file) == "Tiff3DIO"
    image, properties = read_image([file], "Tiff3DIO")
    assert capsys.readouterr().out == ""
    assert sys.stdout is not None
    np.testing.assert_array_equal(image[0], array)
    assert tuple(properties["spacing"]) == (1, 1, 1)
    (tmp_path / "case.json").write_text('{"spacing": [2, 1, 1]}')
    assert tuple(read_image([file], "Tiff3DIO")[1]["spacing"]) == (2, 1, 1)
    array[0, 0, 0] = np.inf
    assert code_of(lambda: read_image([save_picture(file, array)], "Tiff3DIO")) == "E_NONFINITE"


# --- content and geometry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["os.stat", "mfm_nnunet.images.integrity._require_content"])
def test_a_file_that_may_not_be_read(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save_nifti(tmp_path / "x.nii.gz", volume())

    def deny(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(place, deny)
        assert refused(file) == "E_PERMISSION"


def test_values_that_cannot_be_normalised(tmp_path: Path) -> None:
    """Their squares are infinite, so every other voxel would become 0."""
    array = volume("float32")
    array[1, 2, 3] = 1e30
    assert code_of(lambda: read_image([save_nifti(tmp_path / "x.nii.gz", array)], "SimpleITKIO")) == "E_NONFINITE"
    array[1, 2, 3] = 1e10
    read_image([save_nifti(tmp_path / "x.nii.gz", array)], "SimpleITKIO")


def test_not_finite_voxels_are_counted(tmp_path: Path) -> None:
    array = volume("float32")
    array[0, 0, 0], array[3, 3, 3], array[4, 4, 4] = np.nan, np.inf, -np.inf
    for name in ("x.nii", "x.nii.gz"):
        # SimpleITK itself reads these voxels as 0.
        with pytest.raises(MFMError, match="3 voxels") as error:
            read_image([save_nifti(tmp_path / name, array)], "SimpleITKIO")
        assert error.value.code == "E_NONFINITE"
    big = volume("float64")
    big[0, 0, 0] = 1e300
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert code_of(lambda: read_image([save_nifti(tmp_path / "x.nii.gz", big)], "SimpleITKIO")) == "E_NONFINITE"


def test_not_finite_voxels_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = volume("float64")
    array[::2] = np.nan
    monkeypatch.setattr("mfm_nnunet.images.integrity.BLOCK", 101)
    for name in ("x.nii", "x.nii.gz"):
        with pytest.raises(MFMError, match=f"{np.isnan(array).sum()} voxels"):
            check_image_file(save_nifti(tmp_path / name, array))
        check_image_file(save_nifti(tmp_path / name, volume("float64")))


def test_constant_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zero = save_nifti(tmp_path / "zero.nii.gz", np.zeros(SHAPE, np.int16))
    good = save_nifti(tmp_path / "good.nii.gz", volume())
    assert code_of(lambda: read_image([zero], "SimpleITKIO")) == "E_CONSTANT"
    assert code_of(lambda: read_image([zero, zero], "SimpleITKIO")) == "E_CONSTANT"
    # A missing MR sequence filled with zeros is usual in multi-channel data.
    assert read_image([good, zero], "SimpleITKIO")[0].shape[0] == 2
    assert "channel 1" in caplog.text


def test_impossible_spacing(tmp_path: Path) -> None:
    for spacing in (1e-5, 1e25):
        file = save_nifti(tmp_path / "x.nii.gz", volume(), affine(1, 1, spacing))
        assert code_of(lambda f=file: read_image([f], "SimpleITKIO")) == "E_SPACING"
    metres = save_nifti(tmp_path / "x.nii.gz", volume(), xyzt_units=1)
    assert code_of(lambda: read_image([metres], "SimpleITKIO")) == "E_SPACING"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_spacing_of_an_axis_of_one_voxel_says_nothing(tmp_path: Path, axis: int) -> None:
    shape, spacing = list(SHAPE), [1.0, 1.0, 1.0]
    shape[axis] = 1
    for thickness in (1000.0, 1e-4):
        spacing[axis] = thickness
        file = save_nifti(tmp_path / "x.nii.gz", volume(shape=tuple(shape)), affine(*spacing))
        assert sorted(read_image([file], "SimpleITKIO")[0].shape[1:]) == sorted(shape)
    spacing[(axis + 1) % 3] = 1000.0
    file = save_nifti(tmp_path / "x.nii.gz", volume(shape=tuple(shape)), affine(*spacing))
    assert code_of(lambda: read_image([file], "SimpleITKIO")) == "E_SPACING"


def shifted(**changes: float) -> np.ndarray:
    matrix = affine()
    matrix[0, 3] += changes.get("origin", 0)
    angle = changes.get("angle", 0)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    scale = np.diag([1, 1, 1 + changes.get("spacing", 0), 1])
    return turn @ matrix @ scale


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("kind", ["origin", "angle", "spacing"])
def test_channels_and_labels_must_lie_in_one_place(tmp_path: Path, reader: str, kind: str) -> None:
    large, small = {"origin": (0.5, 0.01), "angle": (0.01, 2e-4), "spacing": (0.01, 1e-4)}[kind]
    first = save_nifti(tmp_path / "a.nii.gz", volume())
    image = read_image([first], reader)
    other = save_nifti(tmp_path / "b.nii.gz", volume("uint8") % 2, shifted(**{kind: large}))
    assert code_of(lambda: read_image([first, other], reader)) == "E_GEOMETRY"
    labels = {"labels": {"background": 0, "a": 1}}
    with pytest.raises(MFMError, match=r"E_LABEL_GEOMETRY .*tolerance"):
        check_label(*read_label(other, reader), *image, labels, "case")
    near = save_nifti(tmp_path / "c.nii.gz", volume("uint8") % 2, shifted(**{kind: small}))
    assert read_image([first, near], reader)[0].shape[0] == 2
    check_label(*read_label(near, reader), *image, labels, "case")


def test_several_channels_equal_nnunets_reading(tmp_path: Path) -> None:
    files = [save_nifti(tmp_path / f"{name}.nii.gz", volume()) for name in "abc"]
    image, properties = read_image(files, "SimpleITKIO")
    expected, expected_properties = recursive_find_reader_writer_by_name("SimpleITKIO")().read_images(
        [str(file) for file in files]
    )
    np.testing.assert_array_equal(image, expected)
    assert properties == expected_properties
    small = save_nifti(tmp_path / "d.nii.gz", volume(shape=(9, 8, 6)))
    assert code_of(lambda: read_image([files[0], small], "SimpleITKIO")) == "E_CHANNELS"


def test_reading_in_threads_equals_reading_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [save_nifti(tmp_path / f"{index}.nii.gz", volume()) for index in range(12)]
    files += [save_picture(tmp_path / f"{index}_0000.tif", volume("uint8")) for index in range(12)]
    read = lambda file: read_image([file], reader_for(file))[0]  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        for parallel, serial in zip(pool.map(read, files), map(read, files)):
            np.testing.assert_array_equal(parallel, serial)
    print("still here")
    assert capsys.readouterr().out == "still here\n"


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> tuple[np.ndarray, dict]:
    return read_image([save_nifti(tmp_path / "image.nii.gz", volume())], "SimpleITKIO")


def label_map(*values: float) -> np.ndarray:
    label = np.zeros(SHAPE, np.float32 if any(v != int(v) for v in values) else np.int32)
    label.flat[: len(values)] = values
    return label


@pytest.mark.parametrize(
    ("labels", "legal", "illegal"),
    [
        ({"background": 0, "a": 1, "b": 2}, [0, 1, 2], [3, -1, 2000000000]),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3]}, [0, 1, 2, 3], [4]),
        ({"background": 0, "a": 1, "ignore": 2}, [0, 2], [255]),
        ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, [1, 2, 3], [4]),
    ],
)
def test_label_values(
    tmp_path: Path, image: tuple[np.ndarray, dict], labels: dict, legal: list[int], illegal: list[int]
) -> None:
    file = save_nifti(tmp_path / "label.nii.gz", label_map(*legal))
    check_label(*read_label(file, "SimpleITKIO"), *image, {"labels": labels}, "case")
    file = save_nifti(tmp_path / "label.nii.gz", label_map(*legal, *illegal))
    with pytest.raises(MFMError, match=f"case: .*{sorted(illegal)[0]}.*dataset.json lists .*{legal[-1]}") as error:
        check_label(*read_label(file, "SimpleITKIO"), *image, {"labels": labels}, "case")
    assert error.value.code == "E_LABEL_VALUE"


def test_label_that_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(MFMError, match=r"E_LABEL_VALUE .*0\.9999"):
        read_label(save_nifti(tmp_path / "label.nii.gz", label_map(1, 0.9999)), "SimpleITKIO")
    colour = save_picture(tmp_path / "label.png", np.stack([PICTURE] * 3, -1))
    assert code_of(lambda: read_label(colour, "NaturalImage2DIO")) == "E_CHANNELS"


# --- choice of the reader -----------------------------------------------------------------------------------------


def examples(folder: Path) -> Iterator[tuple[str, Path]]:
    yield ".nii.gz", save_nifti(folder / "a.nii.gz", volume())
    yield ".nii", save_nifti(folder / "a.nii", volume())
    yield ".nrrd", save_itk(folder / "a.nrrd", volume())
    yield ".mha", save_itk(folder / "a.mha", volume())
    yield ".gipl", save_itk(folder / "a.gipl", volume())
    yield ".png", save_picture(folder / "a.png", PICTURE)
    yield ".bmp", save_picture(folder / "a.bmp", PICTURE)
    yield ".tif", save_picture(folder / "a.tif", PICTURE)
    yield ".tif", save_picture(folder / "b.tif", volume("uint8"))
    yield ".tiff", save_picture(folder / "b.tiff", volume("uint8"))


def test_the_reader_is_the_one_that_stock_nnunet_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for ending, file in examples(tmp_path):
        expected = determine_reader_writer_from_dataset_json({"file_ending": ending}, str(file), verbose=False)
        assert reader_for(file) == expected.__name__, file
    two = tmp_path / "two.nii.gz"
    nibabel.save(nibabel.Nifti2Image(volume(), affine()), two)
    expected = determine_reader_writer_from_dataset_json({"file_ending": ".nii.gz"}, str(two), verbose=False)
    assert reader_for(two) == expected.__name__


def test_dataset_json_overrules(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.nii.gz"
    assert reader_for(file, {"overwrite_image_reader_writer": "NibabelIOWithReorient"}) == "NibabelIOWithReorient"
    assert reader_for(file, {"overwrite_image_reader_writer": "None"}) == "SimpleITKIO"
    assert reader_for(file, {"overwrite_image_reader_writer": "Nonsense"}) == "SimpleITKIO"
    assert "Nonsense" in caplog.text
    assert code_of(lambda: reader_for(tmp_path / "x.txt")) == "E_FORMAT"
    assert code_of(lambda: reader_for(tmp_path / "x.tif")) == "E_NOT_FOUND"
    assert code_of(lambda: read_image([save_nifti(file, volume())], "Nonsense")) == "E_CONFIG"
