"""From scans to preprocessed data: register a corpus, take fingerprints, plan, and preprocess as planned."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mfm_nnunet import workspace as places
from mfm_nnunet.data import corpus
from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.label_table import FILE as TABLE
from mfm_nnunet.data.label_table import read_label_table
from mfm_nnunet.data.labelled import warn_of_differences
from mfm_nnunet.data.preprocess import preprocess_dataset
from mfm_nnunet.dataset import IMAGE_TASKS, DatasetJson
from mfm_nnunet.errors import CaseFailure, CasesFailedError, MFMError, about, dataset_refused
from mfm_nnunet.fields import takes
from mfm_nnunet.files import atomic_write, parse_json, write_json
from mfm_nnunet.images import decoder
from mfm_nnunet.interchange.foreign import require_plan
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
from mfm_nnunet.jobs.dry_run import scratch_workspace
from mfm_nnunet.jobs.registration import register
from mfm_nnunet.jobs.report import report_corpus
from mfm_nnunet.jobs.universal import name_of_union, register_union
from mfm_nnunet.models.families import family_named
from mfm_nnunet.models.networks import check_architecture
from mfm_nnunet.plan import ARCHITECTURE_KEYS, INTENSITIES, Plan
from mfm_nnunet.planning import like
from mfm_nnunet.planning.derive import Decision, format_table
from mfm_nnunet.planning.fingerprint import extract_fingerprint
from mfm_nnunet.planning.like import Template
from mfm_nnunet.planning.mixed import kinds_of
from mfm_nnunet.planning.planner import MFMPlanner
from mfm_nnunet.requests import PlanRequest
from mfm_nnunet.terminal import Rows, html_table
from mfm_nnunet.workspace import Workspace

logger = logging.getLogger(__name__)

FINGERPRINT = {
    *("spacings", "shapes_after_crop", "median_relative_size_after_cropping"),
    "foreground_intensity_properties_per_channel",
}
"""Keys of a fingerprint that planning reads."""


@takes(PlanRequest)
def plan_and_preprocess(request: PlanRequest) -> list[PlanResult]:
    """Plan and preprocess labelled datasets or unlabelled corpora, and reuse finished work.

    ``images`` registers a corpus of scans, which are not copied. Raises MFMError for bad input; a labelled dataset with
    any bad case is refused, and all of them are listed. If single cases of a corpus fail, the others are finished
    first; then CasesFailedError is raised.
    """
    decoder.warm()
    if request.like is not None:
        request = replace(request, like=find_checkpoint(request.like))
    source = check_request(request)  # before hours of reading
    configurations = None if request.configurations is None else tuple(request.configurations)
    results, failures, num_cases = Rows(), [], 0
    with places.use(request.workspace) as here:
        if request.num_parts > 1:
            return [_preprocess_part(here, dataset, request, configurations) for dataset in request.datasets]
        if request.dry_run:
            return _rehearse(here, request, source)
        for dataset in request.datasets:
            left_out: list[CaseFailure] = []
            dataset_name, own, own_source = _register(here, dataset, request, source, left_out)
            cases, failed = fingerprint(here, dataset_name, request.num_processes)
            failed = [*left_out, *failed]
            num_cases += len(cases) + len(failed)
            if corpus.is_corpus(here.raw_folder(dataset_name)):
                report_corpus(here, dataset_name, cases, failed)
            result = plan(here, dataset_name, own, own_source)
            logger.info("%s\n%s", dataset_name, format_table(result.decisions))
            logger.info("plan written to %s", result.file)
            if request.preprocess:
                failed += preprocess(here, dataset_name, cases, result, configurations, request.num_processes)
            results.append(result)
            failures += failed
    if failures:
        raise CasesFailedError(failures, num_cases)
    return results


def _preprocess_part(
    here: Workspace, dataset: str | int, request: PlanRequest, configurations: tuple[str, ...] | None
) -> PlanResult:
    """Preprocess this command's share of the cases with the plan that is there; nothing else is written."""
    name = here.dataset_name(dataset)
    plans_name = here.choose_plan(name, request.plans_name)
    file = here.preprocessed / name / f"{plans_name}.json"
    plan_it = f"Plan first: mfm_plan_and_preprocess -d {dataset} --no_pp"
    cases = corpus.load_cases(here.raw_folder(name))
    known = _known_fingerprint(file.with_name("dataset_fingerprint.json"))
    if known.get("signature") != _signature(cases, corpus.read_dataset_json(here.raw_folder(name))):
        raise MFMError("E_NOT_FOUND", f"{name} was not planned, or has changed since. {plan_it}.")
    result = PlanResult(dict(Plan.read(file, plan_it + ".").content), file, [])
    cases, failed = fingerprint(here, name, request.num_processes)
    part = request.part_id, request.num_parts
    failed = preprocess(here, name, cases, result, configurations, request.num_processes, part)
    if failed:
        raise CasesFailedError(failed, len(cases[part[0] :: part[1]]))
    return result


def _register(
    here: Workspace, dataset: str | int, request: PlanRequest, source: Template | None, left_out: list[CaseFailure]
) -> tuple[str, PlanRequest, Template | None]:
    """Register a dataset or a union. Returns its name, and the request and the template to plan it with."""
    if (union := name_of_union(here, dataset, request)) is None:
        return register(here, dataset, request, left_out), request, source
    own = register_union(here, union, request)
    return union, own, source if own.like == request.like else check_request(own)


def _rehearse(here: Workspace, request: PlanRequest, source: Template | None) -> list[PlanResult]:
    """Plan in a scratch workspace and say what would be written. Returns the plans with their final places."""
    results = Rows()
    for dataset in request.datasets:
        with scratch_workspace(here) as scratch:
            left_out: list[CaseFailure] = []
            quiet = replace(request, key_file=None)
            dataset_name, own, own_source = _register(scratch, dataset, quiet, source, left_out)
            cases, failed = fingerprint(scratch, dataset_name, request.num_processes)
            failed = [*left_out, *failed]
            result = plan(scratch, dataset_name, own, own_source)
            is_corpus = corpus.is_corpus(scratch.raw / dataset_name)
        result = replace(result, file=here.preprocessed / dataset_name / result.file.name)
        logger.info("%s\n%s", dataset_name, format_table(result.decisions))
        for failure in failed:
            logger.warning("would be left out: %s", failure)
        asked = None if request.configurations is None else tuple(request.configurations)
        names = ", ".join(_to_preprocess(result.plans, asked, is_corpus)) if request.preprocess else "nothing"
        text = "dry run: nothing was written. It would write %s, and preprocess %d cases for: %s"
        logger.info(text, result.file, len(cases), names)
        results.append(result)
    return results


def fingerprint(here: Workspace, dataset_name: str, num_processes: int | None) -> tuple[list[Case], list[CaseFailure]]:
    """Update ``dataset_fingerprint.json`` and return the good cases and, for a corpus, the failed ones."""
    raw, preprocessed = here.raw_folder(dataset_name), here.preprocessed / dataset_name
    cases, dataset_json = corpus.load_cases(raw), corpus.read_dataset_json(raw)
    is_corpus = corpus.is_corpus(raw)
    if not is_corpus:
        warn_of_differences(raw, dataset_json, cases)
    unlabelled = [case.name for case in cases if case.label is None]
    if 0 < len(unlabelled) < len(cases):
        raise MFMError(
            "E_NOT_FOUND",
            f"{raw / 'dataset.json'}: {len(unlabelled)} of {len(cases)} cases have no label, e.g. {unlabelled[0]}. Add "
            "the labels, or remove these cases.",
        )
    file = preprocessed / "dataset_fingerprint.json"
    known = _known_fingerprint(file)
    signature = _signature(cases, dataset_json)
    if known.get("signature") == signature:
        failures = [CaseFailure(*failure) for failure in known["failures"]]
    else:
        try:
            content, failures = extract_fingerprint(cases, dataset_json, num_processes or places.num_cores())
            if failures and not is_corpus:
                raise CasesFailedError(failures, len(cases))
        except CasesFailedError as error:
            if is_corpus:
                raise
            raise dataset_refused(dataset_name, error.failures, len(cases), "; nothing was planned") from error
        content["mfm"] = {
            **content.get("mfm", {}),
            "signature": signature,
            "failures": [[failure.case, failure.code, failure.reason] for failure in failures],
        }
        preprocessed.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    # Stored with the data, so that pretraining knows subjects and modalities on a machine without the raw scans.
    for name in ("dataset.json", "corpus.json") if is_corpus else ("dataset.json",):
        beside = dataset_json if name == "dataset.json" else _content(raw / name)
        if _content(preprocessed / name) != beside:
            write_json(preprocessed / name, beside)
    if DatasetJson.of(dataset_json).task in IMAGE_TASKS:
        _keep_labels(raw, preprocessed, dataset_json, cases)
    bad = {failure.case for failure in failures}
    return [case for case in cases if case.name not in bad], failures


def _signature(cases: list[Case], dataset_json: dict[str, Any]) -> str:
    """Hash the sources, and the rules for labels and channels: a corrected dataset.json must be checked against all
    labels.
    """
    rules = {name: dataset_json.get(name) for name in ("labels", "channel_names", "overwrite_image_reader_writer")}
    if kinds := kinds_of(cases, dataset_json):
        rules["modalities"] = kinds
    if settings := dataset_json.get("mfm"):
        rules["mfm"] = settings
    return hashlib.sha256((corpus.signature(cases) + json.dumps(rules, sort_keys=True)).encode()).hexdigest()


def _keep_labels(raw: Path, preprocessed: Path, dataset_json: dict[str, Any], cases: list[Case]) -> None:
    """Describe the labels of whole images, and keep the table with the data."""
    table = read_label_table(raw / TABLE, DatasetJson.of(dataset_json), {case.name for case in cases})
    logger.info("%s", table.describe())
    with atomic_write(preprocessed / TABLE) as file:
        file.write((raw / TABLE).read_bytes())


def _known_fingerprint(file: Path) -> dict[str, Any]:
    """Return our part of a fingerprint; empty if it is missing or damaged, as it is then made again."""
    content = _content(file)
    known = content.get("mfm") if isinstance(content, dict) else None
    if not isinstance(known, dict) or not isinstance(known.get("failures"), list) or FINGERPRINT - set(content):
        return {}
    is_list = all(isinstance(failure, list) and len(failure) == 3 for failure in known["failures"])
    return known if is_list and all(isinstance(text, str) for failure in known["failures"] for text in failure) else {}


def _content(file: Path) -> Any:
    """Read a JSON file; None if it is missing or damaged."""
    try:
        return parse_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def read_source(path: Path) -> Template:
    """Read the checkpoint that a plan must fit, in any layout that :func:`read_checkpoint` supports."""
    reading = read_checkpoint(path)
    with about(path):
        require_plan(reading)
        own = Plan.of(reading.mfm["plans"])
        trained = own.configuration(reading.mfm["configuration"])
        check_architecture(*(trained.architecture[key] for key in ARCHITECTURE_KEYS))
        if "CTNormalization" in trained.normalization_schemes and not own.content[INTENSITIES]:
            raise MFMError(
                "E_MODEL_MISMATCH",
                "it was trained with CTNormalization, but its plan has no intensity statistics "
                f"('{INTENSITIES}' is empty). Use a checkpoint whose plan has them.",
            )
        family = own.family
    entry = {key: reading.origin[key] for key in ("name", "sha256", "pretext")}
    return Template(own, trained, {**entry, "network": family})


def check_request(request: PlanRequest) -> Template | None:
    """Refuse an unknown network before reading a dataset, and return the checkpoint that the plan must fit."""
    family_named(request.network).require_variant(request.network)
    source = read_source(Path(request.like)) if request.like else None
    if source and request.network not in ("resenc", source.variant):
        holds = f"a {source.family.title} (--network {source.variant})"
        raise MFMError(
            "E_CONFIG", f"--network {request.network} and --like: {request.like} is {holds}. Leave --network out."
        )
    return source


@dataclass(frozen=True)
class PlanResult:
    """A plan, its file, and its decisions with their reasons."""

    plans: dict[str, Any] = field(repr=False)
    file: Path
    decisions: list[Decision] = field(repr=False)

    def _repr_html_(self) -> str:
        """Return the table of decisions for notebooks."""
        return html_table(("decision", "value", "reason"), [tuple(item) for item in self.decisions])


def plan(workspace: Workspace, dataset_name: str, request: PlanRequest, source: Template | None = None) -> PlanResult:
    """Plan ``dataset_name`` and write ``<preprocessed>/<dataset_name>/<plans name>.json``.

    Call it inside :func:`mfm_nnunet.workspace.use`. ``source`` is the checkpoint that the plan must fit, if any. A
    different plan of that name is replaced, with a warning that names the differences. Finished models keep a copy of
    their plan and predict as before, but an unfinished training would resume with the new one. Like in nnU-Net,
    configurations of the old file that this call does not plan are kept, unless axis order, reader, intensities or
    network changed, which all configurations share.

    Raises MFMError: E_NOT_FOUND (no dataset, or no fingerprint yet), E_CONFIG (a request that cannot be met),
    E_MODEL_MISMATCH (a checkpoint that does not fit the data).
    """
    assert Path(os.environ.get("nnUNet_raw", "")) == workspace.raw, "plan() must run inside workspace.use()"
    family = source.family if source else family_named(request.network)
    name = request.plans_name or (source.plans_name if source else family.plans_name(request.network))
    in_mm = {"median": None, "original": None, "onemm": [1.0, 1.0, 1.0]}
    target = in_mm[request.spacing] if isinstance(request.spacing, str) else [float(mm) for mm in request.spacing]
    planner = MFMPlanner(dataset_name, request.memory_gb, plans_name=name, overwrite_target_spacing=target)
    planner.family, planner.variant = family, source.variant if source else request.network
    planner.spacing, planner.source, planner.modality = request.spacing, source, request.modality or ""
    planner.pet = request.pet or ""
    if request.modality and request.images is None and planner.is_mixed:
        raise MFMError("E_CONFIG", f"--modality: each case of {dataset_name} has one of its own. Leave it out.")
    planner.wanted = tuple(request.configurations) if request.configurations else None
    own = Plan.of(planner.plan_experiment())
    if source:
        spacings, axes = planner.dataset_fingerprint["spacings"], own.content["transpose_forward"]
        configuration = own.configuration(source.configuration)
        if doubts := like.find_doubts(configuration, spacings, axes, source.entry["name"]):
            logger.warning("%s", doubts)
    return PlanResult(dict(own.content), planner.plans_file, planner.explain(own))


def _to_preprocess(plans: dict[str, Any], asked: tuple[str, ...] | None, is_corpus: bool) -> list[str]:
    """Return configurations with data of their own: the requested ones, else nnU-Net's default, for a corpus the 3D
    one.
    """
    known = plans["configurations"]
    own = [name for name in known if "previous_stage" not in known[name]]
    if asked:
        needed = {known[name].get("inherits_from", name) for name in asked} | set(asked)
        return [name for name in own if name in needed or known[name].get("next_stage") in needed]
    return ["3d_fullres"] if is_corpus and "3d_fullres" in own else own


def preprocess(
    here: Workspace,
    dataset_name: str,
    cases: list[Case],
    result: PlanResult,
    asked: tuple[str, ...] | None,
    num_processes: int | None,
    part: tuple[int, int] = (0, 1),
) -> list[CaseFailure]:
    """Preprocess the cases, or a ``part``, for the requested (else the default) configurations; return the failed ones.

    Raises MFMError when cases of a labelled dataset failed: it is refused as a whole, as in fingerprinting.
    """
    raw = here.raw / dataset_name
    is_corpus = corpus.is_corpus(raw)
    reports = preprocess_dataset(
        cases,
        result.plans,
        _to_preprocess(result.plans, asked, is_corpus),
        corpus.read_dataset_json(raw),
        here.preprocessed / dataset_name,
        num_processes or places.num_cores(),
        part,
    )
    failures: dict[str, CaseFailure] = {}
    for configuration, report in reports.items():
        counts = len(report.done), len(report.reused), len(report.failures)
        text = "%s %s: %d cases preprocessed, %d reused, %d failed"
        logger.info(text, dataset_name, configuration, *counts)
        for failure in report.failures:
            failures.setdefault(failure.case, failure)
    if failures and not is_corpus:
        raise dataset_refused(dataset_name, [*failures.values()], len(cases), "; without them nothing can be trained")
    return [*failures.values()]
