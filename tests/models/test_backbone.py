"""Backbones of tokens and of U-Nets: what is dropped is what the mask says, heads and samples stay apart.

The traps of the published code are tests here: loss mask transposed against the tokens, rotary positions of sample i
used for head i, drop path on in validation, a mask token that cannot learn. ``test_families.py`` has what all backbones
share.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.networks import build_network
from mfm_nnunet.models.tokens import TokenBackbone
from mfm_nnunet.tasks.masks import draw_hidden
from tests.builders.tiny_plans import NETWORKS, tiny_backbone, tiny_plans

PATCH, FLAT = (24, 32, 40), (24, 40)
"""With tokens of 8 voxels grids of (3, 4, 5) and (3, 5)."""
PRIMUS = ["primus", "primus_v2", "primus_v3"]


def hidden_mask(patch: tuple[int, ...], batch: int, ratio: float = 0.75) -> Tensor:
    cell = (8,) * len(patch)
    return torch.from_numpy(np.stack([draw_hidden(patch, cell, ratio, np.random.default_rng(i)) for i in range(batch)]))


def token_backbone(network: str = "primus", patch: tuple[int, ...] = PATCH, **changes: Any) -> TokenBackbone:
    backbone = tiny_backbone(network, patch, **changes)
    assert isinstance(backbone, TokenBackbone)
    return backbone.eval()


# Tokens


@pytest.mark.parametrize("patch", [PATCH, FLAT])
def test_mask_and_tokens_agree_on_a_non_cubic_grid(patch: tuple[int, ...]) -> None:
    backbone = token_backbone(patch=patch)
    hidden = hidden_mask(patch, 3)
    visible = backbone.visible_tokens(hidden)
    grid = tuple(size // 8 for size in patch)
    assert backbone.mask_cell() == backbone.crop_cell() == (8,) * len(patch)
    places = list(itertools.product(*(range(n) for n in grid)))  # axis 0 outermost, as DNA >= 0.4.3 flattens
    for sample in range(3):
        kept = {places[t] for t in visible[sample].tolist()}
        for place in places:
            corner = hidden[(sample, 0, *(8 * i for i in place))]
            assert bool(corner) == (place not in kept)
    assert visible.shape == (3, len(places) - int(0.75 * len(places)))
    assert (visible.diff(dim=1) > 0).all()


def test_each_token_comes_from_its_own_voxels() -> None:
    """The embedding of token t changes exactly when voxels of cell t change: mask and token order are one."""
    backbone = token_backbone()
    embed = backbone.network.down_projection
    x = torch.randn(1, 1, *PATCH)
    before = embed(x).flatten(2)
    for token in (0, 1, 7, 33, 59):
        hidden = torch.ones(1, 1, 3, 4, 5, dtype=torch.bool)
        hidden.view(-1)[token] = False
        voxels = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        assert backbone.visible_tokens(voxels).tolist() == [[token]]
        after = embed(torch.where(voxels, x, x + 1)).flatten(2)
        changed = (after - before).abs().amax(1)[0] > 0
        assert changed.nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_dropping_equals_attention_among_the_visible_of_each_sample_alone(batch: int) -> None:
    """Batch == heads is the case that DNA confuses silently; here each sample gives what it gives on its own."""
    backbone = token_backbone(eva_numheads=2)
    x, hidden = torch.randn(batch, 1, *PATCH), hidden_mask(PATCH, batch)
    visible, eva = backbone.visible_tokens(hidden), backbone.network.eva
    with torch.no_grad():
        together = backbone.encode(x, visible)
        for i in range(batch):
            # The table of rotary positions (V, d) has no batch axis.
            tokens = backbone.network.down_projection(x[[i]]).flatten(2).transpose(1, 2) + eva.pos_embed
            tokens = tokens[:, visible[i]]
            for block in eva.blocks:
                tokens = block(tokens, rope=eva.rope.get_embed()[visible[i]])
            torch.testing.assert_close(together[[i]], eva.norm(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", PRIMUS)
@pytest.mark.parametrize("patch", [PATCH, FLAT])
def test_with_nothing_hidden_the_encoder_is_the_plain_one(network: str, patch: tuple[int, ...]) -> None:
    dropping, replacing = (token_backbone(network, patch, restoring=kind) for kind in ("drop", "replace"))
    x, nothing = torch.randn(2, 1, *patch), torch.zeros(2, 1, *patch, dtype=torch.bool)
    close = {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        built = dropping.network
        plain, _ = built.eva(built.down_projection(x).flatten(2).transpose(1, 2))
        grid = plain.transpose(1, 2).reshape(2, -1, *(size // 8 for size in patch))
        torch.testing.assert_close(dropping.encode(x, dropping.visible_tokens(nothing)), plain, **close)
        torch.testing.assert_close(dropping.encode(x), plain, **close)
        torch.testing.assert_close(dropping.features(x)[0], grid, **close)
        torch.testing.assert_close(built.up_projection(grid), dropping(x), **close)
        torch.testing.assert_close(replacing.restore(x, nothing), replacing(x), **close)


@pytest.mark.parametrize("network", PRIMUS)
def test_hidden_tokens_never_enter_and_are_filled_with_the_mask_token_in_their_places(network: str) -> None:
    backbone = token_backbone(network)
    hidden, x = hidden_mask(PATCH, 2), torch.randn(2, 1, *PATCH)
    entered: list[Tensor] = []
    for module in (backbone.network.eva.blocks[0], backbone.token_decoder):
        module.register_forward_pre_hook(lambda module, inputs: entered.append(inputs[0]))
    filled = x.masked_fill(hidden, 0)
    with torch.no_grad():
        backbone.restore(x, hidden)
        encoded = backbone.encode(filled, backbone.visible_tokens(hidden))
    assert entered[0].shape[1] == 60 - 45
    is_hidden = hidden[:, 0, ::8, ::8, ::8].flatten(1)
    assert (entered[1][is_hidden] == backbone.mask_token).all()
    assert torch.equal(entered[1][~is_hidden], encoded.flatten(0, 1))
    # The stems of V2 and V3 look beyond their token: without filling, the visible would know what is hidden.
    with torch.no_grad():
        leak = backbone.encode(torch.where(hidden, 100.0, x), backbone.visible_tokens(hidden)) - encoded
    assert (leak.abs().max() > 1e-3) == (network != "primus")


def test_mask_token_and_every_new_weight_learn() -> None:
    backbone = token_backbone().train()
    backbone.restore(torch.randn(2, 1, *PATCH), hidden_mask(PATCH, 2)).square().mean().backward()
    assert 0 < backbone.mask_token.detach().abs().max() < 1e-4
    assert len(backbone.token_decoder.blocks) == 2
    for name, weight in backbone.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("restoring", ["drop", "replace"])
def test_drop_path_only_in_train_mode(restoring: Any) -> None:
    backbone = token_backbone(drop_path_rate=0.5, restoring=restoring)
    x, hidden = torch.randn(4, 1, *PATCH), hidden_mask(PATCH, 4)
    for mode, same in ((True, False), (False, True)):
        backbone.train(mode)
        with torch.no_grad():
            assert torch.equal(backbone.restore(x, hidden), backbone.restore(x, hidden)) is same


def test_masks_and_crops_that_tokens_cannot_follow_are_refused() -> None:
    backbone = token_backbone()
    with pytest.raises(AssertionError, match="cuts through"):
        backbone.visible_tokens(hidden_mask(PATCH, 1).roll(1, dims=2))
    with pytest.raises(AssertionError, match="different numbers"):
        backbone.visible_tokens(torch.cat([hidden_mask(PATCH, 1, 0.75), hidden_mask(PATCH, 1, 0.5)]))
    with pytest.raises(AssertionError, match="is not in"):
        backbone.features(torch.randn(1, 1, 32, 32, 40))


@pytest.mark.parametrize(
    ("patch", "crop", "lower"),
    [
        (PATCH, (8, 16, 24), (1, 1, 1)),
        (PATCH, (16, 32, 8), (0, 0, 2)),
        (PATCH, PATCH, (0, 0, 0)),
        (FLAT, (8, 16), (1, 1)),
    ],
)
@pytest.mark.parametrize("is_rotary_only", [False, True])
def test_a_small_crop_is_the_middle_of_a_patch_of_which_the_rest_was_dropped(
    patch: tuple[int, ...], crop: tuple[int, ...], lower: tuple[int, ...], is_rotary_only: bool
) -> None:
    backbone = token_backbone(patch=patch)
    if is_rotary_only:
        backbone.network.eva.pos_embed = None
    x = torch.randn(3, 1, *patch)
    inside = tuple(slice(8 * low, 8 * low + side) for low, side in zip(lower, crop))
    hidden = torch.ones(3, 1, *patch, dtype=torch.bool)
    hidden[(slice(None), slice(None), *inside)] = False
    with torch.no_grad():
        (features,) = backbone.features(x[(slice(None), slice(None), *inside)])
        kept = backbone.encode(x, backbone.visible_tokens(hidden))
        torch.testing.assert_close(features.flatten(2).transpose(1, 2), kept, rtol=1e-5, atol=1e-5)
    assert features.shape[2:] == tuple(side // 8 for side in crop)


@pytest.mark.parametrize("name", ["Primus", "PrimusV2", "PrimusV3"])
def test_dnas_own_primus_leaks_nothing_either(name: str) -> None:
    patch = NETWORKS["primus"].uneven
    plans = tiny_plans("primus", patch)
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = (
        f"dynamic_network_architectures.architectures.primus.{name}"
    )
    backbone = make_backbone(build_network(plans, "3d_fullres", 1, 1), patch, "drop").eval()
    assert backbone.mask_cell() == (8, 8, 8)
    hidden, x = hidden_mask(patch, 2, 0.5), torch.randn(2, 1, *patch)
    with torch.no_grad():
        changed = backbone.restore(torch.where(hidden, x + 5, x), hidden)
        assert torch.equal(backbone.restore(x, hidden), changed)


# U-Nets


def test_unets_see_the_fill_value_and_keep_their_skips() -> None:
    backbone = tiny_backbone("resenc", PATCH).eval()
    x, hidden = torch.randn(1, 1, *PATCH), hidden_mask(PATCH, 1)
    with torch.no_grad():
        assert torch.equal(backbone.restore(x, hidden, -2.0), backbone(x.masked_fill(hidden, -2.0)))
        assert not torch.equal(backbone.restore(x, hidden, -2.0), backbone.restore(x, hidden))
        assert torch.equal(backbone.restore(x, torch.zeros_like(hidden)), backbone(x))
        assert all(map(torch.equal, backbone.features(x), backbone.network.encoder(x)))
    assert (backbone.mask_cell(), backbone.crop_cell()) == ((1, 1, 1), (4, 4, 4))


def test_unused_output_layers_are_not_trained() -> None:
    backbone = tiny_backbone("resenc", PATCH)
    frozen = {name for name, weight in backbone.network.named_parameters() if not weight.requires_grad}
    assert frozen == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
