"""Plans: what they inherit, what may leave the computer, and which two preprocess and predict alike."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.errors import MFMError
from mfm_nnunet.plan import Plan
from mfm_nnunet.settings import MFMBlock
from tests.builders import tiny

FULLRES = "3d_fullres"
INTENSITIES = "foreground_intensity_properties_per_channel"
LABELS = DatasetJson.of(
    {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
)
REGIONS = DatasetJson.of(
    {
        "channel_names": {"0": "CT"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2], "file_ending": ".nii.gz", "dataset": {"a": {}},
    }
)  # fmt: skip
CT = {"normalization_schemes": ["CTNormalization"]}


def plan(of_plan: dict[str, Any] | None = None, **of_configuration: Any) -> Plan:
    content = copy.deepcopy(tiny.plans())
    content["configurations"][FULLRES].update(of_configuration)
    return Plan.of({**content, **(of_plan or {})})


def cascade() -> Plan:
    low = {"inherits_from": FULLRES, "spacing": [3, 3, 3], "next_stage": "2d", "data_identifier": "x"}
    return Plan.of(tiny.plans(low=low, high={"inherits_from": "low", "previous_stage": "low", "spacing": None}))


def test_a_configuration_has_what_it_inherits_and_is_a_copy() -> None:
    own = cascade()
    high = own.configuration("high")
    assert (high.previous_stage, high.spacing, high.is_resampled) == ("low", None, False)
    assert (high.patch_size, high.batch_size, high.num_channels) == ((16, 16, 16), 2, 1)
    low = own.configuration("low")
    assert (low.spacing, low.data_identifier, low.is_resampled) == ((3, 3, 3), "x", True)
    high.values["patch_size"].append(2)
    assert own.configuration(FULLRES).patch_size == (16, 16, 16)


def test_spacings_without_lengths_and_no_resampling_function() -> None:
    assert plan(spacing=[None] * 3).configuration(FULLRES).spacing is None
    assert not plan(resampling_fn_data="no_resampling_hack").configuration(FULLRES).is_resampled


def test_unknown_configurations_are_refused_with_the_nearest() -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*mfmPlans.*Did you mean '3d_fullres'"):
        plan().configuration("3d_fulres")
    with pytest.raises(MFMError, match=r"E_CONFIG.*'gone'"):
        plan(inherits_from="gone").configuration(FULLRES)


def test_files_are_read_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "mfmPlans.json"
    file.write_text(json.dumps(tiny.plans(block=MFMBlock(seed=3, network="primus"))))
    own = Plan.read(file, "")
    assert (own.name, own.dataset_name, own.mfm.seed, own.family) == ("mfmPlans", tiny.NAME, 3, "primus")
    for content in ({**tiny.plans(), "image_reader_writer": "os"}, {}):
        file.write_text(json.dumps(content))
        with pytest.raises(MFMError, match=r"E_MODEL_CORRUPT.*mfmPlans\.json.*Copy it again\."):
            Plan.read(file, "Copy it again.", "E_MODEL_CORRUPT")


def test_a_stock_plan_has_the_default_block() -> None:
    assert plan().mfm == MFMBlock()
    with pytest.raises(MFMError, match="E_CONFIG"):
        _ = plan({"mfm": {"format": 99}}).mfm


def test_other_preprocessors_are_named() -> None:
    assert plan().configuration(FULLRES).preprocessor_problem == ""
    assert "'Mine'" in plan(preprocessor_name="Mine").configuration(FULLRES).preprocessor_problem


def test_keys_of_other_planners_stay_here() -> None:
    assert plan({"checkpoint": "/home/x"}).shared() == tiny.plans()
    assert "dataset" not in REGIONS.shared()


# Digests as they were when the first folders and manifests were written: a change makes every user preprocess again.
FROZEN: list[tuple[Plan, str, DatasetJson, str, str]] = [
    (plan(), FULLRES, LABELS, "e6eb949b3f84f32c", "c1b7cde6"),
    (plan(), FULLRES, REGIONS, "ceb48e2f24e047d0", "7c6f853c"),
    (plan(**CT), FULLRES, LABELS, "b68214bb517a9a2b", "4f591dd3"),
    (
        plan(spacing=(1.0, 1.5, 2.0), normalization_schemes=["RescaleTo01Normalization", "CTNormalization"]), FULLRES,
        LABELS, "91f5e5840bed39ed", "2c6bb5aa",
    ),
    (
        plan(spacing=None, resampling_fn_data="no_resampling_hack", resampling_fn_data_kwargs={}), FULLRES, LABELS,
        "481148a0a455f1bd", "fecf6a85",
    ),
    (
        plan({"transpose_forward": [2, 0, 1], "image_reader_writer": "NibabelIO"}), FULLRES, LABELS,
        "7b0a25a6ad5e3659", "0d48c787",
    ),
    (cascade(), "low", LABELS, "6e2b23a87d511b44", "db00ba9b"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "configuration", "dataset", "digest", "identifier"), FROZEN)
def test_digests_on_disk_stay_valid(
    own: Plan, configuration: str, dataset: DatasetJson, digest: str, identifier: str
) -> None:
    assert own.preprocessing_digest(configuration, dataset)[:16] == digest
    assert own.make_data_identifier(configuration, dataset) == f"mfm_{configuration}_{identifier}"


PREPROCESSED_OTHERWISE = [
    plan(spacing=[1.0, 1.0, 1.1]),
    plan(use_mask_for_norm=[True]),
    plan(resampling_fn_data="no_resampling_hack"),
    plan(resampling_fn_seg_kwargs={"order": 0}),
    plan(preprocessor_name="Mine"),
    plan({"transpose_forward": [1, 0, 2]}),
    plan({"image_reader_writer": "NibabelIO"}),
    plan(**CT),
    plan({INTENSITIES: {"0": {"mean": 7.0}}}, **CT),
]
ALIKE = [
    plan({INTENSITIES: {"0": {"mean": 7.0}}}),
    plan({"plans_name": "other", "mfm": {"seed": 1}}),
    plan(patch_size=[16, 8, 8], batch_size=9),
]


def test_digests_follow_what_preprocessing_depends_on_and_nothing_else() -> None:
    plans = [plan(), *PREPROCESSED_OTHERWISE]
    for digest in (Plan.preprocessing_digest, Plan.make_data_identifier):
        own = digest(plan(), FULLRES, LABELS)
        assert len({digest(other, FULLRES, LABELS) for other in plans}) == len(plans)
        assert {digest(other, FULLRES, LABELS) for other in ALIKE} == {own}
        assert digest(plan(), FULLRES, REGIONS) != own


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (plan(batch_size=9, preprocessor_name="Mine", resampling_fn_probabilities_kwargs={"order": 0}), []),
        (plan({INTENSITIES: {"0": {"mean": 7.0}}}), []),
        (plan(spacing=[1, np.float32(1), 1], patch_size=(16, 16, 16)), []),
        (plan(spacing=[1, 1, 2]), ["spacing"]),
        (plan(patch_size=[16, 16, 8], previous_stage="2d"), ["patch_size", "previous_stage"]),
        (plan({"transpose_forward": [1, 0, 2]}), ["transpose_forward"]),
        (plan(**CT), ["normalization_schemes", INTENSITIES]),
    ],
)
def test_what_decides_a_prediction(other: Plan, names: list[str]) -> None:
    assert plan().differences(other, FULLRES) == names
    assert other.differences(plan(), FULLRES) == names


def test_plans_in_checkpoints_may_be_missing_or_broken() -> None:
    assert Plan.of_checkpoint({"plans": tiny.plans()}) == plan()
    assert Plan.of_checkpoint({}) is Plan.of_checkpoint({"plans": {}}) is Plan.of_checkpoint({"plans": 3}) is None
    assert DatasetJson.of_checkpoint({"dataset_json": REGIONS.content}) == REGIONS
    assert DatasetJson.of_checkpoint({"dataset_json": {}}) is DatasetJson.of_checkpoint({}) is None


def test_what_dataset_json_says() -> None:
    assert (LABELS.channels, LABELS.has_regions, LABELS.ignore, LABELS.file_ending) == (("CT",), False, None, ".nii.gz")
    assert LABELS.foreground == {"a": (1,), "b": (2,)}
    assert (REGIONS.has_regions, REGIONS.ignore, REGIONS.foreground) == (True, 3, {"whole": (1, 2), "core": (2,)})


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"numTraining": 4, "channel_names": {"0000": "CT"}}, []),
        ({"channel_names": {"0": "MRI"}}, ["channel_names"]),
        ({"labels": {**REGIONS.labels, "core": 1}}, ["labels"]),
        ({"labels": dict(reversed(REGIONS.labels.items()))}, ["labels"]),
        ({"regions_class_order": [2, 1]}, ["regions_class_order"]),
    ],
)
def test_what_decides_what_images_and_labels_mean(changes: dict[str, Any], names: list[str]) -> None:
    other = DatasetJson.of({**REGIONS.content, **changes})
    assert REGIONS.differences(other) == other.differences(REGIONS) == names


def test_the_order_of_labels_without_regions_means_nothing() -> None:
    other = DatasetJson.of({**LABELS.content, "labels": dict(reversed(LABELS.labels.items()))})
    assert LABELS.differences(other) == []
