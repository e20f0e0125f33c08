"""Reports of the jobs: collect what a job left in its folder, and write one page."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.listings import read_csv
from mfm_nnunet.data.slices import as_in_corpus, reader_of
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError
from mfm_nnunet.files import inside, read_json, read_lines, write_json
from mfm_nnunet.images.geometry import letters_of
from mfm_nnunet.images.reading import read_image
from mfm_nnunet.modalities import kind_of
from mfm_nnunet.prediction.journal import report_name, table_name
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.reports import corpus as reports
from mfm_nnunet.reports import runs
from mfm_nnunet.reports.html import FILE, Report, Section, Table, without_folders, write_report
from mfm_nnunet.reports.measures import measure, summarise_volumes
from mfm_nnunet.reports.segmentation import PredictedCase, describe_masks
from mfm_nnunet.reports.views import read_oriented, reorient
from mfm_nnunet.requests import PredictRequest
from mfm_nnunet.workspace import Workspace

LOG = "log.jsonl"
logger = logging.getLogger(__name__)

VOLUMES = "volumes.json"
"""Volumes of a fold's training masks by label, without names of cases."""
MOST_MEASURED = 200
"""Number of training masks that are measured."""
MOST_RANKED = 20
"""Number of scans to label next that a report lists."""
STATES = {"started": "died while it was predicted", "stopped": "stopped", "publishing": "stopped"}
"""Meaning of the journal's last line on a case that was neither done nor failed."""


@contextlib.contextmanager
def reported(report: Callable[[str], None], folder: Path | None = None) -> Iterator[None]:
    """Call ``report`` at the end of the block, with the reason if it ended early; the reason is raised on.

    A run in ``folder`` that was refused, so that its log did not grow, keeps the report that it has.
    """
    log = folder / LOG if folder is not None else None
    before = _changed_at(log)
    try:
        yield
    except BaseException as error:
        was_refused = isinstance(error, MFMError) and not isinstance(error, CasesFailedError)
        if was_refused and log is not None and _changed_at(log) == before:
            raise
        first_line = (str(error).splitlines() or [""])[0]
        report(first_line or type(error).__name__)
        raise
    report("")


def _changed_at(file: Path | None) -> int | None:
    return file.stat().st_mtime_ns if file is not None and file.is_file() else None


def report_corpus(here: Workspace, dataset_name: str, cases: list[Case], failures: list[CaseFailure]) -> None:
    """Describe a corpus in ``corpus_report.json``, ``.png`` and ``.html``, with an example of each modality."""
    folder = here.preprocessed / dataset_name
    file = folder / "corpus_report.json"
    measured = folder / "dataset_fingerprint.json"
    names = [file.with_suffix(suffix) for suffix in (".json", ".png", ".html")]
    if all(name.is_file() for name in names) and file.stat().st_mtime >= measured.stat().st_mtime:
        return
    fingerprint, settings = read_json(measured, "Plan the corpus again."), corpus.read_settings(here.raw / dataset_name)
    kinds = {case.name: kind_of(case.modality) for case in cases}
    content = reports.describe_corpus(fingerprint, kinds, failures, file)
    examples: dict[str, np.ndarray] = {}
    for case in cases:
        kind = kinds[case.name] or reports.UNNAMED
        if kind not in examples:
            with contextlib.suppress(MFMError):  # a file that vanished meanwhile is reported by preprocessing
                reader = reader_of(case, fingerprint["mfm"]["reader"], settings)
                image_CDHW, properties = as_in_corpus(*read_image(case.images, reader), case, settings)
                shown, letters = image_CDHW[0], letters_of(properties)
                if letters:
                    shown, _ = reorient(shown, letters, properties["spacing"])
                examples[kind] = shown[len(shown) // 2]
    reports.draw_corpus(content, dict(sorted(examples.items())), file.with_suffix(".png"))
    logger.info("%s\n%s", dataset_name, "\n".join(reports.summarise_corpus(content)))
    write_report(lambda: reports.describe_page(dataset_name, content, file.with_suffix(".png")), names[2])


def report_prediction(
    model: Model,
    model_folder: Path,
    found: Sequence[Case | CaseFailure],
    last: Mapping[str, Mapping[str, Any]],
    request: PredictRequest,
    problem: str = "",
) -> None:
    """Write the report beside the masks. ``last`` is the journal's newest line on each case."""
    file = Path(request.output_folder) / report_name(request.num_parts, request.part_id)

    def make() -> Report:
        dataset = DatasetJson.of(model.dataset_json)
        cases = [_predicted_case(item, last, dataset.file_ending, request) for item in found]
        if model.heads:
            facts, sections = _list_labels(cases, request)
        else:
            training = _find_volumes(model_folder, model.folds)
            facts, sections = describe_masks(cases, dataset.foreground, training, dataset.ignore)
        if problem:
            facts["Ended early"] = without_folders(problem)[:200]
        plans = model.plans_manager
        origin = {
            "dataset": plans.dataset_name,
            "plan": plans.plans_name,
            "folds": ", ".join(map(str, model.folds)),
            "model, SHA-256": model.sha256,
            "device": str(model.device),
        }
        settings = {name: getattr(request, name) for name in ("checkpoint_name", "step_size", "mirroring")}
        subject = f"{len(cases)} cases, predicted with a model of {plans.dataset_name}."
        return Report("Prediction", subject, facts, [*sections, runs.show_settings(settings, origin)])

    write_report(make, file)


def _predicted_case(
    item: Case | CaseFailure, last: Mapping[str, Mapping[str, Any]], ending: str, request: PredictRequest
) -> PredictedCase:
    """Describe a case by the journal's last line on it."""
    name = item.name if isinstance(item, Case) else item.case
    entry, folder = last.get(name, {}), Path(request.output_folder)
    status = str(entry.get("status", "not predicted"))
    reference = inside(Path(request.references), f"{name}{ending}") if request.references else None
    return PredictedCase(
        name,
        image=(item.slices or item.images[0]) if isinstance(item, Case) else None,
        mask=inside(folder, f"{name}{ending}"),
        reference=reference if reference is not None and reference.is_file() else None,
        status=STATES.get(status, status),
        reason=f"{entry.get('code')}: {entry.get('reason')}" if status == "failed" else "",
        warnings=entry.get("warnings", ()),
        agreement=entry.get("agreement", {}),
        seconds=entry.get("seconds"),
    )


def _list_labels(cases: Sequence[PredictedCase], request: PredictRequest) -> tuple[dict[str, Any], list[Section]]:
    """Return facts and a section on the labels of whole images in ``predictions.csv``, and on failures."""
    file = Path(request.output_folder) / table_name(request.num_parts, request.part_id)
    header, rows = read_csv(file) if file.is_file() else ([], [])
    failed = [[case.name, case.status, case.reason or "-"] for case in cases if case.status != "done"]
    tables = [Table("Predicted labels", header, [[row[name] for name in header] for row in rows])] if rows else []
    tables += [Table("Cases without a prediction", ("case", "state", "reason"), failed)] if failed else []
    good = "probabilities near 0 or 1 for most cases; those near one half deserve a look."
    return {"Cases": len(cases), "Cases done": len(rows)}, [Section("Cases", good=good, tables=tables)]


def _find_volumes(model_folder: Path, folds: Sequence[int | str]) -> dict[str, Any]:
    """Return the volumes of the training set, of the first fold that has them; empty for models without."""
    for fold in folds:
        file = model_folder / f"fold_{fold}" / VOLUMES
        if file.is_file():
            with contextlib.suppress(MFMError):
                return read_json(file, "")
    return {}


def report_training(
    here: Workspace,
    folder: Path,
    plans: Mapping[str, Any],
    dataset: DatasetJson,
    split: Mapping[str, Sequence[str]],
    problem: str = "",
) -> None:
    """Write the report of a fold of a segmentation network: curves, validation cases, weights, settings."""

    def make() -> Report:
        history, settings = _read_run(folder)
        epochs = int(plans["mfm"]["finetune"]["epochs"])
        facts, flags = runs.describe_end(len(history), epochs, problem)
        name, ending = str(plans["dataset_name"]), dataset.file_ending
        references = here.preprocessed / name / "gt_segmentations"
        training = _measure_training(folder, [inside(references, f"{c}{ending}") for c in split["train"]], dataset)
        images = _first_images(here.raw / name)
        masks = {case: inside(folder / "validation", f"{case}{ending}") for case in split["val"]}
        cases = [
            PredictedCase(case, images.get(case), mask, inside(references, mask.name),
                          "done" if mask.is_file() else "not validated")
            for case, mask in masks.items()
        ]  # fmt: skip
        more, sections = describe_masks(cases, dataset.foreground, training, dataset.ignore)
        facts |= {"Training cases": len(split["train"]), **more}
        if history:
            dice = [key for key in history[0] if key.startswith("dice_")]
            sections.insert(0, runs.show_curves(history, runs.GOOD_LOSSES + runs.GOOD_DICE, dice))
        sections = [*([Section("This run", flags=flags)] if flags else []), *sections, *_show_teaching(folder)]
        if (folder / "transfer.json").is_file():
            sections.append(runs.show_transfer(read_json(folder / "transfer.json", "")))
        sections.append(runs.show_settings(settings, {"dataset": name, "plan": plans["plans_name"]}))
        return Report(f"Training: {name}, {folder.name.replace('_', ' ')}", _SUBJECT_OF_TRAINING, facts, sections)

    write_report(make, folder / FILE)


def _show_teaching(folder: Path) -> Iterator[Section]:
    """Show which round of a student is the result, and what its teachers would have labelled next."""
    if (file := folder / "rounds.json").is_file():
        content = read_json(file, "")
        rows = [[number, dice] for number, dice in content["validation_dice"].items()]
        text = f"The model here is the student of round {content['result']}; curves are those of the last round."
        yield Section("Rounds", [text], tables=[Table("Validation Dice of each student", ("round", "Dice"), rows)])
    if files := sorted(folder.glob("pseudo_labels/round_*/next_to_label.csv")):
        header, ranked = read_csv(files[-1])
        shown = [[row[name] if name not in header[2:4] else float(row[name]) for name in header] for row in ranked]
        text = (
            f"The first {min(len(shown), MOST_RANKED)} of {len(shown)} scans without labels, in the order in which to "
            "label them: the teachers disagree there, and it is unlike what is labelled or listed before (distance 1 "
            "is usual)."
        )
        yield Section("What to label next", [text], tables=[Table("Scans to label next", header, shown[:MOST_RANKED])])


_SUBJECT_OF_TRAINING = (
    "A network, trained on one part of the labelled cases and validated on the others. Scores of "
    "validation cases tell how it does on scans like these, and nothing about scans of other machines or hospitals."
)


def report_classifier(folder: Path, problem: str = "") -> None:
    """Write the report of a fold of a classifier: scores, curves, reliability, weights, settings."""

    def make() -> Report:
        history, settings = _read_run(folder)
        file = folder / "metrics.json"
        result = read_json(file, "") if file.is_file() else {}
        scores = {name: score for name, score in result.items() if isinstance(score, Mapping) and "low" in score}
        rows = [
            [name.replace("_", " "), *(score[key] for key in ("value", "low", "high"))]
            for name, score in scores.items()
        ]
        sections = [Section("This run", flags=[f"The run ended early: {without_folders(problem)}"])] if problem else []
        if rows:
            columns = ("score", "value", "95 % from", "to")
            tables = [Table("Scores of the validation cases, with intervals over subjects", columns, rows)]
            sections.append(Section("Scores", good=_GOOD_SCORES, tables=tables))
        pictures = {
            folder / "reliability.png": "Share of hits against the stated probability, and the number of cases",
            folder / "agreement.png": "Predicted against true numbers, and their differences",
        }
        if shown := runs.show_pictures("Predictions", pictures, good="points lie near the dotted line."):
            sections.append(shown)
        sections += [runs.show_curves(history, runs.GOOD_LOSSES)] if history else []
        if (folder / "transfer.json").is_file():
            sections.append(runs.show_transfer(read_json(folder / "transfer.json", "")))
        sections.append(runs.show_settings(settings, {}))
        facts = {"Epochs": len(history), "Validation cases": result.get("num_cases")}
        title = f"Training of a classifier, {folder.name.replace('_', ' ')}"
        return Report(title, _SUBJECT_OF_TRAINING, facts, sections, "scores of your data, without pictures of patients")

    write_report(make, folder / FILE)


_GOOD_SCORES = "the lower ends of the intervals are still useful. Wide intervals mean too few cases to tell."


def _read_run(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the epochs of the log and the settings of a run, as far as they are there."""
    history = [row for row in read_lines(folder / LOG) if isinstance(row, dict)]
    file = folder / "settings.json"
    return history, read_json(file, "") if file.is_file() else {}


def _measure_training(folder: Path, files: Sequence[Path], dataset: DatasetJson) -> dict[str, Any]:
    """Measure training masks once, for the flags of this report and of later predictions."""
    file = folder / VOLUMES
    if not file.is_file():
        chosen = [mask for mask in files[:: max(1, -(-len(files) // MOST_MEASURED))] if mask.is_file()]
        measured = [measure(read_oriented(mask, is_label=True), dataset.foreground) for mask in chosen]
        write_json(file, summarise_volumes(measured))
    return read_json(file, "")


def _first_images(raw: Path) -> dict[str, Path]:
    """Return the first channel of each case of a raw dataset; empty if it is gone."""
    with contextlib.suppress(MFMError):
        return {case.name: case.images[0] for case in corpus.load_cases(raw, need_mapped_files=False) if case.images}
    return {}


def report_pretraining(folder: Path, description: Mapping[str, Any], problem: str = "") -> None:
    """Write the report of a pretraining run. ``description`` is the checkpoint's."""

    def make() -> Report:
        history, settings = _read_run(folder)
        task, about = str(description["pretext"]), description["corpus"]
        facts, flags = runs.describe_end(len(history), int(description["pretrain"]["epochs"]), problem)
        facts |= {"Task": task, "Scans": about["num_cases"], "Subjects": about["num_subjects"]}
        facts["Patch"] = " x ".join(map(str, description["patch_size"]))
        sections = [Section("This run", flags=flags)] if flags else []
        if history:
            dice = [key for key in history[0] if key.startswith("probe_dice")]
            sections.append(runs.show_curves(history, runs.GOOD_PRETRAINING, dice))
        if examples := runs.show_examples(folder, task, len(history)):
            sections.append(examples)
        papers = [str(paper) for entry in description.get("citations", ()) for paper in entry.get("apa_citations", ())]
        sections += [Section("Papers to cite", papers)] if papers else []
        sections.append(runs.show_settings(settings, {"corpus, SHA-256": about["hash"]}))
        return Report(f"Pretraining: {task}", _SUBJECT_OF_PRETRAINING, facts, sections, "pictures of patients")

    write_report(make, folder / FILE)


_SUBJECT_OF_PRETRAINING = (
    "A network that learned from scans without labels. Whether that helps is seen only after fine-tuning: compare with "
    "a training from scratch."
)
