"""Thousands of damaged files: each is read as its bytes say, twice alike, or refused with a code within seconds."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import integrity
from mfm_nnunet.images.headers import VolumeHeader
from mfm_nnunet.images.reading import read_image, reader_for
from tests.builders.generated import damaged_files, good_files

SEED = 20261130
SECONDS = 30
NEVER = {"E_READER_CRASH", "E_INTERNAL"}
"""The gate should know better than to give a file to a reader that dies of it."""


def read(file: Path) -> np.ndarray:
    return read_image([file], reader_for(file))[0]


def declared_values(file: Path, header: VolumeHeader) -> np.ndarray:
    """The voxels of a volume by its header and its bytes alone, (D, H, W)."""
    if integrity.ending_of(file) == ".nii.gz":
        blocks = integrity._gunzip(file)
    elif header.compression == "none":
        offset = header.file_offset
        size = header.data_file.stat().st_size
        blocks = integrity._read_blocks(header.data_file, offset if offset >= 0 else size - header.num_bytes)
    else:
        blocks = integrity._gunzip(header.data_file, header.file_offset, any_zlib=header.compression == "zlib")
    content = b"".join(blocks)[header.stream_offset :][: header.num_bytes]
    values = np.frombuffer(content, header.dtype).reshape(header.shape[::-1]).astype(float)
    return values * header.slope + header.inter


def problem_of(file: Path) -> tuple[str, str]:
    """(the code of the refusal, what went wrong); both are empty for a file that is read as it should be."""
    start = time.monotonic()
    try:
        first = read(file)
        second = read(file)
    except MFMError as error:
        slow = f"took {time.monotonic() - start:.0f} s" if time.monotonic() - start > SECONDS else ""
        return error.code, slow or (f"{error}" if error.code in NEVER else "")
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
    if not np.array_equal(first, second):
        return "", "two reads differ"
    header = integrity.declared_by(file).header
    if header is not None:
        expected = declared_values(file, header)
        allowed = 1e-5 * max(np.abs(expected).max(), abs(header.inter), 1e-30)
        if expected.size != first.size or np.abs(expected.ravel() - first.ravel()).max() > allowed:
            return "", "read as something else than its bytes"
    return "", f"took {time.monotonic() - start:.0f} s" if time.monotonic() - start > SECONDS else ""


def test_good_files_of_every_format_are_read(tmp_path: Path) -> None:
    for file in good_files(tmp_path):
        assert problem_of(file) == ("", ""), file.name


@pytest.mark.parametrize("number", [150, pytest.param(6000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_damaged_files_end_in_a_code_or_an_image(number: int, tmp_path: Path) -> None:
    problems, codes = [], dict.fromkeys(("",), 0)
    for file, what in damaged_files(tmp_path / "files", number, SEED):
        code, problem = problem_of(file)
        codes[code] = codes.get(code, 0) + 1
        if problem:
            problems.append(f"{file.name} ({what}): {problem}")
        else:
            file.unlink()
    print(dict(sorted(codes.items(), key=lambda item: -item[1])))
    assert not problems, "\n".join([f"{len(problems)} of {number}", *problems])
    assert 0.05 * number < codes[""] < 0.5 * number, "the damage is too mild or too strong to show anything"
