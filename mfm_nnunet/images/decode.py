"""Decode images in a child process: the input gate, nnU-Net's reader, and a comparison of both results.

:mod:`mfm_nnunet.images.decoder` starts it. Shapes: C channels, D H W voxels in the reader's axis order, D = 1 in 2D.
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

from mfm_nnunet.errors import MFMError, about, nearest
from mfm_nnunet.files import ending_of, is_unicode
from mfm_nnunet.images import bitmaps, dicom, integrity, nifti, tiff
from mfm_nnunet.images.decoder import IDLE_SECONDS, receive, send, to_json
from mfm_nnunet.images.geometry import geometry_of, properties_for, require_sane
from mfm_nnunet.images.integrity import READING_BYTES_PER_VOXEL, Voxels, files_of, non_finite, require_same_voxels
from mfm_nnunet.plan_rules import READERS

PROCESSOR_SECONDS = 8
BYTES_PER_PROCESSOR_SECOND = 15_000_000
"""The time limit per file is ``PROCESSOR_SECONDS`` plus one second per this many bytes to read."""
BYTES_READ_BESIDE = 12 << 20
"""Larger files are read while they are checked; smaller ones afterwards, so readers get no damaged file."""
SPARE_BYTES = 1 << 30
MEMORY_FACTOR = 3
"""The memory limit of a reader is this multiple of its expected bytes, plus :data:`SPARE_BYTES`."""
KEPT_BYTES = 1 << 28
"""Largest voxel memory that is kept for the next file."""
LARGEST_VALUE = 1e20
"""Squares of larger values would be infinite in float32."""
_ITK_READERS = {
    **dict.fromkeys((".nii", ".nii.gz"), "NiftiImageIO"),
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
    ".gipl": "GiplImageIO",
}
_FORMATS = {
    "SimpleITKIO": tuple(_ITK_READERS),
    "NibabelIO": (".nii", ".nii.gz"),
    "NaturalImage2DIO": (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff"),
    "Tiff3DIO": (".tif", ".tiff"),
}
"""Endings that a reader class of nnU-Net can read, also those that nnU-Net does not list."""


@dataclass(frozen=True)
class Decoded:
    """A decoded image: ``array`` (C, D, H, W) float32, nnU-Net's properties, and the value range of each channel."""

    array: np.ndarray
    properties: dict[str, Any]
    ranges: list[tuple[float, float]]
    contradiction: str
    """Description of contradictory positions in the header; "" if there are none."""


def decode_file(
    file: Path,
    reader_name: str,
    is_map: bool = False,
    work_folder: Path | None = None,
    memory: Memory | None = None,
) -> Decoded:
    """Check an image file, read it with nnU-Net's reader and compare the results. Only colour pictures have C > 1.

    Label maps and masks (``is_map``) use the reader's own method, which looks for the spacing of a TIFF stack under
    another file name. ``work_folder`` is for links, ``memory`` for the voxels.
    """
    declared = integrity.declared_by(file)
    _limit(declared.reading_bytes)
    wanted, reader_name = reader_name, _reader_of_format(file, declared.ending, reader_name)
    if declared.start:
        reader_name = nifti.choose_nifti_reader(file, reader_name, declared.start)
    read = functools.partial(_read_voxels, file, reader_name, is_map, work_folder, memory)
    if declared.reading_bytes < BYTES_READ_BESIDE:
        voxels = integrity.check_content(file, declared)
        array, properties = read()
    else:
        with ThreadPoolExecutor(1) as beside:
            reading = beside.submit(read)
            voxels = integrity.check_content(file, declared)  # if both fail, this error is the more helpful one
        array, properties = reading.result()
    if array.ndim != 4 or (len(array) > 1 and reader_name != "NaturalImage2DIO"):
        raise MFMError(
            "E_DIM", f"{file}: holds several volumes (read as {array.shape}). Split it into one file per channel."
        )
    if array.size == 0:
        raise MFMError("E_HEADER", f"{file}: there are no voxels in it. Export it again.")
    ranges = _find_ranges(file, array, voxels)
    if voxels is not None:
        require_same_voxels(file, reader_name, voxels, array)
    require_sane(file, array, geometry_of(properties))
    if reader_name != wanted:
        with about(file):
            properties = properties_for(wanted, properties, array.shape[1])
    return Decoded(array, properties, ranges, nifti.contradiction(declared.start))


def decode_series(name: Path, files: Sequence[str], reader_name: str) -> Decoded:
    """Read the files of a DICOM series (:mod:`mfm_nnunet.images.dicom`), for a plan with this reader."""
    _limit(sum(os.stat(file).st_size for file in files))
    with about(name):
        headers = dicom.read_headers(files)
        _limit(READING_BYTES_PER_VOXEL * dicom.count_voxels(headers))
        array, properties = dicom.read_volume(files, headers)
        ranges = _find_ranges(name, array, None)
        require_sane(name, array, geometry_of(properties))
        properties = properties_for(reader_name, properties, array.shape[1])
    return Decoded(array, properties, ranges, "")


def _find_ranges(file: Path, array: np.ndarray, voxels: Voxels | None) -> list[tuple[float, float]]:
    """Return the lowest and highest value of each channel; refuse values that are not finite (E_NONFINITE)."""
    if voxels is None:
        ranges = [(float(x_DHW.min()), float(x_DHW.max())) for x_DHW in array]
    else:
        with np.errstate(over="ignore"):
            ranges = [(float(np.float32(voxels.lowest)), float(np.float32(voxels.highest)))]
    # The minimum or the maximum is NaN or infinite as soon as one voxel is.
    if not np.all(np.isfinite(ranges)):
        raise non_finite(file, array.size - int(np.count_nonzero(np.isfinite(array))))
    if (largest := max(map(abs, sum(ranges, ())))) > LARGEST_VALUE:
        raise MFMError(
            "E_NONFINITE",
            f"{file}: it has values up to {largest:g}, whose squares are infinite in float32, so it cannot be "
            "normalised. Replace them, or export the image again.",
        )
    return ranges


def _reader_of_format(file: Path, ending: str, wanted: str) -> str:
    """Return ``wanted``, or nnU-Net's reader for the file's own format if ``wanted`` reads others only."""
    if ending in _FORMATS.get(wanted.removesuffix("WithReorient"), (ending,)):
        return wanted
    if ending in (".tif", ".tiff"):
        return "NaturalImage2DIO" if tiff.is_2d(file) else "Tiff3DIO"
    return "SimpleITKIO" if ending in _ITK_READERS else "NaturalImage2DIO"


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
    except Exception as error:  # Readers raise arbitrary errors of their libraries.
        raise _reader_failed(file, reader_name, error) from error


def name_reader(file: Path) -> str:
    """Return the name of nnU-Net's reader class for a TIFF file."""
    integrity.require_regular(file)
    _limit(0)
    return "NaturalImage2DIO" if tiff.is_2d(file) else "Tiff3DIO"


def find_channels(file: Path) -> int:
    """Return the number of channels that nnU-Net's reader will return for a picture, from its header."""
    _limit(0)
    declared = integrity.declared_by(file)
    return tiff.count_samples(file) if declared.ending in (".tif", ".tiff") else bitmaps.count_bands(file)


@functools.cache
def find_reader_class(name: str) -> Any:
    """Return nnU-Net's reader class of this name."""
    import SimpleITK as sitk
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    # ITK warns on stderr about headers that are deliberately refused or accepted here.
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if name not in READERS:  # nnU-Net would accept any object of that name in its modules
        raise MFMError("E_CONFIG", f"nnU-Net has no image reader '{name}'. {nearest(name, READERS)}")
    return recursive_find_reader_writer_by_name(name)


def _limit(reading_bytes: int) -> None:
    """Limit the processor time and memory of this process to what reading ``reading_bytes`` may need."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = PROCESSOR_SECONDS + reading_bytes // BYTES_PER_PROCESSOR_SECOND
    _set_limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + allowed)
    with contextlib.suppress(OSError):  # only Linux reports the size of a process here
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _set_limit(resource.RLIMIT_AS, in_use + SPARE_BYTES + MEMORY_FACTOR * reading_bytes)


def _set_limit(kind: int, value: int) -> None:
    _, highest = resource.getrlimit(kind)
    value = value if highest == resource.RLIM_INFINITY else min(value, highest)
    with contextlib.suppress(OSError, ValueError, OverflowError):  # not supported by this system
        resource.setrlimit(kind, (value, highest))


@contextlib.contextmanager
def _readable(file: Path, reader_name: str, is_map: bool, folder: Path | None) -> Iterator[Path]:
    """Yield ``file``, or a link to it if the reader would abort or read another file.

    For x.nii.gz SimpleITK takes the header from x.nii.gz but the voxels from x.nii, if both exist in one folder. A name
    that is not UTF-8, as in old archives, aborts the whole process.
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
    """Replace three functions used by nnU-Net's readers by faster ones with the same result.

    SimpleITK uses the reader of the file's own format instead of trying twenty; its voxels are not copied before the
    conversion to float32; the results are written directly into ``memory``.
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
"""Requests that need only the header of a file."""


def serve(descriptor: str, work_folder: str) -> None:
    """Answer requests until the parent exits or is idle for too long."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1"):  # the parent decides when a child ends
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_FSIZE, sys.maxsize)  # this limit also applies to shared memory
    with contextlib.suppress(OSError):  # if memory runs out, the system should kill this process, not its parent
        Path("/proc/self/oom_score_adj").write_text("500")
    find_reader_class("SimpleITKIO")
    channel = socket.socket(fileno=int(descriptor))
    with contextlib.suppress(OSError, EOFError):
        channel.settimeout(IDLE_SECONDS)
        send(channel, {"ready": True})
        memory = Memory()
        while True:
            request, _ = receive(channel)
            _answer_request(channel, request, Path(work_folder), memory)
    shutil.rmtree(work_folder, ignore_errors=True)
    # A Python exit is slow on a busy machine: the parent would see the channel end first, as if this had been killed.
    os._exit(0)


def _answer_request(channel: socket.socket, request: dict[str, Any], work_folder: Path, memory: Memory) -> None:
    file = Path(request["file"])
    memory.release()
    try:
        if request["task"] in _OF_HEADERS:
            send(channel, {"answer": _OF_HEADERS[request["task"]](file)})
            return
        if request["task"] == "read_headers":
            send(channel, {"answer": dicom.try_headers(request["files"])})
            return
        if request["task"] == "decode_series":
            decoded = decode_series(file, request["files"], request["reader"])
        else:
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
        reason = "reading it needs more memory than its header suggests or than is free. Export it again, or crop it."
        send(channel, {"error": ["E_READER_MEMORY", f"{file}: {reason}"]})
    except ConnectionError:
        raise
    except Exception:
        send(channel, {"internal": traceback.format_exc()})


class Memory:
    """Anonymous memory shared with the parent process, into which nnU-Net's reader writes its voxels directly.

    It is reused for the next file: getting new pages from the system takes longer than copying their content.
    """

    def __init__(self) -> None:
        self.descriptor: int | None = None
        self.is_new = False
        """True until the parent process has mapped it."""
        self._content: mmap.mmap | None = None
        self._array: np.ndarray | None = None

    def empty_like(self, array: np.ndarray) -> np.ndarray:
        """Return a float32 array of the same shape and memory order in this memory; overwrites earlier ones.

        The order is kept, because it determines the rounding of sums over the array.
        """
        order = _order_of(array)
        content = self._content
        if content is None or len(content) < 4 * array.size:
            content = self._replace(4 * array.size)
        flat = np.frombuffer(content, np.float32, array.size).reshape([array.shape[axis] for axis in order])
        self._array = flat.transpose(np.argsort(order))
        return self._array

    def describe(self, array: np.ndarray) -> dict[str, Any]:
        """Make sure that the memory holds ``array``; return its shape and the order of its axes in memory."""
        if array is not self._array:
            self.empty_like(array)[...] = array
        return {"shape": array.shape, "order": _order_of(array)}

    def release(self) -> None:
        """Free memory beyond :data:`KEPT_BYTES`."""
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
    """Return the axes sorted by decreasing stride; axes of length 1 come first."""
    return sorted(range(array.ndim), key=lambda axis: (array.shape[axis] > 1, -abs(array.strides[axis])))


def _unnamed_file() -> int:  # for systems without memfd_create
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
