"""A pretrained checkpoint as fine-tuning sees it: weights, what they were trained for, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mfm_nnunet import checkpoint
from mfm_nnunet.checkpoint import atomic_write
from mfm_nnunet.errors import about
from mfm_nnunet.models.transfer import TransferReport, transfer_weights


@dataclass(frozen=True)
class Pretrained:
    """``weights`` is a state dict; ``patch_size`` (voxels) and ``network`` (class name) are None where unknown."""

    weights: dict[str, Tensor]
    patch_size: tuple[int, ...] | None
    network: str | None


def read_pretrained(file: Path) -> Pretrained:
    """Read a checkpoint of this package or of nnU-Net; MFMError as :func:`mfm_nnunet.checkpoint.load_weights`."""
    content = checkpoint.load_weights(file)
    configuration = _configuration(content)
    patch, architecture = configuration.get("patch_size"), configuration.get("architecture")
    return Pretrained(
        content["network_weights"],
        tuple(int(size) for size in patch) if isinstance(patch, (list, tuple)) else None,
        architecture.get("network_class_name") if isinstance(architecture, Mapping) else None,
    )


def describe(file: Path) -> dict[str, Any]:
    """What a plan says about its checkpoint: file name, SHA-256 and pretext task. Never a path."""
    about = checkpoint.load_weights(file).get("mfm")
    pretext = about.get("pretext") if isinstance(about, Mapping) else None
    return {"name": file.name, "sha256": checkpoint.sha256(file), "pretext": pretext}


def transfer_from(file: Path, network: nn.Module, output_folder: Path) -> TransferReport:
    """Move the weights of ``file`` into ``network`` in place and write the report as ``transfer.json``.

    Raises MFMError as reading does, and (E_MODEL_MISMATCH) when the network is another one.
    """
    source = read_pretrained(file)
    with about(file):
        report = transfer_weights(
            source.weights, network, source_patch_size=source.patch_size, source_network=source.network
        )
    with atomic_write(output_folder / "transfer.json") as handle:
        handle.write(json.dumps({"checkpoint": file.name, **report.to_dict()}, indent=1).encode())
    return report


def _configuration(content: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's configuration that the weights were trained with, inherited values included; empty if unknown."""
    for place in (content.get("mfm"), content.get("init_args")):
        if not isinstance(place, Mapping) or not isinstance(place.get("plans"), Mapping):
            continue
        configurations = place["plans"].get("configurations", {})
        resolved: dict[str, Any] = {}
        name, visited = place.get("configuration"), set()
        while name in configurations and name not in visited:
            visited.add(name)
            resolved = {**configurations[name], **resolved}
            name = configurations[name].get("inherits_from")
        return resolved
    return {}
