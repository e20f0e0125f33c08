"""Broken dataset.json, plans, fingerprints, splits and preprocessed files: the message names the file and a remedy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
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


DATASET_JSON: dict[str, tuple[str, Edit]] = {
    "a number of cases as text": ("numTraining", put(numTraining="three")),
    "no labels": ("labels", put(labels=MISSING)),
    "no ending": ("file_ending", put(file_ending=MISSING)),
    "no channels": ("channel_names", put(channel_names=MISSING)),
    "channels as a list": ("channel_names", put(channel_names=["MRI"])),
    "labels as a list": ("labels", put(labels=["background", "shell", "core"])),
    "labels of nnU-Net v1": ("'0'", put(labels={"0": "background", "1": "shell", "2": "core"})),
    "labels with a gap": ("0, 1, 3", put(labels={"background": 0, "shell": 1, "core": 3})),
    "no background": ("background", put(labels={"shell": 1, "core": 2})),
    "another background": ("background", put(labels={"background": 1, "shell": 0, "core": 2})),
    "ignore in between": ("ignore", put(labels={"background": 0, "ignore": 1, "core": 2})),
    "regions without order": ("regions_class_order", put(labels={"background": 0, "all": [1, 2], "core": 2})),
    "regions with a short order": (
        "regions_class_order",
        put(labels={"background": 0, "all": [1, 2], "core": 2}, regions_class_order=[1]),
    ),
    "ending": (".mha", put(file_ending=".mha")),
    "cases as a list": ("dataset", put(dataset=["case0"])),
    "a case without images": ('"images"', put(dataset={"case0": {"label": "labelsTr/case0.nii.gz"}})),
    "a case without files": ("nowhere.nii.gz", put(dataset={"case0": {"images": ["nowhere.nii.gz"]}})),
    "one case without label": (
        "case1",
        put(dataset={
            "case0": {"images": ["imagesTr/case0_0000.nii.gz"], "label": "labelsTr/case0.nii.gz"},
            "case1": {"images": ["imagesTr/case1_0000.nii.gz"]},
        }),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", DATASET_JSON)
def test_dataset_json_that_breaks_the_rules(fault: str, empty: Site) -> None:
    write_dataset(empty.raw)
    hint, edit = DATASET_JSON[fault]
    edit_json(empty.raw / "dataset.json", edit)
    with unchanged(empty.raw):
        refused(empty.plan("-d", 5), empty.raw, hint)
    assert not empty.preprocessed().exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '"labels"', "\x00\x01"])
def test_dataset_json_that_is_no_json_object(text: str, empty: Site) -> None:
    write_dataset(empty.raw)
    (empty.raw / "dataset.json").write_text(text)
    refused(empty.plan("-d", 5), "E_FORMAT", empty.raw / "dataset.json")
    (empty.raw / "dataset.json").unlink()
    refused(empty.plan("-d", 5), "E_NOT_FOUND", empty.raw / "dataset.json")


def test_unknown_fields_are_legal(empty: Site) -> None:
    write_dataset(empty.raw)
    edit_json(empty.raw / "dataset.json", put(hospital="St. Elsewhere", converted_by={"tool": [1, 2]}, numTraining=99))
    accepted(empty.plan("-d", 5, "--no_pp"))


def test_an_unknown_reader_is_said_once(empty: Site) -> None:
    write_dataset(empty.raw)
    edit_json(empty.raw / "dataset.json", put(overwrite_image_reader_writer="NoSuchReader_of_the_bad_input_tests"))
    assert accepted(empty.plan("-d", 5, "--no_pp")).err.count("NoSuchReader") == 1


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 1, "source": "x", "cases": [{"name": "a"}]}', '{"format": 9}'])
def test_broken_corpus_json(text: str, site: Site) -> None:
    file = site.workspace / "nnUNet_raw" / CORPUS / "corpus.json"
    file.write_text(text)
    refused(site.plan("-d", 701), "E_FORMAT", file)


def of_configuration(**changes: Any) -> Edit:
    return lambda plans: put(**changes)(plans["configurations"]["3d_fullres"])


def of_network(**changes: Any) -> Edit:
    return lambda plans: put(**changes)(plans["configurations"]["3d_fullres"]["architecture"])


def of_arguments(**changes: Any) -> Edit:
    return lambda plans: put(**changes)(plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"])


PLANS: dict[str, tuple[str, Edit]] = {
    "no name": ("plans_name", put(plans_name=MISSING)),
    "no dataset": ("dataset_name", put(dataset_name=MISSING)),
    "no reader": ("image_reader_writer", put(image_reader_writer=MISSING)),
    "no axis order": ("transpose_backward", put(transpose_backward=MISSING)),
    "no configurations": ("configurations", put(configurations=MISSING)),
    "configurations as a list": ("configurations", put(configurations=["3d_fullres"])),
    "no patch": ("patch_size", of_configuration(patch_size=MISSING)),
    "no batch": ("batch_size", of_configuration(batch_size=MISSING)),
    "no resampling": ("resampling_fn_probabilities", of_configuration(resampling_fn_probabilities=MISSING)),
    "no network": ("architecture", of_configuration(architecture=MISSING)),
    "no network class": ("network_class_name", of_network(network_class_name=MISSING)),
    "a patch that is none": ("patch_size", of_configuration(patch_size="large")),
    "a patch with fractions": ("patch_size", of_configuration(patch_size=[24, 20.5, 24])),
    "a flat patch": ("patch_size [24, 24]", of_configuration(patch_size=[24, 24])),
    "a patch that does not fit the strides": ("4 x 4 x 4", of_configuration(patch_size=[24, 22, 24])),
    "an unknown argument": ("num_layers", of_arguments(num_layers=3)),
    "too few features": ("3d_fullres", of_arguments(features_per_stage=[4, 8])),
    "a parent that is none": ("3d_lowres", of_configuration(inherits_from="3d_lowres")),
    "its own parent": ("3d_fullres", of_configuration(inherits_from="3d_fullres")),
    "an unknown setting": ("mfm.epochs", lambda plans: plans["mfm"].update(epochs=3)),
    "a later format": ("format", lambda plans: plans["mfm"].update(format=99)),
    "foreign code": ("E_MODEL_UNSAFE", of_network(network_class_name="os.system")),
}


@pytest.mark.parametrize("fault", PLANS)
def test_plan_that_was_edited_badly(fault: str, site: Site) -> None:
    hint, edit = PLANS[fault]
    for dataset in ("Dataset005_Few", CORPUS):
        edit_json(site.preprocessed(dataset) / "mfmPlans.json", edit)
    with unchanged(site.workspace):
        refused(site.train(1), hint, "mfmPlans.json")
        refused(site.pretrain("--run-name", "new"), hint, "mfmPlans.json")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_plan_that_is_no_json_object(text: str, site: Site) -> None:
    for dataset in ("Dataset005_Few", CORPUS):
        (site.preprocessed(dataset) / "mfmPlans.json").write_text(text)
    refused(site.train(1), "E_FORMAT", site.preprocessed() / "mfmPlans.json", "Plan Dataset005_Few again")
    refused(site.pretrain("--run-name", "new"), "E_FORMAT", site.preprocessed(CORPUS) / "mfmPlans.json")
    assert "is not a plan and is replaced" in accepted(site.plan("-d", 5, "-c", "3d_fullres")).err


@pytest.mark.parametrize("name", ["plans.json", "dataset.json"])
@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"labels": {"background": 0}, "file_ending": ".nii.gz"}'])
def test_model_folder_with_a_broken_description(name: str, text: str | None, site: Site) -> None:
    file = site.model / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    code = "E_NOT_FOUND" if text is None else "E_MODEL_CORRUPT"
    refused(site.predict(site.test_images, site.folder / "out"), code, file)
    assert not (site.folder / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_broken_copies_are_made_again(text: str, site: Site) -> None:
    """What preprocessing derived is never a reason to stop planning; training says how to get it back."""
    accepted(site.plan("-d", 5, "--no_pp", "-pl", "mfmOther"))  # the fingerprint of this copy of the dataset
    good = {name: (site.preprocessed() / name).read_text() for name in ("dataset.json", "dataset_fingerprint.json")}
    for name in good:
        (site.preprocessed() / name).write_text(text)
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


SPLITS = [
    *("{", "{}", "[]", '[{"train": ["case0"]}]'),
    *('[{"train": ["case0"], "val": ["nobody"]}]', '[{"train": ["case0"], "val": []}]'),
]


@pytest.mark.parametrize("text", SPLITS)
def test_broken_splits(text: str, site: Site) -> None:
    file = site.preprocessed() / "splits_final.json"
    shutil.rmtree(site.model)
    file.write_text(text)
    with unchanged(site.preprocessed()):
        refused(site.train(0), "E_CONFIG", file, "delete")


def damage(file: Path, how: str) -> None:
    os.truncate(file, {"cut": file.stat().st_size // 2, "empty": 0}[how])


@pytest.mark.parametrize("how", ["cut", "empty"])
@pytest.mark.parametrize("ending", [".b2nd", "_seg.b2nd", ".pkl"])
def test_damaged_preprocessed_case(ending: str, how: str, site: Site) -> None:
    """Found before the first step, not hours later when the case is drawn; planning again repairs it."""
    file = site.data() / f"case1{ending}"
    good = file.read_bytes()
    damage(file, how)
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


def test_damaged_volume_of_a_corpus(site: Site) -> None:
    file = site.data(CORPUS) / "scan1.b2nd"
    damage(file, "cut")
    refused(site.pretrain("--run-name", "new"), "E_SHORT_DATA", file)
    accepted(site.plan("-d", 701, "-c", "3d_fullres", "-pl", "mfmOther"))
    accepted(site.pretrain("--run-name", "new"))


def test_missing_preprocessed_file(site: Site) -> None:
    (site.data() / "case1.pkl").unlink()
    refused(site.train(1), "case1", "mfm_plan_and_preprocess")
    shutil.rmtree(site.data())
    refused(site.train(1), "E_NOT_FOUND", "mfm_plan_and_preprocess -d Dataset005_Few")
    shutil.rmtree(site.data(CORPUS))
    refused(site.pretrain("--run-name", "new"), "E_NOT_FOUND", f"mfm_plan_and_preprocess -d {CORPUS}")


def test_settings_of_a_run_that_were_damaged(site: Site) -> None:
    file = site.model / "fold_0" / "settings.json"
    write_json(file, [])
    refused(site.run("train", 5, "3d_fullres", 0, "--c"), "E_FORMAT", file)


def test_labels_that_changed_after_preprocessing(site: Site) -> None:
    """The preprocessed label maps hold values that the edited dataset.json does not name."""
    edit_json(site.preprocessed() / "dataset.json", lambda content: content["labels"].pop("core"))
    with unchanged(site.preprocessed(), site.model):
        refused(site.train(1), "E_CONFIG", "mfm_plan_and_preprocess -d Dataset005_Few -c 3d_fullres -pl mfmPlans")
