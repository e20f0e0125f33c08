"""The folder of a study: begun, continued or refused; ``study.json`` and a workspace of its own.

The study's workspace knows only the pool (everything but the test split): fingerprint, plan and preprocessing see no
test image. It is preprocessed once; a subset is a fold of ``splits_final.json``.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.dataset import check_dataset_json
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import is_file_name, read_json
from mfm_nnunet.images.integrity import files_of
from mfm_nnunet.interchange.read import sha256
from mfm_nnunet.study.arms import Arm, is_arm_name
from mfm_nnunet.study.design import CELLS, Cell, Design, Question, cells_of, read_subjects
from mfm_nnunet.study.plan import digest, require_known
from mfm_nnunet.study.splits import Cases, draw_test, label_counts
from mfm_nnunet.version import __version__

RECORD = "study.json"
STUDY_SETTINGS = ("finetune.validation_iterations=1",)
"""Set before ``--set``: the final checkpoint is tested, so validation while training decides nothing and costs time."""
_PARTS = {"question", "labels", "seeds", "compared", "arms", "folds", "test_cases", "library", "dataset_json"}
_ADVICE = "Give -o another folder, or remove this one to begin anew."


def make_design(
    folder: Path,
    cases: Sequence[Case],
    dataset_json: Mapping[str, Any],
    *,
    dataset: str,
    configuration: str,
    plans: str,
    arms: tuple[Arm, ...],
    labels: Sequence[str],
    seeds: int,
    test: str,
    subjects: Path | None,
    settings: Sequence[str],
    tolerance_mm: float,
    mirroring: bool,
) -> Design:
    """The design of a study; nothing is written yet.

    Raises MFMError: as the splits do, and E_CONFIG when the folder holds a study that asked something else.
    """
    if seeds < 1:
        raise MFMError("E_CONFIG", f"--seeds {seeds}: at least one training per arm is needed.")
    if not 0 <= tolerance_mm < float("inf"):
        raise MFMError("E_CONFIG", f"--tolerance-mm {tolerance_mm}: expected a length in mm, 0 or more.")
    if any(setting.partition("=")[0].strip() == "seed" for setting in settings):
        raise MFMError(
            "E_CONFIG", "--set seed: the study sets the seed of every cell itself. Say how many with --seeds."
        )
    of_case = read_subjects(subjects, cases)
    known = Cases.of(of_case)
    tested = draw_test(known, test)
    counts = label_counts(labels, len(known.by_subject) - len(tested))
    question = Question(
        dataset=dataset,
        configuration=configuration,
        plans=plans,
        settings=[*STUDY_SETTINGS, *settings],
        tolerance_mm=tolerance_mm,
        mirroring=mirroring,
        test=known.names(tested),
        subjects=of_case,
        data=corpus.signature(cases),
    )
    mine = {arm.name: _about(arm) for arm in arms}
    before = _continued(folder, question, dataset_json, mine)
    folds = [(fold["labels"], fold["seed"]) for fold in before.get("folds", [])]  # their numbers must not change
    wanted = [(count, seed) for seed in range(seeds) for count in counts]
    folds += [fold for fold in wanted if fold not in folds]
    known_arms = {**before.get("arms", {}), **mine}
    by_name = {case.name: case for case in cases}
    return Design(
        folder=folder,
        question=question,
        arms=arms,
        labels=counts,
        seeds=seeds,
        folds=folds,
        known_arms=known_arms,
        asked_before=cells_of(before) if before else [],
        plan_sha256=before.get("plan_sha256"),
        cases=by_name,
        dataset_json=dict(dataset_json),
    )


def plans_of(folder: Path) -> str | None:
    """The plan that the study in a folder trains on, as :class:`Question` names it; None before the first training.

    Raises MFMError as :func:`read_record`.
    """
    if not (folder / RECORD).is_file() or not (folder / CELLS).is_dir():
        return None
    return str(read_record(folder)["question"].get("plans"))


def write_design(design: Design, library: Mapping[str, str]) -> None:
    """Write the dataset of the pool, its folds, links to the test images, and for a new study ``study.json``."""
    before = read_record(design.folder) if (design.folder / RECORD).is_file() else {}
    if before and _differences(before, design.question, design.dataset_json):
        for stale in (design.workspace, design.test_folder):  # of another question, for which nothing was trained
            shutil.rmtree(stale, ignore_errors=True)
    links = _test_links(design)
    if not design.asked_before:
        write_json(design.folder / RECORD, record_of(design, library))  # first: it tells whose folder this is
    for link, file in links.items():
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    dataset = design.question.dataset
    entries = {case.name: _files(case) for case in design.pool}
    pool_json = {**design.dataset_json, "numTraining": len(entries), "dataset": entries}
    write_json(design.workspace / "nnUNet_raw" / dataset / "dataset.json", pool_json)
    splits = [_fold(design.subset(*fold)) for fold in design.folds]
    write_json(design.workspace / "nnUNet_preprocessed" / dataset / "splits_final.json", splits)


def note_asked(design: Design, library: Mapping[str, str]) -> None:
    """Add what this call asks for to ``study.json``, once all checks let it pass: a refused call leaves no trace."""
    write_json(design.folder / RECORD, {**read_record(design.folder), **record_of(design, library)})


def pin_plan(design: Design, plans: Mapping[str, Any], file: Path, is_new: bool) -> None:
    """Write the digest of the study's plan into ``study.json``, or refuse one that is not that of earlier calls.

    Raises MFMError (E_CONFIG); a file that ``is_new`` is removed then, so that it can be made again elsewhere.
    """
    try:
        require_known(design, plans, file)
    except MFMError:
        if is_new:
            file.unlink()
        raise
    write_json(design.folder / RECORD, {**read_record(design.folder), "plan_sha256": digest(plans)})


def record_of(design: Design, library: Mapping[str, str]) -> dict[str, Any]:
    """The part of ``study.json`` that is known before any cell has run: of this call and of those before it."""
    asked = design.asked()
    return {
        "made_by": f"mfm_study {__version__}",
        "question": as_json(design.question),
        "library": dict(library),
        "labels": sorted({cell.num_labels for cell in asked}),
        "seeds": 1 + max(cell.seed for cell in asked),
        "compared": list(dict.fromkeys(cell.arm for cell in asked)),
        "asked": [dataclasses.asdict(cell) for cell in asked],
        "arms": design.known_arms,
        "folds": [{"labels": count, "seed": seed, "train": design.subset(count, seed)} for count, seed in design.folds],
        "test_cases": {case.name: _files(case) for case in design.test},
        "dataset_json": {
            key: value for key, value in design.dataset_json.items() if key not in ("dataset", "training")
        },
    }


def read_record(folder: Path) -> dict[str, Any]:
    """``study.json`` of a study folder. Raises MFMError: E_NOT_FOUND, or E_FORMAT when it is damaged."""
    record = read_json(folder / RECORD, f"Is this the folder of a study? {_ADVICE}")
    lacking = _PARTS - set(record)
    if lacking:
        raise MFMError("E_FORMAT", f"{folder / RECORD}: '{min(lacking)}' is missing. {_ADVICE}")
    if wrong := _wrong_part(record):
        raise MFMError("E_FORMAT", f"{folder / RECORD}: '{wrong}' is not as mfm_study writes it. {_ADVICE}")
    check_dataset_json(record["dataset_json"], folder / RECORD)
    return record


def _wrong_part(record: Mapping[str, Any]) -> str:
    """Name a part of ``study.json`` that is of another kind than it can be; "" if none is.

    Folders are named after arms and cells, and files after cases, so their names count too.
    """
    question, arms = record["question"], record["arms"]
    asked = record.get("asked", [])
    subjects = question.get("subjects") if isinstance(question, dict) else None
    is_right = {
        "question": isinstance(question, dict) and isinstance(question.get("tolerance_mm"), (int, float)),
        "question.subjects": isinstance(subjects, dict) and all(isinstance(name, str) for name in subjects.values()),
        "labels": _are_counts(record["labels"]),
        "seeds": _are_counts([record["seeds"]]),
        "compared": isinstance(record["compared"], list) and all(is_arm_name(name) for name in record["compared"]),
        "arms": isinstance(arms, dict) and all(is_arm_name(name) and _is_arm(arm) for name, arm in arms.items()),
        "asked": isinstance(asked, list) and all(isinstance(cell, dict) and _is_cell(cell) for cell in asked),
        "folds": isinstance(record["folds"], list)
        and all(isinstance(f, dict) and _are_counts([f.get("labels"), f.get("seed")]) for f in record["folds"]),
        "test_cases": isinstance(record["test_cases"], dict)
        and all(is_file_name(name) and _is_test_case(files) for name, files in record["test_cases"].items()),
        "library": isinstance(record["library"], dict),
        "dataset_json": isinstance(record["dataset_json"], dict),
    }
    return next((name for name, holds in is_right.items() if not holds), "")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 31 for value in values)


def _is_cell(cell: Mapping[str, Any]) -> bool:
    has_parts = set(cell) == {part.name for part in dataclasses.fields(Cell)}
    return has_parts and is_arm_name(cell["arm"]) and _are_counts([cell["num_labels"], cell["seed"]])


def _is_arm(arm: Any) -> bool:
    if not isinstance(arm, dict) or not {"file", "sha256", "settings"} <= set(arm):
        return False
    is_text = all(arm[key] is None or isinstance(arm[key], str) for key in ("file", "sha256"))
    return is_text and isinstance(arm["settings"], list) and all(isinstance(name, str) for name in arm["settings"])


def _is_test_case(files: Any) -> bool:
    return isinstance(files, dict) and isinstance(files.get("label"), str)


def write_json(file: Path, content: Any) -> None:
    """Write JSON atomically, with the folders that it needs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as handle:
        handle.write((json.dumps(content, indent=1) + "\n").encode())


def _continued(
    folder: Path, question: Question, dataset_json: Mapping[str, Any], arms: Mapping[str, Any]
) -> dict[str, Any]:
    """``study.json`` of the study that goes on in the folder; empty where nothing was trained yet.

    Raises MFMError (E_EXISTS, E_CONFIG) unless cells of this call may stand beside those that are there.
    """
    if folder.exists() and not folder.is_dir():
        raise MFMError("E_EXISTS", f"{folder}: this is a file. Give -o another folder.")
    if not (folder / RECORD).is_file():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise MFMError("E_EXISTS", f"{folder}: is not empty and holds no study. Give -o another folder.")
        return {}
    record = read_record(folder)
    if not (folder / CELLS).is_dir():  # e.g. because a bad case had to be repaired first
        return {}
    if differences := _differences(record, question, dataset_json):
        raise MFMError(
            "E_CONFIG", f"{folder}: holds a study that asks something else: {'; '.join(differences)}. {_ADVICE}"
        )
    known = {name.casefold(): name for name in record["arms"]}
    for name in arms:
        # Folders are named after arms, and some file systems do not tell upper from lower case.
        if (other := known.get(name.casefold(), name)) != name:
            raise MFMError(
                "E_CONFIG",
                f"{folder}: holds an arm '{other}'. Name '{name}' the same, or differently: NAME=CHECKPOINT.",
            )
    for name in arms.keys() & record["arms"].keys():
        for part, what in (("sha256", "another checkpoint"), ("settings", "trained with other settings")):
            if record["arms"][name].get(part) != arms[name][part]:
                raise MFMError(
                    "E_CONFIG", f"{folder}: arm '{name}' was {what}. Name this one differently: NAME=CHECKPOINT."
                )
    return record


def _differences(record: Mapping[str, Any], question: Question, dataset_json: Mapping[str, Any]) -> list[str]:
    """What decides about scores and is not as ``study.json`` says."""
    before, now = record["question"], as_json(question)
    found = [_difference(name, before.get(name), now[name]) for name in now if before.get(name) != now[name]]
    before, now = _meaning(record["dataset_json"]), _meaning(dataset_json)
    decide = [name for name in now if before[name] != now[name]]
    return found + [_difference(f"{name} in dataset.json", before[name], now[name]) for name in decide]


def _meaning(dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """What dataset.json says about the meaning of images and labels; the rest of it is for people."""
    labels = dataset_json.get("labels", {})
    has_regions = any(isinstance(values, list) for values in labels.values())
    return {
        "labels": list(labels.items()) if has_regions else labels,  # regions are painted in their order
        "regions_class_order": dataset_json.get("regions_class_order"),
        "channel_names": dataset_json.get("channel_names") or dataset_json.get("modality"),
        "file_ending": dataset_json.get("file_ending"),
        "overwrite_image_reader_writer": dataset_json.get("overwrite_image_reader_writer", "None"),
    }


def as_json(question: Question) -> dict[str, Any]:
    """The question as ``study.json`` holds it."""
    return {field.name: getattr(question, field.name) for field in dataclasses.fields(question)}


def _difference(name: str, before: Any, now: Any) -> str:
    values = f"{name} was {before}, is {now}"
    return values if len(values) < 150 else name


def _about(arm: Arm) -> dict[str, Any]:
    settings = list(arm.settings)
    if arm.checkpoint is None:
        return {"file": None, "sha256": None, "settings": settings}
    return {"file": str(arm.checkpoint), "sha256": sha256(arm.checkpoint), "settings": settings}


def _files(case: Case) -> dict[str, Any]:
    return {"images": [str(image) for image in case.images], "label": str(case.label)}


def _test_links(design: Design) -> dict[Path, Path]:
    """The links in the folder of test images, to the images and to what these need beside them.

    Raises MFMError (E_CONFIG) where two images need other files of one name, or one from outside its folder.
    """
    links: dict[Path, Path] = {}
    for case in design.test:
        pairs = dict(zip(design.test_images(case), case.images))
        for link, image in [*pairs.items()]:
            pairs.update({link.parent / name: file for name, file in _companions(link, image).items()})
        for link, file in pairs.items():
            if ".." in link.parts or links.setdefault(link, file) != file:
                raise MFMError(
                    "E_CONFIG",
                    f"{file}: belongs to test case {case.name}, and cannot be beside the other test images because of "
                    "its name. Save the test images as single files, e.g. .nrrd, .mha or .nii.gz.",
                )
    return links


def _companions(link: Path, image: Path) -> dict[str, Path]:
    """Files without which an image cannot be read, or loses its spacing, by their names beside its link."""
    found = {}
    for file in files_of(image)[1:]:
        if file.suffix == ".json":  # the spacing of a TIFF stack, which is named after the case
            found[f"{link.name[: -len('_0000') - len(link.suffix)]}.json"] = file
        elif file.is_relative_to(image.parent):  # a header with a whole path finds its voxels through the link too
            found[str(file.relative_to(image.parent))] = file
    return found


def _fold(train: list[str]) -> dict[str, list[str]]:
    """A fold that validates on one of its own training cases: nnU-Net wants one, and other labels must stay unseen."""
    return {"train": train, "val": train[:1]}
