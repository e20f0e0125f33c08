"""Unknown names and impossible values: refused before anything is written, with the nearest legal name."""

from __future__ import annotations

import unicodedata
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.builders.site import (
    CORPUS,
    FINETUNE,
    LABELLED,
    PRETRAIN,
    Site,
    accepted,
    refused,
    unchanged,
    with_small_network,
    write_scan,
)

UNKNOWN: dict[str, tuple[str, str, str]] = {
    # what: (command, words, what the message must say)
    "dataset to plan": ("plan_and_preprocess", "-d Dataset005_Fow", "'Dataset005_Few'"),
    "number to plan": ("plan_and_preprocess", "-d 6", "Dataset005_Few, Dataset701_Corpus"),
    "configuration to plan": ("plan_and_preprocess", "-d 5 -c 3d_fulres", "'3d_fullres'"),
    "plan name": ("plan_and_preprocess", "-d 5 -pl Plans", "mfmPlans"),
    "plan name with a path": ("plan_and_preprocess", "-d 5 -pl mfm/../../x", "mfm"),
    "network": ("plan_and_preprocess", "-d 5 --network primos", "primus"),
    "checkpoint to plan like": ("plan_and_preprocess", "-d 5 --like nowhere.pth", "nowhere.pth"),
    "dataset to pretrain on": ("pretrain", "702 3d_fullres", CORPUS),
    "configuration to pretrain": ("pretrain", "701 3d_fulres", "'3d_fullres'"),
    "plan to pretrain": ("pretrain", "701 3d_fullres -p mfmPlan", "'mfmPlans'"),
    "pretext task": ("pretrain", "701 3d_fullres --pretext maee", "'mae'"),
    "module of a pretext task": ("pretrain", "701 3d_fullres --pretext no.such.Task", "PYTHONPATH"),
    "class of a pretext task": ("pretrain", "701 3d_fullres --pretext os.path.Task", "PretextTask"),
    "run name with a path": ("pretrain", "701 3d_fullres --run-name a/../../b", "--run-name"),
    "dataset to train on": ("train", "Dataset005_Fw 3d_fullres 1", "'Dataset005_Few'"),
    "corpus to train on": ("train", "701 3d_fullres 0", "mfm_pretrain"),
    "configuration to train": ("train", "5 3d_fulres 1", "'3d_fullres'"),
    "plan to train": ("train", "5 3d_fullres 1 -p mfmPlns", "'mfmPlans'"),
    "fold": ("train", "5 3d_fullres 7", "0 to 2"),
    "fold that is no number": ("train", "5 3d_fullres first", "all"),
    "trainer": ("train", "5 3d_fullres 1 -tr MFMTrainr", "'MFMTrainer'"),
    "checkpoint to start from": ("train", "5 3d_fullres 1 -pretrained_weights nowhere.pth", "nowhere.pth"),
    "device": ("train", "5 3d_fullres 1 -device gpu", "cuda"),
    "settings for stock's trainer": ("train", "5 3d_fullres 1 -tr nnUNetTrainer --set seed=1", "MFMTrainer"),
    "run to validate": ("train", "5 3d_fullres 1 --val", "checkpoint_final.pth"),
    "run to continue": ("train", "5 3d_fullres 1 --c", "without --c"),
    "run to pretrain further": ("pretrain", "701 3d_fullres --c --run-name new", "without --c"),
}


def test_unknown_names(site: Site) -> None:
    with unchanged(site.folder):
        for command, words, hint in UNKNOWN.values():
            refused(site.run(command, *words.split()), hint)


MODELS: dict[str, tuple[str, str]] = {
    "folder": ("-m nowhere", "nowhere"),
    "folder that is none": ("-m {images}", "plans.json"),
    "checkpoint of a fold": ("-m {model}/fold_0/checkpoint_final.pth", "Give its folder, {model}"),
    "fold as a folder": ("-m {model}/fold_0", "Give its folder, {model}"),
    "file of a model": ("-m {model}/dataset.json", "Give its folder, {model}"),
    "folder of models": ("-m {model}/..", "MFMTrainer__mfmPlans__3d_fullres"),
    "misspelt folder": ("-m {model}s", "'MFMTrainer__mfmPlans__3d_fullres'"),
    "pretrained checkpoint": ("-m {pretrained}", "folders fold_X"),
    "dataset": ("-d 6 -c 3d_fullres", LABELLED),
    "configuration": ("-d 5 -c 2d", "'MFMTrainer__mfmPlans__3d_fullres'"),
    "fold": ("-d 5 -c 3d_fullres -f 3", "Folds with this checkpoint: 0"),
    "fold that is no number": ("-d 5 -c 3d_fullres -f first", "all"),
    "checkpoint": ("-d 5 -c 3d_fullres -chk checkpoint_bst.pth", "checkpoint_best.pth"),
    "trainer": ("-d 5 -c 3d_fullres -tr nnUNetTrainer", "'MFMTrainer__mfmPlans__3d_fullres'"),
}


def test_unknown_models(site: Site) -> None:
    places = {"images": site.test_images, "model": site.model, "pretrained": site.pretrained}
    with unchanged(site.folder):
        for line in MODELS.values():
            words, hint = (text.format(**places) for text in line)
            refused(site.predict(site.test_images, site.folder / "out", *words.split()), hint)


VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
NOT_HERE = {
    "plan_and_preprocess": "-d 5",
    "pretrain": "701 3d_fullres",
    "train": "5 3d_fullres 0",
    "predict": "-i {images} -o out -d 5 -c 3d_fullres",
    "study": "5 3d_fullres --labels 1 --arms scratch",
}


def test_another_workspace(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that is missing, that is a file, and a variable that names nothing: each says where it was set."""
    monkeypatch.chdir(site.folder)
    file = site.folder / "file"
    file.write_text("")
    lines = {command: words.format(images=site.test_images).split() for command, words in NOT_HERE.items()}
    with unchanged(site.folder):
        for command, line in lines.items():
            missing = site.run(command, *line, "--workspace", site.folder / "nowhere", in_workspace=False)
            refused(missing, "E_NOT_FOUND", site.folder / "nowhere", "--workspace")
            refused(site.run(command, *line, "--workspace", file, in_workspace=False), "E_EXISTS", "--workspace", file)
        for name in VARIABLES:
            monkeypatch.setenv(name, str(site.folder / "typo"))
        for command, line in lines.items():
            refused(site.run(command, *line), "E_NOT_FOUND", "nnUNet_raw", site.folder / "typo")


def test_results_of_another_place(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(site.folder / "typo"))
    line = ("-d", "5", "-c", "3d_fullres")
    refused(site.predict(site.test_images, site.folder / "out", *line), "E_NOT_FOUND", "nnUNet_results", "typo")


SETTINGS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "pretrain": (PRETRAIN, {
        "pretrain.epoch=3": "'pretrain.epochs'",
        "finetune.epochs=3": "'pretrain.epochs'",
        "pretrain.epochs=2.5": "expected int",
        "pretrain.epochs=0": "pretrain.epochs=0",
        "pretrain.learning_rate=nan": "pretrain.learning_rate",
        "pretrain.optimizer=adam": "sgd, adamw",
        "pretext.mask_ration=0.5": "'pretext.mask_ratio'",
        "pretext.mask_ratio=2": "between 0 and 1",
        "pretext.cell_size=3,3": "3 axes",
        "seed=-1": "seed",
    }),
    "train": (FINETUNE, {
        "finetune.epoch=3": "'finetune.epochs'",
        "finetune.learning_rate=fast": "expected float",
        "finetune.warmup_epochs=9": "warmup_epochs",
        "finetune.checkpoint=x.pth": "-pretrained_weights",
        "finetune.batch_size=1000000000": "finetune.batch_size",
        "network=primus": "training has no setting 'network'",
    }),
}  # fmt: skip


@pytest.mark.parametrize("command", SETTINGS)
def test_wrong_settings(command: str, site: Site) -> None:
    good, wrong = SETTINGS[command]
    with unchanged(site.folder):
        for setting, hint in wrong.items():
            settings = [*(other for other in good if other.split("=")[0] != setting.split("=")[0]), setting]
            call = {"train": partial(site.train, 1), "pretrain": partial(site.pretrain, "--run-name", "new")}[command]
            refused(call(settings=settings), "E_CONFIG", hint)


PLANNING: dict[str, tuple[str, str]] = {
    "spacing that leaves nothing": ("--spacing 1000 1 1", "voxels"),
    "spacing that leaves too little": ("--spacing 20 20 20", "--spacing"),
    "memory that nothing fits into": ("--memory-gb 0.01", "--memory-gb"),
    "negative memory": ("--memory-gb -3", "above 0"),
    "spacing and checkpoint": ("--spacing onemm --like {checkpoint}", "--spacing"),
    "network and checkpoint": ("--network primus --like {checkpoint}", "--network"),
    "name without images": ("--name X", "--images"),
}


def test_impossible_plans(site: Site) -> None:
    accepted(site.plan("-d", 5, "--no_pp"))  # the fingerprint of this copy of the dataset
    with unchanged(site.folder):
        for words, hint in PLANNING.values():
            refused(site.plan("-d", 5, "-pl", "mfmNew", *words.format(checkpoint=site.pretrained).split()), hint)


CORPORA: dict[str, tuple[str, str]] = {
    "taken by a dataset": ("-d 5 --images {scans}", LABELLED),
    "taken by a corpus of another name": ("-d 701 --images {scans} --name Other", CORPUS),
    "other scans": ("-d 701 --images {images}", "Choose another number"),
    "two numbers": ("-d 702 703 --images {scans}", "exactly one -d"),
    "number too large": ("-d 1702 --images {scans}", "1 to 999"),
    "name with a space": ("-d 702 --images {scans} --name A|B", "letters, digits"),
    "no such folder": ("-d 702 --images nowhere", "nowhere"),
    "empty folder": ("-d 702 --images {empty}", "no image"),
    "another file": ("-d 702 --images {text}", "expected a folder, a CSV file, a pretrain_data.json or an image"),
}


def test_corpora_that_cannot_be_registered(site: Site) -> None:
    places = {"scans": site.scans, "images": site.test_images, "empty": site.folder / "empty"}
    places["text"] = site.folder / "notes.txt"
    places["empty"].mkdir()
    places["text"].write_text("notes")
    with unchanged(site.folder):
        for words, hint in CORPORA.values():
            refused(site.plan(*(word.format(**places).replace("|", " ") for word in words.split())), hint)


def test_strange_names_work(empty: Site) -> None:
    """Spaces, umlauts, other scripts, composed and decomposed letters, one stem with two endings, a long name."""
    site = Site(empty.folder / "Daten der Radiologie, Größe 2", empty.call)
    names = ["Müller, Hans (2).nii.gz", "患者 7.nii.gz", "x.nii", "x.nii.gz", "-dash.nii.gz", "a" * 200 + ".nii.gz"]
    names += [unicodedata.normalize(form, "é").join(("caf", ".nii.gz")) for form in ("NFC", "NFD")]
    for number, name in enumerate(names):
        write_scan(site.scans / name, number)
    write_scan(site.scans / "other folder" / "x.nii.gz", 99)
    accepted(site.plan("-d", 701, "-c", "3d_fullres", "--images", site.scans))
    files = sorted(site.data(CORPUS).glob("*.b2nd"))
    assert len(files) == len({file.name.casefold() for file in files}) == len(names) + 1
    assert all(file.name.isascii() for file in files)
    with_small_network(site.preprocessed(CORPUS) / "mfmPlans.json")
    accepted(site.pretrain())


def steering(text: str) -> list[str]:
    """Characters that do something to a terminal."""
    return [character for character in text if not character.isprintable() and character != "\n"]


def test_names_of_scans(site: Site) -> None:
    """Through the commands: failed cases, warnings, and a message with the path of the folder; and in the log."""
    images = site.folder / "in \x1b[31m"
    for name in ("good", "bad\x1b[2J\u202e", "two\nlines"):
        write_scan(images / f"{name}_0000.nii.gz", 1)
    for name in ("bad\x1b[2J\u202e", "two\nlines"):
        (images / f"{name}_0000.nii.gz").write_bytes(b"no scan")
    (images / "other\x1b[2J.png").write_bytes(b"")
    outcome = site.predict(images, site.folder / "out")
    shown = refused(outcome, r"bad\x1b[2J\u202e", r"two\nlines", code=3)
    assert len(shown.splitlines()) == 3
    assert r"other\x1b[2J.png" in outcome.err
    for text in (outcome.out, outcome.err, site.log):
        assert not steering(text)


def test_a_corpus_of_one_scan(empty: Site) -> None:
    write_scan(empty.scans / "scan.nii.gz")
    accepted(empty.plan("-d", 701, "-c", "3d_fullres", "--images", empty.scans / "scan.nii.gz"))
    with_small_network(empty.preprocessed(CORPUS) / "mfmPlans.json")
    refused(empty.pretrain(), "pretrain.validation_fraction=0")
    outcome = accepted(empty.pretrain(settings=[*PRETRAIN, "pretrain.validation_fraction=0"]))
    assert Path(outcome.out.splitlines()[-1]).is_file()
    two_volumes = ("--pretext", "volume_fusion", "--run-name", "two")
    settings = [*PRETRAIN, "pretrain.validation_fraction=0", "pretext.variant=two_image"]
    refused(empty.pretrain(*two_volumes, settings=settings), "E_CONFIG", "2 volumes", "Add scans")


def test_gpus_that_are_not_there(site: Site) -> None:
    """Found before processes are started, each of which would say it."""
    if torch.cuda.is_available():
        pytest.skip("this computer has a GPU")
    with unchanged(site.folder):
        refused(site.train(1, "-device", "cuda"), "E_CONFIG", "-device cpu")
        refused(site.train(1, "-num_gpus", 2), "E_CONFIG", "-device cpu")
        refused(site.pretrain("--run-name", "new", "-device", "cuda"), "E_CONFIG", "-device cpu")
        refused(site.pretrain("--run-name", "new", "-device", "cuda", "-num_gpus", 2), "E_CONFIG", "-device cpu")
        refused(site.pretrain("-num_gpus", 2), "E_EXISTS", site.run_folder)
