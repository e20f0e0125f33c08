"""Kinds of networks: a :class:`NetworkFamily` answers every question whose answer depends on the network.

A new network is one file, with its module and its family, and one entry: in :data:`BUILT_IN`, or in the entry points of
a package of your own (``documentation/how_to/add_a_network.md``). Nothing else tests what a network is.

Importing this module is cheap: families, and torch with them, are loaded when one is asked for.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mfm_nnunet.errors import MFMError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
    from mfm_nnunet.settings import FinetuneSettings

BUILT_IN = {
    "resenc": "mfm_nnunet.models.unet",
    "primus": "mfm_nnunet.models.primus_family",
    "primus_v2": "mfm_nnunet.models.primus_family",
    "primus_v3": "mfm_nnunet.models.primus_family",
}
"""Modules of families, by what ``--network`` accepts."""

GROUP = "mfm_nnunet.networks"
"""Entry points of other packages: name of a network = module with its family."""

NnsslName = tuple[str, "dict[str, Any] | None", "list[str] | None"]
Part = Literal["encoder", "decoder", "other"]
Need = Literal["any", "tokens", "sparse encoder"]
"""Demands of a pretext task on a network: none, tokens, or an encoder that can work sparsely."""


@dataclass(frozen=True)
class Sizing:
    """Images and memory that a network is planned for. Sizes in voxels, spacing in mm, in the plan's axis order."""

    variant: str
    """The name that ``--network`` was given."""
    median_shape: tuple[float, ...]
    spacing: tuple[float, ...]
    memory_gb: float | None
    """GPU memory for training; None: the CPU preset."""
    num_inputs: int
    num_outputs: int
    stock: Mapping[str, Any]
    """nnU-Net's configuration for these images, with the strides and kernels of a U-Net."""


@dataclass(frozen=True)
class PlannedNetwork:
    """The result of :meth:`NetworkFamily.plan_network`."""

    architecture: dict[str, Any]
    """``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``, as nnU-Net's plans have them."""
    patch_size: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True)
class TrainingDefaults:
    """Settings of the optimiser that a plan gets."""

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    """Peak rate of training from scratch."""
    weight_decay: float
    gradient_clip: float
    reason: str
    deep_supervision: bool = False


@dataclass(frozen=True)
class Stated:
    """Statements of a foreign file about its network; None and empty where it makes none."""

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
    """Names of one network class in files of other programs, and its architecture read off the tensors."""

    class_name: str
    """Dotted name of the class that our plans name."""
    encoder: str
    """Last word of the encoder's usual name."""
    first_block: str
    """Pattern of a tensor's name in the first block, after the encoder's name."""
    stem: str
    """Prefix of the stem, under our names."""
    head: str
    """Prefix of the output layers, or of the decoder that ends with them."""
    repeated: ClassVar[str | None] = None
    """Words in the names under which a file has the encoder's tensors again."""
    has_token_order: ClassVar[bool] = False
    """The order in which tokens are flattened must be known."""
    keys: Mapping[str, Any]
    """nnssl's key_to_encoder, key_to_stem, keys_to_in_proj and key_to_lpe."""

    @abstractmethod
    def renaming(self, encoder: str, stem: str | None) -> dict[str, str]:
        """Return prefixes in the file and ours, for an encoder called ``encoder``; ``stem`` where the file names it."""

    @abstractmethod
    def convert(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], stated: Stated) -> Converted:
        """Build the architecture of ``weights``, which have our names, and repair them.

        Raises MFMError (E_MODEL_MISMATCH) where the tensors are no whole encoder, or leave open what must be known.
        """

    @abstractmethod
    def needs_conversion(self, class_name: str) -> bool:
        """Tell whether a plan that names ``class_name`` leaves the architecture to be read off the tensors."""

    @abstractmethod
    def nnssl_architecture(self, architecture: Mapping[str, Any]) -> NnsslName | str:
        """Return class, arguments and the arguments to import as nnssl writes them; named networks have no arguments.

        A text describes a network that nnssl has no name for.
        """


class NetworkFamily(ABC):
    """One kind of network. A family has no state; each is final, and one object of it exists.

    Names are those of ``named_parameters`` and of the state dict. ``kwargs`` are a plan's ``arch_kwargs``.
    """

    name: ClassVar[str]
    """As in ``plans["mfm"]["network"]``."""
    title: ClassVar[str]
    """As people call it."""
    classes: ClassVar[tuple[str, ...]]
    """Dotted names of the classes that a plan may name, ours or a library's; nothing else is imported."""
    encoder: ClassVar[tuple[str, ...]]
    """Prefixes of the encoder, stem included."""
    decoder: ClassVar[tuple[str, ...]]
    """Prefixes of the decoder, output layers included."""
    head: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the output layers, which belong to one job and are never transferred."""
    rates: ClassVar[Mapping[str, tuple[float, float]]]
    """Published peak learning rates from scratch and from a checkpoint, by optimizer."""
    hides: ClassVar[Literal["voxels", "tokens"]] = "voxels"
    """Masked pretraining fills voxels, or drops or replaces tokens."""
    has_sparse_encoder: ClassVar[bool] = False
    """``network.encoder`` has convolutions and instance norms alone, and ``network.decoder`` takes its maps."""
    is_sized_by_nnunet: ClassVar[bool] = False
    """nnU-Net's own planner sizes the network; else :meth:`plan_network` does."""
    fewest_cells: ClassVar[int] = 1
    """Multiples of :meth:`steps` that a patch needs along some axis."""
    layouts: ClassVar[tuple[ForeignLayout, ...]] = ()
    """Layouts of other programs' files; without any, files are read whose plan names a class of this family."""

    # Planning

    def variant(self, architecture: Mapping[str, Any]) -> str:
        """Return what ``--network`` calls the network of a plan's ``architecture``."""
        return self.name

    def plans_name(self, variant: str) -> str:
        """Return the default name of a plan, e.g. ``mfmPrimusV2Plans`` for ``primus_v2``."""
        return f"mfm{''.join(word.capitalize() for word in re.split(r'[_.-]', variant))}Plans"

    @abstractmethod
    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        """Return the voxels per axis of which a patch must be a multiple; None where ``kwargs`` do not say."""

    def patch_problem(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> str:
        """Say why a network with these arguments cannot take patches of this size; empty where it can."""
        steps = self.steps(kwargs, len(patch_size))
        if steps and (len(steps) != len(patch_size) or any(size % step for size, step in zip(patch_size, steps))):
            return f"the network needs multiples of {' x '.join(map(str, steps))}"
        return ""

    def with_patch(self, architecture: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
        """Return the ``architecture`` for another patch size; networks that know none stay as they are."""
        return dict(architecture)

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        """Size the network for images and memory, e.g. with the helpers of :mod:`mfm_nnunet.models.sizing`.

        Raises MFMError (E_CONFIG) where not even the smallest one fits.
        """
        raise NotImplementedError(f"{self.name} is sized by nnU-Net")

    @abstractmethod
    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        """Return how this network is trained; ``is_cpu``: in the short schedule of the CPU preset."""

    @abstractmethod
    def describe(self, architecture: Mapping[str, Any]) -> str:
        """Describe a network in a few words: kind, widths, depth."""

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        """Say why a network was planned as it is, in a few words."""
        return "the size for CPUs" if memory_gb is None else "the largest that fits the budget"

    def patch_unit(self) -> str:
        """Describe :meth:`steps` in a few words."""
        return "multiples of the strides"

    # Training

    def learning_rate(self, settings: FinetuneSettings) -> float:
        """Return the rate of a run with these settings; its ``checkpoint`` tells whether it starts from one.

        Raises MFMError (E_CONFIG) when the rate is open and none was published.
        """
        if settings.learning_rate is not None:
            return settings.learning_rate
        if settings.optimizer not in self.rates:
            raise MFMError(
                "E_CONFIG",
                f"finetune.optimizer={settings.optimizer}: no learning rate was published for {self.name} with it. Set "
                "finetune.learning_rate, or use another optimizer.",
            )
        scratch, pretrained = self.rates[settings.optimizer]
        return scratch if settings.checkpoint is None else pretrained

    def takes_deep_supervision(self, class_name: str) -> bool:
        """Tell whether the constructor of ``class_name`` has the argument ``deep_supervision``."""
        return False

    def has_pyramid(self, kwargs: Mapping[str, Any]) -> bool:
        """Tell whether the decoder has outputs at several resolutions, as deep supervision needs them."""
        return False

    def set_deep_supervision(self, network: nn.Module, enabled: bool) -> None:
        """Give outputs at all resolutions, or at the finest alone. Called where :meth:`has_pyramid` is true."""
        raise NotImplementedError(f"{self.name} has no pyramid")

    def unused_outputs(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the weights of output layers that a network without deep supervision does not use."""
        return []

    def layer_decay_problem(self) -> str:
        """Say why ``finetune.layer_decay`` has no meaning for this network; empty where it has."""
        return "its layers are no chain"

    def layers_after(self, name: str, network: nn.Module) -> int:
        """Count the layers of the encoder after the one of a parameter; 0 for what is not in the encoder."""
        return 0

    def adapted_layers(self, network: nn.Module) -> list[nn.Linear]:
        """Return the layers that get low-rank adapters; empty where adapters are of no use."""
        return []

    def meets(self, need: Need) -> bool:
        """Tell whether pretext tasks with this need work on the network."""
        return {"any": True, "tokens": self.hides == "tokens", "sparse encoder": self.has_sparse_encoder}[need]

    # Parts of a network

    def part_of(self, name: str) -> Part:
        """Return the part that a name of the state dict belongs to; buffers count too."""
        if name.startswith(self.encoder):
            return "encoder"
        return "decoder" if name.startswith(self.decoder) else "other"

    def encoder_names(self, network: nn.Module) -> set[str]:
        """Return the names of the encoder's parameters, stem included."""
        return {name for name, _ in network.named_parameters() if name.startswith(self.encoder)}

    def head_names(self, network: nn.Module) -> set[str]:
        """Return the names of the output layers' parameters."""
        return {name for name, _ in network.named_parameters() if name.startswith(self.head)}

    def stem_names(self, network: nn.Module) -> set[str]:
        """Return all names, in the state dict, of the weights that see the image."""
        if keys := getattr(network, "keys_to_in_proj", None):  # of dynamic-network-architectures' networks
            return {f"{key}.weight" for key in keys}
        encoder = self.encoder_names(network)
        return {next((name for name, weight in network.named_parameters() if name in encoder and weight.ndim >= 4), "")}

    @abstractmethod
    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        """Wrap a network for pretext tasks. New weights are drawn from torch's generator."""

    # Transfer

    def source_renaming(self, network: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[str], str]:
        """Return the function from a name in ``network`` to that of the same part in a checkpoint's ``weights``."""
        return lambda name: name

    def resize_positions(
        self, name: str, value: Tensor, network: nn.Module, source_patch_size: Sequence[int] | None
    ) -> tuple[Tensor, str] | None:
        """Return a checkpoint's table of positions for the network's own grid, and how it was made.

        ``source_patch_size`` is the checkpoint's, in voxels. None: ``name`` is no such table, or its grid is the same
        or unknown.
        """
        return None

    # Interchange

    def layout(self, class_name: str) -> ForeignLayout | None:
        """Return the layout of other programs for a class that a plan names."""
        return next((layout for layout in self.layouts if layout.class_name == class_name), None)

    def loading_code(self, architecture: Mapping[str, Any], num_axes: int) -> tuple[str, str] | None:
        """Return Python lines that build the network and load weights without this package, and a remark.

        ``{imports}`` and ``{weights}`` stand for an import and an expression that reads the weights.
        """
        return None


def network_names() -> list[str]:
    """Return what ``--network`` accepts: the built-in networks and those of installed packages."""
    return list(_modules())


def family_named(name: str) -> NetworkFamily:
    """Return the family that a plan or ``--network`` names.

    Raises MFMError (E_CONFIG) when there is none of that name.
    """
    modules = _modules()
    if name not in modules:
        raise MFMError("E_CONFIG", f"network {name}: there is no such network. {nearest(name, modules)}")
    return _load(modules[name])


def family_of(network: nn.Module) -> NetworkFamily:
    """Return the family of a network without wrappers.

    Raises MFMError (E_MODEL_MISMATCH) for a class of none.
    """
    known = families_by_class()
    for cls in type(network).__mro__:
        if family := known.get(f"{cls.__module__}.{cls.__qualname__}"):
            return family
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"{type(network).__name__} is none of the networks of mfm_nnunet. Use the network of a plan made by "
        f"mfm_plan_and_preprocess --network {' or '.join(network_names())}.",
    )


@functools.cache
def families_by_class() -> dict[str, NetworkFamily]:
    """Return the families by the dotted names of the classes that plans may name."""
    families = [_load(module) for module in dict.fromkeys(_modules().values())]
    return {class_name: family for family in families for class_name in family.classes}


def all_families() -> list[NetworkFamily]:
    """Return each family once, the built-in ones first."""
    return list({family.name: family for family in families_by_class().values()}.values())


@functools.cache
def _modules() -> dict[str, str]:
    others = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    return BUILT_IN | {name: module for name, module in others.items() if name not in BUILT_IN}


@functools.cache
def _load(module_name: str) -> NetworkFamily:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise MFMError(
            "E_CONFIG", f"the network of {module_name} cannot be imported ({error}). Repair or uninstall that package."
        ) from error
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, NetworkFamily) and value.__module__ == module_name
    ]
    if len(found) != 1:
        raise MFMError(
            "E_CONFIG", f"{module_name} defines {len(found)} classes derived from NetworkFamily, and one is needed."
        )
    return found[0]()
