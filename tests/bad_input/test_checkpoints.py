"""Checkpoints that are none, are damaged, belong to another network or would run code: refused at every entry."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mfm_nnunet.models.networks import build_network
from tests.builders import tiny
from tests.builders.architectures import primus, resenc
from tests.builders.site import PATCH, Site, accepted, edit_json, nothing_lost, refused, unchanged


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def cut(site: Site, file: Path) -> None:
    file.write_bytes(site.pretrained.read_bytes()[:-1000])


def flipped(site: Site, file: Path) -> None:
    content = bytearray(site.pretrained.read_bytes())
    with zipfile.ZipFile(site.pretrained) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + 200] ^= 1
    file.write_bytes(content)


def archive(site: Site, file: Path) -> None:
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("weights", "none")


def saved(content: Any) -> Callable[[Site, Path], None]:
    return lambda site, file: torch.save(content, file)


def with_payload(site: Site, file: Path) -> None:
    content = torch.load(site.pretrained, weights_only=True)
    torch.save({**content, "logging": Payload(site.folder / "payload_ran")}, file)


def pickled_payload(site: Site, file: Path) -> None:
    file.write_bytes(pickle.dumps(Payload(site.folder / "payload_ran")))


NONE: dict[str, tuple[str, Callable[[Site, Path], Any]]] = {
    "missing": ("E_NOT_FOUND", lambda site, file: None),
    "folder": ("E_NOT_FOUND", lambda site, file: file.mkdir()),
    "empty": ("E_EMPTY", lambda site, file: file.write_bytes(b"")),
    "text": ("E_MODEL_CORRUPT", lambda site, file: file.write_text("weights")),
    "cut": ("E_MODEL_CORRUPT", cut),
    "flipped": ("E_MODEL_CORRUPT", flipped),
    "another archive": ("E_MODEL_CORRUPT", archive),
    "a list": ("E_MODEL_CORRUPT", saved([1, 2])),
    "of another program": ("E_MODEL_CORRUPT", saved({"weights": {"a": torch.zeros(2)}})),
    "with a payload": ("E_MODEL_UNSAFE", with_payload),
    "a pickled payload": ("E_MODEL_UNSAFE", pickled_payload),
}


def test_tensors_alone_start_no_other_network_than_those_of_timm(site: Site) -> None:
    file = site.folder / "weights.pth"
    torch.save({"state_dict": {"a": torch.zeros(2)}}, file)
    with unchanged(site.folder):
        refused(site.train(1, "-pretrained_weights", file), "E_MODEL_MISMATCH", file, "--network timm:NAME")
        refused(site.plan("-d", 5, "--like", file, "-pl", "mfmNew"), "E_MODEL_MISMATCH", file, "--network timm:NAME")


@pytest.mark.parametrize("kind", NONE)
def test_checkpoint_that_is_none(kind: str, site: Site) -> None:
    """To start from, to plan like, as a model, and to continue from."""
    code, write = NONE[kind]
    file = site.folder / "weights.pth"
    write(site, file)
    with unchanged(site.folder):
        refused(site.train(1, "-pretrained_weights", file), code, file)
        refused(site.plan("-d", 5, "--like", file, "-pl", "mfmNew"), code, file)
    if file.is_file():
        final, state = site.model / "fold_0" / "checkpoint_final.pth", site.run_folder / "resume.pth"
        for target in (final, state):
            target.write_bytes(file.read_bytes())
        with nothing_lost(final.parent, state.parent):
            refused(site.predict(site.test_images, site.folder / "out"), code, final)
            refused(site.run("train", 5, "3d_fullres", 0, "--c"), code, final)
            refused(site.run("train", 5, "3d_fullres", 0, "--val"), code, final)
        if kind not in ("of another program",):
            with nothing_lost(state.parent):
                refused(site.pretrain("--c"), code, state)
    assert not (site.folder / "out").exists()
    assert not (site.folder / "payload_ran").exists()


def network_weights(architecture: dict[str, Any], patch: tuple[int, ...] = PATCH) -> dict[str, torch.Tensor]:
    plans = tiny.plans(**{"3d_fullres": tiny.configuration(architecture, patch)})
    return build_network(plans, "3d_fullres", 1, 1).state_dict()


OTHER_NETWORKS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "is 2D": lambda: network_weights(resenc(2), (24, 24)),
    "shape": lambda: network_weights(resenc(features=(8, 16, 16))),
    "no encoder": dict,
}


def test_checkpoints_of_other_networks(site: Site) -> None:
    file = site.folder / "other.pth"
    for hint, weights in OTHER_NETWORKS.items():
        torch.save({"network_weights": weights()}, file)
        message = refused(site.train(1, "-pretrained_weights", file), "E_MODEL_MISMATCH", file, hint)
        assert any(advice in message for advice in ("--like", "same configuration", "Only these networks"))
    accepted(site.train(1, "-pretrained_weights", site.pretrained))


def test_unet_checkpoint_for_a_primus_plan(site: Site) -> None:
    def edit(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"].update(architecture=primus((24, 24, 24)), patch_size=[24, 24, 24])

    edit_json(site.preprocessed() / "mfmPlans.json", edit)
    refused(site.train(1, "-pretrained_weights", site.pretrained), "E_MODEL_MISMATCH", "PrimusSeg", "--like")


def test_model_with_the_plan_of_another(site: Site) -> None:
    def edit(plans: dict[str, Any]) -> None:
        plans["configurations"]["3d_fullres"]["architecture"] = resenc(features=(8, 16, 16))

    edit_json(site.model / "plans.json", edit)
    refused(site.predict(site.test_images, site.folder / "out"), "E_MODEL_MISMATCH", "checkpoint_final.pth")
    edit_json(site.preprocessed() / "mfmPlans.json", edit)
    refused(site.run("train", 5, "3d_fullres", 0, "--c"), "E_CONFIG", "was changed after this run began")


def test_stock_checkpoint_starts_a_training_and_a_plan(site: Site) -> None:
    """nnU-Net's own files hold NumPy scalars in their log and no plan block."""
    content = torch.load(site.model / "fold_0" / "checkpoint_final.pth", weights_only=True)
    del content["mfm"]
    content["logging"] = {"mean_fg_dice": [np.float64(0.5)], "dice": [[np.float32(0.5)]]}
    file = site.folder / "stock.pth"
    torch.save(content, file)
    accepted(site.train(1, "-pretrained_weights", file))
    accepted(site.plan("-d", 5, "--like", file, "-pl", "mfmNew"))
    del content["init_args"]["plans"]["configurations"]["3d_fullres"]["spacing"]
    torch.save(content, file)
    refused(site.plan("-d", 5, "--like", file, "-pl", "mfmOther"), "E_MODEL_MISMATCH", file, "spacing")


def edited(site: Site, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = copy.deepcopy(torch.load(site.pretrained, weights_only=True))
    edit(content)
    torch.save(content, site.folder / "edited.pth")
    return site.folder / "edited.pth"


DESCRIPTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no plan": ("E_MODEL_MISMATCH", lambda mfm: mfm.pop("plans")),
    "half a plan": ("E_MODEL_MISMATCH", lambda mfm: mfm["plans"]["configurations"]["3d_fullres"].pop("spacing")),
    "another configuration": ("E_MODEL_MISMATCH", lambda mfm: mfm.update(configuration="3d_lowres")),
    "a fine-tuned one": ("E_MODEL_MISMATCH", lambda mfm: mfm.update(kind="finetuned")),
    "foreign code": (
        "E_MODEL_UNSAFE",
        lambda mfm: mfm["plans"]["configurations"]["3d_fullres"]["architecture"].update(network_class_name="os.system"),
    ),
}


def test_plan_like_a_checkpoint_with_a_broken_description(site: Site) -> None:
    for code, edit in DESCRIPTIONS.values():
        file = edited(site, lambda content, edit=edit: edit(content["mfm"]))
        with unchanged(site.folder):
            refused(site.plan("-d", 5, "--like", file, "-pl", "mfmNew"), code, file)


def test_weights_that_are_not_finite(site: Site) -> None:
    def edit(content: dict[str, Any]) -> None:
        for tensor in content["network_weights"].values():
            tensor.fill_(float("nan"))

    file = edited(site, edit)
    refused(site.train(1, "-pretrained_weights", file), "E_NONFINITE", file)
    final = site.model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(final, weights_only=True)
    edit(content)
    torch.save(content, final)
    refused(site.predict(site.test_images, site.folder / "out"), "2 of 2", "E_NONFINITE", code=3)
    assert not list((site.folder / "out").glob("*.nii.gz"))
