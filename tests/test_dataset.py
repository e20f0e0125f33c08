"""dataset.json as people write it: understood, or refused with the field named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet.dataset import channel_names, check_dataset_json, normalise, read_dataset_json
from mfm_nnunet.errors import MFMError

GOOD: dict[str, Any] = {
    "channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz",
}  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [
        {"1": "CT", "0": "T2"},
        {"_0001": "CT", "_0000": "T2"},
        {"0001": "CT", "0000": "T2"},
        {"00": "T2", "1": "CT"},
        {1: "CT", 0: "T2"},
    ],
)
@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_are_in_the_order_of_their_numbers(key: str, names: dict[Any, str]) -> None:
    content = {"labels": GOOD["labels"], "file_ending": ".nii.gz", key: names}
    check_dataset_json(content, Path("dataset.json"))
    assert list(channel_names(normalise(content)).items()) == [("0", "T2"), ("1", "CT")]


def test_more_than_ten_channels_are_sorted_by_number() -> None:
    names = {str(number): f"c{number}" for number in reversed(range(12))}
    assert list(channel_names(normalise({**GOOD, "channel_names": names})).values()) == [f"c{n}" for n in range(12)]


NO_CHANNELS: list[Any] = [
    {"CT": 0}, {"CT": "0"}, {"CT": "T2"}, {"1": "CT"}, {"0": "CT", "2": "T2"}, {"0": "CT", "00": "T2"}, {"-1": "CT"},
    {"0.0": "CT"}, {" 0": "CT"}, {"²": "CT"}, {"0": 0}, {"0": None}, {"0": ["CT"]}, {}, [], ["CT"], "CT", 1, True, None,
    {"9" * 5000: "CT"}, {"": "CT"}, {"\udcfc": "CT"},
]  # fmt: skip


def test_channels_without_numbers_are_refused_by_name() -> None:
    for names in NO_CHANNELS:
        refused({"channel_names": names}, "channel_names")


def test_a_model_of_stock_nnunet_may_have_other_numbers(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({**GOOD, "channel_names": {"1": "CT", "2": "T2"}}))
    content = read_dataset_json(tmp_path / "dataset.json", "", "E_MODEL_CORRUPT", of_model=True)
    assert list(channel_names(content).values()) == ["CT", "T2"]
    with pytest.raises(MFMError, match="channel_names"):
        read_dataset_json(tmp_path / "dataset.json", "")


@pytest.mark.parametrize(
    ("written", "meant"), [("nii.gz", ".nii.gz"), (".NII.GZ", ".NII.GZ"), ("Png", ".Png"), (".mha", ".mha")]
)
def test_endings(written: str, meant: str) -> None:
    content = {**GOOD, "file_ending": written}
    check_dataset_json(content, Path("dataset.json"))
    assert normalise(content)["file_ending"] == meant


NO_ENDINGS: list[Any] = [
    "/../../victim.txt", "/../x.nii.gz", "..nii.gz", ".nii.gz/", ".nii.gz\0", ".nii.gz\n", " .nii.gz", ".nii .gz", "",
    ".", ".txt", ".exe", None, 3, True, [".nii.gz"], {".nii.gz": 1}, ".\u202enii.gz", ".nii.gz\udcfc",
]  # fmt: skip


def test_endings_that_are_not_read_are_refused_by_name() -> None:
    for ending in NO_ENDINGS:
        refused({"file_ending": ending}, "file_ending")


NO_VALUES: list[Any] = [10**30, True, 1.0, "²", "--1", [1, [2]], {}, [], -1, None, float("nan")]
NO_LABELS: list[Any] = [
    *({"background": 0, "a": value} for value in NO_VALUES),
    {"background": False, "a": 1},
    {"background": 0, **{f"l{number}": number for number in range(1, 40_000)}},
    *(None, 3, "abc", [0, 1]),
]


def test_labels_that_cannot_be() -> None:
    for labels in NO_LABELS:
        refused({"labels": labels}, "labels")


def test_orders_of_regions_that_cannot_be() -> None:
    for order in (None, [1], [1, True], [1, "x"], [1, [2]], [1, 0], [1, 10**30], "12", {"1": 2}):
        labels = {"background": 0, "all": [1, 2], "b": 2}
        refused({"labels": labels, "regions_class_order": order}, "regions_class_order")


def test_cases_that_name_no_files() -> None:
    for entry in ([3], ["x\0"], [["x"]], "x"):
        refused({"dataset": {"a": {"images": entry}}}, "dataset")
    for label in (3, ["y"]):
        refused({"dataset": {"a": {"images": ["x"], "label": label}}}, "dataset")
    for cases in ({"a": 3}, 3):
        refused({"dataset": cases}, "dataset")


def test_two_fields_of_channels_that_differ() -> None:
    refused({"modality": {"0": "CT", "1": "T2"}}, "modality")


def refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(MFMError) as caught:
        check_dataset_json({**GOOD, **changes}, Path("dataset.json"))
    assert caught.value.code == "E_FORMAT"
    assert word in caught.value.message
    assert len(caught.value.message) < 600
