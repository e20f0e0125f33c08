"""The third axis for encoders of 2D images: their weights stay 2D, and all that joins slices starts at zero.

slices: each slice is an image. adapters: a small convolution along the slices behind each map (arXiv 2309.08842).
inflated: a ViT attends to the tokens of all slices, and a CNN's kernels get weights for the slices beside.

Legend: B batch, C channels, D H W voxels, N slices (B x D), S groups of slices, E features, T tokens, P prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from mfm_nnunet.models.natural import EncoderFacts

DEPTHS = ("slices", "adapters", "inflated")
SMALLEST_ADAPTER = 8
"""Channels of an adapter: an eighth of the map's, at least these."""
Encode = Callable[[Tensor], list[Tensor]]


class Depth(nn.Module):
    """Encode a volume as a batch of slices; ``parts`` act within the encoder, behind the modules they belong to."""

    def __init__(self, parts: dict[nn.Module, AlongSlices]) -> None:
        super().__init__()
        self.parts: Any = nn.ModuleList(parts.values())
        for module, part in parts.items():
            module.register_forward_hook(part.behind)  # a bound method, so that copies of the network stay whole

    def forward(self, encode: Encode, x_BCDHW: Tensor) -> list[Tensor]:
        """Return the encoder's maps (B, E, D, h, w)."""
        for part in self.parts:
            part.num_slices = x_BCDHW.shape[2]
        maps = encode(x_BCDHW.movedim(2, 1).flatten(0, 1))
        return [map_.unflatten(0, (-1, x_BCDHW.shape[2])).movedim(1, 2) for map_ in maps]


class AlongSlices(nn.Module):
    """Abstract base of what joins slices behind a module of the encoder."""

    num_slices = 1
    """Slices per volume of the batch."""

    def behind(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of ``module`` changed: the hook of :meth:`torch.nn.Module.register_forward_hook`."""
        raise NotImplementedError


class SliceAdapter(AlongSlices):
    """x + up(act(convolution along the slices(down(x)))), with up = 0 at the start."""

    def __init__(self, width: int, is_channels_last: bool) -> None:
        super().__init__()
        narrow = max(SMALLEST_ADAPTER, width // 8)
        self.is_channels_last = is_channels_last
        self.down, self.up = nn.Linear(width, narrow), nn.Linear(narrow, width)
        self.mix = nn.Conv1d(narrow, narrow, 3, padding=1, groups=narrow)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def behind(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_NhwE = output if self.is_channels_last else output.movedim(1, -1)
        narrow_NTE = self.down(x_NhwE).flatten(1, -2)
        lines_BTED = narrow_NTE.unflatten(0, (-1, self.num_slices)).permute(0, 2, 3, 1)
        mixed_BTED = self.mix(lines_BTED.flatten(0, 1)).unflatten(0, lines_BTED.shape[:2])
        added = self.up(functional.gelu(mixed_BTED).permute(0, 3, 1, 2).flatten(0, 1)).reshape(x_NhwE.shape)
        return output + (added if self.is_channels_last else added.movedim(-1, 1))


class SidewaysTaps(AlongSlices):
    """Weights of a 2D convolution for the slices below and above: with its own it is one 3D kernel.

    They are 0 at the start, so the centre of the 3D kernel is the 2D one (centre inflation). Beyond the volume is 0.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, *convolution.weight.shape))

    def behind(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        convolve: Any = conv2d_same if isinstance(module, Conv2dSame) else functional.conv2d
        x_BDCHW = inputs[0].unflatten(0, (-1, self.num_slices))
        blank = torch.zeros_like(x_BDCHW[:, :1])
        below, above = torch.cat([blank, x_BDCHW[:, :-1]], 1), torch.cat([x_BDCHW[:, 1:], blank], 1)
        for weight, beside in zip(self.weight, (below, above)):
            how = module.stride, module.padding, module.dilation, module.groups
            output = output + convolve(beside.flatten(0, 1), weight, None, *how)
        return output


class JointAttention(Depth):
    """A plain ViT whose blocks see the tokens of all slices at once.

    Prefix tokens are repeated for each slice: with one for all of them, the attention of a volume that is constant
    along the slices would differ from that of one slice. ``stride`` slices share a token, whose patch embedding sees
    their mean (mean inflation), and learns their differences. Positions along the slices are added, and 0 at the start.
    """

    def __init__(self, encoder: Any, facts: EncoderFacts, stride: int, num_slices: int) -> None:
        super().__init__({})
        self._encoder = [encoder]  # not a submodule: its weights are the network's, under one name
        self.indices, self.stride = facts.indices, stride
        out, inputs, *kernel = encoder.patch_embed.proj.weight.shape
        self.differences = nn.Parameter(torch.zeros(out, inputs, stride, *kernel)) if stride > 1 else None
        self.positions = nn.Parameter(torch.zeros(max(1, num_slices // stride), out))

    def forward(self, encode: Encode, x_BCDHW: Tensor) -> list[Tensor]:
        encoder, batch = self._encoder[0], len(x_BCDHW)
        x_BSKCHW = x_BCDHW.movedim(2, 1).unflatten(1, (-1, self.stride))
        num_groups = x_BSKCHW.shape[1]
        tokens_NhwE = encoder.patch_embed(x_BSKCHW.mean(2).flatten(0, 1))
        if self.differences is not None:
            added = functional.conv3d(x_BCDHW, self.differences, stride=self.differences.shape[2:])
            tokens_NhwE = tokens_NhwE + added.permute(0, 2, 3, 4, 1).flatten(0, 1)
        grid = tokens_NhwE.shape[1:3]
        tokens_NTE, rotary = _with_positions(encoder, tokens_NhwE)
        number = encoder.num_prefix_tokens
        tokens_BSTE = encoder.norm_pre(tokens_NTE).unflatten(0, (batch, num_groups))
        start = (len(self.positions) - num_groups) // 2
        patches_BSTE = tokens_BSTE[:, :, number:] + self.positions[start : start + num_groups, None]
        x_BTE = torch.cat([tokens_BSTE[:, :, :number].flatten(1, 2), patches_BSTE.flatten(1, 2)], 1)
        maps = []
        for index, block in enumerate(encoder.blocks):
            x_BTE = self._run(block, index, x_BTE, rotary, number * num_groups, num_groups)
            if index in self.indices:
                patches = encoder.norm(x_BTE)[:, number * num_groups :]
                maps.append(patches.transpose(1, 2).unflatten(2, (num_groups, *grid)))
        return maps

    @staticmethod
    def _run(block: Any, index: int, x_BTE: Tensor, rotary: Any, num_prefix: int, num_groups: int) -> Tensor:
        if rotary is None:
            return block(x_BTE)
        block.attn.num_prefix_tokens = num_prefix  # which are not rotated
        own = rotary if isinstance(rotary, Tensor) and rotary.dim() == 2 else rotary[index]
        return block(x_BTE, rope=torch.cat([own] * num_groups, -2))


def _with_positions(encoder: Any, tokens_NhwE: Tensor) -> tuple[Tensor, Any]:
    """Return tokens with prefix and positions, and the rotary table if the encoder has one."""
    found = encoder._pos_embed(tokens_NhwE)
    return found if isinstance(found, tuple) else (found, None)


def can_inflate(encoder: Any, is_plain: bool) -> bool:
    """Return whether an encoder is a plain ViT with global attention, or a CNN: others attend within windows."""
    if is_plain:
        return hasattr(encoder, "_pos_embed") and hasattr(encoder, "num_prefix_tokens")
    return not hasattr(encoder, "patch_embed")


def make_depth(encoder: Any, facts: EncoderFacts, kind: str, stride: int, num_slices: int) -> Depth:
    """Build what joins the slices of volumes that ``encoder`` sees.

    Raises ValueError for an unknown kind, and for an encoder that has no inflated form.
    """
    if kind not in DEPTHS:
        raise ValueError(f"depth {kind!r} is none of {', '.join(DEPTHS)}")
    if kind == "slices":
        return Depth({})
    if kind == "adapters":
        is_last = hasattr(encoder, "patch_embed")
        return Depth(
            {
                encoder.get_submodule(name): SliceAdapter(width, is_last)
                for name, width in zip(facts.modules, facts.widths)
            }
        )
    if not can_inflate(encoder, facts.is_plain):
        raise ValueError("its attention within windows has no inflated form; use slices or adapters")
    if facts.is_plain:
        return JointAttention(encoder, facts, stride, num_slices)
    kernels = [module for module in encoder.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    return Depth({module: SidewaysTaps(module) for module in kernels})
