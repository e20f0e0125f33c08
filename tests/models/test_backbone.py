"""Backbones: what is hidden has no influence, what is dropped is what the mask says, heads and samples stay apart.

The traps of the published code are tests here: loss mask transposed against the tokens, rotary positions of sample i
used for head i, drop path on in validation, a mask token that cannot learn.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.tokens import TokenBackbone
from mfm_nnunet.models.unet import UNetBackbone
from mfm_nnunet.tasks.masks import draw_hidden
from tests.builders.tiny_plans import tiny_backbone, tiny_network, tiny_plans

PATCH = (24, 32, 40)
"""With tokens of 8 voxels a grid of (3, 4, 5)."""
CASES = [("resenc", PATCH), ("primus", PATCH), ("resenc", (24, 40)), ("primus", (24, 40))]


def hidden_mask(patch: tuple[int, ...], batch: int, ratio: float = 0.75) -> Tensor:
    cell = (8,) * len(patch)
    return torch.stack(
        [torch.from_numpy(draw_hidden(patch, cell, ratio, np.random.default_rng(i))) for i in range(batch)]
    )


def token_backbone(patch: tuple[int, ...] = PATCH, **changes: int) -> TokenBackbone:
    backbone = tiny_backbone("primus", patch, **changes)
    assert isinstance(backbone, TokenBackbone)
    return backbone.eval()


@pytest.mark.parametrize(("family", "patch"), CASES)
@pytest.mark.parametrize("fill_value", [0.0, -3.0])
def test_what_is_hidden_has_no_influence_at_all(family: str, patch: tuple[int, ...], fill_value: float) -> None:
    backbone = tiny_backbone(family, patch, num_inputs=2, num_outputs=2).eval()
    hidden = hidden_mask(patch, 3)
    x, other = torch.randn(2, 3, 2, *patch)
    changed = torch.where(hidden, 100 * other, x)
    with torch.no_grad():
        a, b = (backbone.restore(image, hidden, fill_value) for image in (x, changed))
        assert (a - b).abs().max() == 0
        # ... and what is visible has, else the test above would hold for any constant.
        seen = torch.where(hidden, x, x + 0.1 * other)
        assert (backbone.restore(seen, hidden, fill_value) - a).abs().max() > 1e-4


def test_the_fill_value_is_what_convolutions_see() -> None:
    backbone = tiny_backbone("resenc", PATCH).eval()
    x, hidden = torch.randn(1, 1, *PATCH), hidden_mask(PATCH, 1)
    with torch.no_grad():
        assert torch.equal(backbone.restore(x, hidden, -2.0), backbone(x.masked_fill(hidden, -2.0)))
        assert not torch.equal(backbone.restore(x, hidden, -2.0), backbone.restore(x, hidden))


@pytest.mark.parametrize("patch", [PATCH, (24, 40)])
def test_mask_and_tokens_agree_on_a_non_cubic_grid(patch: tuple[int, ...]) -> None:
    backbone = token_backbone(patch)
    hidden = hidden_mask(patch, 3)
    visible = backbone.visible_tokens(hidden)
    grid = tuple(size // 8 for size in patch)
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


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_dropping_equals_attention_among_the_visible_of_each_sample_alone(batch: int) -> None:
    """Batch == heads is the case that DNA confuses silently; here each sample gives what it gives on its own."""
    backbone = token_backbone(eva_numheads=2)
    x, hidden = torch.randn(batch, 1, *PATCH), hidden_mask(PATCH, batch)
    visible = backbone.visible_tokens(hidden)
    with torch.no_grad():
        together = backbone.encode(x, visible)
        for i in range(batch):
            alone = _reference_encode(backbone, x[i : i + 1], visible[i])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def _reference_encode(backbone: TokenBackbone, x: Tensor, visible: Tensor) -> Tensor:
    """The plain encoder on the kept tokens of one sample; its table of rotary positions (V, d) has no batch axis."""
    eva = backbone.network.eva
    tokens = backbone.network.down_projection(x).flatten(2).transpose(1, 2) + eva.pos_embed
    tokens = tokens[:, visible]
    for block in eva.blocks:
        tokens = block(tokens, rope=eva.rope.get_embed()[visible])
    return eva.norm(tokens)


@pytest.mark.parametrize("patch", [PATCH, (24, 40)])
def test_with_nothing_hidden_the_encoder_is_the_plain_one(patch: tuple[int, ...]) -> None:
    backbone = token_backbone(patch)
    x = torch.randn(2, 1, *patch)
    nothing = torch.zeros(2, 1, *patch, dtype=torch.bool)
    with torch.no_grad():
        network = backbone.network
        tokens = network.down_projection(x).flatten(2).transpose(1, 2)
        plain, _ = network.eva(tokens)
        torch.testing.assert_close(backbone.encode(x, backbone.visible_tokens(nothing)), plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(backbone.encode(x), plain, rtol=1e-5, atol=1e-5)
        grid = plain.transpose(1, 2).reshape(2, -1, *(s // 8 for s in patch))
        torch.testing.assert_close(backbone.features(x)[0], grid, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(network.up_projection(grid), backbone(x), rtol=1e-5, atol=1e-5)


def test_hidden_places_are_filled_with_the_mask_token_in_the_right_place() -> None:
    backbone = token_backbone()
    hidden = hidden_mask(PATCH, 2)
    seen: list[Tensor] = []
    backbone.token_decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        x = torch.randn(2, 1, *PATCH)
        backbone.restore(x, hidden)
        encoded = backbone.encode(x, backbone.visible_tokens(hidden))
    is_hidden = hidden[:, 0, ::8, ::8, ::8].flatten(1)
    assert (seen[0][is_hidden] == backbone.mask_token).all()
    assert torch.equal(seen[0][~is_hidden], encoded.flatten(0, 1))


def test_mask_token_and_every_new_weight_learn() -> None:
    backbone = token_backbone().train()
    backbone.restore(torch.randn(2, 1, *PATCH), hidden_mask(PATCH, 2)).square().mean().backward()
    assert 0 < backbone.mask_token.detach().abs().max() < 1e-4
    for name, weight in backbone.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_drop_path_only_in_train_mode() -> None:
    backbone = tiny_backbone("primus", PATCH, drop_path_rate=0.5)
    x, hidden = torch.randn(4, 1, *PATCH), hidden_mask(PATCH, 4)
    for mode, same in ((True, False), (False, True)):
        backbone.train(mode)
        with torch.no_grad():
            assert torch.equal(backbone.restore(x, hidden), backbone.restore(x, hidden)) is same


def test_masks_that_tokens_cannot_follow_are_refused() -> None:
    backbone = token_backbone()
    through_tokens = hidden_mask(PATCH, 1).roll(1, dims=2)
    with pytest.raises(AssertionError, match="cuts through"):
        backbone.visible_tokens(through_tokens)
    uneven = torch.cat([hidden_mask(PATCH, 1, 0.75), hidden_mask(PATCH, 1, 0.5)])
    with pytest.raises(AssertionError, match="different numbers"):
        backbone.visible_tokens(uneven)


def test_new_weights_are_made_only_when_needed_and_never_part_of_the_network() -> None:
    plain = make_backbone(tiny_network("primus", PATCH), PATCH, "none")
    restoring = make_backbone(tiny_network("primus", PATCH), PATCH, "drop")
    assert {name.split(".")[0] for name, _ in plain.named_parameters()} == {"network"}
    assert {name.split(".")[0] for name, _ in restoring.named_parameters()} == {
        "network",
        "token_decoder",
        "mask_token",
    }
    assert list(plain.network.state_dict()) == list(restoring.network.state_dict())
    assert len(restoring.token_decoder.blocks) == 2


@pytest.mark.parametrize(("family", "patch"), CASES)
def test_features_fine_to_coarse_mask_cell_and_inputs(family: str, patch: tuple[int, ...]) -> None:
    backbone = tiny_backbone(family, patch, num_inputs=3)
    assert backbone.num_inputs == 3
    assert backbone.family.name == family
    assert isinstance(backbone, UNetBackbone if family == "resenc" else TokenBackbone)
    features = backbone.features(torch.randn(2, 3, *patch))
    strides = [1, 2, 4] if family == "resenc" else [8]
    assert [tuple(f.shape[2:]) for f in features] == [tuple(s // k for s in patch) for k in strides]
    assert backbone.mask_cell() == (1 if family == "resenc" else 8,) * len(patch)


@pytest.mark.parametrize(("family", "patch"), CASES)
def test_features_of_a_whole_patch_are_the_plain_encoders(family: str, patch: tuple[int, ...]) -> None:
    backbone = tiny_backbone(family, patch).eval()
    network: Any = backbone.network
    x = torch.randn(2, 1, *patch)
    with torch.no_grad():
        if family == "resenc":
            plain = network.encoder(x)
        else:
            tokens, _ = network.eva(network.down_projection(x).flatten(2).transpose(1, 2))
            plain = [tokens.transpose(1, 2).reshape(2, -1, *(size // 8 for size in patch))]
        for found, expected in zip(backbone.features(x), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("patch", "crop", "lower"),
    [
        (PATCH, (8, 16, 24), (1, 1, 1)),
        (PATCH, (16, 32, 8), (0, 0, 2)),
        (PATCH, PATCH, (0, 0, 0)),
        ((24, 40), (8, 16), (1, 1)),
    ],
)
@pytest.mark.parametrize("is_rotary_only", [False, True])
def test_a_small_crop_is_the_middle_of_a_patch_of_which_the_rest_was_dropped(
    patch: tuple[int, ...], crop: tuple[int, ...], lower: tuple[int, ...], is_rotary_only: bool
) -> None:
    backbone = token_backbone(patch)
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


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_sizes_of_crops_that_features_can_see(family: str) -> None:
    backbone = tiny_backbone(family, PATCH)
    assert backbone.crop_cell() == backbone.geometry().crop_cell == ((4,) * 3 if family == "resenc" else (8,) * 3)
    assert backbone.feature_widths() == [feature.shape[1] for feature in backbone.features(torch.randn(1, 1, *PATCH))]
    if family == "primus":
        with pytest.raises(AssertionError, match="is not in"):
            backbone.features(torch.randn(1, 1, 32, 32, 40))


def test_a_frozen_decoder_leaves_the_encoder_to_train() -> None:
    for family in ("resenc", "primus"):
        backbone = tiny_backbone(family, PATCH, restoring="none")
        backbone.freeze_decoder()
        trained = {name for name, weight in backbone.named_parameters() if weight.requires_grad}
        assert trained == {f"network.{name}" for name in family_of(backbone.network).encoder_names(backbone.network)}
        sum(feature.square().mean() for feature in backbone.features(torch.randn(2, 1, *PATCH))).backward()
        assert all(weight.grad is not None for weight in backbone.parameters() if weight.requires_grad)


def test_skips_are_kept_when_restoring() -> None:
    """With nothing hidden, restoring is the plain U-Net with its skips."""
    backbone = tiny_backbone("resenc", PATCH).eval()
    x, nothing = torch.randn(1, 1, *PATCH), torch.zeros(1, 1, *PATCH, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(backbone.restore(x, nothing), backbone(x))


def test_unused_output_layers_are_not_trained() -> None:
    backbone = tiny_backbone("resenc", PATCH)
    frozen = {name for name, weight in backbone.network.named_parameters() if not weight.requires_grad}
    assert frozen == {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}


@pytest.mark.parametrize("name", ["Primus", "PrimusV2", "PrimusV3"])
def test_dnas_own_primus_leaks_nothing_either(name: str) -> None:
    """The stems of V2 and V3 look beyond their token."""
    from mfm_nnunet.models.networks import build_network

    patch = (16, 24, 16)
    plans = tiny_plans("primus", patch)
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = (
        f"dynamic_network_architectures.architectures.primus.{name}"
    )
    backbone = make_backbone(build_network(plans, "3d_fullres", 1, 1), patch, "drop").eval()
    assert backbone.mask_cell() == (8, 8, 8)
    hidden = hidden_mask(patch, 2, 0.5)
    x = torch.randn(2, 1, *patch)
    with torch.no_grad():
        changed = backbone.restore(torch.where(hidden, x + 5, x), hidden)
        assert torch.equal(backbone.restore(x, hidden), changed)
