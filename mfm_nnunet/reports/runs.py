"""Sections of reports on training runs: curves, what a pretext task saw and restored, transferred weights, settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mfm_nnunet.reports.html import Picture, Section, Table, draw_curves, file_picture, flat_table, without_folders

GOOD_LOSSES = (
    "both losses fall fast, then flatten together. A validation loss that rises while the training loss falls means "
    "that the network learns its training scans by heart: more labels, or fewer epochs. A flat start over many epochs, "
    "or jumps, mean a learning rate that does not fit."
)
GOOD_DICE = (
    " The Dice rises and flattens. Here it is nnU-Net's pseudo Dice, over random crops: that of whole scans, in the "
    "section on cases, is the one that counts."
)
GOOD_PRETRAINING = (
    "both losses fall and flatten. The training loss may lie above the validation loss: training crops are augmented, "
    "and the held-out crops are few but always the same."
)
GOOD_EXAMPLES = (
    "at the last epoch the last column is nearer to its target than at the first. Where voxels were hidden, shapes and "
    "edges of the organs continue through them, and fine texture stays blurred, as it cannot be guessed. Where classes "
    "are predicted, they look like the label. If nothing changed, the run was too short or its learning rate does not "
    "fit."
)
GOOD_TRANSFER = (
    "all of the encoder comes from the checkpoint, and new weights are only output layers. Anything else needs the "
    "reason given in the list of weights."
)
KINDS = {
    "loaded": "taken as they are",
    "adapted": "taken after a change of their shape",
    "new": "begin at random",
    "ignored": "in the checkpoint, not used",
}


def describe_end(epochs_done: int, epochs: int, problem: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return facts on how far a run came, and flags if it did not reach its end."""
    facts = {"Epochs": f"{epochs_done} of {epochs}"}
    flags = [f"The run ended early: {without_folders(problem)}"] if problem else []
    if epochs_done < epochs and not problem:
        flags = ["The run is not finished. Continue it with --c."]
    return facts, flags


def show_curves(history: Sequence[Mapping[str, Any]], good: str, dice: Sequence[str] = ()) -> Section:
    """Draw losses, and Dice if there is any, of a history with one entry per epoch; ``dice`` are names of entries."""
    losses = {name: [row.get(key) for row in history] for name, key in
              (("training loss", "train_loss"), ("validation loss", "validation_loss"))}  # fmt: skip
    pictures = [draw_curves(losses, "loss", _in_words(losses), is_share=False)]
    shown = {name: [row.get(name) for row in history] for name in dice}
    if any(value is not None for values in shown.values() for value in values):
        pictures.append(draw_curves(shown, "Dice", _in_words(shown), is_share=True))
    rates = [row["learning_rate"] for row in history if row.get("learning_rate") is not None]
    texts = [f"The learning rate went from {rates[0]:.3g} to {rates[-1]:.3g}."] if rates else []
    return Section("Curves", texts, good, pictures=pictures)


def _in_words(series: Mapping[str, Sequence[float | None]]) -> str:
    """Describe curves for those who do not see them: first, best and last values."""
    parts = []
    for name, values in series.items():
        known = [float(value) for value in values if value is not None and not math.isnan(value)]
        if known:
            parts.append(
                f"{name}: {known[0]:.3g} at first, {min(known):.3g} to {max(known):.3g}, {known[-1]:.3g} at last"
            )
    return "Curves over epochs. " + "; ".join(parts)


def show_examples(folder: Path, task: str, num_epochs: int) -> Section | None:
    """Show what a pretext task saw and gave, at the first and last epoch; None before the first epoch."""
    found = [(folder / "examples_first.png", "first epoch"), (folder / "examples.png", f"epoch {num_epochs}")]
    found = found[1:] if num_epochs == 1 else found
    pictures = [
        file_picture(file, f"{task}, {when}: one column per step of the task, one row per plane", f"{when}")
        for file, when in found
        if file.is_file()
    ]
    texts = [
        f"The task is {task}. Both pictures show the same slice of the same held-out crop. Columns are what the task "
        "read, what it hid or changed, and what the network gave back."
    ]
    return Section("What the network saw", texts, GOOD_EXAMPLES, pictures=pictures) if pictures else None


def show_transfer(content: Mapping[str, Any]) -> Section:
    """Describe ``transfer.json`` in words."""
    rows, details = [], []
    for kind, meaning in KINDS.items():
        entries = content.get(kind, [])
        rows.append([kind, meaning, len(entries), sum(int(entry["num_parameters"]) for entry in entries)])
        details += [[entry["name"], kind, int(entry["num_parameters"]), entry["how"] or "-"] for entry in entries]
    share = float(content["encoder_share"])
    texts = [
        f"The run began with weights of {content['checkpoint']}: {share:.1%} of the encoder's parameters are from it."
    ]
    texts += [without_folders(str(note)) for note in content.get("notes", ())]
    tables = [
        Table("Weights", ("kind", "what it means", "tensors", "parameters"), rows),
        Table("All tensors", ("tensor", "kind", "parameters", "how"), details, is_folded=True),
    ]
    return Section("Where the weights come from", texts, GOOD_TRANSFER, tables=tables)


def show_settings(settings: Mapping[str, Any], origin: Mapping[str, Any]) -> Section:
    """List settings, and versions and hashes of what made the results; folders are left out."""
    tables = [flat_table("Settings", settings)] if settings else []
    tables += [flat_table("Versions and origin", origin)] if origin else []
    return Section("Settings and origin", ["With these, the same data give the same result."], tables=tables)


def show_pictures(title: str, files: Mapping[Path, str], texts: Sequence[str] = (), good: str = "") -> Section | None:
    """Show pictures that a job wrote, with their descriptions; None if there are none."""
    pictures: list[Picture] = [file_picture(file, alt) for file, alt in files.items() if file.is_file()]
    return Section(title, texts, good, pictures=pictures) if pictures else None
