"""The device of a command: how much memory it may use, and where bf16 is refused or slow."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mfm_nnunet import device
from mfm_nnunet.device import require_sound_bf16, warn_of_slow_bf16
from mfm_nnunet.errors import MFMError
from tests.builders.tiny_plans import tiny_network

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("slices", [2, 3, 4, 5, 8])
def test_two_slices_on_a_feature_map_are_refused(slices: int) -> None:
    """The tiny U-Net halves twice: two slices at its first, second or third stage."""
    size = (slices, 16, 16)
    with pytest.raises(MFMError, match=r"pretrain\.precision=fp32"):
        require_sound_bf16(tiny_network("resenc", (16, 16, 16)), size, CPU, "pretrain.precision")


def test_what_is_not_concerned() -> None:
    unet = tiny_network("resenc", (16, 16, 16))
    require_sound_bf16(unet, (16, 8, 8), CPU, "x")  # four slices at the coarsest stage; the other axes do not matter
    flat = tiny_network("resenc", (8, 16, 16), kernel_sizes=[[1, 3, 3]] * 3)
    require_sound_bf16(flat, (8, 16, 16), CPU, "x")
    require_sound_bf16(unet, (4, 16, 16), torch.device("cuda"), "x")
    require_sound_bf16(tiny_network("resenc", (16, 16)), (8, 8), CPU, "x")
    require_sound_bf16(tiny_network("primus", (16, 16, 16)), (16, 16, 16), CPU, "x")


@pytest.mark.parametrize("slices", [1, 3, 4])
def test_other_sizes_are_right_in_torch(slices: int) -> None:
    """If this fails the rule must grow; sizes of two are wrong at times only, so nothing can be asserted of them."""
    torch.manual_seed(0)
    convolution = nn.Conv3d(32, 32, 3, padding=1)
    x, weight = torch.randn(2, 32, slices, 4, 4), torch.randn(2, 32, slices, 4, 4)
    gradients = []
    for is_half in (False, True):
        convolution.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            (convolution(x).float() * weight).sum().backward()
        assert convolution.weight.grad is not None
        gradients.append(convolution.weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() < 0.05 * gradients[0].abs().max()


@pytest.mark.parametrize(
    ("kind", "capabilities", "warns"),
    [
        ("cpu", {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ("cpu", {"architecture": "x86_64", "avx512_bf16": True}, False),
        ("cpu", {"architecture": "x86_64", "amx_bf16": True}, False),
        ("cpu", {"architecture": "arm64"}, False),
        ("cuda", {"architecture": "x86_64"}, False),
    ],
)
def test_where_bf16_is_imitated_the_faster_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, capabilities: dict, warns: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    warn_of_slow_bf16(torch.device(kind), "pretrain.precision")
    assert ("pretrain.precision=fp32 is probably faster" in caplog.text) == warns
