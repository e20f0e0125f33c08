"""The registry of networks, and the questions that all families answer."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models import families
from mfm_nnunet.models.families import BUILT_IN, all_families, families_by_class, family_named, family_of, network_names
from mfm_nnunet.models.unet import OLD_RESENC
from tests.builders.tiny_plans import tiny_network

PACKAGE = Path(families.__file__).parent.parent


def test_names_are_known_without_torch() -> None:
    code = (
        "import sys; from mfm_nnunet.models import families as f; f.network_names(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("network", BUILT_IN)
def test_a_network_is_planned_under_its_name(network: str) -> None:
    family = family_named(network)
    assert family_named(family.name) is family
    expected = {"resenc": "mfmPlans", "primus": "mfmPrimusPlans", "swin": "mfmSwinPlans"}
    assert family.plans_name(network) == expected.get(network, f"mfmPrimusV{network[-1]}Plans")


def test_an_unknown_network_is_refused_with_the_nearest() -> None:
    with pytest.raises(MFMError, match="resenc") as caught:
        family_named("resnec")
    assert caught.value.code == "E_CONFIG"


def test_a_network_of_no_family_is_refused() -> None:
    with pytest.raises(MFMError) as caught:
        family_of(nn.Linear(2, 2))
    assert caught.value.code == "E_MODEL_MISMATCH"


@pytest.mark.parametrize("family", [family.name for family in all_families()])
@pytest.mark.parametrize("patch", [(16, 16, 16), (16, 32)])
def test_parts_of_a_network(family: str, patch: tuple[int, ...]) -> None:
    """Each parameter is in one part, the stem in the encoder, the output layers in the decoder."""
    network = tiny_network(family, patch)
    own = family_of(network)
    assert own.name == family
    names = {name for name, _ in network.named_parameters()}
    parts = {name: own.part_of(name) for name in names}
    assert set(parts.values()) == {"encoder", "decoder"}
    assert own.encoder_names(network) == {name for name in names if parts[name] == "encoder"}
    assert own.head_names(network) <= {name for name in names if parts[name] == "decoder"}
    assert own.head_names(network)
    assert own.stem_names(network) & names <= own.encoder_names(network)
    assert own.stem_names(network) <= set(network.state_dict())
    assert all(own.layers_after(name, network) == 0 for name in names - own.encoder_names(network))
    assert {own.part_of(name) for name in network.state_dict()} == {"encoder", "decoder"}


def test_the_classes_of_families_are_distinct_and_exist() -> None:
    for class_name in set(families_by_class()) - {OLD_RESENC}:  # which nnU-Net's factory redirects
        module, _, name = class_name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type)


def test_nothing_else_asks_what_a_network_is() -> None:
    """Names of parts and of classes stand in the files of the families alone."""
    words = ('"eva', "eva.", "up_projection", "down_projection", "seg_layers", "decoder.encoder", "PrimusSeg", 'UNet"')
    homes = {"unet.py", "primus.py", "primus_family.py", "tokens.py", "swin.py", "swin_family.py"}
    wrong = [
        f"{file.relative_to(PACKAGE)}: {word}"
        for file in PACKAGE.rglob("*.py")
        if file.name not in homes or file.parent.name != "models"
        for word in words
        if word in file.read_text(encoding="utf-8") and file.name != "plan_rules.py"
    ]
    assert not wrong


def test_names_of_networks_are_sorted_as_registered() -> None:
    assert network_names()[: len(BUILT_IN)] == list(BUILT_IN)
