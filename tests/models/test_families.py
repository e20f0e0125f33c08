"""The registry of networks, and one suite over every network: questions that all families answer, and their backbones.

A network joins by its entry in ``tests/builders/tiny_plans.py``.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from mfm_nnunet.errors import MFMError
from mfm_nnunet.models import families
from mfm_nnunet.models.backbone import make_backbone
from mfm_nnunet.models.families import BUILT_IN, Sizing, all_families, family_named, family_of, network_names
from mfm_nnunet.models.memory import estimate_training_memory
from mfm_nnunet.models.networks import build_architecture, build_network
from mfm_nnunet.models.unet import OLD_RESENC, RESENC
from mfm_nnunet.tasks.masks import draw_hidden
from tests.builders.architectures import resenc
from tests.builders.tiny_plans import CONFIGURATION, NETWORKS, tiny_backbone, tiny_network, tiny_plans

PACKAGE = Path(families.__file__).parent.parent
CASES = [pytest.param(name, patch, id=f"{name}-{len(patch)}D") for name, tiny in NETWORKS.items()
         for patch in (tiny.uneven, tiny.flat)]  # fmt: skip
every_network = pytest.mark.parametrize(("name", "patch"), CASES)


def test_names_are_known_without_torch_in_the_order_of_registration() -> None:
    code = (
        "import sys; from mfm_nnunet.models import families as f; f.network_names(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert network_names()[: len(BUILT_IN)] == list(BUILT_IN)
    assert set(network_names()) == set(NETWORKS)


@pytest.mark.parametrize("network", BUILT_IN)
def test_a_network_is_planned_under_its_name(network: str) -> None:
    family = family_named(network)
    assert family_named(family.name) is family
    expected = {"resenc": "mfmPlans", "primus_v2": "mfmPrimusV2Plans", "primus_v3": "mfmPrimusV3Plans"}
    assert family.plans_name(network) == expected.get(network, f"mfm{network.capitalize()}Plans")


def test_unknown_names_and_networks_are_refused() -> None:
    with pytest.raises(MFMError, match="resenc") as caught:
        family_named("resnec")
    assert caught.value.code == "E_CONFIG"
    with pytest.raises(MFMError) as caught:
        family_of(nn.Linear(2, 2))
    assert caught.value.code == "E_MODEL_MISMATCH"


def test_the_classes_of_families_are_distinct_and_exist() -> None:
    names = [name for family in all_families() for name in family.classes]
    assert len(names) == len(set(names))
    for class_name in set(names) - {OLD_RESENC}:  # which nnU-Net's factory redirects
        module, _, name = class_name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type)


def test_a_unet_imports_no_library_of_other_networks() -> None:
    """timm and torchvision take most of a second."""
    code = (
        "import sys\nimport mfm_nnunet.prediction.model\nfrom mfm_nnunet.models.families import family_of_class\n"
        f"assert family_of_class({RESENC!r}).name == 'resenc'\nassert not {{'timm', 'torchvision'}} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_else_asks_what_a_network_is() -> None:
    """Names of parts and of classes stand in the files of the families alone."""
    words = ('"eva', "eva.", "up_projection", "down_projection", "seg_layers", "decoder.encoder", "PrimusSeg", 'UNet"')
    shared = {"backbone.py", "families.py", "memory.py", "networks.py", "sizing.py", "transfer.py"}
    wrong = [
        f"{file.relative_to(PACKAGE)}: {word}"
        for file in PACKAGE.rglob("*.py")
        if file.name in shared or file.parent.name != "models"
        for word in words
        if word in file.read_text(encoding="utf-8") and file.name != "plan_rules.py"
    ]
    assert not wrong


# The network


@every_network
def test_parts_of_a_network(name: str, patch: tuple[int, ...]) -> None:
    """Each parameter is in one part, the stem in the encoder; only the output layers depend on the outputs."""
    network, other = (tiny_network(name, patch, num_outputs=outputs) for outputs in (2, 9))
    own = family_of(network)
    assert own is family_named(name)
    names = {name for name, _ in network.named_parameters()}
    parts = {name: own.part_of(name) for name in names}
    assert set(parts.values()) == {"encoder", "decoder"}
    assert own.encoder_names(network) == {name for name in names if parts[name] == "encoder"}
    assert own.head_names(network) <= {name for name in names if parts[name] == "decoder"}
    changed = {n for (n, a), (_, b) in zip(network.named_parameters(), other.named_parameters()) if a.shape != b.shape}
    assert changed <= own.head_names(network) == own.head_names(other)
    assert changed
    assert own.stem_names(network) & names <= own.encoder_names(network)
    assert own.stem_names(network) <= set(network.state_dict())
    assert all(own.layers_after(name, network) == 0 for name in names - own.encoder_names(network))
    assert {own.part_of(name) for name in network.state_dict()} == {"encoder", "decoder"}


@every_network
def test_it_is_the_network_of_nnunets_factory_and_takes_the_memory_that_is_estimated(
    name: str, patch: tuple[int, ...]
) -> None:
    plans = tiny_plans(name, patch, **NETWORKS[name].deterministic)
    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    class_name, family = architecture["network_class_name"], family_named(name)
    for deep_supervision in (False, True):
        torch.manual_seed(3)
        ours = build_network(plans, CONFIGURATION, 2, 3, deep_supervision).train()
        torch.manual_seed(3)
        theirs = get_network_from_plans(
            class_name, architecture["arch_kwargs"], architecture["_kw_requires_import"], 2, 3,
            deep_supervision=deep_supervision if family.takes_deep_supervision(class_name) else None,
        )  # fmt: skip
        assert type(ours) is type(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))
        x = torch.randn(2, 2, *patch)
        output, kept = run_and_count(ours, x)
        has_pyramid = deep_supervision and family.has_pyramid(architecture["arch_kwargs"])
        assert isinstance(output, list) == has_pyramid
        assert (output[0] if has_pyramid else output).shape == (2, 3, *patch)
        assert estimate_training_memory(ours, x.shape, "sgd").activations == pytest.approx(kept, rel=0.02)


def run_and_count(network: nn.Module, x: Tensor) -> tuple[Any, int]:
    """The output, and bytes of distinct memory that autograd keeps for it, weights and buffers excluded."""
    kept = [x]
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = network(x)
    kept += [output] if isinstance(output, Tensor) else output
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return output, sum(size for pointer, size in sizes.items() if pointer not in own)


SIZED = [
    (name, shape, memory_gb)
    for name in BUILT_IN
    if not family_named(name).is_sized_by_nnunet
    for shape, memory_gb in (((36.0, 50.0, 35.0), None), ((50.0, 35.0), None), ((50.0, 35.0), 80.0))
    if memory_gb is None or family_named(name).name == name
]


@pytest.mark.parametrize(("name", "shape", "memory_gb"), SIZED)
def test_what_is_planned_can_be_built(name: str, shape: tuple[float, ...], memory_gb: float | None) -> None:
    name = {"timm": "timm:test_vit"}.get(name, name)
    family, stock = family_named(name), {"architecture": resenc(len(shape), (8, 8, 8, 8))}
    planned = family.plan_network(Sizing(name, shape, (1.0,) * len(shape), memory_gb, 2, 3, stock))
    architecture = planned.architecture
    assert family.patch_problem(architecture["arch_kwargs"], planned.patch_size) == ""
    assert family.variant(architecture) == name
    assert all(edge >= size or memory_gb for edge, size in zip(planned.patch_size, shape))
    with torch.device("meta"):
        assert build_architecture(architecture, 2, 3)(torch.zeros(1, 2, *planned.patch_size)).shape[1] == 3
    assert family.describe(architecture)
    assert family.reason(architecture, memory_gb)


# The backbone


@every_network
@pytest.mark.parametrize("restoring", ["drop", "replace"])
def test_what_is_hidden_has_no_influence_at_all(name: str, patch: tuple[int, ...], restoring: Any) -> None:
    backbone = tiny_backbone(name, patch, 2, 2, restoring=restoring).eval()
    cell = tuple(max(8, side) for side in backbone.mask_cell())
    hidden = torch.from_numpy(np.stack([draw_hidden(patch, cell, 0.5, np.random.default_rng(i)) for i in range(3)]))
    x, other = torch.randn(2, 3, 2, *patch)
    for fill_value in (0.0, -3.0):
        with torch.no_grad():
            a, b = (backbone.restore(image, hidden, fill_value) for image in (x, torch.where(hidden, 100 * other, x)))
            assert a.shape == (3, 2, *patch)
            assert (a - b).abs().max() == 0
            # ... and what is visible has, else the test above would hold for any constant.
            seen = torch.where(hidden, x, x + 0.5 * other)
            assert (backbone.restore(seen, hidden, fill_value) - a).abs().max() > 1e-4


@every_network
def test_maps_of_features_and_a_frozen_decoder(name: str, patch: tuple[int, ...]) -> None:
    backbone = tiny_backbone(name, patch, num_inputs=3, restoring="none")
    assert backbone.num_inputs == 3
    assert backbone.family is family_named(name)
    assert (backbone.geometry().patch_size, backbone.geometry().crop_cell) == (patch, backbone.crop_cell())
    assert all(size % cell == 0 for size, cell in zip(patch, backbone.crop_cell()))
    backbone.freeze_decoder()
    trained = {name for name, weight in backbone.named_parameters() if weight.requires_grad}
    assert trained == {f"network.{name}" for name in family_of(backbone.network).encoder_names(backbone.network)}
    maps = backbone.features(torch.randn(2, 3, *patch))
    assert [feature.shape[1] for feature in maps] == backbone.feature_widths()
    sizes = [feature.shape[2:] for feature in maps]
    assert sizes == sorted(sizes, reverse=True), "maps go from fine to coarse"
    assert all(size % side == 0 for shape in sizes for size, side in zip(patch, shape))
    sum(feature.square().mean() for feature in maps).backward()
    assert all(weight.grad is not None for weight in backbone.parameters() if weight.requires_grad)


@every_network
def test_new_weights_are_made_only_when_needed_and_never_part_of_the_network(name: str, patch: tuple[int, ...]) -> None:
    plain, dropping, replacing = (
        make_backbone(tiny_network(name, patch), patch, restoring) for restoring in ("none", "drop", "replace")
    )
    assert {name.split(".")[0] for name, _ in plain.named_parameters()} == {"network"}
    names = [list(backbone.network.state_dict()) for backbone in (plain, dropping, replacing)]
    assert names[0] == names[1] == names[2]
    hides_tokens = plain.family.hides == "tokens"
    for backbone in (dropping, replacing):
        assert (len(list(backbone.parameters())) > len(list(plain.parameters()))) == hides_tokens


@every_network
def test_recomputed_activations_give_the_same_gradients(name: str, patch: tuple[int, ...]) -> None:
    gradients = []
    for recompute in (False, True):
        backbone = tiny_backbone(name, patch, restoring="none").train()
        if recompute:
            backbone.recompute_activations()
        torch.manual_seed(1)
        backbone(torch.randn(2, 1, *patch)).square().mean().backward()
        gradients.append([weight.grad for weight in backbone.parameters() if weight.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
