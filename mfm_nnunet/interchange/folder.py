"""A checkpoint as a folder that a model hub takes as it is: safetensors, JSON and a model card.

safetensors stores no tensor twice; the names of one tensor are listed in the file's metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfm_nnunet.checkpoint import atomic_write, sha256
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import parse_json, read_json, shown
from mfm_nnunet.interchange.card import CARD, model_card

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_ALIASES = "aliases"
_DIGEST = "sha256"
"""Key of ``config.json``: the SHA-256 of the weights' file, which has no checksums of its own."""


def is_folder_checkpoint(place: Path) -> bool:
    """Whether ``place`` is a folder as :func:`write_folder` makes it, damaged or not.

    Repositories of others may hold files of these names beside a checkpoint; their ``config.json`` has no ``mfm``.
    """
    if not ((place / WEIGHTS).is_file() and (place / CONFIG).is_file()):
        return False
    try:
        return "mfm" in parse_json((place / CONFIG).read_bytes())
    except (ValueError, TypeError):
        return True


def write_folder(content: Mapping[str, Any], folder: Path) -> None:
    """Write ``model.safetensors``, ``config.json`` (the ``mfm`` key) and ``README.md`` (a model card) into ``folder``.

    Raises MFMError: E_EXISTS when the folder holds anything, E_DISK_FULL.
    """
    from safetensors.torch import save

    if folder.exists() and any(folder.iterdir()):
        raise MFMError("E_EXISTS", f"{folder}: the folder is not empty. Choose another.")
    folder.mkdir(parents=True, exist_ok=True)
    tensors, aliases = _once(content["network_weights"])
    weights = save(tensors, metadata={"format": "pt", _ALIASES: json.dumps(aliases)})
    config = {"mfm": content["mfm"], _DIGEST: hashlib.sha256(weights).hexdigest()}
    files = {
        WEIGHTS: weights,
        CONFIG: json.dumps(config, indent=1).encode(),
        CARD: shown(model_card(content["mfm"], sum(tensor.numel() for tensor in tensors.values()))).encode(),
    }
    for name, data in files.items():
        with atomic_write(folder / name) as file:
            file.write(data)


def read_folder(folder: Path) -> dict[str, Any]:
    """The content of the checkpoint in a folder, as :func:`mfm_nnunet.checkpoint.load` returns it of a file.

    Raises MFMError (E_MODEL_CORRUPT) for a damaged file or one that lacks what we wrote.
    """
    file = folder / WEIGHTS
    config = read_json(folder / CONFIG, "Copy the folder again.", "E_MODEL_CORRUPT")
    mfm, digest = config.get("mfm"), config.get(_DIGEST)
    if digest is not None and sha256(file) != digest:
        raise MFMError(
            "E_MODEL_CORRUPT", f"{file}: not the weights that {CONFIG} is for (SHA-256). Copy the folder again."
        )
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            weights: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            aliases = parse_json((opened.metadata() or {}).get(_ALIASES, "{}"))
        weights |= {name: weights[first] for name, first in aliases.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MFMError("E_MODEL_CORRUPT", f"{file}: damaged ({error}). Copy the folder again.") from error
    if not isinstance(mfm, dict) or mfm.get("kind") != "pretrained":
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{folder / CONFIG}: no description of a checkpoint of ours. Export the checkpoint again.",
        )
    return {"network_weights": weights, "mfm": mfm}


def _once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, and the other names with that one."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            aliases[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases
