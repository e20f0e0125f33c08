"""Patches of whole cells, and the largest network that a budget holds."""

from __future__ import annotations

import math

import pytest

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import Sizing, family_named
from mfm_nnunet.models.primus import PRIMUS_SIZES
from mfm_nnunet.models.primus_family import size_trials
from mfm_nnunet.models.sizing import fit_budget, largest_patch, pad_to_multiple


def fake_memory(size: str, patch: tuple[int, ...], batch: int) -> int:
    """Bytes that grow with the network, the patch and the batch, as the real ones do."""
    weights = {"CPU": 1, "S": 10, "B": 40, "M": 60, "L": 130}[size]
    return weights * 10_000 + weights * math.prod(patch) * batch // 100


def size_primus(shape: tuple[int, ...], budget: float) -> tuple[str, tuple[int, ...], int]:
    return fit_budget(size_trials(shape, (1, 1, 1)), budget / 2**30, fake_memory, "Primus")


@pytest.mark.parametrize(
    ("shape", "spacing", "max_voxels", "expected"),
    [
        ((36, 50, 35), (1, 1, 1), 129_024, (40, 56, 40)),  # the whole image
        ((155, 240, 200), (1, 1, 1), 160**3, (160, 160, 160)),
        ((60, 400, 400), (5, 1, 1), 64**3, (16, 120, 120)),  # as cubic in mm as tokens allow
        ((500, 500), (1, 1), 192 * 192, (192, 192)),
        ((3, 3, 3), (1, 1, 1), 10**6, (8, 8, 8)),
        ((900, 900, 900), (1, 1, 1), 100, (8, 8, 8)),  # never less than a token
    ],
)
def test_token_patches(
    shape: tuple[int, ...], spacing: tuple[float, ...], max_voxels: int, expected: tuple[int, ...]
) -> None:
    patch = largest_patch(shape, spacing, 8, max_voxels)
    assert all(edge % 8 == 0 for edge in patch)
    assert patch == expected


@pytest.mark.parametrize(
    ("budget", "size", "is_whole"),
    [
        (2.6e6, "L", True),
        (2.5e6, "M", True),
        (1.1e6, "B", True),
        (2.1e5, "S", True),
        (1.8e5, "S", False),  # a smaller patch before a smaller network
        (1.5e5, "CPU", True),
        (1.5e4, "CPU", False),
    ],
)
def test_the_largest_primus_that_fits(budget: float, size: str, is_whole: bool) -> None:
    shape = (64, 80, 96)
    found, patch, batch = size_primus(shape, budget)
    assert found == size
    assert (patch == shape) == is_whole
    assert fake_memory(found, patch, batch) <= budget < fake_memory(found, patch, batch + 1)
    if not is_whole:  # it is no smaller than it must be
        assert budget < fake_memory(found, patch, 2) * 1.1


def test_a_budget_below_every_primus_is_refused_with_what_is_needed() -> None:
    needed = fake_memory("CPU", (32, 32, 32), 2)
    with pytest.raises(MFMError, match=r"patch 32 x 32 x 32") as caught:
        size_primus((64, 80, 96), needed - 1)
    assert caught.value.code == "E_CONFIG"
    assert size_primus((64, 80, 96), needed)[1] == (32, 32, 32)


@pytest.mark.parametrize(
    ("shape", "patch", "batch"),
    [((36, 50, 35), (40, 56, 40), 2), ((50, 35), (56, 40), 16), ((512, 512), (192, 192), 4)],
)
def test_the_cpu_primus_takes_small_pictures_several_at_a_time(
    shape: tuple[int, ...], patch: tuple[int, ...], batch: int
) -> None:
    sizing = Sizing("primus", shape, (1.0,) * len(shape), None, 1, 2, stock={})
    planned = family_named("primus").plan_network(sizing)
    assert (planned.patch_size, planned.batch_size) == (patch, batch)
    assert planned.architecture["arch_kwargs"]["embed_dim"] == PRIMUS_SIZES["CPU"]["embed_dim"]


def test_padding_gives_at_least_one_multiple() -> None:
    assert [pad_to_multiple(size, 8) for size in (0.4, 1, 8, 8.5, 17)] == [8, 8, 8, 16, 24]
