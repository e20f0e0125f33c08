"""Tables of inputs and outputs of the pure functions behind a plan."""

from __future__ import annotations

from typing import Any

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.planning import derive

CONFIGURATION = {
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [8, 8, 8],
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"order": 3},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"order": 1},
}
PLANS = {
    "transpose_forward": [0, 1, 2],
    "image_reader_writer": "SimpleITKIO",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
    "plans_name": "mfmPlans",
}


@pytest.mark.parametrize(
    ("memory_gb", "name", "in_3d", "in_2d"),
    [
        (None, "CPU", 15.5e6, 7.0e6),
        (1, "small", 85e6, 16.875e6),
        (8, "standard", 680e6, 135e6),
        (16, "standard", 1390e6, 257.5e6),
        (24, "standard", 2100e6, 380e6),
        (40, "standard", 3600e6, 560e6),
        (80, "standard", 7200e6, 1120e6),
    ],
)
def test_resenc_presets(memory_gb: float | None, name: str, in_3d: float, in_2d: float) -> None:
    preset = derive.resenc_preset(memory_gb)
    assert preset.name == name
    assert preset.reference == pytest.approx({3: in_3d, 2: in_2d})
    assert preset.base_features == (32 if name == "standard" else 16)


@pytest.mark.parametrize(
    ("network", "is_cpu", "rate", "epochs"),
    [
        ("resenc", False, None, 1000),
        ("resenc", True, 1e-3, 20),
        ("primus", False, None, 1000),
        ("primus", True, 1e-3, 20),
    ],
)
def test_schedules_by_family(network: str, is_cpu: bool, rate: float | None, epochs: int) -> None:
    pretrain, finetune = derive.settings_for(network, is_cpu, 6)
    assert (finetune.learning_rate, finetune.epochs, pretrain.epochs) == (rate, epochs, epochs)
    assert pretrain.learning_rate == (1e-3 if is_cpu else 3e-4 if network == "primus" else 1e-2)
    assert pretrain.optimizer == finetune.optimizer == ("adamw" if network == "primus" or is_cpu else "sgd")
    assert pretrain.batch_size == 6
    assert finetune.deep_supervision == (network == "resenc")


STOCK: dict[str, dict[str, Any]] = {
    "2d": {},
    "3d_lowres": {"next_stage": "3d_cascade_fullres"},
    "3d_fullres": {"patch_size": [1]},
    "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
}


def test_wanted_configurations_come_with_what_they_need() -> None:
    assert derive.select_configurations(STOCK, None) == STOCK
    assert set(derive.select_configurations(STOCK, ("2d",))) == {"2d"}
    cascade = derive.select_configurations(STOCK, ("3d_cascade_fullres",))
    assert list(cascade) == ["3d_lowres", "3d_fullres", "3d_cascade_fullres"]
    assert cascade["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    assert derive.select_configurations(STOCK, ("3d_lowres",)) == {"3d_lowres": {}}
    assert "next_stage" in STOCK["3d_lowres"]
    with pytest.raises(MFMError, match="Did you mean '2d'"):
        derive.select_configurations(STOCK, ("2D",))


def test_changed_keys_are_dotted_names() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "d": 1, "gone": None}
    assert derive.changed_keys(old, old) == []
    assert derive.changed_keys(old, {"a": {"b": 1, "c": [1, 3]}, "d": 1, "new": 0}) == ["a.c", "gone", "new"]
    assert derive.changed_keys({"a": 1}, {"a": {"b": 1}}) == ["a"]
