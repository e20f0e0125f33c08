"""Folders in, folders out: every case on its own, so that one bad case never costs another.

Each state change is noted in the journal (``cases.jsonl``), masks appear whole or not at all, and what is in the output
folder is never replaced unasked. While the network works on one case, the next is read and preprocessed in the
background.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mfm_nnunet.checkpoint import atomic_write, disk_full, is_disk_full, sha256
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.loops import progress, reader_threads
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError, is_out_of_memory
from mfm_nnunet.files import inside, shown
from mfm_nnunet.predict.cases import PreparedCase, find_cases, hash_inputs, prepare_case
from mfm_nnunet.predict.export import (
    STAGING_PREFIX,
    disk_full_is_an_error,
    publish,
    require_space,
    staging,
    write_case,
)
from mfm_nnunet.predict.journal import Journal
from mfm_nnunet.predict.options import (
    ERROR_FOLDER,
    SETTINGS_FILE,
    PredictOptions,
    PredictReport,
    check_folders,
    check_options,
    check_output,
    check_previous_stage,
    warn_of_others,
)
from mfm_nnunet.predict.predictor import Model, load_model
from mfm_nnunet.version import __version__

logger = logging.getLogger(__name__)

__all__ = ["PredictOptions", "PredictReport", "predict_folder"]

STARTS_UNTIL_GIVEN_UP = 2
"""The first may have been the fault of the case that was read beside it; the second was alone."""


def predict_folder(
    model_folder: Path, input_folder: Path, output_folder: Path, options: PredictOptions | None = None
) -> PredictReport:
    """Predict every case of ``input_folder``; the masks have the exact geometry of their images.

    Raises MFMError before anything is written when the model, the folders or the options are not usable (E_NOT_FOUND,
    E_EXISTS, E_CONFIG, E_CHANNELS, E_MODEL_*), E_DISK_FULL at once, and CasesFailedError after all good cases are done.
    """
    options = options or PredictOptions()
    model_folder, input_folder, output_folder = Path(model_folder), Path(input_folder), Path(output_folder)
    check_options(options)
    check_folders(model_folder, input_folder, output_folder, options.previous_stage)
    if options.num_parts == 1:
        check_output(output_folder, [], options)
    model = load_model(model_folder, options.folds, options.checkpoint_name, options.device)
    check_previous_stage(model, options)
    found = find_cases(input_folder, model, options.previous_stage)
    names = [item.name if isinstance(item, Case) else item.case for item in found]
    if options.num_parts > 1:
        others = [name for k, name in enumerate(names) if k % options.num_parts != options.part_id]
        check_output(output_folder, others, options)
    if options.overwrite:
        warn_of_others(output_folder, {f"{name}{model.dataset_json['file_ending']}" for name in names})
    report = _Run(model, input_folder, output_folder, options).work(found[options.part_id :: options.num_parts])
    if report.failures:
        num_cases = len(report.done) + len(report.skipped) + len(report.failures)
        raise CasesFailedError(report.failures, num_cases)
    return report


class _Run:
    """One pass over the cases of a folder."""

    def __init__(self, model: Model, source: Path, folder: Path, options: PredictOptions) -> None:
        self.model, self.source, self.folder, self.options = model, source, folder, options
        self.ending: str = model.dataset_json["file_ending"]
        self.prefix = f"{STAGING_PREFIX}{options.part_id}of{options.num_parts}_"
        self.identity: dict[str, Any] = {"model": model.sha256, "settings": _settings(model, options)}
        self.report = PredictReport(output_folder=folder)
        self.begun: list[str] = []

    def work(self, found: Sequence[Case | CaseFailure]) -> PredictReport:
        """Do all cases, or fail each with its reason."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with Journal(self.folder, self.options.num_parts, self.options.part_id) as self.journal:
            for leftover in self.folder.glob(f"{self.prefix}*"):  # of a killed run; ours is the lock
                shutil.rmtree(leftover, ignore_errors=True)
            if not self.options.overwrite:
                self._require_same_maker()
            self._write_copies()
            todo = [item for item in found if isinstance(item, Case) and not self._is_settled(item)]
            for failure in (item for item in found if isinstance(item, CaseFailure)):
                self._note_failure(failure)
            # A case that was under way when an earlier run was killed may be what kills: last, and with no other.
            suspects = [case for case in todo if self.options.resume and self.journal.starts.get(case.name)]
            groups = [[case for case in todo if case not in suspects], *([case] for case in suspects)]
            try:
                with reader_threads(1) as reader:
                    ahead = itertools.chain.from_iterable(
                        _one_ahead(partial(self._begin, reader), group) for group in groups
                    )
                    for number, (case, prepared) in enumerate(ahead, start=1):
                        self._say(f"{number} of {len(todo)}  {self._attempt(case, prepared)}")
            except BaseException:
                self._note_stop()
                raise
        if self.report.warnings:
            logger.warning("look at the masks of these cases:\n  %s", "\n  ".join(self.report.warnings))
        return self.report

    def _begin(self, reader: ThreadPoolExecutor, case: Case) -> Future[PreparedCase]:
        """Prepare a case in the background; the journal knows of it before it can end the process."""
        self.journal.write(case.name, "started", **self.identity)
        self.begun.append(case.name)
        return reader.submit(prepare_case, self.model, case, self.options)

    def _note_stop(self) -> None:
        """Whoever can still say that it was stopped was not killed by the cases that were under way."""
        with contextlib.suppress(OSError, MFMError):
            for name in self.begun:
                if self.journal.last[name]["status"] == "started":
                    self.journal.write(name, "stopped", **self.identity)

    def _require_same_maker(self) -> None:
        """Masks of two models, or of other settings, are not mixed; nor is dataset.json exchanged, which names labels.

        Raises MFMError (E_EXISTS).
        """
        before = self.journal.newest
        if not self.journal.written or all(before.get(key) == value for key, value in self.identity.items()):
            return
        maker = "another model"
        if before.get("model") == self.identity["model"]:
            old, new = before.get("settings", {}), self.identity["settings"]
            changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
            maker = f"other settings ({', '.join(changes)})"
        raise MFMError(
            "E_EXISTS",
            f"{self.folder}: the masks in it were made with {maker}. Choose another folder, or replace them with "
            "--overwrite.",
        )

    def _is_settled(self, case: Case) -> bool:
        """Whether a case needs no work: it was done before, or its file may not be replaced."""
        if not self.options.resume:
            return False
        if self.journal.starts.get(case.name, 0) >= STARTS_UNTIL_GIVEN_UP:
            reason = (
                f"the process died {self.journal.starts[case.name]} times while it worked on this case, the last time "
                "on nothing else: it was killed, e.g. because memory ran out, or a library crashed on the file. Add "
                "memory, crop the image or export it again; --resume then tries it again."
            )
            self._note_failure(CaseFailure(case.name, "E_PROCESS_DIED", reason))
            return True
        known = case.name in self.journal.last
        try:
            expected = {**self.identity, "input": hash_inputs(case) if known else {}}
            is_done = self.journal.is_done(case.name, self.folder, self._output_names(case.name), expected)
        except MFMError as error:
            self._note_failure(CaseFailure(case.name, error.code, error.message))
            return True
        if is_done:
            if self.journal.last[case.name]["status"] != "done":  # killed between renaming and the last line
                self.journal.write(**{**self.journal.last[case.name], "status": "done"})
            self.report.skipped.append(case.name)
            self._warn(case.name, self.journal.last[case.name].get("warnings", ()))
        return is_done

    def _attempt(self, case: Case, prepared: Future[PreparedCase]) -> str:
        """Predict one case; returns a line about how it went. Only what concerns all cases is raised."""
        start = time.perf_counter()
        try:
            self._predict(case, prepared, start)
        except Exception as error:
            failure = self._explain(case.name, error)
            if failure.code == "E_DISK_FULL":
                raise MFMError(failure.code, failure.reason) from error
            self._note_failure(failure, time.perf_counter() - start)
            return str(failure)
        with contextlib.suppress(OSError):  # an old report that cannot be removed makes no mask worse
            inside(self.folder, ERROR_FOLDER, f"{case.name}.txt").unlink(missing_ok=True)
        self.report.done.append(case.name)
        return f"{case.name}: done in {time.perf_counter() - start:.1f} s"

    def _predict(self, case: Case, prepared: Future[PreparedCase], start: float) -> None:
        self.model.oom_steps.clear()
        with progress(0, f"{case.name}: reading"):
            ready = prepared.result()
        require_space(self.folder / f"{case.name}{self.ending}", ready.properties)
        logits = self.model.predict_logits(
            ready.x_CDHW, step_size=self.options.step_size, mirroring=self.options.mirroring, what=case.name
        )
        with progress(0, f"{case.name}: writing the mask"), staging(self.folder, self.prefix) as stage:
            write_case(
                logits,
                ready.properties,
                self.model.managers,
                inside(stage, case.name),
                self.ending,
                header=ready.header,
                save_probabilities=self.options.save_probabilities,
            )
            entry = {
                **self.identity,
                "input": ready.input_hashes,
                "output": {file.name: sha256(file) for file in sorted(stage.iterdir())},
                "seconds": round(time.perf_counter() - start, 3),
                "memory_steps": list(self.model.oom_steps),
                "warnings": list(ready.warnings),
                "versions": _versions(self.model.device),
            }
            # Before the files get their names: a run that is killed now must still know them as its own.
            self.journal.write(case.name, "publishing", code="", reason="", **entry)
            self._remove_outdated(case.name, stage)
            publish(stage, self.folder)
        self.journal.write(case.name, "done", code="", reason="", **entry)
        self._warn(case.name, ready.warnings)

    def _warn(self, name: str, warnings: Sequence[str]) -> None:
        self.report.warnings.extend(f"{name}: {warning}" for warning in warnings)

    def _remove_outdated(self, name: str, stage: Path) -> None:
        """Old probabilities of a case do not stay beside a new mask."""
        for old in (inside(self.folder, output) for output in _output_names(name, self.ending, True)):
            if not os.path.isfile(old) or os.path.exists(stage / old.name):
                continue
            if self.options.overwrite or sha256(old) in self.journal.written.get(old.name, ()):
                old.unlink()

    def _explain(self, name: str, error: Exception) -> CaseFailure:
        """The failure of a case; an unexpected one leaves its traceback in a file."""
        if isinstance(error, MFMError):
            return CaseFailure(name, error.code, error.message)
        if is_out_of_memory(error):
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            return CaseFailure(name, "E_OOM", "not enough memory for this case. Try -device cpu, or more memory.")
        if is_disk_full(error):
            return CaseFailure(name, "E_DISK_FULL", disk_full(self.folder).message)
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}"
        details = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        file = inside(self.folder, ERROR_FOLDER, f"{name}.txt")
        try:
            with disk_full_is_an_error(file):
                file.parent.mkdir(exist_ok=True)
                with atomic_write(file) as handle:
                    handle.write(shown(details).encode())
        except OSError:  # the folder is somebody else's, or a file; the traceback then goes to the command's log
            return CaseFailure(name, "E_INTERNAL", reason, details)
        return CaseFailure(name, "E_INTERNAL", f"{reason} (traceback: {ERROR_FOLDER}/{file.name})")

    def _note_failure(self, failure: CaseFailure, seconds: float = 0.0) -> None:
        stale = [name for name in self._output_names(failure.case) if os.path.exists(self.folder / name)]
        if stale and failure.code != "E_CHANGED":
            reason = f"{failure.reason} Attention: {stale[0]} in the output folder is from an earlier run."
            failure = replace(failure, reason=reason)
        logger.debug("%s", failure)
        self.report.failures.append(failure)
        # The journal is passed on together with the masks: it names files and not where they lie.
        reason = failure.reason.replace(f"{self.source}{os.sep}", "").replace(f"{self.folder}{os.sep}", "")
        fields = {"code": failure.code, "reason": reason, "seconds": round(seconds, 3)}
        self.journal.write(failure.case, "failed", **self.identity, **fields)

    def _output_names(self, name: str) -> list[str]:
        return _output_names(name, self.ending, self.options.save_probabilities)

    def _write_copies(self) -> None:
        """What nnU-Net's post-processing, evaluation and ensembling look for beside the masks."""
        copies = {
            "dataset.json": self.model.dataset_json,
            "plans.json": self.model.plans_manager.plans,
            SETTINGS_FILE: {
                **self.identity,
                "device": str(self.model.device),
                "versions": _versions(self.model.device),
            },
        }
        for name, content in copies.items():
            with atomic_write(self.folder / name) as file:
                file.write(json.dumps(content, indent=4).encode())

    def _say(self, line: str) -> None:
        if self.options.progress is not None:
            self.options.progress(line)
        else:
            logger.info("%s", line)


def _one_ahead(
    begin: Callable[[Case], Future[PreparedCase]], cases: Sequence[Case]
) -> Iterator[tuple[Case, Future[PreparedCase]]]:
    """Each case with its preparation; that of the next case is already under way."""
    waiting: tuple[Case, Future[PreparedCase]] | None = None
    for case in cases:
        submitted = (case, begin(case))
        if waiting is not None:
            yield waiting
        waiting = submitted
    if waiting is not None:
        yield waiting


def _settings(model: Model, options: PredictOptions) -> dict[str, Any]:
    """What decides about the masks, apart from model and images; JSON values, no paths."""
    return {
        "folds": list(model.folds),
        "checkpoint_name": options.checkpoint_name,
        "step_size": options.step_size,
        "mirroring": options.mirroring,
        "save_probabilities": options.save_probabilities,
        "cascade": options.previous_stage is not None,
    }


def _versions(device: torch.device) -> dict[str, str]:
    names = {"mfm_nnunet": __version__, "nnunetv2": version("nnunetv2"), "torch": torch.__version__}
    return {**names, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def _output_names(name: str, ending: str, save_probabilities: bool) -> list[str]:
    return [f"{name}{ending}", *([f"{name}.npz", f"{name}.pkl"] if save_probabilities else [])]
