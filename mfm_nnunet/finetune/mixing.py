"""Mixing of the crops of a fold: batches mixed under their own seed, and checks that there is something to mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.loading import Batch, SeededBatches, seed_of
from mfm_nnunet.settings import FinetuneSettings
from mfm_nnunet.tasks.mixing import Mixing, downsample_targets

if TYPE_CHECKING:
    from mfm_nnunet.finetune.trainer import MFMTrainer


@dataclass(frozen=True)
class MixedBatches(SeededBatches):
    """The stream of a loader whose targets have full resolution; from step ``start`` on, crops are mixed.

    The crops are those of :class:`SeededBatches`, which mixing does not change: it draws from a generator of its own.
    """

    mixing: Mixing
    start: int
    scales: Sequence[Sequence[float]] | None
    """Scales of deep supervision, to which targets are reduced after mixing; None without."""

    def __getitem__(self, index: int) -> Batch:
        batch = super().__getitem__(index)
        data, target = batch["data"], batch["target"]
        if index >= self.start:
            rng = np.random.default_rng(seed_of(self.seed, f"mixing of {self.stream}", index))
            data, target = self.mixing.mix(data, target, rng)
        if self.scales is not None:
            target = downsample_targets(target, self.scales)
        return {**batch, "data": data, "target": target}


def mix_batches(source: SeededBatches, trainer: MFMTrainer) -> MixedBatches:
    """Return the training batches of ``source``, mixed as the trainer's settings say.

    Raises MFMError (E_CONFIG): see :func:`make_mixing` and :func:`require_something_to_mix`.
    """
    mixing = make_mixing(trainer.settings, trainer.label_manager)
    require_something_to_mix(trainer, mixing, source.loader._data)
    scales = trainer._get_deep_supervision_scales()
    return MixedBatches(source.loader, source.seed, source.stream, mixing, trainer.settings.mix_start, scales)


def make_mixing(settings: FinetuneSettings, manager: LabelManager) -> Mixing:
    """Make the mixing that ``settings`` ask for; ``settings.mix`` is not "none".

    Raises MFMError (E_CONFIG) for a label to paste that the dataset does not have.
    """
    regions = manager.foreground_regions if manager.has_regions else None
    known = range(1, len(regions) + 1) if regions else manager.foreground_labels
    if unknown := [label for label in settings.mix_labels if label not in known]:
        kind = "regions, counted from 1 as in dataset.json, are" if regions else "labels are"
        raise MFMError(
            "E_CONFIG",
            f"finetune.mix_labels={unknown[0]}: the dataset has no such label; its {kind} "
            f"{', '.join(map(str, known))}.",
        )
    pasted = settings.mix_labels or tuple(known)
    first = 1 if regions else 0  # channels are counted from 0
    assert settings.mix != "none", "there is something to mix"
    return Mixing(
        settings.mix,
        settings.mix_probability,
        settings.mix_box,
        labels=tuple(label - first for label in pasted),
        is_one_label=settings.mix_draw == "one",
        hosts=tuple(label - first for label in known if label not in pasted),
        has_regions=bool(regions),
        ignored=len(regions) if regions and manager.has_ignore_label else manager.ignore_label,
    )


def require_something_to_mix(trainer: MFMTrainer, mixing: Mixing, dataset: Any) -> None:
    """Check that the training cases and the batch allow the mixing; warn of cases whose voxels are all ignored.

    Raises MFMError (E_CONFIG) for a single crop per step, training cases in which everything is ignored, and none that
    has a label to paste.
    """
    name, manager = f"finetune.mix={mixing.kind}", trainer.label_manager
    if trainer.batch_size < 2:
        raise MFMError(
            "E_CONFIG",
            f"{name}: crops of one step are mixed, and this plan has one per step and GPU. Set finetune.batch_size=2, "
            "or more with several GPUs.",
        )
    places = {case: dataset.load_case(case)[3]["class_locations"] for case in dataset.identifiers}
    filled = {case: {key for key, voxels in of_case.items() if len(voxels)} for case, of_case in places.items()}
    if manager.has_ignore_label:
        ignored = [case for case in filled if not filled[case]]
        if len(ignored) == len(filled):
            raise MFMError(
                "E_CONFIG",
                f"{name}: all voxels of all {len(filled)} training cases have the ignore label, so there is nothing to "
                "mix or to learn. Check the label files and 'ignore' in dataset.json.",
            )
        if ignored:
            trainer.print_to_log_file(
                f"WARNING: {name}: all voxels of {len(ignored)} of {len(filled)} training cases have the ignore label, "
                f"e.g. {ignored[0]}. Boxes from them teach nothing: label them, or leave them out."
            )
    keys = [manager.foreground_regions[label] for label in mixing.labels] if mixing.has_regions else mixing.labels
    if mixing.kind != "cutmix" and not any(set(keys) & found for found in filled.values()):
        raise MFMError(
            "E_CONFIG",
            f"{name}: none of the {len(filled)} training cases has a label to paste ({', '.join(map(str, keys))}). Set "
            "finetune.mix_labels to labels that they have, or finetune.mix=cutmix.",
        )
