"""PrimusSeg: it is DNA's Primus where it should be, and its decoder is the same for every number of outputs."""

from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.primus import (
    PRIMUS_SIZES,
    REFERENCE_OUTPUTS,
    PatchDecoder,
    PrimusSeg,
    decoder_widths,
    primus_kwargs,
)

PATCH = (24, 32, 40)
ARGUMENTS = {"embed_dim": 48, "patch_embed_size": (8, 8, 8), "input_shape": PATCH, "eva_depth": 2, "eva_numheads": 2}


def test_equals_dna_with_the_same_weights_and_as_many_outputs_as_the_reference() -> None:
    theirs = Primus(
        input_channels=2, num_classes=REFERENCE_OUTPUTS, init_values=0.1, scale_attn_inner=True, **ARGUMENTS
    )
    ours = PrimusSeg(2, REFERENCE_OUTPUTS, **ARGUMENTS)
    weights = theirs.state_dict()
    del weights["mask_token"]
    ours.load_state_dict(weights)
    x = torch.randn(1, 2, *PATCH)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_only_the_last_layer_depends_on_the_number_of_outputs() -> None:
    shapes = [{name: p.shape for name, p in PrimusSeg(1, k, **ARGUMENTS).named_parameters()} for k in (1, 2, 17)]
    for other in shapes[1:]:
        changed = {name for name in other if other[name] != shapes[0][name]}
        assert changed == {"up_projection.decode.2.weight", "up_projection.decode.2.bias"}


@pytest.mark.parametrize("token", [(8, 8, 8), (4, 8, 8), (16, 16, 16), (1, 4, 4), (2, 2, 2)])
def test_decoder_is_dnas_for_the_reference_number_of_outputs(token: tuple[int, ...]) -> None:
    ours, theirs = PatchDecoder(token, 864, REFERENCE_OUTPUTS), PatchDecode(token, 864, REFERENCE_OUTPUTS)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert tuple(ours(torch.zeros(1, 864, 1, 1, 1)).shape) == (1, REFERENCE_OUTPUTS, *token)


def test_published_widths_of_primus_m() -> None:
    assert decoder_widths(864, 3) == [864, 192, 48]


def test_initialisation_is_he_once() -> None:
    torch.manual_seed(0)
    network = PrimusSeg(1, 2, **{**ARGUMENTS, "embed_dim": 192})
    gain = (2 / (1 + 1e-4)) ** 0.5
    stem = network.down_projection.proj
    assert stem.weight.std().item() == pytest.approx(gain / 512**0.5, rel=0.05)
    assert not stem.bias.any()
    for layer in (network.up_projection.decode[0][0], network.up_projection.decode[2]):
        assert layer.weight.std().item() == pytest.approx(gain / layer.in_channels**0.5, rel=0.15)
        assert not layer.bias.any()
    assert not hasattr(network, "initialize")  # else nnU-Net's factory would initialise a second time
    with torch.no_grad():
        assert 0.3 < network.eval()(torch.randn(1, 1, *PATCH)).std() < 3


@pytest.mark.parametrize("num_axes", [2, 3])
@pytest.mark.parametrize("size", PRIMUS_SIZES)
def test_every_size_can_be_built(size: str, num_axes: int) -> None:
    with torch.device("meta"):
        network = PrimusSeg(
            1, 3, patch_embed_size=(8,) * num_axes, input_shape=(32,) * num_axes, **primus_kwargs(size, num_axes)
        )
        assert network(torch.zeros(1, 1, *(32,) * num_axes)).shape == (1, 3, *(32,) * num_axes)
    if num_axes == 3:
        assert primus_kwargs(size, 3) == PRIMUS_SIZES[size]
        if size == "CPU":
            assert 1e6 < sum(p.numel() for p in network.parameters()) < 3e6


def test_primus_m_has_the_published_number_of_encoder_weights() -> None:
    with torch.device("meta"):
        network = PrimusSeg(1, 2, patch_embed_size=(8,) * 3, input_shape=(160,) * 3, **PRIMUS_SIZES["M"])
    weights = network.state_dict()
    encoder = {name: w for name, w in weights.items() if name.startswith(("eva.", "down_projection."))}
    assert len(encoder) == 373
    assert sum(w.numel() for w in encoder.values()) == pytest.approx(151.0e6, rel=0.001)
    assert weights["eva.pos_embed"].shape == (1, 8000, 864)
    assert set(weights) - set(encoder) == {n for n in weights if n.startswith("up_projection.")}


def test_2d_and_flat_patches_and_deep_supervision() -> None:
    flat = PrimusSeg(1, 2, 48, (4, 8, 8), (8, 24, 16), 1, 2, deep_supervision=True)
    assert flat(torch.zeros(2, 1, 8, 24, 16)).shape == (2, 2, 8, 24, 16)
    plane = PrimusSeg(3, 2, 48, (8, 8), (24, 32), 1, 4)
    assert plane(torch.zeros(2, 3, 24, 32)).shape == (2, 2, 24, 32)


def test_2d_positions_are_of_both_axes() -> None:
    rotary = PrimusSeg(1, 1, 48, (8, 8), (24, 32), 1, 2).eva.rope.get_embed()
    assert rotary.shape == (12, 48)
    assert len({tuple(row.tolist()) for row in rotary}) == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"embed_dim": 50},
        {"eva_numheads": 5},
        {"input_shape": (24, 32, 41)},
        {"patch_embed_size": (6, 8, 8)},
        {"patch_embed_size": (8, 8)},
        {"patch_embed_size": (1, 1, 1)},
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict) -> None:
    with pytest.raises(MFMError, match="E_CONFIG"):
        PrimusSeg(1, 2, **{**ARGUMENTS, **changes})


def test_another_patch_is_refused() -> None:
    with pytest.raises(AssertionError):
        PrimusSeg(1, 2, **ARGUMENTS)(torch.zeros(1, 1, 32, 32, 40))
