"""Family of U-Nets from dynamic-network-architectures: ResEnc and plain, as nnU-Net plans them.

Shapes: B batch, C channels, D H W voxels, K outputs; in 2D there is no D.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.backbone import AbstractBackbone, Restoring
from mfm_nnunet.models.families import NetworkFamily, TrainingDefaults, family_of_class
from mfm_nnunet.models.layouts import Converted, ForeignLayout, NnsslName, Stated

_DNA = "dynamic_network_architectures.architectures"
RESENC, PLAIN = f"{_DNA}.unet.ResidualEncoderUNet", f"{_DNA}.unet.PlainConvUNet"
OLD_RESENC = f"{_DNA}.residual_unet.ResidualEncoderUNet"
"""Name in plans of older nnU-Net versions; nnU-Net's factory redirects it."""
STANDARD_WIDTH = 32
"""Features of the first stage of nnU-Net's ResEnc U-Nets."""
TITLES = {"ResidualEncoderUNet": "ResEnc U-Net", "ResidualUNet": "residual U-Net", "PlainConvUNet": "plain U-Net"}
NO_CHAIN = (
    "the stages of a U-Net are no chain of layers, because skip connections lead from the first stages straight to the "
    "last"
)
PUBLISHED_PATCH = {3: 160, 2: 512}
"""Voxels per axis of published pretraining, for files without a patch size."""
RESENC_L = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_conv_per_stage_decoder": [1] * 5,
}
"""Arguments of nnssl's ResEncL; norms and activations are nnU-Net's."""
LAYER = r"(?:conv|all_modules\.0)"
"""Matches both names of a convolution in its block."""
TRAINED_COPY = {"conv": "all_modules.0", "norm": "all_modules.1"}

LOADING_CODE = """\
import json
{imports}
from dynamic_network_architectures.architectures import unet
from torch import nn

mfm = json.load(open("config.json"))["mfm"]
architecture = mfm["plans"]["configurations"][mfm["configuration"]]["architecture"]
kwargs = dict(architecture["arch_kwargs"])
for key in architecture["_kw_requires_import"]:  # names of classes of torch.nn, or none
    kwargs[key] = getattr(nn, str(kwargs[key]).split(".")[-1], None)
network_class = getattr(unet, architecture["network_class_name"].split(".")[-1])
network = network_class(mfm["num_inputs"], num_classes=mfm["num_outputs"], **kwargs)
missing, unexpected = network.load_state_dict({weights}, strict=False)
assert not unexpected
"""


class UNetBackbone(AbstractBackbone):
    """U-Net with hidden voxels filled and skip connections kept (arXiv 2410.23132)."""

    def __init__(self, network: Any, patch_size: tuple[int, ...]) -> None:
        super().__init__(network, patch_size)
        assert not network.decoder.deep_supervision, (
            "pretext tasks take one dense output: build without deep supervision"
        )

    def blocks(self) -> list[nn.Module]:
        encoder = self.network.encoder
        stems = [stem for stem in [getattr(encoder, "stem", None)] if stem is not None]
        return [*stems, *encoder.stages, *self.network.decoder.stages]

    def crop_cell(self) -> tuple[int, ...]:
        return tuple(math.prod(stride) for stride in zip(*self.network.encoder.strides))

    def feature_widths(self) -> list[int]:
        return list(self.network.encoder.output_channels)

    def features(self, x_BCDHW: Tensor) -> list[Tensor]:
        return self.network.encoder(x_BCDHW)


class UNetLayout(ForeignLayout):
    """U-Nets of nnssl and nnU-Net. ``block`` matches a stage's convolutions; argument ``depth`` counts them."""

    head = "decoder.seg_layers."
    repeated = "decoder.encoder."

    def __init__(self, class_name: str, block: str, first_block: str, depth: str, stem: str, first: str) -> None:
        self.class_name, self.depth, self.stem = class_name, depth, stem
        self.block = re.compile(block.format(layer=LAYER))
        self.encoder, self.first_block = "stages", first_block
        self.first = [f"{first}.{layer}" for layer in ("conv", "all_modules.0")]
        self.keys = {
            "key_to_encoder": "encoder.stages",
            "key_to_stem": stem.removesuffix("."),
            "keys_to_in_proj": self.first,
            "key_to_lpe": None,
        }

    def renaming(self, encoder: str, stem: str | None) -> dict[str, str]:
        root = encoder.rpartition(".")[0]
        above = f"{root}." if root else ""
        own_stem = stem if stem and self.class_name == RESENC else f"{above}stem"
        beside = root.rpartition(".")[0]
        decoder = f"{beside}.decoder." if beside else "decoder."
        parts = {f"{encoder}.": "encoder.stages.", f"{own_stem}.": "encoder.stem."}
        return parts | {f"{decoder}{part}.": f"decoder.{part}." for part in ("stages", "transpconvs", "seg_layers")}

    def needs_conversion(self, class_name: str) -> bool:
        """Return True unless the plan is reliable: stock trainers may overrule it, and ResEncL has no arguments."""
        known = family_of_class(class_name)
        return "." not in class_name or not (known is None or isinstance(known, UNetFamily))

    def convert(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor], stated: Stated) -> Converted:
        repaired, changed = replace_stale_copies(weights)
        notes = []
        if changed:
            notes.append(
                f"{changed} tensors were untrained copies of sparse pretraining and were replaced by the trained"
            )
        architecture, more = self._architecture(repaired, stated)
        notes += more
        num_axes = len(architecture["arch_kwargs"]["kernel_sizes"][0])
        seen = stated.patch_size or stated.recommended_patch
        if seen is None:
            edge = PUBLISHED_PATCH[num_axes]
            seen = (edge,) * num_axes
            notes.append(f"patch: {edge} voxels along each axis, as published; the file does not say")
        return Converted(repaired, architecture, seen, dict(others), notes)

    def nnssl_architecture(self, architecture: Mapping[str, Any]) -> NnsslName:
        kwargs = dict(architecture["arch_kwargs"])
        if self.class_name == RESENC and _is_resenc_l(kwargs):
            return "ResEncL", None, None
        return self.class_name.rpartition(".")[2], kwargs, list(architecture["_kw_requires_import"])

    def _architecture(self, weights: Mapping[str, Tensor], stated: Stated) -> tuple[dict[str, Any], list[str]]:
        """Infer depth, widths and kernels from tensor shapes; take the rest from the file or nnU-Net's defaults."""
        layers = _collect_layers(self.block, weights)
        num_stages = 1 + max((stage for stage, _ in layers), default=0)
        missing = [stage for stage in range(num_stages) if (stage, 0) not in layers]
        if missing:
            raise MFMError(
                "E_MODEL_MISMATCH",
                f"stage {missing[0]} of its U-Net has no first convolution among the weights: the encoder is "
                "incomplete, or of an unknown network.",
            )
        first = [layers[stage, 0] for stage in range(num_stages)]
        num_axes = first[0].ndim - 2
        strides, notes = _find_strides(num_stages, num_axes, weights, stated.arch_kwargs)
        kwargs = {
            "n_stages": num_stages,
            "features_per_stage": [int(weight.shape[0]) for weight in first],
            "conv_op": f"torch.nn.modules.conv.Conv{num_axes}d",
            "kernel_sizes": [[int(size) for size in weight.shape[2:]] for weight in first],
            "strides": strides,
            self.depth: [sum(stage == wanted for stage, _ in layers) for wanted in range(num_stages)],
            "n_conv_per_stage_decoder": _decoder_depths(num_stages, weights),
            "conv_bias": any(f"{name}.bias" in weights for name in self.first),
        }
        if not {"norm_op", "nonlin"} <= set(stated.arch_kwargs) and stated.class_name != "ResEncL":
            notes.append("norms and activations: InstanceNorm and LeakyReLU, as nnU-Net's; the file does not say")
        kwargs |= {key: stated.arch_kwargs.get(key, value) for key, value in between_convolutions(num_axes).items()}
        return {
            "network_class_name": self.class_name,
            "arch_kwargs": kwargs,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }, notes


class UNetFamily(NetworkFamily):
    """All U-Nets. They are sized by nnU-Net's own planner."""

    name = "resenc"
    title = "ResEnc U-Net"
    classes = (PLAIN, RESENC, f"{_DNA}.unet.ResidualUNet", OLD_RESENC)
    encoder = ("encoder.", "decoder.encoder.")
    decoder = ("decoder.",)
    head = ("decoder.seg_layers.",)
    rates: ClassVar = {"sgd": (1e-2, 1e-3), "adamw": (3e-4, 1e-4)}
    has_sparse_encoder = True
    is_sized_by_nnunet = True
    fewest_cells = 2
    """Instance normalisation is undefined if the coarsest map has one voxel."""
    layouts = (
        UNetLayout(
            RESENC,
            block=r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.{layer}\.weight",
            first_block=r"0\.blocks\.0\.conv1\.",
            depth="n_blocks_per_stage",
            stem="encoder.stem.",
            first="encoder.stem.convs.0",
        ),
        UNetLayout(
            PLAIN,
            block=r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.{layer}\.weight",
            first_block=r"0\.0\.convs\.0\.",
            depth="n_conv_per_stage",
            stem="encoder.stages.0.",
            first="encoder.stages.0.0.convs.0",
        ),
    )

    def plans_name(self, variant: str) -> str:
        return "mfmPlans"

    def steps(self, kwargs: Mapping[str, Any], num_axes: int) -> list[int] | None:
        rows = [[stride] * num_axes if isinstance(stride, int) else stride for stride in kwargs.get("strides", ())]
        return [math.prod(along_axis) for along_axis in zip(*rows)] or None

    def patch_problem(self, kwargs: Mapping[str, Any], patch_size: Sequence[int]) -> str:
        convolution = kwargs.get("conv_op")
        if kwargs.get("n_stages") == 1:
            return "the network has one stage, and a U-Net needs two"
        if isinstance(convolution, str) and not convolution.endswith(f"Conv{len(patch_size)}d"):
            return f"the network's layers are {convolution.rpartition('.')[2]}"
        return super().patch_problem(kwargs, patch_size)

    def defaults(self, is_cpu: bool) -> TrainingDefaults:
        """Return nnU-Net's SGD, or AdamW for short CPU schedules.

        SGD with momentum 0.99 predicts only background for the first half of a thousand steps.
        """
        if is_cpu:
            reason = "gets further than SGD in a short schedule"
            return TrainingDefaults("adamw", 1e-3, 1e-2, 12.0, reason, deep_supervision=True)
        return TrainingDefaults("sgd", 1e-2, 3e-5, 12.0, "as nnU-Net trains ResEnc", deep_supervision=True)

    def describe(self, architecture: Mapping[str, Any]) -> str:
        kwargs = architecture["arch_kwargs"]
        features, kind = kwargs["features_per_stage"], architecture["network_class_name"].rpartition(".")[2]
        return f"{TITLES.get(kind, kind)}, {kwargs['n_stages']} stages, {features[0]} to {features[-1]} features"

    def reason(self, architecture: Mapping[str, Any], memory_gb: float | None) -> str:
        widths = "small widths for the CPU" if memory_gb is None else "its own widths"
        if memory_gb is not None and architecture["arch_kwargs"]["features_per_stage"][0] < STANDARD_WIDTH:
            widths = "small widths for a small budget"
        return f"nnU-Net's topology for this patch, {widths}"

    def takes_deep_supervision(self, class_name: str) -> bool:
        return True

    def has_pyramid(self, kwargs: Mapping[str, Any]) -> bool:
        # With two stages there is one output, whose loss weight nnU-Net sets to zero, so normalising it gives 0 / 0.
        return len(kwargs.get("strides", ())) > 2

    def set_deep_supervision(self, network: Any, enabled: bool) -> None:
        network.decoder.deep_supervision = enabled

    def unused_outputs(self, network: Any) -> list[nn.Parameter]:
        decoder = network.decoder
        return [] if decoder.deep_supervision else list(decoder.seg_layers[:-1].parameters())

    def layer_decay_problem(self) -> str:
        return NO_CHAIN

    def backbone(self, network: nn.Module, patch_size: tuple[int, ...], restoring: Restoring) -> AbstractBackbone:
        return UNetBackbone(network, patch_size)

    def source_renaming(self, network: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[str], str]:
        """Match decoder levels from full resolution down; nnU-Net numbers them from the deepest up."""
        deeper = _num_stages(weights) - _num_stages(network.state_dict())
        level = re.compile(r"^(decoder\.(?:stages|transpconvs)\.)(\d+)\.")
        return lambda name: level.sub(lambda match: f"{match[1]}{int(match[2]) + deeper}.", name)

    def layout(self, class_name: str) -> ForeignLayout | None:
        return super().layout(RESENC if class_name == OLD_RESENC else class_name)

    def loading_code(self, architecture: Mapping[str, Any], num_axes: int) -> tuple[str, str] | None:
        is_known = architecture["network_class_name"] in (RESENC, OLD_RESENC, PLAIN)
        return (LOADING_CODE, "") if is_known else None


def between_convolutions(num_axes: int) -> dict[str, Any]:
    """Return nnU-Net's norm, dropout and activation as U-Net arguments."""
    return {
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{num_axes}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def replace_stale_copies(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Replace each ``conv`` and ``norm`` by its trained copy in ``all_modules``; also return how many differed.

    A block registers its layers under both names. The published sparse pretraining (S3D) converts each name separately,
    so only ``all_modules`` is trained and the other keeps its initial weights.
    """
    repaired, changed = dict(weights), 0
    for name in weights:
        head, _, kind = name.rpartition(".")
        block, _, layer = head.rpartition(".")
        twin = f"{block}.{TRAINED_COPY[layer]}.{kind}" if layer in TRAINED_COPY else ""
        if twin in weights:
            changed += not torch.equal(weights[name], weights[twin])
            repaired[name] = weights[twin]
    return repaired, changed


def _collect_layers(pattern: re.Pattern[str], weights: Mapping[str, Tensor]) -> dict[tuple[int, int], Tensor]:
    found = ((pattern.fullmatch(name), tensor) for name, tensor in weights.items())
    return {(int(match[1]), int(match[2])): tensor for match, tensor in found if match}


def _decoder_depths(num_stages: int, weights: Mapping[str, Tensor]) -> list[int]:
    layers = _collect_layers(re.compile(rf"decoder\.stages\.(\d+)\.convs\.(\d+)\.{LAYER}\.weight"), weights)
    return [max(1, sum(stage == wanted for stage, _ in layers)) for wanted in range(num_stages - 1)]


def _find_strides(
    num_stages: int, num_axes: int, weights: Mapping[str, Tensor], stated: Mapping[str, Any]
) -> tuple[list[list[int]], list[str]]:
    """Return the encoder's strides, from the decoder's upsampling, else the file's plan, else 2; also notes."""
    ups = [weights.get(f"decoder.transpconvs.{i}.weight") for i in range(num_stages - 1)]
    if all(up is not None for up in ups):
        return [[1] * num_axes] + [[int(size) for size in up.shape[2:]] for up in reversed(ups) if up is not None], []
    if len(rows := stated.get("strides") or ()) == num_stages:
        return [[stride] * num_axes if isinstance(stride, int) else list(stride) for stride in rows], []
    halving = [[1] * num_axes] + [[2] * num_axes] * (num_stages - 1)
    return halving, ["strides: 2 along each axis in all stages but the first, as in ResEnc-L; the file does not say"]


def _num_stages(weights: Mapping[str, Any]) -> int:
    matches = (re.match(r"encoder\.stages\.(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _is_resenc_l(kwargs: Mapping[str, Any]) -> bool:
    """Return whether the name ResEncL alone reproduces this network, including norms and activations."""
    rows = {
        key: [[item] * 3 if isinstance(item, int) else list(item) for item in kwargs[key]]
        if key in ("strides", "kernel_sizes")
        else list(kwargs[key])
        for key in RESENC_L
    }
    between = {**between_convolutions(3), "conv_bias": True}
    return rows == RESENC_L and all(
        str(kwargs.get(key)).rpartition(".")[2] == str(value).rpartition(".")[2] for key, value in between.items()
    )
