"""Describe, verify and convert pretrained checkpoints of every supported layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mfm_nnunet.errors import about
from mfm_nnunet.interchange.folder import describe_text
from mfm_nnunet.interchange.foreign import DESCRIBED, require_plan
from mfm_nnunet.interchange.read import convert, find_checkpoint, read_checkpoint
from mfm_nnunet.interchange.verify import require_complete

TokenOrder = Literal["whd", "hwd"]


def describe_checkpoint(address: str | Path, *, verify: bool = False, token_order: TokenOrder | None = None) -> str:
    """Describe a checkpoint: task, network, plan, corpus, licence, citation.

    With ``verify``, build its network and compare every tensor with it. ``token_order`` is for a foreign Primus whose
    file does not record it. Raises MFMError for a file that cannot be read, is damaged, or is not a complete network.
    """
    place = find_checkpoint(address)
    reading = read_checkpoint(place, token_order)
    with about(place):
        require_plan(reading, *DESCRIBED)
        if verify:
            require_complete(reading.content)
    return describe_text(reading)


def convert_checkpoint(
    address: str | Path,
    output: str | Path,
    *,
    layout: Literal["pth", "folder", "nnssl"] = "folder",
    licence: str | None = None,
    token_order: TokenOrder | None = None,
    pictures: bool = False,
) -> Path:
    """Convert a checkpoint of any supported layout to another one and return ``output``.

    ``pth`` is our own file, ``folder`` safetensors with JSON and a model card, ``nnssl`` a folder that nnU-Net's
    development code reads. Both folders get the curve of pretraining if it is beside the checkpoint, and with
    ``pictures`` also a crop of a scan. Raises MFMError: those of :func:`describe_checkpoint`, E_EXISTS for an existing
    output, E_CONFIG for a network that the layout cannot express.
    """
    place = find_checkpoint(address)
    with about(place):
        convert(place, Path(output), layout, licence, token_order, pictures)
    return Path(output)
