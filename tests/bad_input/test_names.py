"""Unknown names and impossible values: refused before anything is written, with the nearest legal name."""

from __future__ import annotations

import unicodedata
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
    nothing_lost,
    refused,
    unchanged,
    with_small_network,
    write_dataset,
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


@pytest.mark.parametrize("what", UNKNOWN)
def test_unknown_name(what: str, site: Site) -> None:
    command, words, hint = UNKNOWN[what]
    with unchanged(site.folder):
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


@pytest.mark.parametrize("what", MODELS)
def test_unknown_model(what: str, site: Site) -> None:
    places = {"images": site.test_images, "model": site.model, "pretrained": site.pretrained}
    words, hint = (text.format(**places) for text in MODELS[what])
    with unchanged(site.folder):
        refused(site.predict(site.test_images, site.folder / "out", *words.split()), hint)


VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
NOT_HERE: dict[str, tuple[str, str]] = {
    "plan_and_preprocess": ("-d 5", "nnUNet_raw"),
    "pretrain": ("701 3d_fullres", "nnUNet_raw"),
    "train": ("5 3d_fullres 0", "nnUNet_raw"),
    "predict": ("-i {images} -o out -d 5 -c 3d_fullres", "nnUNet_raw"),
    "study": ("5 3d_fullres --labels 1 --arms scratch", "nnUNet_raw"),
}


@pytest.mark.parametrize("command", NOT_HERE)
def test_another_workspace(command: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that is missing, that is a file, and a variable that names nothing: each says where it was set."""
    words, variable = NOT_HERE[command]
    line = words.format(images=site.test_images).split()
    monkeypatch.chdir(site.folder)
    file = site.folder / "file"
    file.write_text("")
    with unchanged(site.folder):
        missing = site.run(command, *line, "--workspace", site.folder / "nowhere", in_workspace=False)
        refused(missing, "E_NOT_FOUND", site.folder / "nowhere", "--workspace")
        refused(site.run(command, *line, "--workspace", file, in_workspace=False), "E_EXISTS", "--workspace", file)
        for name in VARIABLES:
            monkeypatch.setenv(name, str(site.folder / "typo"))
        refused(site.run(command, *line), "E_NOT_FOUND", variable, site.folder / "typo")


def test_results_of_another_place(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(site.folder / "typo"))
    line = ("-d", "5", "-c", "3d_fullres")
    refused(site.predict(site.test_images, site.folder / "out", *line), "E_NOT_FOUND", "nnUNet_results", "typo")


def test_raw_data_of_another_place(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is preprocessed is found, and planning needs the raw folder."""
    monkeypatch.setenv("nnUNet_raw", str(site.folder / "typo"))
    refused(site.plan("-d", 5), "E_NOT_FOUND", "nnUNet_raw", "typo")
    refused(site.run("study", 5, "3d_fullres", "--labels", 1, "--arms", "scratch"), "E_NOT_FOUND", "nnUNet_raw")


@pytest.mark.parametrize("name", ["IM-0001.dcm", "I0000001", "deep/er/1.2.840.1"])
def test_dicom_is_to_be_converted(name: str, site: Site) -> None:
    """By its ending, and by its first bytes where archives give none; for prediction, and for a corpus."""
    file = site.folder / "study" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(128) + b"DICM" + bytes(100))
    outcomes = [site.predict(site.folder / "study", site.folder / "out")]
    outcomes += [site.plan("-d", 702, "--images", source) for source in (site.folder / "study", file)]
    for outcome in outcomes:
        refused(outcome, "E_FORMAT" if outcome is outcomes[2] else "E_NOT_FOUND", "dcm2niix")


PRETRAIN_SETTINGS = {
    "pretrain.epoch=3": "'pretrain.epochs'",
    "epochs=3": "'pretrain.epochs'",
    "pretext.mask_ration=0.5": "'pretext.mask_ratio'",
    "finetune.epochs=3": "'pretrain.epochs'",
    "pretrain.epochs=three": "expected int",
    "pretrain.epochs=2.5": "expected int",
    "pretrain.epochs=0": "pretrain.epochs=0",
    "pretrain.epochs=-1": "pretrain.epochs=-1",
    "pretrain.epochs=1000000000000000000000": "at most 1000000",
    "pretrain.iterations_per_epoch=0": "pretrain.iterations_per_epoch=0",
    "pretrain.batch_size=0": "pretrain.batch_size=0",
    "pretrain.learning_rate=nan": "pretrain.learning_rate",
    "pretrain.learning_rate=inf": "pretrain.learning_rate",
    "pretrain.learning_rate=-1": "pretrain.learning_rate",
    "pretrain.optimizer=adam": "sgd, adamw",
    "pretrain.precision=fp8": "auto, fp32, bf16, fp16",
    "pretrain.warmup_epochs=-3": "warmup_epochs",
    "pretrain.weight_decay=-1": "weight_decay",
    "pretrain.gradient_clip=0": "gradient_clip",
    "pretrain.validation_fraction=1": "validation_fraction",
    "pretext.mask_ratio=2": "between 0 and 1",
    "pretext.cell_size=0": "cell_size",
    "pretext.cell_size=3,3": "3 axes",
    "seed=-1": "seed",
    "num_workers=-1": "num_workers",
}


@pytest.mark.parametrize("setting", PRETRAIN_SETTINGS)
def test_wrong_setting_of_pretraining(setting: str, site: Site) -> None:
    name = setting.partition("=")[0]
    others = [other for other in PRETRAIN if other.partition("=")[0] != name]
    with unchanged(site.folder):
        refused(site.pretrain("--run-name", "new", settings=[*others, setting]), "E_CONFIG", PRETRAIN_SETTINGS[setting])


FINETUNE_SETTINGS = {
    "finetune.epoch=3": "'finetune.epochs'",
    "pretrain.epochs=3": "'finetune.epochs'",
    "finetune.epochs=0": "finetune.epochs=0",
    "finetune.iterations_per_epoch=0": "finetune.iterations_per_epoch=0",
    "finetune.learning_rate=-1": "finetune.learning_rate",
    "finetune.learning_rate=fast": "expected float",
    "finetune.warmup_epochs=9": "warmup_epochs",
    "finetune.weight_decay=-1": "weight_decay",
    "finetune.precision=half": "auto, fp32, bf16, fp16",
    "finetune.deep_supervision=maybe": "expected bool",
    "finetune.checkpoint=x.pth": "-pretrained_weights",
    "finetune.iterations_per_epoch=1000000001": "at most 1000000",
    "finetune.batch_size=1000000000": "finetune.batch_size",
    "seed=-1": "seed=-1: must be at least 0",
    "network=primus": "training has no setting 'network'",
    "num_workers=-1": "num_workers",
}


@pytest.mark.parametrize("setting", FINETUNE_SETTINGS)
def test_wrong_setting_of_training(setting: str, site: Site) -> None:
    name = setting.partition("=")[0]
    others = [other for other in FINETUNE if other.partition("=")[0] != name]
    with unchanged(site.folder):
        refused(site.train(1, settings=[*others, setting]), "E_CONFIG", FINETUNE_SETTINGS[setting])


PLANNING: dict[str, tuple[str, str]] = {
    "spacing that leaves nothing": ("--spacing 1000 1 1", "voxels"),
    "spacing that leaves too little": ("--spacing 20 20 20", "--spacing"),
    "memory that nothing fits into": ("--memory-gb 0.01", "--memory-gb"),
    "negative memory": ("--memory-gb -3", "above 0"),
    "spacing and checkpoint": ("--spacing onemm --like {checkpoint}", "--spacing"),
    "network and checkpoint": ("--network primus --like {checkpoint}", "--network"),
    "name without images": ("--name X", "--images"),
}


@pytest.mark.parametrize("what", PLANNING)
def test_impossible_plan(what: str, site: Site) -> None:
    words, hint = PLANNING[what]
    accepted(site.plan("-d", 5, "--no_pp"))  # the fingerprint of this copy of the dataset
    with unchanged(site.folder):
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


@pytest.mark.parametrize("what", CORPORA)
def test_corpus_that_cannot_be_registered(what: str, site: Site) -> None:
    words, hint = CORPORA[what]
    places = {"scans": site.scans, "images": site.test_images, "empty": site.folder / "empty"}
    places["text"] = site.folder / "notes.txt"
    places["empty"].mkdir()
    places["text"].write_text("notes")
    with unchanged(site.folder):
        refused(site.plan(*(word.format(**places).replace("|", " ") for word in words.split())), hint)


TABLES = {
    "columns": ("file,age\na.nii.gz,3\n", "'image'"),
    "nothing": ("", "'image'"),
    "no rows": ("image\n", "no image"),
    "missing files": ("image\nscans/scan0.nii.gz\nscans/gone.nii.gz\n", "line 3"),
    "empty cells": ("image_0,image_1\nscans/scan0.nii.gz,\n", "image_1 is empty"),
    "a name twice": ("image,case\nscans/scan0.nii.gz,a\nscans/scan1.nii.gz,a\n", "named twice: a"),
    "no text": (b"\xff\xfe\x00\x01", "CSV"),
}


@pytest.mark.parametrize("what", TABLES)
def test_table_of_scans(what: str, site: Site) -> None:
    content, hint = TABLES[what]
    table = site.folder / "scans.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with unchanged(site.folder):
        refused(site.plan("-d", 702, "--images", table), table, hint)


@pytest.mark.parametrize(
    ("command", "words", "nearest"),
    [
        ("plan_and_preprocess", "-d 5 --memory-bg 8", "--memory-gb"),
        ("pretrain", "701 3d_fullres --pretex mae", "--pretext"),
        ("train", "5 3d_fullres 1 -pretrained_weight x.pth", "-pretrained_weights"),
        ("predict", "-i in -o out -m model --overwrit", "--overwrite"),
        ("train", "5 3d_fullres 1 --epochs 3", "finetune.epochs=VALUE"),
        ("pretrain", "701 3d_fullres --epochs 3", "with --set: pretrain.epochs=VALUE."),
        ("demo", "--learning-rate 3", "pretrain.learning_rate=VALUE or finetune.learning_rate=VALUE"),
    ],
)
def test_misspelt_flag(command: str, words: str, nearest: str, site: Site) -> None:
    with unchanged(site.folder):
        refused(site.run(command, *words.split()), nearest)


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


def test_masks_of_strange_names(site: Site) -> None:
    images = site.folder / "neue Bilder"
    names = ["Müller, Hans (2)", "患者 7", "-dash", "a.b.c"]
    for number, name in enumerate(names):
        write_scan(images / f"{name}_0000.nii.gz", number)
    accepted(site.predict(images, site.folder / "neue Masken"))
    assert {file.name for file in (site.folder / "neue Masken").glob("*.nii.gz")} == {f"{n}.nii.gz" for n in names}


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


def test_names_of_a_corpus_and_of_flags(empty: Site) -> None:
    for number, name in enumerate(("good", "bad \x1b[2J", "also \u202e")):
        write_scan(empty.scans / f"{name}.nii.gz", number)
    (empty.scans / "bad \x1b[2J.nii.gz").write_bytes(b"no scan")
    outcomes = [empty.plan("-d", 701, "-c", "3d_fullres", "--images", empty.scans)]
    outcomes += [empty.run("plan_and_preprocess", *words) for words in (("--\x1b[2J",), ("-d", "4", "--like", "\x1b"))]
    for outcome in outcomes:
        assert outcome.code in (2, 3)
        assert not steering(outcome.out + outcome.err)


def test_words_of_a_checkpoint(site: Site) -> None:
    content = torch.load(site.pretrained, weights_only=True)
    content["mfm"] |= {"licence": "cc\x1b[2J", "citations": ["Doe\u202e (2022)"]}
    torch.save(content, site.folder / "a\x1b[2J.pth")
    outcome = accepted(site.run("checkpoint", "describe", site.folder / "a\x1b[2J.pth"))
    assert r"cc\x1b[2J" in outcome.out
    assert not steering(outcome.out)


def test_new_scans_are_added_and_known_ones_stay(empty: Site) -> None:
    for number in range(2):
        write_scan(empty.scans / f"scan{number}.nii.gz", number)
    words = ("-d", 701, "-c", "3d_fullres", "--images", empty.scans)
    accepted(empty.plan(*words))
    write_scan(empty.scans / "later.nii.gz", 7)
    with nothing_lost(empty.data(CORPUS)):
        outcome = accepted(empty.plan(*words))
    assert "1 cases preprocessed, 2 reused" in outcome.err


def test_a_fold_of_each_small_dataset(empty: Site) -> None:
    """One case cannot be split; two to four are left out one by one."""
    for number in range(1, 5):
        site = Site(empty.folder / str(number), empty.call)
        write_dataset(site.raw, number)
        accepted(site.plan("-d", 5, "-c", "3d_fullres"))
        with_small_network(site.preprocessed() / "mfmPlans.json")
        if number == 1:
            refused(site.train(0), "only one labelled case", "'all'")
            accepted(site.train("all"))
            write_scan(site.test_images / "test_0000.nii.gz")
            accepted(site.predict(site.test_images, site.folder / "out"))
            continue
        refused(site.train(number), f"0 to {number - 1}", "'all'")
        accepted(site.train(number - 1))
        masks = (site.model / f"fold_{number - 1}" / "validation").glob("*.nii.gz")
        assert [file.name for file in masks] == [f"case{number - 1}.nii.gz"]


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
