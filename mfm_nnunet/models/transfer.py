"""Which pretrained weights travel into a network, and the report about it.

Tensors are written in place, each one once (nnU-Net's networks register most tensors under several names), so the
optimizer and the compile and DDP wrappers keep the very same parameters. Heads never travel. What has another shape
is adapted where that is meaningful (stem channels, token positions), else it stays new and the report says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.networks import encoder_names, head_names, part_of, stem_names, token_size
from mfm_nnunet.models.transfer_report import Entry, TransferReport

__all__ = ["Entry", "Parts", "Topology", "TransferReport", "transfer_weights", "unwrapped", "without_wrapper_prefixes"]

SHOWN_DIFFERENCES = 5
MISFIT = "shape"
"""What the reason of a tensor begins with that stays new because the checkpoint's has another one."""

Topology = Literal["fit", "adapt"]
"""fit: the network was planned like the checkpoint. adapt: it has its own plan, and kernels are made to fit it."""

ADVICE: dict[Topology, str] = {
    "fit": "; where only kernels differ, keep the plan and give --set finetune.transfer=adapt",
    "adapt": "",
}

HOW_TO_FIT = "mfm_plan_and_preprocess --like CHECKPOINT"

Parts = Literal["encoder", "encoder_decoder", "all_but_heads"]
"""What of a network travels; ``all_but_heads`` takes also what is neither encoder nor decoder."""

TRAVELLING: dict[Parts, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "encoder_decoder": ("encoder", "decoder"),
    "all_but_heads": ("encoder", "decoder", "other"),
}


_STAGE = re.compile(r"encoder\.stages\.(\d+)\.")
_LEVEL = re.compile(r"^(decoder\.(?:stages|transpconvs)\.)(\d+)\.")


@dataclass(frozen=True)
class _Target:
    """The network and what its names mean, looked up once."""

    network: nn.Module
    heads: set[str]
    encoder: set[str]
    stem: set[str]
    position: str
    parts: Parts
    topology: Topology
    images: tuple[int | None, int | None]
    """How many of the first channels are images, in the checkpoint and here."""
    deeper: int
    """How many stages the checkpoint's U-Net has more than this one; below 0: fewer."""

    @classmethod
    def of(
        cls,
        network: nn.Module,
        weights: Mapping[str, Tensor],
        parts: Parts,
        topology: Topology,
        images: tuple[int | None, int | None],
    ) -> _Target:
        position = getattr(network, "key_to_lpe", None) or "eva.pos_embed"
        names = head_names(network), encoder_names(network), stem_names(network)
        deeper = _num_stages(weights) - _num_stages(network.state_dict())
        return cls(network, *names, position, parts, topology, images, deeper)

    def in_source(self, name: str) -> str:
        """The checkpoint's name of the same part: levels of a decoder are numbered from the deepest up."""
        return _LEVEL.sub(lambda match: f"{match[1]}{int(match[2]) + self.deeper}.", name)


@dataclass(frozen=True)
class _Decision:
    """What one distinct tensor of the target gets; ``value`` None leaves it as it is."""

    names: tuple[str, ...]
    sources: tuple[str, ...]
    """The checkpoint's names for it, whether they are there or not."""
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
    minimum_encoder_share: float = 0.5,
    source_network: str | None = None,
    parts: Parts = "all_but_heads",
    topology: Topology = "fit",
    images: tuple[int | None, int | None] = (None, None),
    how_to_fit: str = HOW_TO_FIT,
) -> TransferReport:
    """Copy pretrained weights into ``network`` in place and report what happened to every tensor.

    ``source`` is a state dict (wrapper prefixes are stripped); ``source_patch_size`` (voxels) tells the grid of token
    positions, which else is taken for a cube; ``source_network`` is a class name for messages; what is not among
    ``parts`` stays new, and the report says so; ``topology`` says whether kernels of another size are adapted too;
    ``images`` are the numbers of image channels, in the checkpoint and here, where a cascade has labels behind them;
    ``how_to_fit`` is the command that plans the dataset so that the checkpoint fits.

    Raises MFMError: E_MODEL_MISMATCH when less than ``minimum_encoder_share`` of the encoder would come from the
    source or the dimensions differ, E_NONFINITE when the source holds NaN or infinity. The network is untouched then.
    """
    weights = without_wrapper_prefixes(source)
    target = _Target.of(unwrapped(network), weights, parts, topology, images)
    _require_same_dimensions(weights, target.network, source_network)
    decisions = [
        _decide(names, tensor, weights, target, source_patch_size) for names, tensor in _distinct(target.network)
    ]
    report = _report(decisions, weights, target)
    if report.encoder_share < minimum_encoder_share:
        raise _mismatch(report, decisions, weights, target, source_network, how_to_fit)
    _copy(decisions)
    return report


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and DistributedDataParallel."""
    while True:
        inner = getattr(network, "_orig_mod", None) or (
            network.module if isinstance(network, nn.parallel.DistributedDataParallel) else None
        )
        if inner is None:
            return network
        network = inner


def without_wrapper_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the names that ``module.`` and ``_orig_mod.`` wrappers left in its keys removed."""
    result = {}
    for name, tensor in weights.items():
        parts = [part for part in str(name).split(".") if part != "_orig_mod"]
        while parts[0] == "module" and len(parts) > 1:
            parts = parts[1:]
        if isinstance(tensor, Tensor):
            result[".".join(parts)] = tensor
    return result


def _num_stages(names: Iterable[str]) -> int:
    """The number of stages of a U-Net's encoder; 0 for other networks."""
    return 1 + max((int(match[1]) for match in map(_STAGE.match, names) if match), default=-1)


def _distinct(network: nn.Module) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every parameter and saved buffer once, with all names that it is registered under."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), ([], tensor))[0].append(name)
    return [(tuple(names), tensor) for names, tensor in groups.values()]


def _decide(
    names: tuple[str, ...],
    tensor: Tensor,
    weights: Mapping[str, Tensor],
    target: _Target,
    source_patch_size: Sequence[int] | None,
) -> _Decision:
    """What happens to one tensor of the network."""
    sources = tuple(target.in_source(name) for name in names)
    candidates = [name for name in sources if name in weights]
    reason = None
    if not candidates:
        reason = "not in the checkpoint"
    elif target.heads & set(names):
        reason = "head"
    elif names[0] == "mask_token":
        reason = "belongs to masked pretraining"
    elif not {part_of(name, target.network) for name in names} & set(TRAVELLING[target.parts]):
        reason = f"left out by finetune.parts={target.parts}"
    if reason is not None:
        return _Decision(names, sources, tensor, None, "new", reason)
    # Sparse pretraining trains the 'all_modules' copy and leaves the other one behind; else the copies are equal.
    name = min(candidates, key=lambda name: (name.startswith("decoder.encoder."), ".all_modules." not in name))
    if not torch.isfinite(weights[name]).all():
        raise MFMError("E_NONFINITE", f"the checkpoint's tensor {name} holds NaN or infinity. Use another checkpoint.")
    value, kind, how = _fitted(weights[name], tensor, names, target, source_patch_size)
    if name not in names and value is not None:
        how = "; ".join(filter(None, (f"{name} of the checkpoint, whose U-Net has another number of stages", how)))
    return _Decision(names, sources, tensor, value, kind, how)


def _fitted(
    value: Tensor, tensor: Tensor, names: tuple[str, ...], target: _Target, source_patch_size: Sequence[int] | None
) -> tuple[Tensor | None, str, str]:
    """The value for ``tensor``, its kind, and how it was adapted or why it cannot be."""
    if target.position in names and value.shape[::2] == tensor.shape[::2]:
        old, new = _token_grids(value, tensor, target.network, source_patch_size)
        if old and new and old != new:
            return _resized_positions(value, old, new), "adapted", f"positions interpolated from {old} to {new} tokens"
    is_stem = bool(target.stem & set(names)) and value.ndim == tensor.ndim > 1
    channels = _num_images(value, tensor, target.images) if is_stem else (0, 0)
    if value.shape == tensor.shape and channels[0] == channels[1]:
        return value, "loaded", ""
    hows: list[str] = []
    fitting = value
    if target.topology == "adapt" and _is_convolution(names, target.network):
        fitting, hows = _resized_kernel(fitting, tensor)
    same_but_channels = fitting.shape[:1] + fitting.shape[2:] == tensor.shape[:1] + tensor.shape[2:]
    if is_stem and same_but_channels and (fitting.shape != tensor.shape or channels[0] != channels[1]):
        fitting, how = _spread_channels(fitting, tensor, channels)
        hows.append(how)
    if fitting.shape == tensor.shape:
        return fitting, "adapted", "; ".join(hows)
    return None, "new", f"{MISFIT} {tuple(value.shape)} in the checkpoint, {tuple(tensor.shape)} here"


def _is_convolution(names: tuple[str, ...], network: nn.Module) -> bool:
    """Whether the tensor is the kernel of a convolution that keeps or halves a map; a transposed one has its stride."""
    module = network.get_submodule(names[0].rpartition(".")[0])
    return isinstance(module, (nn.Conv2d, nn.Conv3d)) and names[0].endswith(".weight")


def _resized_kernel(value: Tensor, tensor: Tensor) -> tuple[Tensor, list[str]]:
    """A kernel with one voxel along an axis from one with several, and the other way round; else as it is.

    Summed, its response to an image that is constant along the axis stays the same; centred between zeros, its response
    to any image does.
    """
    if value.ndim != tensor.ndim:
        return value, []
    hows = []
    before = "x".join(map(str, value.shape[2:]))
    for axis, (have, want) in enumerate(zip(value.shape[2:], tensor.shape[2:]), start=2):
        if want == 1 and have % 2:
            value = value.sum(axis, keepdim=True) if have > 1 else value
        elif have == 1 and want % 2:
            padding = [0] * (2 * (value.ndim - 1 - axis)) + [want // 2, want // 2]
            value = nn.functional.pad(value, padding)
    after = "x".join(map(str, value.shape[2:]))
    if before != after:
        hows.append(f"kernel {before} -> {after}: summed where it became flat, centred between zeros where it grew")
    return value, hows


def _num_images(value: Tensor, tensor: Tensor, images: tuple[int | None, int | None]) -> tuple[int, int]:
    """Image channels of two stems' weights; all of them where nothing else is known."""
    return images[0] or value.shape[1], images[1] or tensor.shape[1]


def _spread_channels(value: Tensor, tensor: Tensor, images: tuple[int, int]) -> tuple[Tensor, str]:
    """A stem for another number of channels: its response to equal images stays the same.

    The labels of a cascade's previous stage are no images: those of the checkpoint stay behind, ours begin with zero.
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


def _token_grids(
    value_1TE: Tensor, tensor_1TE: Tensor, network: nn.Module, source_patch_size: Sequence[int] | None
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """The grids that the checkpoint's and the network's token positions stand on; None where unknown."""
    token = token_size(network)
    planned = tuple(size // step for size, step in zip(source_patch_size or (), token))
    rope = getattr(network.get_submodule("eva"), "rope", None)
    own = tuple(int(size) for size in getattr(rope, "feat_shape", None) or ())
    return _token_grid(value_1TE.shape[1], planned, len(token)), _token_grid(tensor_1TE.shape[1], own, len(token))


def _token_grid(num_tokens: int, expected: tuple[int, ...], num_axes: int) -> tuple[int, ...] | None:
    """``expected`` if it has that many tokens, else a cube (pretraining crops may be smaller than the plan's patch)."""
    cube = (round(num_tokens ** (1 / num_axes)),) * num_axes
    return next((grid for grid in (expected, cube) if len(grid) == num_axes and math.prod(grid) == num_tokens), None)


def _resized_positions(positions_1TE: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Token positions interpolated to another grid (trilinear, bilinear in 2D, corners not aligned)."""
    embedding = positions_1TE.shape[2]
    grid = positions_1TE.detach().float().transpose(1, 2).reshape(1, embedding, *old)
    mode = {2: "bilinear", 3: "trilinear"}[len(old)]
    resized = nn.functional.interpolate(grid, size=new, mode=mode, align_corners=False)
    return resized.reshape(1, embedding, -1).transpose(1, 2)


def _report(decisions: list[_Decision], weights: Mapping[str, Tensor], target: _Target) -> TransferReport:
    of_encoder = [decision for decision in decisions if target.encoder & set(decision.names)]
    total = sum(decision.target.numel() for decision in of_encoder)
    taken = sum(decision.target.numel() for decision in of_encoder if decision.value is not None)
    kinds = {kind: tuple(d.entry for d in decisions if d.kind == kind) for kind in ("loaded", "adapted", "new")}
    warning = ""
    if misfits := [d for d in of_encoder if d.value is None and d.how.startswith(MISFIT)]:
        warning = (
            f"WARNING: {len(misfits)} tensors of the encoder stay random, because their shapes differ, e.g. "
            f"{misfits[0].names[0]}: {misfits[0].how}. Layers behind them were trained on other features. Plan the "
            f"dataset like the checkpoint (--like){ADVICE[target.topology]}."
        )
    ignored, share = _ignored(decisions, weights), taken / max(total, 1)
    return TransferReport(**kinds, ignored=ignored, encoder_share=share, warning=warning)


def _ignored(decisions: list[_Decision], weights: Mapping[str, Tensor]) -> tuple[Entry, ...]:
    """The checkpoint's tensors that nothing used, each once whatever the number of its names."""
    used = {name for decision in decisions if decision.value is not None for name in decision.sources}
    reasons = {name: decision.how for decision in decisions for name in decision.sources}
    seen = {_place(weights[name]) for name in used if name in weights}
    entries = []
    for name, tensor in weights.items():
        if name not in used and _place(tensor) not in seen:
            seen.add(_place(tensor))
            entries.append(Entry(name, tensor.numel(), reasons.get(name, "not in this network")))
    return tuple(entries)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for the names of one tensor; a tensor without elements has no place in memory and stands for itself."""
    return (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())


def _require_same_dimensions(weights: Mapping[str, Tensor], network: nn.Module, source_network: str | None) -> None:
    """2D weights must not go into a 3D network: norms and biases alone would fit and teach nothing."""
    for name, parameter in network.named_parameters():
        both = {parameter.ndim, weights[name].ndim} if name in weights else set()
        if both == {4, 5}:
            raise MFMError(
                "E_MODEL_MISMATCH",
                f"the checkpoint{_of(source_network)} is {weights[name].ndim - 2}D, this network is "
                f"{parameter.ndim - 2}D ({name}). Use a checkpoint that was pretrained with the same configuration.",
            )


def _mismatch(
    report: TransferReport,
    decisions: list[_Decision],
    weights: Mapping[str, Tensor],
    target: _Target,
    source_network: str | None,
    how_to_fit: str,
) -> MFMError:
    missing = [d for d in decisions if d.value is None and target.encoder & set(d.names)]
    lines = [f"  {d.names[0]} {tuple(d.target.shape)}: {d.how}" for d in missing[:SHOWN_DIFFERENCES]]
    unknown = [entry.name for entry in report.ignored if entry.how == "not in this network"]
    lines += [f"  {name} {tuple(weights[name].shape)}: only in the checkpoint" for name in unknown[:SHOWN_DIFFERENCES]]
    return MFMError(
        "E_MODEL_MISMATCH",
        f"the checkpoint{_of(source_network)} is for another network than this {type(target.network).__name__}: only "
        f"{report.encoder_share:.1%} of the encoder's parameters match. Plan the dataset so that the checkpoint fits "
        f"and train on that plan: {how_to_fit}{ADVICE[target.topology]}. The first differences:\n" + "\n".join(lines),
    )


def _of(source_network: str | None) -> str:
    return f" (of a {source_network.rpartition('.')[2]})" if source_network else ""


@torch.no_grad()
def _copy(decisions: list[_Decision]) -> None:
    for decision in decisions:
        if decision.value is not None:
            decision.target.copy_(decision.value)
