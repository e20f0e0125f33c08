"""Examine this computer and a workspace: what is installed, what there is, and what would fail, with a remedy."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from mfm_nnunet import workspace as places
from mfm_nnunet.device import available_memory, default_workers, pick_device
from mfm_nnunet.errors import MFMError
from mfm_nnunet.plan import Plan
from mfm_nnunet.terminal import Rows
from mfm_nnunet.version import __version__
from mfm_nnunet.workspace import Workspace, num_cores

LEAST_MEMORY, LEAST_SHARED, LEAST_DISK = 4e9, 1e9, 5e9
"""Bytes of main memory, shared memory and disk below which a common run fails."""
SHARED_MEMORY = Path("/dev/shm")
GPU_FILES = "/proc/driver/nvidia/version", "/dev/nvidia0"
"""Files of NVIDIA's driver."""


@dataclass(frozen=True)
class Finding:
    """A fact about a topic. With a remedy it is a problem."""

    topic: str
    value: str
    remedy: str = ""


def doctor(workspace: str | Path | None = None) -> list[Finding]:
    """Examine installation, device, memory, disk, and the workspace with its datasets, plans and runs.

    Nothing is written. Findings with a remedy are problems.
    """
    with places.use(workspace) as here:
        parts = (_check_versions(), _device(), _room(here), _workspace(here), _datasets(here), _runs(here))
        return Rows(finding for part in parts for finding in part)


def _check_versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("mfm_nnunet", __version__)
    extras: dict[str, list[str]] = {}
    for text in requires("mfm_nnunet") or ():
        requirement = Requirement(text)
        extra = re.search(r"extra == [\"'](\w+)[\"']", str(requirement.marker or ""))
        if extra is None and (requirement.marker is None or requirement.marker.evaluate()):
            yield _check_requirement(requirement)
        elif extra is not None and _check_requirement(requirement).remedy:
            extras.setdefault(extra[1], []).append(requirement.name)
        elif extra is not None:
            extras.setdefault(extra[1], [])
    for name, missing in extras.items():
        absent = f'without {", ".join(missing)}; pip install "mfm_nnunet[{name}]" adds what is missing'
        yield Finding(f"extra {name}", absent if missing else "installed")


def _check_requirement(requirement: Requirement) -> Finding:
    remedy = f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, "not installed", f"Install it: {remedy}")
    is_right = requirement.specifier.contains(found, prereleases=True)
    return Finding(
        requirement.name, found if is_right else f"{found}, needs {requirement.specifier}", "" if is_right else remedy
    )


def _device() -> Iterator[Finding]:
    import torch

    device = pick_device("auto")
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Finding(f"GPU {number}", f"{about.name}, {about.total_memory / 1e9:.1f} GB")
    elif any(os.path.exists(file) for file in GPU_FILES):
        remedy = "Install a build of torch for CUDA (pytorch.org), or correct CUDA_VISIBLE_DEVICES."
        yield Finding("GPU", f"the driver has one, torch {torch.__version__} does not see it", remedy)
    yield Finding("device", f"{device.type}; {num_cores()} CPU cores, {default_workers()} background readers")


def _room(here: Workspace) -> Iterator[Finding]:
    memory = available_memory()
    remedy = "Free or add memory; plan with a small --memory-gb, and preprocess with -np 1."
    yield Finding("memory", f"{memory / 1e9:.1f} GB", remedy if memory < LEAST_MEMORY else "")
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY).free
        remedy = "Start the container with --shm-size=16g or --ipc=host, or read with --set num_workers=0."
        yield Finding("/dev/shm", f"{shared / 1e9:.1f} GB free", remedy if shared < LEAST_SHARED else "")
    for folder in dict.fromkeys(_existing(root) for root in (here.preprocessed, here.results)):
        free = shutil.disk_usage(folder).free
        remedy = "Free some space, or choose another disk with --workspace." if free < LEAST_DISK else ""
        yield Finding("disk", f"{free / 1e9:.1f} GB free at {folder}", remedy)


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _workspace(here: Workspace) -> Iterator[Finding]:
    for name, root in zip(places.FOLDERS, (here.raw, here.preprocessed, here.results)):
        origin = "set in the environment" if name in here.variables else "in the workspace"
        is_writable = os.access(_existing(root), os.W_OK)
        remedy = (
            "" if is_writable else "It cannot be written: correct its owner or mode, or choose another --workspace."
        )
        if name in here.variables and not root.is_dir():
            remedy = f"{name} names no folder: make it, or unset the variable."
        yield Finding(name, f"{root} ({origin}{'' if root.is_dir() else '; not there yet'})", remedy)


def _datasets(here: Workspace) -> Iterator[Finding]:
    for name in here.dataset_names():
        has_raw, remedy = (here.raw / name).is_dir(), ""
        if has_raw and not (here.raw / name / "dataset.json").is_file():
            remedy = f"{here.raw / name}/dataset.json is missing: write one (documentation/getting_started.md)."
        plans = list(here.plans(name))
        kind = "corpus" if (here.raw / name / "corpus.json").is_file() else "dataset"
        yield Finding(
            kind, f"{name}, plans: {', '.join(plans) or 'none yet'}{'' if has_raw else ', without raw data'}", remedy
        )
        for plan in plans:
            if problem := _find_problem(here, name, plan):
                yield Finding("plan", f"{name}, {plan}", problem)


def _find_problem(here: Workspace, dataset_name: str, plan: str) -> str:
    """Return why a plan cannot be read; empty if it can."""
    try:
        Plan.read(here.plans_file(dataset_name, plan), "Plan it again.")
    except MFMError as error:
        return error.message
    return ""


def _runs(here: Workspace) -> Iterator[Finding]:
    found = (*here.results.glob("*/mfm_pretrain__*"), *here.results.glob("*/*__*__*/fold_*"))
    for folder in sorted(found):
        if (folder / "checkpoint_final.pth").is_file():
            state = "finished"
        elif any((folder / name).is_file() for name in ("resume.pth", "checkpoint_latest.pth")):
            state = "not finished; --c continues it"
        else:
            state = "nothing saved yet"
        yield Finding("run", f"{folder.relative_to(here.results)}: {state}")
