"""A pretrained checkpoint as fine-tuning sees it: weights, what they were trained for, and where they come from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.errors import about
from mfm_nnunet.interchange.conversion import Reading
from mfm_nnunet.interchange.read import read_checkpoint, sha256
from mfm_nnunet.models.build import part_of, stem_names
from mfm_nnunet.models.transfer import (
    Entry,
    Parts,
    Topology,
    TransferReport,
    transfer_weights,
    unwrapped,
    without_wrapper_prefixes,
)


def describe(file: Path, reading: Reading) -> dict[str, Any]:
    """What a plan says about its checkpoint: file name, SHA-256, pretext task; licence and papers where it names any.

    Never a path. Licence and papers go on with the model, because what is derived from the weights is bound by them.
    """
    known = {name: reading.mfm[name] for name in ("licence", "citations") if reading.mfm.get(name)}
    return {"name": file.name, "sha256": sha256(file), "pretext": reading.mfm.get("pretext"), **known}


def has_decoder(reading: Reading, network: nn.Module) -> bool:
    """Whether a checkpoint holds weights of a decoder, as ``network`` names it."""
    names = without_wrapper_prefixes(reading.content["network_weights"])
    return any(part_of(name, network) == "decoder" for name in names)


def transfer_from(
    file: Path,
    network: nn.Module,
    output_folder: Path,
    parts: Parts = "all_but_heads",
    topology: Topology = "fit",
    images: int | None = None,
) -> TransferReport:
    """As :func:`transfer`, and write the report as ``transfer.json``."""
    reading, report = transfer(file, network, parts, topology, images)
    about_file = {"checkpoint": file.name, "layout": reading.layout, "notes": list(reading.notes)}
    with atomic_write(output_folder / "transfer.json") as handle:
        handle.write(json.dumps({**about_file, **report.to_dict()}, indent=1).encode())
    return report


def transfer(
    file: Path,
    network: nn.Module,
    parts: Parts = "all_but_heads",
    topology: Topology = "fit",
    images: int | None = None,
) -> tuple[Reading, TransferReport]:
    """Move ``parts`` of the weights of ``file`` into ``network`` in place; returns what was read, and the report.

    ``file`` is of any layout that :func:`mfm_nnunet.interchange.read.read_checkpoint` knows; ``topology`` says whether
    kernels of another size are adapted; ``images`` is the number of image channels, where labels follow them.

    Raises MFMError as reading does, and (E_MODEL_MISMATCH) when the network is another one.
    """
    reading = read_checkpoint(file)
    configuration = reading.configuration
    with about(file):
        report = transfer_weights(
            reading.content["network_weights"],
            network,
            source_patch_size=reading.mfm.get("patch_size") or configuration.get("patch_size"),
            source_network=(configuration.get("architecture") or {}).get("network_class_name"),
            parts=parts,
            topology=topology,
            images=(_num_images(configuration), images),
        )
    others = tuple(Entry(name, tensor.numel(), "not in this network") for name, tensor in reading.others.items())
    return reading, dataclasses.replace(report, ignored=(*report.ignored, *others))


def image_channels(trainer: nnUNetTrainer) -> int | None:
    """The image channels of a trainer whose network also takes the labels of a previous stage; else None."""
    return len(trainer.configuration_manager.normalization_schemes) if trainer.is_cascaded else None


def _num_images(configuration: Mapping[str, Any]) -> int | None:
    """The image channels of a checkpoint whose network also takes the labels of a previous stage; else None."""
    return len(configuration["normalization_schemes"]) if configuration.get("previous_stage") else None


def untrained_names(report: TransferReport, network: nn.Module) -> set[str]:
    """Names (of ``named_parameters``) of what the checkpoint did not train for this network.

    That is what stayed new, and the stem's projection where it was adapted to other channels.
    """
    plain = unwrapped(network)
    stem = stem_names(plain)
    projections = tuple(f"{e.name.rpartition('.')[0]}." for e in report.adapted if e.name in stem)
    new = {entry.name for entry in report.new}
    return {name for name, _ in plain.named_parameters() if name in new or name.startswith(projections)}
