"""Make one dataset of several: a folder of links in nnU-Net's raw format, with label maps in common values.

The dataset is an ordinary one for everything behind it. Its classes, and which of them each dataset annotates, are in
``class_table.json`` (:mod:`mfm_nnunet.data.class_table`).
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.class_table import (
    FILE,
    ClassTable,
    key_of,
    propose,
    read_class_table,
    table_of_model,
    union_of,
    write_class_table,
)
from mfm_nnunet.data.labelled import IMAGES, LABELS
from mfm_nnunet.data.storage import staging
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, read_json, whole_number, write_json
from mfm_nnunet.finetune.splits import Split, ensure_splits, make_splits
from mfm_nnunet.images import reading
from mfm_nnunet.jobs.predict import predict
from mfm_nnunet.jobs.registration import new_folder
from mfm_nnunet.modalities import has_window, kind_of, kind_of_channel
from mfm_nnunet.plan import Plan
from mfm_nnunet.prediction.export import is_nifti, read_header, write_mask
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.workspace import Workspace

PSEUDO = "pseudo_labels"
"""Folder of the older model's masks, in the raw folder of the union."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A labelled dataset that becomes part of a union."""

    name: str
    folder: Path
    dataset: DatasetJson
    cases: list[Case]

    @property
    def key(self) -> str:
        """Number of the dataset, with which its cases begin in the union."""
        return self.name[7:10]

    def entry(self) -> dict[str, Any]:
        """Return its description in the class table."""
        entry: dict[str, Any] = {
            "name": self.name,
            "kind": kind_of_channel(self.dataset.channels[0]) or "other",
            "labels": {name: list(values) for name, values in self.dataset.foreground.items()},
        }
        return entry if self.dataset.ignore is None else {**entry, "ignore": self.dataset.ignore}


def is_union(folder: Path) -> bool:
    """Return whether a raw dataset folder is a union."""
    return (folder / FILE).is_file()


def name_of_union(here: Workspace, dataset: str | int, request: PlanRequest) -> str | None:
    """Return the name of the union that a request makes or renews; None for other datasets."""
    if request.universal is not None:
        number = whole_number(str(dataset))
        if number is None or not 1 <= number <= 999:
            raise MFMError("E_CONFIG", f"-d {dataset}: a union needs a number from 1 to 999.")
        return new_folder(here, number, request.name or "Universal").name
    if request.images is not None or not is_union(here.raw / (name := here.dataset_name(dataset))):
        return None
    if request.modality is not None:
        raise MFMError("E_CONFIG", f"--modality: {name} is a union, whose datasets name the kinds of their images.")
    return name


def register_union(here: Workspace, name: str, request: PlanRequest) -> PlanRequest:
    """Write or renew the folder of a union; return the request, which plans like the model that is extended, if any.

    The first call proposes a class table. Later calls use the file, as corrected by a person. Raises MFMError: E_EXISTS
    (another dataset, or a union of other datasets), E_CHANNELS, E_FORMAT and E_CONFIG (datasets that do not go
    together, and a table that is damaged), and those of reading datasets and labels.
    """
    folder = here.raw / name
    if request.dry_run:
        raise MFMError("E_CONFIG", f"--dry-run: {name} is a union, which is made before it is planned. Leave it out.")
    if folder.exists() and any(folder.iterdir()) and not is_union(folder):
        raise MFMError("E_EXISTS", f"{folder}: this is another dataset. Choose another number for the union.")
    model = None if request.add_to is None else Path(request.add_to)
    if not is_union(folder):
        sources = [_read_part(here, dataset) for dataset in request.universal or ()]
        _require_alike(sources)
        folder.mkdir(parents=True, exist_ok=True)
        _propose(folder, sources, model)
    table, content = read_class_table(folder / FILE)
    wanted = {here.dataset_name(dataset) for dataset in request.universal or ()}
    own = {str(entry["name"]) for entry in table.datasets.values()}
    if request.universal is not None and (wanted != own or (model and str(model) != content.get("add_to"))):
        raise MFMError(
            "E_EXISTS",
            f"{folder / FILE}: this union is of {', '.join(sorted(own))}, and another one was asked for. Choose "
            "another number, or delete the file.",
        )
    sources = [_read_part(here, dataset) for dataset in sorted(own)]
    _require_alike(sources)
    model = Path(content["add_to"]) if content.get("add_to") else None
    _write_folder(folder, sources, table, content, model)
    base = here.preprocessed / name
    base.mkdir(parents=True, exist_ok=True)
    write_json(base / FILE, content)
    _write_splits(base, split_union(here, sources, content.get("same_patients", True)))
    return request if model is None else replace(request, add_to=None, like=_checkpoint_of(model))


def _read_part(here: Workspace, dataset: str | int) -> Part:
    name = here.dataset_name(dataset)
    folder = here.raw_folder(name)
    own = DatasetJson.of(corpus.read_dataset_json(folder))
    if corpus.is_corpus(folder) or own.task != "segmentation" or not own.foreground or is_union(folder):
        raise MFMError("E_CONFIG", f"--universal {dataset}: {name} is no dataset with masks of its own. Leave it out.")
    cases = corpus.load_cases(folder)
    if len({kind_of(case.modality) for case in cases}) > 1:
        raise MFMError("E_CONFIG", f"--universal {dataset}: {name} has images of several modalities. Make one of each.")
    return Part(name, folder, own, cases)


def _require_alike(sources: Sequence[Part]) -> None:
    """Refuse datasets that cannot be parts of one nnU-Net dataset."""
    if twice := {source.name for source in sources if [other.name for other in sources].count(source.name) > 1}:
        raise MFMError("E_CONFIG", f"--universal: {twice.pop()} is given twice. Give it once.")
    first = sources[0]
    for source in sources:
        own, other = len(source.dataset.channels), len(first.dataset.channels)
        if own != other:
            raise MFMError(
                "E_CHANNELS",
                f"{source.name} has {own} channels and {first.name} has {other}: one network needs the same number. "
                "Make datasets of the channels that they share.",
            )
        if source.dataset.file_ending != first.dataset.file_ending:
            raise MFMError(
                "E_FORMAT",
                f"{source.name} has {source.dataset.file_ending} files and {first.name} {first.dataset.file_ending}: "
                "nnU-Net has one file_ending per dataset. Convert one of them.",
            )
        kinds = {kind_of_channel(channel) for channel in source.dataset.channels}
        if len(kinds) > 1 and any(map(has_window, kinds)):
            raise MFMError(
                "E_CHANNELS", f"{source.name}: its channels are of several kinds, which need one scale each."
            )


def _propose(folder: Path, sources: Sequence[Part], model: Path | None) -> None:
    """Write the table for a person to confirm, after the classes of the model that is extended, if any."""
    entries = {source.key: source.entry() for source in sources}
    old = None
    if model is not None:
        plan = Plan.read(model / "plans.json", "Give a model folder.")
        dataset = DatasetJson.read(model / "dataset.json", "Give a model folder.", of_model=True)
        old = table_of_model(plan.dataset_name, plan.mfm.universal, dataset)
        annotated = {row.name for row in old.rows if set(row.labels) & set(entries)}
        pseudo = [name for name in old.names if name not in annotated]
        for entry in entries.values() if pseudo else ():
            entry["pseudo"] = pseudo
        if pseudo and not old.exclusive:
            raise MFMError(
                "E_CONFIG",
                f"--add-to {model}: its classes may overlap, and one label map cannot hold its masks beside new ones. "
                f"List its datasets too: --universal {' '.join(map(str, map(int, old.datasets)))} ...",
            )
    table, same = propose(entries, old)
    more = {} if model is None else {"add_to": str(model)}
    write_class_table(folder / FILE, table, same, **more)
    logger.warning('%s: read this table of classes, correct it, and set "confirmed": true', folder / FILE)
    for name, keys in same.items():
        logger.warning("class '%s' is in several datasets (%s), and is taken as one class", name, ", ".join(keys))


def _checkpoint_of(model: Path) -> Path:
    found = sorted(model.glob("fold_*/checkpoint_final.pth"))
    if not found:
        raise MFMError("E_NOT_FOUND", f"--add-to {model}: no fold_X/checkpoint_final.pth. Give a trained model folder.")
    return found[0]


# The folder


def _write_folder(
    folder: Path, sources: Sequence[Part], table: ClassTable, content: Mapping[str, Any], model: Path | None
) -> None:
    before = read_json(folder / "dataset.json", "Delete it.") if (folder / "dataset.json").is_file() else {}
    known = ClassTable.of(union_of(before) or {"classes": [], "datasets": {}, "exclusive": True})
    for name in (IMAGES, LABELS):
        (folder / name).mkdir(exist_ok=True)
    wanted = set()
    for source in sources:
        pseudo = _predict_old(folder, source, table, model)
        is_same = source.key in known.datasets and known.values(source.key) == table.values(source.key)
        is_same &= known.datasets.get(source.key, {}).get("pseudo") == table.datasets[source.key].get("pseudo")
        for case in source.cases:
            wanted |= _write_case(folder, source, case, table, pseudo, is_same)
    for file in [*(folder / IMAGES).iterdir(), *(folder / LABELS).iterdir()]:
        if file.name not in wanted and not file.name.startswith("."):
            file.unlink()
    write_json(folder / "dataset.json", _describe_union(folder.name, sources, table, content), indent=1)


def _describe_union(
    name: str, sources: Sequence[Part], table: ClassTable, content: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the dataset.json of the union. Its channels are named after the kind of image if all have one."""
    names = [source.dataset.channels for source in sources]
    is_ct = all(entry["kind"] == "ct" for entry in table.datasets.values())
    channels = [*names[0]] if len(set(names)) == 1 else ["CT" if is_ct else f"channel{n}" for n in range(len(names[0]))]
    licences = {source.name: source.dataset.content.get("licence") or "unknown" for source in sources}
    return {
        "name": name,
        "licence": "; ".join(f"{source}: {licence}" for source, licence in licences.items()),
        "channel_names": {str(number): channel for number, channel in enumerate(channels)},
        **table.labels(),
        "numTraining": sum(len(source.cases) for source in sources),
        "file_ending": sources[0].dataset.file_ending,
        "mfm": {"universal": {**table.to_block(), "same_patients": content.get("same_patients", True)}},
    }


def _write_case(
    folder: Path, source: Part, case: Case, table: ClassTable, pseudo: Path | None, is_same: bool
) -> set[str]:
    """Link the images of a case, and link or write its label map; return the names of the files."""
    ending, name = source.dataset.file_ending, f"{source.key}_{case.name}"
    links = {inside(folder, IMAGES, f"{name}_{channel:04d}{ending}"): file for channel, file in enumerate(case.images)}
    target, values = inside(folder, LABELS, f"{name}{ending}"), table.values(source.key)
    assert case.label is not None, "cases of a labelled dataset have labels"
    if pseudo is None and all(value == own for value, own in values.items()):
        links[target] = case.label
    elif not (is_same and target.is_file() and not target.is_symlink() and _is_current(target, case.label)):
        _write_values(case.label, target, values, source, None if pseudo is None else pseudo / f"{case.name}{ending}")
    for link, file in links.items():
        if not (link.is_symlink() and os.readlink(link) == str(file)):
            link.unlink(missing_ok=True)
            link.symlink_to(file)
    return {target.name, *(link.name for link in links)}


def _is_current(target: Path, label: Path) -> bool:
    return target.stat().st_mtime_ns == label.stat().st_mtime_ns


def _write_values(label: Path, target: Path, values: Mapping[int, int], source: Part, pseudo: Path | None) -> None:
    """Write a label map with other values, and the older model's classes where it is background.

    The file gets the time of its source, by which a change is noticed.
    """
    reader = reading.reader_for(label, source.dataset.content)
    label_1DHW, properties = reading.read_label(label, reader)
    found = set(np.unique(label_1DHW).astype(int).tolist())
    if unknown := sorted(found - set(values)):
        raise MFMError(
            "E_LABEL_VALUE", f"{label}: the values {unknown} are not in its dataset.json. Correct one of them."
        )
    mask_1DHW = np.zeros(label_1DHW.shape, np.uint8 if max(values.values()) < 256 else np.uint16)
    if pseudo is not None:
        mask_1DHW[...] = reading.read_label(pseudo, reader)[0]
    for value in found - {0}:
        mask_1DHW[label_1DHW == value] = values[value]
    writer: Any = types.SimpleNamespace(image_reader_writer_class=reading.find_reader_class(reader))
    with staging(target.parent) as stage:
        new = stage / target.name
        write_mask(mask_1DHW[0], properties, writer, new, read_header(label) if is_nifti(label) else None)
        os.utime(new, ns=(label.stat().st_atime_ns, label.stat().st_mtime_ns))
        os.replace(new, target)


def _predict_old(folder: Path, source: Part, table: ClassTable, model: Path | None) -> Path | None:
    """Predict the classes of the older model that no dataset annotates; return the folder of masks."""
    names = table.datasets[source.key].get("pseudo")
    if not names or model is None:
        return None
    target = folder / PSEUDO / source.name
    if not (source.folder / IMAGES).is_dir():
        raise MFMError(
            "E_NOT_FOUND", f"{source.folder / IMAGES}: no such folder, and the older model predicts its images."
        )
    logger.info("%s: the older model labels %s", source.name, ", ".join(names))
    predict(source.folder / IMAGES, target, model_folder=model, classes=tuple(names), resume=True)
    return target


# The folds


def split_union(here: Workspace, sources: Sequence[Part], same_patients: bool) -> list[Split]:
    """Return folds made of the datasets' own: those of ``splits_final.json``, else nnU-Net's.

    A patient of several datasets is in one fold: the one of the first dataset that has folds, else of the largest.
    Raises MFMError (E_CONFIG) if existing folds contradict that.
    """
    fixed = {
        s.key: here.preprocessed / s.name
        for s in sources
        if (here.preprocessed / s.name / "splits_final.json").is_file()
    }
    folds: dict[str, int] = {}
    patients: dict[str, str] = {}
    parts = []
    for source in sorted(sources, key=lambda source: (source.key not in fixed, -len(source.cases))):
        own_patients = {c.name: c.subject if same_patients else f"{source.key}_{c.subject}" for c in source.cases}
        if source.key in fixed:
            own = ensure_splits(fixed[source.key], [])
            own = [{part: [case for case in split[part] if case in own_patients] for part in split} for split in own]
            folds |= {own_patients[case]: number for number, split in enumerate(own) for case in split["val"]} | folds
        else:
            own = _make_new_folds(own_patients, folds)
        parts.append((source.key, own))
        patients |= {f"{source.key}_{case}": patient for case, patient in own_patients.items()}
    number = max(len(own) for _, own in parts)
    splits = [
        {
            part: sorted(f"{key}_{case}" for key, own in parts for case in own[fold % len(own)][part])
            for part in ("train", "val")
        }
        for fold in range(number)
    ]
    for number, split in enumerate(splits):
        _require_apart(number, split, patients)
    return splits


def _require_apart(number: int, split: Split, patients: Mapping[str, str]) -> None:
    """Refuse a patient who validates in one dataset and trains in another."""
    owners = {patients[case]: case for case in split["val"]}
    for case in split["train"]:
        other = owners.get(patients[case])
        if other is not None and key_of(other) != key_of(case):
            raise MFMError(
                "E_CONFIG",
                f"patient {patients[case]} validates in fold {number} of dataset {key_of(other)} and trains in that of "
                f"{key_of(case)}, by their splits_final.json: the validation would be worthless. Delete one of the two "
                f"files, or set same_patients to false in {FILE} if these are different people.",
            )


def _make_new_folds(patients: Mapping[str, str], folds: dict[str, int]) -> list[Split]:
    """Return folds of a dataset without any: known patients stay in theirs, the others get nnU-Net's."""
    new = sorted({patient for patient in patients.values() if patient not in folds})
    if len(new) > 1:
        made = make_splits(new, {})
        folds |= {patient: number for number, split in enumerate(made) for patient in split["val"]}
    folds |= {patient: 0 for patient in new if patient not in folds}
    number = max(5, *(folds[patient] + 1 for patient in patients.values()))
    return [
        {
            "train": [case for case, patient in patients.items() if folds[patient] != fold],
            "val": [case for case, patient in patients.items() if folds[patient] == fold],
        }
        for fold in range(number)
    ]


def _write_splits(base: Path, splits: list[Split]) -> None:
    """Write the folds, unless there is a file with the same cases: it may have been edited."""
    cases = lambda found: {case for split in found for part in split.values() for case in part}  # noqa: E731
    if not (base / "splits_final.json").is_file() or cases(ensure_splits(base, [])) != cases(splits):
        write_json(base / "splits_final.json", splits, indent=4)
