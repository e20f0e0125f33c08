"""The checkpoint format: plain, safe, atomic, verified."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError, StoppedError

CONTENT = {"network_weights": {"a.weight": torch.arange(2000.0)}, "mfm": {"format": 1, "list": [1, "x", None, True]}}


def test_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    checkpoint.save(CONTENT, file)
    loaded = checkpoint.load_weights(file)
    assert torch.equal(loaded["network_weights"]["a.weight"], CONTENT["network_weights"]["a.weight"])
    assert loaded["mfm"] == CONTENT["mfm"]
    assert torch.load(file, weights_only=True)["mfm"]["format"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_only_plain_values_are_written(tmp_path: Path) -> None:
    for value in (np.float32(1), Path("x"), torch.device("cpu"), object()):
        with pytest.raises(AssertionError, match="not plain"):
            checkpoint.save({"network_weights": {}, "log": [value]}, tmp_path / "model.pth")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    file = tmp_path / "model.pth"
    checkpoint.save(CONTENT, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(MFMError) as error:
        checkpoint.load(file)
    assert error.value.code == ("E_EMPTY" if share == 0 else "E_MODEL_CORRUPT")
    assert str(file) in str(error.value)


def test_flipped_bits_in_the_weights_are_found(tmp_path: Path) -> None:
    file = tmp_path / "model.pth"
    checkpoint.save(CONTENT, file)
    whole = bytearray(file.read_bytes())
    start = bytes(whole).index(torch.arange(2000.0).numpy().tobytes()[400:800])
    for offset in range(0, 400, 37):
        damaged = bytearray(whole)
        damaged[start + offset] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(MFMError, match="E_MODEL_CORRUPT"):
            checkpoint.load(file)


@pytest.mark.parametrize("content", [b"\x80\x02M", b"\x80\x02.", b"\x80\x02}q\x00.", b"\x80\x99", b"\x80"])
def test_pickles_that_end_in_the_middle_of_anything_are_damaged(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    file.write_bytes(content)
    with pytest.raises(MFMError, match=r"E_MODEL_CORRUPT .*Copy it again"):
        checkpoint.load(file)


def test_compressed_members_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """A member of zeros of any size has few bytes when it is compressed."""
    file, small = tmp_path / "model.pth", tmp_path / "small.pth"
    checkpoint.save(CONTENT, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(MFMError, match=r"E_MODEL_CORRUPT .*compressed"):
        checkpoint.load(small)


def test_code_is_found_before_the_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of many gigabytes is refused as fast as a small one: only the list of its objects is read."""

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(tmp_path / "marker"),))

    torch.save({"network_weights": {"a": torch.zeros(3)}, "logging": Evil()}, tmp_path / "evil.pth")
    for what in ("torch.load", "zipfile.ZipFile.testzip"):
        monkeypatch.setattr(what, lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(MFMError, match="E_MODEL_UNSAFE"):
        checkpoint.load(tmp_path / "evil.pth")


def test_a_stop_while_reading_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.pth"
    checkpoint.save({"network_weights": {}}, file)

    def stopped(*arguments: object, **keywords: object) -> None:
        raise StoppedError(143, "stopped by SIGTERM")

    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(StoppedError):
        checkpoint.load(file)


def test_stock_checkpoints_with_numpy_scalars_load(tmp_path: Path) -> None:
    file = tmp_path / "stock.pth"
    torch.save({"network_weights": {}, "logging": {"ema": [np.float32(0.5), np.float64(0.25)]}}, file)
    assert checkpoint.load(file)["logging"]["ema"] == [0.5, 0.25]


def test_aliases_share_memory_after_copying() -> None:
    tensor = torch.rand(5)
    copied = checkpoint.cpu_weights({"a": tensor, "b": tensor, "c": tensor[:3]})
    assert copied["a"].data_ptr() == copied["b"].data_ptr()
    assert torch.equal(copied["c"], tensor[:3])
