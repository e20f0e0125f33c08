"""The class table of a union: what is proposed, what is refused, and the values in label maps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.class_table import (
    FILE,
    ClassTable,
    describe_cases,
    propose,
    read_class_table,
    require_confirmed,
    write_class_table,
)
from mfm_nnunet.dataset import check_dataset_json
from mfm_nnunet.errors import MFMError


def entry(number: int, kind: str = "mr", **labels: Any) -> dict[str, Any]:
    return {"name": f"Dataset{number:03d}_Some", "kind": kind, "labels": labels}


ABDOMEN = {"004": entry(4, Liver=[1], spleen=[2]), "052": entry(52, "ct", tumour=[1], liver=[2])}
NESTED = {"004": entry(4, liver=[1, 2], tumour=[2]), "052": entry(52, spleen=[1])}


def written(folder: Path, datasets: dict[str, Any], edit: Callable[[dict[str, Any]], object] = bool) -> Path:
    write_class_table(folder / FILE, *propose(datasets))
    content = json.loads((folder / FILE).read_text())
    edit(content)
    (folder / FILE).write_text(json.dumps(content))
    return folder / FILE


def test_equal_names_are_proposed_as_one_class_and_listed(tmp_path: Path) -> None:
    table, content = read_class_table(written(tmp_path, ABDOMEN))
    assert table.names == ["Liver", "spleen", "tumour"]
    assert content["same_names"] == {"Liver": ["004", "052"]}
    assert content["confirmed"] is False
    assert table.values("004") == {0: 0, 1: 1, 2: 2}
    assert table.values("052") == {0: 0, 1: 3, 2: 1}
    assert table.valid_outputs("004") == (True, True, True, False)
    assert table.valid_outputs("052") == (True, True, False, True)
    assert table.labels() == {"labels": {"background": 0, "Liver": 1, "spleen": 2, "tumour": 3}}
    assert table.expected_classes({"004": 4, "052": 9}) == 2.0


def test_nested_classes_become_regions() -> None:
    table, _ = propose(NESTED)
    assert table.has_regions
    assert table.values("004") == {0: 0, 1: 1, 2: 2}
    assert table.values("052") == {0: 0, 1: 3}
    labels = table.labels()
    assert labels["labels"] == {"background": 0, "liver": [1, 2], "tumour": [2], "spleen": [3]}
    assert labels["regions_class_order"] == [1, 2, 3]
    assert table.valid_outputs("052") == (False, False, True)


def test_a_class_that_is_nested_somewhere_is_painted_as_nested() -> None:
    """A mask holds one value per voxel: a tumour that was painted as tumour alone would be a hole in the liver."""
    table, _ = propose({**NESTED, "052": entry(52, tumour=[1])})
    labels = table.labels()
    assert labels["labels"] == {"background": 0, "liver": [1, 3], "tumour": [2, 3]}
    assert table.values("004") == {0: 0, 1: 1, 2: 3}
    assert table.values("052") == {0: 0, 1: 2}
    assert labels["regions_class_order"] == [1, 3]


def test_classes_that_may_overlap_are_regions_to_nnunet() -> None:
    """Lists of one value each would be labels of a softmax to nnU-Net."""
    table = dataclasses.replace(propose(ABDOMEN)[0], exclusive=False)
    labels = table.labels()
    manager = LabelManager(labels["labels"], labels["regions_class_order"])
    assert manager.has_regions
    assert manager.num_segmentation_heads == 3
    assert labels["regions_class_order"] == [1, 2, 3]
    own = {"channel_names": {"0": "MR"}, "file_ending": ".nii.gz", **labels}
    check_dataset_json(own, Path("dataset.json"))


def test_labels_to_ignore_stay_the_highest_value() -> None:
    datasets = {"004": {**ABDOMEN["004"], "ignore": 3}, "052": ABDOMEN["052"]}
    table, _ = propose(datasets)
    assert table.labels()["labels"]["ignore"] == 4
    assert table.values("004")[3] == 4
    assert 4 not in table.values("052").values()


def test_a_label_without_a_row_is_background(tmp_path: Path) -> None:
    table, _ = read_class_table(written(tmp_path, ABDOMEN, lambda content: content["classes"].pop(1)))
    assert table.values("004") == {0: 0, 1: 1, 2: 0}


def test_further_datasets_do_not_move_old_classes() -> None:
    old, _ = propose(ABDOMEN)
    more = {"003": entry(3, kidney=[1], Tumour=[2]), **ABDOMEN}
    new, same = propose(more, old)
    assert new.names == ["Liver", "spleen", "tumour", "kidney"]
    assert new.num_old == 3
    assert same == {"tumour": ["003", "052"]}
    for key in ABDOMEN:
        assert new.values(key) == old.values(key)


def swap(content: dict[str, Any]) -> None:
    content["classes"][1]["name"] = " liver "


BAD: list[Callable[[dict[str, Any]], object]] = [
    swap,  # a doubled name
    lambda content: content["classes"][0].update(name="background"),
    lambda content: content["classes"][0].update(name=""),
    lambda content: content["classes"][0]["labels"].update({"099": [1]}),  # an unknown dataset
    lambda content: content["classes"][0]["labels"].update({"004": [7]}),  # an unknown value
    lambda content: content["classes"][0]["labels"].update({"004": []}),
    lambda content: content["classes"][0]["labels"].update({"004": [1, 2]}),  # a value of two exclusive classes
    lambda content: content["classes"].clear(),
    lambda content: content.update(confirmed="yes"),
    lambda content: content.update(classes={"a": 1}),
    lambda content: content.pop("datasets"),
]


@pytest.mark.parametrize("edit", BAD)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = written(tmp_path, ABDOMEN, edit)
    with pytest.raises(MFMError, match="E_CONFIG") as caught:
        read_class_table(file)
    assert str(file) in caught.value.message


def test_training_needs_the_confirmed_table_of_the_plan(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset900_Union"
    folder.mkdir()
    planned = propose(ABDOMEN)[0].to_block()
    with pytest.raises(MFMError, match="E_NOT_FOUND"):
        require_confirmed([folder], planned)
    written(folder, ABDOMEN)
    with pytest.raises(MFMError, match="Liver"):
        require_confirmed([folder], planned)
    written(folder, ABDOMEN, lambda content: content.update(confirmed=True))
    require_confirmed([tmp_path / "gone", folder], planned)
    with pytest.raises(MFMError, match="-d 900"):
        require_confirmed([folder], dataclasses.replace(propose(ABDOMEN)[0], exclusive=False).to_block())


def test_cases_know_their_dataset_kind_and_patient() -> None:
    block = propose(ABDOMEN)[0].to_block()
    cases = [Case(f"{key}_STS_001", (Path("a"),)) for key in ABDOMEN]
    together = describe_cases(cases, {"mfm": {"universal": block}})
    assert [(case.modality, case.dataset, case.subject) for case in together] == [
        ("mr", "Dataset004_Some", "STS_001"),
        ("ct", "Dataset052_Some", "STS_001"),
    ]
    apart = describe_cases(cases, {"mfm": {"universal": {**block, "same_patients": False}}})
    assert [case.subject for case in apart] == ["004_STS_001", "052_STS_001"]
    assert describe_cases(cases, {}) == cases
    with pytest.raises(MFMError, match="E_CONFIG"):
        describe_cases([Case("099_a", (Path("a"),))], {"mfm": {"universal": block}})


def test_a_table_survives_its_file() -> None:
    for datasets in (ABDOMEN, NESTED):
        table, _ = propose(datasets)
        assert ClassTable.of(json.loads(json.dumps(table.to_block()))).to_block() == table.to_block()
