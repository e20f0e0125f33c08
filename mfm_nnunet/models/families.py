"""Network families: a :class:`NetworkFamily` holds everything that depends on the kind of network.

To add a network, write a file with its module and family, and register it in :data:`BUILT_IN` and :data:`MEETING`, or
in your package's entry points (``documentation/how_to/add_a_network.md``). No other code checks the kind of a network.

Importing this module is cheap: families, and with them torch, are loaded on first use.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mfm_nnunet.errors import MFMError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
    from mfm_nnunet.models.layouts import ForeignLayout
    from mfm_nnunet.settings import FinetuneSettings

BUILT_IN = {
    "resenc": "mfm_nnunet.models.unet",
    "primus": "mfm_nnunet.models.primus_family",
    "primus_v2": "mfm_nnunet.models.primus_family",
    "primus_v3": "mfm_nnunet.models.primus_family",
    "swin": "mfm_nnunet.models.swin_family",
    "pctnet": "mfm_nnunet.models.pctnet_family",
    "timm": "mfm_nnunet.models.natural_family",
}
"""Modules of the families by ``--network`` name."""

GROUP = "mfm_nnunet.networks"
"""Entry point group for other packages: network name = module of its family."""

Part = Literal["encoder", "decoder", "other"]
Need = Literal["any", "tokens", "sparse encoder"]
"""Requirement of a pretext task: none, tokens, or an encoder that can run sparsely."""

MEETING: dict[Need, tuple[str, ...]] = {
    "any": ("resenc", "primus", "swin", "pctnet", "timm"),
    "tokens": ("primus", "swin", "timm"),
    "sparse encoder": ("resenc",),
}
"""Built-in families that meet each need. Written down because ``mfm_pretrain --list`` must not load torch."""


@dataclass(frozen=True)
class Sizing:
    """Images and memory to plan a network for. Sizes in voxels, spacing in mm, in the plan's axis order."""

    variant: str
    """Value of ``--network``."""
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
    """Result of :meth:`NetworkFamily.plan_network`."""

    architecture: dict[str, Any]
    """``network_class_name``, ``arch_kwargs`` and ``_kw_requires_import``, as nnU-Net's plans have them."""
    patch_size: tuple[int, ...]
    batch_size: int


@dataclass(frozen=True)
class TrainingDefaults:
    """Default optimiser settings for a plan."""

    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    """Peak rate when training from scratch."""
    weight_decay: float
    gradient_clip: float
    reason: str
    deep_supervision: bool = False
    train: Literal["auto", "all"] = "all"
    """Value of ``finetune.train``; auto: as :meth:`NetworkFamily.advise_training` says."""


class NetworkFamily(ABC):
    """One kind of network. Families are stateless, final and instantiated once.

    Parameter names are those of ``named_parameters`` and the state dict. ``kwargs`` are a plan's ``arch_kwargs``.
    """

    name: ClassVar[str]
    """Value of ``plans["mfm"]["network"]``."""
    title: ClassVar[str]
    """Name for display."""
    classes: ClassVar[tuple[str, ...]]
    """Dotted names of the classes that a plan may name, ours or a library's. No other class is imported."""
    encoder: ClassVar[tuple[str, ...]]
    """Prefixes of the encoder, including the stem."""
    decoder: ClassVar[tuple[str, ...]]
    """Prefixes of the decoder, including the output layers."""
    head: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the output layers, which are task-specific and never transferred."""
    rates: ClassVar[Mapping[str, tuple[float, float]]]
    """Published peak learning rates from scratch and from a checkpoint, by optimizer."""
    hides: ClassVar[Literal["voxels", "tokens"]] = "voxels"
    """Units that masked pretraining hides: voxels (filled), or tokens (dropped or replaced)."""
    has_sparse_encoder: ClassVar[bool] = False
    """True if ``network.encoder`` has only convolutions and instance norms, and ``network.decoder`` takes its maps."""
    is_sized_by_nnunet: ClassVar[bool] = False
    """True if nnU-Net's own planner sizes the network, False if :meth:`plan_network` does."""
    supervises_all_outputs: ClassVar[bool] = False
    """True if deep supervision weights also the coarsest output, and is used in Volume Fusion, as published."""
    fewest_cells: ClassVar[int] = 1
    """Smallest patch along at least one axis, in multiples of :meth:`steps`."""
    layouts: ClassVar[tuple[ForeignLayout, ...]] = ()
    """Layouts of other programs. If empty, only files whose plan names a class of this family are read."""

    # Planning

    def variant(self, architecture: Mapping[str, Any]) -> str:
        """Return the ``--network`` name for a plan's ``architecture``."""
        return self.name

    def plans_name(self, variant: str) -> str:
        """Return the default name of a plan, e.g. ``mfmPrimusV2Plans`` for ``primus_v2``."""
        return f"mfm{''.join(word.capitalize() for word in re.split(r'[_.-]', variant))}Plans"

    def require_variant(self, variant: str) -> None:
        """Raise MFMError (E_CONFIG) if a ``--network`` name that leads to this family means no network of it."""
        if ":" in variant:
            raise MFMError("E_CONFIG", f"network {variant}: {self.title}s have no names of their own. Leave it out.")

    @abstractmethod
    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        """Return the sizes per axis that a patch must be multiples of; None if ``kwargs`` do not determine them."""

    def patch_problem(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> str:
        """Explain why this network cannot take patches of this size; empty if it can."""
        steps = self.steps(kwargs, len(patch_size))
        if steps and (len(steps) != len(patch_size) or any(size % step for size, step in zip(patch_size, steps))):
            return f"the network needs multiples of {' x '.join(map(str, steps))}"
        return ""

    def legal_patch(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> list[int]:
        """Enlarge a patch of whole :meth:`steps` to the next that the network takes; by default it takes all."""
        return list(patch_size)

    def with_patch(self, architecture: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
        """Return the ``architecture`` for another patch size; unchanged if it does not depend on the patch."""
        return dict(architecture)

    def with_intensities(
        self, architecture: Mapping[str, Any], schemes: Sequence[str], intensities: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the ``architecture`` for channels normalised by ``schemes``; unchanged if it does not depend on them.

        ``intensities`` are those of the plan, by the channel's number.
        """
        return dict(architecture)

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        """Size the network for images and memory, e.g. with the helpers of :mod:`mfm_nnunet.models.sizing`.

        Raises MFMError (E_CONFIG) if not even the smallest network fits.
        """
        raise NotImplementedError(f"{self.name} is sized by nnU-Net")

    @abstractmethod
    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        """Return the default optimiser settings. ``is_cpu``: for the short schedule of the CPU preset."""

    @abstractmethod
    def describe(self, architecture: Mapping[str, Any]) -> str:
        """Describe a network briefly: kind, widths, depth."""

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        """Explain briefly why a network was planned this way."""
        return "the size for CPUs" if memory_gb is None else "the largest that fits the budget"

    def patch_unit(self) -> str:
        """Describe :meth:`steps` briefly."""
        return "multiples of the strides"

    def licence(self, network: nn.Module) -> str | None:
        """Return the licence of the published weights that this network is named after; None if there are none."""
        return None

    # Training

    def advise_training(self, network: nn.Module, num_cases: int) -> tuple[dict[str, Any], str]:
        """Return fine-tuning settings for weights of others with this many labelled cases, and the reason."""
        return {}, ""

    def learning_rate(self, settings: FinetuneSettings) -> float:
        """Return the learning rate for ``settings``, by default the published one for scratch or checkpoint.

        Raises MFMError (E_CONFIG) if the rate is not set and none was published.
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
        """Return whether the constructor of ``class_name`` accepts ``deep_supervision``."""
        return False

    def has_pyramid(self, kwargs: Mapping[str, Any]) -> bool:
        """Return whether the decoder has outputs at several resolutions, as needed for deep supervision."""
        return False

    def set_deep_supervision(self, network: nn.Module, enabled: bool) -> None:
        """Switch between outputs at all resolutions and the finest only. Called only if :meth:`has_pyramid`."""
        raise NotImplementedError(f"{self.name} has no pyramid")

    def unused_outputs(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the weights of output layers that are unused without deep supervision."""
        return []

    def layer_decay_problem(self) -> str:
        """Explain why ``finetune.layer_decay`` does not apply to this network; empty if it does."""
        return "its layers do not form a chain"

    def layers_after(self, name: str, network: nn.Module) -> int:
        """Count the encoder layers after the one that holds parameter ``name``; 0 outside the encoder."""
        return 0

    def adapted_layers(self, network: nn.Module) -> list[nn.Linear]:
        """Return the layers that get low-rank adapters; empty if adapters are not supported."""
        return []

    def meets(self, need: Need) -> bool:
        """Return whether the network meets the requirement of a pretext task."""
        return {"any": True, "tokens": self.hides == "tokens", "sparse encoder": self.has_sparse_encoder}[need]

    # Parts of a network

    def part_of(self, name: str) -> Part:
        """Return the part that a name in the state dict belongs to, for parameters and buffers."""
        if name.startswith(self.encoder):
            return "encoder"
        return "decoder" if name.startswith(self.decoder) else "other"

    def encoder_names(self, network: nn.Module) -> set[str]:
        """Return the names of the encoder's parameters, including the stem."""
        return {name for name, _ in network.named_parameters() if name.startswith(self.encoder)}

    def head_names(self, network: nn.Module) -> set[str]:
        """Return the names of the output layers' parameters."""
        return {name for name, _ in network.named_parameters() if name.startswith(self.head)}

    def stem_names(self, network: nn.Module) -> set[str]:
        """Return all state-dict names of the weights applied to the image."""
        if keys := getattr(network, "keys_to_in_proj", None):  # of dynamic-network-architectures' networks
            return {f"{key}.weight" for key in keys}
        encoder = self.encoder_names(network)
        return {next((name for name, weight in network.named_parameters() if name in encoder and weight.ndim >= 4), "")}

    @abstractmethod
    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        """Wrap a network for pretext tasks. New weights are drawn from torch's generator."""

    # Transfer

    def source_renaming(self, network: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[str], str]:
        """Return a function that maps a name in ``network`` to its counterpart in a checkpoint's ``weights``."""
        return lambda name: name

    def resize_positions(
        self, name: str, value: Tensor, network: nn.Module, source_patch_size: Sequence[int] | None
    ) -> tuple[Tensor, str] | None:
        """Resize a checkpoint's position table to the network's grid; also return a note on how.

        ``source_patch_size`` is the checkpoint's, in voxels. Returns None if ``name`` is not a position table, or its
        grid is unknown or already the same.
        """
        return None

    # Interchange

    def layout(self, class_name: str) -> ForeignLayout | None:
        """Return the layout of other programs for the class ``class_name``."""
        return next((layout for layout in self.layouts if layout.class_name == class_name), None)

    def loading_code(self, architecture: Mapping[str, Any], num_axes: int) -> tuple[str, str] | None:
        """Return Python code that builds the network and loads weights without this package, and a remark.

        The code has the placeholders ``{imports}`` and ``{weights}`` (an expression that reads the weights).
        """
        return None


def network_names() -> list[str]:
    """Return the values of ``--network``: built-in networks and those of installed packages."""
    return list(_modules())


def family_named(name: str) -> NetworkFamily:
    """Return the family with the name used in a plan or ``--network``; ``timm:NAME`` leads to that of ``timm``.

    Raises MFMError (E_CONFIG) for an unknown name.
    """
    modules = _modules()
    kind = name.partition(":")[0]
    if kind not in modules:
        raise MFMError("E_CONFIG", f"network {name}: there is no such network. {nearest(name, modules)}")
    return _load(modules[kind])


def family_of(network: nn.Module) -> NetworkFamily:
    """Return the family of an unwrapped network.

    Raises MFMError (E_MODEL_MISMATCH) if its class belongs to no family.
    """
    for cls in type(network).__mro__:
        if family := family_of_class(f"{cls.__module__}.{cls.__qualname__}"):
            return family
    raise MFMError(
        "E_MODEL_MISMATCH",
        f"{type(network).__name__} is not a network of mfm_nnunet. Plan with --network {' or '.join(network_names())}.",
    )


@functools.cache
def family_of_class(class_name: str) -> NetworkFamily | None:
    """Return the family of a network class given by its dotted name, or None.

    Families are imported in turn until one has the class, because the libraries of some take a second to import.
    """
    families = (_load(module) for module in dict.fromkeys(_modules().values()))
    return next((family for family in families if class_name in family.classes), None)


def family_of_architecture(architecture: Mapping[str, Any]) -> NetworkFamily:
    """Return the family of a checked ``architecture`` entry of a plan."""
    family = family_of_class(architecture["network_class_name"])
    assert family is not None, architecture["network_class_name"]
    return family


def all_families() -> list[NetworkFamily]:
    """Return each family once, built-in ones first."""
    return list({family.name: family for family in map(_load, _modules().values())}.values())


@functools.cache
def _modules() -> dict[str, str]:
    others = {entry.name: entry.value for entry in entry_points(group=GROUP)}
    return BUILT_IN | {name: module for name, module in others.items() if name not in BUILT_IN}


@functools.cache
def _load(module_name: str) -> NetworkFamily:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        reason = f"the network of {module_name} cannot be imported ({error}). Repair or uninstall that package."
        raise MFMError("E_CONFIG", reason) from error
    classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module_name]
    found = [value for value in classes if issubclass(value, NetworkFamily)]
    if len(found) != 1:
        raise MFMError("E_CONFIG", f"{module_name} must define one class derived from NetworkFamily, not {len(found)}.")
    return found[0]()
