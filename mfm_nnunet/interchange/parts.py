"""Split a foreign state dict into the tensors of a network, under our names, and the rest.

Pretraining code wraps networks (``module.``, ``_orig_mod.``, ``encoder.``, ``online_encoder.stages.``) and adds heads,
projectors and second decoders. Parts are found by the structure of the names, not by a list of wrappers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import NetworkFamily, all_families
from mfm_nnunet.models.layouts import ForeignLayout

_WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True)
class Parts:
    """A split state dict: ``weights`` under our names; ``others``, under the file's names, fit no network of ours."""

    family: NetworkFamily
    layout: ForeignLayout | None
    """None if the names are those of the family's own class."""
    weights: dict[str, Tensor]
    others: dict[str, Tensor]


def take_apart(state: Mapping[str, Tensor], key_to_encoder: str | None = None, key_to_stem: str | None = None) -> Parts:
    """Find encoder, stem and decoder in ``state``. The keys are the names that the file itself gives, if any."""
    tensors = unwrap_names(state)
    family, layout, prefix = _find_encoder(tensors, unwrapped_name(key_to_encoder) if key_to_encoder else None)
    renamed = layout.renaming(prefix, unwrapped_name(key_to_stem) if key_to_stem else None)
    weights: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = next((place for place in renamed if name.startswith(place)), None)
        if place is not None:
            weights[renamed[place] + name[len(place) :]] = tensor
        elif layout.repeated is None or layout.repeated not in name:
            others[name] = tensor
    return Parts(family, layout, weights, others)


def unwrapped_name(name: str) -> str:
    """Strip the wrappers of DistributedDataParallel and torch.compile from ``name``, at any position."""
    *parents, last = str(name).split(".")
    return ".".join([*(part for part in parents if part not in _WRAPPERS), last])


def unwrap_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a state dict under unwrapped names."""
    return {unwrapped_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _find_encoder(tensors: Mapping[str, Tensor], wanted: str | None) -> tuple[NetworkFamily, ForeignLayout, str]:
    layouts = [(family, layout) for family in all_families() for layout in family.layouts]
    networks = " or ".join(layout.class_name.rpartition(".")[2] for _, layout in layouts)
    shown = ", ".join(list(tensors)[:5]) or "nothing"
    if wanted is not None:
        for family, layout in layouts:
            if next(_matches(rf"{re.escape(wanted)}\.{layout.first_block}", tensors), None):
                return family, layout, wanted
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"the file names its encoder '{wanted}', but there is no encoder of {networks} under this name; the "
            f"weights begin with {shown}. Only these networks are supported.",
        )
    found = {
        match["prefix"]: (family, layout)
        for family, layout in layouts
        for match in _matches(rf"(?P<prefix>(?:.+\.)?{layout.encoder})\.{layout.first_block}", tensors)
        if "decoder" not in match["prefix"].split(".")
    }
    if len(found) == 1:
        prefix, (family, layout) = next(iter(found.items()))
        return family, layout, prefix
    if not found:
        raise MFMError(
            "E_MODEL_MISMATCH",
            f"the weights have no encoder of {networks}; they begin with {shown}. Only these networks are supported.",
        )
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"the weights have several encoders ({', '.join(found)}), and the file does not say which one to use. Keep "
        "the one that was trained, and remove the others from the file.",
    )


def _matches(pattern: str, names: Iterable[str]) -> Iterator[re.Match[str]]:
    return (match for match in (re.match(pattern, name) for name in names) if match)
