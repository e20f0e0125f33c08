"""Predict the cases of a folder independently, so that one bad case never costs another.

Each state change is recorded in the journal (``cases.jsonl``), masks are written atomically, and files in the output
folder are replaced only on request. While the network works on one case, the next is read and preprocessed in the
background.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.dicom import find_series, require_choice, write_key
from mfm_nnunet.data.loops import attempt, one_ahead, reader_threads
from mfm_nnunet.data.storage import STAGING_PREFIX, staging
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.device import describe_versions, fast_dtype
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError, about, nearest
from mfm_nnunet.fields import takes
from mfm_nnunet.files import atomic_write, inside, report_full_disk, require_unicode, sha256, shown, write_json
from mfm_nnunet.images import decoder
from mfm_nnunet.images.reading import read_label
from mfm_nnunet.jobs.dry_run import describe_prediction
from mfm_nnunet.jobs.predict_image import predict_image
from mfm_nnunet.jobs.report import report_prediction, reported
from mfm_nnunet.prediction import dicom_seg
from mfm_nnunet.prediction.cases import (
    PreparedCase,
    case_name_of,
    check_previous_stage,
    find_cases,
    hash_inputs,
    prepare_case,
)
from mfm_nnunet.prediction.classification import ENDING as LABELS_ENDING
from mfm_nnunet.prediction.classification import write_labels, write_table
from mfm_nnunet.prediction.export import publish, require_space, write_case
from mfm_nnunet.prediction.journal import ERROR_FOLDER, SETTINGS_FILE, Journal, check_output, table_name, warn_of_others
from mfm_nnunet.prediction.model import Model, load_model
from mfm_nnunet.prediction.selection import choose_outputs, describe_choice
from mfm_nnunet.reports.progress import track
from mfm_nnunet.requests import PredictRequest
from mfm_nnunet.terminal import html_table
from mfm_nnunet.workspace import DEFAULT_PLAN, Workspace, only_one, use

logger = logging.getLogger(__name__)

PROBABILITIES = (".npz", ".pkl")
"""Endings of nnU-Net's files of probabilities."""
STARTS_UNTIL_GIVEN_UP = 2
"""The first crash may have been caused by the case prepared in parallel; the second attempt runs alone."""


@dataclass(frozen=True)
class PredictReport:
    """Names of the predicted cases and of those done before, and the failures."""

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[CaseFailure] = field(default_factory=list)
    output_folder: Path = Path()
    warnings: list[str] = field(default_factory=list)
    """Peculiarities of images whose masks were written all the same."""
    table: Path | None = None
    """``predictions.csv`` of a classifier."""

    def _repr_html_(self) -> str:
        """Return a table of the cases for notebooks."""
        rows = [(case, "done") for case in self.done] + [(case, "kept") for case in self.skipped]
        return html_table(("case", "outcome"), rows + [(f.case, f"{f.code} {f.reason}") for f in self.failures])


@takes(PredictRequest)
def predict(request: PredictRequest) -> Any:
    """Segment, or classify, every case of a folder, a file or a zip archive of DICOM series.

    The masks have the exact geometry of their images and the file ending of the model's dataset.

    In place of a folder it takes one image in memory, without an output folder, and returns its mask: a SimpleITK or
    nibabel image, or an array (axes Z Y X, with channels first if there are several) with its ``spacing`` in mm.

    The model is given by its folder, or by its dataset, configuration, plan and trainer. A non-empty output folder is
    refused without ``overwrite`` or ``resume``. Raises MFMError before anything is written when model, folders or
    options are not usable, E_DISK_FULL at once, and CasesFailedError after all good cases are done.
    """
    decoder.warm()
    with use(request.workspace) as here:
        model_folder = Path(request.model_folder) if request.model_folder else _find_model(here, request)
        if request.output_folder is None:
            return predict_image(request, lambda asked: _predict_folder(model_folder, asked), model_folder)
        report = _predict_folder(model_folder, request)
    if report.failures:
        num_cases = len(report.done) + len(report.skipped) + len(report.failures)
        raise CasesFailedError(report.failures, num_cases)
    return report


def _find_model(here: Workspace, request: PredictRequest) -> Path:
    assert request.dataset is not None
    results, plans = inside(here.results, here.dataset_name(request.dataset)), request.plans_name
    if plans is None:
        found = results.glob(f"{request.trainer}*__*__{request.configuration}") if results.is_dir() else ()
        others = sorted({entry.name.split("__")[1] for entry in found if entry.name.count("__") == 2})
        plans = only_one(others, DEFAULT_PLAN, "model's plan", f"the only one with a model in {results.name}", "-p")
    name = f"{request.trainer}__{plans}__{request.configuration}"
    folder = inside(results, name)
    classifiers = sorted(folder.parent.glob(f"{name.replace('__', '_*__', 1)}")) if folder.parent.is_dir() else []
    if not folder.is_dir() and len(classifiers) == 1:
        return classifiers[0]
    if not folder.is_dir() and classifiers:
        names = " or ".join(found.name.partition("__")[0] for found in classifiers)
        raise MFMError("E_NOT_FOUND", f"{folder}: there are classifiers with several heads. Name one: -tr {names}.")
    if not folder.is_dir():
        existing = [entry.name for entry in folder.parent.glob("*__*__*")] if folder.parent.is_dir() else []
        advice = nearest(folder.name, existing) if existing else here.where_else("results")
        raise MFMError("E_NOT_FOUND", f"{folder}: no such model. {advice}")
    return folder


def _predict_folder(model_folder: Path, request: PredictRequest) -> PredictReport:
    source, folder = Path(request.input_folder), Path(request.output_folder)
    previous_stage = Path(request.previous_stage) if request.previous_stage else None
    _check_folders(source, folder, model_folder, previous_stage)
    if request.references and not Path(request.references).is_dir():
        raise MFMError("E_NOT_FOUND", f"--references {request.references}: no such folder. Check the path.")
    if request.dicom_seg:
        dicom_seg.load_highdicom()
    if request.num_parts == 1:
        check_output(folder, [], request)
    model = load_model(model_folder, request.folds, request.checkpoint_name, request.device)
    model = choose_outputs(model, request.classes, request.classes_of, request.modality)
    model.cpu_dtype = fast_dtype(model.device) if request.fast else None
    check_previous_stage(model, previous_stage)
    with find_series(source, request.series or ()) as series:
        require_choice(series, request.series or ())
        found = find_cases(source, model, previous_stage, series)
        if request.dicom_seg and not series:
            raise MFMError("E_CONFIG", f"--dicom-seg: {source} holds no DICOM series to refer to. Leave it out.")
        if request.key_file is not None and not request.dry_run:
            write_key(Path(request.key_file), series, source)
        names = [case_name_of(item) for item in found]
        if request.num_parts > 1:
            others = [name for k, name in enumerate(names) if k % request.num_parts != request.part_id]
            check_output(folder, others, request)
        if request.dry_run:
            describe_prediction(model, found, request)
            return PredictReport(output_folder=folder)
        if request.overwrite:
            warn_of_others(folder, {f"{name}{model.dataset_json['file_ending']}" for name in names})
        run, own = _Run(model, source, folder, request), found[request.part_id :: request.num_parts]

        def report(problem: str) -> None:
            if request.report and run.is_begun:
                report_prediction(model, model_folder, own, run.journal.last, request, problem)

        with reported(report):
            return run.work(own)


def _check_folders(source: Path, folder: Path, model_folder: Path, previous_stage: Path | None) -> None:
    """Refuse an input that does not exist, and an output that is one of the other folders."""
    if not source.is_dir() and not source.is_file():
        reason = "this is a pipe or device." if source.exists() else "no such input folder or file. Check the path."
        raise MFMError("E_NOT_FOUND", f"{source}: {reason}")
    target = folder.resolve()
    taken = {"model folder": model_folder, "folder of the previous stage's masks": previous_stage}
    clash = next((name for name, other in taken.items() if other is not None and target == other.resolve()), None)
    if source.resolve() in (target, *target.parents):
        clash = "input folder or inside it"
    if clash:
        raise MFMError("E_CONFIG", f"{folder}: the output folder is the {clash}. Choose another.")
    require_unicode(folder, "the output folder")
    if folder.exists() and not folder.is_dir():
        raise MFMError("E_EXISTS", f"{folder}: this is a file. Give a folder for the masks.")


class _Run:
    """One pass over the cases of a folder. The methods follow the life of a case."""

    journal: Journal

    def __init__(self, model: Model, source: Path, folder: Path, request: PredictRequest) -> None:
        if model.heads:  # a classifier's output is its probabilities
            request = replace(request, save_probabilities=False)
        self.model, self.source, self.folder, self.request = model, source, folder, request
        self.ending: str = LABELS_ENDING if model.heads else model.dataset_json["file_ending"]
        self.prefix = f"{STAGING_PREFIX}{request.part_id}of{request.num_parts}_"
        settings = {
            "folds": list(model.folds),
            "checkpoint_name": request.checkpoint_name,
            "step_size": request.step_size,
            "mirroring": request.mirroring,
            "save_probabilities": request.save_probabilities,
            "cascade": request.previous_stage is not None,
            **({"precision": "bf16"} if model.cpu_dtype else {}),
            **describe_choice(request.classes, request.classes_of, request.modality),
        }
        self.identity: dict[str, Any] = {"model": model.sha256, "settings": settings}
        """Model and settings: they and the images determine the masks. JSON values without paths."""
        self.report = PredictReport(output_folder=folder)
        self.begun: list[str] = []
        self.is_begun = False
        """True once the folder is ours to write to."""

    def work(self, found: Sequence[Case | CaseFailure]) -> PredictReport:
        """Predict all cases, or record why they failed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with Journal(self.folder, self.request.num_parts, self.request.part_id) as self.journal:
            for leftover in self.folder.glob(f"{self.prefix}*"):  # of a killed run: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            if not self.request.overwrite:
                self.journal.require_same_maker(self.identity)
            self.is_begun = True
            self._write_copies()
            todo = [item for item in found if isinstance(item, Case) and not self._is_settled(item)]
            for failure in (item for item in found if isinstance(item, CaseFailure)):
                self._fail(failure)
            # A case in progress when an earlier run was killed may have been the cause: it comes last, and runs alone.
            suspects = [case for case in todo if self.request.resume and self.journal.starts.get(case.name)]
            groups = [[case for case in todo if case not in suspects], *([case] for case in suspects)]
            try:
                with reader_threads(1) as reader, track("predicting", len(todo), lines=False) as advance:
                    ahead = itertools.chain.from_iterable(
                        one_ahead(partial(self._begin, reader), group) for group in groups
                    )
                    for number, (case, prepared) in enumerate(ahead, start=1):
                        outcome = self._attempt(case, prepared)
                        advance()
                        logger.info("%d of %d  %s; about %s left", number, len(todo), outcome, advance.left())
            except BaseException:
                self._note_stop()
                raise
            if self.model.heads:
                name = table_name(self.request.num_parts, self.request.part_id)
                write_table(self.model, self.folder, [*self.report.done, *self.report.skipped], name)
                self.report = replace(self.report, table=self.folder / name)
        if self.report.warnings:
            logger.warning("check the masks of these cases:\n  %s", "\n  ".join(self.report.warnings))
        return self.report

    def _write_copies(self) -> None:
        """Write the files that nnU-Net's post-processing, evaluation and ensembling expect next to the masks."""
        copies = {
            "dataset.json": self.model.dataset_json,
            "plans.json": self.model.plans_manager.plans,
            SETTINGS_FILE: self.identity
            | {"device": str(self.model.device), "versions": describe_versions(self.model.device)},
        }
        for name, content in copies.items():
            write_json(self.folder / name, content, indent=4)

    def _is_settled(self, case: Case) -> bool:
        """Check if a case needs no work: it was done before, or its file may not be replaced."""
        if not self.request.resume:
            return False
        starts = self.journal.starts.get(case.name, 0)
        if starts >= STARTS_UNTIL_GIVEN_UP:
            reason = (
                f"the process died {starts} times while it worked on this case, the last time on nothing else: it was "
                "killed, e.g. because memory ran out, or a library crashed on the file. Add memory, crop the image or "
                "export it again; --resume then tries it again."
            )
            self._fail(CaseFailure(case.name, "E_PROCESS_DIED", reason))
            return True
        last = self.journal.last.get(case.name)
        try:
            expected = {**self.identity, "input": hash_inputs(case) if last else {}}
            is_done = self.journal.is_done(case.name, self._output_names(case.name, case.slices), expected)
        except MFMError as error:
            self._fail(CaseFailure(case.name, error.code, error.message))
            return True
        if is_done and last:
            if last["status"] != "done":  # killed between renaming and the last line
                self.journal.write(**{**last, "status": "done"})
            self.report.skipped.append(case.name)
            self._warn(case.name, last.get("warnings", ()))
        return is_done

    def _begin(self, reader: ThreadPoolExecutor, case: Case) -> Future[PreparedCase]:
        """Prepare a case in the background. Record it in the journal first, as it may kill the process."""
        self.begun.append(case.name)
        self.journal.write(case.name, "started", **self.identity)
        return reader.submit(prepare_case, self.model, case, self.request)

    def _attempt(self, case: Case, prepared: Future[PreparedCase]) -> str:
        """Predict one case and return a line on the outcome. Only errors that affect all cases are raised."""
        start = time.perf_counter()

        def work(case: Case) -> None:
            with report_full_disk(self.folder):
                self._predict(case, prepared, start)

        failure = attempt(work, case)
        if failure is not None:
            failure = self._explain(failure)
            self._fail(failure, time.perf_counter() - start)
            return str(failure)
        with contextlib.suppress(OSError):  # an old report left behind does no harm to the mask
            inside(self.folder, ERROR_FOLDER, f"{case.name}.txt").unlink(missing_ok=True)
        self.report.done.append(case.name)
        return f"{case.name}: done in {time.perf_counter() - start:.1f} s"

    def _predict(self, case: Case, prepared: Future[PreparedCase], start: float) -> None:
        model = self.model
        model.oom_steps.clear()
        with track(f"{case.name}: reading"):
            ready = prepared.result()
        require_space(self.folder / f"{case.name}{self.ending}", ready.properties)
        write = self._write_labels if model.heads else self._write_mask
        with staging(self.folder, self.prefix) as stage:
            write(case, ready, stage)
            entry = {
                **self.identity,
                "input": ready.input_hashes,
                "output": {file.name: sha256(file) for file in sorted(stage.iterdir())},
                "seconds": round(time.perf_counter() - start, 3),
                "memory_steps": list(model.oom_steps),
                **({"agreement": model.agreement} if model.agreement else {}),
                "warnings": list(ready.warnings),
                "versions": describe_versions(model.device),
            }
            # Before the files get their final names: a run killed now must still recognise them as its own.
            self.journal.write(case.name, "publishing", code="", reason="", **entry)
            self._remove_outdated(case.name, stage)
            publish(stage, self.folder)
        self.journal.write(case.name, "done", code="", reason="", **entry)
        self._warn(case.name, ready.warnings)

    def _write_mask(self, case: Case, ready: PreparedCase, stage: Path) -> None:
        model, request = self.model, self.request
        logits = model.predict_logits(
            ready.x_CDHW, step_size=request.step_size, mirroring=request.mirroring, what=case.name
        )
        with track(f"{case.name}: writing the mask"):
            write_case(
                logits, ready.properties, model.managers, inside(stage, case.name), self.ending, header=ready.header,
                save_probabilities=request.save_probabilities,
                values=model.selection.values if model.selection else None,
            )  # fmt: skip
            if request.dicom_seg and case.slices:
                self._write_segmentation(case, stage)

    def _write_segmentation(self, case: Case, stage: Path) -> None:
        reader = self.model.plans_manager.plans["image_reader_writer"]
        mask_1DHW, _ = read_label(inside(stage, f"{case.name}{self.ending}"), reader)
        labels = DatasetJson.of(self.model.dataset_json).foreground
        target = inside(stage, f"{case.name}{dicom_seg.ENDING}")
        with about(case.name):
            dicom_seg.write_segmentation(mask_1DHW[0], case.slices, labels, self.model.sha256, target)

    def _write_labels(self, case: Case, ready: PreparedCase, stage: Path) -> None:
        predicted_K = self.model.predict_labels(ready.x_CDHW)
        write_labels(self.model.heads[0], predicted_K, inside(stage, f"{case.name}{self.ending}"))

    def _remove_outdated(self, name: str, stage: Path) -> None:
        """Remove old probabilities and segmentations of a case, which do not match its new mask."""
        endings = (self.ending, *PROBABILITIES, dicom_seg.ENDING)
        for old in (inside(self.folder, f"{name}{ending}") for ending in endings):
            if not os.path.isfile(old) or os.path.exists(stage / old.name):
                continue
            if self.request.overwrite or sha256(old) in self.journal.written.get(old.name, ()):
                old.unlink()

    def _warn(self, name: str, warnings: Sequence[str]) -> None:
        self.report.warnings.extend(f"{name}: {warning}" for warning in warnings)

    def _explain(self, failure: CaseFailure) -> CaseFailure:
        """Add the remedy for a lack of memory; write the traceback of an unexpected error to a file."""
        if failure.code == "E_OOM":
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            return replace(failure, reason="not enough memory for this case. Try -device cpu, or more memory.")
        if failure.code != "E_INTERNAL":
            return failure
        file = inside(self.folder, ERROR_FOLDER, f"{failure.case}.txt")
        try:
            with report_full_disk(file):
                file.parent.mkdir(exist_ok=True)
                with atomic_write(file) as handle:
                    handle.write(shown(failure.details).encode())
        except OSError:  # no permission, or a file in its place; the traceback then goes to the command's log
            return failure
        return replace(failure, reason=f"{failure.reason} (traceback: {ERROR_FOLDER}/{file.name})", details="")

    def _output_names(self, case: str, slices: Sequence[Path] = ()) -> list[str]:
        endings = [self.ending, *(PROBABILITIES if self.request.save_probabilities else ())]
        endings += [dicom_seg.ENDING] if self.request.dicom_seg and slices else []
        return [f"{case}{ending}" for ending in endings]

    def _fail(self, failure: CaseFailure, seconds: float = 0.0) -> None:
        stale = [name for name in self._output_names(failure.case) if os.path.exists(self.folder / name)]
        if stale and failure.code != "E_CHANGED":
            reason = f"{failure.reason} Note: {stale[0]} in the output folder is from an earlier run."
            failure = replace(failure, reason=reason)
        self.report.failures.append(failure)
        # The journal is shared together with the masks, so it contains file names but no folders.
        reason = failure.reason.replace(f"{self.source}{os.sep}", "").replace(f"{self.folder}{os.sep}", "")
        fields = {"code": failure.code, "reason": reason, "seconds": round(seconds, 3)}
        self.journal.write(failure.case, "failed", **self.identity, **fields)

    def _note_stop(self) -> None:
        """Record that the cases in progress were stopped: they did not kill the process."""
        with contextlib.suppress(OSError, MFMError):
            for name in self.begun:
                if self.journal.last.get(name, {}).get("status") == "started":
                    self.journal.write(name, "stopped", **self.identity)
