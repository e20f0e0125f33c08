"""Lists of cases that disagree: the raw folder, dataset.json, what is preprocessed, and what is trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mfm_nnunet import checkpoint
from mfm_nnunet.data import storage
from mfm_nnunet.errors import MFMError
from tests.builders.site import (
    CORPUS,
    Site,
    accepted,
    refused,
    with_small_network,
    write_dataset,
    write_scan,
    write_volume,
)


def validated(site: Site, fold: object) -> set[str]:
    """The cases that a fold was validated on."""
    summary = json.loads((site.model / f"fold_{fold}" / "validation" / "summary.json").read_text())
    return {Path(case["reference_file"]).name.split(".")[0] for case in summary["metric_per_case"]}


def test_a_removed_case_trains_no_more(site: Site) -> None:
    """Also where the raw folder is gone since; its preprocessed data stay."""
    for name in ("imagesTr/case2_0000.nii.gz", "labelsTr/case2.nii.gz"):
        (site.raw / name).unlink()
    outcome = accepted(site.plan("-d", 5, "-c", "3d_fullres", "-pl", "mfmB"))
    assert "numTraining is 3, and there are 2 cases" in outcome.err
    shutil.rmtree(site.raw)
    assert "case2" in accepted(site.train("all")).err
    assert validated(site, "all") == {"case0", "case1"}
    assert (site.data() / "case2.b2nd").is_file()
    refused(site.train(2), "E_CONFIG", "splits_final.json", "'val'")  # case2 was all that this fold validated on
    (site.preprocessed() / "splits_final.json").unlink()
    accepted(site.train(1))
    assert "case2" not in (site.preprocessed() / "splits_final.json").read_text()


def test_cases_that_were_added_and_not_preprocessed(site: Site) -> None:
    write_volume(site.raw / "labelsTr" / "new.nii.gz", write_scan(site.raw / "imagesTr" / "new_0000.nii.gz", 9))
    refused(site.train("all"), "E_NOT_FOUND", "1 cases", "new", "mfm_plan_and_preprocess")
    assert "1 cases of the dataset are in no fold" in accepted(site.train(1)).err


def test_a_withdrawn_scan_is_pretrained_on_no_more(empty: Site) -> None:
    for number in range(4):
        write_scan(empty.scans / f"scan{number}.nii.gz", number)
    words = ("-d", 701, "-c", "3d_fullres", "--images", empty.scans)
    accepted(empty.plan(*words))
    (empty.scans / "scan1.nii.gz").unlink()
    accepted(empty.plan(*words))
    with_small_network(empty.preprocessed(CORPUS) / "mfmPlans.json")
    assert (empty.data(CORPUS) / "scan1.b2nd").is_file()
    for name, is_raw_there in (("with", True), ("without", False)):
        if not is_raw_there:
            shutil.rmtree(empty.workspace / "nnUNet_raw")
        outcome = accepted(empty.pretrain("--run-name", name))
        assert "1 preprocessed cases are not used, e.g. scan1" in outcome.err
        content = checkpoint.load(Path(outcome.out.splitlines()[-1]))
        assert content["mfm"]["corpus"]["num_cases"] == 3


@pytest.mark.parametrize("code", ["E_CHANGED", "E_TOO_LARGE"])
def test_a_labelled_case_that_fails_in_preprocessing(code: str, empty: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the fingerprint, too, a labelled dataset is refused as a whole, and not trained without the case."""
    write_dataset(empty.raw)
    write: Callable[..., None] = storage.store_case

    def failing(*arguments: object) -> None:
        if arguments[2] == "case1":
            raise MFMError(code, "case1: something happened.")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "store_case", failing)
        refused(empty.plan("-d", 5, "-c", "3d_fullres"), code, "1 of 3 labelled cases", "case1")
    refused(empty.train("all"), "E_NOT_FOUND", "case1", "mfm_plan_and_preprocess")
    assert "1 cases preprocessed, 2 reused" in accepted(empty.plan("-d", 5, "-c", "3d_fullres")).err


def test_other_endings_in_a_labelled_dataset(site: Site) -> None:
    """Planning and training refuse it, naming the file."""
    scan = site.raw / "imagesTr" / "case0_0000.nii.gz"
    shutil.copy(scan, scan.with_name("case7_0000.nii"))
    refused(site.plan("-d", 5), "E_FORMAT", "1 image files", "case7_0000.nii")
    refused(site.train(1), "E_FORMAT", "case7_0000.nii", "move")


def test_masks_among_scans(empty: Site) -> None:
    """Named ones are left out with a message, others when they are read."""
    for number in range(3):
        label = write_scan(empty.scans / "images" / f"scan{number}.nii.gz", number)
        write_volume(empty.scans / "masks" / f"scan{number}.nii.gz", label)
    words = ("-d", 701, "-c", "3d_fullres", "--images", empty.scans)
    assert "3 images are left out" in accepted(empty.plan(*words)).err
    write_volume(empty.scans / "images" / "outline.nii.gz", label)
    refused(empty.plan(*words), "1 of 4", "outline: E_MASK", code=3)


@pytest.mark.parametrize("odd", ["a", "z"])
def test_a_grey_picture_among_coloured_ones(odd: str, empty: Site) -> None:
    """Whichever comes first: nothing is missing, and the user wrote no dataset.json."""
    rng = np.random.default_rng(0)
    empty.scans.mkdir(parents=True)
    for name in "mno":
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(empty.scans / f"{name}.png")
    Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)).save(empty.scans / f"{odd}.png")
    message = refused(empty.plan("-d", 701, "--images", empty.scans, "--no_pp"), "1 of 4", "E_CHANNELS", "grey", code=3)
    assert f"{odd}.png" in message
    assert "dataset.json" not in message
