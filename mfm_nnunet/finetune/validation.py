"""Predict a fold's validation cases in this process and write nnU-Net's ``summary.json``.

Stock nnU-Net starts two pools of processes for this, which takes longer than the work itself on small data.
"""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from mfm_nnunet.data.storage import remove_dead_stages, staging
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, report_full_disk
from mfm_nnunet.finetune.loading import require_geometry
from mfm_nnunet.finetune.universal import add_datasets, annotated_labels
from mfm_nnunet.images.reading import read_label
from mfm_nnunet.prediction.export import publish, require_space, write_case
from mfm_nnunet.prediction.model import Model
from mfm_nnunet.reports.progress import track

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer
    from mfm_nnunet.prediction.selection import ChosenOutputs

Label = int | tuple[int, ...]


def validate_fold(
    trainer: MFMTrainer, save_probabilities: bool, name: str = "validation", selection: ChosenOutputs | None = None
) -> Iterator[str]:
    """Predict and evaluate the validation cases of the trainer's fold. Yield each case's name once predicted.

    ``name`` is that of the folder of masks. ``selection`` limits the classes that are predicted.
    """
    folder = Path(trainer.output_folder) / name
    folder.mkdir(parents=True, exist_ok=True)
    remove_dead_stages(folder)
    _, cases = trainer.do_split()
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    axes, ending = trainer.inference_allowed_mirroring_axes, trainer.dataset_json["file_ending"]
    model = Model(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json, trainer.device,
        mirror_axes=tuple(axes) if axes else None,
        autocast_dtype=torch.bfloat16 if getattr(trainer, "autocast_dtype", None) is torch.bfloat16 else torch.float16,
        selection=selection,
    )  # fmt: skip
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(cases))
    with track("validating the fold", len(dataset.identifiers), lines=False) as advance:
        for case in dataset.identifiers:
            data, _, _, properties = dataset.load_case(case)
            file = Path(trainer.preprocessed_dataset_folder) / f"{case}.pkl"
            require_geometry(file, properties, trainer.plans_manager.plans["image_reader_writer"])
            image_CDHW = torch.from_numpy(np.array(data[:]))
            require_space(inside(folder, f"{case}{ending}"), properties)
            logits = model.predict_logits(image_CDHW, what=case)
            with track(f"{case}: writing the mask"), staging(folder) as stage:
                target = inside(stage, case)
                write_case(
                    logits, properties, model.managers, target, ending, save_probabilities=save_probabilities,
                    values=selection.values if selection else None,
                )  # fmt: skip
                publish(stage, folder)
            advance()
            yield case
    trainer.set_deep_supervision_enabled(True)
    trainer.print_to_log_file(format_dice(evaluate(trainer, cases, folder), trainer.dataset_json))


def evaluate(trainer: MFMTrainer, cases: Iterable[str], prediction_folder: Path) -> dict[str, Any]:
    """Compute metrics of the predicted ``cases`` against ``gt_segmentations`` and write ``summary.json``.

    A case of a union counts for the classes that its dataset annotates.
    """
    ending, labels = trainer.dataset_json["file_ending"], trainer.label_manager
    reference = Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations"
    names = [case + ending for case in sorted(cases)]
    files = [(inside(reference, name), inside(prediction_folder, name)) for name in names]
    missing = [str(file) for file, _ in files if not file.is_file()]
    if missing:
        raise MFMError(
            "E_NOT_FOUND",
            "the reference segmentations of the validation cases are missing: " + ", ".join(missing[:5]) +
            ". Run mfm_plan_and_preprocess for this dataset again.",
        )  # fmt: skip
    all_labels = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    annotated = None if trainer.union is None else [annotated_labels(trainer.union, case) for case in sorted(cases)]
    reader_name = trainer.plans_manager.plans["image_reader_writer"]
    summary = summarise(files, reader_name, all_labels, labels.ignore_label, annotated)
    if trainer.union is not None:
        for line in add_datasets(summary, trainer.union, sorted(cases)):
            trainer.print_to_log_file(line)
    with report_full_disk(prediction_folder / "summary.json"), staging(prediction_folder) as stage:
        save_summary_json(summary, str(stage / "summary.json"))
        publish(stage, prediction_folder)
    return summary


def summarise(
    files: Sequence[tuple[Path, Path]],
    reader_name: str,
    labels: Sequence[Label],
    ignore_label: int | None,
    annotated: Sequence[Collection[Label]] | None = None,
) -> dict[str, Any]:
    """Return metrics of (reference, prediction) pairs in nnU-Net's layout: per case, per label, foreground mean.

    A label that is in neither masks nor references is NaN, as in nnU-Net. There the foreground mean becomes NaN too;
    here it is the mean over the labels that have a value. ``annotated`` has the labels that each case is marked with,
    if not all are; the metrics of the others are NaN.
    """
    # Instead of nnU-Net's reader of that name, one with our checks of the file.
    reader: Any = types.SimpleNamespace(read_seg=lambda file: read_label(Path(file), reader_name))
    results = [compute_metrics(str(truth), str(mask), reader, list(labels), ignore_label) for truth, mask in files]
    names = list(results[0]["metrics"][labels[0]])
    for result, own in zip(results, annotated or ()):
        result["metrics"] |= {label: dict.fromkeys(names, math.nan) for label in labels if label not in own}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a label that no case has: the mean of nothing is NaN
        mean: dict[Label, dict[str, Any]] = {
            label: {name: np.nanmean([r["metrics"][label][name] for r in results]) for name in names}
            for label in labels
        }
        foreground = [label for label in labels if label != 0]
        foreground_mean = {name: np.nanmean([mean[label][name] for label in foreground]) for name in names}
    summary: dict[str, Any] = {"metric_per_case": results, "mean": mean, "foreground_mean": foreground_mean}
    for part in (*results, mean, foreground_mean):
        recursive_fix_for_json_export(part)
    return summary


def format_dice(summary: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> str:
    """Format the foreground's mean Dice in a line that names the labels without one."""
    absent = [
        name
        for name, values in DatasetJson.of(dataset_json).foreground.items()
        for label in (values, values[0] if len(values) == 1 else values)
        if label in summary["mean"] and math.isnan(summary["mean"][label]["Dice"])
    ]
    note = f" (without {', '.join(absent)}, which neither masks nor references have)" if absent else ""
    return f"Mean Validation Dice: {summary['foreground_mean']['Dice']}{note}"
