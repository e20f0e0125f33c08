"""SimMIM: mask tokens stand where the mask says, before positions are added, they learn, and nothing hidden leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfm_nnunet import checkpoint
from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.tokens import TokenBackbone
from mfm_nnunet.tasks.simmim import SimMIM, SimMIMConfig
from tests.builders import tiny_run
from tests.builders.tiny_plans import tiny_backbone

PATCH, TOKENS = (24, 32, 40), (8, 8, 8)
"""A grid of (3, 4, 5) tokens."""
PATCHES = [PATCH, (24, 40)]


def task_on(patch: tuple[int, ...] = PATCH, channels: int = 1, overlaps: bool = False, **settings: Any) -> SimMIM:
    backbone = tiny_backbone("primus", patch, channels, channels, restoring="replace")
    if overlaps:
        backbone.network.down_projection = nn.Conv3d(channels, 48, kernel_size=12, stride=8, padding=2)
    return SimMIM(SimMIM.resolve(SimMIMConfig(**settings), backbone.geometry()), backbone).eval()


def tokens_of(task: SimMIM) -> TokenBackbone:
    assert isinstance(task.backbone, TokenBackbone)
    return task.backbone


def batch_for(task: SimMIM, size: int = 3) -> dict[str, Tensor]:
    patch = task.backbone.patch_size
    transform = SimMIM.transform(task.config, patch)
    items = []
    for index in range(size):
        rng = np.random.default_rng(index)
        assert [(request.size, request.pad) for request in transform.requests(rng)] == [(patch, True)]
        crop = rng.standard_normal((task.backbone.num_inputs, *patch)).astype(np.float32)
        items.append(transform([crop], rng))
    return {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0]}


def inputs_of_blocks(task: SimMIM, batch: dict[str, Tensor]) -> Tensor:
    """The tokens (B, T, E) that enter the first block, with their positions."""
    seen: list[Tensor] = []
    handle = tokens_of(task).network.eva.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        task(batch)
    handle.remove()
    return seen[0]


# The network


@pytest.mark.parametrize("patch", PATCHES)
def test_mask_tokens_stand_at_the_hidden_places_before_positions_are_added(patch: tuple[int, ...]) -> None:
    task = task_on(patch)
    batch, backbone = batch_for(task), tokens_of(task)
    seen = inputs_of_blocks(task, batch)
    embedded = backbone.network.down_projection(batch["image"]).flatten(2).transpose(1, 2)
    hidden = batch["hidden"][(slice(None), 0, *(slice(None, None, 8),) * len(patch))].flatten(1)
    assert seen.shape == embedded.shape, "not all places go through the encoder"
    assert hidden.sum(1).tolist() == [int(0.75 * hidden.shape[1])] * 3
    expected = torch.where(hidden[..., None], backbone.mask_token, embedded) + backbone.network.eva.pos_embed
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("overlaps", [False, True], ids=["plain stem", "overlapping stem"])
@pytest.mark.parametrize("fill_value", [0.0, -3.0])
def test_what_is_hidden_has_no_influence_at_all(overlaps: bool, fill_value: float) -> None:
    task = task_on(channels=2, overlaps=overlaps, fill_value=fill_value)
    batch = batch_for(task)
    image, hidden, other = batch["image"], batch["hidden"], torch.randn(batch["image"].shape)
    with torch.no_grad():
        restored = task.backbone.restore(image, hidden, fill_value)
        changed = task.backbone.restore(torch.where(hidden, 100 * other, image), hidden, fill_value)
        assert (restored - changed).abs().max() == 0
        seen = task.backbone.restore(torch.where(hidden, image, image + 0.1 * other), hidden, fill_value)
        assert (seen - restored).abs().max() > 1e-4


def test_the_fill_value_is_seen_by_overlapping_stems_alone() -> None:
    for overlaps in (False, True):
        task = task_on(overlaps=overlaps)
        batch = batch_for(task)
        with torch.no_grad():
            first, second = (task.backbone.restore(batch["image"], batch["hidden"], value) for value in (0.0, -3.0))
        assert torch.equal(first, second) is not overlaps


@pytest.mark.parametrize("patch", PATCHES)
def test_with_nothing_hidden_it_is_the_plain_network(patch: tuple[int, ...]) -> None:
    backbone, image = tokens_of(task_on(patch)), torch.randn(2, 1, *patch)
    with torch.no_grad():
        restored = backbone.restore(image, torch.zeros_like(image, dtype=torch.bool))
        torch.testing.assert_close(restored, backbone(image), rtol=1e-5, atol=1e-5)


def test_the_mask_token_is_the_only_new_weight_and_learns() -> None:
    task = task_on().train()
    new = [name for name, _ in task.named_parameters() if not name.startswith("backbone.network.")]
    assert new == ["backbone.mask_token"]
    token = tokens_of(task).mask_token
    before = token.detach().clone()
    assert 0 < before.abs().max() < 1e-4
    task(batch_for(task)).loss.backward()
    assert token.grad is not None
    assert token.grad.abs().max() > 0
    torch.optim.AdamW([token], lr=1e-3).step()
    assert not torch.equal(token, before)


def test_drop_path_only_in_train_mode() -> None:
    backbone = tiny_backbone("primus", PATCH, restoring="replace", drop_path_rate=0.5)
    task = SimMIM(SimMIM.resolve(SimMIMConfig(), backbone.geometry()), backbone)
    batch = batch_for(task, 4)
    for mode, same in ((True, False), (False, True)):
        task.train(mode)
        with torch.no_grad():
            assert torch.equal(task(batch).loss, task(batch).loss) is same


# Masks


@pytest.mark.parametrize(("cell", "expected"), [(None, (8, 8, 8)), ((8,), (8, 8, 8)), ((24, 16, 8), (24, 16, 8))])
def test_cells_are_whole_tokens(cell: tuple[int, ...] | None, expected: tuple[int, ...]) -> None:
    task = task_on(cell_size=cell, mask_ratio=0.5)
    assert task.config.cell_size == expected
    hidden = batch_for(task)["hidden"]
    blocks = hidden.reshape(3, *(n for size, side in zip(PATCH, expected) for n in (size // side, side)))
    assert (blocks.all((2, 4, 6)) == blocks.any((2, 4, 6))).all()
    assert torch.isfinite(task({"image": torch.randn(3, 1, *PATCH), "hidden": hidden}).loss)


def test_unets_are_refused() -> None:
    with pytest.raises(MFMError, match="simmim needs a network with tokens"):
        SimMIM(SimMIMConfig(cell_size=TOKENS), tiny_backbone("resenc", PATCH))


def test_it_starts_and_ships_the_plain_network(tmp_path: Path) -> None:
    """The published SimMIM does not start."""
    short = ("pretrain.epochs=1", "pretrain.iterations_per_epoch=1", "num_workers=0")
    saved = checkpoint.load(tiny_run.run(tiny_run.prepare(tmp_path, "primus", 3), "simmim", short))
    assert list(saved["network_weights"]) == list(tiny_backbone("primus", (16, 16, 16)).network.state_dict())
    assert saved["mfm"]["pretext_config"] == {
        "mask_ratio": 0.75,
        "cell_size": [8, 8, 8],
        "loss": "mse",
        "fill_value": 0.0,
    }
