"""Pictures: what a header declares is there, of a kind that nnU-Net's readers return, in this file, and bounded."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from PIL import Image

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import bitmaps, tiff
from mfm_nnunet.images.integrity import check_image_file
from mfm_nnunet.images.reading import read_image

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 200, (9, 40, 30), dtype=np.uint8)
PICTURE = VOLUME[0]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def code_of(file: Path, action: Callable[[Path], Any] = check_image_file) -> str:
    with pytest.raises(MFMError) as error:
        action(file)
    assert str(file) in error.value.message
    return error.value.code


def stock(file: Path, reader: str) -> np.ndarray:
    return recursive_find_reader_writer_by_name(reader)().read_images((str(file),))[0]


# --- PNG ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(shape: tuple[int, int], depth: int, colour: int, rows: bytes, interlace: int = 0, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", shape[1], shape[0], depth, colour, 0, 0, interlace)
    chunks = [
        chunk(b"IHDR", header),
        more,
        *(chunk(b"IDAT", part) for part in (rows[:9], rows[9:])),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def rows_of(array: np.ndarray) -> bytes:
    """Rows with filter 0; values of more than a byte are big-endian."""
    big = array.astype(array.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in big)


KINDS = {
    "grey": (PICTURE, 8, 0),
    "grey, 16 bits": (PICTURE.astype(np.uint16) * 200, 16, 0),
    "colours": (PICTURE.reshape(40, 10, 3), 8, 2),
    "colours and alpha": (PICTURE[:, :28].reshape(40, 7, 4), 8, 6),
    "palette": (PICTURE, 8, 3),
}
PALETTE = chunk(b"PLTE", bytes(value for number in range(256) for value in (number, 0, 255 - number)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_png_file(tmp_path: Path, kind: str) -> None:
    array, depth, colour = KINDS[kind]
    file, rows = tmp_path / "x.png", rows_of(array)
    more = PALETTE if colour == 3 else b""

    def write(content: bytes) -> None:
        file.write_bytes(png(array.shape[:2], depth, colour, content, more=more))  # type: ignore[arg-type]

    write(zlib.compress(rows))
    check_image_file(file)
    read = stock(file, "NaturalImage2DIO")
    assert bitmaps.num_bytes(file) == read.size * depth // 8
    if colour != 3:
        np.testing.assert_array_equal(np.moveaxis(read[:, 0], 0, -1).reshape(array.shape), array)
    for length in (0, 1, len(rows) // 2, len(rows) - 1):
        write(zlib.compress(rows[:length]))
        assert code_of(file) == "E_SHORT_DATA", length
    write(zlib.compress(rows + b"\0"))
    assert code_of(file) == "E_HEADER"
    write(zlib.compress(rows)[:-4])  # without the checksum of the stream all rows are there
    check_image_file(file)
    write(b"no stream, but with the right checksum of its chunk")
    assert code_of(file) == "E_FORMAT"


@pytest.mark.parametrize("depth", [1, 4, 8])
@pytest.mark.parametrize("size", [(1, 9), (3, 2), (9, 17)])
def test_interlaced_png_files(tmp_path: Path, size: tuple[int, int], depth: int) -> None:
    """Pillow cannot write them, but it reads them: exactly the bytes that are counted, and not one less."""
    file = tmp_path / "x.png"
    for interlace in (0, 1):
        header = bitmaps._PngHeader(size[1], size[0], depth, 0, 0, 0, interlace)
        rows = bytes(header.num_stored)
        file.write_bytes(png(size, depth, 0, zlib.compress(rows), interlace))
        check_image_file(file)
        file.write_bytes(png(size, depth, 0, zlib.compress(rows[:-1]), interlace))
        assert code_of(file) == "E_SHORT_DATA"


def test_a_png_bomb_is_not_inflated(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(png((40, 30), 8, 0, zlib.compress(bytes(1 << 28), 9)))
    tracemalloc.start()
    try:
        assert code_of(file) == "E_HEADER"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    file.write_bytes(png((100_000, 100_000), 16, 0, zlib.compress(b"")))
    assert bitmaps.num_bytes(file) == 2 * 10**10


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        (png((40, 15), 8, 4, zlib.compress(rows_of(PICTURE))), "E_DATATYPE", "alpha"),
        (png((40, 5), 16, 2, zlib.compress(rows_of(PICTURE))), "E_DATATYPE", "8 bits"),
        (png((40, 30), 8, 0, zlib.compress(rows_of(PICTURE)), more=chunk(b"acTL", bytes(8))), "E_DIM", "animation"),
        (png((0, 30), 8, 0, zlib.compress(b"")), "E_FORMAT", "header"),
        (png((40, 30), 8, 5, zlib.compress(rows_of(PICTURE))), "E_FORMAT", "header"),
    ],
)
def test_kinds_of_png_that_nnunet_does_not_return(tmp_path: Path, content: bytes, code: str, word: str) -> None:
    file = tmp_path / "x.png"
    file.write_bytes(content)
    assert code_of(file) == code
    with pytest.raises(MFMError, match=word):
        check_image_file(file)


# --- JPEG and BMP ---------------------------------------------------------------------------------------------------

SMOOTH = np.clip(np.cumsum(RNG.normal(size=(200, 150)), 0) * 10 + 128, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("progressive", "colour"), [(False, True), (True, False)])
def test_rows_of_a_jpeg_file(tmp_path: Path, progressive: bool, colour: bool) -> None:
    file = tmp_path / "x.jpg"
    array = np.stack([SMOOTH, SMOOTH.T.reshape(SMOOTH.shape), SMOOTH // 2], -1) if colour else SMOOTH
    Image.fromarray(array).save(file, progressive=progressive, restart_marker_rows=0 if progressive else 4)
    check_image_file(file)
    assert bitmaps.num_bytes(file) == array.size
    content = file.read_bytes()
    for share in (0.1, 0.5, 0.7, 0.9, 0.99, 0.998):
        file.write_bytes(content[: int(len(content) * share)] + b"\xff\xd9")
        assert code_of(file) == "E_SHORT_DATA", share
    file.write_bytes(content + b"remarks of a camera")
    check_image_file(file)


@pytest.mark.parametrize("depth", [1, 8, 24])
def test_rows_of_a_bmp_file(tmp_path: Path, depth: int) -> None:
    file = tmp_path / "x.bmp"
    array = {1: SMOOTH > 100, 8: SMOOTH, 24: np.stack([SMOOTH] * 3, -1)}[depth]
    Image.fromarray(array).save(file)
    check_image_file(file)
    content = file.read_bytes()
    file.write_bytes(content + b"\0\0")  # as some programs end their files
    check_image_file(file)
    for height in (199, 100, 1):
        file.write_bytes(content[:22] + struct.pack("<i", height) + content[26:])
        assert code_of(file) == "E_HEADER"
    file.write_bytes(content[:22] + struct.pack("<i", 201) + content[26:])
    assert code_of(file) == "E_FORMAT"
    file.write_bytes(content[:22] + struct.pack("<i", -200) + content[26:])  # from top to bottom
    check_image_file(file)


# --- TIFF: what passes ----------------------------------------------------------------------------------------------


def written(**options: Any) -> Callable[[Path], Any]:
    array = options.pop("array", VOLUME)
    return lambda path: tifffile.imwrite(path, array, **options)


def with_pages(*arrays: np.ndarray, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tifffile.TiffWriter(path, **options) as writer:
            for array in arrays:
                writer.write(array, metadata=None)

    return write


def pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(VOLUME, subifds=1, metadata={"axes": "ZYX"})
        writer.write(VOLUME[:, ::2, ::2], subfiletype=1)


def thumbnail(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(PICTURE, metadata=None)
        writer.write(PICTURE[::4, ::4], subfiletype=1, metadata=None)


GOOD: dict[str, Callable[[Path], Any]] = {
    **{f"type {code}": written(array=VOLUME.astype(code)) for code in "hQed?"},
    **{name: written(compression=name) for name in ("zlib", "lzw", "packbits", "jpeg")},
    "predictor": written(array=VOLUME.astype("u2"), compression="zlib", predictor=True),
    "tiles": written(tile=(16, 16), compression="zlib"),
    "tiles of a volume": written(tile=(16, 16, 16), volumetric=True),
    "big and big-endian": written(array=VOLUME.astype("u2"), byteorder=">", bigtiff=True),
    "strips, compressed": written(rowsperstrip=7, compression="zlib"),
    "three slices": written(array=VOLUME[:3]),
    "without description": with_pages(*VOLUME),
    "ImageJ": written(imagej=True, metadata={"axes": "ZYX", "spacing": 2}),
    "one page": written(truncate=True),
    "OME": written(ome=True, metadata={"axes": "ZYX"}, compression="zlib"),
    "OME, pyramid": pyramid,
    "flat": written(array=PICTURE),
    "flat, thumbnail": thumbnail,
    "colours": written(array=np.stack([PICTURE] * 3, -1), photometric="rgb"),
    "colours and alpha": written(array=np.stack([PICTURE] * 4, -1), photometric="rgb"),
    "Pillow": lambda path: Image.fromarray(PICTURE).save(path, compression="tiff_lzw"),
    "Pillow, stack": lambda path: Image.fromarray(PICTURE).save(
        path, save_all=True, append_images=[Image.fromarray(array) for array in VOLUME[1:]]
    ),
    "ITK": lambda path: sitk.WriteImage(sitk.GetImageFromArray(VOLUME), str(path), True),
    "nnU-Net": lambda path: recursive_find_reader_writer_by_name("Tiff3DIO")().write_seg(
        VOLUME[:4], str(path), {"spacing": (1, 1, 1)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_tiff_files_that_pass(tmp_path: Path, name: str) -> None:
    file = tmp_path / "case_0000.tif"
    GOOD[name](file)
    check_image_file(file)
    expected = tifffile.imread(file)
    is_2d = tiff.is_2d(file)
    assert is_2d == (name in ("flat", "flat, thumbnail", "Pillow") or name.startswith("colours"))
    read = stock(file, "NaturalImage2DIO" if is_2d else "Tiff3DIO")
    assert read.size == expected.size
    declared = tiff.num_decoded_bytes(file)
    assert declared >= expected.nbytes
    assert declared <= expected.nbytes + file.stat().st_size


# --- TIFF: what does not --------------------------------------------------------------------------------------------


def tags_of(content: bytes, offset: int) -> dict[int, int]:
    """Where the value of each tag of a page in a little-endian TIFF file is."""
    (count,) = struct.unpack_from("<H", content, offset)
    places = (offset + 2 + 12 * number for number in range(count))
    return {struct.unpack_from("<H", content, place)[0]: place + 8 for place in places}


def edit(file: Path, page: int, tag: int, value: int) -> None:
    """Replace the value of a tag that takes four bytes or less; tag 0 is the place of the next page."""
    with tifffile.TiffFile(file) as handle:
        offset = handle.pages[page].offset
    content = bytearray(file.read_bytes())
    if tag == 0:
        (count,) = struct.unpack_from("<H", content, offset)
        struct.pack_into("<I", content, offset + 2 + 12 * count, value)
    else:
        struct.pack_into("<I", content, tags_of(content, offset)[tag], value)
    file.write_bytes(content)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    """Nine pages, each with a description of its own, in one strip."""
    file = tmp_path / "case_0000.tif"
    with_pages(*VOLUME)(file)
    check_image_file(file)
    return file


def test_pages_in_a_circle(stack: Path) -> None:
    edit(stack, 8, 0, tiff.read_pages(stack)[3].offset)
    for action in (tiff.is_2d, tiff.num_decoded_bytes, check_image_file):
        assert code_of(stack, action) == "E_FORMAT"


def test_pages_on_top_of_each_other(tmp_path: Path) -> None:
    """Each page begins two bytes after the one before and claims all the rest, so that reading them takes a square."""
    size = 400_000
    content = bytearray(b"\x01\x10" * (size // 2))  # 4097 and 4096 tags, and addresses in between
    content[:8] = b"II*\0" + struct.pack("<I", 8)
    for offset in range(8, size - 60_000, 8):
        struct.pack_into("<H", content, offset, 4096)
        if offset + 2 + 12 * 4096 + 4 < size:
            struct.pack_into("<I", content, offset + 2 + 12 * 4096, offset + 8)
    file = tmp_path / "x.tif"
    file.write_bytes(content)
    start = time.monotonic()
    assert code_of(file, tiff.num_decoded_bytes) in ("E_FORMAT", "E_HEADER", "E_SHORT_DATA")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("page", "tag", "value", "code"),
    [
        (4, 0, 1 << 30, "E_SHORT_DATA"),  # the next page is behind the end
        (4, 273, 1 << 30, "E_SHORT_DATA"),  # and so are the pixels
        (4, 273, 0, "E_SHORT_DATA"),  # tifffile reads zeros
        (4, 279, 600, "E_SHORT_DATA"),  # half of the rows
        (4, 278, 20, "E_SHORT_DATA"),  # two strips, one of them missing
        (4, 257, 20, "E_HEADER"),  # half the height: tifffile decodes it as it does the first
        (0, 277, 2, "E_DATATYPE"),
        (0, 257, 1 << 20, "E_SHORT_DATA"),
    ],
)
def test_damaged_pages(stack: Path, page: int, tag: int, value: int, code: str) -> None:
    edit(stack, page, tag, value)
    assert code_of(stack) == code


def appended(path: Path) -> None:
    """tifffile takes each slice for an image of its own, and reads the first."""
    for array in VOLUME[:4]:
        tifffile.imwrite(path, array, append=True)


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (written(array=VOLUME.astype(np.complex64)), "E_DATATYPE"),
        (written(array=np.stack([PICTURE] * 2, -1), photometric="minisblack", planarconfig="contig"), "E_DATATYPE"),
        (with_pages(*VOLUME[:4], *VOLUME[:2, :20]), "E_DIM"),
        (with_pages(VOLUME[0], VOLUME[1].astype(np.uint16), VOLUME[2]), "E_DIM"),
        (appended, "E_DIM"),
    ],
)
def test_kinds_of_tiff_that_are_no_volume(tmp_path: Path, write: Callable[[Path], Any], code: str) -> None:
    write(tmp_path / "x.tif")
    assert code_of(tmp_path / "x.tif") == code


def test_a_page_that_is_stored_in_another_way(tmp_path: Path) -> None:
    """tifffile decodes all pages of a described volume as the first one says."""
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, VOLUME, compression="zlib", ome=True, metadata={"axes": "ZYX"})
    check_image_file(file)
    edit(file, 4, 259, 32773)
    assert code_of(file) == "E_HEADER"


@pytest.mark.parametrize("options", [{}, {"tile": (64, 64)}])
def test_a_strip_of_jpeg_that_lacks_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, np.stack([SMOOTH] * 3), compression="jpeg", photometric="minisblack", **options)
    check_image_file(file)
    content = bytearray(file.read_bytes())
    with tifffile.TiffFile(file) as handle:
        page = handle.pages[1]
        start, length = page.dataoffsets[-1], page.databytecounts[-1]
    stream = content[start : start + length]
    content[start : start + length] = (stream[: length * 3 // 4] + b"\xff\xd9").ljust(length, b"\0")
    file.write_bytes(content)
    assert code_of(file) == "E_SHORT_DATA"


# --- OME and ImageJ -------------------------------------------------------------------------------------------------


def ome(path: Path, old: str, new: str, pages: np.ndarray = VOLUME) -> None:
    """An OME file whose description was edited."""
    plain = path.with_name("plain.ome.tif")
    tifffile.imwrite(plain, VOLUME, metadata={"axes": "ZYX"})
    with tifffile.TiffFile(plain) as file:
        description = file.ome_metadata or ""
    plain.unlink()
    assert old in description
    with tifffile.TiffWriter(path) as writer:
        for index, array in enumerate(pages):
            text = description.replace(old, new) if index == 0 else None
            writer.write(array, description=text, metadata=None)


TIFF_DATA = '<TiffData IFD="0" PlaneCount="9"/>'
ELSEWHERE = (
    '<TiffData IFD="0" PlaneCount="5"/><TiffData FirstZ="5" IFD="0" PlaneCount="4">'
    '<UUID FileName="{}">urn:uuid:0</UUID></TiffData>'
)


@pytest.mark.parametrize("other", ["other.tif", "/etc/hostname"])
def test_volumes_in_several_files(tmp_path: Path, other: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for place in (folder, tmp_path):
        tifffile.imwrite(place / "other.tif", VOLUME)
    file = folder / "x.ome.tif"
    ome(file, TIFF_DATA, ELSEWHERE.format(other))
    assert code_of(file) == "E_FORMAT"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('SizeZ="9"', 'SizeZ="12"'),
        (TIFF_DATA, '<TiffData IFD="0" PlaneCount="7"/>'),
        (TIFF_DATA, '<TiffData IFD="3" PlaneCount="9"/>'),
    ],
)
def test_ome_pages_that_are_missing(tmp_path: Path, old: str, new: str) -> None:
    file = tmp_path / "x.ome.tif"
    ome(file, old, new)
    assert code_of(file) == "E_SHORT_DATA"


def test_descriptions_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "x.tif"
    ome(file, "<Pixels", "<Pixel", VOLUME)
    assert code_of(file) == "E_FORMAT"
    ome(file, TIFF_DATA, TIFF_DATA, VOLUME[:5])
    assert code_of(file) == "E_SHORT_DATA"
    text = "ImageJ=1.53t\nimages=20\nslices=20\nloop=false\n"
    with tifffile.TiffWriter(file) as writer:
        for index, array in enumerate(VOLUME):
            writer.write(array, description=text if index == 0 else None, metadata=None)
    assert code_of(file) in ("E_FORMAT", "E_SHORT_DATA")
    tifffile.imwrite(file, VOLUME, truncate=True)
    content = file.read_bytes()
    file.write_bytes(content[:-500])
    assert code_of(file) == "E_SHORT_DATA"


@pytest.mark.parametrize(
    "spacing",
    ['["2", 1, 1]', "[null, 1, 1]", "[NaN, 1, 1]", "[0, 1, 1]", '"abc"', f"[{'1' * 400}, 1, 1]"],
)
def test_the_spacing_beside_a_stack_is_three_numbers(tmp_path: Path, spacing: str) -> None:
    file = tmp_path / "case_0000.tif"
    tifffile.imwrite(file, VOLUME)
    (tmp_path / "case.json").write_text(f'{{"spacing": {spacing}}}')
    assert code_of(file, lambda path: read_image([path], "Tiff3DIO")) == "E_SPACING"
    (tmp_path / "case.json").write_text('{"spacing": [3, 1.5, 1]}')
    assert tuple(read_image([file], "Tiff3DIO")[1]["spacing"]) == (3, 1.5, 1)
