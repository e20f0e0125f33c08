"""Preprocessed volumes that are something other than a plain array are refused before anything follows them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import blosc2
import numpy as np
import pytest

from mfm_nnunet.data import volumes
from mfm_nnunet.errors import MFMError
from tests.builders import crafted


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A volume of 18 chunks and its voxels."""
    voxels = np.random.default_rng(0).normal(size=crafted.SHAPE).astype(np.float32)
    file = tmp_path / "good" / "a.b2nd"
    file.parent.mkdir()
    blosc2.asarray(voxels, urlpath=str(file), chunks=(1, 16, 16, 16), blocks=(1, 8, 8, 8))
    return file, voxels


@pytest.mark.parametrize(
    "key",
    [
        *(slice(None), 0, ..., (0, 3), (slice(None), 5, slice(3, 20), slice(0, 30))),
        *((slice(None), slice(38, 40), slice(0, 1), slice(29, 30)), (0, slice(None, None, 2)), (0, -1)),
    ],
)
def test_voxels_are_those_stored(good: tuple[Path, np.ndarray], key: object) -> None:
    file, voxels = good
    volume = volumes.open_array(str(file))
    assert isinstance(volume, blosc2.NDArray)  # nnU-Net's cropping asks for it
    assert np.array_equal(volume[key], voxels[key])  # type: ignore[index]
    assert (volume.shape, volume.ndim, volume.dtype) == (voxels.shape, 4, np.float32)


def test_only_the_chunks_that_are_read_are_looked_at(good: tuple[Path, np.ndarray]) -> None:
    volume = volumes.open_array(str(good[0]))
    assert list(volume._chunks_of((0, slice(16, 32), slice(0, 24), slice(16, 30)))) == [5, 7]
    assert len(list(volume._chunks_of(slice(None)))) == 12


@pytest.mark.parametrize("kind", list(crafted.volumes(Path("mark"), Path("here"))))
def test_what_could_run_code_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, mark = tmp_path / "a.b2nd", tmp_path / "ran"
    (tmp_path / "here").mkdir()
    crafted.volumes(mark, tmp_path / "here")[kind](file)
    monkeypatch.chdir(tmp_path / "here")  # where blosc2 would look for a compressor
    with pytest.raises(MFMError) as caught:
        volumes.open_volume(str(file))[:]
    assert (caught.value.code, caught.value.message.partition(":")[0]) == ("E_DATA_UNSAFE", str(file))
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["a function", "a compressor for the chunks", "a compressor for the list of chunks"])
def test_the_crafted_files_do_run_code_where_they_are_trusted(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mark = tmp_path / "a.b2nd", tmp_path / "ran"
    (tmp_path / "here").mkdir()
    crafted.volumes(mark, tmp_path / "here")[kind](file)
    monkeypatch.chdir(tmp_path / "here")
    with contextlib.suppress(Exception):
        blosc2.open(str(file), mode="r", deserialize="full")[:]
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (np.zeros((4, 5, 6), np.float32), "3 axes"),
        (np.zeros((1, 4, 5, 6), "datetime64[s]"), "no numbers"),
        (np.zeros((1, 4, 5, 6), ">f4"), "no numbers"),
    ],
)
def test_arrays_that_are_no_volume_are_named(tmp_path: Path, content: np.ndarray, reason: str) -> None:
    file = tmp_path / "a.b2nd"
    blosc2.asarray(content, urlpath=str(file))
    with pytest.raises(MFMError, match=rf"E_SHORT_DATA  .*a\.b2nd: .*{reason}"):
        volumes.volume_shape(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "a.b2nd"
    os.mkfifo(file)
    with pytest.raises(MFMError, match=r"E_SHORT_DATA  .*not a regular file"):
        volumes.volume_shape(file)
