"""Predict some of a model's classes, and choose the normalisation of images where it depends on their kind.

Outputs are selected in each window, so memory and time of everything behind the network follow the selection. A label
keeps its value in the masks whatever is selected. Legend: B batch, K outputs, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from mfm_nnunet.data.class_table import ClassTable
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.files import whole_number
from mfm_nnunet.modalities import kind_of
from mfm_nnunet.plan import Plan
from mfm_nnunet.prediction.model import Model


@dataclass(frozen=True)
class ChosenOutputs:
    """Selected outputs of a network."""

    names: tuple[str, ...]
    outputs: tuple[int, ...]
    """Their numbers; without the background of a softmax."""
    merged: tuple[int, ...]
    """Outputs whose probability belongs to the background now; empty for regions."""
    label_manager: LabelManager
    values: np.ndarray | None
    """Value in the mask of each number that the label manager writes; None if they are the same."""

    def __call__(self, logits_BKDHW: torch.Tensor) -> torch.Tensor:
        """Return the logits of the background, if there is one, and of the selected outputs."""
        if self.values is None:
            return logits_BKDHW[:, self.outputs]
        background = logits_BKDHW[:, self.merged].float().logsumexp(1, keepdim=True).to(logits_BKDHW.dtype)
        return torch.cat([background, logits_BKDHW[:, self.outputs]], 1)


def choose_outputs(
    model: Model, classes: Sequence[str] | None, classes_of: str | int | None, modality: str | None = None
) -> Model:
    """Return the model for the named classes, else those that a dataset of its union annotates, else for all.

    Where a model has several normalisations, ``modality`` chooses it, else ``classes_of``. Raises MFMError (E_CONFIG)
    for an unknown name, and if the normalisation is not known.
    """
    plan = Plan.of(model.plans_manager.plans)
    table = None if plan.mfm.universal is None else ClassTable.of(plan.mfm.universal)
    key = None if classes_of is None else _find_dataset(table, str(classes_of))
    names = tuple(classes or ())
    if key is not None and table is not None and not names:
        names = tuple(table.classes_of(key))
    _require_known(model, names)
    if modality and kind_of(modality) not in plan.modalities:
        known = f"by {', '.join(plan.modalities)}" if plan.modalities else "all images alike: leave it out"
        raise MFMError("E_CONFIG", f"--modality {modality}: this model normalises {known}.")
    if plan.modalities:
        model = _normalised(model, plan, kind_of(modality or "") or _find_kind(plan, table, key, names))
    if not names:
        return model
    selection = select_classes(DatasetJson.of(model.dataset_json), names)
    return replace(model, selection=selection) if selection else model


def describe_choice(
    classes: Sequence[str] | None, classes_of: str | int | None, modality: str | None
) -> dict[str, Any]:
    """Return the settings of a prediction that depend on the choice; empty without one, as before there was any."""
    own = {} if modality is None else {"modality": kind_of(modality)}
    if not classes and classes_of is None:
        return own
    return {"classes": list(classes or ()), "classes_of": None if classes_of is None else str(classes_of), **own}


def _find_dataset(table: ClassTable | None, wanted: str) -> str:
    if table is None:
        raise MFMError("E_CONFIG", f"--classes-of {wanted}: the model was trained on one dataset. Use --classes.")
    names = {str(entry["name"]): key for key, entry in table.datasets.items()}
    number = whole_number(wanted)
    key = names.get(wanted) if number is None else f"{number:03d}"
    if key not in table.datasets:
        raise MFMError("E_CONFIG", f"--classes-of {wanted}: not in this model's union. {nearest(wanted, names)}")
    return str(key)


def _require_known(model: Model, names: Sequence[str]) -> None:
    if names and model.heads:
        raise MFMError("E_CONFIG", "--classes: this model classifies whole images. Leave it out.")
    known = DatasetJson.of(model.dataset_json).foreground
    for name in names:
        if name not in known:
            raise MFMError("E_CONFIG", f"--classes {name}: the model has no such class. {nearest(name, known)}")
        if list(names).count(name) > 1:
            raise MFMError("E_CONFIG", f"--classes {name}: given twice. Give it once.")


def _find_kind(plan: Plan, table: ClassTable | None, key: str | None, names: Sequence[str]) -> str:
    """Return the kind of image of a dataset, or of all datasets that annotate the classes."""
    if table is None:
        raise MFMError(
            "E_CONFIG",
            "which kind of images? This model normalises by modality. Give theirs with --modality: "
            f"{' or '.join(plan.modalities)}.",
        )
    keys = [key] if key else [k for k in table.datasets if not names or set(names) & set(table.classes_of(k))]
    kinds = {str(table.datasets[k]["kind"]) for k in keys}
    if len(kinds) > 1:
        listed = ", ".join(f"{k} ({table.datasets[k]['kind']})" for k in keys)
        raise MFMError(
            "E_CONFIG",
            f"which kind of images? This model normalises by dataset. Give one of them with --classes-of: {listed}; or "
            "give --modality.",
        )
    return kinds.pop()


def _normalised(model: Model, plan: Plan, kind: str) -> Model:
    manager = PlansManager(dict(plan.for_modality(kind).content))
    own = manager.get_configuration(model.configuration)
    return replace(model, plans_manager=manager, configuration_manager=own)


def select_classes(dataset: DatasetJson, names: Sequence[str]) -> ChosenOutputs | None:
    """Return the selection of some classes; None for all of them."""
    foreground, order = dataset.foreground, dataset.content.get("regions_class_order")
    if set(names) == set(foreground):
        return None
    if dataset.has_regions:
        places = [place for place, name in enumerate(foreground) if name in names]
        chosen = [list(foreground)[place] for place in places]
        # Twice the same value: nnU-Net takes a list of one for a label of a softmax.
        labels = {"background": 0, **{name: [*foreground[name], foreground[name][-1]] for name in chosen}}
        manager = LabelManager(labels, [int(order[place]) for place in places])  # type: ignore[index]
        return ChosenOutputs(tuple(chosen), tuple(places), (), manager, None)
    by_value = sorted((values[0], name) for name, values in foreground.items())
    kept = [(value, name) for value, name in by_value if name in names]
    merged = (0, *(value for value, name in by_value if name not in names))
    manager = LabelManager({"background": 0, **{name: place for place, (_, name) in enumerate(kept, 1)}}, None)
    dtype = np.uint8 if by_value[-1][0] < 256 else np.uint16
    values = np.array([0, *(value for value, _ in kept)], dtype)
    return ChosenOutputs(tuple(name for _, name in kept), tuple(value for value, _ in kept), merged, manager, values)
