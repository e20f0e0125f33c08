"""Decode images in a child process: the input gate, then nnU-Net's reader, then a comparison of both.

:mod:`mfm_nnunet.images.decoder` starts the process and asks. Shapes: C channels, D H W voxels in the reader's axis
order (2D images have D = 1).
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import ending_of, is_unicode
from mfm_nnunet.images import bitmaps, integrity, nifti, tiff
from mfm_nnunet.images.decoder import IDLE_SECONDS, receive, send
from mfm_nnunet.images.geometry import geometry_of, properties_for, require_sane
from mfm_nnunet.images.integrity import Voxels, files_of, non_finite
from mfm_nnunet.plan_rules import READERS

PROCESSOR_SECONDS = 8
BYTES_PER_PROCESSOR_SECOND = 15_000_000
"""A file may take that many seconds, and one more for each that many bytes that reading it takes."""
BYTES_READ_BESIDE = 12 << 20
"""Larger files are read while they are checked; smaller ones afterwards, so that no reader gets what is damaged."""
SPARE_BYTES = 1 << 30
MEMORY_FACTOR = 3
"""Readers may take that many times the bytes that they are expected to take, and :data:`SPARE_BYTES` more."""
KEPT_BYTES = 1 << 28
"""So much memory for voxels is kept for the next file."""
LARGEST_VALUE = 1e20
"""Beyond it, and beyond what 64 bits count, squares are infinite in float32."""
VALUE_TOLERANCE = 1e-5
"""Relative difference between a stored value and the reader's that is rounding to float32."""
_ITK_READERS = {
    **dict.fromkeys((".nii", ".nii.gz"), "NiftiImageIO"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
    ".gipl": "GiplImageIO",
}


@dataclass(frozen=True)
class Decoded:
    """One image: ``array`` (C, D, H, W) float32, nnU-Net's properties, and the range of values of each channel."""

    array: np.ndarray
    properties: dict[str, Any]
    ranges: list[tuple[float, float]]
    contradiction: str
    """Description of a header that puts the image in two places; empty for any other."""


def decode_file(
    file: Path,
    reader_name: str,
    is_map: bool = False,
    work_folder: Path | None = None,
    memory: Memory | None = None,
) -> Decoded:
    """Check an image file, read it with nnU-Net's reader and compare what both found; C > 1 only for colour pictures.

    Label maps and masks (``is_map``) have a method of their own in the readers, which takes the spacing of a TIFF stack
    from a file named after the case. ``work_folder`` is for links, ``memory`` for the voxels.
    """
    declared = integrity.declared_by(file)
    _limit(declared.reading_bytes)
    wanted = reader_name
    if declared.start:
        reader_name = nifti.choose_nifti_reader(file, wanted, declared.start)
    read = functools.partial(_read_voxels, file, reader_name, is_map, work_folder, memory)
    if declared.reading_bytes < BYTES_READ_BESIDE:
        voxels = integrity.check_content(file, declared)
        array, properties = read()
    else:
        with ThreadPoolExecutor(1) as beside:
            reading = beside.submit(read)
            voxels = integrity.check_content(file, declared)  # where both fail, this names the better reason
        array, properties = reading.result()
    if array.ndim != 4 or (len(array) > 1 and reader_name != "NaturalImage2DIO"):
        raise MFMError(
            "E_DIM", f"{file}: holds several volumes (read as {array.shape}). Split it into one file per channel."
        )
    if array.size == 0:
        raise MFMError("E_HEADER", f"{file}: holds no voxel. Export it again.")
    if voxels is None:
        ranges = [(float(x_DHW.min()), float(x_DHW.max())) for x_DHW in array]
    else:
        with np.errstate(over="ignore"):
            ranges = [(float(np.float32(voxels.lowest)), float(np.float32(voxels.highest)))]
    # The minimum and the maximum are NaN or infinite as soon as one voxel is.
    if not np.all(np.isfinite(ranges)):
        raise non_finite(file, array.size - int(np.count_nonzero(np.isfinite(array))))
    if (largest := max(map(abs, sum(ranges, ())))) > LARGEST_VALUE:
        raise MFMError(
            "E_NONFINITE",
            f"{file}: holds values up to {largest:g}, whose squares are infinite in float32, so it cannot be "
            "normalised. Replace them, or export the image again.",
        )
    if voxels is not None:
        _require_same_voxels(file, reader_name, voxels, array)
    require_sane(file, array, geometry_of(properties))
    if reader_name != wanted:
        properties = properties_for(wanted, properties)
    return Decoded(array, properties, ranges, nifti.contradiction(declared.start))


def _read_voxels(
    file: Path, reader_name: str, is_map: bool, work_folder: Path | None, memory: Memory | None
) -> tuple[np.ndarray, dict[str, Any]]:
    reader = find_reader_class(reader_name)()
    try:
        # Float64 beyond the range of float32 becomes infinite, which is reported with the file's name.
        with (
            np.errstate(over="ignore"),
            _readable(file, reader_name, is_map, work_folder) as place,
            _lean(file, memory),
        ):
            return reader.read_seg(str(place)) if is_map else reader.read_images((str(place),))
    except MemoryError:
        raise
    except Exception as error:  # Readers raise whatever their libraries raise.
        raise _reader_failed(file, reader_name, error) from error


def name_reader(file: Path) -> str:
    """Return the name of nnU-Net's reader class for a TIFF file."""
    integrity.require_regular(file)
    _limit(0)
    return "NaturalImage2DIO" if tiff.is_2d(file) else "Tiff3DIO"


def find_channels(file: Path) -> int:
    """Return the number of channels that nnU-Net's reader makes of a picture, by its header."""
    _limit(0)
    declared = integrity.declared_by(file)
    return tiff.count_samples(file) if declared.ending in (".tif", ".tiff") else bitmaps.count_bands(file)


@functools.cache
def find_reader_class(name: str) -> Any:
    """Return nnU-Net's reader class of that name."""
    import SimpleITK as sitk
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    # ITK warns on stderr about headers that are refused or accepted here on purpose.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if name not in READERS:  # nnU-Net would take whatever its modules hold under that name
        raise MFMError("E_CONFIG", f"nnU-Net has no image reader '{name}'. {nearest(name, READERS)}")
    return recursive_find_reader_writer_by_name(name)


def _require_same_voxels(file: Path, reader_name: str, voxels: Voxels, array: np.ndarray) -> None:
    """Compare the reader's voxels with those that the gate found in the file.

    Readers that lose their place in a file return the neighbours' values, or whatever was in memory, without a word.
    """
    is_same = voxels.num_voxels == array.size
    if is_same and "Reorient" in reader_name:  # the same voxels in another order
        expected, found = np.array([voxels.lowest, voxels.highest]), np.array([array.min(), array.max()], float)
    elif is_same:
        values = array.reshape(-1)
        expected, found = voxels.samples, np.append(values[:: voxels.step], values[-1]).astype(float)
    if is_same:
        allowed = VALUE_TOLERANCE * np.maximum(np.abs(expected), voxels.rounded_from)
        is_same = bool(np.all(np.abs(expected - found) <= allowed))
    if not is_same:
        raise MFMError(
            "E_FORMAT",
            f"{file}: nnU-Net's {reader_name} decodes other voxels than the file holds, because its header is read "
            "differently there. Export it again.",
        )


def _limit(reading_bytes: int) -> None:
    """Limit the processor time and the memory that this process may use for a file that takes so much to read."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = PROCESSOR_SECONDS + reading_bytes // BYTES_PER_PROCESSOR_SECOND
    _set_limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + allowed)
    with contextlib.suppress(OSError):  # other systems than Linux do not say how large a process is
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _set_limit(resource.RLIMIT_AS, in_use + SPARE_BYTES + MEMORY_FACTOR * reading_bytes)


def _set_limit(kind: int, value: int) -> None:
    _, highest = resource.getrlimit(kind)
    value = value if highest == resource.RLIM_INFINITY else min(value, highest)
    with contextlib.suppress(OSError, ValueError, OverflowError):  # a limit that the system does not know
        resource.setrlimit(kind, (value, highest))


@contextlib.contextmanager
def _readable(file: Path, reader_name: str, is_map: bool, folder: Path | None) -> Iterator[Path]:
    """Yield ``file``, or a link to it where the reader would abort or read another file.

    For x.nii.gz SimpleITK takes the header from x.nii.gz and the voxels from x.nii, if there is one in the same folder.
    A name that is not UTF-8, as old archives have, ends the whole process.
    """
    is_beside = ending_of(file) == ".nii.gz" and reader_name.startswith("SimpleITK") and os.path.lexists(str(file)[:-3])
    if not is_beside and is_unicode(str(file)):
        yield file
        return
    with tempfile.TemporaryDirectory(dir=folder) as links:
        ending = ending_of(file)
        name = f"image{ending}" if is_map else f"image_0000{ending}"
        Path(links, name).symlink_to(file.absolute())
        for other in files_of(file, is_map)[1:]:
            is_spacing = other.suffix == ".json"
            relative = "image.json" if is_spacing else os.path.relpath(other, file.parent)
            if not is_unicode(relative) or relative.startswith(os.pardir):
                raise MFMError(
                    "E_FORMAT", f"{file}: names the data file {relative}, which its reader cannot open. Rename both."
                )
            Path(links, relative).parent.mkdir(parents=True, exist_ok=True)
            Path(links, relative).symlink_to(other.absolute())
        yield Path(links, name)


@contextlib.contextmanager
def _lean(file: Path, memory: Memory | None) -> Iterator[None]:
    """Replace three functions that nnU-Net's readers call, so that they do less for the same result.

    SimpleITK decodes with the reader of the file's own format, where it would try twenty, each on any content; its
    voxels are not copied before they become float32; and these are put into ``memory`` at once.
    """
    import SimpleITK as sitk

    read, copy, stack = sitk.ReadImage, sitk.GetArrayFromImage, np.vstack
    if name := _ITK_READERS.get(ending_of(file)):
        sitk.ReadImage, sitk.GetArrayFromImage = functools.partial(read, imageIO=name), sitk.GetArrayViewFromImage
    if memory is not None:
        np.vstack = functools.partial(_stack, memory, stack)
    try:
        yield
    finally:
        sitk.ReadImage, sitk.GetArrayFromImage, np.vstack = read, copy, stack


def _stack(memory: Memory, stack: Callable[..., np.ndarray], arrays: Sequence[np.ndarray], **words: Any) -> np.ndarray:
    """Do what ``np.vstack`` does, for a single image in ``memory``."""
    if len(arrays) != 1 or words != {"dtype": np.float32, "casting": "unsafe"}:
        return stack(arrays, **words)
    result = memory.empty_like(arrays[0])
    np.copyto(result, arrays[0], casting="unsafe")
    return result


def _reader_failed(file: Path, reader_name: str, error: Exception) -> MFMError:
    if isinstance(error, MFMError):
        return error
    reason = " ".join((str(error) or type(error).__name__).split())
    if "bad_alloc" in reason or "allocate memory" in reason.lower():
        raise MemoryError(reason) from error
    if "orthonormal" in reason:
        return MFMError("E_GEOMETRY", f"{file}: its axes are not perpendicular. Resample it onto a regular grid.")
    if "3d images" in reason.lower():
        return MFMError("E_DIM", f"{file}: {reader_name} reads images with exactly three axes. Save it as 3D.")
    return MFMError("E_FORMAT", f"{file}: nnU-Net's {reader_name} cannot read it ({reason[-200:]}). Export it again.")


_OF_HEADERS = {"name_reader": name_reader, "count_channels": find_channels}
"""Requests that decode nothing."""


def serve(descriptor: str, work_folder: str) -> None:
    """Answer requests until the parent is gone or asks nothing for a while."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"):  # the parent decides when a child ends
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_FSIZE, sys.maxsize)  # it also counts for memory that is shared
    with contextlib.suppress(OSError):  # if memory runs out, the system should end this process and not its parent
        Path("/proc/self/oom_score_adj").write_text("500")
    find_reader_class("SimpleITKIO")
    with socket.socket(fileno=int(descriptor)) as channel, contextlib.suppress(OSError, EOFError):
        channel.settimeout(IDLE_SECONDS)
        send(channel, {"ready": True})
        memory = Memory()
        while True:
            request, _ = receive(channel)
            _answer_request(channel, request, Path(work_folder), memory)
    shutil.rmtree(work_folder, ignore_errors=True)


def _answer_request(channel: socket.socket, request: dict[str, Any], work_folder: Path, memory: Memory) -> None:
    file = Path(request["file"])
    memory.release()
    try:
        if request["task"] in _OF_HEADERS:
            send(channel, {"answer": _OF_HEADERS[request["task"]](file)})
            return
        decoded = decode_file(file, request["reader"], request["is_map"], work_folder, memory)
        content = {
            **memory.describe(decoded.array),
            "properties": to_json(decoded.properties),
            "ranges": decoded.ranges,
            "contradiction": decoded.contradiction,
        }
        send(channel, content, memory.descriptor if memory.is_new else None)
        memory.is_new = False
    except MFMError as error:
        send(channel, {"error": [error.code, error.message]})
    except MemoryError:
        reason = "reading it needs more memory than its header promises, or than there is. Export it again, or crop it."
        send(channel, {"error": ["E_READER_MEMORY", f"{file}: {reason}"]})
    except ConnectionError:
        raise
    except Exception:
        send(channel, {"internal": traceback.format_exc()})


class Memory:
    """Memory without a name that another process maps too; nnU-Net's reader puts its voxels there at once.

    It is kept for the next file: to be given pages takes the system longer than to copy what is in them.
    """

    def __init__(self) -> None:
        self.descriptor: int | None = None
        self.is_new = False
        """True until the other process has it."""
        self._content: mmap.mmap | None = None
        self._array: np.ndarray | None = None

    def empty_like(self, array: np.ndarray) -> np.ndarray:
        """Return a float32 array of the same shape and order of axes in memory; earlier ones are overwritten.

        The order is kept, because sums over an array are rounded in the order of its memory.
        """
        order = _order_of(array)
        content = self._content
        if content is None or len(content) < 4 * array.size:
            content = self._replace(4 * array.size)
        flat = np.frombuffer(content, np.float32, array.size).reshape([array.shape[axis] for axis in order])
        self._array = flat.transpose(np.argsort(order))
        return self._array

    def describe(self, array: np.ndarray) -> dict[str, Any]:
        """Make sure that the memory holds ``array``; returns its shape and the order of its axes in memory."""
        if array is not self._array:
            self.empty_like(array)[...] = array
        return {"shape": array.shape, "order": _order_of(array)}

    def release(self) -> None:
        """Give back what is too large to be kept."""
        self._array = None
        if self._content is not None and len(self._content) > KEPT_BYTES:
            self._replace(KEPT_BYTES)

    def _replace(self, size: int) -> mmap.mmap:
        self._array = self._content = None
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = os.memfd_create("mfm_voxels") if hasattr(os, "memfd_create") else _unnamed_file()
        try:
            os.ftruncate(self.descriptor, size)
        except OSError as error:
            raise MFMError(
                "E_DISK_FULL",
                f"the limit on the size of files (ulimit -f) leaves no room for {size} bytes of voxels. Raise it.",
            ) from error
        self._content, self.is_new = mmap.mmap(self.descriptor, size), True
        return self._content


def _order_of(array: np.ndarray) -> list[int]:
    """Return the axes from the one with the largest steps in memory to that with the smallest; first those of one."""
    return sorted(range(array.ndim), key=lambda axis: (array.shape[axis] > 1, -abs(array.strides[axis])))


def _unnamed_file() -> int:  # for systems without memfd_create
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def to_json(value: Any) -> Any:
    """Return nnU-Net's properties as JSON values from which :func:`from_json` makes the same types again."""
    if isinstance(value, dict):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {kind: [value.dtype.str, list(value.shape), value.tobytes().hex()]}
    assert value is None or isinstance(value, (bool, int, float, str)), f"{type(value).__name__} is not plain"
    return value


def from_json(value: Any) -> Any:
    """Return what :func:`to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: from_json(item) for key, item in content.items()}
    if kind == "tuple":
        return tuple(from_json(item) for item in content)
    dtype, shape, data = content
    array = np.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()
    return array if kind == "array" else array[()]
