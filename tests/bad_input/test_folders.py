"""Folders that are taken, full, read-only or half finished: nothing is lost and the same command goes on afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mfm_nnunet import checkpoint
from tests.builders.site import (
    CORPUS,
    FINETUNE,
    PRETRAIN,
    Site,
    accepted,
    nothing_lost,
    refused,
    unchanged,
    write_dataset,
    write_json,
    write_scan,
)

resource = pytest.importorskip("resource")
TWO_EPOCHS = {
    "pretrain": ("pretrain.epochs=2", *PRETRAIN[1:]),
    "train": ("finetune.epochs=2", *FINETUNE[1:]),
}


def test_output_that_is_taken(site: Site) -> None:
    images, out = site.test_images, site.folder / "out"
    out.mkdir()
    (out / "notes.txt").write_text("of the radiologist")
    with unchanged(site.folder):
        refused(site.predict(images, out), "E_EXISTS", out, "notes.txt", "--overwrite", "--resume")
        refused(site.predict(images, out, "--resume"), "E_EXISTS", "cases.jsonl")
        refused(site.predict(images, images), "E_CONFIG", images)
        refused(site.predict(images, images / "masks"), "E_CONFIG", images)
        refused(site.predict(images, site.model), "E_CONFIG", site.model)
        refused(site.predict(images, out / "notes.txt"), "E_EXISTS", "notes.txt")
        refused(site.predict(images, out / "notes.txt" / "deeper"), "E_EXISTS", "notes.txt")
        refused(site.predict(images, site.folder / ("x" * 300)), "E_CONFIG", "too long")


def test_runs_are_never_overwritten(site: Site) -> None:
    with unchanged(site.results):
        refused(site.pretrain(), "E_EXISTS", site.run_folder, "--c", "--run-name")
        refused(site.train(0), "E_EXISTS", "finished", "--c")
        for call, part in ((site.pretrain, "pretrain"), (partial(site.train, 0), "finetune")):
            other = f"{part}.gradient_clip"
            refused(call("--c", settings=[f"{other}=0.5"]), "E_CONFIG", other)
        refused(site.run("train", 5, "3d_fullres", 0, "--c", "--val"), "E_CONFIG", "--val")


def test_a_finished_run_stays_as_it_is(site: Site) -> None:
    finals = (site.run_folder / "checkpoint_final.pth", site.model / "fold_0" / "checkpoint_final.pth")
    with nothing_lost(*finals):
        outcome = accepted(site.pretrain("--c"))
        assert Path(outcome.out.splitlines()[-1]) == finals[0]
        accepted(site.run("train", 5, "3d_fullres", 0, "--c"))


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if the disk were full: no file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_while_preprocessing(empty: Site) -> None:
    """At the fingerprint, and at a case."""
    write_dataset(empty.raw)
    words = ("-d", 5, "-c", "3d_fullres")
    for size in (100, 20_000):
        with largest_file(size), unchanged(empty.raw):
            refused(empty.plan(*words), "E_DISK_FULL", "run the command again")
    assert not list(empty.workspace.rglob(".partial_*"))
    assert not list(empty.workspace.rglob("*.tmp"))
    outcome = accepted(empty.plan(*words))
    assert "3 cases preprocessed" in outcome.err
    with largest_file(1000), unchanged(empty.data()):
        refused(empty.plan(*words, "--spacing", 2, 2, 2, "-pl", "mfmOther"), "E_DISK_FULL")


def full_from_second_save(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The disk is full from the second ``checkpoint_best``, ``checkpoint_latest`` or ``resume`` on."""
    save, seen = checkpoint.save, []

    def limited(content: Any, path: Any) -> None:
        seen.append(Path(path).name)
        if len(seen) <= 2:
            save(content, path)
            return
        with largest_file(size):
            save(content, path)

    monkeypatch.setattr(checkpoint, "save", limited)


def test_disk_full_while_pretraining(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TWO_EPOCHS["pretrain"]
    whole = accepted(site.pretrain("--run-name", "whole", settings=settings)).out.splitlines()[-1]
    with largest_file(1000):
        refused(site.pretrain("--run-name", "full", settings=settings), "E_DISK_FULL", "resume.pth")
    with monkeypatch.context() as patch, nothing_lost(site.run_folder):
        full_from_second_save(patch, 1000)
        refused(site.pretrain("--run-name", "full", settings=settings), "E_DISK_FULL", "resume.pth")
    folder = site.run_folder.with_name(f"{site.run_folder.name}__full")
    assert not list(folder.glob("*.tmp"))
    refused(site.pretrain("--run-name", "full", settings=settings), "E_EXISTS", "--c")
    outcome = accepted(site.pretrain("--run-name", "full", "--c", settings=settings))
    assert "continuing at step 1 of 2" in outcome.err
    assert (folder / "checkpoint_final.pth").read_bytes() == Path(whole).read_bytes()


def test_disk_full_while_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TWO_EPOCHS["train"]
    accepted(site.train(1, settings=settings))
    weights = site.model / "fold_1" / "checkpoint_final.pth"
    whole = site.folder / "whole.pth"
    shutil.copy(weights, whole)
    shutil.rmtree(weights.parent)
    with monkeypatch.context() as patch, nothing_lost(site.model / "fold_0"):
        full_from_second_save(patch, 1000)
        refused(site.train(1, settings=settings), "E_DISK_FULL", "checkpoint_")
    assert not list(weights.parent.glob("*.tmp"))
    accepted(site.run("train", 5, "3d_fullres", 1, "--c"))
    old, new = (checkpoint.load(file)["network_weights"] for file in (whole, weights))
    assert all(old[name].equal(new[name]) for name in old)


def test_disk_full_while_training_names_the_file(site: Site) -> None:
    """Also one that nnU-Net writes; the finished folds beside it can still be used."""
    finished = site.model / "fold_0"
    weights, picture = ((finished / name).stat().st_size for name in ("checkpoint_final.pth", "progress.png"))
    assert weights < picture
    for fold, (size, file) in enumerate([(100, "settings.json"), ((weights + picture) // 2, "progress.png")], start=1):
        with largest_file(size), nothing_lost(finished):
            refused(site.train(fold), "E_DISK_FULL", f"{file}: the disk is full")
    accepted(site.predict(site.test_images, site.folder / "out"))


def test_disk_full_while_predicting(site: Site) -> None:
    """Nothing half written has a final name."""
    out = site.folder / "out"
    with largest_file(600):
        refused(site.predict(site.test_images, out), "E_DISK_FULL")
    for file in out.glob("*.json"):
        json.loads(file.read_text())
    assert not list(out.glob("*.nii.gz"))
    assert "test0: done" in accepted(site.predict(site.test_images, out, "--resume")).err


def test_leftovers_of_killed_saves_are_removed(site: Site) -> None:
    """In the folders of runs and of plans, at the next start."""
    folders = {
        "pretrain": site.run_folder,
        "train": site.model / "fold_0",
        "validation": site.model / "fold_0" / "validation",
        "plan": site.preprocessed(),
    }
    for folder in folders.values():
        (folder / ".x.json.0123abcd.tmp").write_bytes(b"half")
    (folders["validation"] / ".partial_abcdefgh").mkdir()
    (folders["validation"] / ".partial_abcdefgh" / "case0.nii.gz").write_bytes(b"half")
    accepted(site.pretrain("--c"))
    accepted(site.run("train", 5, "3d_fullres", 0, "--val"))
    accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmOther"))
    left = [str(file) for folder in folders.values() for file in folder.glob(".*") if file.name[1] in "xp"]
    assert [file for file in left if "validation/.x" not in file] == []


@contextlib.contextmanager
def without_rights(*folders: Path) -> Iterator[None]:
    """These folders are read-only. Root may write everywhere, so it becomes somebody else for the time."""
    is_root = os.geteuid() == 0
    modes = {folder: folder.stat().st_mode for folder in folders}
    for folder in folders:
        folder.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for folder, mode in modes.items():
            folder.chmod(mode)


@pytest.fixture
def open_site(site: Site) -> Iterator[Site]:
    """A copy of the hospital in a place where everybody may look around."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(site.folder, Path(folder, "site"))
        shutil.copytree(site.raw, Path(folder, "site", "scans"), dirs_exist_ok=True)
        yield Site(Path(folder, "site"), site.call)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX users")
def test_folders_that_may_not_be_written(open_site: Site) -> None:
    site = open_site
    locked = site.folder / "locked"
    locked.mkdir()
    places = [locked, *(folder for folder in site.workspace.rglob("*") if folder.is_dir()), site.workspace, site.folder]
    accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmBefore"))  # the fingerprint of this copy
    with unchanged(site.folder), without_rights(*places):
        refused(site.predict(site.test_images, locked), "E_PERMISSION", locked)
        refused(site.predict(site.test_images, locked / "new"), "E_PERMISSION", locked)
        refused(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmNew"), "E_PERMISSION", site.preprocessed())
        refused(site.pretrain("--run-name", "new"), "E_PERMISSION", site.results)
        refused(site.train(1), "E_PERMISSION", site.model)


def test_other_plans_keep_their_data(site: Site) -> None:
    """Stock's data, another plan of ours, and cases that the dataset has no more."""
    folder = site.preprocessed()
    stock = folder / "nnUNetPlans_3d_fullres"
    shutil.copytree(site.data(), stock)
    write_json(folder / "nnUNetPlans.json", {"plans_name": "nnUNetPlans"})
    accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmCoarse", "--spacing", 2, 2, 2))
    (site.raw / "imagesTr" / "case2_0000.nii.gz").unlink()
    (site.raw / "labelsTr" / "case2.nii.gz").unlink()
    with nothing_lost(stock, site.data(), site.data(plans="mfmCoarse"), folder / "nnUNetPlans.json"):
        assert "case2" in accepted(site.plan("-d", 5, "-c", "3d_fullres")).err
        accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmFine", "--spacing", 1.5, 1.5, 1.5))
        accepted(site.plan("-d", 5, "-c", "2d", "-pl", "mfmFlat"))


def test_a_scan_that_vanished_or_changed(empty: Site) -> None:
    for number in range(3):
        write_scan(empty.scans / f"scan{number}.nii.gz", number)
    accepted(empty.plan("-d", 701, "-c", "3d_fullres", "--images", empty.scans))
    (empty.scans / "scan1.nii.gz").unlink()
    refused(empty.plan("-d", 701, "-c", "3d_fullres"), "1 of 3", "scan1", "E_NOT_FOUND", code=3)
    write_scan(empty.scans / "scan2.nii.gz", 77)
    outcome = empty.plan("-d", 701, "-c", "3d_fullres")
    assert "1 cases preprocessed, 1 reused" in outcome.err
    assert outcome.code == 3
    assert (empty.data(CORPUS) / "scan1.b2nd").is_file()
