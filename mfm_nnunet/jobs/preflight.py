"""Pre-flight checks for jobs made of other jobs, such as a study: refuse bad input before hours of training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.label_table import FILE as TABLE
from mfm_nnunet.data.label_table import LabelTable, read_label_table
from mfm_nnunet.data.labelled import read_subjects
from mfm_nnunet.data.loops import in_threads, with_progress
from mfm_nnunet.data.unlabelled import Labelled, prepare_unlabelled
from mfm_nnunet.dataset import IMAGE_TASKS, DatasetJson
from mfm_nnunet.errors import CaseFailure, dataset_refused, unreadable
from mfm_nnunet.files import digest_of
from mfm_nnunet.finetune import groups
from mfm_nnunet.finetune.pretrained import transfer
from mfm_nnunet.finetune.settings import resolve, resolve_new
from mfm_nnunet.images.integrity import files_of
from mfm_nnunet.images.reading import check_label, read_image, read_label
from mfm_nnunet.interchange.read import find_checkpoint, read_initial, sha256
from mfm_nnunet.jobs import plan as preparation
from mfm_nnunet.jobs.classify import require_of_classifier
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import Plan
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.settings import MFMBlock
from mfm_nnunet.workspace import Workspace

__all__ = ["TABLE", "Case", "find_checkpoint", "read_subjects"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawDataset:
    """The cases of a raw folder, with its dataset.json."""

    name: str
    cases: tuple[Case, ...]
    content: dict[str, Any]
    is_corpus: bool
    table: LabelTable | None = None
    """Labels of whole images, where the dataset has those; ``cases`` are the labelled ones."""

    @property
    def digest(self) -> str:
        """SHA-256 of names, paths, sizes and modification times of all images and labels, or of the table of labels."""
        files = corpus.signature(self.cases)
        return (
            files if self.table is None else digest_of([files, self.table.to_csv([case.name for case in self.cases])])
        )


def read_raw_dataset(folder: Path) -> RawDataset:
    """List the cases of a folder in nnU-Net's raw format.

    Raises MFMError: E_NOT_FOUND (no dataset.json, a missing file), E_FORMAT (a damaged dataset.json).
    """
    cases, content = tuple(corpus.load_cases(folder)), corpus.read_dataset_json(folder)
    table = None
    if DatasetJson.of(content).task in IMAGE_TASKS:
        table = read_label_table(folder / TABLE, DatasetJson.of(content), {case.name for case in cases})
        cases = tuple(case for case in cases if case.name in table.targets)
    return RawDataset(folder.name, cases, content, corpus.is_corpus(folder), table)


def hash_checkpoint(place: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights; ``place`` is a file or folder."""
    try:
        return sha256(place)
    except OSError as error:
        raise unreadable(place, error) from error


def read_label_map(file: Path, reader: str) -> tuple[np.ndarray, list[float]]:
    """Read a label map (D, H, W) and its spacing in the file's unit; ``reader`` is the name of nnU-Net's reader."""
    label, properties = read_label(file, reader)
    return label[0], list(properties["spacing"])


def list_companions(file: Path, is_label: bool = False) -> list[Path]:
    """List the files an image depends on: the voxels of a detached header, the spacing of a TIFF stack."""
    return files_of(file, is_label)[1:]


def check_labelled_cases(cases: Sequence[Case], reader: str, dataset_json: Mapping[str, Any], name: str) -> None:
    """Read every image and mask, and compare them with each other and with dataset.json.

    Raises MFMError listing all unusable cases; ``name`` is the term for the cases in the message.
    """

    def check(case: Case) -> bool:
        image, properties = read_image(case.images, reader)
        if case.label is None:
            return True
        label, label_properties = read_label(case.label, reader)
        check_label(label, label_properties, image, properties, dataset_json, case.name)
        return True

    with with_progress(in_threads(check, cases, 1), len(cases), f"reading {name}") as outcomes:
        failures = [found for _, found in outcomes if isinstance(found, CaseFailure)]
    if failures:
        raise dataset_refused(name, failures, len(cases), "; nothing was trained")


def preprocess_plan(here: Workspace, plan: Plan, configuration: str) -> None:
    """Preprocess the labelled dataset of a plan for one of its configurations, and reuse finished work."""
    cases, _ = preparation.fingerprint(here, plan.dataset_name, None)
    result = preparation.PlanResult(dict(plan.content), here.plans_file(plan.dataset_name, plan.name), [])
    preparation.preprocess(here, plan.dataset_name, cases, result, (configuration,), None)


def prepare_corpus(here: Workspace, plan: Plan, configuration: str, name: str, training: Sequence[str]) -> None:
    """Preprocess and check unlabelled images for trainings that may run at the same time.

    ``training`` are the cases of one of them. Raises the same MFMError as the training itself.
    """
    raw = here.raw_folder(plan.dataset_name)
    dataset, cases = DatasetJson.of(corpus.read_dataset_json(raw)), corpus.load_cases(raw)
    prepare_unlabelled(here, name, Labelled(plan, configuration, dataset, cases, training, ()))


def configuration_of(checkpoint: Path | None, configuration: str) -> str:
    """Return the configuration of a plan made to fit ``checkpoint``, if any.

    Raises MFMError: E_CONFIG (no such configuration), E_MODEL_MISMATCH (no plan can fit this checkpoint).
    """
    source = preparation.check_request(PlanRequest([], like=checkpoint, configurations=(configuration,)))
    return configuration if source is None else source.configuration


def check_settings(settings: Sequence[str]) -> None:
    """Raise MFMError (E_CONFIG) for an unknown fine-tuning setting or an invalid value."""
    resolve(MFMBlock(), settings, None)


def check_start(
    plan: Plan,
    configuration: str,
    num_cases: int,
    settings: Sequence[str],
    checkpoint: Path | None,
    task: str = "segmentation",
    accepted_licence: str | None = None,
) -> None:
    """Check that training on ``num_cases`` cases could start: settings and ``checkpoint`` must fit the network.

    Raises the same MFMError (E_CONFIG, E_MODEL_MISMATCH and others) as the training itself.
    """
    network = build_network(plan.content, configuration, plan.configuration(configuration).num_channels, 2)
    reading = None if checkpoint is None else read_initial(checkpoint, network, accepted_licence)
    finetune = resolve_new(plan.mfm, settings, reading, network, num_cases).finetune
    groups.require_fitting(finetune, network, is_distributed=False)
    if task in IMAGE_TASKS:
        require_of_classifier(finetune)
    groups.require_pretrained(finetune, is_pretrained=checkpoint is not None)
    if reading is not None:
        parts = "all_but_heads" if finetune.parts == "auto" else finetune.parts
        parts = "encoder" if task in IMAGE_TASKS else parts
        report = transfer(reading, network, parts, finetune.transfer)
        groups.require_no_random_rest(finetune, network, [entry.name for entry in report.new])
        logger.info("%.0f %% of the encoder's parameters come from %s", 100 * report.encoder_share, checkpoint)
