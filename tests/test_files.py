"""Names and paths, JSON, atomic writing, full disks, locks and journals."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mfm_nnunet import checkpoint, files
from mfm_nnunet.data import corpus
from mfm_nnunet.data.sources import index_source
from mfm_nnunet.data.storage import Manifest
from mfm_nnunet.errors import MFMError
from mfm_nnunet.finetune.splits import ensure_splits
from mfm_nnunet.interchange.read import find_checkpoint, read_checkpoint
from mfm_nnunet.plan import Plan
from mfm_nnunet.planning.recipes import read_recipe
from mfm_nnunet.study.folder import read_study
from mfm_nnunet.study.summary import read_result

LATIN_1 = os.fsdecode(b"M\xfcller")
ESCAPES = ["..", "", "/etc/passwd", "a/../../x", "a\\b", "a\0b", "a\nb", LATIN_1, "a" * 256, "ü" * 128]


@pytest.mark.parametrize("name", [*ESCAPES, None, 3, ["a"]])
def test_what_leaves_its_folder_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(MFMError) as caught:
        files.inside(tmp_path, "fine", name)  # type: ignore[arg-type]
    assert caught.value.code == "E_CONFIG"
    caught.value.message.encode()  # also where the name is not UTF-8
    assert not files.is_name(name)


@pytest.mark.parametrize("name", ["a", "case 1.nii.gz", "..a", "患者_0000.nii.gz", "M\u00fcller, Hans (2)", "-x", "~"])
def test_names_of_files(name: str, tmp_path: Path) -> None:
    assert files.inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["mfmPlans", "Dataset005_Größe", "3d_fullres", "2d bs=24", "nnUNetPlans__v1.2+x"])
def test_names_of_plans_and_datasets(name: str) -> None:
    assert files.is_name(name)


@pytest.mark.parametrize("name", [" x", "x ", "x.", ".x", "-x", "x:y", "x*", "a\u202eb", "x" * 121])
def test_no_names_of_plans_and_datasets(name: str) -> None:
    assert not files.is_name(name)


def test_whole_numbers() -> None:
    texts = ["0", "007", "²", "٣", "-1", "1.0", "", "1" * 10]
    assert [files.whole_number(text) for text in texts] == [0, 7, None, None, None, None, None, None]


def test_logs_are_appended_to_and_never_through_a_link(tmp_path: Path) -> None:
    log, link, victim = tmp_path / "log", tmp_path / "link", tmp_path / "victim"
    for line in (b"1\n", b"2\n"):
        with files.open_to_append(log) as handle:
            handle.write(line)
    assert log.read_bytes() == b"1\n2\n"
    victim.write_text("precious")
    link.symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for file in (link, tmp_path / "pipe", tmp_path):
        with pytest.raises(MFMError, match="E_NOT_REGULAR  "):
            files.open_to_append(file)
    assert victim.read_text() == "precious"


def test_plain_values_of_numpy_paths_and_devices() -> None:
    plain = files.to_plain({"a": np.float32(1.5), "b": np.arange(3), "c": torch.device("cpu"), 1: (np.int64(2),)})
    assert plain == {"a": 1.5, "b": [0, 1, 2], "c": "cpu", 1: [2]}


WRITER = """
import os, signal, sys
from mfm_nnunet import files

with files.atomic_write(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.readline()
    file.write(b" and half")
"""


def test_leftovers_of_killed_saves_are_removed_and_others_stay(tmp_path: Path) -> None:
    """A temporary file is a leftover when its writer is dead, and never before."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    targets = [tmp_path / "resume.pth", tmp_path / "other.pth"]
    dead, living = (subprocess.Popen([sys.executable, "-c", WRITER, str(file)], **pipes) for file in targets)  # type: ignore[call-overload]
    for process in (dead, living):
        assert process.stdout.readline() == "half\n"
    dead.kill()
    dead.wait()
    keep = [tmp_path / name for name in (".notes.tmp", "scan.1234abcd.tmp", ".x.1234ABCD.tmp", ".link.1234abcd.tmp")]
    for file in keep[:-1]:
        file.write_text("of the user")
    keep[-1].symlink_to(keep[0])
    assert len(list(tmp_path.glob(".*.pth.*.tmp"))) == 2
    with files.atomic_write(tmp_path / "log.jsonl") as file:
        file.write(b"{}")
    assert [path.name[: len(".other.pth.")] for path in tmp_path.glob(".*.pth.*.tmp")] == [".other.pth."]
    living.communicate("\n")
    assert living.returncode == 0
    assert targets[1].read_text() == "half and half"
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "other.pth", *(path.name for path in keep)}


def test_a_file_that_is_being_renamed_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may look for leftovers at any moment, also between the last byte and the final name."""
    replace = os.replace

    def others_look_first(source: Path, target: Path) -> None:
        code = "import sys, pathlib, mfm_nnunet.files as files; files.remove_leftovers(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        replace(source, target)

    monkeypatch.setattr(os, "replace", others_look_first)
    with files.atomic_write(tmp_path / "case.b2nd") as file:
        file.write(b"whole")
    assert (tmp_path / "case.b2nd").read_bytes() == b"whole"


def test_without_locks_leftovers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can tell there whether the writer lives; writing works all the same."""

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    left = tmp_path / ".resume.pth.0123abcd.tmp"
    left.write_bytes(b"half")
    with files.atomic_write(tmp_path / "x.json") as file:
        file.write(b"{}")
    assert {path.name for path in tmp_path.iterdir()} == {left.name, "x.json"}


def test_a_full_disk_is_named_where_the_system_does_not(tmp_path: Path) -> None:
    """As nnU-Net's writers raise it: without a name, or with that of the file that was copied."""
    file, folder = tmp_path / "log.txt", tmp_path
    for error, where, expected in (
        (OSError(errno.ENOSPC, "full"), file, file),
        (OSError(errno.ENOSPC, "full"), folder, folder),
        (OSError(errno.EDQUOT, "full", "/from", None, str(file)), folder, file),
        (OSError(errno.EFBIG, "full", str(file)), folder, file),
    ):
        named = re.escape(f"E_DISK_FULL  {expected}: ")
        with pytest.raises(MFMError, match=named), files.report_full_disk(where):
            raise error


def test_writers_of_one_file_do_not_share_its_temporary_name(tmp_path: Path) -> None:
    """Two containers may give the same number to their processes."""
    file = tmp_path / "x.json"
    with files.atomic_write(file) as one:
        one.write(b"one")
        with files.atomic_write(file) as other:
            other.write(b"other")
        assert file.read_bytes() == b"other"
    assert file.read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_an_error_without_a_cause_is_a_full_disk_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries hide why a write failed."""
    for error in (RuntimeError("cannot write"), OSError(errno.EIO, "failed")):
        with pytest.raises(type(error)), files.report_full_disk(tmp_path / "a.nii.gz", 1):
            raise error
    monkeypatch.setattr(files, "_has_room", lambda folder, num_bytes: num_bytes < 10)
    with pytest.raises(MFMError, match=r"E_DISK_FULL.*a\.nii\.gz"), files.report_full_disk(tmp_path / "a.nii.gz", 1):
        raise error
    with pytest.raises(OSError, match="failed"), files.report_full_disk(tmp_path / "a.nii.gz"):
        raise error


def test_journals_survive_a_kill_within_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    assert list(files.read_lines(file)) == []
    for number, cut_off in enumerate((b'{"case": "b', b"")):
        with files.open_to_append(file) as handle:
            files.append_line(handle, {"case": number})
            handle.write(cut_off)
    assert list(files.read_lines(file)) == [{"case": 0}, {"case": 1}]


def test_a_lock_is_taken_once_and_ends_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    with files.open_to_append(file) as one, files.open_to_append(file) as other:
        assert files.take_lock(one.fileno()) is True
        assert files.take_lock(other.fileno()) is False
    with files.locked(file) as is_free, files.locked(file) as is_free_twice:
        assert (is_free, is_free_twice) == (True, False)


DEEP = [
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    "[" * 100_000 + "]" * 100_000,
    "[" * 100_000,
    '{"a":' * 200 + "1" + "}" * 200,
]
DOORS: dict[str, Callable[[Path], object]] = {
    "any.json": lambda file: files.read_json(file, ""),
    "plans.json": lambda file: Plan.read(file, ""),
    "dataset.json": lambda file: corpus.read_dataset_json(file.parent),
    "corpus.json": lambda file: corpus.load_cases(file.parent),
    "pretrain_data.json": lambda file: index_source(file),
    "splits_final.json": lambda file: ensure_splits(file.parent, ["a", "b"]),
    "recipe.json": lambda file: read_recipe(file),
    "study.json": lambda file: read_study(file.parent),
    "result.json": lambda file: read_result(file.parent),
    "config.json": lambda file: read_checkpoint(find_checkpoint(file.parent)),
}


@pytest.mark.parametrize("name", DOORS)
def test_json_that_is_nested_without_end(name: str, tmp_path: Path) -> None:
    if name == "config.json":
        save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    for text in DEEP:
        (tmp_path / name).write_text(text)
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
    assert files.read_json(tmp_path / "a.json", "") == files.parse_json(text) == {"a": 1}


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"", b"{", b"9" * 5000, b"\x00", b'{"a": "\xfc"}'])
def test_what_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(MFMError, match=r"E_FORMAT.*a\.json"):
        files.read_json(tmp_path / "a.json", "")


CASE = {"name": "a", "images": ["/a.nii.gz"], "subject": "a"}


@pytest.mark.parametrize(
    "entry",
    [
        {**CASE, "name": "../a"}, {**CASE, "name": "a_seg"}, {**CASE, "name": 3}, {**CASE, "images": [3]},
        {**CASE, "images": []}, {**CASE, "images": "/a"}, {**CASE, "images": ["a\0"]}, {**CASE, "subject": None},
        {**CASE, "modality": 3}, {**CASE, "anonymisation_mask": ["x"]}, 3,
    ],
)  # fmt: skip
def test_corpora_of_other_kinds(entry: object, tmp_path: Path) -> None:
    content = {"format": 1, "source": "/", "cases": [CASE]}
    (tmp_path / "corpus.json").write_text(json.dumps(content))
    assert [case.name for case in corpus.load_cases(tmp_path)] == ["a"]
    (tmp_path / "corpus.json").write_text(json.dumps({**content, "cases": [entry]}))
    with pytest.raises(MFMError, match=r"E_FORMAT.*corpus\.json"):
        corpus.load_cases(tmp_path)
