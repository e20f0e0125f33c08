"""Choose the parameters that learn in fine-tuning, low-rank adapters among them, and their rates in each epoch.

Rates are pure functions of the epoch. ``warmup`` has one phase: linear warm-up, then polynomial decay. ``sawtooth``
(arXiv 2410.23132) starts with a phase in which the transferred encoder is frozen; the rate rises and then decays in
each phase.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mfm_nnunet.engine.optim import learning_rate_factor
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of
from mfm_nnunet.settings import FinetuneSettings, resolved_decoder_epochs, resolved_warmup


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate."""

    names: tuple[str, ...]
    waits: bool = False
    """Frozen in the first phase of a sawtooth."""
    scale: float = 1.0
    """Share of the learning rate, from layer-wise decay."""


def group_parameters(network: nn.Module, settings: FinetuneSettings, new: Collection[str] | None) -> list[Group]:
    """Group all parameters that are trained at some point, each parameter once, the fastest group first.

    ``network`` is unwrapped. ``new`` names the parameters that learn first (:func:`first_names`); None from scratch.
    """
    family, decay = family_of(network), settings.layer_decay or 1.0
    is_two_phased = settings.schedule == "sawtooth" and new is not None
    # A stem adapted to other channels counts as new: frozen, it could not tell the channels apart.
    learning = trained_names(network, settings.train) | set(new or ())
    members: dict[tuple[bool, float], list[str]] = {}
    for name, _ in network.named_parameters():
        if name in learning:
            waits = is_two_phased and new is not None and name not in new
            # A smaller share of the rate for early layers of the encoder (arXiv 2106.08254).
            scale = 1.0 if decay == 1 else decay ** family.layers_after(name, network)
            members.setdefault((waits, scale), []).append(name)
    ordered = sorted(members, key=lambda key: (key[0], -key[1]))
    return [Group(tuple(members[key]), *key) for key in ordered]


def trained_names(network: nn.Module, train: str) -> set[str]:
    """Return the names of the parameters selected by ``finetune.train``, pretrained or not."""
    names = {name for name, _ in network.named_parameters()}
    if train == "all":
        return names
    if train == "head":
        return family_of(network).head_names(network)
    return (names - family_of(network).encoder_names(network)) | adapter_names(network)


def first_names(network: nn.Module, settings: FinetuneSettings, untrained: set[str]) -> set[str]:
    """Return the names of parameters the checkpoint did not train; for a sawtooth, also of all outside the encoder.

    They do not wait for a sawtooth's second phase.
    """
    if settings.schedule != "sawtooth":
        return untrained
    return untrained | {name for name, _ in network.named_parameters()} - family_of(network).encoder_names(network)


def freeze(
    network: nn.Module, trained: Collection[str], keep_gradients: bool, is_pretrained: bool = False
) -> list[nn.Parameter]:
    """Freeze all parameters except ``trained`` and return the frozen ones, which weight decay and momentum then ignore.

    Frozen norms also keep their running statistics, and so do pretrained ones that a family marks
    (``keeps_statistics``): those of a few small batches are worse. ``keep_gradients`` is for DistributedDataParallel,
    which expects a gradient of every parameter that had one when it was built: they are computed, and the engine drops
    them.
    """
    frozen = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained or keep_gradients)
        if name not in trained:
            frozen.append(parameter)
    places = {id(parameter) for parameter in frozen}
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if getattr(module, "running_mean", None) is None:
            continue
        is_kept = is_pretrained and getattr(module, "keeps_statistics", False)
        if is_kept or (own and all(id(p) in places for p in own)):
            module.eval()
    return frozen


@dataclass(frozen=True)
class Phases:
    """Lengths in epochs: the whole run, the whole network's warm-up, and the first phase (0 without one)."""

    epochs: int
    warmup_epochs: int
    decoder_epochs: int = 0

    @classmethod
    def of(cls, settings: FinetuneSettings, is_pretrained: bool) -> Phases:
        """Return the phases of a run. From scratch nothing is frozen, so there is no first phase."""
        has_first = settings.schedule == "sawtooth" and is_pretrained
        first = resolved_decoder_epochs(settings) if has_first else None
        return cls(settings.epochs, resolved_warmup(settings.warmup_epochs, settings.epochs), first or 0)


def rate_factor(epoch: int, phases: Phases, waits: bool) -> float:
    """Return the share of the peak rate at ``epoch`` (0-based); 0 during the first phase for groups that wait.

    With D, W and E the lengths of first phase, warm-up and run: (e+1)/(D/2) below D/2 and (1-(e-D/2)/(D/2))^0.9 below
    D; then (e-D+1)/W below D+W and (1-(e-D-W)/(E-D-W))^0.9.
    """
    first = phases.decoder_epochs
    if epoch < first:
        return 0.0 if waits else learning_rate_factor(epoch, first, first / 2)
    return learning_rate_factor(epoch - first, phases.epochs - first, phases.warmup_epochs)


class EpochSchedule:
    """Set the learning rate of every group of the optimizer. ``peak`` is the largest rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[Group], peak: float, phases: Phases) -> None:
        assert len(groups) == len(optimizer.param_groups), "one description for each group"
        self.optimizer = optimizer
        self.groups = tuple(groups)
        self.peak = peak
        self.phases = phases

    def step(self, epoch: int) -> None:
        """Set the rates of ``epoch``."""
        for description, group in zip(self.groups, self.optimizer.param_groups):
            group["lr"] = self.peak * description.scale * rate_factor(epoch, self.phases, description.waits)

    def trained_names(self, epoch: int) -> set[str]:
        """Return the names of the parameters that learn in ``epoch``."""
        in_first = epoch < self.phases.decoder_epochs
        return {name for group in self.groups if not (in_first and group.waits) for name in group.names}

    def all_trained_names(self) -> set[str]:
        """Return the names of the parameters that learn in any epoch."""
        return {name for group in self.groups for name in group.names}


def describe_training(schedule: EpochSchedule, settings: FinetuneSettings, network: nn.Module) -> list[str]:
    """Describe the trained parameters and their rates for the log. ``network`` is unwrapped."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    learn, total = sum(sizes[name] for name in schedule.all_trained_names()), sum(sizes.values())
    lines = [f"{learn:,} of {total:,} parameters are trained ({learn / total:.1%})"]
    first = schedule.phases.decoder_epochs
    if first:
        early = sum(sizes[name] for name in schedule.trained_names(0))
        lines.append(f"sawtooth: {early:,} of them in the first {first} epochs, then all")
    elif settings.schedule == "sawtooth":
        lines.append("sawtooth: nothing came from a checkpoint, so the whole network warms up at once")
    return lines


def require_fitting(settings: FinetuneSettings, network: nn.Module, is_distributed: bool) -> None:
    """Raise MFMError (E_CONFIG) if this network, or training on several GPUs, does not support a setting."""
    family = family_of(network)
    if (settings.layer_decay or 1.0) != 1.0 and (problem := family.layer_decay_problem()):
        _refuse(f"finetune.layer_decay={settings.layer_decay}: {problem}. Leave it out, or use a transformer.")
    if settings.train != "lora":
        return
    if not family.adapted_layers(network):
        _refuse(
            f"finetune.train=lora: adapters are for transformers, this plan has a {family.title}. Use "
            "finetune.train=all."
        )
    if is_distributed:
        _refuse("finetune.train=lora: adapters train on one GPU only. Use -num_gpus 1, which they fit.")
    width = min(min(layer.out_features, layer.in_features) for layer in family.adapted_layers(network))
    if settings.lora_rank > width:
        _refuse(f"finetune.lora_rank={settings.lora_rank}: this network's narrowest layer has a width of {width}.")


def require_pretrained(settings: FinetuneSettings, is_pretrained: bool) -> None:
    """Raise MFMError (E_CONFIG) if random weights would never be trained."""
    if settings.train != "all" and not is_pretrained:
        _refuse(
            f"finetune.train={settings.train}: without a checkpoint the encoder would stay random. Give one to "
            "mfm_train with -pretrained_weights, or use finetune.train=all."
        )
    if settings.train == "head" and settings.parts == "encoder":
        _refuse(
            "finetune.train=head: only the encoder comes from the checkpoint (finetune.parts=encoder), so the decoder "
            "would stay random. Use finetune.train=decoder, or a checkpoint with a decoder."
        )


def require_no_random_rest(settings: FinetuneSettings, network: nn.Module, new: Collection[str]) -> None:
    """Raise MFMError (E_CONFIG) if parameters missing from the checkpoint would never be trained."""
    names = {name for name, _ in network.named_parameters()}
    random = sorted(names & set(new) - trained_names(network, settings.train))
    if random:
        _refuse(
            f"finetune.train={settings.train}: {len(random)} tensors did not come from the checkpoint and would stay "
            f"random, e.g. {random[0]}. Use finetune.train=all, or a checkpoint that has them."
        )


def _refuse(message: str) -> None:
    raise MFMError("E_CONFIG", message)


# Low-rank adapters (arXiv 2106.09685): W + (alpha / rank) B A

_MIDDLE = ".parametrizations.weight."
"""Torch's infix between a layer's name and the names of its original weight ("original") and adapter ("0.*")."""


class Adapter(nn.Module):
    """Add ``scale * up @ down`` to a weight of (outputs, inputs); 0 at the start. Only these two matrices learn."""

    def __init__(self, outputs: int, inputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight, in float32 even under autocast: the weights trained are exactly those shipped."""
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_adapters(network: nn.Module, rank: int, alpha: float) -> None:
    """Add adapters to the linear layers named by the network family, initialised from torch's generator."""
    for layer in family_of(network).adapted_layers(network):
        adapter = Adapter(layer.out_features, layer.in_features, rank, alpha / rank).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", adapter)


def adapter_names(network: nn.Module) -> set[str]:
    """Return the names (in ``named_parameters``) of the adapters; empty without any."""
    return {name for name, _ in network.named_parameters() if f"{_MIDDLE}0." in name}


def merged_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with the adapters merged into the weights, under the names without adapters."""
    state = {}
    for name, tensor in network.state_dict().items():
        layer, is_parametrised, rest = name.partition(_MIDDLE)
        if not is_parametrised:
            state[name] = tensor
        elif rest == "original":
            weight = network.get_submodule(layer).weight
            assert isinstance(weight, Tensor)
            state[f"{layer}.weight"] = weight.detach()
    return state
