"""Training on a union of datasets: batches from several of them, and outputs that an extended model keeps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mfm_nnunet.data.class_table import ClassTable, key_of
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import read_json, write_json
from mfm_nnunet.finetune.augmentation import TightLoader
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.transfer import unwrapped, without_wrapper_prefixes
from mfm_nnunet.prediction.selection import ChosenOutputs, select_classes
from mfm_nnunet.tasks.segmentation import SegmentationTask
from mfm_nnunet.tasks.universal import PartialLabelLoss, UniversalTask

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer

BEFORE = "validation_before"
"""Folder of what an extended model predicted before it learned more."""


class UnionLoader(TightLoader):
    """The loader, with each batch from at least two datasets; see :data:`mfm_nnunet.data.class_table.SAMPLING`.

    The order within a batch is random, because nnU-Net centres its last crops on foreground.
    """

    def __init__(self, sampling: float, data: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(data, *arguments, **options)
        self._group(sampling, data.identifiers)

    def _group(self, sampling: float, cases: Iterable[str]) -> None:
        groups: dict[str, list[str]] = {}
        for case in cases:
            groups.setdefault(key_of(case), []).append(case)
        self._groups = [*groups.values()]
        shares = np.array([len(group) ** sampling for group in self._groups])
        self._shares = shares / shares.sum()

    def get_indices(self) -> list[str]:
        """Draw datasets, the second other than the first, and a case of each, all cases of a dataset alike."""
        numbers: Any = np.random.choice(len(self._shares), size=self.batch_size, p=self._shares)
        if self.batch_size > 1 and len(self._shares) > 1:
            others = np.where(np.arange(len(self._shares)) == numbers[0], 0, self._shares)
            numbers[1] = np.random.choice(len(self._shares), p=others / others.sum())
        groups = self._groups
        drawn = [groups[number][np.random.randint(len(groups[number]))] for number in numbers]
        return [drawn[place] for place in np.random.permutation(len(drawn))]


def count_old_outputs(table: ClassTable) -> int:
    """Return the number of outputs of the model that was extended; 0 without one."""
    return table.num_old + (not table.has_regions) if table.num_old else 0


def make_task(trainer: MFMTrainer) -> SegmentationTask:
    """Return the task of a trainer: nnU-Net's, or that of a union, whose cases have partial labels."""
    labels, table = trainer.label_manager, trainer.union
    if table is None or trainer.settings.partial_labels == "background":
        return SegmentationTask(trainer.network, trainer.loss, labels.has_regions, labels.ignore_label)
    if trainer.settings.mix != "none":
        raise MFMError(
            "E_CONFIG",
            f"finetune.mix={trainer.settings.mix}: crops of a union have other classes annotated, and cannot be mixed. "
            "Leave it out.",
        )
    training, validation = (Counter(map(key_of, part)) for part in trainer.do_split())
    loss = PartialLabelLoss(
        labels.has_regions,
        labels.ignore_label,
        trainer.configuration_manager.batch_dice,
        table.expected_classes(training),
        getattr(trainer.loss, "weight_factors", (1.0,)),
        merge=trainer.settings.partial_labels == "auto",
    )
    valid = {key: table.valid_outputs(key) for key in training | validation}
    return UniversalTask(trainer.network, loss, valid, table.names)


def take_old_outputs(trainer: MFMTrainer, table: ClassTable, reading: Reading) -> None:
    """Copy the outputs of the model that a union extends. Raises MFMError (E_MODEL_MISMATCH) for another model."""
    weights, number = {**reading.others, **reading.content["network_weights"]}, count_old_outputs(table)
    copied = copy_old_outputs(unwrapped(trainer.network), weights, number)
    if not copied:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"{reading.place}: not the model that this union extends, or whose classes overlap otherwise: it has no "
            f"output layer of {number} outputs. Give its checkpoint with -pretrained_weights.",
        )
    trainer.print_to_log_file(f"outputs of {table.num_old} classes are taken over, in {len(copied)} tensors")


@torch.no_grad()
def copy_old_outputs(network: nn.Module, weights: Mapping[str, Tensor], num_outputs: int) -> list[str]:
    """Copy the output layers of an older model into the first outputs of ``network``; return their names.

    ``weights`` is the older model's state dict, with ``num_outputs`` outputs.
    """
    known, copied = without_wrapper_prefixes(weights), []
    parameters = dict(network.named_parameters())
    for name in sorted(family_of(network).head_names(network)):
        own, old = parameters[name], known.get(name)
        if old is not None and old.shape == (num_outputs, *own.shape[1:]):
            own[:num_outputs].copy_(old)
            copied.append(name)
    return copied


def keep_old_outputs(network: nn.Module, num_outputs: int) -> None:
    """Drop the gradients of the first outputs, so that they stay as they are (without weight decay)."""

    def drop(gradient: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(gradient[:num_outputs]), gradient[num_outputs:]])

    parameters = dict(network.named_parameters())
    for name in family_of(network).head_names(network):
        parameters[name].register_hook(drop)


# Results


def annotated_labels(table: ClassTable, case: str) -> set[Any]:
    """Return the labels, or regions, as nnU-Net's metrics know them, that the dataset of a case annotates."""
    labels = table.labels()["labels"]
    found = [labels[name] for name in table.classes_of(key_of(case))]
    return {tuple(values) if isinstance(values, list) else values for values in found}


def add_datasets(summary: dict[str, Any], table: ClassTable, cases: Sequence[str]) -> list[str]:
    """Add the Dice of each dataset on its own classes, and the mean over datasets; return lines for the log."""
    labels = {str(tuple(v) if isinstance(v, list) else v): name for name, v in table.labels()["labels"].items()}
    values: dict[str, dict[str, list[float]]] = {}
    for case, result in zip(cases, summary["metric_per_case"]):
        for label, metrics in result["metrics"].items():
            if not math.isnan(dice := float(metrics["Dice"])):
                values.setdefault(key_of(case), {}).setdefault(labels[str(label)], []).append(dice)
    own = {key: {name: float(np.mean(dice)) for name, dice in found.items()} for key, found in values.items()}
    means = {key: float(np.mean([*found.values()])) for key, found in own.items()}
    summary["dice_per_dataset"] = {str(table.datasets[key]["name"]): found for key, found in own.items()}
    summary["mean_dice_over_datasets"] = float(np.mean([*means.values()])) if means else math.nan
    lines = [f"{name}: Dice {_format_values(found)}" for name, found in summary["dice_per_dataset"].items()]
    return [*lines, f"mean Dice over datasets: {summary['mean_dice_over_datasets']:.4f}"]


def _format_values(dice: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in dice.items())


def select_old_classes(trainer: MFMTrainer) -> ChosenOutputs | None:
    """Return the selection of an extended model's old classes, without those that know nothing yet."""
    assert trainer.union is not None, "only a union extends a model"
    selection = select_classes(DatasetJson.of(trainer.dataset_json), trainer.union.names[: trainer.union.num_old])
    return None if selection is None else replace(selection, merged=(0,))


def compare_old_classes(trainer: MFMTrainer) -> list[str]:
    """Write ``old_classes.json``, the Dice of an extended model's old classes before and after; return log lines.

    Where a dataset has labels of the older model only, this is the agreement with that model.
    """
    assert trainer.union is not None, "only a union extends a model"
    folder, table = Path(trainer.output_folder), trainer.union
    advice = "Train again."
    before, after = (
        read_json(folder / name / "summary.json", advice)["dice_per_dataset"] for name in (BEFORE, "validation")
    )
    old = table.names[: table.num_old]
    content = {
        dataset: {
            name: {"before": before[dataset].get(name), "after": dice.get(name), "pseudo_labels": name in pseudo}
            for name in old
            if name in dice or name in before[dataset]
        }
        for dataset, dice in after.items()
        for pseudo in [next(e.get("pseudo", ()) for e in table.datasets.values() if e["name"] == dataset)]
    }
    write_json(folder / "old_classes.json", content)
    return [
        f"old class {name} in {dataset}: {found['before']:.4f} before, {found['after']:.4f} after"
        + (" (agreement with the older model)" if found["pseudo_labels"] else "")
        for dataset, classes in content.items()
        for name, found in classes.items()
        if None not in (found["before"], found["after"])
    ]
