"""JSON files: byte order marks are skipped, and what is nested without end is an error with a code at every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mfm_nnunet import checkpoint
from mfm_nnunet.data import corpus
from mfm_nnunet.data.sources import index_source
from mfm_nnunet.data.storage import Manifest
from mfm_nnunet.errors import MFMError
from mfm_nnunet.files import parse_json, read_json
from mfm_nnunet.finetune.splits import ensure_splits
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
from mfm_nnunet.plan import read_plans
from mfm_nnunet.planning.recipes import read_recipe
from mfm_nnunet.study.folder import read_study
from mfm_nnunet.study.summary import read_result

DEEP = [
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    "[" * 100_000,
    '{"a":' * 200 + "1" + "}" * 200,
]
DOORS: dict[str, Callable[[Path], object]] = {
    "any.json": lambda file: read_json(file, ""),
    "plans.json": lambda file: read_plans(file, ""),
    "dataset.json": lambda file: corpus.read_dataset_json(file.parent),
    "corpus.json": lambda file: corpus.load_cases(file.parent),
    "pretrain_data.json": lambda file: index_source(file),
    "splits_final.json": lambda file: ensure_splits(file.parent, ["a", "b"]),
    "recipe.json": lambda file: read_recipe(file),
    "study.json": lambda file: read_study(file.parent),
    "result.json": lambda file: read_result(file.parent),
    "config.json": lambda file: read_checkpoint(find_checkpoint(file.parent)),
}


@pytest.mark.parametrize("text", DEEP, ids=["tables", "lists", "open", "200"])
@pytest.mark.parametrize("name", DOORS)
def test_json_that_is_nested_without_end(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    if name == "config.json":
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(MFMError) as caught:
        DOORS[name](tmp_path / name)
    assert caught.value.code in ("E_FORMAT", "E_CONFIG", "E_MODEL_CORRUPT")
    assert name in caught.value.message


def test_manifests_ignore_what_no_run_wrote(tmp_path: Path) -> None:
    good = {"case": "a", "hash": "h", "sources": [[1, 2], [3, 4, "anonymised"]], "files": {".b2nd": 5}}
    bad = [
        {**good, "case": ["b"]}, {**good, "case": "../b"}, {**good, "hash": 3}, {**good, "sources": [3]},
        {**good, "sources": [[1]]}, {**good, "sources": 3}, {**good, "files": [3]}, {**good, "files": {".b2nd": "5"}},
        {"case": "b"}, 3, [], None,
    ]  # fmt: skip
    lines = [*map(json.dumps, bad), *DEEP, json.dumps(good)]
    (tmp_path / "data.manifest.jsonl").write_text("\n".join(lines) + "\n")
    manifest = Manifest.read(tmp_path / "data")
    assert manifest.entries == {"a": good}
    assert manifest.source_sizes("a", 1) == {"images": [1], "anonymised": [3]}


def test_checkpoints_that_are_nested_without_end(tmp_path: Path) -> None:
    deep: list = []
    for _ in range(150):
        deep = [deep]
    torch.save({"network_weights": {}, "mfm": deep}, tmp_path / "a.pth")
    with pytest.raises(MFMError, match=r"E_MODEL_CORRUPT.*levels deep"):
        checkpoint.load(tmp_path / "a.pth")


@pytest.mark.parametrize("text", ['{"a": 1}', '\ufeff{"a": 1}'])
def test_byte_order_marks(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json", "") == parse_json(text) == {"a": 1}


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"{", b"9" * 5000, b"\x00", b'{"a": "\xfc"}'])
def test_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(MFMError, match=r"E_FORMAT.*a\.json"):
        read_json(tmp_path / "a.json", "")


SPLITS = [
    [{"train": "ab", "val": ["a"]}], [{"train": [["a"]], "val": ["b"]}], [{"train": [1], "val": ["b"]}], [["a"], ["b"]],
    [{"train": {"a": 1}, "val": ["b"]}], [3], [None],
]  # fmt: skip


@pytest.mark.parametrize("splits", SPLITS)
def test_splits_of_other_kinds(splits: object, tmp_path: Path) -> None:
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(MFMError, match=r"E_CONFIG.*splits_final\.json"):
        ensure_splits(tmp_path, ["a", "b"])


CASE = {"name": "a", "images": ["/a.nii.gz"], "subject": "a"}


@pytest.mark.parametrize(
    "entry",
    [
        {**CASE, "name": "../a"}, {**CASE, "name": 3}, {**CASE, "images": [3]}, {**CASE, "images": []},
        {**CASE, "images": "/a"}, {**CASE, "images": ["a\0"]}, {**CASE, "subject": None}, {**CASE, "modality": 3},
        {**CASE, "anonymisation_mask": ["x"]}, 3,
    ],
)  # fmt: skip
def test_corpora_of_other_kinds(entry: object, tmp_path: Path) -> None:
    content = {"format": 1, "source": "/", "cases": [CASE]}
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    assert [case.name for case in corpus.load_cases(tmp_path)] == ["a"]
    (tmp_path / "corpus.json").write_text(json.dumps({**content, "cases": [entry]}))
    with pytest.raises(MFMError, match=r"E_FORMAT.*corpus\.json"):
        corpus.load_cases(tmp_path)
