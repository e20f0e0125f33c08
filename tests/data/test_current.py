"""Which cases a dataset has now: its raw folder says, else the list of the last planning; never what lies about."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mfm_nnunet.data.corpus import FINGERPRINT, Selection, register_corpus, select
from mfm_nnunet.data.sources import index_source
from tests.builders.corpora import NAME, dataset, refusal, touch


def planned(beside: Path, names: object, failures: object = ()) -> Path:
    beside.mkdir(parents=True, exist_ok=True)
    ours = {"case_names": names, "failures": failures}
    (beside / FINGERPRINT).write_text(json.dumps({"mfm": {k: v for k, v in ours.items() if v is not None}}))
    return beside


def told(selection: Selection) -> tuple[list[str], list[str], list[str]]:
    return selection.names, selection.removed, selection.missing


def test_the_raw_folder_decides(tmp_path: Path) -> None:
    raw, beside = dataset(tmp_path / "raw"), planned(tmp_path / "beside", ["a", "gone"])
    selection = select(raw, beside, ["a", "gone"])
    assert told(selection) == (["a"], ["gone"], ["b_c"])
    assert selection.source == raw
    first, second = selection.notes()
    assert "gone" in first
    assert "b_c" in second


def test_without_the_raw_folder_the_last_planning_decides(tmp_path: Path) -> None:
    """Also where dataset.json was left behind, or an empty folder."""
    beside = planned(tmp_path / "beside", ["a", "sub-1_T1"])
    for raw in (None, tmp_path / "nowhere", tmp_path / "raw"):
        selection = select(raw, beside, ["a", "gone", "sub-1_T1"])
        assert told(selection) == (["a", "sub-1_T1"], ["gone"], [])
        assert [case.subject for case in selection.cases] == ["a", "sub-1"]
        touch(tmp_path / "raw", "imagesTr/.hidden")
        (tmp_path / "raw" / "dataset.json").write_text(
            '{"channel_names": {"0": "MR"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}'
        )


def test_without_any_list_all_that_is_preprocessed_is_used(tmp_path: Path) -> None:
    """Data of stock nnU-Net, whose fingerprint names no case."""
    beside = planned(tmp_path / "beside", None)
    for place in (beside, tmp_path):
        selection = select(None, place, ["b", "a"])
        assert told(selection) == (["a", "b"], [], [])
        assert selection.notes() == []


def test_files_of_a_map_may_be_moved_away(tmp_path: Path) -> None:
    entries = {name: {"images": [f"/nowhere/{name}.nii.gz"], "label": f"/nowhere/{name}_l.nii.gz"} for name in "ab"}
    raw = dataset(tmp_path / "raw", channel_names={"0": "MR"}, dataset=entries)
    assert told(select(raw, tmp_path, ["a", "c"])) == (["a"], ["c"], ["b"])


def test_a_raw_folder_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """A label without image, or the reverse: nobody knows whether the case is meant to be there."""
    raw = dataset(tmp_path / "raw")
    (raw / "labelsTr" / "a.nii.gz").unlink()
    refusal("E_NOT_FOUND", select, raw, tmp_path, ["a", "b_c"], words=("labelsTr/a.nii.gz", f"move {raw} away"))


def test_a_corpus_uses_what_is_registered_and_was_not_refused(tmp_path: Path) -> None:
    """A scan that cannot be seen at the moment is registered all the same."""
    scans, beside = touch(tmp_path / "scans", "a.nii", "b.nii", "c.nii"), planned(tmp_path / "beside", ["a", "b"])
    raw = register_corpus(tmp_path, NAME, index_source(tmp_path / "scans"), ["MR"])
    for file in scans:
        file.unlink()
    assert told(select(raw, beside, ["a", "b", "c"])) == (["a", "b", "c"], [], [])
    planned(beside, ["a", "b"], [["c", "E_GZIP_CRC", "damaged"]])
    for name in ("corpus.json", "dataset.json"):
        (beside / name).write_bytes((raw / name).read_bytes())
    for folder in (raw, None):
        assert told(select(folder, beside, ["a", "c", "old"])) == (["a"], ["c", "old"], ["b"])


def test_a_withdrawn_scan_stays_out(tmp_path: Path) -> None:
    touch(tmp_path / "scans", "a.nii", "b.nii")
    raw = register_corpus(tmp_path, NAME, index_source(tmp_path / "scans"), ["MR"])
    (tmp_path / "scans" / "b.nii").unlink()
    register_corpus(tmp_path, NAME, index_source(tmp_path / "scans"), ["MR"])
    assert told(select(raw, tmp_path / "beside", ["a", "b"])) == (["a"], ["b"], [])


@pytest.mark.parametrize("ours", [{"case_names": 3}, {"failures": [3]}, {"failures": [{}]}, [1]])
def test_a_damaged_list(tmp_path: Path, ours: object) -> None:
    (tmp_path / FINGERPRINT).write_text(json.dumps({"mfm": ours}))
    assert "mfm_plan_and_preprocess" in refusal("E_FORMAT", select, None, tmp_path, ["a"])
