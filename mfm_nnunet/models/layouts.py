"""Layouts: how files of other programs name the tensors of a network, and what they say about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

NnsslName = tuple[str, "dict[str, Any] | None", "list[str] | None"]


@dataclass(frozen=True)
class Stated:
    """Metadata of a foreign file about its network; None or empty if missing."""

    class_name: str | None = None
    arch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    patch_size: tuple[int, ...] | None = None
    """Patch of the pretraining, in voxels."""
    recommended_patch: tuple[int, ...] | None = None
    token_order: str | None = None
    """``whd``: tokens are flattened axis 0 outermost; ``hwd``: axis 1 outermost."""


@dataclass(frozen=True)
class Converted:
    """A foreign network in our layout."""

    weights: dict[str, Tensor]
    architecture: dict[str, Any]
    patch_size: tuple[int, ...]
    """Patch of the pretraining, in voxels."""
    others: dict[str, Tensor]
    """Tensors, under the file's names, that fit no network of ours."""
    notes: list[str]
    """Assumptions and repairs."""


class ForeignLayout(ABC):
    """Naming scheme of one network class in files of other programs, and inference of its architecture."""

    class_name: str
    """Dotted class name used in our plans."""
    encoder: str
    """Last word of the encoder's usual name."""
    first_block: str
    """Regular expression for a tensor name in the first block, relative to the encoder."""
    stem: str
    """Prefix of the stem in our names."""
    head: str
    """Prefix of the output layers, or of the decoder that contains them."""
    repeated: ClassVar[str | None] = None
    """Part of the names under which a file repeats the encoder's tensors."""
    has_token_order: ClassVar[bool] = False
    """True if conversion needs the order in which tokens are flattened."""
    keeps_names: ClassVar[bool] = True
    """False if such files share no name with ours, so that a model of nnU-Net with this class is not in this layout."""
    origin: ClassVar[str] = "as OpenMind's"
    """Reason for normalisation, spacing and axes that a file does not have."""
    keys: Mapping[str, Any]
    """nnssl's key_to_encoder, key_to_stem, keys_to_in_proj and key_to_lpe."""

    @abstractmethod
    def renaming(self, encoder: str, stem: str | None) -> dict[str, str]:
        """Return a map from prefixes in the file to ours. ``stem`` is None if the file does not name it."""

    @abstractmethod
    def convert(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], stated: Stated) -> Converted:
        """Infer the architecture of ``weights`` (under our names) and repair them.

        Raises MFMError (E_MODEL_MISMATCH) if the encoder is incomplete or the architecture is ambiguous.
        """

    @abstractmethod
    def needs_conversion(self, class_name: str) -> bool:
        """Return whether a plan with this class needs its architecture inferred from the tensors."""

    @abstractmethod
    def nnssl_architecture(self, architecture: Mapping[str, Any]) -> NnsslName | str:
        """Return class name, arguments and arguments to import in nnssl's format; named networks have no arguments.

        A string describes a network that nnssl cannot express.
        """
