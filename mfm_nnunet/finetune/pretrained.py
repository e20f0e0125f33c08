"""A pretrained checkpoint as fine-tuning sees it: weights, what they were trained for, and where they come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.errors import about
from mfm_nnunet.interchange.read import read_checkpoint, sha256
from mfm_nnunet.models.transfer import Entry, TransferReport, transfer_weights


def describe(file: Path) -> dict[str, Any]:
    """What a plan says about its checkpoint: file name, SHA-256 and pretext task. Never a path."""
    pretext = read_checkpoint(file).mfm.get("pretext")
    return {"name": file.name, "sha256": sha256(file), "pretext": pretext}


def transfer_from(file: Path, network: nn.Module, output_folder: Path) -> TransferReport:
    """Move the weights of ``file`` into ``network`` in place and write the report as ``transfer.json``.

    ``file`` is of any layout that :func:`mfm_nnunet.interchange.read.read_checkpoint` knows.

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
        )
    others = tuple(Entry(name, tensor.numel(), "not in this network") for name, tensor in reading.others.items())
    report = dataclasses.replace(report, ignored=(*report.ignored, *others))
    notes = {"layout": reading.layout, "notes": list(reading.notes)}
    with atomic_write(output_folder / "transfer.json") as handle:
        handle.write(json.dumps({"checkpoint": file.name, **notes, **report.to_dict()}, indent=1).encode())
    return report
