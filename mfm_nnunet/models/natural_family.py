"""Family of encoders trained on natural images: names, sizes, intensities, parts, advice, weights of timm.

Legend: B batch, C channels, D H W voxels, N slices, E features, K outputs; in 2D there is no D.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn import functional

from mfm_nnunet.errors import MFMError, nearest
from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
from mfm_nnunet.models.depth import DEPTHS, can_inflate
from mfm_nnunet.models.families import NetworkFamily, PlannedNetwork, Sizing, TrainingDefaults
from mfm_nnunet.models.natural import encoder_facts, level_strides
from mfm_nnunet.models.sizing import MIN_EDGE, cpu_batch, largest_patch, plan_largest, smaller_patches

NATURAL = "mfm_nnunet.models.natural.NaturalUNet"
FEATURES = {"GPU": (24, 32, 64, 96, 128, 128), "CPU": (12, 16, 24, 32, 48, 64)}
"""Channels of the decoder's levels; a network with fewer levels has the first."""
MAX_VOXELS = {3: 128**3, 2: 768**2}
MAX_CPU_VOXELS = {3: 64**3, 2: 200**2}
MASK_EDGE = 16
"""Edge of the blocks that masked pretraining hides from an encoder with stages; of a ViT it is the token's."""
MASK_SLICES = (4, 2, 1)
"""Slices of such a block, the first that divides the patch: of a single slice the neighbours would tell."""
IMAGENET = (0.449, 0.226)
"""Mean and deviation of natural images, over the three colours."""
FEW_CASES = 40
"""Labelled cases up to which the encoder is frozen, with adapters."""
_ATTENTION = re.compile(r"(.+\.)?attn\.(qkv|q_proj|k_proj|v_proj|proj)")


class NaturalBackbone(AbstractBackbone):
    """The network with hidden voxels filled, and a learned token in the place of the encoder's hidden first features.

    Both kinds of restoring mean the same, as for Swin networks: most encoders need whole maps (arXiv 2111.09886).
    """

    def __init__(self, network: Any, patch_size: tuple[int, ...], restoring: Restoring) -> None:
        super().__init__(network, patch_size)
        self._embedding = _first_convolution(network.encoder)[0]
        if restoring != "none":
            width = network.encoder.get_submodule(self._embedding).out_channels
            self.mask_token = nn.Parameter(0.02 * torch.randn(width))

    def blocks(self) -> list[nn.Module]:
        network = self.network
        inner = getattr(network.encoder, "blocks", None)
        if inner is None:
            inner = [network.encoder.get_submodule(name) for name in network.facts.modules]
        return [network.stem.full, network.stem.halved, *inner, *network.decoder.blocks]

    def mask_cell(self) -> tuple[int, ...]:
        facts, own = self.network.facts, self.network.sizes
        edge = facts.step if facts.is_plain or facts.step % MASK_EDGE else MASK_EDGE
        slices = next(number for number in MASK_SLICES if self.patch_size[0] % number == 0)
        return (max(slices, own.depth_stride), edge, edge)[-len(self.patch_size) :]

    def crop_cell(self) -> tuple[int, ...]:
        step = self.network.facts.step
        return (self.network.sizes.depth_stride, step, step)[-len(self.patch_size) :]

    def feature_widths(self) -> list[int]:
        return list(self.network.facts.widths)

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return self.network.encode(x_BCDHW)

    def supervise_deeply(self) -> None:
        self.family.set_deep_supervision(self.network, True)
        self.network.heads.requires_grad_(True)

    def outputs(self, x_BCDHW: Tensor) -> list[Tensor]:
        found = self.network(x_BCDHW)
        return found if isinstance(found, list) else [found]

    def restore(self, x_BCDHW: Tensor, hidden_B1DHW: Tensor, fill_value: float = 0.0) -> Tensor:
        def replace(module: nn.Module, inputs: Any, features_NEhw: Tensor) -> Tensor:
            hidden_BDHW = hidden_B1DHW[:, 0] if hidden_B1DHW.dim() == 5 else hidden_B1DHW
            groups = len(features_NEhw) // len(x_BCDHW)
            hidden_N1HW = hidden_BDHW.float().unflatten(1, (groups, -1)).amax(2).flatten(0, 1)[:, None]
            hidden_N1hw = functional.adaptive_max_pool2d(hidden_N1HW, features_NEhw.shape[2:]) > 0
            return torch.where(hidden_N1hw, self.mask_token.to(features_NEhw.dtype)[:, None, None], features_NEhw)

        hook = self.network.encoder.get_submodule(self._embedding).register_forward_hook(replace)
        try:
            return self.network(x_BCDHW.masked_fill(hidden_B1DHW, fill_value))
        finally:
            hook.remove()


class NaturalFamily(NetworkFamily):
    """Encoders of timm, named ``timm:NAME``, in 3D also ``timm:NAME+adapters`` and ``timm:NAME+inflated``."""

    name = "timm"
    title = "natural-image encoder"
    classes = (NATURAL,)
    encoder = ("encoder.",)
    decoder = ("stem.", "depth.", "decoder.", "heads.")
    head = ("heads.",)
    rates: ClassVar = {"adamw": (1e-3, 3e-4)}
    hides = "tokens"
    fewest_cells = 2

    # Planning

    def variant(self, architecture: Mapping[str, Any]) -> str:
        kwargs = architecture["arch_kwargs"]
        depth = kwargs.get("depth", DEPTHS[0])
        return f"timm:{kwargs['encoder']}" + (f"+{depth}" if depth != DEPTHS[0] else "")

    def plans_name(self, variant: str) -> str:
        words = re.split(r"[_.:+-]", variant.removeprefix("timm:"))
        return f"mfm{''.join(word.capitalize() for word in words)}Plans"

    def require_variant(self, variant: str) -> None:
        name, depth = _split_variant(variant)
        if not name:
            raise MFMError(
                "E_CONFIG",
                "--network timm: which encoder? Give its name in timm, e.g. timm:vit_small_patch14_dinov2.lvd142m or "
                "timm:tf_efficientnet_lite0.in1k (documentation/how_to/natural_image_encoders.md).",
            )
        facts = encoder_facts(name)
        if depth not in DEPTHS:
            raise MFMError("E_CONFIG", f"--network {variant}: after + {nearest(depth, DEPTHS)}")
        if depth == "inflated" and not can_inflate(_blank(name), facts.is_plain):
            raise MFMError(
                "E_CONFIG",
                f"--network {variant}: its attention within windows has no inflated form. Use timm:{name}, which sees "
                f"volumes slice by slice, or timm:{name}+adapters.",
            )

    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        if "encoder" not in kwargs:
            return None
        step = encoder_facts(kwargs["encoder"]).step
        return [int(kwargs.get("depth_stride", 1)), step, step][-num_axes:]

    def patch_problem(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> str:
        problem, steps = super().patch_problem(kwargs, patch_size), self.steps(kwargs, len(patch_size))
        if not problem or steps is None or len(steps) != len(patch_size):
            return problem
        legal = " x ".join(str(-(-size // step) * step) for size, step in zip(patch_size, steps))
        return f"{problem}; the next legal size is {legal}"

    def with_patch(self, architecture: Mapping[str, Any], patch_size: Sequence[int]) -> dict[str, Any]:
        kwargs = {**architecture["arch_kwargs"], "num_slices": patch_size[0] if len(patch_size) == 3 else 1}
        return {**architecture, "arch_kwargs": kwargs}

    def with_intensities(
        self, architecture: Mapping[str, Any], schemes: Sequence[str], intensities: Mapping[str, Any]
    ) -> dict[str, Any]:
        windows = [black_and_white(scheme, intensities.get(str(number))) for number, scheme in enumerate(schemes)]
        kwargs = {**architecture["arch_kwargs"], "intensities": windows}
        kwargs |= _statistics(kwargs["encoder"], len(windows))
        return {**architecture, "arch_kwargs": kwargs}

    def plan_network(self, sizing: Sizing) -> PlannedNetwork:
        """Choose the patch by memory, in whole tokens. On the CPU the decoder is narrower."""
        self.require_variant(sizing.variant)
        name, depth = _split_variant(sizing.variant)
        num_axes, step = len(sizing.spacing), encoder_facts(name).step
        stride = _depth_stride(sizing.spacing, step) if depth == "inflated" and encoder_facts(name).is_plain else 1
        cell = [stride, step, step][-num_axes:]

        def architecture(size: str, patch: Sequence[int]) -> dict[str, Any]:
            return natural_architecture(name, depth, FEATURES[size], patch, (stride, sizing.num_inputs))

        if sizing.memory_gb is None:
            patch = largest_patch(sizing.median_shape, sizing.spacing, cell, MAX_CPU_VOXELS[num_axes])
            return PlannedNetwork(architecture("CPU", patch), patch, cpu_batch(patch))
        largest = largest_patch(sizing.median_shape, sizing.spacing, cell, MAX_VOXELS[num_axes])
        smallest = [max(edge, MIN_EDGE[num_axes] * (edge > stride)) for edge in cell]
        trials = [("GPU", patch) for patch in (largest, *smaller_patches(largest, sizing.spacing, cell, smallest))]
        return plan_largest(sizing, trials, architecture, self.title)

    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        reason = "AdamW, with rates published for decoders beside frozen encoders"
        return TrainingDefaults("adamw", 1e-3, 1e-2, 1.0, reason, deep_supervision=True, train="auto")

    def describe(self, architecture: Mapping[str, Any]) -> str:
        kwargs = architecture["arch_kwargs"]
        facts = encoder_facts(kwargs["encoder"])
        maps = f"{facts.widths[0]} features at 1/{facts.step}"
        if not facts.is_plain:
            maps = f"{facts.widths[0]} to {facts.widths[-1]} features at 1/{facts.reductions[0]} to 1/{facts.step}"
        features = kwargs["features"]
        return f"{self.variant(architecture)}, {maps}, decoder of {features[0]} to {features[-1]} channels"

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        licence = _config(architecture["arch_kwargs"]["encoder"]).get("license")
        size = super().reason(architecture, memory_gb)
        return f"{size}; weights: mfm_train -pretrained_weights FILE; licence of those published: {licence}"

    def patch_unit(self) -> str:
        return "multiples of its tokens, or of its coarsest map's"

    def licence(self, network: Any) -> str | None:
        return _config(network.sizes.encoder).get("license") or "unknown"

    # Training

    def advise_training(self, network: Any, num_cases: int) -> tuple[dict[str, Any], str]:
        if not self.adapted_layers(network):
            reason = "a pretrained CNN learns at a third of the decoder's rate, and keeps the statistics of its norms"
            return {"train": "all", "layer_decay": 1 / 3}, reason
        if num_cases <= FEW_CASES:
            reason = f"{num_cases} cases: the encoder stays as it is, with adapters in its attention"
            return {"train": "lora", "layer_decay": 1.0}, f"{reason} (arXiv 2106.09685)"
        return {"train": "all", "layer_decay": 0.75}, f"{num_cases} cases: all is trained, early blocks least"

    def takes_deep_supervision(self, class_name: str) -> bool:
        return True

    def has_pyramid(self, kwargs: Mapping[str, Any]) -> bool:
        return True

    def set_deep_supervision(self, network: Any, enabled: bool) -> None:
        network.deep_supervision = enabled

    def unused_outputs(self, network: Any) -> list[nn.Parameter]:
        return [] if network.deep_supervision else list(network.heads[1:].parameters())

    def layer_decay_problem(self) -> str:
        return ""

    def layers_after(self, name: str, network: Any) -> int:
        """Count blocks as timm groups them, in a CNN the whole encoder as one."""
        if not name.startswith("encoder."):
            return 0
        if not self.adapted_layers(network):
            return 1
        layers = _layers(network.sizes.encoder)
        own = name.removeprefix("encoder.").partition(".parametrizations.")
        place = layers[f"{own[0]}.weight" if own[1] else own[0]]
        return max(1, max(layers.values()) - place)

    def adapted_layers(self, network: Any) -> list[nn.Linear]:
        """Return the projections of attention. One adapter of a fused ``qkv`` has rows of its own for q, k and v."""
        named = network.encoder.named_modules()
        return [module for name, module in named if _ATTENTION.fullmatch(name) and isinstance(module, nn.Linear)]

    def stem_names(self, network: Any) -> set[str]:
        return {f"encoder.{_first_convolution(network.encoder)[0]}.weight"}

    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        return NaturalBackbone(network, patch_size, restoring)

    # Transfer

    def source_renaming(self, network: Any, weights: Mapping[str, Tensor]) -> Callable[[str], str]:
        """Map names by order, if a file has other names and all its tensors have the shapes of timm's, in its order.

        These are files of the programs that timm's models were converted from, e.g. of EfficientNet-Lite.
        """
        theirs = [(name, tensor.shape) for name, tensor in weights.items() if not name.endswith(_COUNTER)]
        own = [f"encoder.{name}" for name, _ in _whole(network.sizes.encoder)]
        if set(own) & set(weights) or [shape for _, shape in theirs] != [s for _, s in _whole(network.sizes.encoder)]:
            return lambda name: name
        renamed = dict(zip(own, (name for name, _ in theirs)))
        return lambda name: renamed.get(name, name)


_COUNTER = "num_batches_tracked"


def natural_architecture(
    name: str, depth: str, features: Sequence[int], patch: Sequence[int], numbers: tuple[int, int]
) -> dict[str, Any]:
    """Return a plan's ``architecture`` entry; ``numbers`` are the slices that a token covers, and the channels."""
    strides, (depth_stride, num_inputs) = level_strides(name, len(patch)), numbers
    kwargs = {
        "encoder": name,
        "strides": strides,
        "features": list(features[: len(strides)]),
        "intensities": [black_and_white("ZScoreNormalization", None)] * num_inputs,
        **_statistics(name, num_inputs),
        "depth": depth,
        "depth_stride": depth_stride if len(patch) == 3 else 1,
        "num_slices": patch[0] if len(patch) == 3 else 1,
    }
    return {"network_class_name": NATURAL, "arch_kwargs": kwargs, "_kw_requires_import": []}


def black_and_white(scheme: str, known: Mapping[str, float] | None) -> list[float]:
    """Return what is 0 and 1 of a natural image, in the units of a normalisation of nnU-Net.

    CT: the ends of its window. Scaled to [0, 1]: these. Else each image gets the mean and deviation of natural images.
    """
    if scheme == "CTNormalization" and known:
        deviation = max(known["std"], 1e-8)
        return [(known[end] - known["mean"]) / deviation for end in ("percentile_00_5", "percentile_99_5")]
    if scheme.endswith("To01Normalization"):
        return [0.0, 1.0]
    mean, deviation = IMAGENET
    return [-mean / deviation, (1 - mean) / deviation]


def _statistics(name: str, num_inputs: int) -> dict[str, list[float]]:
    """Return the encoder's mean and deviation for each channel: its own for three, else the mean of its colours."""
    config = _config(name)
    colours = {"mean": list(config["mean"]), "deviation": list(config["std"])}
    if num_inputs == 3:
        return colours
    return {key: [sum(values) / len(values)] * num_inputs for key, values in colours.items()}


def _split_variant(variant: str) -> tuple[str, str]:
    """Return the encoder's name and the treatment of the third axis."""
    name, _, depth = variant.partition(":")[2].partition("+")
    return name, depth or DEPTHS[0]


def _depth_stride(spacing: Sequence[float], step: int) -> int:
    """Return the slices that a token of an inflated ViT covers: about a quarter of its edge, for small organs."""
    if len(spacing) == 2:
        return 1
    return next(stride for stride in (4, 2, 1) if stride == 1 or stride * spacing[0] <= step * min(spacing[1:]) / 4)


def _first_convolution(encoder: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, module) for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d))


@functools.cache
def _blank(name: str) -> Any:
    """Return timm's whole model without values."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def _config(name: str) -> dict[str, Any]:
    """Return what timm knows of the weights it publishes under a name: mean, std, license and more."""
    return _blank(name).pretrained_cfg


def _whole(name: str) -> list[tuple[str, torch.Size]]:
    """Return names and shapes of all tensors of timm's model, in its order, without counters."""
    return [(key, value.shape) for key, value in _blank(name).state_dict().items() if not key.endswith(_COUNTER)]


@functools.cache
def _layers(name: str) -> dict[str, int]:
    """Return the number of the layer of each parameter, from the first on."""
    model = _blank(name)
    return {key: int(number) for key, number in group_parameters(model, model.group_matcher(), reverse=True).items()}
