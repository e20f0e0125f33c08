"""Broken dataset.json, plans, fingerprints, splits and preprocessed files: the message names the file and a remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.builders.damage import overwrite_middle
from tests.builders.site import CORPUS, Site, accepted, edit_json, refused, unchanged, write_dataset, write_json

Edit = Callable[[dict[str, Any]], object]
MISSING = object()


def put(**changes: Any) -> Edit:
    """Set fields of a JSON object, or remove them."""

    def edit(content: dict[str, Any]) -> None:
        content.update(changes)
        for name in [name for name, value in content.items() if value is MISSING]:
            del content[name]

    return edit


DATASET_JSON: dict[str, Edit] = {
    "numTraining": put(numTraining="three"),
    "file_ending": put(file_ending=MISSING),
    "channel_names": put(channel_names=["MRI"]),
    "0, 1, 3": put(labels={"background": 0, "shell": 1, "core": 3}),
    "regions_class_order": put(labels={"background": 0, "all": [1, 2], "core": 2}),
    ".mha": put(file_ending=".mha"),
    "nowhere.nii.gz": put(dataset={"case0": {"images": ["nowhere.nii.gz"]}}),
    "case1": put(dataset={
        "case0": {"images": ["imagesTr/case0_0000.nii.gz"], "label": "labelsTr/case0.nii.gz"},
        "case1": {"images": ["imagesTr/case1_0000.nii.gz"]},
    }),
}  # fmt: skip


def test_dataset_json_that_breaks_the_rules(empty: Site) -> None:
    write_dataset(empty.raw)
    file = empty.raw / "dataset.json"
    good = file.read_bytes()
    for hint, edit in DATASET_JSON.items():
        file.write_bytes(good)
        edit_json(file, edit)
        with unchanged(empty.raw):
            refused(empty.plan("-d", 5), empty.raw, hint)
    assert not empty.preprocessed().exists()


@pytest.mark.parametrize("text", ["", "[]"])
def test_dataset_json_that_is_no_json_object(text: str, empty: Site) -> None:
    write_dataset(empty.raw)
    (empty.raw / "dataset.json").write_text(text)
    refused(empty.plan("-d", 5), "E_FORMAT", empty.raw / "dataset.json")
    (empty.raw / "dataset.json").unlink()
    refused(empty.plan("-d", 5), "E_NOT_FOUND", empty.raw / "dataset.json")


def test_an_unknown_reader_is_said_once(empty: Site) -> None:
    write_dataset(empty.raw)
    edit_json(empty.raw / "dataset.json", put(overwrite_image_reader_writer="NoSuchReader_of_the_bad_input_tests"))
    assert accepted(empty.plan("-d", 5, "--no_pp")).err.count("NoSuchReader") == 1


def test_broken_corpus_json(site: Site) -> None:
    file = site.workspace / "nnUNet_raw" / CORPUS / "corpus.json"
    for text in ("{", '{"format": 1, "source": "x", "cases": [{"name": "a"}]}', '{"format": 9}'):
        file.write_text(text)
        refused(site.plan("-d", 701), "E_FORMAT", file)


def of_configuration(**changes: Any) -> Edit:
    return lambda plans: put(**changes)(plans["configurations"]["3d_fullres"])


def of_network(**changes: Any) -> Edit:
    return lambda plans: put(**changes)(plans["configurations"]["3d_fullres"]["architecture"])


def of_arguments(**changes: Any) -> Edit:
    return lambda plans: put(**changes)(plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"])


PLANS: dict[str, Edit] = {
    "plans_name": put(plans_name=MISSING),
    "configurations": put(configurations=["3d_fullres"]),
    "patch_size": of_configuration(patch_size=[24, 20.5, 24]),
    "architecture": of_configuration(architecture=MISSING),
    "4 x 4 x 4": of_configuration(patch_size=[24, 22, 24]),
    "num_layers": of_arguments(num_layers=3),
    "3d_fullres": of_arguments(features_per_stage=[4, 8]),
    "mfm.epochs": lambda plans: plans["mfm"].update(epochs=3),
    "format": lambda plans: plans["mfm"].update(format=99),
    "E_MODEL_UNSAFE": of_network(network_class_name="os.system"),
}


def test_plans_that_were_edited_badly(site: Site) -> None:
    files = [site.preprocessed(dataset) / "mfmPlans.json" for dataset in ("Dataset005_Few", CORPUS)]
    good = [file.read_bytes() for file in files]
    for hint, edit in PLANS.items():
        for file, content in zip(files, good):
            file.write_bytes(content)
            edit_json(file, edit)
        with unchanged(site.workspace):
            refused(site.train(1), hint, "mfmPlans.json")
            refused(site.pretrain("--run-name", "new"), hint, "mfmPlans.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_plan_that_is_no_json_object(text: str, site: Site) -> None:
    for dataset in ("Dataset005_Few", CORPUS):
        (site.preprocessed(dataset) / "mfmPlans.json").write_text(text)
    refused(site.train(1), "E_FORMAT", site.preprocessed() / "mfmPlans.json", "Plan Dataset005_Few again")
    refused(site.pretrain("--run-name", "new"), "E_FORMAT", site.preprocessed(CORPUS) / "mfmPlans.json")
    assert "is not a plan and is replaced" in accepted(site.plan("-d", 5, "-c", "3d_fullres")).err


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
def test_model_folder_with_a_broken_description(name: str, site: Site) -> None:
    file = site.model / name
    file.unlink()
    refused(site.predict(site.test_images, site.folder / "out"), "E_NOT_FOUND", file)
    for text in ("{", "[]", '{"labels": {"background": 0}, "file_ending": ".nii.gz"}'):
        file.write_text(text)
        refused(site.predict(site.test_images, site.folder / "out"), "E_MODEL_CORRUPT", file)
    assert not (site.folder / "out").exists()


def test_broken_copies_are_made_again(site: Site) -> None:
    """What preprocessing derived is never a reason to stop planning; training says how to get it back."""
    accepted(site.plan("-d", 5, "--no_pp", "-pl", "mfmOther"))  # the fingerprint of this copy of the dataset
    good = {name: (site.preprocessed() / name).read_text() for name in ("dataset.json", "dataset_fingerprint.json")}
    for name in good:
        (site.preprocessed() / name).write_text("{}")
    refused(site.train(1), "E_FORMAT", site.preprocessed() / "dataset.json")
    outcome = accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmOther"))
    assert "0 cases preprocessed, 3 reused" in outcome.err
    for name, before in good.items():
        assert json.loads((site.preprocessed() / name).read_text()) == json.loads(before)


def test_training_without_fingerprint(site: Site) -> None:
    file = site.preprocessed() / "dataset_fingerprint.json"
    file.write_text("{")
    refused(site.train(1), "E_FORMAT", file, "mfm_plan_and_preprocess")
    file.unlink()
    refused(site.train(1), "E_NOT_FOUND", file, "mfm_plan_and_preprocess")


@pytest.mark.parametrize("ending", [".b2nd", "_seg.b2nd", ".pkl"])
def test_damaged_preprocessed_case(ending: str, site: Site) -> None:
    """Found before the first step, not hours later when the case is drawn; planning again repairs it."""
    file = site.data() / f"case1{ending}"
    good = file.read_bytes()
    os.truncate(file, file.stat().st_size // 2)
    with unchanged(site.workspace):
        refused(site.train(1), "E_SHORT_DATA", file, "mfm_plan_and_preprocess")
    assert "1 cases preprocessed, 2 reused" in accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmOther")).err
    assert file.read_bytes() == good


def test_preprocessed_cases_with_a_damaged_middle(site: Site) -> None:
    """Their sizes and headers are right, so it shows when they are drawn; the message tells how to repair them."""
    files = sorted(site.data().glob("*_seg.b2nd"))
    good = [file.read_bytes() for file in files]
    for file in files:
        overwrite_middle(file)
    named = refused(site.train(1), "E_SHORT_DATA", "_seg.b2nd", "Delete it and run mfm_plan_and_preprocess")
    assert any(str(file) in named for file in files)
    for file in files:
        file.unlink()
    accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmOther"))
    assert [file.read_bytes() for file in files] == good
    accepted(site.train(1))


def test_settings_of_a_run_that_were_damaged(site: Site) -> None:
    file = site.model / "fold_0" / "settings.json"
    write_json(file, [])
    refused(site.run("train", 5, "3d_fullres", 0, "--c"), "E_FORMAT", file)


def test_labels_that_changed_after_preprocessing(site: Site) -> None:
    """The preprocessed label maps hold values that the edited dataset.json does not name."""
    edit_json(site.preprocessed() / "dataset.json", lambda content: content["labels"].pop("core"))
    with unchanged(site.preprocessed(), site.model):
        refused(site.train(1), "E_CONFIG", "mfm_plan_and_preprocess -d Dataset005_Few -c 3d_fullres -pl mfmPlans")
