"""Our checkpoint in nnssl's layout, which nnU-Net's development code reads: a folder as its hub repositories are.

The reader selects tensors by the beginning of their names and takes the first configuration of the plan, wants every
field to be there, and lists of plain numbers. Our own key, ``mfm``, stays in the file; readers tolerate it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import shown
from mfm_nnunet.interchange import nnssl
from mfm_nnunet.interchange.architecture import PRIMUS, UNETS, between_convolutions
from mfm_nnunet.interchange.card import CARD, model_card
from mfm_nnunet.interchange.verify import with_all_names
from mfm_nnunet.models.primus import PRIMUS_SIZES
from mfm_nnunet.plan import is_resampled, resolved

TRAINER = "mfm_nnunet"
"""No trainer of nnssl: readers must not guess a token order from it."""
RESENC_L = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_conv_per_stage_decoder": [1] * 5,
}
_PRIMUS = {"version": 1, "init_values": 0.1, "scale_attn_inner": True}
"""What else the names of Primus stand for."""


def write_nnssl(content: Mapping[str, Any], folder: Path) -> None:
    """Write ``checkpoint_final.pth``, ``adaptation_plan.json``, ``config.json`` and a model card into ``folder``.

    Raises MFMError: E_EXISTS when the folder holds anything, E_CONFIG for a network that the layout cannot express.
    """
    mfm = content["mfm"]
    plan = adaptation_plan(mfm)
    if folder.exists() and any(folder.iterdir()):
        raise MFMError("E_EXISTS", f"{folder}: the folder is not empty. Choose another.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = checkpoint.cpu_weights(with_all_names(content))  # readers load strictly
    num_parameters = sum({id(tensor): tensor.numel() for tensor in weights.values()}.values())
    file = {
        "network_weights": weights,
        nnssl.KEY: plan,
        "trainer_name": TRAINER,
        "citations": list(mfm.get("citations") or []),
        "mfm": mfm,
    }
    texts = {
        "adaptation_plan.json": json.dumps({**plan, "trainer_name": TRAINER}, indent=1),
        "config.json": json.dumps({"mfm": mfm}, indent=1),
        CARD: model_card(mfm, num_parameters, "nnssl"),
    }
    for name, text in texts.items():
        with checkpoint.atomic_write(folder / name) as handle:
            handle.write(shown(text).encode())
    checkpoint.save(file, folder / "checkpoint_final.pth")


def adaptation_plan(mfm: Mapping[str, Any]) -> dict[str, Any]:
    """``nnssl_adaptation_plan`` of a checkpoint with this description.

    Raises MFMError (E_CONFIG) for 2D networks, second stages of a cascade, Primus of other sizes than S, B, M and L,
    with other tokens than 8 voxels or with a convolutional stem, and classes that the layout has no name for.
    """
    plans = mfm["plans"]
    configuration = resolved(plans, mfm["configuration"])
    if len(configuration["patch_size"]) != 3:
        raise _cannot("2D networks")
    if configuration.get("previous_stage"):
        raise _cannot("a cascade's second stage, whose stem takes labels beside the image")
    class_name, kwargs, to_import = _architecture(configuration["architecture"])
    spacing = [float(value) for value in configuration["spacing"]] if is_resampled(configuration) else None
    pretrain = {
        "data_identifier": "foreign",
        "preprocessor_name": configuration.get("preprocessor_name", "DefaultPreprocessor"),
        "spacing_style": "noresample" if spacing is None else "onemmiso" if set(spacing) == {1.0} else "median",
        "normalization_schemes": list(configuration["normalization_schemes"]),
        "use_mask_for_norm": list(configuration["use_mask_for_norm"]),
        "resampling_fn_data": configuration["resampling_fn_data"],
        "resampling_fn_data_kwargs": dict(configuration["resampling_fn_data_kwargs"]),
        "resampling_fn_mask": configuration["resampling_fn_seg"],
        "resampling_fn_mask_kwargs": dict(configuration["resampling_fn_seg_kwargs"]),
        "spacing": spacing,
        "patch_size": list(mfm["patch_size"]),
    }
    return {
        "architecture_plans": {
            "arch_class_name": class_name,
            "arch_kwargs": kwargs,
            "arch_kwargs_requiring_import": to_import,
        },
        "pretrain_plan": {
            "dataset_name": plans["dataset_name"],
            "plans_name": plans["plans_name"],
            "original_median_spacing_after_transp": plans.get("original_median_spacing_after_transp"),
            "image_reader_writer": plans["image_reader_writer"],
            "transpose_forward": list(plans["transpose_forward"]),
            "transpose_backward": list(plans["transpose_backward"]),
            "experiment_planner_used": "MFMPlanner",
            "configurations": {pretrain["spacing_style"]: pretrain},
        },
        "pretrain_num_input_channels": int(mfm["num_inputs"]),
        "recommended_downstream_patchsize": list(configuration["patch_size"]),
        "pretrain_patch_size": list(mfm["patch_size"]),
        **_keys(class_name),
    }


def _keys(class_name: str) -> dict[str, Any]:
    """Where encoder, stem, first convolution and positions are: each reader's network has the same words for them.

    Readers strip these of the file and load what remains, strictly, where their own words point.
    """
    if class_name.startswith("Primus"):
        encoder, stem, first, positions = "eva", "down_projection", ["down_projection.proj"], "eva.pos_embed"
    else:
        encoder, positions = "encoder.stages", None
        is_plain = class_name == _short(UNETS["plain"])
        stem, block = ("encoder.stages.0", "0.convs.0") if is_plain else ("encoder.stem", "convs.0")
        first = [f"{stem}.{block}.{layer}" for layer in ("conv", "all_modules.0")]
    return {"key_to_encoder": encoder, "key_to_stem": stem, "keys_to_in_proj": first, "key_to_lpe": positions}


def _architecture(architecture: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None, list[str] | None]:
    """Class, arguments and which of them name classes, as the layout says it; named networks have no arguments."""
    kwargs = dict(architecture["arch_kwargs"])
    class_name = architecture["network_class_name"]
    if class_name == PRIMUS:
        sizes = {name: size for name, size in PRIMUS_SIZES.items() if name != "CPU"}
        wanted = {key: kwargs[key] for key in ("embed_dim", "eva_depth", "eva_numheads")}
        size = next((name for name, values in sizes.items() if values == wanted), None)
        others = {key: kwargs.get(key, value) for key, value in _PRIMUS.items()}
        if others["init_values"] is not None:  # what the layer scale started from is in no weights
            others["init_values"] = _PRIMUS["init_values"]
        if size is None or list(kwargs["patch_embed_size"]) != [8, 8, 8] or others != _PRIMUS:
            raise _cannot(f"a Primus with {wanted | others}, tokens {kwargs['patch_embed_size']}")
        return f"Primus{size}", None, None
    if class_name.endswith(".residual_unet.ResidualEncoderUNet"):  # the module's old name
        class_name = UNETS["resenc"]
    if class_name not in UNETS.values():
        raise _cannot(class_name)
    if class_name == UNETS["resenc"] and _is_resenc_l(kwargs):
        return "ResEncL", None, None
    return _short(class_name), kwargs, list(architecture["_kw_requires_import"])


def _short(class_name: str) -> str:
    """The name without its module: nnssl knows no other, and nnU-Net's development code takes both."""
    return class_name.rpartition(".")[2]


def _is_resenc_l(kwargs: Mapping[str, Any]) -> bool:
    """Whether a U-Net is the one that the name stands for: readers build norms and activations from the name too."""
    between = {**between_convolutions(3), "conv_bias": True}
    return all(_listed(key, kwargs) == value for key, value in RESENC_L.items()) and all(
        str(kwargs.get(key)).rpartition(".")[2] == str(value).rpartition(".")[2] for key, value in between.items()
    )


def _listed(key: str, kwargs: Mapping[str, Any]) -> list[Any]:
    """An argument of a 3D U-Net; strides and kernels of a stage may be single numbers in a plan."""
    if key not in ("strides", "kernel_sizes"):
        return list(kwargs[key])
    return [[item] * 3 if isinstance(item, int) else list(item) for item in kwargs[key]]


def _cannot(what: str) -> MFMError:
    return MFMError(
        "E_CONFIG",
        f"nnssl's layout cannot express {what}: it has 3D ResEnc and plain U-Nets and Primus S, B, M and L, of "
        "images alone. Export as a folder of safetensors, which mfm_nnunet reads.",
    )
