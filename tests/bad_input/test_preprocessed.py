"""Preprocessed folders of strangers: nothing in them runs code, whichever command reads them."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetNumpy

from mfm_nnunet.data.volumes import mask_file, open_array, read_properties
from tests.builders import crafted
from tests.builders.site import CORPUS, Site, accepted, refused, unchanged

WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "ctypes.dlopen")
_seen: list[str] = []
_mark: list[str] = []
"""What code in a file would make, while a test watches."""


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """Python keeps its audit hooks for ever, so this one is idle outside of the tests that need it."""
    if not _mark:
        return
    is_named = event == "pickle.find_class" and arguments[0] in ("os", "posix", "nt")  # else from our own processes
    is_source = event == "compile" and _mark[0] in str(arguments[0])
    is_reader = event == "subprocess.Popen" and "mfm_nnunet.images.decode" in str(arguments[1])
    if (event in WATCHED and not is_reader) or is_named or is_source:
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_note)


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that code in a file would make. At the end it must not be there, and nothing have been called."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    _seen.clear()
    _mark.append(str(tmp_path / "mark"))
    yield tmp_path / "mark"
    _mark.clear()
    assert not (tmp_path / "mark").exists()
    assert not _seen


def crafted_volume(file: Path, mark: Path, kind: str) -> None:
    crafted.volumes(mark, mark.with_name("here"))[kind](file)


def test_the_hook_sees_what_a_pickle_calls(mark: Path) -> None:
    pickle.loads(crafted.pickles(mark)["protocol 4"])
    assert any("pickle.find_class" in line and "mkdir" in line for line in _seen)
    mark.rmdir()
    _seen.clear()


def test_pickles_of_a_labelled_dataset(site: Site, mark: Path) -> None:
    for file in site.data().glob("*.pkl"):
        file.write_bytes(crafted.pickles(mark)["in an array"])
    with unchanged(site.data(), site.model):
        refused(site.train(1), "E_DATA_UNSAFE", site.data(), ".pkl", "mfm_plan_and_preprocess")
        refused(site.run("train", 5, "3d_fullres", 0, "--val"), "E_DATA_UNSAFE", site.data(), ".pkl")


@pytest.mark.parametrize(
    "change",
    [
        {"shape_before_cropping": None},
        {"spacing": (0.0, 1.0, 1.0)},
        {"bbox_used_for_cropping": [[0, 999]] * 3},
        {"sitk_stuff": {"spacing": (1.0, 1.0, 1.0), "origin": (0.0, float("nan"), 0.0), "direction": (1.0,) * 9}},
    ],
)
def test_properties_that_cannot_be(change: dict[str, Any], site: Site) -> None:
    for file in site.data().glob("*.pkl"):
        file.write_bytes(pickle.dumps({**read_properties(file), **change}))
    refused(site.run("train", 5, "3d_fullres", 0, "--val"), "E_SHORT_DATA", site.data(), ".pkl")


def test_a_pickle_that_is_exchanged_after_the_check(site: Site, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the size in the manifest, and is there only when training has begun."""
    files = list(site.data().glob("*.pkl"))
    bad = crafted.pickles(mark)["protocol 4"][:-1]

    def exchange(*args: Any) -> dict[str, Any]:
        for file in files:
            file.write_bytes(bad.ljust(file.stat().st_size - 1, b"N") + b".")
        return {}

    monkeypatch.setattr("mfm_nnunet.finetune.trainer.read_fingerprint", exchange)
    refused(site.train(1), "E_DATA_UNSAFE", ".pkl")


@pytest.mark.parametrize(("kind", "ending"), [("a compressor for the chunks", ".b2nd"), ("a function", "_seg.b2nd")])
def test_volumes_of_a_labelled_dataset(kind: str, ending: str, site: Site, mark: Path) -> None:
    for number in range(3):
        crafted_volume(site.data() / f"case{number}{ending}", mark, kind)
    with unchanged(site.data()):
        refused(site.train(1), "E_DATA_UNSAFE", ending)
        refused(site.run("train", 5, "3d_fullres", 0, "--val"), "E_DATA_UNSAFE", ending)


def test_volumes_and_masks_of_a_corpus(site: Site, mark: Path) -> None:
    data = site.data(CORPUS)
    mask_file(data, "x").parent.mkdir()
    for number in range(3):
        crafted_volume(mask_file(data, f"scan{number}"), mark, "a function")
    refused(site.pretrain("--run-name", "new"), "E_DATA_UNSAFE", "_anonymised")
    for number in range(3):
        crafted_volume(data / f"scan{number}.b2nd", mark, "a proxy")
    refused(site.pretrain("--run-name", "new"), "E_DATA_UNSAFE", data, ".b2nd")


@pytest.fixture
def older(site: Site) -> Site:
    """The labelled dataset in nnU-Net's older layout."""
    data = site.data()
    for case in ("case0", "case1", "case2"):
        image, labels = (open_array(str(data / f"{case}{ending}"))[:] for ending in (".b2nd", "_seg.b2nd"))
        properties = read_properties(data / f"{case}.pkl")
        for file in data.glob(f"{case}*"):
            file.unlink()
        nnUNetDatasetNumpy.save_case(image, labels, properties, str(data / case))
    return site


def test_arrays_of_objects_in_nnunets_older_layout(older: Site, mark: Path) -> None:
    for number in range(3):
        crafted.object_arrays(mark, older.data(), f"case{number}", ("data", "seg"))
    refused(older.train(1), "E_DATA_UNSAFE", older.data(), ".npy")
    for file in older.data().glob("*.npy"):
        file.unlink()
    refused(older.run("train", 5, "3d_fullres", 0, "--val"), "E_DATA_UNSAFE", ".npz")


def test_prediction_reads_none_of_them(site: Site, mark: Path) -> None:
    """Files that nnU-Net's postprocessing and ensembling load lie beside those that are read."""
    output = site.folder / "output"
    shutil.copytree(site.test_images, output)
    bad = crafted.pickles(mark)["protocol 4"]
    for file in (site.model / "postprocessing.pkl", output / "test0.pkl", site.test_images / "test0.pkl"):
        file.write_bytes(bad)
    crafted.object_arrays(mark, output, "test0", ("probabilities",))
    accepted(site.predict(site.test_images, output, "--overwrite"))
