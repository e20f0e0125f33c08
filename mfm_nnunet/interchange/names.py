"""Where the network sits in a foreign state dict: its tensors under our names, and what belongs to no network.

Pretraining code wraps networks (``module.``, ``_orig_mod.``, ``encoder.eva.``, ``online_encoder.stages.``) and adds
heads, projectors and second decoders. Parts are found by the structure of the names, not by a list of wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mfm_nnunet.errors import MFMError

Family = Literal["resenc", "plain", "primus"]

_ENCODERS: dict[Family, tuple[str, str]] = {
    "resenc": ("stages", r"0\.blocks\.0\.conv1\."),
    "plain": ("stages", r"0\.0\.convs\.0\."),
    "primus": ("eva", r"blocks\.0\.attn\."),
}
"""The last word of each encoder's usual name, and how the name of a tensor goes on that its first block has."""

_WRAPPERS = ("module", "_orig_mod")
_DECODER_PARTS = ("stages", "transpconvs", "seg_layers")


@dataclass(frozen=True)
class Parts:
    """A state dict taken apart: ``weights`` under our names; ``others``, under the file's, fit no network of ours."""

    family: Family
    weights: dict[str, Tensor]
    others: dict[str, Tensor]


def take_apart(state: Mapping[str, Tensor], key_to_encoder: str | None = None, key_to_stem: str | None = None) -> Parts:
    """Find encoder, stem and decoder in ``state``; the keys are the file's own words for the first two, if it has any.

    Raises MFMError (E_MODEL_MISMATCH), which shows the first names, when there is no encoder that we know, when it is
    not where the file says, and when there are several and nothing says which is meant.
    """
    tensors = {unwrapped_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    family, prefix = _find_encoder(tensors, key_to_encoder)
    renamed = _renaming(family, prefix, key_to_stem)
    weights: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = next((place for place in renamed if name.startswith(place)), None)
        if place is not None:
            weights[renamed[place] + name[len(place) :]] = tensor
        elif "decoder.encoder." not in name:  # a U-Net's decoder knows its encoder: the same tensors again
            others[name] = tensor
    return Parts(family, weights, others)


def unwrapped_name(name: str) -> str:
    """``name`` without the words that DistributedDataParallel and torch.compile leave, wherever they stand."""
    parts = str(name).split(".")
    kept = [part for part in parts[:-1] if part not in _WRAPPERS]
    return ".".join([*kept, parts[-1]])


def _find_encoder(tensors: Mapping[str, Tensor], wanted: str | None) -> tuple[Family, str]:
    if wanted is not None:
        return _encoder_at(unwrapped_name(wanted), tensors)
    found = {
        match["prefix"]: family
        for family, (last, begins) in _ENCODERS.items()
        for match in _matches(rf"(?P<prefix>(?:.+\.)?{last})\.{begins}", tensors)
        if "decoder" not in match["prefix"].split(".")
    }
    if len(found) == 1:
        prefix, family = next(iter(found.items()))
        return family, prefix
    if not found:
        raise MFMError(
            "E_MODEL_MISMATCH",
            "no encoder of a ResEnc U-Net, plain U-Net or Primus is among the weights; they begin with "
            f"{_shown(tensors)}. Only these networks can be used.",
        )
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"the weights hold several encoders ({', '.join(found)}) and the file does not say which one is meant. Keep "
        "the one that was trained, and remove the others from the file.",
    )


def _encoder_at(prefix: str, tensors: Mapping[str, Tensor]) -> tuple[Family, str]:
    """The encoder that the file itself names, whatever its name is."""
    for family, (_, begins) in _ENCODERS.items():
        if next(_matches(rf"{re.escape(prefix)}\.{begins}", tensors), None):
            return family, prefix
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"the file says that its encoder is '{prefix}', and no encoder of a ResEnc U-Net, plain U-Net or Primus is "
        f"there; the weights begin with {_shown(tensors)}. Only these networks can be used.",
    )


def _matches(pattern: str, tensors: Mapping[str, Tensor]) -> Iterator[re.Match[str]]:
    found = (re.match(pattern, name) for name in tensors)
    return (match for match in found if match)


def _shown(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(list(tensors)[:5]) or "nothing"


def _renaming(family: Family, prefix: str, key_to_stem: str | None) -> dict[str, str]:
    """What the names of the network's parts begin with in the file, and with us."""
    root = prefix.rpartition(".")[0]
    above = f"{root}." if root else ""
    if family == "primus":
        stem = unwrapped_name(key_to_stem) if key_to_stem else f"{above}down_projection"
        return {
            f"{prefix}.": "eva.",
            f"{stem}.": "down_projection.",
            f"{above}up_projection.": "up_projection.",
        }
    stem = unwrapped_name(key_to_stem) if key_to_stem and family == "resenc" else f"{above}stem"
    beside = root.rpartition(".")[0]
    decoder = f"{beside}.decoder." if beside else "decoder."
    parts = {f"{prefix}.": "encoder.stages.", f"{stem}.": "encoder.stem."}
    return parts | {f"{decoder}{part}.": f"decoder.{part}." for part in _DECODER_PARTS}
