"""``table.md`` and ``study.png``: what a study found, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.study.arms import SCRATCH
from mfm_nnunet.study.design import curve_labels
from mfm_nnunet.study.statistics import MIN_CASES
from mfm_nnunet.terminal import in_markdown

TITLES = {"dice": "Dice", "nsd": "NSD"}
MIN_SEEDS = 3
_COLOURS = ("#2f6fde", "#e0632b", "#1d9a6c", "#9b4fc0", "#c9a227", "#d0417e")
_GREY = "#6b7078"


def table(record: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """The report in Markdown: one table per metric, scores per label, labels saved, and how to read it."""
    question, num_finished = record["question"], summary["num_finished"]
    lines = [
        f"# Label efficiency: {in_markdown(question['dataset'])}, {question['configuration']}",
        "",
        f"{_test_cases(record)}. Finished cells: {num_finished} of {summary['num_cells']}.",
        *(line for caution in cautions(record) for line in ("", caution)),
    ]
    num_empty = len(record["test_cases"]) - summary["num_cases_with_labels"]
    if num_finished and num_empty == len(record["test_cases"]):
        lines += ["", "No reference of a test case holds any label, so there are no scores. Test on other cases."]
    elif num_finished and num_empty:
        lines += ["", f"The references of {num_empty} test cases hold no label, so these cases have no scores."]
    for metric, title in TITLES.items():
        lines += ["", f"## {_long_title(metric, question, summary)}", ""]
        compared = ("against scratch", "95 %", f"{_unit(record)} better", "seeds better", "p")
        columns = ("labels", "start", "seeds", title, *compared, "scratch needs", "saved")
        lines += _markdown(columns, [_score_row(record, row, metric) for row in summary["rows"]])
    lines += ["", "## Each label", "", *_per_label(summary["rows"])]
    lines += ["", "## How to read this", "", *_notes(record, summary), *_training(record, summary)]
    if summary["failed"]:
        failed = (in_markdown(f"{name}: {reason}") for name, reason in summary["failed"].items())
        lines += ["", "## Failed", "", *(f"* {line}" for line in failed)]
    return "\n".join(lines) + "\n"


def cautions(record: Mapping[str, Any]) -> list[str]:
    """List what a study of this size cannot tell, a sentence or two each."""
    found, num_subjects, seeds = [], _num_subjects(record), record["seeds"]
    if num_subjects < MIN_CASES:
        found.append(
            f"There are no 95 % intervals: {num_subjects} test {_unit(record)} are too few for them, they need at "
            f"least {MIN_CASES} (--test {MIN_CASES})."
        )
    if seeds < MIN_SEEDS:
        found.append(
            f"With {seeds} {'seed' if seeds == 1 else 'seeds'} it is not known what other subsets and trainings would "
            f"give: a difference may be chance. Take at least {MIN_SEEDS} (--seeds {MIN_SEEDS})."
        )
    return found


def plot(file: Path, record: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Write a PNG: each metric over the number of labels (logarithmic), a line per arm, bands over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    axes: Any = figure.subplots(1, len(TITLES))
    for axis, metric in zip(axes, TITLES):
        for arm, colour in zip(record["compared"], _colours(record["compared"])):
            _draw_arm(axis, [row for row in summary["rows"] if row["arm"] == arm], metric, arm, colour)
        axis.set_xscale("log")
        axis.set_xticks(record["labels"], [str(number) for number in record["labels"]])
        axis.minorticks_off()
        axis.set(xlabel="labelled subjects in the training", title=_long_title(metric, record["question"], summary))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].lines:
        axes[0].legend(frameon=False, loc="best")
    question, counts = record["question"], {len(row["seeds"]) for row in summary["rows"]} or {record["seeds"]}
    number = " to ".join(map(str, sorted({min(counts), max(counts)})))
    seeds = "1 seed" if number == "1" else f"lines: mean of {number} seeds, bands: lowest to highest seed"
    figure.suptitle(
        f"{question['dataset']}, {question['configuration']}: {_test_cases(record).lower()}; {seeds}", fontsize=10
    )
    FigureCanvasAgg(figure)
    with atomic_write(file) as handle:
        figure.savefig(handle, format="png", dpi=130)


def _num_subjects(record: Mapping[str, Any]) -> int:
    return len({record["question"]["subjects"][case] for case in record["test_cases"]})


def _unit(record: Mapping[str, Any]) -> str:
    """What is compared: subjects, which are cases where nobody was scanned twice."""
    return "cases" if _num_subjects(record) == len(record["test_cases"]) else "subjects"


def _test_cases(record: Mapping[str, Any]) -> str:
    number = f"Test cases: {len(record['test_cases'])}"
    return number if _unit(record) == "cases" else f"{number}, of {_num_subjects(record)} subjects"


def _draw_arm(axis: Any, rows: Sequence[Mapping[str, Any]], metric: str, arm: str, colour: str) -> None:
    rows = [row for row in rows if row[metric]["mean"] is not None]
    if not rows:
        return
    numbers, parts = [row["labels"] for row in rows], [row[metric] for row in rows]
    is_scratch = arm == SCRATCH
    style = {"color": colour, "marker": "o", "markersize": 4.5, "linewidth": 1.8, "zorder": 2 if is_scratch else 3}
    axis.plot(numbers, [part["mean"] for part in parts], label=arm, linestyle="--" if is_scratch else "-", **style)
    low, high = ([limit(part["per_seed"]) for part in parts] for limit in (min, max))
    axis.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    if len(numbers) == 1:  # a band of one point has no width
        axis.vlines(numbers, low, high, color=colour, alpha=0.4, linewidth=4)


def _colours(arms: Sequence[str]) -> list[str]:
    others = [arm for arm in arms if arm != SCRATCH]
    return [_GREY if arm == SCRATCH else _COLOURS[others.index(arm) % len(_COLOURS)] for arm in arms]


def _long_title(metric: str, question: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if metric == "dice":
        return "Dice"
    tolerance, unit = question["tolerance_mm"], summary.get("length_unit", "mm")
    return (
        f"Normalised surface distance (NSD) within {tolerance:g} {unit.removesuffix('s') if tolerance == 1 else unit}"
    )


def _score_row(record: Mapping[str, Any], row: Mapping[str, Any], metric: str) -> list[str]:
    part = row[metric]
    spread = "" if part["spread"] is None else f" ± {part['spread']:.4f}"
    cells = [str(row["labels"]), row["arm"], str(len(row["seeds"])), f"{_score(part['mean'])}{spread}"]
    if compared := part.get("against_scratch"):
        interval = compared["interval"]
        cells += [f"{compared['difference']:+.4f}", "{:+.4f} to {:+.4f}".format(*interval) if interval else "-"]
        cells += [f"{compared['better']} of {compared['subjects']}"]
        cells += [f"{compared['seeds_better']} of {len(compared['seeds_compared'])}", f"{compared['p_holm']:.2g}"]
    else:
        cells += [""] * 5
    if saved := part.get("labels_saved"):
        return [*cells, _needed(record, saved), _saved(record, row["labels"], saved["needed"])]
    return [*cells, "", ""]


def _needed(record: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """``14.2 (9.1 to more than 34)``; without brackets where all three are the same, or there is no interval."""
    value, *limits = (_number(record, number) for number in (saved["needed"], *(saved["interval"] or ())))
    return value if set(limits) <= {value} else f"{value} ({' to '.join(limits)})"


def _number(record: Mapping[str, Any], needed: float | None) -> str:
    smallest, largest = _limits(record)
    if needed is None:
        return f"more than {largest}"
    return f"at most {smallest}" if needed <= smallest else f"{needed:.1f}"


def _saved(record: Mapping[str, Any], num_labels: int, needed: float | None) -> str:
    smallest, largest = _limits(record)
    if needed is None:
        return f"more than {largest - num_labels}"
    if needed <= smallest:
        return f"{smallest - num_labels} or less"
    return f"{needed - num_labels:+.1f}"


def _limits(record: Mapping[str, Any]) -> tuple[int, int]:
    """The smallest and the largest number of labels on scratch's curve; of all where nothing is from scratch."""
    numbers = curve_labels(record) or record["labels"]
    return min(numbers), max(numbers)


def _per_label(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(rows[0]["dice"]["per_label"]) if rows else []
    lacking = list(rows[0]["false_positives"]) if rows else []
    columns = [
        "labels",
        "start",
        *(f"{name}, {title}" for name in names for title in TITLES.values()),
        *(f"{name}, false positives" for name in lacking),
        "min of training",
    ]
    cells = [
        [
            str(row["labels"]),
            row["arm"],
            *(_score(row[metric]["per_label"][name]) for name in names for metric in TITLES),
            *("{predicted} of {cases}".format(**row["false_positives"][name]) for name in lacking),
            "" if row["minutes_of_training"] is None else f"{row['minutes_of_training']:.1f}",
        ]
        for row in rows
    ]
    return _markdown(columns, cells)


def _notes(record: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    libraries, unit = summary["libraries"] or ["{name} {version}".format(**record["library"])], _unit(record)
    mixed = " (mfm_study scores all cells again with one of them)" if len(libraries) > 1 else ""
    smallest, largest = _limits(record)
    case = "a case's mean over the labels that its reference holds"
    mean = f"{case}, the mean over cases" if unit == "cases" else f"{case}, a subject's over its cases, over subjects"
    return [
        "* labels: labelled subjects in the training. Each seed draws one order of the subjects and takes the first n, "
        "so smaller subsets are inside larger ones, the subsets differ between seeds, and all starts share them.",
        f"* Dice, NSD: {mean}, then over seeds ± their standard deviation (subsets and training together). Labels that "
        "a reference does not hold are left out, for all starts alike; false positives: in how many of the cases "
        "without the label it was predicted all the same, over all seeds.",
        f"* NSD is the surface Dice of {' and '.join(libraries)}{mixed}; other tools give other numbers.",
        f"* against scratch: {unit} averaged over seeds, minus scratch with the same labels; 95 %: bootstrap over "
        f"{unit}; {unit}, seeds better: those above scratch; p: Wilcoxon signed-rank over {unit}, two-sided, "
        f"corrected by Holm for all rows of the table. 95 % and p are about other {unit}, with these very subsets and "
        "trainings: what others would change is seen in the seeds.",
        "* scratch needs: labels with which scratch reaches the same score, from its running maximum, interpolated "
        f"over the logarithm of the number of labels (in brackets the bootstrap 95 % interval over {unit}); nothing is "
        f"extrapolated below {smallest} or above {largest}. saved: that number minus the row's.",
        f"* The final checkpoint was tested, never the best. All starts share one plan, {_plan(record['question'])}.",
        *_settings(record),
    ]


def _settings(record: Mapping[str, Any]) -> list[str]:
    """What all trainings were told, and what single starts were told beside it."""
    lines = [f"* Settings of all: {', '.join(dict.fromkeys(record['question']['settings']))}."]
    for name in record["compared"]:
        if own := record["arms"][name].get("settings"):
            lines.append(f"* Settings of {name} alone: {', '.join(own)}.")
    return lines


def _training(record: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """What the trainings of each start really had, because open settings are resolved by start."""
    arms = {arm: summary["training"][arm] for arm in record["compared"] if arm in summary["training"]}
    lines = [
        f"* {arm} was trained with {', '.join(_values(name, values) for name, values in settings.items())}."
        for arm, settings in arms.items()
    ]
    of_setting: dict[str, set[str]] = {}
    for settings in arms.values():
        for name, values in settings.items():
            of_setting.setdefault(name, set()).add(str([entry["value"] for entry in values]))
    if differing := [f"finetune.{name}" for name, found in of_setting.items() if len(found) > 1 and name != "parts"]:
        lines.append(f"* So the starts differ not only in their weights, but in {', '.join(differing)}.")
    return lines


def _values(name: str, values: Sequence[Mapping[str, Any]]) -> str:
    """``finetune.epochs=10``, or with the numbers of labels where these differ."""
    if len(values) == 1:
        return f"finetune.{name}={values[0]['value']}"
    each = (f"{entry['value']} ({', '.join(map(str, entry['labels']))} labels)" for entry in values)
    return f"finetune.{name}={' and '.join(each)}"


def _plan(question: Mapping[str, Any]) -> str:
    kind, _, _ = question["plans"].partition(" ")
    known = {"own": "made from all images that do not test", "like": "made like the first checkpoint that was given"}
    return known.get(kind, f"{kind}, which was given with -p")


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[in_markdown(cell) for cell in line] for line in (columns, (), *rows)]
    return [f"| {' | '.join(line)} |" if line else "|" + "---|" * len(columns) for line in lines]
