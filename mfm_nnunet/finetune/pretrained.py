"""Transfer of a pretrained checkpoint into fine-tuning: its weights, their training settings and their origin."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from mfm_nnunet.errors import about
from mfm_nnunet.files import atomic_write
from mfm_nnunet.interchange.foreign import Reading, require_plan
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.transfer import (
    HOW_TO_FIT,
    Entry,
    Parts,
    Topology,
    TransferReport,
    transfer_weights,
    unwrapped,
    without_wrapper_prefixes,
)
from mfm_nnunet.plan import Configuration, Plan

logger = logging.getLogger(__name__)


def has_decoder(reading: Reading, network: nn.Module) -> bool:
    """Check if a checkpoint contains weights of the decoder of ``network``."""
    names, family = without_wrapper_prefixes(reading.content["network_weights"]), family_of(network)
    return any(family.part_of(name) == "decoder" for name in names)


def transfer_into(
    trainer: nnUNetTrainer, reading: Reading, parts: Parts = "all_but_heads", topology: Topology = "fit"
) -> TransferReport:
    """Run :func:`transfer` on the network of an initialized trainer and log the result.

    ``transfer.json`` in the run's folder contains the whole report, with the file's name, hash, licence and papers.
    """
    report, lines = _transfer_and_describe(
        reading,
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        Path(trainer.output_folder),
        (parts, topology),
        _image_channels(trainer),
    )
    trainer.print_to_log_file("\n".join(lines))
    trainer.print_to_log_file(report.details(), also_print_to_console=False)
    return report


def transfer_with_report(
    reading: Reading,
    network: nn.Module,
    plans: Mapping[str, Any],
    configuration: str,
    folder: Path,
    parts: Parts,
    topology: Topology,
) -> TransferReport:
    """Run :func:`transfer` on a network of ``plans``, log the result, and write ``transfer.json`` into ``folder``."""
    manager = PlansManager(dict(plans))
    report, lines = _transfer_and_describe(
        reading, network, manager, manager.get_configuration(configuration), folder, (parts, topology), None
    )
    logger.info("%s", "\n".join(lines).replace("\n", "\n  "))
    logger.debug("%s", report.details())
    return report


def _transfer_and_describe(
    reading: Reading,
    network: nn.Module,
    plans: PlansManager,
    own: ConfigurationManager,
    folder: Path,
    how: tuple[Parts, Topology],
    images: int | None,
) -> tuple[TransferReport, list[str]]:
    dataset = re.sub(r"Dataset0*(\d+)_.*", r"\1", plans.dataset_name)
    configuration = "2d" if len(own.patch_size) == 2 else "3d_fullres"
    how_to_fit = f"mfm_plan_and_preprocess -d {dataset} -c {configuration} --like {shlex.quote(str(reading.place))}"
    report = transfer(reading, network, *how, images, how_to_fit)
    notes = [*reading.notes, *_note_differences(reading, plans, own)]
    known = reading.origin
    about_file = {"checkpoint": known["name"], **known, "layout": reading.layout, "notes": notes}
    del about_file["name"]
    with atomic_write(folder / "transfer.json") as handle:
        handle.write(json.dumps({**about_file, **report.to_dict()}, indent=1).encode())
    return report, [f"weights from {known['name']}:", report.summary(), *notes]


def transfer(
    reading: Reading,
    network: nn.Module,
    parts: Parts = "all_but_heads",
    topology: Topology = "fit",
    images: int | None = None,
    how_to_fit: str = HOW_TO_FIT,
) -> TransferReport:
    """Move ``parts`` of a checkpoint's weights into ``network`` in place and return the report.

    ``topology`` decides if kernels of another size are adapted. ``images`` is the number of image channels, if labels
    follow them. ``how_to_fit`` is the planning command that makes the network fit, for messages.

    Raises MFMError (E_MODEL_MISMATCH) for a network that does not match.
    """
    with about(reading.place):
        if reading.mfm.get("plans"):
            require_plan(reading)
        configuration = reading.configuration
        report = transfer_weights(
            reading.content["network_weights"],
            network,
            source_patch_size=reading.mfm.get("patch_size") or configuration.get("patch_size"),
            source_network=(configuration.get("architecture") or {}).get("network_class_name"),
            parts=parts,
            topology=topology,
            images=(_num_images(configuration), images),
            how_to_fit=how_to_fit,
        )
    others = tuple(Entry(name, tensor.numel(), "not in this network") for name, tensor in reading.others.items())
    return dataclasses.replace(report, ignored=(*report.ignored, *others))


def _note_differences(reading: Reading, plans: PlansManager, own: ConfigurationManager) -> list[str]:
    """Describe differences in spacing, normalisation and axis order between plan and checkpoint, one line each.

    The weights still load, but see images unlike those they were trained on.
    """
    theirs = reading.configuration
    if not theirs:
        return []
    pairs = []
    if Configuration("", theirs).is_resampled and len(theirs["spacing"]) == len(own.spacing):
        pairs.append(("spacing in mm", np.round(own.spacing, 3).tolist(), np.round(theirs["spacing"], 3).tolist()))
    by_modality = {rule["scheme"] for rule in Plan.of(reading.mfm.get("plans") or {}).modalities.values()}
    schemes = theirs.get("normalization_schemes")
    if schemes and not set(own.normalization_schemes) <= by_modality:
        pairs.append(("normalisation", sorted(set(own.normalization_schemes)), sorted(set(map(str, schemes)))))
    order = (reading.mfm.get("plans") or {}).get("transpose_forward")
    if order and len(own.patch_size) == 3:
        pairs.append(("order of the axes", list(plans.transpose_forward), list(order)))
    return [
        f"NOTE: {what}: {here} in this plan, {there} in the checkpoint's; a plan made --like it has the same"
        for what, here, there in pairs
        if here != there
    ]


def _image_channels(trainer: nnUNetTrainer) -> int | None:
    """Return the number of image channels if the trainer's network also takes labels of a previous stage, else None."""
    return len(trainer.configuration_manager.normalization_schemes) if trainer.is_cascaded else None


def _num_images(configuration: Mapping[str, Any]) -> int | None:
    """Return the number of image channels if the checkpoint's network also takes such labels, else None."""
    return len(configuration["normalization_schemes"]) if configuration.get("previous_stage") else None


def untrained_names(report: TransferReport, network: nn.Module) -> set[str]:
    """Return the names (in ``named_parameters``) of the parameters the checkpoint did not train for this network.

    These are the randomly initialised ones, and the stem's projection if it was adapted to other channels.
    """
    plain = unwrapped(network)
    stem = family_of(plain).stem_names(plain)
    adapted = [entry.name for entry in report.adapted if entry.name in stem]
    adapted = [name for name in adapted if plain.get_parameter(name).shape[1] > 1]  # the sum is exact for one channel
    projections = tuple(f"{name.rpartition('.')[0]}." for name in adapted)
    new = {entry.name for entry in report.new}
    return {name for name, _ in plain.named_parameters() if name in new or name.startswith(projections)}
