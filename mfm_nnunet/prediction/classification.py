"""Classifiers: from a checkpoint to probabilities per case, and to ``predictions.csv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mfm_nnunet.data.views import list_places, read_views
from mfm_nnunet.dataset import IMAGE_TASKS
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import inside, read_json, write_csv, write_json
from mfm_nnunet.metrics import to_probabilities
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.classifier import PREFIX, Classifier
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.plan import Plan
from mfm_nnunet.requests import HEADS

if TYPE_CHECKING:
    from mfm_nnunet.prediction.model import Model

ENDING = ".labels.json"
"""Of the file of each case beside the table."""


@dataclass(frozen=True)
class HeadInfo:
    """Description of a classifier's outputs, as its checkpoint holds it."""

    kind: str
    task: str
    classes: tuple[str, ...]
    """Empty for numbers."""
    mean: float
    deviation: float
    """Numbers are the output times ``deviation`` plus ``mean``."""
    temperature: float | None
    """None: probabilities are not calibrated."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return self.classes or ("prediction",)

    def label(self, values: Sequence[float]) -> str:
        """Return the class of the highest probability; of several labels, all that are likelier than not."""
        if self.task == "multilabel":
            return ";".join(name for name, value in zip(self.names, values) if value > 0.5)
        return self.names[int(np.argmax(values))]

    def views(self, x_CDHW: torch.Tensor, patch_size: Sequence[int]) -> torch.Tensor:
        """Return all views (N, C, *patch) of a preprocessed image."""
        kind = "tiles" if self.kind == "mil" else "whole"
        image = x_CDHW.numpy()
        return read_views(image, list_places(image.shape[1:], patch_size, kind), patch_size)  # type: ignore[arg-type]

    def probabilities(self, logits_NK: np.ndarray) -> np.ndarray:
        """Return probabilities, or numbers in their own unit."""
        return to_probabilities(self.task, logits_NK, self.temperature) * self.deviation + self.mean


def read_head(content: Mapping[str, Any], file: Path) -> HeadInfo | None:
    """Return the head in a checkpoint; None for a segmentation model.

    Raises MFMError (E_MODEL_CORRUPT) for a head that cannot be.
    """
    mfm = content.get("mfm")
    if "head_weights" not in content or not isinstance(mfm, Mapping):
        return None
    try:
        mean, deviation = map(float, mfm["scale"])
        temperature = None if mfm["temperature"] is None else float(mfm["temperature"])
        head = HeadInfo(mfm["head"], mfm["task"], tuple(map(str, mfm["classes"])), mean, deviation, temperature)
        is_sound = head.kind in HEADS and head.task in IMAGE_TASKS and bool(np.isfinite([mean, deviation]).all())
        is_sound = is_sound and (temperature is None or 0 < temperature < 1e3) and len(head.classes) < 10**5
    except (KeyError, TypeError, ValueError):
        is_sound = False
    if not is_sound or not isinstance(content["head_weights"], Mapping):
        raise MFMError("E_MODEL_CORRUPT", f"{file}: the description of its head is damaged. Copy it again.")
    return head


def head_weights(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the head's weights under their names in a classifier."""
    return {f"{PREFIX}{name}": tensor for name, tensor in content["head_weights"].items()}


def build_classifier(head: HeadInfo, plans: Mapping[str, Any], configuration: str) -> Classifier:
    """Build the classifier of a plan with fresh weights."""
    resolved = Plan.of(plans).configuration(configuration)
    network = build_network(plans, configuration, resolved.num_channels, 1)
    backbone = make_backbone(network, tuple(int(size) for size in resolved.patch_size), "none")
    return Classifier(backbone, head.kind, len(head.names))


def write_labels(head: HeadInfo, predicted_K: np.ndarray, file: Path) -> None:
    """Write the prediction of a case as JSON."""
    write_json(file, {"task": head.task, "outputs": dict(zip(head.names, map(float, predicted_K)))})


def write_table(model: Model, folder: Path, cases: Sequence[str], name: str) -> None:
    """Write the table ``name`` from the files of ``cases``."""
    head = model.heads[0]
    calibrated = "yes" if all(fold.temperature is not None for fold in model.heads) else "no"
    header = ["case", *head.names, "label", "calibrated", "model"]
    rows = []
    for case in sorted(cases):
        content = read_json(inside(folder, f"{case}{ENDING}"), "Predict it again with --overwrite.")
        values = [float(content["outputs"][name]) for name in head.names]
        rows.append([case, *values, head.label(values), calibrated, model.sha256[:12]])
    if head.task == "regression":  # a number has neither label nor probability
        header, rows = [*header[:2], header[-1]], [[*row[:2], row[-1]] for row in rows]
    write_csv(folder / name, header, rows)
