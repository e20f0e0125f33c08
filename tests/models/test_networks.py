"""The network of a plan, and nothing that is no network; ``test_families.py`` compares it with nnU-Net's factory's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models.families import family_of
from mfm_nnunet.models.networks import build_network
from tests.builders.tiny_plans import CONFIGURATION, tiny_network, tiny_plans

PATCH = (16, 24, 16)


def plans_with(**changes: Any) -> dict[str, Any]:
    plans = tiny_plans("resenc", PATCH)
    plans["configurations"][CONFIGURATION]["architecture"].update(changes)
    return plans


def test_dnas_primus_which_knows_no_deep_supervision() -> None:
    plans = tiny_plans("primus", PATCH)
    name = "dynamic_network_architectures.architectures.primus.Primus"
    plans["configurations"][CONFIGURATION]["architecture"]["network_class_name"] = name
    network = build_network(plans, CONFIGURATION, 1, 2, deep_supervision=False)
    assert network(torch.zeros(1, 1, *PATCH)).shape == (1, 2, *PATCH)


@pytest.mark.parametrize(
    "name", ["os.system", "torch.nn.Conv3d", "mfm_nnunet.models.primus.PrimusSeg.x", "Evil", "", None, 3, ["a"]]
)
def test_a_class_that_is_no_network_is_refused_and_not_imported(name: Any) -> None:
    with pytest.raises(MFMError, match="E_MODEL_UNSAFE"):
        build_network(plans_with(network_class_name=name), CONFIGURATION, 1, 2)


@pytest.mark.parametrize(
    "value", ["os.system", "torch.nn.Module", "torch.nn.Conv3d.x", "torch.nn.utils.Conv3d", 7, ["a"]]
)
def test_an_argument_that_is_no_layer_is_refused(value: Any) -> None:
    with pytest.raises(MFMError, match="E_MODEL_UNSAFE"):
        build_network(tiny_plans("resenc", PATCH, norm_op=value), CONFIGURATION, 1, 2)


def test_a_class_that_would_run_code_when_imported_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MFMError, match="trap_module"):
        build_network(tiny_plans("resenc", PATCH, conv_op="trap_module.Conv3d"), CONFIGURATION, 1, 2)


def test_networks_of_one_stage_and_unknown_configurations_are_refused() -> None:
    with pytest.raises(MFMError, match=r"E_CONFIG.*one stage"):
        build_network(tiny_plans("resenc", PATCH, n_stages=1), CONFIGURATION, 1, 2)
    with pytest.raises(MFMError, match=r"E_CONFIG.*Did you mean '3d_fullres'"):
        build_network(tiny_plans("resenc", PATCH), "3d_fulres", 1, 2)


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
