"""Which parameters of a network learn in fine-tuning, together and how fast relative to each other.

What is still has no gradient: so no weight decay and no momentum either, and no part in the norm that is clipped. Its
optimizer state begins when it is released.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune import lora
from mfm_nnunet.models.families import family_of
from mfm_nnunet.settings import FinetuneSettings


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate."""

    names: tuple[str, ...]
    waits: bool = False
    """Still in the first phase of a sawtooth."""
    scale: float = 1.0
    """Share of the learning rate, from the decay over the layers."""


def groups_of(network: nn.Module, settings: FinetuneSettings, new: Collection[str] | None) -> list[Group]:
    """The groups of all parameters that ever learn, each parameter once, the fastest group first.

    ``network`` is without wrappers; ``new`` names what learns first (:func:`first_names`), None from scratch.
    """
    is_two_phased = settings.schedule == "sawtooth" and new is not None
    # A stem that was adapted to other channels is new to them: still, it could not tell them apart.
    learning = trained_names(network, settings.train) | set(new or ())
    members: dict[tuple[bool, float], list[str]] = {}
    for name, _ in network.named_parameters():
        if name in learning:
            waits = is_two_phased and new is not None and name not in new
            members.setdefault((waits, layer_scale(name, network, settings.layer_decay or 1.0)), []).append(name)
    ordered = sorted(members, key=lambda key: (key[0], -key[1]))
    return [Group(tuple(members[key]), *key) for key in ordered]


def trained_names(network: nn.Module, train: str) -> set[str]:
    """Names of the parameters that learn with ``finetune.train`` wherever they come from."""
    names = {name for name, _ in network.named_parameters()}
    if train == "all":
        return names
    if train == "head":
        return family_of(network).head_names(network)
    return (names - family_of(network).encoder_names(network)) | lora.adapter_names(network)


def first_names(network: nn.Module, settings: FinetuneSettings, untrained: set[str]) -> set[str]:
    """What does not wait for a sawtooth's second phase: what a checkpoint did not train, and all but the encoder.

    Without a sawtooth just ``untrained``.
    """
    if settings.schedule != "sawtooth":
        return untrained
    return untrained | {name for name, _ in network.named_parameters()} - family_of(network).encoder_names(network)


def layer_scale(name: str, network: nn.Module, decay: float) -> float:
    """Return the share of the learning rate of a parameter: less for early layers of the encoder (arXiv 2106.08254)."""
    return 1.0 if decay == 1 else decay ** family_of(network).layers_after(name, network)


def hold_still(network: nn.Module, trained: Collection[str], keep_gradients: bool) -> list[nn.Parameter]:
    """Let only the parameters in ``trained`` learn from now on; returns the others.

    Norms that are still keep their running statistics too. ``keep_gradients`` is for DistributedDataParallel, which
    expects a gradient of every parameter that had one when it was made: there they are computed, and the caller drops
    them before clipping and stepping.
    """
    still = []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained or keep_gradients)
        if name not in trained:
            still.append(parameter)
    places = {id(parameter) for parameter in still}
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if getattr(module, "running_mean", None) is not None and own and all(id(p) in places for p in own):
            module.eval()
    return still


def count(network: nn.Module, names: Collection[str]) -> int:
    """The number of values in the named parameters."""
    return sum(parameter.numel() for name, parameter in network.named_parameters() if name in names)


def require_fitting(settings: FinetuneSettings, network: nn.Module, is_distributed: bool) -> None:
    """Raise MFMError (E_CONFIG) for what this network, or training on several GPUs, does not support."""
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
    width = lora.narrowest(network)
    if settings.lora_rank > width:
        _refuse(f"finetune.lora_rank={settings.lora_rank}: this network's narrowest layer has a width of {width}.")


def require_pretrained(settings: FinetuneSettings, is_pretrained: bool) -> None:
    """Raise MFMError (E_CONFIG) when random weights would stay as they are."""
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
    """Raise MFMError (E_CONFIG) when parameters that stayed ``new`` in a transfer would never learn."""
    names = {name for name, _ in network.named_parameters()}
    random = sorted(names & set(new) - trained_names(network, settings.train))
    if random:
        _refuse(
            f"finetune.train={settings.train}: {len(random)} tensors did not come from the checkpoint and would stay "
            f"random, e.g. {random[0]}. Use finetune.train=all, or a checkpoint that has them."
        )


def _refuse(message: str) -> None:
    raise MFMError("E_CONFIG", message)
