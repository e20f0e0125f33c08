"""Report on a corpus before anything is trained: ``corpus_report.json``, ``.png`` and ``.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfm_nnunet.errors import CaseFailure
from mfm_nnunet.files import write_json
from mfm_nnunet.reports.html import Report, Section, Table, without_folders
from mfm_nnunet.reports.progress import save_figure
from mfm_nnunet.reports.runs import show_pictures

UNNAMED = "unknown"
"""Heading of images whose modality is not known."""
_PER_ROW = 5


def describe_corpus(
    fingerprint: Mapping[str, Any], kinds: Mapping[str, str], failures: Sequence[CaseFailure], file: Path
) -> dict[str, Any]:
    """Write counts, sizes, spacings and intensities by modality, and the refused images; return the content.

    ``kinds`` is the modality of each case by name, "" if unknown. Sizes are in voxels and spacings in mm, in the order
    of the image reader; pictures have no spacing.
    """
    names, known = fingerprint["mfm"]["case_names"], fingerprint["mfm"].get("modalities", {})
    everything = {UNNAMED: fingerprint["foreground_intensity_properties_per_channel"]}
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(kinds.get(name) or UNNAMED, []).append(number)
    if len(groups) == 1:
        everything = dict.fromkeys(groups, everything[UNNAMED])
    modalities = {}
    for kind, numbers in sorted(groups.items()):
        spacings = np.array([fingerprint["spacings"][number] for number in numbers])
        has_mm = spacings[:, 0] < 998 * spacings[:, 1:].max(1)
        modalities[kind] = {
            "images": len(numbers),
            "pictures": int((~has_mm).sum()),
            "size_voxels": _spread(np.array([fingerprint["shapes_after_crop"][number] for number in numbers])),
            "spacing_mm": _spread(spacings[has_mm]) if has_mm.any() else None,
            "intensities": known.get(kind) or everything.get(kind),
        }
    refused = [{"case": item.case, "code": item.code, "reason": item.reason} for item in failures]
    content = {"images": len(names), "modalities": modalities, "refused": refused}
    write_json(file, content, indent=2)
    return content


def _spread(values: np.ndarray) -> dict[str, list[float]]:
    lowest, median, highest = (
        np.round(row, 4).tolist() for row in (values.min(0), np.median(values, 0), values.max(0))
    )
    return {"smallest": lowest, "median": median, "largest": highest}


def summarise_corpus(content: Mapping[str, Any]) -> list[str]:
    """Return a line for each modality of a report, and one for the refused images."""
    lines = []
    for kind, own in content["modalities"].items():
        size = " x ".join(f"{edge:g}" for edge in own["size_voxels"]["median"])
        spacing = own["spacing_mm"] and " x ".join(f"{mm:.3g}" for mm in own["spacing_mm"]["median"])
        text = f"{kind}: {own['images']} images, median size {size}"
        lines.append(text + (f" of {spacing} mm" if spacing else ", without spacing"))
    if content["refused"]:
        lines.append(f"refused: {len(content['refused'])} images, e.g. {content['refused'][0]['reason']}")
    return lines


def draw_corpus(content: Mapping[str, Any], examples: Mapping[str, np.ndarray], file: Path) -> None:
    """Draw an example (H, W) of each modality, with its number of images and its range of intensities."""
    from matplotlib.figure import Figure

    columns = min(_PER_ROW, max(1, len(examples)))
    rows = max(1, -(-len(examples) // columns))
    figure = Figure(figsize=(2.9 * columns, 3.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, (kind, picture) in zip(figure.axes, examples.items()):
        own = content["modalities"][kind]
        low, high = np.percentile(picture, [0.5, 99.5])
        axis.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        channel = next(iter((own["intensities"] or {}).values()), None)
        scale = "" if channel is None else f"\n{channel['percentile_00_5']:.4g} to {channel['percentile_99_5']:.4g}"
        axis.set_title(f"{kind}: {own['images']} images{scale}", fontsize=10)
    refused = f", {len(content['refused'])} refused" if content["refused"] else ""
    figure.suptitle(f"{content['images']} images{refused}", fontsize=11)
    save_figure(figure, file, dpi=100)


def describe_page(name: str, content: Mapping[str, Any], picture: Path) -> Report:
    """Make the page on a corpus from the content of ``corpus_report.json``."""
    rows = []
    for kind, own in content["modalities"].items():
        channel = next(iter((own["intensities"] or {}).values()), None)
        scale = "-" if channel is None else f"{channel['percentile_00_5']:.4g} to {channel['percentile_99_5']:.4g}"
        spacing = [_to_text(own["spacing_mm"], part) for part in ("median", "smallest", "largest")]
        rows.append([kind, own["images"], _to_text(own["size_voxels"], "median"), *spacing, scale])
    columns = (
        "modality",
        "images",
        "median size [voxels]",
        "median spacing [mm]",
        "smallest",
        "largest",
        "intensities",
    )
    tables = [Table("Modalities", columns, rows)]
    refused = [[entry["case"], entry["code"], without_folders(entry["reason"])] for entry in content["refused"]]
    sections = [Section("Images", [_SIZES], _GOOD, tables=tables)]
    alt = "One example of each modality: " + ", ".join(content["modalities"])
    if examples := show_pictures("Examples", {picture: alt}, ["The middle slice of one image of each modality."]):
        sections.insert(0, examples)
    if refused:
        texts = ["These images are not used. Repair them or leave them out; then plan the corpus again."]
        sections.append(
            Section("Refused", texts, tables=[Table("Refused images", ("case", "code", "reason"), refused)])
        )
    facts = {"Images": content["images"], "Modalities": len(content["modalities"]), "Refused": len(refused)}
    return Report(f"Corpus: {name}", "Unlabelled images for pretraining, as they were read.", facts, sections)


_SIZES = "Sizes are those after cropping, slices first. Intensities are the 0.5 and 99.5 percentiles of the foreground."
_GOOD = (
    "every modality is named, sizes and spacings of one modality lie within a factor of ten, CT lies between about "
    "-1000 and 3000, and nothing is refused."
)


def _to_text(spread: Mapping[str, Sequence[float]] | None, part: str) -> str:
    return "-" if spread is None else " x ".join(f"{value:.3g}" for value in spread[part])
