"""Every part of a plan with values that it cannot have; the fault is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from mfm_nnunet.plan_rules import network_problem, plan_problem
from tests.builders import tiny
from tests.builders.architectures import primus, resenc

NAN, INFINITY = float("nan"), float("inf")
ESCAPES = ["../../x", "a/b", "..", ".", "", "a\0", "a\nb", None, 3, True, ["x"], {"a": 1}, "x" * 500, "\udcfc"]
WRONG_KINDS = [None, True, "abc", {"a": 1}, [None], [[1, 2, 3]], ["1", "1", "1"], [NAN, 1, 1], [INFINITY, 1, 1], NAN]
NO_NAMES = ["join", "os", "ABC", "", None, 3, ["LabelManager"], {"a": 1}, "Label\u202eManager"]
FULLRES = "configurations.3d_fullres"
ARCHITECTURE = f"{FULLRES}.architecture"
ARGUMENTS = f"{ARCHITECTURE}.arch_kwargs"
PARTS = ("data", "seg", "probabilities")


def changed(place: str, value: Any) -> dict[str, Any]:
    plans = copy.deepcopy(tiny.plans())
    *folders, key = place.split(".")
    target: Any = plans
    for folder in folders:
        target = target[folder]
    target[key] = value
    return plans


def cases() -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [
        *((key, value) for key in ("dataset_name", "plans_name", f"{FULLRES}.data_identifier") for value in ESCAPES),
        *(("experiment_planner_used", value) for value in ESCAPES if value not in (None, "")),
        *(("image_reader_writer", value) for value in NO_NAMES),
        *(("label_manager", value) for value in NO_NAMES if value is not None),
        *((f"{FULLRES}.resampling_fn_{part}", value) for part in PARTS for value in NO_NAMES),
        *((f"{FULLRES}.normalization_schemes", [value]) for value in NO_NAMES),
        *((f"{FULLRES}.{key}", value) for key in ("patch_size", "use_mask_for_norm") for value in WRONG_KINDS),
        *((f"{FULLRES}.spacing", value) for value in WRONG_KINDS if value is not None),
        *((key, value) for key in ("transpose_forward", "transpose_backward") for value in WRONG_KINDS),
        *((f"{FULLRES}.resampling_fn_data_kwargs", value) for value in (None, [1], {"cutoff": 3}, {"order": 9})),
        *((f"{FULLRES}.resampling_fn_data_kwargs", {"is_seg": value}) for value in (None, 1, "yes", [True])),
        *((f"{FULLRES}.batch_size", value) for value in (0, -1, 1.5, True, "2", None, NAN, 10**9, 10**30)),
        *((f"{FULLRES}.batch_dice", value) for value in (1, "yes", None)),
        *((f"{FULLRES}.{key}", ["../x"]) for key in ("previous_stage", "next_stage")),
        *((f"{FULLRES}.inherits_from", value) for value in (["2d"], 3, "nothing", "3d_fullres")),
        *((ARCHITECTURE, value) for value in (None, [], "ResEncL", {"network_class_name": "x"})),
        *((f"{ARCHITECTURE}._kw_requires_import", value) for value in ("conv_op", [3], [["conv_op"]], {"a": 1})),
        *((f"{ARGUMENTS}.features_per_stage", [value, 8, 8]) for value in (10**9, NAN, -(10**9))),
        *((f"{ARGUMENTS}.n_stages", value) for value in (10**9, INFINITY)),
        *((f"{ARGUMENTS}.strides", value) for value in (0, [0, 2], [[1, 1]], "ab", [[2, 2, "2"]])),
        (f"{FULLRES}.patch_size", [10**9, 16, 16]),
        (f"{FULLRES}.patch_size", [10**4, 10**4, 10**4]),
        (f"{FULLRES}.patch_size", [0, 16, 16]),
        *((f"{FULLRES}.spacing", value) for value in ([1e-9, 1, 1], [1, 1, 1e9], [0, 1, 1], [-1, 1, 1], [1, 1])),
        *(("configurations", value) for value in ([], "x", None, {"../x": {}}, {"a": 3})),
        ("foreground_intensity_properties_per_channel", []),
        ("mfm", {"seed": NAN}),
    ]  # fmt: skip
    return found


@pytest.mark.parametrize("place", dict.fromkeys(place for place, _ in cases()))
def test_impossible_values(place: str) -> None:
    key = place.rpartition(".")[2]
    words = {"inherits_from": ("inherits from",), "configurations": ("configuration",)}.get(key, (key, "architecture"))
    for value in (value for other, value in cases() if other == place):
        problem = plan_problem(changed(place, value))
        problem.encode()
        assert any(word in problem for word in words), (value, problem)


def test_plans_that_are_whole() -> None:
    assert plan_problem(tiny.plans()) == network_problem(tiny.plans()) == ""
    for place, value in (
        (f"{FULLRES}.spacing", None),
        (f"{FULLRES}.spacing", [None] * 3),
        (f"{FULLRES}.spacing", (1, 1.5, 2)),
        (f"{FULLRES}.resampling_fn_data_kwargs", {"order": 3, "force_separate_z": None}),
        (f"{FULLRES}.previous_stage", "3d_lowres"),
        (f"{FULLRES}.next_stage", ["a", "b"]),
        (ARCHITECTURE, primus((16, 16, 16))),
        ("dataset_name", "Dataset005_Größe 2"),
        ("label_manager", None),
    ):
        assert plan_problem(changed(place, value)) == "", place


def test_ct_needs_finite_intensities() -> None:
    plans = changed(f"{FULLRES}.normalization_schemes", ["CTNormalization"])
    assert "finite" in plan_problem(plans)
    names = ("mean", "std", "percentile_00_5", "percentile_99_5")
    plans["foreground_intensity_properties_per_channel"]["0"] = {**dict.fromkeys(names, 1.0), "median": NAN}
    assert plan_problem(plans) == ""


def test_a_plan_that_is_nested_without_end() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    assert "levels deep" in plan_problem(changed("mfm", {"x": deep}))


def test_networks_that_cannot_be_built_from_the_plan() -> None:
    whole = {"network_class_name": "ResEncL", "arch_kwargs": None, "_kw_requires_import": None}
    assert plan_problem(changed(ARCHITECTURE, whole)) == ""
    plans = changed(ARCHITECTURE, {**resenc(), "arch_kwargs": None})
    assert plan_problem(plans) == ""
    assert "arch_kwargs" in network_problem(plans)
    configuration = plans["configurations"]["3d_fullres"]
    del configuration["architecture"]
    configuration["UNet_class_name"] = "PlainConvUNet"
    assert plan_problem(plans) == ""
    assert "UNet_base_num_features" in network_problem(plans)
