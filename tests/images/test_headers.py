"""What MetaIO, teem and ITK replace or ignore in a text header is refused; what they read rightly passes."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images.integrity import check_image_file

VOXELS = np.random.default_rng(0).integers(-300, 300, (5, 6, 7)).astype("<i2")
RAW = VOXELS.tobytes()
BIG = VOXELS.astype(">i2").tobytes()
ZLIB = zlib.compress(RAW)
GZIP = gzip.compress(RAW)

META = b"""ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 1 2 3
CenterOfRotation = 0 0 0
AnatomicalOrientation = RAI
ElementSpacing = 1 1.5 2
DimSize = 7 6 5
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""
NRRD = b"""NRRD0004
# made by Slicer
type: short
dimension: 3
space: left-posterior-superior
sizes: 7 6 5
space directions: (1,0,0) (0,1.5,0) (0,0,2)
kinds: domain domain domain
endian: little
encoding: raw
space origin: (1,2,3)
measurement frame: (1,0,0) (0,1,0) (0,0,1)

"""
DIRECTIONS = b"space directions: (1,0,0) (0,1.5,0) (0,0,2)"
ORIGIN = b"space origin: (1,2,3)"


def edited(header: bytes, *pairs: tuple[bytes, bytes]) -> bytes:
    for old, new in pairs:
        assert old in header
        header = header.replace(old, new)
    return header


def zipped(size: bytes | int | None, more: bytes = b"") -> bytes:
    line = b"" if size is None else b"CompressedDataSize = %b\n" % (size if isinstance(size, bytes) else b"%d" % size)
    return edited(META, (b"CompressedData = False\n", b"CompressedData = True\n" + line + more))


def meta(old: bytes, new: bytes) -> bytes:
    return edited(META, (old, new))


def nrrd(old: bytes, new: bytes) -> bytes:
    return edited(NRRD, (old, new))


def spacings(text: bytes) -> bytes:
    lines = (b"space: left-posterior-superior\n", b""), (ORIGIN + b"\n", b""), (b"measurement frame", b"#")
    return edited(NRRD, *lines, (DIRECTIONS, text))


def code_of(file: Path, header: bytes, voxels: bytes) -> str:
    file.write_bytes(header + voxels)
    with pytest.raises(MFMError) as error:
        check_image_file(file)
    assert str(file) in error.value.message
    return error.value.code


def require_read(file: Path, spacing: tuple[float, ...] = (1, 1.5, 2)) -> None:
    """Through the gate, and by ITK as the file was meant."""
    check_image_file(file)
    image = sitk.ReadImage(str(file))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), VOXELS)
    assert image.GetSpacing() == pytest.approx(spacing)


TWICE = {
    "DimSize = 7 6 5": b"DimSize = 6 7 5\nDimSize = 7 6 5",
    "ElementSpacing = 1 1.5 2": b"ElementSpacing = 1 1.5 2\nElementSpacing: 3 3 3",
    "Offset = 1 2 3": b"Offset = 1 2 3\nPosition = 4 5 6",
    "BinaryDataByteOrderMSB = False": b"BinaryDataByteOrderMSB = False\nElementByteOrderMSB = True",
}


@pytest.mark.parametrize("line", TWICE)
def test_a_key_of_a_meta_image_given_twice(tmp_path: Path, line: str) -> None:
    assert code_of(tmp_path / "x.mha", meta(line.encode(), TWICE[line]), RAW) == "E_HEADER"


def test_a_field_of_an_nrrd_file_given_twice(tmp_path: Path) -> None:
    header = nrrd(b"sizes: 7 6 5", b"sizes: 7 6 5\nSizes: 6 7 5")
    assert code_of(tmp_path / "x.nrrd", header, RAW) == "E_HEADER"
    header = nrrd(b"encoding: raw", b"encoding: raw\nbyte skip: 0\nbyteskip: 2")
    assert code_of(tmp_path / "x.nrrd", header, RAW) == "E_HEADER"


DEFLATED = zlib.compressobj(wbits=-15)
DEFLATED = DEFLATED.compress(RAW) + DEFLATED.flush()
TWO_STREAMS = zlib.compress(RAW[:100]) + zlib.compress(RAW[100:])
TWO_MEMBERS = gzip.compress(RAW[:100]) + gzip.compress(RAW[100:])


@pytest.mark.parametrize(
    ("header", "voxels", "code"),
    [
        (zipped(None), ZLIB, "E_HEADER"),
        (zipped(0), ZLIB, "E_HEADER"),
        (zipped(len(ZLIB) - 1), ZLIB, "E_HEADER"),
        (zipped(len(ZLIB) + 1), ZLIB, "E_SHORT_DATA"),
        (zipped(b"1_0"), ZLIB, "E_HEADER"),
        (zipped(len(ZLIB)), ZLIB + b"xx", "E_HEADER"),
        (zipped(len(TWO_STREAMS)), TWO_STREAMS, "E_HEADER"),
        (zipped(len(TWO_MEMBERS)), TWO_MEMBERS, "E_HEADER"),
        (zipped(len(DEFLATED)), DEFLATED, "E_GZIP_CRC"),
        (zipped(len(ZLIB), b"HeaderSize = 3\n"), ZLIB, "E_HEADER"),
        (meta(b"ElementType", b"HeaderSize = 5\nElementType"), RAW, "E_HEADER"),
    ],
)
def test_voxels_that_meta_io_would_read_from_elsewhere(tmp_path: Path, header: bytes, voxels: bytes, code: str) -> None:
    assert code_of(tmp_path / "x.mha", header, voxels) == code


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b"Offset = 1 2 3", b"Offset = nan 0 0", "E_GEOMETRY"),
        (b"Offset = 1 2 3", b"Offset = 1e400 0 0", "E_GEOMETRY"),
        (b"Offset = 1 2 3", b"Offset = 1 2", "E_GEOMETRY"),
        (b"Offset = 1 2 3", b"Origin = x y z", "E_GEOMETRY"),
        (b"TransformMatrix = 1", b"Orientation = 1 0", "E_GEOMETRY"),
        (b"ElementSpacing = 1", b"ElementSpacing = -1", "E_SPACING"),
        (b"ElementSpacing = 1", b"ElementSpacing = 1_0", "E_SPACING"),
        (b"ElementSpacing = 1 1.5 2\n", b"", "E_SPACING"),
        (b"ElementSpacing = 1", b"ElementSize = -1", "E_SPACING"),
        (b"ElementType", b"DistanceUnits = um\nElementType", "E_SPACING"),
        (b"ElementType", b"ElementToIntensityFunctionSlope = 2\nElementType", "E_HEADER"),
        (b"ElementType", b"ElementToIntensityFunctionOffset = -1024\nElementType", "E_HEADER"),
        (b"DimSize = 7 6 5", b"DimSize = 7 6 5.0", "E_HEADER"),
        (b"BinaryData = True", b"BinaryData = maybe", "E_HEADER"),
    ],
)
def test_meta_image_fields_that_itk_replaces_or_ignores(tmp_path: Path, old: bytes, new: bytes, code: str) -> None:
    assert code_of(tmp_path / "x.mha", meta(old, new), RAW) == code


SWAPPED = b"BinaryDataByteOrderMSB = False"


@pytest.mark.parametrize(
    ("header", "voxels"),
    [
        (META, RAW),
        (zipped(len(ZLIB)), ZLIB),
        (zipped(len(GZIP)), GZIP),
        (edited(zipped(len(ZLIB)), (b"= True\nCompressedDataSize", b"= T\nCompressedDataSize")), ZLIB),
        (edited(META, (b" = ", b":")), RAW),
        (edited(META, (b"\n", b"\r\n")), RAW),
        (meta(b"ElementType", b"HeaderSize = -1\nElementType"), RAW),
        (
            meta(b"ElementType", b"Comment = a\x85DimSize = 9 9 9\n0008|0060 = CT\nModality = MET_MOD_CT\nElementType"),
            RAW,
        ),
        (meta(b"ElementType", b"Comment = one\nComment = two\nElementMin = 0\nElementMax = 9\nElementType"), RAW),
        (meta(b"ElementSpacing", b"ElementSize = 3 3 3\nElementSpacing"), RAW),
        (meta(b"Offset = 1 2 3", b"Offset = 1 2 3\nPosition = 1 2 3"), RAW),
        (meta(b"Offset = 1 2 3\n", b""), RAW),
        (meta(SWAPPED, b"BinaryDataByteOrderMSB = 1"), BIG),
        (meta(SWAPPED, b"BinaryDataByteOrderMSB = True\nElementByteOrderMSB = True"), BIG),
    ],
)
def test_meta_images_that_itk_reads_rightly(tmp_path: Path, header: bytes, voxels: bytes) -> None:
    file = tmp_path / "x.mha"
    file.write_bytes(header + voxels)
    require_read(file)


@pytest.mark.parametrize(("name", "compress"), [("x.mha", True), ("x.nrrd", False), ("x.mhd", False), ("x.nhdr", True)])
def test_what_itk_writes_with_tags_of_a_scanner(tmp_path: Path, name: str, compress: bool) -> None:
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((1, 1.5, 2))
    image.SetOrigin((-1e4, 1 / 3, 1e-7))
    image.SetDirection((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1))
    for key, value in {
        "0008|0060": "CT",
        "0010|0010": "A^B: c = d",
        "Comment": "text",
        "Modality": "MET_MOD_CT",
    }.items():
        image.SetMetaData(key, value)
    sitk.WriteImage(image, str(tmp_path / name), compress)
    require_read(tmp_path / name)
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / name)), str(tmp_path / name), compress)
    require_read(tmp_path / name)


@pytest.mark.parametrize(
    ("size", "skip", "voxels", "code"),
    [
        (b"", b"", ZLIB, ""),
        (b"CompressedDataSize = 0\n", b"", ZLIB, ""),
        (b"CompressedDataSize = %d\n" % len(ZLIB), b"HeaderSize = 3\n", b"abc" + ZLIB, ""),
        (b"", b"HeaderSize = 3\n", b"abc" + ZLIB, "E_HEADER"),
        (b"CompressedDataSize = %d\n" % len(ZLIB), b"HeaderSize = -1\n", ZLIB, "E_HEADER"),
        (b"CompressedDataSize = %d\n" % len(ZLIB), b"", ZLIB + b"xx", "E_HEADER"),
    ],
)
def test_compressed_voxels_beside_the_header(
    tmp_path: Path, size: bytes, skip: bytes, voxels: bytes, code: str
) -> None:
    header = edited(
        META, (b"CompressedData = False\n", b"CompressedData = True\n" + size + skip), (b"LOCAL", b"x.zraw")
    )
    (tmp_path / "x.zraw").write_bytes(voxels)
    (tmp_path / "x.mhd").write_bytes(header)
    if code:
        assert code_of(tmp_path / "x.mhd", header, b"") == code
    else:
        require_read(tmp_path / "x.mhd")


@pytest.mark.parametrize("name", ["Schädel.raw".encode(), b"Sch\xe4del.raw", b"two  words.raw"])
def test_names_of_data_files(tmp_path: Path, name: bytes) -> None:
    """A header holds the bytes of the name, in whatever encoding."""
    (tmp_path / os.fsdecode(name)).write_bytes(RAW)
    for file, header in (("x.mhd", meta(b"LOCAL", name)), ("x.nhdr", NRRD.rstrip() + b"\ndata file: " + name + b"\n")):
        (tmp_path / file).write_bytes(header)
        require_read(tmp_path / file)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (spacings(b"spacings: nan 1.5 2"), "E_SPACING"),
        (spacings(b"spacings: 1 1.5"), "E_SPACING"),
        (spacings(b"axis mins: 4 5 6"), "E_SPACING"),
        (spacings(b'units: "mm" "mm" "mm"'), "E_SPACING"),
        (spacings(b'spacings: 1 1.5 2\nunits: "um" "um" "um"'), "E_SPACING"),
        (nrrd(DIRECTIONS + b"\n", b""), "E_SPACING"),
        (nrrd(b"(0,0,2)", b"none"), "E_SPACING"),
        (nrrd(b"(0,0,2)", b"(0,0,0)"), "E_SPACING"),
        (nrrd(b"(0,0,2)", b"(0,0,nan)"), "E_GEOMETRY"),
        (nrrd(b" (0,0,2)", b""), "E_GEOMETRY"),
        (nrrd(ORIGIN, b"space origin: (nan,0,0)"), "E_GEOMETRY"),
        (nrrd(ORIGIN, b"space origin: 1 2 3"), "E_GEOMETRY"),
        (nrrd(ORIGIN, ORIGIN + b'\nspace units: "um" "um" "um"'), "E_SPACING"),
        (nrrd(b"encoding: raw", b"encoding: raw\nbyte skip: -5"), "E_HEADER"),
        (nrrd(b"encoding: raw", b"encoding: raw\nlineskip: 1"), "E_FORMAT"),
        (nrrd(b"sizes: 7 6 5", b"sizes: 7 6 0_5"), "E_HEADER"),
    ],
)
def test_nrrd_fields_that_teem_replaces_or_ignores(tmp_path: Path, header: bytes, code: str) -> None:
    assert code_of(tmp_path / "x.nrrd", header, RAW) == code


@pytest.mark.parametrize(
    ("header", "voxels"),
    [
        (NRRD, RAW),
        (edited(NRRD, (b"\n", b"\r\n")), RAW),
        (nrrd(b"encoding: raw", b"encoding: raw\nbyteskip: 4"), b"1234" + RAW),
        (nrrd(b"encoding: raw", b"encoding: gzip\nbyte skip: -1"), GZIP),
        (nrrd(b"encoding: raw", b"encoding: gzip"), TWO_MEMBERS),
        (nrrd(b"type: short", b"Type: SHORT"), RAW),
        (nrrd(b"endian: little", b"Endian: BIG"), BIG),
        (nrrd(ORIGIN, b"space origin: none"), RAW),
        (nrrd(ORIGIN + b"\n", b""), RAW),
        (nrrd(ORIGIN, ORIGIN + b'\nspace units: "mm" "mm" "mm"\nsizes:=1 1 1\nspacings:=nan'), RAW),
        (spacings(b"spacings: 1 1.5 2"), RAW),
        (spacings(b"spacings: 1 1.5 2\naxis mins: nan nan nan\nthicknesses: nan nan 3"), RAW),
    ],
)
def test_nrrd_files_that_teem_reads_rightly(tmp_path: Path, header: bytes, voxels: bytes) -> None:
    (tmp_path / "x.nrrd").write_bytes(header + voxels)
    require_read(tmp_path / "x.nrrd")


@pytest.mark.parametrize("size", [-1.0, 0.0, float("nan"), float("inf")])
def test_gipl_voxel_sizes(tmp_path: Path, size: float) -> None:
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((1, 1.5, 2))
    file = tmp_path / "x.gipl"
    sitk.WriteImage(image, str(file))
    require_read(file)
    content = bytearray(file.read_bytes())
    content[14:18] = struct.pack(">f", size)
    assert code_of(file, bytes(content), b"") == "E_SPACING"
