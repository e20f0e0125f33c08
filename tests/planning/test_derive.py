"""Tables of inputs and outputs of the pure functions behind a plan."""

from __future__ import annotations

from typing import Any

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.plan import Configuration
from mfm_nnunet.planning import derive
from tests.builders import tiny
from tests.builders.architectures import resenc


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


def test_budgets_and_where_they_come_from() -> None:
    assert [str(derive.choose_budget(*memory)) for memory in ((8, 24), (None, 24), (None, None))] == [
        *("8 GB", "24 GB", "CPU preset")
    ]
    assert "--memory-gb" in derive.choose_budget(8, 24).reason
    assert "GPU" in derive.choose_budget(None, 24).reason


@pytest.mark.parametrize(
    ("name", "mode", "is_like", "changes", "words"),
    [
        ("3d_fullres", "median", False, {}, "median of 7 cases"),
        ("3d_fullres", "onemm", False, {}, "one millimetre"),
        ("3d_fullres", (1.0, 1.0, 1.0), False, {}, "as asked for"),
        ("3d_lowres", "median", False, {}, "coarser"),
        ("3d_fullres", "median", True, {}, "checkpoint"),
        ("3d_fullres", "original", False, {"resampling_fn_data": "no_resampling_hack"}, "not resampled"),
    ],
)
def test_reasons_of_spacings(name: str, mode: Any, is_like: bool, changes: dict[str, Any], words: str) -> None:
    own = Configuration(name, {**tiny.configuration(resenc()), **changes})
    assert words in derive.explain_spacing(own, mode, 7, is_like)
