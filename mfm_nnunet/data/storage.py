"""Preprocessed cases on disk: nnU-Net's files, written atomically, and the manifest of finished cases.

A case is ``{name}.b2nd`` (C, D, H, W float32), ``{name}.pkl`` (properties) and, if labelled, ``{name}_seg.b2nd`` (1, D,
H, W int16), all in the folder of the plan's data identifier. Anything else lies beside that folder, because nnU-Net
accepts no other file endings inside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from mfm_nnunet.data.volumes import mask_file, open_array, read_properties
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import (
    append_line,
    atomic_write,
    inside,
    is_file_name,
    locked,
    open_to_append,
    read_lines,
    report_full_disk,
)

ENDINGS = (".pkl", "_seg.b2nd", ".b2nd")
"""Files of a case in the order in which they are moved into place; for nnU-Net the last marks the case as present."""
STAGING_PREFIX = ".partial_"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def staging(folder: Path, prefix: str = STAGING_PREFIX) -> Iterator[Path]:
    """Make a hidden folder for unfinished files inside ``folder``, and so on the same disk."""
    with report_full_disk(folder):
        stage = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        with locked(stage):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def remove_dead_stages(folder: Path, prefix: str = STAGING_PREFIX) -> None:
    """Remove the staging folders that killed processes left in ``folder``; those of living ones are locked."""
    for stage in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), locked(stage) as is_free:
            if is_free:
                shutil.rmtree(stage, ignore_errors=True)


@dataclass(frozen=True)
class Content:
    """Arrays and properties to store for a case; ``anonymised`` is a boolean mask (1, D, H, W)."""

    data_CDHW: np.ndarray
    seg_1DHW: np.ndarray | None
    properties: dict[str, Any]
    anonymised: np.ndarray | None = None


@dataclass
class Manifest:
    """Record of the finished cases of a data folder: one JSON line each, flushed to disk; the newest counts.

    ``entries`` maps a case to ``{"case", "hash", "sources", "files", "time"}``: hash of the settings, size and time of
    the source files, sizes of the written files, and when they were written, in ns. Commands that share the cases
    write a file each.
    """

    file: Path
    folder: Path
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, part: str = "") -> Manifest:
        """Read the manifests of the data folder ``folder``, ignoring truncated lines; ``part`` is the one to write."""
        manifest = cls(folder.with_name(f"{folder.name}.manifest{part}.jsonl"), folder)
        files = folder.parent.glob(f"{folder.name}.manifest*.jsonl")
        entries = [entry for file in sorted(files) for entry in read_lines(file) if _is_manifest_entry(entry)]
        entries.sort(key=lambda entry: entry.get("time", 0))
        manifest.entries.update({entry["case"]: entry for entry in entries})
        return manifest

    def holds(self, case: str, settings_hash: str, sources: list[list[Any]]) -> bool:
        """Return whether the case was finished from these sources with these settings and its files still exist."""
        entry = self.entries.get(case)
        if entry is None or entry.get("hash") != settings_hash or entry.get("sources") != sources:
            return False
        return bool(entry.get("files")) and entry["files"] == file_sizes(self.folder, case)

    def source_sizes(self, case: str, num_images: int) -> dict[str, list[int]]:
        """Return the source sizes of a finished case, in bytes: its ``images`` and its mask.

        Further files of an image (voxels of a detached header) are counted among the first ``num_images``.
        """
        sources = self.entries.get(case, {}).get("sources", [])
        images = [source[0] for source in sources if len(source) == 2][:num_images]
        return {"images": images, **{source[2]: [source[0]] for source in sources if len(source) == 3}}

    def add(self, case: str, settings_hash: str, sources: list[list[Any]]) -> None:
        """Record a finished case."""
        made = {"files": file_sizes(self.folder, case), "time": time.time_ns()}
        entry = {"case": case, "hash": settings_hash, "sources": sources, **made}
        with open_to_append(self.file) as file:
            append_line(file, entry)
        self.entries[case] = entry


def _is_manifest_entry(entry: Any) -> bool:
    """Return whether a line of a manifest is well formed; others are ignored."""
    if not isinstance(entry, dict) or not {"case", "hash", "sources", "files"} <= set(entry):
        return False
    sources, sizes = entry["sources"], entry["files"]
    is_text = is_file_name(entry["case"]) and isinstance(entry["hash"], str)
    has_sources = isinstance(sources, list) and all(
        isinstance(source, list) and len(source) in (2, 3) and all(type(size) is int for size in source[:2])
        and all(isinstance(kind, str) for kind in source[2:])
        for source in sources
    )  # fmt: skip
    is_text &= isinstance(entry.get("time", 0), int)
    return is_text and has_sources and isinstance(sizes, dict) and all(type(size) is int for size in sizes.values())


def case_files(folder: Path, case: str) -> dict[str, Path]:
    """Return all possible files of a case in the order in which they are written: the mask, then by ending."""
    own = {ending: inside(folder, f"{case}{ending}") for ending in ENDINGS}
    return {"anonymised": mask_file(folder, case), **own}


def file_sizes(folder: Path, case: str) -> dict[str, int]:
    """Return the size in bytes of each existing file of a case, by its key in :func:`case_files`."""
    return {key: file.stat().st_size for key, file in case_files(folder, case).items() if file.is_file()}


def stored_cases(folder: Path) -> set[str]:
    """Return the cases that nnU-Net finds in a data folder."""
    return {file.name[:-5] for file in folder.glob("*.b2nd") if not file.name.endswith("_seg.b2nd")}


def stale_cases(folder: Path, cases: Iterable[str], settings_hash: str) -> list[str]:
    """Return cases of a data folder made with other settings; stock nnU-Net does not record its settings."""
    entries = Manifest.read(folder).entries
    return sorted(case for case in cases if case in entries and entries[case].get("hash") != settings_hash)


def require_whole(folder: Path, cases: Collection[str] | None = None) -> None:
    """Raise MFMError (E_SHORT_DATA) if ``cases`` of a data folder (None: any) were damaged after writing.

    Only files whose size differs from the manifest are opened; folders of stock nnU-Net have no manifest. A missing
    mask counts as damage: otherwise anonymised voxels would be treated as image.
    """
    entries = Manifest.read(folder).entries
    damaged = []
    for case in sorted(stored_cases(folder) & set(entries) & set(entries if cases is None else cases)):
        expected, sizes = entries[case].get("files", {}), file_sizes(folder, case)
        suspects = [key for key, size in sizes.items() if size != expected.get(key)]
        files = case_files(folder, case)
        damaged += [files[key] for key in suspects if not _is_readable(files[key])]
        damaged += [files["anonymised"]] if "anonymised" in expected and "anonymised" not in sizes else []
    if damaged:
        raise MFMError(
            "E_SHORT_DATA",
            f"{damaged[0]}: the preprocessed file is damaged (one of {len(damaged)}). Run mfm_plan_and_preprocess "
            "again; it replaces only missing and damaged files.",
        )


def _is_readable(file: Path) -> bool:
    """Return whether a preprocessed file can be opened; a file that could run code is refused (E_DATA_UNSAFE)."""
    try:
        if file.suffix == ".pkl":
            read_properties(file)
        else:
            open_array(str(file))
    except MFMError as error:
        if error.code == "E_DATA_UNSAFE":
            raise
        return False
    return True


def store_case(stage: Path, folder: Path, case: str, content: Content, patch_size: tuple[int, ...]) -> None:
    """Write a case to ``stage`` and move it to ``folder``, where it appears atomically."""
    optional = {"_seg.b2nd": content.seg_1DHW, "anonymised": content.anonymised}
    kinds = {".pkl", ".b2nd", *(kind for kind, array in optional.items() if array is not None)}
    staged = {key: stage / f"{key.strip('.')}~{case}" for key in case_files(folder, case) if key in kinds}
    with atomic_write(staged[".pkl"]) as file:
        pickle.dump(content.properties, file)
    if content.seg_1DHW is not None:
        write_array(content.seg_1DHW.astype(np.int16, copy=False), patch_size, staged["_seg.b2nd"])
    if content.anonymised is not None:
        write_array(content.anonymised.astype(np.uint8), patch_size, staged["anonymised"])
    write_array(content.data_CDHW.astype(np.float32, copy=False), patch_size, staged[".b2nd"])
    with report_full_disk(folder):
        targets = case_files(folder, case)
        # Remove an outdated case first: new properties and masks must never lie beside old voxels.
        for target in reversed(targets.values()):
            target.unlink(missing_ok=True)
        for key, finished in staged.items():
            targets[key].parent.mkdir(exist_ok=True)
            os.replace(finished, targets[key])


def write_array(array: np.ndarray, patch_size: tuple[int, ...], file: Path) -> None:
    """Write a blosc2 file with the chunks, filter and codec of ``nnUNetDatasetBlosc2.save_case``."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    blocks, chunks = comp_blosc2_params(array.shape, patch_size, array.itemsize)
    codec, level = blosc2.Codec.LZ4HC, 5
    filters = [nnUNetDatasetBlosc2._select_filter(array, blocks, chunks, codec, level)]
    # One thread: workers run in parallel, and the bytes are reproducible.
    settings = {"codec": codec, "clevel": level, "filters": filters, "nthreads": 1}
    packed = blosc2.asarray(np.ascontiguousarray(array), chunks=chunks, blocks=blocks, cparams=settings)
    # Packed in memory and written here: blosc2's own writer does not distinguish a full disk from other errors.
    with atomic_write(file) as stream:
        stream.write(packed.to_cframe())


def copy_label(label: Path, target: Path, stage: Path) -> None:
    """Copy a label file to nnU-Net's ``gt_segmentations``, unless an identical copy exists."""
    status = label.stat()
    if target.is_file() and (target.stat().st_size, target.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns):
        return
    temporary = stage / f"label_{target.name}"
    with report_full_disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(label, temporary)
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(temporary, target)
