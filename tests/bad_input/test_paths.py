"""Names in downloaded files that lead out of their folders: no file outside of the workspace is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mfm_nnunet.study.folder import read_study
from tests.builders.site import (
    CORPUS,
    LABELLED,
    Site,
    accepted,
    contents,
    edit_json,
    refused,
    unchanged,
    write_dataset,
    write_json,
    write_scan,
)

LATIN_1 = os.fsdecode(b"M\xfcller")


@pytest.fixture(autouse=True)
def _victims(empty: Site) -> Iterator[None]:
    """Files of the user around the workspace: after each test they are as they were, and nothing is beside them."""
    places = [empty.folder.parent, empty.folder.parent / "home"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / "victim.txt").write_text("precious")
        (place / "victim").write_text("precious")
    before = around(empty)
    yield
    assert around(empty) == before


def around(site: Site) -> dict[str, str]:
    """What lies beside the site's folder, which holds the workspace."""
    others = [entry for entry in site.folder.parent.iterdir() if entry != site.folder]
    return contents(*others)


@pytest.mark.parametrize(("levels", "name"), [("../" * 4, "victim.txt"), ("../../", "pwn.nii.gz")])
def test_ending_of_a_dataset(name: str, levels: str, empty: Site) -> None:
    write_dataset(empty.raw)
    cases = {
        f"case{k}": {"images": [f"imagesTr/case{k}_0000.nii.gz"], "label": f"labelsTr/case{k}.nii.gz"} for k in range(3)
    }
    edit_json(empty.raw / "dataset.json", lambda content: content.update(dataset=cases, file_ending=f"/{levels}{name}"))
    with unchanged(empty.raw):
        refused(empty.plan("-d", 5, "-c", "3d_fullres"), "E_FORMAT", "file_ending", empty.raw / "dataset.json")
    assert not empty.preprocessed().exists()


@pytest.mark.parametrize("name", ["../../../victim", LATIN_1, "x_seg", "é" * 130], ids=ascii)
def test_names_of_mapped_cases(name: str, empty: Site) -> None:
    write_dataset(empty.raw)
    case = {"images": ["imagesTr/case0_0000.nii.gz"], "label": "labelsTr/case0.nii.gz"}
    edit_json(empty.raw / "dataset.json", lambda content: content.update(dataset={name: case, "case1": case}))
    before = contents(empty.raw)
    outcome = empty.plan("-d", 5, "-c", "3d_fullres")
    assert outcome.code in (2, 3)
    assert "E_CONFIG" in outcome.err
    assert "internal error" not in outcome.err
    assert contents(empty.raw) == before


@pytest.mark.parametrize("key", ["plans_name", "dataset_name", "data_identifier"])
@pytest.mark.parametrize("value", ["../../../../victim"])
def test_names_in_a_plan(key: str, value: str, site: Site) -> None:
    for dataset in (LABELLED, CORPUS):
        edit_json(site.preprocessed(dataset) / "mfmPlans.json", lambda plans: put(plans, key, value))
    with unchanged(site.folder):
        refused(site.train(1), "E_FORMAT", key, "mfmPlans.json")
        refused(site.pretrain("--run-name", "new"), "E_FORMAT", key, "mfmPlans.json")


def put(plans: dict[str, Any], key: str, value: str) -> None:
    (plans["configurations"]["3d_fullres"] if key == "data_identifier" else plans)[key] = value


def test_a_plan_of_another_dataset(site: Site) -> None:
    edit_json(site.preprocessed() / "mfmPlans.json", lambda plans: plans.update(dataset_name=CORPUS))
    with unchanged(site.folder):
        refused(site.train(1), "E_CONFIG", CORPUS, LABELLED, "mfmPlans.json")


@pytest.mark.parametrize("name", ["../../../../victim", LATIN_1], ids=ascii)
def test_names_on_the_command_line(name: str, site: Site) -> None:
    with unchanged(site.folder):
        refused(site.train(1, "-p", name), "E_CONFIG")
        refused(site.pretrain("-p", name), "E_CONFIG")
        refused(site.pretrain("--run-name", name), "E_CONFIG")
        refused(site.predict(site.test_images, site.folder / "out", "-chk", f"{name}/x"), "E_CONFIG", "-chk")
        refused(site.run("train", 5, "3d_fullres", 1, "-tr", f"{name}"), "E_NOT_FOUND")


@pytest.mark.parametrize("trainer", ["join", "../x"])
def test_trainers_that_are_none(trainer: str, site: Site) -> None:
    """nnU-Net finds whatever its modules hold under a name: functions and libraries too."""
    file = site.model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=True)
    torch.save({**content, "trainer_name": trainer}, file)
    refused(site.predict(site.test_images, site.folder / "out"), "E_MODEL_MISMATCH")
    refused(site.run("train", 5, "3d_fullres", 1, "-tr", trainer), "E_NOT_FOUND")


def test_links_where_files_are_written(site: Site) -> None:
    """Files are replaced; what is appended to, or written by nnU-Net, is refused where it is a link."""
    victim = site.folder.parent / "victim.txt"
    out = site.folder / "out"
    accepted(site.predict(site.test_images, out))
    lines = (out / "cases.jsonl").read_bytes()
    victim.write_bytes(lines)
    before = victim.stat()
    (out / "cases.jsonl").unlink()
    (out / "cases.jsonl").symlink_to(victim)
    refused(site.predict(site.test_images, out, "--resume"), "E_NOT_REGULAR", out / "cases.jsonl")
    assert victim.read_bytes() == lines
    assert victim.stat().st_mtime_ns == before.st_mtime_ns
    victim.write_text("precious")

    (out / "cases.jsonl").unlink()
    mask = next(out.glob("*.nii.gz"))
    mask.unlink()
    mask.symlink_to(victim)
    (out / "plans.json").unlink()
    (out / "plans.json").symlink_to(victim)
    accepted(site.predict(site.test_images, out, "--overwrite"))
    assert not mask.is_symlink()
    assert victim.read_text() == "precious"

    manifest = site.data().with_name(f"{site.data().name}.manifest.jsonl")
    manifest.unlink()
    manifest.symlink_to(victim)
    shutil.rmtree(site.data())
    outcome = site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmOther")
    assert outcome.code in (2, 3)
    assert "E_NOT_REGULAR" in outcome.err
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["progress.png", "debug.json"])
def test_links_in_a_run_folder(name: str, site: Site) -> None:
    file = site.model / "fold_0" / name
    file.unlink(missing_ok=True)
    file.symlink_to(site.folder.parent / "victim.txt")
    refused(site.train(0, "--val", settings=["num_workers=0"]), "E_NOT_REGULAR", file)


def test_the_error_log_is_no_way_out(site: Site) -> None:
    log = site.workspace / "mfm_error.log"
    log.unlink(missing_ok=True)
    log.symlink_to(site.folder.parent / "victim.txt")
    write_scan(site.folder / "bad" / "a_0000.nii.gz")
    (site.folder / "bad" / "a_0000.nii.gz").write_bytes(b"x")
    assert site.predict(site.folder / "bad", site.folder / "out").code == 3


@pytest.mark.parametrize("place", ["workspace", "output"])
def test_folders_that_are_not_utf_8(place: str, site: Site) -> None:
    """SimpleITK ends the process on them."""
    if place == "workspace":
        other = Site(site.folder / LATIN_1, site.call)
        refused(other.plan("-d", 5), "E_CONFIG", "UTF-8")
        assert not other.folder.exists()
    else:
        refused(site.predict(site.test_images, site.folder / LATIN_1), "E_CONFIG", "UTF-8")
        assert not (site.folder / LATIN_1).exists()


STUDY = {
    "question": {
        "dataset": "Dataset004_A", "configuration": "3d_fullres", "plans": "own", "settings": [], "tolerance_mm": 1.0,
        "mirroring": True, "test": ["case0"], "subjects": {"case0": "case0"}, "data": "hash",
    },
    "folds": [{"labels": 1, "seed": 0, "train": ["case1"]}], "library": {},
    "arms": {"scratch": {"file": None, "sha256": None, "settings": []}},
    "asked": [{"num_labels": 1, "seed": 0, "arm": "scratch"}],
    "test_cases": {"case0": {"images": ["x_0000.nii.gz"], "label": "x.nii.gz"}},
    "dataset_json": {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"},
}  # fmt: skip
ESCAPE = "../../../victim"


@pytest.mark.parametrize(
    "changes",
    [
        {"asked": [{"num_labels": 1, "seed": 0, "arm": ESCAPE}]},
        {"asked": [{"num_labels": ESCAPE, "seed": 0, "arm": "scratch"}]},
        {"asked": 3},
        {"arms": {ESCAPE: {"file": None, "sha256": None, "settings": []}}},
        {"arms": {"scratch": 3}},
        {"folds": [[1, 0]]},
        {"test_cases": {ESCAPE: {"images": [], "label": "x"}}},
        {"question": {}},
        {"question": {**STUDY["question"], "subjects": {"case0": 3}}},  # type: ignore[dict-item]
        {"dataset_json": {**STUDY["dataset_json"], "file_ending": f"/{ESCAPE}"}},  # type: ignore[dict-item]
    ],
)
def test_study_json(changes: dict[str, Any], empty: Site) -> None:
    from mfm_nnunet.errors import MFMError

    empty.folder.mkdir(parents=True)
    write_json(empty.folder / "study.json", STUDY)
    assert read_study(empty.folder).compared == ["scratch"]
    write_json(empty.folder / "study.json", {**STUDY, **changes})
    with pytest.raises(MFMError) as caught:
        read_study(empty.folder)
    assert caught.value.code == "E_FORMAT"
    assert "study.json" in caught.value.message
