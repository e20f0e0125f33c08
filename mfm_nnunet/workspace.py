"""Locations of all data, and nnU-Net's environment variables during a call.

Without environment variables, everything is in one workspace folder. ``nnUNet_raw``, ``nnUNet_preprocessed`` and
``nnUNet_results`` take precedence if set. Only :func:`use` and :func:`use_only` write them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import inside, parse_json, require_unicode, whole_number

logger = logging.getLogger(__name__)

DEFAULT = "mfm_workspace"
DEFAULT_PLAN = "mfmPlans"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
"""Folders of a workspace, and the environment variables of nnU-Net that place them elsewhere."""
PLUGIN_FOLDER = Path(__file__).parent / "finetune" / "nnunet_plugin"


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders."""

    raw: Path
    preprocessed: Path
    results: Path
    root: Path | None = None
    """Workspace folder; it contains all folders that no environment variable sets."""
    variables: tuple[str, ...] = ()
    """Environment variables that set a folder, e.g. ``nnUNet_raw``."""

    def where_else(self, part: Literal["raw", "preprocessed", "results"]) -> str:
        """Return advice about something missing in a folder, which explains how that folder was chosen."""
        variable, folder = f"nnUNet_{part}", getattr(self, part)
        if variable in self.variables:
            state = "" if folder.is_dir() else ", which is no folder"
            return f"The environment variable {variable} is {folder}{state}; correct or unset it if that is not meant."
        if self.root is not None and not self.root.is_dir():
            return f"The workspace {self.root} is not there: give yours with --workspace."
        return "If it is in another workspace, give that with --workspace."

    def dataset_names(self) -> list[str]:
        """List the datasets and corpora that have a raw or a preprocessed folder here."""
        folders = [entry for root in (self.raw, self.preprocessed) if root.is_dir() for entry in root.iterdir()]
        return sorted({entry.name for entry in folders if entry.name.startswith("Dataset") and entry.is_dir()})

    def dataset_name(self, name_or_id: str | int) -> str:
        """Return ``DatasetXXX_Name`` for this name, its number or its last part (``Name``).

        Raises MFMError (E_NOT_FOUND) for an unknown one, with the nearest existing name.
        """
        names, wanted = self.dataset_names(), str(name_or_id)
        if wanted in names:
            return wanted
        number = whole_number(wanted)
        pattern = rf"Dataset\d+_{re.escape(wanted)}" if number is None else rf"Dataset0*{number}_.*"
        matches = [name for name in names if re.fullmatch(pattern, name)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise MFMError("E_CONFIG", f"dataset {wanted} is ambiguous: {', '.join(matches)}. Give the full name.")
        advice = nearest(wanted, names) if names else self.where_else("raw")
        raise MFMError("E_NOT_FOUND", f"there is no dataset {wanted} in {self.raw}. {advice}")

    def raw_folder(self, dataset_name: str) -> Path:
        """Return the folder of a dataset's images. Raises MFMError (E_NOT_FOUND) with the searched folder."""
        folder = self.raw / dataset_name
        if not folder.is_dir():
            raise MFMError("E_NOT_FOUND", f"{folder}: no such folder of raw data. {self.where_else('raw')}")
        return folder

    def plans_file(self, dataset_name: str, plans_name: str) -> Path:
        """Return the plans file. Raises MFMError (E_NOT_FOUND) with the nearest existing plan."""
        folder = self.preprocessed / dataset_name
        file = inside(folder, f"{plans_name}.json")
        if file.is_file():
            return file
        others = self.plans(dataset_name)
        raise MFMError(
            "E_NOT_FOUND",
            f"{dataset_name} has no plan '{plans_name}'. {nearest(plans_name, others)} "
            f"Make one with: mfm_plan_and_preprocess -d {dataset_name}",
        )

    def plans(self, dataset_name: str) -> dict[str, str | None]:
        """Return the plans of a dataset by name, each with the SHA-256 of the checkpoint that it was made to fit."""
        found: dict[str, str | None] = {}
        for file in sorted((self.preprocessed / dataset_name).glob("*.json")):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                content = parse_json(file.read_bytes())
                if "configurations" in content:
                    found[file.stem] = ((content.get("mfm") or {}).get("source") or {}).get("sha256")
        return found

    def choose_plan(
        self, dataset_name: str, given: str | None, checkpoint_sha256: Callable[[], str] | None = None
    ) -> str:
        """Return the plan to use: the given one, else the one like the checkpoint, else the only one, and log which.

        Of several, it is ``mfmPlans``. Raises MFMError (E_CONFIG) if that is not among them.
        """
        if given is not None:
            return given
        plans, like = self.plans(dataset_name), None
        if checkpoint_sha256 is not None and any(plans.values()):
            like = checkpoint_sha256()
        names, reason = [name for name, source in plans.items() if like and source == like], "made like the checkpoint"
        if not names:
            names, reason = list(plans), f"the only plan of {dataset_name}"
        return only_one(names, DEFAULT_PLAN, f"plan of {dataset_name}", reason, "-p")


def only_one(names: Sequence[str], default: str, what: str, reason: str, flag: str) -> str:
    """Return the only name, or of several (or none) the ``default``, and log which.

    Raises MFMError (E_CONFIG) if there are several without the default. ``what`` and ``flag`` are for the messages.
    """
    if len(names) > 1 and default not in names:
        raise MFMError("E_CONFIG", f"which {what}? There are {', '.join(names)}. Name one with {flag}.")
    if len(names) > 1:
        reason = f"the default; others are {', '.join(name for name in names if name != default)}, chosen with {flag}"
    name = names[0] if len(names) == 1 else default
    if names:
        logger.info("plan %s: %s", name, reason)
    return name


@contextlib.contextmanager
def use(workspace: str | os.PathLike[str] | None = None) -> Iterator[Workspace]:
    """Set nnU-Net's environment variables for the duration of a call, and yield the workspace.

    Raises MFMError (E_EXISTS) if the workspace is a file.
    """
    root = Path(workspace or DEFAULT).absolute()
    given = tuple(name for name in FOLDERS if os.environ.get(name))
    if len(given) < len(FOLDERS) and root.exists() and not root.is_dir():
        raise MFMError("E_EXISTS", f"--workspace {root}: this is a file. Give a folder.")
    values = {name: os.environ.get(name) or str(root / name) for name in FOLDERS}
    for name, path in values.items():
        require_unicode(path, name)
    plugins = [p for p in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if p and Path(p) != PLUGIN_FOLDER]
    values["nnUNet_extTrainer"] = os.pathsep.join([*plugins, str(PLUGIN_FOLDER)])
    values["nnUNet_def_n_proc"] = os.environ.get("nnUNet_def_n_proc") or str(num_cores())
    # Planning crashes with 0, and stock counts all cores of the machine, even those that this process may not use.
    values["nnUNet_n_proc_DA"] = os.environ.get("nnUNet_n_proc_DA") or str(num_cores())
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        raw, preprocessed, results = (Path(values[name]) for name in FOLDERS)
        yield Workspace(raw, preprocessed, results, root, given)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def use_only(root: str | os.PathLike[str]) -> Iterator[Workspace]:
    """Use ``root`` for everything, even if nnUNet_raw and the like are set."""
    before = {name: os.environ.pop(name) for name in FOLDERS if name in os.environ}
    try:
        with use(root) as here:
            yield here
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def results_in(here: Workspace, folder: Path) -> Iterator[Workspace]:
    """Let the models trained inside lie in ``folder``; yields the workspace with it."""
    before = os.environ["nnUNet_results"]
    os.environ["nnUNet_results"] = str(folder)
    try:
        yield replace(here, results=folder)
    finally:
        os.environ["nnUNet_results"] = before


def num_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
