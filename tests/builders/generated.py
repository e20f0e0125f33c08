"""Images of every format with random damage: the same seed makes the same files.

A damaged file is a good one whose bytes, header fields or compressed content were changed, cut, repeated or exchanged.
Most are broken in ways that nobody thought of; some stay good.
"""

from __future__ import annotations

import gzip
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from PIL import Image

SHAPE = (9, 11, 10)
NUMBERS = ("0", "-1", "1", "2", "3", "5", "255", "32767", "65536", "99999999999", "-5", "1e30", "nan", "inf", "x", "")
TOKENS = (*NUMBERS, "true", "false", "LOCAL", "LIST", "../x.raw", "/dev/zero", "MET_FLOAT", "MET_DOUBLE", "raw", "gzip")
Damage = Callable[[random.Random, bytes], bytes]


def good_files(folder: Path) -> list[Path]:
    """Write one good file of each kind; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    volume = (rng.normal(size=SHAPE) * 100).astype(np.int16)
    files = []

    def keep(name: str) -> Path:
        files.append(folder / name)
        return files[-1]

    for name, dtype in (("int16", np.int16), ("float32", np.float32), ("uint8", np.uint8), ("float64", np.float64)):
        for ending in (".nii", ".nii.gz"):
            nibabel.save(nibabel.Nifti1Image(volume.astype(dtype), np.diag([1, 1.5, 2, 1])), keep(name + ending))
    nibabel.save(nibabel.Nifti2Image(volume, np.eye(4)), keep("second.nii.gz"))
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4), header), keep("big.nii"))
    scaled = nibabel.Nifti1Image(volume, np.eye(4))
    scaled.header.set_slope_inter(0.5, 100)
    nibabel.save(scaled, keep("scaled.nii.gz"))
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing((1, 1.5, 2))
    for ending in (".nrrd", ".nhdr", ".mha", ".mhd"):
        for name, is_compressed in ((f"packed_{ending[1:]}", True), (f"plain_{ending[1:]}", False)):
            sitk.WriteImage(image, keep(f"{name}{ending}"), is_compressed)
    sitk.WriteImage(image, keep("volume.gipl"))
    grey = volume[0].clip(0, 255).astype(np.uint8)
    Image.fromarray(grey).save(keep("grey.png"))
    Image.fromarray(volume[0].astype(np.uint16)).save(keep("deep.png"))
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(keep("colour.png"))
    Image.fromarray(grey).save(keep("grey.bmp"))
    Image.fromarray(grey).save(keep("grey.jpg"))
    tifffile.imwrite(keep("picture.tif"), grey)
    tifffile.imwrite(keep("stack.tif"), volume)
    tifffile.imwrite(keep("packed.tif"), volume, compression="zlib", photometric="minisblack")
    tifffile.imwrite(keep("tiles.tif"), np.tile(grey, (4, 4)), tile=(16, 16), photometric="minisblack")
    tifffile.imwrite(keep("large.tif"), volume, bigtiff=True)
    tifffile.imwrite(keep("ome.ome.tif"), volume)
    return files


def damaged_files(folder: Path, number: int, seed: int) -> Iterator[tuple[Path, str]]:
    """Write ``number`` damaged files, one after the other; yields each with what was done to it."""
    originals = good_files(folder / "originals")
    for companion in set((folder / "originals").iterdir()) - set(originals):  # the voxels of detached headers
        shutil.copy(companion, folder)
    for index in range(number):
        rng = random.Random(f"{seed}/{index}")
        original = originals[index % len(originals)]
        ending = "".join(
            original.suffixes[-2:] if original.name.endswith((".nii.gz", ".ome.tif")) else original.suffixes
        )
        content, done = original.read_bytes(), []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            damage = rng.choice(damages_for(ending))
            content = damage(rng, content)
            done.append(damage.__name__.strip("_"))
        if rng.random() < 0.03:  # the name of another format
            ending = rng.choice((".nii", ".nii.gz", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".jpg", ".tif"))
            done.append(f"named {ending}")
        file = folder / f"f{index:05d}_0000{ending}"
        file.write_bytes(content)
        yield file, f"{original.name}: {', '.join(done)}"


def damages_for(ending: str) -> list[Damage]:
    """The kinds of damage that make sense for a format."""
    damages: list[Damage] = [_flip, _flip, _cut, _append, _zero, _overwrite_number]
    if ending == ".nii":
        damages += [_nifti_field] * 6
    if ending == ".nii.gz":
        damages += [_inside(_nifti_field)] * 5 + [_inside(_flip), _inside(_cut), _inside(_append)]
    if ending in (".nrrd", ".nhdr", ".mha", ".mhd"):
        damages += [_text_value] * 6
    if ending.endswith(".tif"):
        damages += [_tiff_word] * 6
    return damages


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        changed[rng.randrange(min(len(changed), rng.choice((64, 400, 1 << 30))))] = rng.randrange(256)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.choice((rng.randrange(len(content)), len(content) - rng.randint(1, 8)))] or b"\0"


def _append(rng: random.Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.choice((1, 4, 100))) + bytes(rng.choice((0, 16)))


def _zero(rng: random.Random, content: bytes) -> bytes:
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice((4, 64, 512)))
    return content[:start] + bytes(stop - start) + content[stop:]


def _overwrite_number(rng: random.Random, content: bytes) -> bytes:
    """Put an extreme 32-bit number somewhere into the first bytes, on a multiple of 2."""
    place = 2 * rng.randrange(max(min(len(content), 400) // 2 - 2, 1))
    value = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, rng.getrandbits(32)))
    return content[:place] + value.to_bytes(4, rng.choice(("little", "big"))) + content[place + 4 :]


def _nifti_field(rng: random.Random, content: bytes) -> bytes:
    """Give a field of the header a value at the edge of its type, or a random one."""
    table = nibabel.nifti1.header_dtype
    if len(content) < 352 or content[:4] != b"\x5c\x01\0\0":
        return _overwrite_number(rng, content)
    header = np.frombuffer(content[:348], table)[0].copy()
    name = rng.choice([name for name in table.names or () if table[name].kind in "iuf" or table[name].shape])
    field = np.atleast_1d(header[name]).copy()
    edge: list[float] = [0, 1, -1, 2, 3, 5, 16, 255]
    if field.dtype.kind == "f":
        edge += [np.nan, np.inf, 1e-30, 1e30, 0.5, -2.5, 352, 348, 400]
    else:
        limits = np.iinfo(field.dtype)
        edge += [limits.min, limits.max]
    with np.errstate(all="ignore"):
        value = np.float64(rng.choice(edge))
        integer = int(value) if np.isfinite(value) else 0
        in_range = field.dtype.kind == "f" or np.iinfo(field.dtype).min <= integer <= np.iinfo(field.dtype).max
        field[rng.randrange(field.size)] = (value if field.dtype.kind == "f" else integer) if in_range else 0
    header[name] = field if table[name].shape else field[0]
    return header.tobytes() + content[348:]


def _inside(damage: Damage) -> Damage:
    """The same damage inside a gzip stream whose checksums are right."""

    def inside(rng: random.Random, content: bytes) -> bytes:
        try:
            plain = gzip.decompress(content)
        except (OSError, EOFError, zlib.error):
            return damage(rng, content)
        return gzip.compress(damage(rng, plain), 1, mtime=0)

    inside.__name__ = f"{damage.__name__} inside"
    return inside


def _header_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a text header, and the rest of the file."""
    if content.startswith(b"NRRD"):
        end = re.search(rb"\n\r?\n", content)
        stop = end.end() if end else len(content)
    else:
        place = max(content.find(b"ElementDataFile"), 0)
        stop = content.find(b"\n", place) + 1 or len(content)
    return content[:stop].splitlines(keepends=True) or [b"\n"], content[stop:]


def _text_value(rng: random.Random, content: bytes) -> bytes:
    """Replace a value, or one number of it, in a text header."""
    lines, rest = _header_lines(content)
    index = rng.randrange(len(lines))
    key, separator, value = lines[index].partition(b"=" if b"=" in lines[index] else b":")
    words = value.split() or [b""]
    words[rng.randrange(len(words))] = rng.choice(TOKENS).encode()
    lines[index] = key + separator + b" " + b" ".join(words) + b"\n"
    return b"".join(lines) + rest


def _tiff_word(rng: random.Random, content: bytes) -> bytes:
    """Change a number in the directories of a TIFF file: a tag, a type, a count, an offset or a link to the next."""
    order = "big" if content[:2] == b"MM" else "little"
    is_large = content[2:3] == b"+" or content[3:4] == b"+"
    place = int.from_bytes(content[8:16] if is_large else content[4:8], order)
    if rng.random() < 0.3 or not 8 <= place < len(content) - 16:
        place = rng.choice((4, 8))
    else:
        place += 2 * rng.randrange(120)
    size = rng.choice((2, 4))
    value = rng.choice((0, 1, 2, 8, 16, len(content) - 4, 0xFFFF, 0xFFFFFFFF, 0x7FFFFFFF, rng.randrange(len(content))))
    return content[:place] + (value % (1 << 8 * size)).to_bytes(size, order) + content[place + size :]
