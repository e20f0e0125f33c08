"""Files as nnssl's trainers write them, with the networks that made them: OpenMind's ten layouts in tiny widths.

The names and fields are facts of the published format; nothing here is nnssl's code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_nnunet.models.networks import build_network
from tests.builders import architectures

FEATURES, BLOCKS, STRIDE = (4, 8, 8), (1, 2, 2), 4
EMBED, HEADS, DEPTH = 72, 12, 2
"""PrimusM has twelve heads; six channels each are the fewest that rotary positions of three axes take."""
SUBJECT = "sub-PLANTED4711"
CITATIONS = [{"type": "Pretraining Method", "name": "MAE", "apa_citations": ["Doe, J. (2022). A paper."]}]


@dataclass(frozen=True)
class Released:
    """One repository: the content of its file, and a network with the weights that it stands for."""

    content: dict[str, Any]
    network: nn.Module
    patch: tuple[int, ...]
    is_old_order: bool = False
    """Whether the tokens are flattened axis 1 outermost."""

    def write(self, folder: Path, name: str = "checkpoint_final.pth") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.content, folder / name)
        return folder / name


def unet(num_inputs: int = 1, num_outputs: int = 1, seed: int = 1) -> nn.Module:
    return _built(architectures.resenc(features=FEATURES, blocks=BLOCKS), (16, 16, 16), num_inputs, num_outputs, seed)


def primus(patch: Sequence[int] = (16, 16, 24), num_inputs: int = 1, num_outputs: int = 1, seed: int = 1) -> nn.Module:
    network = _built(primus_architecture(patch), patch, num_inputs, num_outputs, seed)
    for name, parameter in network.named_parameters():  # layer scale and biases start at values that hide mistakes
        if name.endswith((".bias", "gamma_1", "gamma_2")):
            nn.init.normal_(parameter, 0.5, 0.2)
    with torch.no_grad():
        network.eva.pos_embed.mul_(25)  # type: ignore[union-attr, operator]
        for block in network.eva.blocks:  # type: ignore[union-attr]
            block.attn.q_proj.weight.mul_(25)
            block.attn.k_proj.weight.mul_(25)
    return network


def primus_architecture(patch: Sequence[int]) -> dict[str, Any]:
    return architectures.primus(patch, EMBED, eva_depth=DEPTH, eva_numheads=HEADS)


def old_order(network: nn.Module, x_BCDHW: Tensor) -> Tensor:
    """The tokens of a Primus that flattens axis 1 outermost, as a grid (B, E, d, h, w)."""
    grid_BEdhw = network.down_projection(x_BCDHW)  # type: ignore[operator]
    turned = grid_BEdhw.transpose(2, 3)
    tokens_BTE, _ = network.eva(turned.flatten(2).transpose(1, 2))  # type: ignore[operator]
    return tokens_BTE.transpose(1, 2).reshape(turned.shape).transpose(2, 3)


def new_order(network: nn.Module, x_BCDHW: Tensor) -> Tensor:
    """The same for axis 0 outermost."""
    grid_BEdhw = network.down_projection(x_BCDHW)  # type: ignore[operator]
    tokens_BTE, _ = network.eva(grid_BEdhw.flatten(2).transpose(1, 2))  # type: ignore[operator]
    return tokens_BTE.transpose(1, 2).reshape(grid_BEdhw.shape)


def adaptation_plan(class_name: str, patch: Sequence[int], **changes: Any) -> dict[str, Any]:
    """The plan with every field, as the trainers write it."""
    is_primus = class_name.startswith("Primus")
    stem = "encoder.stem.convs.0"
    configuration = {
        "data_identifier": "nnsslPlans_onemmiso",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1},
        "spacing": (1.0, 1.0, 1.0),
        "patch_size": tuple(patch),
    }
    return {
        "architecture_plans": {
            "arch_class_name": class_name,
            "arch_kwargs": None,
            "arch_kwargs_requiring_import": None,
        },
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "plans_name": "nnsslPlans",
            "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "experiment_planner_used": "FixedResEncUNetPlanner",
            "configurations": {"onemmiso": configuration},
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": tuple(patch),
        "key_to_encoder": "eva" if is_primus else "encoder.stages",
        "key_to_stem": "down_projection" if is_primus else "encoder.stem",
        "keys_to_in_proj": ("down_projection.proj",) if is_primus else (f"{stem}.conv", f"{stem}.all_modules.0"),
        "key_to_lpe": "eva.pos_embed" if is_primus else None,
        **changes,
    }


def full(weights: dict[str, Tensor], plan: dict[str, Any] | None, trainer: str | None) -> dict[str, Any]:
    """A file as a trainer leaves it, the corpus' index with subjects included."""
    content = {
        "network_weights": weights,
        "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"train_losses": [0.5]},
        "_best_ema": None,
        "current_epoch": 1000,
        "init_args": {"plan": {}, "fold": "all", "pretrain_json": {"subjects": {SUBJECT: {"age": 71, "sex": "F"}}}},
        "trainer_name": trainer,
        "citations": CITATIONS,
    }
    if plan is not None:
        content["nnssl_adaptation_plan"] = plan
    return {key: value for key, value in content.items() if not (key == "trainer_name" and value is None)}


def training_plan(name: str, patch: Sequence[int], spacing: Any, axes: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """``plan`` and ``configuration_name`` as trainers keep them in ``init_args``: several configurations, one used."""
    of_plan = adaptation_plan("ResEncL", patch)["pretrain_plan"]
    used = {
        **of_plan["configurations"]["onemmiso"],
        "data_identifier": f"nnsslPlans_{name}",
        "spacing_style": name,
        "spacing": spacing,
        "batch_size": 8,
    }
    other = {**used, "spacing": [9.0, 9.0, 9.0], "patch_size": [64, 64, 64], "spacing_style": "other"}
    plan = {**of_plan, "transpose_forward": list(axes), "configurations": {"other": other, name: used}}
    return {"plan": plan, "configuration_name": name}


def _built(architecture: dict[str, Any], patch: Sequence[int], num_inputs: int, outputs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    plans = {"configurations": {"3d_fullres": {"patch_size": list(patch), "architecture": architecture}}}
    return build_network(plans, "3d_fullres", num_inputs, outputs).eval()


def _projector(width: int) -> dict[str, Tensor]:
    return {f"projector.layer{i}.0.{part}": torch.zeros(4, *(width,) * (part == "weight")) for i in (1, 2, 3)
            for part in ("weight", "bias")}  # fmt: skip


def _unet_file(trainer: str, num_outputs: int = 1, patch: int = 32, **changes: Any) -> Released:
    network = unet(num_outputs=num_outputs)
    content = full(network.state_dict(), adaptation_plan("ResEncL", (patch,) * 3, **changes), trainer)
    return Released(content, network, (patch,) * 3)


def _encoder_file(trainer: str, extra: dict[str, Tensor], **changes: Any) -> Released:
    """Contrastive tasks and SwinUNETR's: an encoder and heads; the plan's patch is the crop."""
    network = unet()
    weights = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("encoder.")}
    plan = adaptation_plan("ResEncL", (16, 16, 16), recommended_downstream_patchsize=[32, 32, 32], **changes)
    return Released(full({**weights, **extra}, plan, trainer), network, (16, 16, 16))


def _spark_file() -> Released:
    """S3D: no plan; the trained weights are in ``all_modules``, the other names keep what training began with."""
    network = unet()
    trained, stale = network.state_dict(), unet(seed=9).state_dict()
    weights = {
        name: (stale if (".conv." in name or ".norm." in name) and "encoder." in name else trained)[name].clone()
        for name in trained
    }
    content = full(weights, None, "SparkMAETrainer_BS8")
    content["spark_weights"] = {"mask_token": torch.zeros(1, 8, 1, 1, 1)}
    return Released(content, network, (160, 160, 160))


def _primus_file(trainer: str, is_old_order: bool, extra: dict[str, Tensor], wrapper: str = "") -> Released:
    patch = (16, 16, 24) if not wrapper else (16, 16, 16)
    network = primus(patch)
    weights = {f"{wrapper}{name}": tensor for name, tensor in network.state_dict().items() if "up_proj" not in name}
    weights |= {f"{wrapper}mask_token": torch.zeros(1, 1, EMBED), **extra}
    weights |= {f"{wrapper}up_projection.decode.0.0.weight": torch.zeros(EMBED, 24, 2, 2, 2)}
    keys = {key: f"{wrapper}{value}" for key, value in (("key_to_encoder", "eva"), ("key_to_stem", "down_projection"))}
    plan = adaptation_plan("PrimusM", patch, **keys, keys_to_in_proj=(f"{wrapper}down_projection.proj",),
                           key_to_lpe=f"{wrapper}eva.pos_embed")  # fmt: skip
    return Released(full(weights, plan, trainer), network, patch, is_old_order)


def _token_decoder() -> dict[str, Tensor]:
    return {f"decoder.{name.removeprefix('eva.')}": torch.zeros_like(tensor) for name, tensor in
            primus().state_dict().items() if name.startswith("eva.")}  # fmt: skip


OPENMIND: dict[str, Callable[[], Released]] = {
    "PrimusM-OpenMind-MAE": lambda: _primus_file("BaseEvaMAETrainer_BS8", True, _token_decoder()),
    "PrimusM-OpenMind-SimMIM": lambda: _primus_file("SimMIMEvaTrainer_BS8", False, {}),
    "PrimusM-OpenMind-MG": lambda: _primus_file("ModelGenesisEvaTrainer_BS8", True, {}),
    "ResEncL-OpenMind-MAE": lambda: _unet_file("BaseMAETrainer_BS8"),
    "ResEncL-OpenMind-S3D": _spark_file,
    "ResEncL-OpenMind-VF": lambda: _unet_file("VolumeFusionTrainer_BS8", num_outputs=5),
    "ResEncL-OpenMind-VoCo": lambda: _encoder_file("VoCoTrainer_BS8", _projector(20)),
    "ResEncL-OpenMind-MG": lambda: _unet_file("ModelGenesisTrainer_BS8"),
    "ResEncL-OpenMind-SimCLR": lambda: _encoder_file("SimCLRTrainer_BS32", _projector(20)),
    "ResEncL-OpenMind-SwinUNETR": lambda: _encoder_file(
        "SwinUNETRTrainer_BS8",
        {f"{head}_proj_head.0.weight": torch.zeros(4, 8) for head in ("rotation", "contrast", "recon")},
    ),
}
"""The ten repositories that must import, by name."""

OTHERS: dict[str, Callable[[], Released]] = {
    "PrimusM-SimCLR": lambda: _primus_file("SimCLREvaTrainer_BS32", True, _projector(EMBED), "encoder."),
    "nnFoundationCNN": lambda: without_resampling(_unet_file("BaseMAETrainer")),
}
"""Layouts beside them: a wrapped transformer of crops, and a corpus that was not resampled."""


def without_resampling(released: Released) -> Released:
    """nnFoundation's CNN: no resampling, so no spacing, and three fields only; no trainer tells the task."""
    kept = ("network_weights", "citations", "nnssl_adaptation_plan")
    content = {name: released.content[name] for name in kept}
    configurations = content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]
    changes = {"spacing": None, "spacing_style": "noresample", "data_identifier": "nnsslPlans_noresample"}
    configurations["noresample"] = {**configurations.pop("onemmiso"), **changes}
    return dataclasses.replace(released, content=content)
