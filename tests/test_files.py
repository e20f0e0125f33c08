"""Names out of files, and the paths that are built from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mfm_nnunet import files
from mfm_nnunet.errors import MFMError

LATIN_1 = os.fsdecode(b"M\xfcller")
ESCAPES = [
    "..",
    ".",
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    LATIN_1,
    "a" * 256,
    "ü" * 128,
]


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
        with pytest.raises(MFMError) as caught:
            files.open_to_append(file)
        assert caught.value.code == "E_NOT_REGULAR"
    assert victim.read_text() == "precious"


def test_shown_is_utf_8() -> None:
    assert files.shown(LATIN_1) == "M\\udcfcller"
    assert files.shown(Path("ä")) == "ä"
