"""The network of a plan: nnU-Net's own, and nothing that is no network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.networks import build_network
from tests.builders.tiny_plans import CONFIGURATION, tiny_network, tiny_plans

PATCH = (16, 24, 16)


@pytest.mark.parametrize("family", ["resenc", "primus"])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_is_the_network_of_nnunets_factory(family: str, deep_supervision: bool) -> None:
    plans = tiny_plans(family, PATCH)
    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    torch.manual_seed(3)
    ours = build_network(plans, CONFIGURATION, 2, 3, deep_supervision)
    torch.manual_seed(3)
    theirs = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        2,
        3,
        deep_supervision=deep_supervision,
    )
    assert type(ours) is type(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
    output = ours(torch.zeros(1, 2, *PATCH))
    assert isinstance(output, list) == (deep_supervision and family == "resenc")


def test_dnas_primus_which_knows_no_deep_supervision() -> None:
    plans = tiny_plans("primus", PATCH)
    name = "dynamic_network_architectures.architectures.primus.Primus"
    plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"] = name
    network = build_network(plans, CONFIGURATION, 1, 2, deep_supervision=False)
    assert network(torch.zeros(1, 1, *PATCH)).shape == (1, 2, *PATCH)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "torch.nn.Conv3d",
        "mfm_nnunet.models.primus.PrimusSeg.x",
        "Evil",
        "",
        None,
        3,
        ["a"],
    ],
)
def test_a_class_that_is_no_network_is_refused_and_not_imported(name: Any) -> None:
    plans = tiny_plans("resenc", PATCH)
    plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"] = name
    with pytest.raises(MFMError, match="E_MODEL_UNSAFE"):
        build_network(plans, CONFIGURATION, 1, 2)


@pytest.mark.parametrize(
    "value", ["os.system", "torch.load", "torch.nn.Module", "torch.nn.Conv3d.x", "torch.nn.utils.Conv3d", 7, ["a"]]
)
def test_an_argument_that_is_no_layer_is_refused(value: Any) -> None:
    with pytest.raises(MFMError, match="E_MODEL_UNSAFE"):
        build_network(tiny_plans("resenc", PATCH, norm_op=value), CONFIGURATION, 1, 2)


def test_a_class_that_would_run_code_when_imported_is_not(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    plans = tiny_plans("resenc", PATCH, conv_op="trap_module.Conv3d")
    with pytest.raises(MFMError, match="trap_module"):
        build_network(plans, CONFIGURATION, 1, 2)


def test_a_network_of_one_stage_is_refused() -> None:
    plans = tiny_plans("resenc", PATCH, n_stages=1)
    with pytest.raises(MFMError, match="one stage") as caught:
        build_network(plans, CONFIGURATION, 1, 2)
    assert caught.value.code == "E_CONFIG"


def test_unknown_configuration_names_the_nearest() -> None:
    with pytest.raises(MFMError, match="Did you mean '3d_fullres'") as caught:
        build_network(tiny_plans("resenc", PATCH), "3d_fulres", 1, 2)
    assert caught.value.code == "E_CONFIG"


def test_encoder_and_head_of_a_unet() -> None:
    network = tiny_network("resenc", PATCH)
    names = dict(network.named_parameters())
    assert len(names) < len(network.state_dict())  # aliases
    assert family_of(network).head_names(network) == {
        f"decoder.seg_layers.{i}.{k}" for i in (0, 1) for k in ("weight", "bias")
    }
    encoder = family_of(network).encoder_names(network)
    assert sum(names[n].numel() for n in encoder) == sum(p.numel() for p in network.encoder.parameters())
    assert {n.split(".")[0] for n in set(names) - encoder} == {"decoder"}


def test_encoder_and_head_of_primus() -> None:
    network = tiny_network("primus", PATCH)
    names = set(dict(network.named_parameters()))
    assert family_of(network).head_names(network) == {"up_projection.decode.2.weight", "up_projection.decode.2.bias"}
    assert family_of(network).encoder_names(network) == {n for n in names if not n.startswith("up_projection.")}


@pytest.mark.parametrize("family", ["resenc", "primus"])
def test_nothing_but_the_head_depends_on_the_number_of_outputs(family: str) -> None:
    few, many = (tiny_network(family, PATCH, num_outputs=k) for k in (1, 9))
    changed = {n for (n, a), (_, b) in zip(few.named_parameters(), many.named_parameters()) if a.shape != b.shape}
    assert changed == family_of(few).head_names(few) == family_of(many).head_names(many)
