"""Bad images and label maps: each refused with its own code, none costs another case, none hangs."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.builders.site import SHAPE, Site, accepted, refused, unchanged, write_dataset, write_scan, write_volume


def volume(dtype: type = np.float32) -> np.ndarray:
    return (100 + np.random.default_rng(0).standard_normal(SHAPE) * 10).astype(dtype)


def with_voxel(value: float) -> np.ndarray:
    voxels = volume()
    voxels[3, 4, 5] = value
    return voxels


def bad_files(folder: Path) -> dict[str, str]:
    """Write one bad image of each kind as NAME_0000.nii.gz; returns the code that each must be refused with."""
    write_scan(folder / "whole.nii.gz")
    whole = (folder / "whole.nii.gz").read_bytes()
    (folder / "whole.nii.gz").unlink()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 4
    raw: dict[str, tuple[str, bytes]] = {
        "cut": ("E_GZIP_TRUNCATED", whole[: len(whole) // 2]),
        "cut_at_the_end": ("E_GZIP_TRUNCATED", whole[:-1]),
        "cut_inside": ("E_SHORT_DATA", gzip.compress(gzip.decompress(whole)[:-100])),
        "empty": ("E_EMPTY", b""),
        "flipped": ("E_GZIP_CRC", bytes(flipped)),
        "pointer": ("E_FORMAT", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "text": ("E_FORMAT", b"patient,date\n1,2\n"),
        "uncompressed": ("E_FORMAT", gzip.decompress(whole)),
        "web_page": ("E_FORMAT", b"<!DOCTYPE html><html>Please log in</html>"),
    }
    for name, (_, content) in raw.items():
        (folder / f"{name}_0000.nii.gz").write_bytes(content)
    voxels = {
        "constant": ("E_CONSTANT", np.full(SHAPE, 7, np.int16)),
        "infinite": ("E_NONFINITE", with_voxel(np.inf)),
        "nan": ("E_NONFINITE", with_voxel(np.nan)),
        "time_series": ("E_DIM", np.stack([volume()] * 3, axis=-1)),
        "zero": ("E_CONSTANT", np.zeros(SHAPE, np.int16)),
    }
    for name, (_, array) in voxels.items():
        write_volume(folder / f"{name}_0000.nii.gz", array)
    os.mkfifo(folder / "pipe_0000.nii.gz")
    (folder / "gone_0000.nii.gz").symlink_to(folder / "nowhere.nii.gz")
    codes = {name: code for group in (raw, voxels) for name, (code, _) in group.items()}
    return {**codes, "pipe": "E_NOT_REGULAR", "gone": "E_NOT_FOUND"}


def test_prediction_does_the_good_ones(site: Site) -> None:
    images = site.folder / "images"
    shutil.copytree(site.test_images, images)
    codes = {**bad_files(images), "folder": "E_NOT_REGULAR"}
    (images / "folder_0000.nii.gz").mkdir()
    accepted(site.predict(site.test_images, site.folder / "clean"))
    with unchanged(images, site.workspace, site.folder / "clean"):
        refused(site.predict(images, site.folder / "out"), f"{len(codes)} of {len(codes) + 2} cases", code=3)
    lines = [json.loads(line) for line in (site.folder / "out" / "cases.jsonl").read_text().splitlines()]
    assert {line["case"]: line["code"] for line in lines if line["status"] == "failed"} == codes
    for name in ("test0", "test1"):
        masks = [(site.folder / folder / f"{name}.nii.gz").read_bytes() for folder in ("clean", "out")]
        assert masks[0] == masks[1]
    assert len(list((site.folder / "out").glob("*.nii.gz"))) == 2


def test_a_labelled_dataset_is_refused_with_all_of_them(empty: Site) -> None:
    write_dataset(empty.raw)
    codes = bad_files(empty.raw / "imagesTr")
    for name in codes:
        shutil.copy(empty.raw / "labelsTr" / "case0.nii.gz", empty.raw / "labelsTr" / f"{name}.nii.gz")
    with unchanged(empty.raw):
        refused(empty.plan("-d", 5), f"{len(codes)} of {len(codes) + 3} labelled cases", "nothing was planned")
    for name, code in codes.items():
        assert f"  {name}: {code}  {empty.raw}" in empty.log
    assert not list(empty.preprocessed().glob("*"))


def test_a_corpus_goes_on_with_the_good_ones(empty: Site) -> None:
    codes = bad_files(empty.scans)
    for file in list(empty.scans.iterdir()):  # without numbers, so that each file is a case
        file.rename(file.with_name(file.name.replace("_0000", "")))
    for number in range(3):
        write_scan(empty.scans / f"good{number}.nii.gz", number)
    words = ("-d", 701, "-c", "3d_fullres", "--images", empty.scans)
    with unchanged(empty.scans):
        outcome = empty.plan(*words)
    refused(outcome, f"{len(codes)} of {len(codes) + 3} cases failed, the others are done", code=3)
    assert all(f"  {name}: {code}  " in empty.log for name, code in codes.items())
    assert {file.stem for file in empty.data("Dataset701_Corpus").glob("*.b2nd")} == {"good0", "good1", "good2"}
    again = empty.plan(*words)
    refused(again, f"{len(codes)} of {len(codes) + 3}", code=3)
    assert "0 cases preprocessed, 3 reused" in again.err
    accepted(empty.pretrain())


def test_a_corpus_without_any_good_scan(empty: Site) -> None:
    empty.scans.mkdir(parents=True)
    for number in range(3):
        (empty.scans / f"scan{number}.nii.gz").write_bytes(b"")
    outcome = empty.plan("-d", 701, "--images", empty.scans)
    message = refused(outcome, "E_CASES_FAILED", "3 of 3", "E_EMPTY", code=3)
    assert "nothing is done" in message
    assert not list((empty.workspace / "nnUNet_preprocessed").rglob("mfmPlans.json"))


@pytest.mark.parametrize("ending", [".nii", ".png"])
def test_a_file_under_another_ending(ending: str, empty: Site) -> None:
    write_scan(empty.scans / "scan.nii.gz")
    (empty.scans / "scan.nii.gz").rename(empty.scans / f"scan{ending}")
    message = refused(empty.plan("-d", 701, "--images", empty.scans), "E_FORMAT", f"scan{ending}", code=3)
    assert ".nii.gz" in message


def test_a_flat_picture_is_no_volume(site: Site) -> None:
    """nnU-Net would stretch it to 999 slices."""
    write_volume(site.folder / "flat" / "slice_0000.nii.gz", volume()[:, :, 0])
    outcome = site.predict(site.folder / "flat", site.folder / "out")
    assert "2D" in refused(outcome, "slice", "E_DIM", code=3)
    write_volume(site.scans / "flat.nii.gz", volume()[:, :, 0])
    for number in range(3):
        write_scan(site.scans / f"scan{number}.nii.gz", number)
    outcome = site.plan("-d", 702, "-c", "3d_fullres", "--images", site.scans)
    refused(outcome, "1 of 4", "flat", "E_DIM", code=3)


def label(
    site: Site, edit: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None, case: int = 1
) -> Path:
    """Rewrite the label of a case."""
    file = site.raw / "labelsTr" / f"case{case}.nii.gz"
    return write_volume(file, edit(np.asarray(nibabel.load(file).dataobj)), affine)  # type: ignore[attr-defined]


def moved(x_mm: float) -> np.ndarray:
    affine = np.eye(4)
    affine[0, 3] = x_mm
    return affine


LABELS: dict[str, tuple[str, str, Callable[[Site], object]]] = {
    "shape": ("E_LABEL_GEOMETRY", "22 x 20 x 22", lambda site: label(site, lambda x: x[:-2])),
    "spacing": ("E_LABEL_GEOMETRY", "spacing", lambda site: label(site, lambda x: x, np.diag([2.0, 1, 1, 1]))),
    "direction": ("E_LABEL_GEOMETRY", "direction", lambda site: label(site, lambda x: x, np.diag([-1.0, 1, 1, 1]))),
    "origin": ("E_LABEL_GEOMETRY", "origin", lambda site: label(site, lambda x: x, moved(5))),
    "value": ("E_LABEL_VALUE", "3, 6", lambda site: label(site, lambda x: x * 3)),
    "fractions": ("E_LABEL_VALUE", "0.9", lambda site: label(site, lambda x: (x * 0.9).astype(np.float32))),
    "nan": ("E_NONFINITE", "NaN", lambda site: label(site, lambda x: np.where(x, np.nan, 0).astype(np.float32))),
    "cut": ("E_GZIP_TRUNCATED", "cut off", lambda site: os.truncate(site.raw / "labelsTr" / "case1.nii.gz", 100)),
}


def test_labels_that_do_not_fit(empty: Site) -> None:
    for code, hint, break_it in LABELS.values():
        write_dataset(empty.raw)
        break_it(empty)
        with unchanged(empty.raw):
            refused(empty.plan("-d", 5), code, "1 of 3", "case1", hint)
    assert not list(empty.preprocessed().glob("*"))


def test_an_empty_label_is_legal_and_only_empty_ones_are_not(empty: Site) -> None:
    write_dataset(empty.raw)
    label(empty, lambda x: x * 0)
    accepted(empty.plan("-d", 5, "--no_pp"))
    for case in range(3):
        label(empty, lambda x: x * 0, case=case)
    refused(empty.plan("-d", 5, "--no_pp"), "E_LABEL_VALUE", "foreground")


def test_a_label_is_checked_again_when_dataset_json_changes(site: Site) -> None:
    content = json.loads((site.raw / "dataset.json").read_text())
    del content["labels"]["core"]
    (site.raw / "dataset.json").write_text(json.dumps(content))
    with unchanged(site.preprocessed()):
        refused(site.plan("-d", 5), "E_LABEL_VALUE", "3 of 3", "nothing was planned")


def remove(*names: str) -> Callable[[Site], None]:
    def work(site: Site) -> None:
        for name in names:
            path = site.raw / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return work


def add(source: str, name: str) -> Callable[[Site], object]:
    return lambda site: shutil.copy(site.raw / "imagesTr" / source, site.raw / "imagesTr" / name)


FILES: dict[str, tuple[str, str, Callable[[Site], object]]] = {
    "no labels": ("E_NOT_FOUND", "--images", remove("labelsTr")),
    "one label": ("E_NOT_FOUND", "labelsTr/case1.nii.gz", remove("labelsTr/case1.nii.gz")),
    "no images": ("E_NOT_FOUND", "imagesTr", remove("imagesTr")),
    "no file of that ending": ("E_NOT_FOUND", ".nii.gz", remove(*(f"imagesTr/case{k}_0000.nii.gz" for k in range(3)))),
    "channel": ("E_CHANNELS", "case0_0001.nii.gz", add("case0_0000.nii.gz", "case0_0001.nii.gz")),
    "no number": ("E_FORMAT", "extra.nii.gz", add("case0_0000.nii.gz", "extra.nii.gz")),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_file_that_is_missing_or_too_many(fault: str, empty: Site) -> None:
    write_dataset(empty.raw)
    code, hint, break_it = FILES[fault]
    break_it(empty)
    with unchanged(empty.raw):
        refused(empty.plan("-d", 5), code, hint)
