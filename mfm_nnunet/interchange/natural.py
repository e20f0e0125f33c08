"""Weights of timm: a bare state dict in a ``.safetensors`` or ``.pth`` file, or a folder as on timm's model hub.

They have no plan. The network of a plan made with ``--network timm:NAME`` takes them, under names after ``encoder.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import parse_json
from mfm_nnunet.interchange.foreign import Reading
from mfm_nnunet.interchange.parts import unwrap_names
from mfm_nnunet.models.families import NetworkFamily
from mfm_nnunet.settings import FORMAT

ENDING, CONFIG = ".safetensors", "config.json"
OPEN_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")
"""Licences that allow every use, as timm spells them. All others are accepted by name."""
INSIDE = "state_dict"
"""Key of the weights in files of timm's own training."""


def bare_weights(raw: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Return the tensors of a file that has nothing else; None for other layouts."""
    inside = raw.get(INSIDE, raw)
    if isinstance(inside, Mapping) and inside and all(isinstance(value, Tensor) for value in inside.values()):
        return dict(inside)
    return None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file. Raises MFMError (E_NOT_FOUND, E_MODEL_CORRUPT)."""
    if not file.is_file():
        raise MFMError("E_NOT_FOUND", f"{file}: no such checkpoint. Check the path.")
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise MFMError("E_MODEL_CORRUPT", f"{file}: damaged ({error}). Copy it again.") from error


def timm_config(folder: Path) -> dict[str, Any]:
    """Return the description of a model in a folder as on timm's hub; empty if it is none."""
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and isinstance(config.get("architecture"), str) else {}


def from_timm(weights: Mapping[str, Tensor], folder: Path) -> Reading:
    """Give bare weights our names, and the licence that is stated beside them."""
    config = timm_config(folder)
    own = config.get("pretrained_cfg")
    licence = own.get("license") if isinstance(own, dict) else None
    mfm: dict[str, Any] = {
        "format": FORMAT,
        "kind": "pretrained",
        "pretext": "natural images",
        "trained": "encoder",
        "source": {"layout": "timm", **({"architecture": config["architecture"]} if config else {})},
    }
    if isinstance(licence, str):
        mfm["licence"] = licence
    named = {f"encoder.{name}": tensor for name, tensor in unwrap_names(weights).items()}
    return Reading({"network_weights": named, "mfm": mfm}, "timm")


def settle_licence(reading: Reading, family: NetworkFamily, network: Any, accepted: str | None) -> None:
    """Record the licence of timm's weights, and refuse one that restricts use unless it is accepted by its name.

    It is the one stated beside the file, else the one that timm states for the encoder of the plan. Weights trained
    from them keep it. Raises MFMError: E_CONFIG, and E_MODEL_MISMATCH if the network is none of timm's.
    """
    if reading.layout != "timm":
        return
    known = family.licence(network)
    if known is None:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"{reading.place}: tensors alone. Only networks of timm start from them (plan with --network timm:NAME).",
        )
    licence = reading.mfm.setdefault("licence", known)
    if licence.casefold() in OPEN_LICENCES or (accepted or "").casefold() == licence.casefold():
        return
    given = f", not {accepted}" if accepted else ""
    raise MFMError(
        "E_CONFIG",
        f"{reading.place.name}: the licence of these weights is {licence}{given}. It restricts what they, and all that "
        f"is trained from them, may be used for. Read it, and if you accept it give --accept-licence {licence}.",
    )
