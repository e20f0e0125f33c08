"""Transfer pretrained weights into a network and report the result.

Tensors are written in place, so the optimizer and the compile and DDP wrappers keep their parameters. Each is written
once, although nnU-Net's networks register most tensors under several names. Output layers are never transferred.
Tensors with a different shape are adapted where possible (stem channels, positions, kernels). Otherwise they keep
their random values, and the report gives the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of

MINIMUM_ENCODER_SHARE = 0.5
"""Smallest share of the encoder's parameters to transfer; below it the checkpoint is of another network."""
SHOWN_DIFFERENCES = 5
MISFIT = "shape"
"""First word of the reason for a tensor with another shape."""
ABSENT = "not in this network"
HOW_TO_FIT = "mfm_plan_and_preprocess --like CHECKPOINT"

Topology = Literal["fit", "adapt"]
"""fit: the network was planned like the checkpoint. adapt: it has its own plan, and kernels are resized to fit."""

ADVICE: dict[Topology, str] = {
    "fit": "; where only kernels differ, keep the plan and give --set finetune.transfer=adapt",
    "adapt": "",
}

Parts = Literal["encoder", "encoder_decoder", "all_but_heads"]
"""Parts of a network to transfer; ``all_but_heads`` includes tensors outside encoder and decoder."""

TRANSFERRED: dict[Parts, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "encoder_decoder": ("encoder", "decoder"),
    "all_but_heads": ("encoder", "decoder", "other"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a report; ``how`` describes its adaptation, or why it is new or ignored."""

    name: str
    num_parameters: int
    how: str = ""


@dataclass(frozen=True)
class TransferReport:
    """All tensors of the target (loaded, adapted or new) and the unused tensors of the source (ignored).

    ``encoder_share`` is the share (0 to 1) of the target encoder's parameters that were loaded or adapted.
    """

    loaded: tuple[Entry, ...]
    adapted: tuple[Entry, ...]
    new: tuple[Entry, ...]
    ignored: tuple[Entry, ...]
    encoder_share: float
    warning: str = ""
    """Likely mistake, although most parameters match."""

    def summary(self) -> str:
        """Return a table of tensors and parameters per kind, the encoder's share, and the adaptations."""
        lines = [f"{'weights':<10}{'tensors':>8}{'parameters':>14}"]
        for kind, entries in self._kinds():
            lines.append(f"{kind:<10}{len(entries):>8}{sum(entry.num_parameters for entry in entries):>14,}")
        lines.append(f"{self.encoder_share:.1%} of the encoder's parameters come from the checkpoint")
        lines += [f"adapted {entry.name}: {entry.how}" for entry in self.adapted]
        return "\n".join([*lines, self.warning] if self.warning else lines)

    def details(self) -> str:
        """List all tensors by name, one per line."""
        return "\n".join(
            f"{kind:<8} {entry.name}  {entry.num_parameters:,}" + (f"  ({entry.how})" if entry.how else "")
            for kind, entries in self._kinds()
            for entry in entries
        )

    def to_dict(self) -> dict[str, object]:
        """Convert the report to JSON values."""
        return {**{kind: [asdict(e) for e in es] for kind, es in self._kinds()}, "encoder_share": self.encoder_share}

    def _kinds(self) -> Iterator[tuple[str, tuple[Entry, ...]]]:
        yield from (("loaded", self.loaded), ("adapted", self.adapted), ("new", self.new), ("ignored", self.ignored))


@dataclass(frozen=True)
class _Decision:
    """Decision for one distinct tensor of the target. If ``value`` is None, it is left unchanged."""

    names: tuple[str, ...]
    sources: tuple[str, ...]
    """Possible names in the checkpoint."""
    target: Tensor
    value: Tensor | None
    kind: str
    how: str = ""

    @property
    def entry(self) -> Entry:
        return Entry(self.names[0], self.target.numel(), self.how)


def transfer_weights(
    source: Mapping[str, Tensor],
    network: nn.Module,
    *,
    source_patch_size: Sequence[int] | None = None,
    source_network: str | None = None,
    parts: Parts = "all_but_heads",
    topology: Topology = "fit",
    images: tuple[int | None, int | None] = (None, None),
    how_to_fit: str = HOW_TO_FIT,
) -> TransferReport:
    """Copy pretrained weights into ``network`` in place and report what happened to every tensor.

    ``source``: state dict; wrapper prefixes are stripped.
    ``source_patch_size``: in voxels, gives the grid of token positions. None: a cube is assumed.
    ``source_network``: class name for messages.
    ``topology``: "adapt" also resizes kernels.
    ``images``: number of image channels (checkpoint, network), for cascades, where one-hot labels follow the images.
    ``how_to_fit``: command, for messages, that plans the dataset so that the checkpoint fits.

    Raises MFMError: E_MODEL_MISMATCH if less than half of the encoder matches or 2D and 3D are mixed, E_NONFINITE if
    the source holds NaN or infinity. The network is then unchanged.
    """
    transfer = _Transfer(without_wrapper_prefixes(source), unwrapped(network), parts, topology, images)
    transfer.require_same_dimensions(source_network)
    decisions = transfer.decide(source_patch_size)
    report = transfer.report(decisions)
    if report.encoder_share < MINIMUM_ENCODER_SHARE:
        raise transfer.mismatch(report, decisions, source_network, how_to_fit)
    with torch.no_grad():
        for decision in decisions:
            if decision.value is not None:
                decision.target.copy_(decision.value)
    return report


def unwrapped(network: nn.Module) -> nn.Module:
    """Strip the wrappers of ``torch.compile`` and DistributedDataParallel."""
    while True:
        inner = getattr(network, "_orig_mod", None) or (
            network.module if isinstance(network, nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return network
        network = inner


def without_wrapper_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip the wrapper prefixes ``module.`` and ``_orig_mod.`` from the keys of a state dict."""
    result = {}
    for name, tensor in weights.items():
        parts = [part for part in str(name).split(".") if part != "_orig_mod"]
        while parts[0] == "module" and len(parts) > 1:
            parts = parts[1:]
        if isinstance(tensor, Tensor):
            result[".".join(parts)] = tensor
    return result


class _Transfer:
    """Transfer from one source to one target. The parts of the target are looked up once."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        network: nn.Module,
        parts: Parts,
        topology: Topology,
        images: tuple[int | None, int | None],
    ) -> None:
        self.weights, self.network = weights, network
        self.parts, self.topology, self.images = parts, topology, images
        self.family = family_of(network)
        self.heads, self.encoder = self.family.head_names(network), self.family.encoder_names(network)
        self.stem = self.family.stem_names(network)
        self.in_source = self.family.source_renaming(network, weights)

    def require_same_dimensions(self, source_network: str | None) -> None:
        """Refuse 2D weights in a 3D network and vice versa, where only norms and biases would fit."""
        for name, parameter in self.network.named_parameters():
            both = {parameter.ndim, self.weights[name].ndim} if name in self.weights else set()
            if both == {4, 5}:
                raise MFMError(
                    "E_MODEL_MISMATCH",
                    f"the checkpoint{_of(source_network)} is {self.weights[name].ndim - 2}D, this network is "
                    f"{parameter.ndim - 2}D ({name}). Use a checkpoint that was pretrained with the same "
                    "configuration.",
                )

    def decide(self, source_patch_size: Sequence[int] | None) -> list[_Decision]:
        """Decide on every parameter and saved buffer; each decision has all its registered names."""
        groups: dict[int, tuple[list[str], Tensor]] = {}
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            groups.setdefault(id(tensor), ([], tensor))[0].append(name)
        return [self._decide(tuple(names), tensor, source_patch_size) for names, tensor in groups.values()]

    def _decide(self, names: tuple[str, ...], tensor: Tensor, source_patch_size: Sequence[int] | None) -> _Decision:
        sources = tuple(self.in_source(name) for name in names)
        name = next((name for name in sources if name in self.weights), None)
        reason = None
        if name is None:
            reason = "not in the checkpoint"
        elif self.heads & set(names):
            reason = "head"
        elif names[0] == "mask_token":
            reason = "belongs to masked pretraining"
        elif not {self.family.part_of(name) for name in names} & set(TRANSFERRED[self.parts]):
            reason = f"left out by finetune.parts={self.parts}"
        if name is None or reason is not None:
            return _Decision(names, sources, tensor, None, "new", reason or "")
        if not torch.isfinite(self.weights[name]).all():
            raise MFMError(
                "E_NONFINITE", f"the checkpoint's tensor {name} has NaN or infinite values. Use another checkpoint."
            )
        value, kind, how = self._fit(self.weights[name], tensor, names, source_patch_size)
        if name not in names and value is not None:
            other = f"{name} of the checkpoint, whose network has other names or another depth"
            how = "; ".join(filter(None, (other, how)))
        return _Decision(names, sources, tensor, value, kind, how)

    def _fit(
        self, value: Tensor, tensor: Tensor, names: tuple[str, ...], source_patch_size: Sequence[int] | None
    ) -> tuple[Tensor | None, str, str]:
        """Return the value for ``tensor``, its kind, and how it was adapted or why not."""
        if resized := self.family.resize_positions(names[0], value, self.network, source_patch_size):
            return resized[0], "adapted", resized[1]
        channels = (0, 0)
        is_stem = bool(self.stem & set(names)) and value.ndim == tensor.ndim > 1
        if is_stem:
            channels = (self.images[0] or value.shape[1], self.images[1] or tensor.shape[1])
        if value.shape == tensor.shape and channels[0] == channels[1]:
            return value, "loaded", ""
        hows: list[str] = []
        fitting = value
        if self.topology == "adapt" and _is_convolution(names[0], self.network):
            fitting, hows = _resize_kernel(fitting, tensor)
        same_but_channels = fitting.shape[:1] + fitting.shape[2:] == tensor.shape[:1] + tensor.shape[2:]
        if is_stem and same_but_channels and (fitting.shape != tensor.shape or channels[0] != channels[1]):
            fitting, how = _spread_channels(fitting, tensor, channels)
            hows.append(how)
        if fitting.shape == tensor.shape:
            return fitting, "adapted", "; ".join(hows)
        return None, "new", f"{MISFIT} {tuple(value.shape)} in the checkpoint, {tuple(tensor.shape)} here"

    def report(self, decisions: list[_Decision]) -> TransferReport:
        of_encoder = [decision for decision in decisions if self.encoder & set(decision.names)]
        total = sum(decision.target.numel() for decision in of_encoder)
        taken = sum(decision.target.numel() for decision in of_encoder if decision.value is not None)
        kinds = {kind: tuple(d.entry for d in decisions if d.kind == kind) for kind in ("loaded", "adapted", "new")}
        warning = ""
        if misfits := [d for d in of_encoder if d.value is None and d.how.startswith(MISFIT)]:
            warning = (
                f"WARNING: {len(misfits)} tensors of the encoder stay random, because their shapes differ, e.g. "
                f"{misfits[0].names[0]}: {misfits[0].how}. Later layers were trained on other features. Plan "
                f"the dataset like the checkpoint (--like){ADVICE[self.topology]}."
            )
        return TransferReport(
            **kinds, ignored=self._ignored(decisions), encoder_share=taken / max(total, 1), warning=warning
        )

    def _ignored(self, decisions: list[_Decision]) -> tuple[Entry, ...]:
        """Return the unused tensors of the checkpoint, each once even if it has several names."""
        used = {name for decision in decisions if decision.value is not None for name in decision.sources}
        reasons = {name: decision.how for decision in decisions for name in decision.sources}
        seen = {_storage_key(self.weights[name]) for name in used if name in self.weights}
        entries = []
        for name, tensor in self.weights.items():
            if name not in used and _storage_key(tensor) not in seen:
                seen.add(_storage_key(tensor))
                entries.append(Entry(name, tensor.numel(), reasons.get(name, ABSENT)))
        return tuple(entries)

    def mismatch(
        self, report: TransferReport, decisions: list[_Decision], source_network: str | None, how_to_fit: str
    ) -> MFMError:
        """Return the error for a checkpoint of another network, with the first differences."""
        missing = [d for d in decisions if d.value is None and self.encoder & set(d.names)]
        lines = [f"  {d.names[0]} {tuple(d.target.shape)}: {d.how}" for d in missing[:SHOWN_DIFFERENCES]]
        unknown = [entry.name for entry in report.ignored if entry.how == ABSENT][:SHOWN_DIFFERENCES]
        lines += [f"  {name} {tuple(self.weights[name].shape)}: only in the checkpoint" for name in unknown]
        return MFMError(
            "E_MODEL_MISMATCH",
            f"the checkpoint{_of(source_network)} is for another network than this {type(self.network).__name__}: only "
            f"{report.encoder_share:.1%} of the encoder's parameters match. Plan the dataset so that the checkpoint "
            f"fits and train on that plan: {how_to_fit}{ADVICE[self.topology]}. The first differences:\n"
            + "\n".join(lines),
        )


def _is_convolution(name: str, network: nn.Module) -> bool:
    """Return whether ``name`` is the kernel of a convolution (not a transposed one)."""
    module = network.get_submodule(name.rpartition(".")[0])
    return isinstance(module, (nn.Conv2d, nn.Conv3d)) and name.endswith(".weight")


def _resize_kernel(value: Tensor, tensor: Tensor) -> tuple[Tensor, list[str]]:
    """Shrink kernels to, or grow them from, one voxel along an axis.

    Summing keeps the response to images that are constant along the axis. Padding with zeros keeps the response to any
    image.
    """
    if value.ndim != tensor.ndim:
        return value, []
    before = "x".join(map(str, value.shape[2:]))
    for axis, (have, want) in enumerate(zip(value.shape[2:], tensor.shape[2:]), start=2):
        if want == 1 and have % 2:
            value = value.sum(axis, keepdim=True) if have > 1 else value
        elif have == 1 and want % 2:
            padding = [0] * (2 * (value.ndim - 1 - axis)) + [want // 2, want // 2]
            value = nn.functional.pad(value, padding)
    after = "x".join(map(str, value.shape[2:]))
    how = f"kernel {before} -> {after}: summed where it became flat, centred between zeros where it grew"
    return value, [how] if before != after else []


def _spread_channels(value: Tensor, tensor: Tensor, images: tuple[int, int]) -> tuple[Tensor, str]:
    """Convert a stem to another number of channels, keeping its response to identical images.

    For cascades, weights of label channels are dropped from the checkpoint and start at zero in the target.
    """
    channels, wanted = images
    own = value[:, :channels]
    if channels == wanted:
        how = "as they are"
    else:
        how = ("repeated" if channels == 1 else "summed, repeated") + f" and divided by {wanted}"
        own = (own.sum(1, keepdim=True) / wanted).expand(-1, wanted, *own.shape[2:])
    how = f"{channels} -> {wanted} input channels: {how}"
    behind, labels = value.shape[1] - channels, tensor.shape[1] - wanted
    how += f"; {behind} channels of labels stay behind" if behind else ""
    how += f"; {labels} channels of labels begin with zero" if labels else ""
    return torch.cat([own, own.new_zeros(len(own), labels, *own.shape[2:])], 1), how


def _storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is equal for names of the same tensor; empty tensors are never equal."""
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _of(source_network: str | None) -> str:
    return f" (of a {source_network.rpartition('.')[2]})" if source_network else ""
