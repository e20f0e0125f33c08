"""Unlabelled images beside a labelled dataset: preprocessed by its plan, and refused where they would spoil a score."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.corpus import load_cases, register_corpus
from mfm_nnunet.data.unlabelled import Labelled, prepare_unlabelled
from mfm_nnunet.data.volumes import open_array
from mfm_nnunet.dataset import DatasetJson
from mfm_nnunet.plan import Plan
from mfm_nnunet.workspace import Workspace, use
from tests.builders import preprocessing
from tests.builders.training import refused

NAME, CORPUS = "Dataset001_Test", "Dataset701_Corpus"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Workspace]:
    with use(tmp_path / "workspace") as workspace:
        yield workspace


def write_scan(file: Path, seed: int, shape: tuple[int, ...] = (12, 14, 13)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(preprocessing.make_case(seed, shape)[0][0])
    image.SetSpacing((0.8, 0.9, 1.2))
    sitk.WriteImage(image, str(file))
    return file


@pytest.fixture
def labelled(here: Workspace) -> Labelled:
    """Four labelled cases: two train, one validates, one is in no part of the fold."""
    raw = here.raw / NAME
    for case in preprocessing.make_dataset(raw / "all"):
        for file, part in ((case.images[0], "imagesTr"), (case.label, "labelsTr")):
            assert file is not None
            (raw / part).mkdir(exist_ok=True)
            file.rename(raw / part / file.name)
    (raw / "dataset.json").write_text(json.dumps(preprocessing.DATASET))
    cases = load_cases(raw)
    preprocessing.run(cases, here.preprocessed / NAME)
    plan = Plan.of(preprocessing.make_plans())
    return Labelled(plan, "3d_fullres", DatasetJson.of(preprocessing.DATASET), cases, ["case0", "case1"], {"case2"})


def register(here: Workspace, files: Sequence[Path], channels: Sequence[str] = ("MR",), **details: Any) -> str:
    cases = [Case(file.name.partition(".")[0], (file,) * len(channels), **details) for file in files]
    register_corpus(here.raw, CORPUS, cases, list(channels))
    return CORPUS


def test_a_corpus_is_preprocessed_once_as_the_plan_says(here: Workspace, labelled: Labelled) -> None:
    """A scan of the labelled dataset gets the same voxels as there."""
    copy = here.raw / NAME / "imagesTr" / "case0_0000.nii.gz"
    files = [write_scan(here.raw / "scans" / f"scan{seed}.nii.gz", seed) for seed in (1, 2)]
    register(here, [*files, copy])
    found = prepare_unlabelled(here, 701, labelled)
    assert found.cases == ("case0_0000", "scan1", "scan2")
    same = (found.folder / "case0_0000.b2nd", labelled.folder(here) / "case0.b2nd")
    assert (open_array(str(same[0]))[:] == open_array(str(same[1]))[:]).all()
    times = {file: file.stat().st_mtime_ns for file in found.folder.iterdir()}
    assert prepare_unlabelled(here, "Corpus", labelled) == found
    assert {file: file.stat().st_mtime_ns for file in found.folder.iterdir()} == times
    assert found.folder.parent == here.preprocessed / CORPUS


def test_another_dataset_keeps_its_own_files(here: Workspace, labelled: Labelled) -> None:
    other = here.raw / "Dataset002_Other"
    (here.raw / NAME).rename(other)
    (here.raw / NAME).mkdir()
    for seed, file in enumerate(sorted((other / "imagesTr").iterdir())):
        write_scan(file, 50 + seed, (12 + seed, 14, 13))
    cases = [dataclasses.replace(case, name=f"o{case.name}", subject="") for case in labelled.cases]
    ours = dataclasses.replace(labelled, cases=cases, training=["ocase0"], held_out=set())
    found = prepare_unlabelled(here, 2, ours)
    assert len(found.cases) == 4
    assert not list(found.folder.glob("*_seg.b2nd"))


def test_the_dataset_itself_stands_for_its_cases_outside_the_fold(here: Workspace, labelled: Labelled) -> None:
    assert prepare_unlabelled(here, NAME, labelled).cases == ("case3",)
    everything = dataclasses.replace(labelled, training=["case0", "case1", "case3"])
    refused("E_NOT_FOUND", "splits_final.json", lambda: prepare_unlabelled(here, 1, everything))


@pytest.mark.parametrize("kind", ["validation", "test"])
def test_held_out_scans_are_found_by_their_voxels(here: Workspace, labelled: Labelled, kind: str) -> None:
    """Under another name and in another file format."""
    if kind == "test":
        scan = write_scan(here.raw / NAME / "imagesTs" / "t9_0000.nii.gz", 77)
    else:
        scan = here.raw / NAME / "imagesTr" / "case2_0000.nii.gz"
    renamed = here.raw / "scans" / "renamed.nrrd"
    write_scan(here.raw / "scans" / "scan1.nrrd", 1)
    sitk.WriteImage(sitk.ReadImage(str(scan)), str(renamed))
    register(here, [renamed, here.raw / "scans" / "scan1.nrrd"])
    refused("E_CONFIG", "renamed", lambda: prepare_unlabelled(here, 701, labelled))
    refused("E_CONFIG", f"{kind} case", lambda: prepare_unlabelled(here, 701, labelled))


def test_subjects_of_the_validation_are_refused(here: Workspace, labelled: Labelled) -> None:
    cases = [dataclasses.replace(case, subject=f"sub-{case.name}") for case in labelled.cases]
    register(here, [write_scan(here.raw / "scans" / "later.nii.gz", 3)], subject="sub-case2")
    ours = dataclasses.replace(labelled, cases=cases)
    refused("E_CONFIG", "later", lambda: prepare_unlabelled(here, 701, ours))


def test_another_number_of_channels_is_refused(here: Workspace, labelled: Labelled) -> None:
    register(here, [write_scan(here.raw / "scans" / "a.nii.gz", 3)], ("MR", "MR2"))
    refused("E_CHANNELS", "2 channels", lambda: prepare_unlabelled(here, 701, labelled))


def test_of_a_mixed_corpus_only_the_datasets_modality_is_used(here: Workspace, labelled: Labelled) -> None:
    files = [write_scan(here.raw / "scans" / f"{name}.nii.gz", seed) for seed, name in enumerate("ab", 3)]
    cases = [Case("a", (files[0],), modality="CT"), Case("b", (files[1],), modality="T1w")]
    register_corpus(here.raw, CORPUS, cases, ["channel0"])
    assert prepare_unlabelled(here, 701, labelled).cases == ("b",)
    register_corpus(here.raw, "Dataset702_CT", cases[:1], ["CT"])
    refused("E_CONFIG", "its images are ct", lambda: prepare_unlabelled(here, 702, labelled))


def test_bad_scans_are_left_out_and_nothing_left_is_refused(
    here: Workspace, labelled: Labelled, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write_scan(here.raw / "scans" / "good.nii.gz", 3), here.raw / "scans" / "bad.nii.gz"
    bad.write_bytes(good.read_bytes()[:200])
    register(here, [good, bad])
    assert prepare_unlabelled(here, 701, labelled).cases == ("good",)
    assert "bad: E_GZIP_TRUNCATED" in caplog.text
    good.unlink()
    register_corpus(here.raw, "Dataset702_Bad", [Case("bad", (bad,))], ["MR"])
    refused("E_GZIP_TRUNCATED", "none of its 1 cases", lambda: prepare_unlabelled(here, 702, labelled))
