"""Names that are no UTF-8, as files from old archives have: read, or refused by name; never the end of the others."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.builders.site import Site, accepted, refused, unchanged, write_scan

NAME = os.fsdecode(b"M\xfcller")


def has_no_crash(text: str) -> None:
    assert "Traceback" not in text
    assert "E_INTERNAL" not in text
    assert "terminate called" not in text


def test_predict_refuses_such_a_name_and_does_the_others(site: Site, tmp_path: Path) -> None:
    """The mask would bear the name, and not every library that writes images can do that."""
    write_scan(tmp_path / "plain_0000.nii.gz", 7)
    os.rename(tmp_path / "plain_0000.nii.gz", site.test_images / f"{NAME}_0000.nii.gz")
    for words in ((), ("--resume",)):
        has_no_crash(refused(site.predict(site.test_images, tmp_path / "masks", *words), "E_CONFIG", "UTF-8", code=3))
        assert sorted(file.name for file in (tmp_path / "masks").glob("*.nii.gz")) == ["test0.nii.gz", "test1.nii.gz"]


@pytest.mark.parametrize("data_name", [b"r\xfc.raw"])
def test_a_detached_header_names_its_data_in_any_encoding(site: Site, tmp_path: Path, data_name: bytes) -> None:
    """The voxels are found by the bytes of the name."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a", "b"):
        array = (np.random.default_rng(len(name)).normal(size=(20, 22, 24)) * 100).astype(np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(array), folder / f"{name}.mhd")
    os.rename(folder / "a.raw", folder / os.fsdecode(data_name))
    header = (folder / "a.mhd").read_bytes().replace(b"a.raw", data_name)
    (folder / "a.mhd").write_bytes(header)
    has_no_crash(accepted(site.plan("-d", 702, "-c", "3d_fullres", "--images", folder)).err)


def test_a_table_in_another_encoding_is_refused_by_name(site: Site, tmp_path: Path) -> None:
    write_scan(tmp_path / "plain.nii.gz", 7)
    (tmp_path / "table.csv").write_bytes(b"image,subject\nplain.nii.gz,M\xfcller\n")
    refused(site.plan("-d", 702, "--images", tmp_path / "table.csv"), "table.csv")


def test_a_labelled_case_of_such_a_name_is_refused_as_a_whole(site: Site) -> None:
    for folder, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(site.raw / folder / f"case0{ending}", site.raw / folder / f"{NAME}{ending}")
    with unchanged(site.preprocessed()):
        has_no_crash(refused(site.plan("-d", 5, "-c", "3d_fullres")))


def test_an_output_folder_of_such_a_name_is_refused(site: Site, tmp_path: Path) -> None:
    has_no_crash(refused(site.predict(site.test_images, tmp_path / NAME), "E_CONFIG", "UTF-8"))
