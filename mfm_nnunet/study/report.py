"""Write the report of a study: ``table.md``, ``study.png`` and ``report.html``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.files import atomic_write
from mfm_nnunet.reports.html import Report, Section, Table, without_folders
from mfm_nnunet.reports.runs import show_pictures
from mfm_nnunet.study.design import SCRATCH
from mfm_nnunet.study.evaluation import METRICS
from mfm_nnunet.study.folder import LIKE, OWN, Study
from mfm_nnunet.study.summary import MIN_CASES
from mfm_nnunet.terminal import in_markdown

TITLES = {"dice": "Dice", "nsd": "NSD", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "r2": "R²"}
MIN_SEEDS = 3
_COLOURS = ("#2f6fde", "#e0632b", "#1d9a6c", "#9b4fc0", "#c9a227", "#d0417e")
_GREY = "#6b7078"


def make_table(study: Study) -> str:
    """Return the report in Markdown: one table per metric, scores per label, labels saved, and reading notes."""
    question, summary = study.question, study.results
    rows, num_finished, num_tested = summary["rows"], summary["num_finished"], len(study.test_cases)
    lines = [
        f"# Label efficiency: {in_markdown(question.dataset)}, {question.configuration}",
        "",
        f"{_test_cases(study)}. Finished cells: {num_finished} of {summary['num_cells']}.",
        *(line for caution in list_cautions(study) for line in ("", caution)),
    ]
    num_empty = num_tested - summary["num_cases_with_labels"]
    if num_finished and num_empty:
        advice = " Test on other cases." if num_empty == num_tested else ""
        lines += ["", f"{num_empty} test cases have no label in their reference, so they have no scores.{advice}"]
    for metric in (metrics := METRICS[study.dataset.task]):
        lines += ["", f"## {_long_title(metric, study)}", ""]
        lines += _markdown(_columns(study, metric), [_score_row(study, row, metric) for row in rows])
    lines += ["", "## Each label", "", *_per_label(rows, {metric: _title_of_one(metric, study) for metric in metrics})]
    lines += ["", "## How to read this", "", *_notes(study), *_training(study)]
    if summary["failed"]:
        failed = (in_markdown(f"{name}: {reason}") for name, reason in summary["failed"].items())
        lines += ["", "## Failed", "", *(f"* {line}" for line in failed)]
    return "\n".join(lines) + "\n"


def make_page(study: Study, picture: Path) -> Report:
    """Make the page of a study: the picture, the tables and the notes of ``table.md``."""
    question, summary = study.question, study.results
    tables = []
    for metric in METRICS[study.dataset.task]:
        rows = [_score_row(study, row, metric) for row in summary["rows"]]
        tables.append(Table(_long_title(metric, study), _columns(study, metric), rows))
    alt = "Scores over the number of labels, one line per start; the tables have all numbers."
    parts = [show_pictures("Scores over labels", {picture: alt}, list_cautions(study), _GOOD),
             Section("Scores", tables=tables)]  # fmt: skip
    if summary["failed"]:
        failed = [[name, without_folders(reason)] for name, reason in summary["failed"].items()]
        parts.append(Section("Failed", tables=[Table("Failed cells", ("cell", "reason"), failed)]))
    notes = " ".join([*_notes(study), *_training(study)]).replace("\n ", " ").split("* ")
    parts.append(Section("How to read this", [without_folders(note.strip()) for note in notes if note.strip()]))
    finished = f"{summary['num_finished']} of {summary['num_cells']}"
    facts = {"Finished cells": finished, "Test cases": len(study.test_cases), "Starts": len(study.compared)}
    title = f"Label efficiency: {question.dataset}, {question.configuration}"
    subject = f"How many labels does pretraining save? {_test_cases(study)}."
    return Report(title, subject, facts, [part for part in parts if part], "scores of your data, without pictures")


_GOOD = (
    "the line of a pretrained start lies above scratch by more than the bands are wide, at every number of labels. "
    "Lines within each other's bands show no difference."
)


def _columns(study: Study, metric: str) -> tuple[str, ...]:
    compared = ("against scratch", "95 %", f"{_compared_unit(study)} better", "seeds better", "p")
    return "labels", "start", "seeds", TITLES[metric], *compared, "scratch needs", "saved", "min"


def list_cautions(study: Study) -> list[str]:
    """List the limits of a study of this size, a sentence or two each."""
    found, num_subjects, seeds = [], _num_subjects(study), study.seeds
    if num_subjects < MIN_CASES:
        found.append(
            f"There are no 95 % intervals: {num_subjects} test {_compared_unit(study)} are too few. Test on at least "
            f"{MIN_CASES} (--test {MIN_CASES})."
        )
    if seeds < MIN_SEEDS:
        found.append(
            f"With {seeds} {'seed' if seeds == 1 else 'seeds'} a difference may be chance: other subsets and trainings "
            f"may give another. Use at least {MIN_SEEDS} (--seeds {MIN_SEEDS})."
        )
    return found


def plot(file: Path, study: Study) -> None:
    """Plot each metric over the number of labels (logarithmic) into a PNG, with a line per arm and bands over the
    seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, rows = Figure(figsize=(10.5, 4.6), layout="constrained"), study.results["rows"]
    metrics = METRICS[study.dataset.task]
    axes: Any = figure.subplots(1, len(metrics), squeeze=False)[0]
    colours = itertools.cycle(_COLOURS)
    colour_of = {arm: _GREY if arm == SCRATCH else next(colours) for arm in study.compared}
    for axis, metric in zip(axes, metrics):
        for arm, colour in colour_of.items():
            _draw_arm(axis, [row for row in rows if row["arm"] == arm], metric, arm, colour)
        axis.set_xscale("log")
        axis.set_xticks(study.labels, [str(number) for number in study.labels])
        axis.minorticks_off()
        axis.set(xlabel="labelled subjects in the training", title=_long_title(metric, study))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].lines:
        axes[0].legend(frameon=False, loc="best")
    counts = {len(row["seeds"]) for row in rows} or {study.seeds}
    number = " to ".join(map(str, sorted({min(counts), max(counts)})))
    seeds = "1 seed" if number == "1" else f"lines: mean of {number} seeds, bands: lowest to highest seed"
    title = f"{study.question.dataset}, {study.question.configuration}: {_test_cases(study).lower()}; {seeds}"
    figure.suptitle(title, fontsize=10)
    FigureCanvasAgg(figure)
    with atomic_write(file) as handle:
        figure.savefig(handle, format="png", dpi=130)


def _num_subjects(study: Study) -> int:
    return len({study.question.subjects[case] for case in study.test_cases})


def _compared_unit(study: Study) -> str:
    """Return the unit of comparison: subjects, or cases if nobody was scanned twice."""
    return "cases" if _num_subjects(study) == len(study.test_cases) else "subjects"


def _test_cases(study: Study) -> str:
    number = f"Test cases: {len(study.test_cases)}"
    return number if _compared_unit(study) == "cases" else f"{number}, of {_num_subjects(study)} subjects"


def _draw_arm(axis: Any, rows: Sequence[Mapping[str, Any]], metric: str, arm: str, colour: str) -> None:
    rows = [row for row in rows if row[metric]["mean"] is not None]
    if not rows:
        return
    numbers, parts = [row["labels"] for row in rows], [row[metric] for row in rows]
    style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 4.5, "linewidth": 1.8}
    style |= {"zorder": 2, "linestyle": "--"} if arm == SCRATCH else {"zorder": 3}
    axis.plot(numbers, [part["mean"] for part in parts], label=arm, **style)
    low, high = ([limit(part["per_seed"]) for part in parts] for limit in (min, max))
    axis.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    if len(numbers) == 1:  # a band of one point has no width
        axis.vlines(numbers, low, high, color=colour, alpha=0.4, linewidth=4)


def _long_title(metric: str, study: Study) -> str:
    if metric != "nsd":
        return f"{TITLES[metric][0].upper()}{TITLES[metric][1:]}"
    tolerance, unit = study.question.tolerance_mm, study.results["length_unit"]
    unit = unit.removesuffix("s") if tolerance == 1 else unit
    return f"Normalised surface distance (NSD) within {tolerance:g} {unit}"


def _score_row(study: Study, row: Mapping[str, Any], metric: str) -> list[str]:
    part = row[metric]
    spread = "" if part["spread"] is None else f" ± {part['spread']:.4f}"
    cells = [str(row["labels"]), row["arm"], str(len(row["seeds"])), f"{_format_score(part['mean'])}{spread}"]
    if compared := part.get("against_scratch"):
        interval = compared["interval"]
        cells += [f"{compared['difference']:+.4f}", "{:+.4f} to {:+.4f}".format(*interval) if interval else "-"]
        cells += [f"{compared['better']} of {compared['subjects']}"]
        cells += [f"{compared['seeds_better']} of {len(compared['seeds_compared'])}", f"{compared['p_holm']:.2g}"]
    else:
        cells += [""] * 5
    minutes = row["minutes_of_training"]
    cost = "" if minutes is None else f"{minutes:.1f}"
    if saved := part.get("labels_saved"):
        return [*cells, _needed(study, saved), _saved(study, row["labels"], saved["needed"]), cost]
    return [*cells, "", "", cost]


def _needed(study: Study, saved: Mapping[str, Any]) -> str:
    """Format ``14.2 (9.1 to more than 34)``, without brackets if all three are equal or there is no interval."""
    smallest, largest = _limits(study)
    value, *limits = (
        f"more than {largest}" if number is None else f"at most {smallest}" if number <= smallest else f"{number:.1f}"
        for number in (saved["needed"], *(saved["interval"] or ()))
    )
    return value if set(limits) <= {value} else f"{value} ({' to '.join(limits)})"


def _saved(study: Study, num_labels: int, needed: float | None) -> str:
    smallest, largest = _limits(study)
    if needed is None:
        return f"more than {largest - num_labels}"
    return f"{smallest - num_labels} or less" if needed <= smallest else f"{needed - num_labels:+.1f}"


def _limits(study: Study) -> tuple[int, int]:
    """Return the smallest and largest number of labels on scratch's curve; of all cells if none is from scratch."""
    numbers = study.curve_labels or study.labels
    return min(numbers), max(numbers)


def _title_of_one(metric: str, study: Study) -> str:
    """Return the title of a metric of one label: the balanced accuracy of classes is the mean of their recalls."""
    is_recall = metric == "balanced_accuracy" and study.dataset.task == "classification"
    return "recall" if is_recall else TITLES[metric]


def _per_label(rows: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    names = list(rows[0][next(iter(titles))]["per_label"]) if rows else []
    lacking = list(rows[0]["false_positives"]) if rows else []
    columns = [f"{name}, {title}" for name in names for title in titles.values()]
    columns += [f"{name}, false positives" for name in lacking]
    cells = []
    for row in rows:
        scores = [_format_score(row[metric]["per_label"][name]) for name in names for metric in titles]
        scores += ["{predicted} of {cases}".format(**row["false_positives"][name]) for name in lacking]
        cells.append([str(row["labels"]), row["arm"], *scores])
    return _markdown(["labels", "start", *columns], cells)


_NOTES = """\
* labels: labelled subjects used for training. Each seed draws one order of the subjects and takes the first n, so
  smaller subsets are part of larger ones, subsets differ between seeds, and all starts share them.
{scores}
* against scratch: {unit} averaged over seeds, minus scratch with the same labels; 95 %: bootstrap over {unit}; {unit},
  seeds better: those above scratch; p: {test} over {unit}, corrected by Holm for all rows.
  95 % and p ask what other {unit} would say of these trainings. The seeds show how much subsets and trainings differ.
* scratch needs: the number of labels with which scratch reaches the same score, read off the running maximum of its
  curve over the logarithm of the number of labels (in brackets the bootstrap 95 % interval over {unit}); nothing is
  extrapolated below {smallest} or above {largest}. saved: that number minus the row's.
* min: minutes of training, everything included that it trains on the way, such as teachers.
* The final checkpoint was tested, never the best. All starts share one plan, {plan}.
* Settings of all: {settings}."""


_OF_MASKS = """\
* Dice, NSD: {mean}, then over seeds ± their standard deviation (subsets and training together). Labels absent from a
  reference are left out, for all starts alike; false positives: in how many of these cases the label was predicted,
  over all seeds.
* NSD is the surface Dice of {libraries}; other tools give other numbers."""
_OF_IMAGES = """\
* AUROC: of each class against the rest, the mean over classes; balanced accuracy: the mean recall of the classes
  (where an image may have several: of sensitivity and specificity); R²: the share of the variance that is explained.
  Then over seeds ± their standard deviation (subsets and training together).
* Each test case counts with its influence on the score (DeLong's placements for the AUROC), so a case is better where
  the start moves the score up more."""


def _notes(study: Study) -> list[str]:
    libraries, unit = study.results["libraries"] or ["{name} {version}".format(**study.library)], _compared_unit(study)
    mixed = " (mfm_study scores all cells again with one of them)" if len(libraries) > 1 else ""
    smallest, largest = _limits(study)
    mean = "a case's mean over the labels in its reference"
    mean += ", the mean over cases" if unit == "cases" else ", a subject's over its cases, the mean over subjects"
    plans = study.question.plans.partition(" ")[0]
    known = {OWN: "made from all images that do not test", LIKE: "made like the first checkpoint that was given"}
    has_masks = study.dataset.task == "segmentation"
    scores = _OF_MASKS if has_masks else _OF_IMAGES
    notes = _NOTES.format(
        scores=scores.format(mean=mean, libraries=f"{' and '.join(libraries)}{mixed}"),
        test=f"two-sided {'Wilcoxon signed-rank' if has_masks else 'DeLong'} test", unit=unit,
        smallest=smallest, largest=largest,
        plan=known.get(plans, f"{plans}, which was given with -p"),
        settings=", ".join(dict.fromkeys(study.question.settings)),
    )  # fmt: skip
    of_arms = {name: _own_settings(study, name) for name in study.compared}
    return [notes, *(f"* Settings of {name} alone: {', '.join(own)}." for name, own in of_arms.items() if own)]


def _own_settings(study: Study, name: str) -> list[str]:
    arm = study.arms[name]
    return [*([f"head {arm.head}"] if arm.head else []), *arm.settings]


def _training(study: Study) -> list[str]:
    """Report the settings each arm was really trained with: open settings are resolved per arm."""
    training, lines = study.results["training"], []
    of_setting: dict[str, set[str]] = {}
    for arm in (arm for arm in study.compared if arm in training):
        words = ", ".join(_format_values(name, values) for name, values in training[arm].items())
        lines.append(f"* {arm} was trained with {words}.")
        for name, values in training[arm].items():
            of_setting.setdefault(name, set()).add(str([entry["value"] for entry in values]))
    if differing := [f"finetune.{name}" for name, found in of_setting.items() if len(found) > 1 and name != "parts"]:
        lines.append(f"* So the starts differ not only in their weights, but also in {', '.join(differing)}.")
    return lines


def _format_values(name: str, values: Sequence[Mapping[str, Any]]) -> str:
    """Format ``finetune.epochs=10``; if values differ, with their numbers of labels."""
    if len(values) == 1:
        return f"finetune.{name}={values[0]['value']}"
    each = (f"{entry['value']} ({', '.join(map(str, entry['labels']))} labels)" for entry in values)
    return f"finetune.{name}={' and '.join(each)}"


def _format_score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[in_markdown(cell) for cell in line] for line in (columns, (), *rows)]
    return [f"| {' | '.join(line)} |" if line else "|" + "---|" * len(columns) for line in lines]
