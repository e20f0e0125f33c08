"""Pseudo labels: a folder that teachers write, that a person can look at and correct, and that a student learns from.

The folder holds a mask per image (on the grid of the image, named after it), ``soft/{case}.b2nd`` (uint8, probabilities
times 255 on the plan's grid), ``pseudo_labels.jsonl`` (one line per finished image) and the tables
``pseudo_labels.csv`` and ``next_to_label.csv``. A mask that is not the written file any more, also one that was only
saved again, is a correction: it is a true label.

Legend: K classes or regions, and a last channel of ignored voxels where the dataset has an ignore label; D H W voxels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.preprocess import preprocess_case_npy
from mfm_nnunet.data.storage import remove_dead_stages, staging, write_array
from mfm_nnunet.data.unlabelled import Unlabelled
from mfm_nnunet.data.views import list_places, read_views
from mfm_nnunet.data.volumes import open_array, read_properties
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import append_line, digest_of, inside, open_to_append, read_lines, sha256, write_csv
from mfm_nnunet.finetune.ranking import rank
from mfm_nnunet.finetune.watch import Watch
from mfm_nnunet.images.reading import check_label, read_image, read_label
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.prediction.export import Managers, is_nifti, publish, read_header, require_space, write_case
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.reports.progress import track

logger = logging.getLogger(__name__)

JOURNAL, TABLE, RANKING, SOFT = "pseudo_labels.jsonl", "pseudo_labels.csv", "next_to_label.csv", "soft"
WEAK_DICE = 0.6
"""Validation Dice of a teacher below which its pseudo labels are expected to teach its mistakes."""
SMALLEST = 1e-6
"""Smallest probability whose logarithm is taken."""

Entry = dict[str, Any]
"""A line of the journal: "case", "identity", "agreement", "volumes" per class, "unit", "feature", "mask" (SHA-256)."""


@dataclass(frozen=True)
class Labelling:
    """Label the images of a corpus with teachers, into a folder. Finished images are kept."""

    teachers: Sequence[Model]
    """One fold each; all of one plan and dataset."""
    unlabelled: Unlabelled
    sources: Mapping[str, Case]
    """The files of each image."""
    folder: Path
    labelled: Mapping[str, Path]
    """Preprocessed labelled images: the ranking prefers images that are unlike them."""

    @property
    def identity(self) -> str:
        """Hash of the teachers: an image that others labelled is labelled again."""
        return digest_of([teacher.sha256 for teacher in self.teachers])

    def run(self) -> None:
        """Label all images that are not labelled yet. Raises MFMError (E_CONFIG) if a teacher predicts nothing."""
        (self.folder / SOFT).mkdir(parents=True, exist_ok=True)
        remove_dead_stages(self.folder)
        known = read_entries(self.folder)
        with open_to_append(self.folder / JOURNAL) as journal:
            for name, file in self.labelled.items():
                if known.get(name, {}).get("identity") != self.identity:
                    feature = describe_image(self.teachers[0], open_array(str(file))[:])
                    append_line(journal, {"case": name, "identity": self.identity, "feature": feature})
            corrected = self._corrected(known)
            todo = [case for case in self.unlabelled.cases if not self._is_done(known.get(case, {}))]
            with track("pseudo labels", len(todo), "images") as count:
                for case in todo:
                    append_line(journal, self._label(case, case in corrected))
                    count()
        self._require_foreground()

    def _is_done(self, entry: Entry) -> bool:
        is_same = entry.get("identity") == self.identity and "mask" in entry
        return is_same and (self.folder / SOFT / f"{entry['case']}.b2nd").is_file()

    def _corrected(self, known: Mapping[str, Entry]) -> set[str]:
        """Return the images whose mask a person changed, which other teachers must not replace."""
        ending = self.teachers[0].dataset_json["file_ending"]
        files = {case: inside(self.folder, f"{case}{ending}") for case, entry in known.items() if "mask" in entry}
        return {case for case, file in files.items() if file.is_file() and sha256(file) != known[case]["mask"]}

    def _label(self, case: str, is_corrected: bool) -> Entry:
        model = self.teachers[0]
        x_CDHW = open_array(str(self.unlabelled.folder / f"{case}.b2nd"))[:]
        properties = read_properties(self.unlabelled.folder / f"{case}.pkl")
        mean_KDHW, found = torch.zeros(()), []
        for teacher in self.teachers:
            logits = teacher.predict_logits(torch.from_numpy(x_CDHW), what=f"labelling {case}").float()
            probability = torch.sigmoid(logits) if model.label_manager.has_regions else torch.softmax(logits, 0)
            mean_KDHW = mean_KDHW + probability / len(self.teachers)
            found.append(harden(probability, model.label_manager))
        agreed = harden(mean_KDHW, model.label_manager)
        ending = model.dataset_json["file_ending"]
        require_space(inside(self.folder, f"{case}{ending}"), properties)
        image = self.sources[case].images[0] if case in self.sources else None
        header = read_header(image) if image is not None and is_nifti(image) else None
        # Probabilities above one half, and the likeliest class, are the same for these logits.
        clamped = mean_KDHW.clamp(SMALLEST, 1 - SMALLEST)
        logits = torch.logit(clamped) if model.label_manager.has_regions else clamped.log()
        with staging(self.folder) as stage:
            write_soft(inside(self.folder / SOFT, f"{case}.b2nd"), mean_KDHW.numpy(), model.managers)
            write_case(logits.half(), properties, model.managers, inside(stage, case), ending, header=header)
            digest = sha256(stage / f"{case}{ending}")
            if not is_corrected:
                publish(stage, self.folder)
        spacing = [float(mm) for mm in properties["spacing"]]
        # nnU-Net's readers set the missing spacing of a 2D image to 999 times the others.
        unit = "pixels" if spacing[0] >= 998 * max(spacing[1:]) else "ml"
        # The grid of the plan has other voxels than the image.
        scale = math.prod(properties["shape_after_cropping_and_before_resampling"]) / math.prod(x_CDHW.shape[1:])
        scale *= 1 if unit == "pixels" else math.prod(spacing) / 1000
        names = Watch.of(DatasetJson.of(model.dataset_json)).names
        return {
            "case": case,
            "identity": self.identity,
            "agreement": agreement(found, agreed),
            "volumes": {name: int(voxels.sum()) * scale for name, voxels in zip(names, agreed)},
            "found": [bool(maps.any()) for maps in found],
            "unit": unit,
            "feature": describe_image(model, x_CDHW),
            "mask": digest,
        }

    def _require_foreground(self) -> None:
        entries = [entry for entry in read_entries(self.folder).values() if "found" in entry]
        for number in range(len(self.teachers)):
            if not any(entry["found"][number] for entry in entries):
                raise MFMError(
                    "E_CONFIG",
                    f"{self.folder}: teacher {number + 1} of {len(self.teachers)} predicts nothing on any of "
                    f"{len(entries)} images, so it would teach that there is nothing. Train longer (finetune.epochs), "
                    "check that these images are like the labelled ones, or leave this teacher out (--teachers).",
                )


def harden(probability_KDHW: torch.Tensor, labels: LabelManager) -> torch.Tensor:
    """Return a boolean map (K, D, H, W) of each foreground class or region."""
    if labels.has_regions:
        return probability_KDHW > 0.5
    classes = torch.arange(1, len(probability_KDHW)).reshape(-1, *[1] * (probability_KDHW.dim() - 1))
    return probability_KDHW.argmax(0)[None] == classes


def agreement(found: Sequence[torch.Tensor], agreed_KDHW: torch.Tensor) -> float:
    """Return the mean Dice of the teachers' masks against their common one, over the classes in either.

    It is 1 if all of them see nothing.
    """
    values = []
    for own_KDHW in found:
        for own, common in zip(own_KDHW, agreed_KDHW):
            if total := int(own.sum()) + int(common.sum()):
                values.append(2 * int((own & common).sum()) / total)
    return sum(values) / len(values) if values else 1.0


@torch.inference_mode()
def describe_image(model: Model, x_CDHW: np.ndarray) -> list[float]:
    """Return the mean of the coarsest features of the teacher's encoder over a preprocessed image."""
    patch = tuple(int(size) for size in model.configuration_manager.patch_size)
    backbone = make_backbone(model.network.to(model.device).eval(), patch, "none")
    views = read_views(x_CDHW, list_places(x_CDHW.shape[1:], patch, "whole"), patch)
    means = [backbone.features(view.to(model.device))[-1].float().flatten(2).mean(2).sum(0) for view in views.split(8)]
    return [round(value, 5) for value in (torch.stack(means).sum(0) / len(views)).tolist()]


def write_soft(file: Path, soft_KDHW: np.ndarray, managers: Managers) -> None:
    """Write soft labels; ``soft_KDHW`` are probabilities, with the channel of ignored voxels or without."""
    _, configuration, labels = managers
    if labels.has_ignore_label and len(soft_KDHW) == labels.num_segmentation_heads:
        soft_KDHW = np.concatenate([soft_KDHW, np.zeros_like(soft_KDHW[:1])])
    array = np.rint(np.clip(soft_KDHW, 0, 1) * 255).astype(np.uint8)
    write_array(array, tuple(configuration.patch_size), file)


def read_entries(folder: Path) -> dict[str, Entry]:
    """Return the last line about each image in the journal of a folder."""
    lines = (line for line in read_lines(folder / JOURNAL) if isinstance(line, dict) and "case" in line)
    return {str(line["case"]): line for line in lines}


# Corrections


def find_corrections(folders: Sequence[Path], ending: str, entries: Mapping[str, Entry]) -> dict[str, Path]:
    """Return the corrected masks of the images; later folders win.

    Raises MFMError (E_NOT_FOUND) for a folder that does not exist, or masks none of which has the name of an image.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise MFMError("E_NOT_FOUND", f"--pseudo-labels {folder}: no such folder. Check the path.")
        masks = {file.name.removesuffix(ending): file for file in sorted(folder.glob(f"*{ending}"))}
        unknown = sorted(set(masks) - {name for name, entry in entries.items() if "mask" in entry})
        if unknown and len(unknown) == len(masks):
            raise MFMError(
                "E_NOT_FOUND",
                f"{masks[unknown[0]]}: no unlabelled image has this name. A corrected mask has the name of its image.",
            )
        if unknown:
            logger.warning("%s: %d masks have the name of no image, e.g. %s", folder, len(unknown), unknown[0])
        for name in sorted(set(masks) - set(unknown)):
            if sha256(masks[name]) != entries[name]["mask"]:
                found[name] = masks[name]
    return found


def read_correction(
    file: Path, source: Case, unlabelled: Unlabelled, managers: Managers, dataset_json: dict[str, Any]
) -> np.ndarray:
    """Return a corrected mask as soft labels of 0 and 1 on the plan's grid.

    Raises MFMError: E_LABEL_GEOMETRY for another grid than the image's, E_LABEL_VALUE for unknown labels.
    """
    plans_manager, configuration, labels = managers
    reader = plans_manager.plans["image_reader_writer"]
    image, properties = read_image(source.images, reader)
    label, label_properties = read_label(file, reader)
    check_label(label, label_properties, image, properties, dataset_json, str(file))
    data, seg, _ = preprocess_case_npy(image, properties, label, plans_manager, configuration, dataset_json)
    assert seg is not None, "preprocessing returns the mask that it was given"
    shape = open_array(str(unlabelled.folder / f"{source.name}.b2nd")).shape
    if data.shape != shape:
        raise MFMError("E_CHANGED", f"{source.images[0]}: it was another image when it was preprocessed. Run again.")
    seg_DHW = np.maximum(seg[0], 0)
    values = labels.foreground_regions if labels.has_regions else labels.all_labels
    return np.stack([np.isin(seg_DHW, value) for value in (*values, *_ignored(labels))]).astype(np.float32)


def _ignored(labels: LabelManager) -> list[int]:
    return [labels.ignore_label] if labels.has_ignore_label else []


# What the student uses


@dataclass(frozen=True)
class Used:
    """The pseudo labels a student learns: the images that are kept, with a file each, and a hash of what they hold."""

    unlabelled: Unlabelled
    digest: str


def choose(folder: Path, unlabelled: Unlabelled, drop: float, corrections: Mapping[str, Path], hard: Path) -> Used:
    """Leave out the share ``drop`` of the images on which the teachers agree least, and write both tables.

    ``corrections`` are used in any case; the folder ``hard`` gets their labels
    (:func:`harden_corrections`). Raises MFMError (E_CONFIG) if nothing is left.
    """
    entries = read_entries(folder)
    names = [case for case in unlabelled.cases if "mask" in entries.get(case, {})]
    by_agreement = sorted((case for case in names if case not in corrections), key=lambda c: entries[c]["agreement"])
    dropped = set(by_agreement[: math.floor(drop * len(by_agreement))])
    kept = tuple(case for case in names if case not in dropped)
    if not kept:
        raise MFMError("E_CONFIG", f"{folder}: there is no pseudo-labelled image. Lower semi.drop={drop}.")
    write_agreements(folder, [entries[case] for case in names], dropped, corrections)
    known = [entry for name, entry in entries.items() if "mask" not in entry or name in corrections]
    rank([entries[case] for case in names if case not in corrections], known).write(folder / RANKING)
    files = {case: inside(hard if case in corrections else folder / SOFT, f"{case}.b2nd") for case in kept}
    content = {case: sha256(corrections[case]) if case in corrections else entries[case]["mask"] for case in kept}
    return Used(replace(unlabelled, cases=kept, labels=files), digest_of(content))


def write_agreements(
    folder: Path, entries: Sequence[Entry], dropped: set[str], corrections: Mapping[str, Path]
) -> None:
    """Write ``pseudo_labels.csv``, the images on which the teachers agree least first."""

    def use(case: str) -> str:
        if case in corrections:
            return "corrected: a true label"
        return "dropped: among those with the least agreement" if case in dropped else "kept"

    names, unit = entries[0]["volumes"], entries[0]["unit"]
    header = ["case", "agreement of the teachers", *(f"{name} [{unit}]" for name in names), "use"]
    ordered = sorted(entries, key=lambda entry: entry["agreement"])
    rows = [
        [e["case"], float(e["agreement"]), *(float(e["volumes"].get(name, 0.0)) for name in names), use(e["case"])]
        for e in ordered
    ]
    write_csv(folder / TABLE, header, rows)


def harden_corrections(
    corrections: Mapping[str, Path],
    hard: Path,
    unlabelled: Unlabelled,
    sources: Mapping[str, Case],
    managers: Managers,
    dataset_json: dict[str, Any],
) -> None:
    """Write corrected masks as soft labels of 0 and 1 into the folder ``hard``."""
    hard.mkdir(parents=True, exist_ok=True)
    for case, file in corrections.items():
        if case not in sources:
            raise MFMError(
                "E_NOT_FOUND", f"{file}: the image of this corrected mask is not there. Restore the raw scans."
            )
        soft_KDHW = read_correction(file, sources[case], unlabelled, managers, dataset_json)
        write_soft(inside(hard, f"{case}.b2nd"), soft_KDHW, managers)
