"""Folders that are taken, full, read-only or half finished: nothing is lost and the same command goes on afterwards."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mfm_nnunet import checkpoint
from mfm_nnunet import settings as mfm_settings
from mfm_nnunet.data import storage
from mfm_nnunet.jobs import predict
from mfm_nnunet.prediction.model import Model
from tests.builders.site import (
    CORPUS,
    FINETUNE,
    PRETRAIN,
    Site,
    accepted,
    contents,
    nothing_lost,
    refused,
    unchanged,
    write_dataset,
    write_json,
    write_scan,
    write_volume,
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


def test_input_that_is_none(site: Site) -> None:
    empty, text = site.folder / "empty", site.folder / "text"
    empty.mkdir()
    text.mkdir()
    (text / "notes.txt").write_text("x")
    with unchanged(site.folder):
        refused(site.predict(empty, site.folder / "out"), "E_NOT_FOUND", empty, ".nii.gz")
        refused(site.predict(text, site.folder / "out"), "E_NOT_FOUND", text, "notes.txt")
        refused(site.predict(site.folder / "nowhere", site.folder / "out"), "E_NOT_FOUND", "nowhere")
        file = site.test_images / "test0_0000.nii.gz"
        refused(site.predict(file, site.folder / "out"), "E_NOT_FOUND", file, "this is a file", "into a folder")


def test_masks_that_were_made_or_edited(site: Site) -> None:
    out = site.folder / "out"
    accepted(site.predict(site.test_images, out))
    with unchanged(out):
        refused(site.predict(site.test_images, out), "E_EXISTS", "--resume")
    (out / "test0.nii.gz").write_bytes(b"edited by hand")
    (out / "test1.nii.gz").unlink()
    with nothing_lost(out / "test0.nii.gz"):
        refused(site.predict(site.test_images, out, "--resume"), "1 of 2", "E_CHANGED", "--overwrite", code=3)
    assert (out / "test1.nii.gz").is_file()
    accepted(site.predict(site.test_images, out, "--overwrite"))
    assert (out / "test0.nii.gz").read_bytes() != b"edited by hand"


def test_runs_are_never_overwritten(site: Site) -> None:
    with unchanged(site.results):
        refused(site.pretrain(), "E_EXISTS", site.run_folder, "--c", "--run-name")
        refused(site.train(0), "E_EXISTS", "finished", "--c")
        refused(site.pretrain("--c", settings=TWO_EPOCHS["pretrain"]), "E_CONFIG", "pretrain.epochs was 1, is 2")
        refused(site.train(0, "--c", settings=TWO_EPOCHS["train"]), "E_CONFIG", "finetune.epochs was 1, is 2")
        refused(site.run("train", 5, "3d_fullres", 0, "--c", "--val"), "E_CONFIG", "--val")


def test_a_finished_run_stays_as_it_is(site: Site) -> None:
    finals = (site.run_folder / "checkpoint_final.pth", site.model / "fold_0" / "checkpoint_final.pth")
    with nothing_lost(*finals):
        outcome = accepted(site.pretrain("--c"))
        assert Path(outcome.out.splitlines()[-1]) == finals[0]
        accepted(site.run("train", 5, "3d_fullres", 0, "--c"))


@pytest.mark.parametrize("command", ["pretrain", "train"])
def test_a_loss_that_explodes(command: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the update, with advice and exit code 1; the run goes on from the last saved epoch."""
    monkeypatch.setattr(mfm_settings, "require_in_range", lambda *_: None)  # no legal rate is as bad
    part = {"pretrain": "pretrain", "train": "finetune"}[command]
    settings = [
        f"{part}.epochs=3",
        f"{part}.iterations_per_epoch=2",
        *TWO_EPOCHS[command][2:],
        f"{part}.learning_rate=1e30",
    ]
    words = ("--run-name", "new") if command == "pretrain" else ()
    outcome = site.pretrain(*words, settings=settings) if command == "pretrain" else site.train(1, settings=settings)
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert f"{part}.learning_rate" in last
    assert "Cases of the batch" in last
    assert "internal error" not in outcome.err
    assert "Traceback" not in outcome.out + outcome.err


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if the disk were full: no file may grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 1500, 20_000])
def test_disk_full_while_preprocessing(size: int, empty: Site) -> None:
    """At the fingerprint, the plan, or a case."""
    write_dataset(empty.raw)
    words = ("-d", 5, "-c", "3d_fullres")
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


@pytest.mark.parametrize(
    ("size", "file"),
    [(100, "settings.json"), (3000, "plans.json"), (30_000, "checkpoint_best.pth"), (None, "progress.png")],
)
def test_disk_full_while_training_names_the_file(size: int | None, file: str, site: Site) -> None:
    """Also one that nnU-Net writes; the finished folds beside it can still be used."""
    if size is None:
        sizes = [(site.model / "fold_0" / name).stat().st_size for name in ("checkpoint_final.pth", file)]
        assert sizes[0] < sizes[1], "the picture is larger than a checkpoint"
        size = sum(sizes) // 2
    with largest_file(size), nothing_lost(site.model):
        refused(site.train(1), "E_DISK_FULL", f"{file}: the disk is full")
    accepted(site.predict(site.test_images, site.folder / "out"))


@pytest.mark.parametrize("size", [50, 600])
def test_disk_full_while_predicting(size: int, site: Site) -> None:
    """At the first copy, and at a later one; nothing half written has a final name."""
    out = site.folder / "out"
    with largest_file(size):
        refused(site.predict(site.test_images, out), "E_DISK_FULL")
    for file in out.glob("*.json"):
        json.loads(file.read_text())
    assert not list(out.glob("*.nii.gz"))
    assert "test0: done" in accepted(site.predict(site.test_images, out, "--resume")).err


def test_a_mask_that_has_no_room_is_a_full_disk_at_once(site: Site) -> None:
    """Neither SimpleITK nor nibabel says why a mask was not written, and every case would be computed in vain."""
    for number in range(3):
        noise = np.random.default_rng(number).standard_normal((70, 60, 50))
        write_volume(site.folder / "large" / f"large{number}_0000.nii.gz", noise.astype(np.float32))
    out = site.folder / "out"
    with largest_file(100_000):
        outcome = site.predict(site.folder / "large", out)
    refused(outcome, "E_DISK_FULL", "large0", "the disk is full")
    assert "large1" not in outcome.err
    assert not list(out.glob("*.nii.gz"))
    assert not list(out.glob(".partial_*"))
    assert len([line for line in (out / "cases.jsonl").read_text().splitlines() if "failed" in line]) == 0
    accepted(site.predict(site.folder / "large", out, "--resume"))


def test_no_case_is_computed_without_room_for_its_mask(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "predict_logits", lambda *_, **__: pytest.fail("it was computed"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(site.predict(site.test_images, site.folder / "out"), "E_DISK_FULL", "test0.nii.gz")


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


def test_disk_full_at_the_second_mask(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case, seen = predict.write_case, []

    def limited(*arguments: Any, **keywords: Any) -> None:
        seen.append(1)
        with largest_file(10**9 if len(seen) == 1 else 100):
            write_case(*arguments, **keywords)

    out = site.folder / "out"
    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_case", limited)
        refused(site.predict(site.test_images, out), "E_DISK_FULL")
    assert [file.name for file in out.glob("*.nii.gz")] == ["test0.nii.gz"]
    with unchanged(out / "test0.nii.gz"):
        assert "test0" not in accepted(site.predict(site.test_images, out, "--resume")).err
    assert len(list(out.glob("*.nii.gz"))) == 2


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


def kill_at_case(number: int, words: tuple[object, ...], workspace: Path) -> None:
    """In a process of its own: plan and preprocess, and die while case ``number`` is being written."""
    from mfm_nnunet.cli import plan_and_preprocess

    write, seen = storage._write_array, []

    def write_or_die(*arguments: Any) -> None:
        seen.append(1)
        if len(seen) == 2 * number:  # a label map and an image per case
            os.kill(os.getpid(), signal.SIGKILL)
        write(*arguments)

    storage._write_array = write_or_die
    os._exit(plan_and_preprocess.main([*map(str, words), "--workspace", str(workspace)]))


def test_preprocessing_that_was_killed_goes_on(empty: Site) -> None:
    write_dataset(empty.raw)
    words = ("-d", 5, "-c", "3d_fullres")
    whole = Site(empty.folder / "whole", empty.call)
    write_dataset(whole.raw)
    accepted(whole.plan(*words))
    process = multiprocessing.get_context("fork").Process(target=kill_at_case, args=(2, words, empty.workspace))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(empty.preprocessed().glob(".partial_*"))
    assert [file.name for file in empty.data().glob("*.b2nd") if "_seg" not in file.name] == ["case0.b2nd"]
    with nothing_lost(empty.data()):
        outcome = accepted(empty.plan(*words))
    assert "2 cases preprocessed, 1 reused" in outcome.err
    assert not list(empty.preprocessed().glob(".partial_*"))
    digests = [{Path(name).name: digest for name, digest in contents(site.data()).items()} for site in (empty, whole)]
    assert digests[0] == digests[1]


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


def test_an_unexpected_error_costs_one_case_and_no_traceback(empty: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback is in the log."""
    for number in range(3):
        write_scan(empty.scans / f"scan{number}.nii.gz", number)
    write: Callable[..., None] = storage.store_case

    def broken(*arguments: Any) -> None:
        if arguments[2] == "scan1":
            raise KeyError("an error of ours")
        write(*arguments)

    monkeypatch.setattr(storage, "store_case", broken)
    outcome = empty.plan("-d", 701, "-c", "3d_fullres", "--images", empty.scans)
    refused(outcome, "1 of 3", "scan1: E_INTERNAL", "mfm_error.log", code=3)
    assert "an error of ours" in empty.log
    assert "Traceback" in empty.log
