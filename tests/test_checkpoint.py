"""The checkpoint format: plain, safe, atomic, verified."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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


def test_malicious_file_runs_nothing(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.mkdir, (str(marker),))

    torch.save({"network_weights": Evil()}, file)
    with pytest.raises(MFMError) as error:
        checkpoint.load(file)
    assert error.value.code == "E_MODEL_UNSAFE"
    assert not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.99])
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


def test_foreign_files_are_named(tmp_path: Path) -> None:
    text = tmp_path / "notes.pth"
    text.write_text("hello")
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {}}, other)
    for file, code in ((text, "E_MODEL_CORRUPT"), (other, "E_MODEL_CORRUPT"), (tmp_path / "none.pth", "E_NOT_FOUND")):
        with pytest.raises(MFMError) as error:
            checkpoint.load_weights(file)
        assert error.value.code == code


@pytest.mark.parametrize("content", [b"\x80\x02M", b"\x80\x02.", b"\x80\x02}q\x00.", b"\x80\x99", b"\x80"])
def test_pickles_that_end_in_the_middle_of_anything_are_damaged(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "old.pth"
    file.write_bytes(content)
    with pytest.raises(MFMError, match="Copy it again") as error:
        checkpoint.load(file)
    assert error.value.code == "E_MODEL_CORRUPT"


def test_compressed_members_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """A member of zeros of any size has few bytes when it is compressed."""
    file, small = tmp_path / "model.pth", tmp_path / "small.pth"
    checkpoint.save(CONTENT, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(MFMError, match="compressed") as error:
        checkpoint.load(small)
    assert error.value.code == "E_MODEL_CORRUPT"


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


def test_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the write fail in the middle, as a full disk does."""
    file = tmp_path / "model.pth"
    checkpoint.save(CONTENT, file)
    before = file.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from mfm_nnunet import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    checkpoint.save({'network_weights': {'a': torch.zeros(10**6)}}, sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "E_DISK_FULL" in done.stdout, done.stdout + done.stderr
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_kill_during_save_leaves_a_whole_file(tmp_path: Path) -> None:
    """One process saves without pause and is killed; what is under the name always verifies."""
    file = tmp_path / "model.pth"
    code = (
        "import sys, torch\n"
        "from mfm_nnunet import checkpoint\n"
        "while True:\n"
        "    checkpoint.save({'network_weights': {'a': torch.rand(300_000)}}, sys.argv[1])\n"
    )
    for delay in (0.03, 0.011, 0.057):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)])
        while not file.exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        assert checkpoint.load_weights(file)["network_weights"]["a"].shape == (300_000,)


def test_aliases_share_memory_after_copying() -> None:
    tensor = torch.rand(5)
    copied = checkpoint.cpu_weights({"a": tensor, "b": tensor, "c": tensor[:3]})
    assert copied["a"].data_ptr() == copied["b"].data_ptr()
    assert torch.equal(copied["c"], tensor[:3])
