"""Tiny networks on two busy cores: one thread is faster than two that wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    from mfm_nnunet import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "num_cores", lambda: 1)
        yield
