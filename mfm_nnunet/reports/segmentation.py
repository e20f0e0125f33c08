"""Sections of a report on predicted masks: cases that need a second look, volumes, and pictures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mfm_nnunet.metrics import mean_dice
from mfm_nnunet.reports.html import Picture, Section, Table, embed_image, format_number, without_folders
from mfm_nnunet.reports.measures import Measured, find_flags, measure, usual_range
from mfm_nnunet.reports.overlays import ERRORS, Labels, Scan, draw_errors, draw_labels
from mfm_nnunet.reports.views import OrientedImage, Plane, read_oriented

MOST_PICTURED = 12
"""Number of cases with pictures: failed ones have none, then come flagged ones, then the lowest Dice."""
MOST_COLUMNS = 6
"""With more labels than this, volumes are listed case by case."""
GOOD_CASES = (
    "every case is done and has no flag. A flag is no error: it says what to look at first. Volumes of one organ "
    "differ between patients by a factor of two or three, rarely by ten."
)
GOOD_PICTURES = (
    "the colour fills the organ up to its edge in all three planes, in one piece, and on the patient's own side: "
    "letters name the directions (R right, L left, A anterior, P posterior, S superior, I inferior), and the patient's "
    "left is on the right."
)
GOOD_FLAT = "the colour fills the organ up to its edge, in one piece."
GOOD_ERRORS = (
    " Errors are thin rims along edges, in both colours. Whole blobs in one colour are structures that were invented "
    "(false positive) or missed (false negative)."
)


@dataclass(frozen=True)
class PredictedCase:
    """A predicted case: its files, and how its prediction ended."""

    name: str
    image: Path | Sequence[Path] | None = None
    """First channel; several files are the slices of a DICOM series."""
    mask: Path | None = None
    reference: Path | None = None
    status: str = "done"
    """``done``, ``failed``, or what else the journal says."""
    reason: str = ""
    """Code, reason and remedy of a failure."""
    warnings: Sequence[str] = ()
    agreement: Mapping[str, float] = field(default_factory=dict)
    """Dice between the folds by label; empty with a single fold."""
    seconds: float | None = None


@dataclass(frozen=True)
class _Seen:
    """A case with its measures, if its mask could be read."""

    case: PredictedCase
    measured: Measured | None
    flags: Sequence[str]

    @property
    def rank(self) -> tuple[int, float]:
        """Order of attention: failed, flagged, then by Dice."""
        dice = self.measured.mean_dice if self.measured else math.nan
        kind = 0 if self.case.status != "done" else 1 if self.flags else 2
        return kind, 2.0 if math.isnan(dice) else dice


def describe_masks(
    cases: Sequence[PredictedCase],
    labels: Mapping[str, tuple[int, ...]],
    training: Mapping[str, Any],
    ignore: int | None = None,
) -> tuple[dict[str, Any], list[Section]]:
    """Return main facts by name, and the sections on cases and pictures.

    ``training`` are volumes of the training set (:func:`~mfm_nnunet.reports.measures.summarise_volumes`), or empty.
    """
    seen = sorted((_look_at(case, labels, training, ignore) for case in cases), key=lambda one: one.rank)
    counts = Counter(case.status for case in cases)
    flagged = sum(bool(one.flags) for one in seen if one.case.status == "done")
    facts: dict[str, Any] = {"Cases": len(cases), **{f"Cases {status}": count for status, count in counts.items()}}
    facts["Cases to look at"] = flagged + sum(count for status, count in counts.items() if status != "done")
    scores = [one.measured.mean_dice for one in seen if one.measured and one.measured.dice]
    if scores:
        facts["Mean Dice"] = mean_dice(scores)
    pictures = [part for one in [one for one in seen if one.measured][:MOST_PICTURED] if (part := _draw(one, labels))]
    return facts, [_list_cases(seen, labels, training), *([_show(pictures, seen)] if pictures else [])]


def _look_at(
    case: PredictedCase, labels: Mapping[str, tuple[int, ...]], training: Mapping[str, Any], ignore: int | None
) -> _Seen:
    """Measure a case; a file that cannot be read becomes a flag."""
    if case.status != "done" or case.mask is None:
        return _Seen(case, None, [without_folders(case.reason)] if case.reason else [])
    flags: list[str] = [f"the reader noted: {without_folders(text)}" for text in case.warnings]
    try:
        mask = read_oriented(case.mask, is_label=True)
        reference = read_oriented(case.reference, is_label=True).voxels if case.reference else None
        if reference is not None and reference.shape != mask.voxels.shape:
            flags.append("the reference lies on another grid, so it is not compared")
            reference = None
        measured = measure(mask, labels, reference, ignore)
    except (RuntimeError, OSError, ValueError) as error:
        return _Seen(case, None, [*flags, f"the files cannot be read for this report ({type(error).__name__})"])
    return _Seen(case, measured, [*flags, *find_flags(measured, training, case.agreement)])


def _list_cases(seen: Sequence[_Seen], labels: Mapping[str, Any], training: Mapping[str, Any]) -> Section:
    """List all cases, those to look at first on top."""
    unit = next((one.measured.unit for one in seen if one.measured), "")
    names = list(labels) if len(labels) <= MOST_COLUMNS else []
    has_dice = any(one.measured and one.measured.dice for one in seen)
    has_time = any(one.case.seconds is not None for one in seen)
    columns = ["case", "state", *(f"{name} [{unit}]" for name in names)]
    columns += [] if names else ["labels found", f"all labels [{unit}]"]
    columns += [*(["Dice"] if has_dice else []), *(["seconds"] if has_time else []), "look at"]
    rows: list[list[Any]] = []
    for one in seen:
        volumes = one.measured.volumes if one.measured else {}
        cells = [volumes.get(name) for name in names]
        if not names:
            cells = [sum(map(bool, volumes.values())), float(sum(volumes.values()))] if volumes else [None, None]
        cells += [one.measured.mean_dice if one.measured and one.measured.dice else None] if has_dice else []
        cells += [one.case.seconds] if has_time else []
        rows.append([one.case.name, one.case.status, *cells, "; ".join(one.flags) or "-"])
    tables = [
        Table("All cases, those to look at first on top", columns, rows),
        *_list_each_label(seen, labels, training),
    ]
    texts = [] if training else [_NO_TRAINING]
    if not names:
        texts.append(f"There are {len(labels)} labels: their volumes are in the folded table of each case.")
    return Section("Cases", texts, GOOD_CASES, tables=tables)


_NO_TRAINING = "Nothing is known of the training masks, so unusual volumes and cut-off labels are not flagged."


def _list_each_label(seen: Sequence[_Seen], labels: Mapping[str, Any], training: Mapping[str, Any]) -> list[Table]:
    """Return Dice and usual volumes by label, over all cases."""
    measured = [one.measured for one in seen if one.measured]
    if not measured:
        return []
    rows: list[list[Any]] = []
    for name in labels:
        volumes = sorted(one.volumes[name] for one in measured if one.volumes[name] > 0)
        known, usual = training.get("labels", {}).get(name, {}), usual_range(name, training)
        median = known["quartiles"][2] if known.get("num_cases") else None
        scores = [one.dice[name] for one in measured if name in one.dice]
        row = [name, f"{len(volumes)} of {len(measured)}", volumes[len(volumes) // 2] if volumes else None]
        row += [median, f"{format_number(usual[0])} to {format_number(usual[1])}" if usual else "-"] if training else []
        rows.append([*row, *([mean_dice(scores)] if any(one.dice for one in measured) else [])])
    unit = measured[0].unit
    columns = ["label", "found in", f"median here [{unit}]"]
    columns += [f"median in training [{unit}]", "usual"] if training else []
    columns += ["mean Dice"] if any(one.dice for one in measured) else []
    return [Table("Each label, over all cases", columns, rows, is_folded=len(labels) > MOST_COLUMNS)]


def _draw(one: _Seen, labels: Mapping[str, tuple[int, ...]]) -> Section | None:
    """Draw a case: labels in three planes and, with a reference, its errors. None without an image."""
    case, measured = one.case, one.measured
    if case.image is None or case.mask is None or measured is None:
        return None
    try:
        image, mask = read_oriented(case.image), read_oriented(case.mask, is_label=True)
        reference = read_oriented(case.reference, is_label=True).voxels if case.reference and measured.dice else None
    except (RuntimeError, OSError, ValueError):
        return None
    if image.voxels.shape != mask.voxels.shape:
        return None
    scan = Scan(OrientedImage(image.voxels, image.spacing, image.has_mm), mask.voxels, reference)
    table, planes = Labels(labels), scan.planes()
    pictures = [_label_picture(case.name, scan, plane, table) for plane in planes]
    if reference is not None:
        pictures += [_error_picture(case.name, scan, plane) for plane in planes]
    shown = [plane.cut(part) for plane in planes for part in (scan.mask, reference) if part is not None]
    legend = [(name.replace("_", " "), _hex(table.colour(name))) for name in table.present(*shown)]
    volumes = [
        [name, volume, *([measured.dice[name]] if measured.dice else [])]
        for name, volume in measured.volumes.items()
        if volume or not math.isnan(measured.dice.get(name, math.nan))
    ]
    columns = ["label", f"volume [{measured.unit}]", *(["Dice"] if measured.dice else [])]
    tables = [Table("Volumes", columns, volumes, is_folded=True)] if volumes else []
    return Section(case.name, flags=one.flags, legend=legend, pictures=pictures, tables=tables)


def _label_picture(case: str, scan: Scan, plane: Plane, table: Labels) -> Picture:
    parts = [plane.cut(part) for part in (scan.mask, scan.reference) if part is not None]
    seen = table.present(*parts)
    listed = ", ".join(seen[:8]) + (f" and {len(seen) - 8} more" if len(seen) > 8 else "") if seen else "no label"
    where = plane.name or "the image"
    line = ", reference as line" if scan.reference is not None else ""
    return embed_image(draw_labels(scan, plane, table), f"{case}, {where}: {listed}", f"{where}: labels as fill{line}")


def _error_picture(case: str, scan: Scan, plane: Plane) -> Picture:
    assert scan.mask is not None
    assert scan.reference is not None
    mask, reference = plane.cut(scan.mask), plane.cut(scan.reference)
    counts = {
        "false positive": int(((mask > 0) & (reference == 0)).sum()),
        "false negative": int(((mask == 0) & (reference > 0)).sum()),
        "with another label": int(((mask > 0) & (reference > 0) & (mask != reference)).sum()),
    }
    where, listed = plane.name or "the image", ", ".join(f"{count} pixels {name}" for name, count in counts.items())
    return embed_image(draw_errors(scan, plane), f"{case}, {where}, errors: {listed}", f"{where}: errors")


def _show(parts: Sequence[Section], seen: Sequence[_Seen]) -> Section:
    has_errors = any(one.measured and one.measured.dice for one in seen)
    number = sum(one.measured is not None for one in seen)
    texts = [f"{len(parts)} of {number} masks: flagged ones first" + (", then the lowest Dice." if has_errors else ".")]
    is_flat = all(len(part.pictures) <= 2 for part in parts)
    texts += [] if is_flat else ["Slices go through the largest cross-section."]
    good = (GOOD_FLAT if is_flat else GOOD_PICTURES) + (GOOD_ERRORS if has_errors else "")
    legend = list(ERRORS.items()) if has_errors else []
    return Section("Pictures", texts, good, legend=legend, parts=parts)


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
