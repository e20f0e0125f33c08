"""Write a checkpoint in nnssl's layout, as a folder like those on its hub. nnU-Net's development code reads it.

The reader selects tensors by prefix, takes the first configuration of the plan, and requires every field and lists of
plain numbers. Our own key ``mfm`` stays in the file; readers ignore it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import atomic_write
from mfm_nnunet.interchange import nnssl
from mfm_nnunet.interchange.folder import CARD, model_card
from mfm_nnunet.interchange.verify import with_all_names
from mfm_nnunet.models.families import family_of_class
from mfm_nnunet.plan import Plan

TRAINER = "mfm_nnunet"
"""Not a trainer of nnssl, so that readers do not guess a token order from it."""


def write_nnssl(content: Mapping[str, Any], folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write ``checkpoint_final.pth``, its plan and ``config.json``, pictures and a model card into ``folder``."""
    mfm = content["mfm"]
    plan = adaptation_plan(mfm)
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
    files = {
        "adaptation_plan.json": json.dumps({**plan, "trainer_name": TRAINER}, indent=1).encode(),
        "config.json": json.dumps({"mfm": mfm}, indent=1).encode(),
        CARD: model_card(mfm, num_parameters, "nnssl", pictures).encode(),
        **pictures,
    }
    for name, data in files.items():
        with atomic_write(folder / name) as handle:
            handle.write(data)
    checkpoint.save(file, folder / "checkpoint_final.pth")


def adaptation_plan(mfm: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``nnssl_adaptation_plan`` for a checkpoint with the description ``mfm``.

    Raises MFMError (E_CONFIG) for what the layout cannot express: 2D networks, second stages of a cascade, Primus
    other than S, B, M and L with tokens of 8 voxels and no convolutional stem, and unknown classes.
    """
    plans = mfm["plans"]
    own = Plan.of(plans).configuration(mfm["configuration"])
    configuration = own.values
    if len(configuration["patch_size"]) != 3:
        raise _cannot("2D networks")
    if configuration.get("previous_stage"):
        raise _cannot("the second stage of a cascade")
    architecture = configuration["architecture"]
    family = family_of_class(architecture["network_class_name"])
    layout = family.layout(architecture["network_class_name"]) if family else None
    if layout is None:
        raise _cannot(architecture["network_class_name"])
    named = layout.nnssl_architecture(architecture)
    if isinstance(named, str):
        raise _cannot(named)
    class_name, kwargs, to_import = named
    spacing = [float(value) for value in own.spacing] if own.is_resampled and own.spacing else None
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
        **layout.keys,
    }


def _cannot(what: str) -> MFMError:
    return MFMError(
        "E_CONFIG",
        f"nnssl's layout cannot store {what}, only 3D ResEnc and plain U-Nets, and Primus S, B, M and L. "
        "Export as a folder of safetensors instead (--layout folder).",
    )
