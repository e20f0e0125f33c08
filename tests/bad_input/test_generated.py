"""Thousands of damaged files: each is read as its bytes say, twice alike, or refused with a code within seconds."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.images import integrity
from mfm_nnunet.images.headers import VolumeHeader
from mfm_nnunet.images.reading import read_image, reader_for
from tests.builders.generated import damaged_files, good_files
from tests.builders.site import Site, unchanged

SEED = 20261130
NUM_FILES = 6000
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


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    problems, codes = [], dict.fromkeys(("",), 0)
    for file, what in damaged_files(tmp_path / "files", NUM_FILES, SEED):
        code, problem = problem_of(file)
        codes[code] = codes.get(code, 0) + 1
        if problem:
            problems.append(f"{file.name} ({what}): {problem}")
        else:
            file.unlink()
    print(dict(sorted(codes.items(), key=lambda item: -item[1])))
    assert not problems, "\n".join([f"{len(problems)} of {NUM_FILES}", *problems])
    assert 0.05 * NUM_FILES < codes[""] < 0.5 * NUM_FILES, "the damage is too mild or too strong to show anything"


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", ["predict", "corpus"])
def test_damaged_files_through_the_commands(command: str, site: Site, tmp_path: Path) -> None:
    """Every bad file is named with a code, no good one is lost, and nothing outside of the workspace is touched."""
    outside, folder = tmp_path / "outside", tmp_path / "damaged"
    outside.mkdir()
    (outside / "victim.txt").write_text("precious")
    endings = (".nii.gz",) if command == "predict" else (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".gipl")
    for file, _ in damaged_files(folder, 1200, SEED + 1):
        if not file.name.endswith(endings) or file.name.endswith(".ome.tif"):
            file.unlink()
    shutil.rmtree(folder / "originals")
    good = [shutil.copy(scan, folder / f"good{number}_0000.nii.gz") for number, scan in enumerate(site.scans.iterdir())]
    with unchanged(outside, folder):
        if command == "predict":
            outcome = site.predict(folder, tmp_path / "masks")
        else:
            outcome = site.plan("-d", 702, "-c", "3d_fullres", "--images", folder)
    assert outcome.code == 3, outcome.err[-2000:]
    shown = outcome.out + outcome.err + site.log
    for word in ("E_INTERNAL", "internal error", "E_READER_CRASH"):
        assert word not in shown, shown[-3000:]
    assert "Traceback" not in outcome.out + outcome.err
    done = tmp_path / "masks" if command == "predict" else site.data("Dataset702_Corpus")
    names = {file.name.split(".")[0] for file in done.iterdir()}
    wanted = {Path(file).name.split(".")[0] for file in good}
    assert {name.removesuffix("_0000") if command == "predict" else name for name in wanted} <= names
