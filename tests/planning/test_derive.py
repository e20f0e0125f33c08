"""Tables of inputs and outputs of the pure functions behind a plan."""

from __future__ import annotations

import math
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


def fake_memory(size: str, patch: tuple[int, ...], batch: int) -> int:
    """Bytes that grow with the network, the patch and the batch, as the real ones do."""
    weights = {"CPU": 1, "S": 10, "B": 40, "M": 60, "L": 130}[size]
    return weights * 10_000 + weights * math.prod(patch) * batch // 100


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


def test_padding_gives_at_least_one_multiple() -> None:
    assert [derive.pad_to_multiple(size, 8) for size in (0.4, 1, 8, 8.5, 17)] == [8, 8, 8, 16, 24]


@pytest.mark.parametrize(
    ("shape", "spacing", "max_voxels", "expected"),
    [
        ((36, 50, 35), (1, 1, 1), 129_024, (40, 56, 40)),  # the whole image
        ((155, 240, 200), (1, 1, 1), 160**3, (160, 160, 160)),
        ((60, 400, 400), (5, 1, 1), 64**3, (16, 120, 120)),  # as cubic in mm as tokens allow
        ((500, 500), (1, 1), 192 * 192, (192, 192)),
        ((3, 3, 3), (1, 1, 1), 10**6, (8, 8, 8)),
        ((900, 900, 900), (1, 1, 1), 100, (8, 8, 8)),  # never less than a token
    ],
)
def test_token_patches(
    shape: tuple[int, ...], spacing: tuple[float, ...], max_voxels: int, expected: tuple[int, ...]
) -> None:
    patch = derive.token_patch(shape, spacing, max_voxels)
    assert all(edge % 8 == 0 for edge in patch)
    assert patch == expected


@pytest.mark.parametrize(
    ("budget", "size", "is_whole"),
    [
        (1e9, "L", True),
        (2.6e6, "L", True),
        (2.5e6, "M", True),
        (1.1e6, "B", True),
        (2.1e5, "S", True),
        (1.8e5, "S", False),  # a smaller patch before a smaller network
        (1.5e5, "CPU", True),
        (1.5e4, "CPU", False),
    ],
)
def test_the_largest_primus_that_fits(budget: float, size: str, is_whole: bool) -> None:
    shape = (64, 80, 96)
    found, patch, batch = derive.size_primus(shape, (1, 1, 1), budget, fake_memory)
    assert found == size
    assert (patch == shape) == is_whole
    assert fake_memory(found, patch, batch) <= budget < fake_memory(found, patch, batch + 1)
    if not is_whole:  # it is no smaller than it must be
        assert budget < fake_memory(found, patch, 2) * 1.1


def test_a_budget_below_every_primus_is_refused_with_what_is_needed() -> None:
    needed = fake_memory("CPU", (32, 32, 32), 2)
    with pytest.raises(MFMError, match=r"patch 32 x 32 x 32") as caught:
        derive.size_primus((64, 80, 96), (1, 1, 1), needed - 1, fake_memory)
    assert caught.value.code == "E_CONFIG"
    assert derive.size_primus((64, 80, 96), (1, 1, 1), needed, fake_memory)[1] == (32, 32, 32)


def test_the_cpu_primus_takes_small_pictures_several_at_a_time() -> None:
    assert derive.cpu_primus((36, 50, 35), (1, 1, 1)) == ("CPU", (40, 56, 40), 2)
    assert derive.cpu_primus((50, 35), (1, 1)) == ("CPU", (56, 40), 16)
    assert derive.cpu_primus((512, 512), (1, 1)) == ("CPU", (192, 192), 4)


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
