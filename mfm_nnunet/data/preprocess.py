"""From files to what training reads: cropped, normalised, resampled volumes in nnU-Net's own file formats.

The arrays equal those of nnU-Net (:mod:`mfm_nnunet.data.preprocess_case`); the loop around them differs. Labels are
optional. One bad case costs no other. Each case appears whole and is then noted in a manifest, so a killed run goes on
where it was and a changed source is done again. Nothing that another plan uses is deleted.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfm_nnunet.data import storage
from mfm_nnunet.data.cases import check_case_name
from mfm_nnunet.data.loops import in_processes, in_threads, source_signature, unchanged, with_progress
from mfm_nnunet.data.masks import mask_signature, read_masks
from mfm_nnunet.data.preprocess_case import preprocess_case_npy, preprocess_mask
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, MFMError, about, nearest
from mfm_nnunet.files import inside, to_plain
from mfm_nnunet.images import reading
from mfm_nnunet.plan import Plan, preprocessor_problem

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

    from mfm_nnunet.data.corpus import Case

__all__ = ["PreprocessReport", "preprocess_case_npy", "preprocess_dataset", "preprocessing_hash"]

POOL_MIN_BYTES = 20_000_000
"""Source files below this size in all are done in this process: a started worker costs seconds of imports."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessReport:
    """Names of the cases done now and of those reused from an earlier run, and the cases that failed."""

    done: list[str]
    reused: list[str]
    failures: list[CaseFailure]


def preprocess_dataset(
    cases: Sequence[Case],
    plans: dict[str, Any],
    configuration: str,
    dataset_json: dict[str, Any],
    preprocessed_folder: Path,
    num_processes: int = 1,
) -> PreprocessReport:
    """Preprocess ``cases`` into ``preprocessed_folder/<data_identifier>/`` and say what was done, reused and refused.

    A case is reused when the manifest beside that folder shows it finished from the same sources with the same
    settings. Labels are copied to ``gt_segmentations/``; masks go beside the folder (:mod:`mfm_nnunet.data.masks`).
    Raises MFMError: E_CONFIG (unknown configuration, a foreign preprocessor), E_DISK_FULL (finished cases are kept; run
    again to go on).
    """
    if configuration not in plans["configurations"]:
        raise MFMError(
            "E_CONFIG",
            f"the plan has no configuration '{configuration}'. {nearest(configuration, plans['configurations'])}",
        )
    if problem := preprocessor_problem(plans, configuration):
        raise MFMError("E_CONFIG", f"{problem} Preprocess with the program that the plan is from, or plan here.")
    settings_hash = preprocessing_hash(plans, configuration, dataset_json)
    folder = inside(Path(preprocessed_folder), Plan.of(plans).configuration(configuration).data_identifier)
    with storage.full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    manifest = storage.Manifest.read(folder)
    reused = [case for case in cases if _is_finished(case, manifest, settings_hash)]
    names = {case.name for case in reused}
    todo = [case for case in cases if case.name not in names]
    _warn_of_others(folder, cases, manifest, settings_hash)
    failures: dict[str, CaseFailure] = {}
    with storage.staging_folder(folder.parent) as staging:
        job = Job(json.dumps(to_plain(plans)), configuration, json.dumps(to_plain(dataset_json)), folder, staging)
        for case in reused:
            job.copy_label(case)
        in_pool = _pool_pays(todo, num_processes)
        outcomes = in_processes(job, todo, num_processes) if in_pool else in_threads(job, todo, 1)
        # Closed before the staging folder goes: on an error workers are still writing there.
        with with_progress(outcomes, len(todo), f"preprocessing {configuration}") as counted:
            for case, outcome in counted:
                if isinstance(outcome, CaseFailure):
                    failures[case.name] = outcome
                else:
                    manifest.add(case.name, settings_hash, outcome)
    return PreprocessReport(
        done=[case.name for case in todo if case.name not in failures],
        reused=[case.name for case in reused],
        failures=[failures[case.name] for case in todo if case.name in failures],
    )


def preprocessing_hash(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> str:
    """sha256 over everything that the preprocessed arrays and properties depend on, apart from the files."""
    return Plan.of(plans).preprocessing_digest(configuration, DatasetJson.of(dataset_json))


@dataclass(frozen=True)
class Job:
    """What a worker needs to do a case; plan and dataset.json travel as text, so each worker parses them once."""

    plans: str
    configuration: str
    dataset_json: str
    folder: Path
    staging: Path

    def __call__(self, case: Case) -> list[list[Any]]:
        """Read, preprocess and store one case; returns the signature of its source files. Raises MFMError."""
        check_case_name(case.name)
        with unchanged(case, _signature) as signature:
            content, patch_size = self._prepared(case)
        self.copy_label(case)
        storage.write_case(self.staging, self.folder, case.name, content, patch_size)
        return signature

    def _prepared(self, case: Case) -> tuple[storage.Content, tuple[int, ...]]:
        """Read and preprocess one case; returns it with the patch that it is stored for."""
        plans_manager, configuration_manager = _managers(self.plans, self.configuration)
        dataset_json, reader = json.loads(self.dataset_json), plans_manager.plans["image_reader_writer"]
        image_CDHW, properties = reading.read_image(case.images, reader)
        label = None
        if case.label is not None:
            label, label_properties = reading.read_label(case.label, reader)
            reading.check_label(label, label_properties, image_CDHW, properties, dataset_json, case.name)
        masks = read_masks(case, reader, image_CDHW, properties)
        with about(case.images[0]):
            data_CDHW, seg, properties = preprocess_case_npy(
                image_CDHW, properties, label, plans_manager, configuration_manager, dataset_json
            )
            masks = {
                kind: preprocess_mask(mask_1DHW, properties, data_CDHW.shape[1:], plans_manager, configuration_manager)
                for kind, mask_1DHW in masks.items()
            }
        return storage.Content(data_CDHW, seg, properties, masks), tuple(configuration_manager.patch_size)

    def copy_label(self, case: Case) -> None:
        """Put the label file of a labelled case into ``gt_segmentations``, where validation looks for it."""
        if case.label is not None:
            name = case.name + json.loads(self.dataset_json)["file_ending"]
            storage.copy_label(case.label, inside(self.folder.parent, "gt_segmentations", name), self.staging)


@functools.lru_cache(2)
def _managers(plans_text: str, configuration: str) -> tuple[PlansManager, ConfigurationManager]:
    """nnU-Net's views of a plan, on a copy of it."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans_manager = PlansManager(json.loads(plans_text))
    return plans_manager, plans_manager.get_configuration(configuration)


def _signature(case: Case) -> list[list[Any]]:
    """What tells whether the files of a case changed; masks by kind, so one is never taken for the other."""
    return [*source_signature(case), *mask_signature(case)]


def _is_finished(case: Case, manifest: storage.Manifest, settings_hash: str) -> bool:
    try:
        return manifest.holds(case.name, settings_hash, _signature(case))
    except MFMError:
        # A source that cannot be read is reported when its turn comes.
        return False


def _pool_pays(cases: Sequence[Case], num_processes: int) -> bool:
    if num_processes <= 1 or len(cases) < 2:
        return False
    sizes = (file.stat().st_size for case in cases for file in case.images if file.is_file())
    return sum(sizes) >= POOL_MIN_BYTES


def _warn_of_others(folder: Path, cases: Sequence[Case], manifest: storage.Manifest, settings_hash: str) -> None:
    """Say which finished files do not belong to this run; they are never deleted."""
    names, stored = {case.name for case in cases}, storage.stored_cases(folder)
    strangers = sorted(stored - names)
    if strangers:
        log.warning("%s holds %d cases that the dataset has no more, e.g. %s", folder, len(strangers), strangers[0])
    other = [n for n in stored & names if manifest.entries.get(n, {}).get("hash") != settings_hash]
    if other:
        log.warning("%s: %d cases were made with other settings and are made again", folder, len(other))
