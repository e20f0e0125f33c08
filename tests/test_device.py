"""The device that a command runs on and the memory that it may use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mfm_nnunet import device


@pytest.fixture
def _limits_read_anew() -> Iterator[None]:
    device._memory_limits.cache_clear()
    yield
    device._memory_limits.cache_clear()


@pytest.mark.usefixtures("_limits_read_anew")
@pytest.mark.skipif(not Path("/proc/self/cgroup").is_file(), reason="needs control groups")
def test_the_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "0::" not in Path("/proc/self/cgroup").read_text():
        pytest.skip("no control groups of version 2")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "CONTROL_GROUPS", str(tmp_path))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, expected in (("max", physical), ("1000000", 1_000_000), (str(2 * physical), physical)):
        limit.write_text(f"{text}\n")
        device._memory_limits.cache_clear()
        assert device.available_memory() == expected


def test_without_an_answer_of_the_system_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf_names", {})
    assert device.available_memory() == sys.maxsize


def test_asking_for_the_memory_loads_no_torch() -> None:
    question = "import sys; from mfm_nnunet.images import integrity; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", question], check=True, timeout=120)
