"""A corpus of slices: volumes cut along an axis, pictures at their size, grey or RGB, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blosc2
import imageio.v3 as imageio
import numpy as np
import pytest
import SimpleITK as sitk

import mfm_nnunet
from mfm_nnunet.data.slices import choose_slices
from mfm_nnunet.errors import CasesFailedError, MFMError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 250, shape)


def plan(folder: Path, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the plan, and the preprocessed cases by name."""
    options = {"images": folder / "scans", "modality": "MR", **options}
    (result,) = mfm_nnunet.plan_and_preprocess([701], workspace=folder / "ws", num_processes=1, **options)
    data = result.file.parent / result.plans["configurations"]["2d"]["data_identifier"]
    return result.plans, {file.stem: blosc2.open(str(file))[:] for file in data.glob("*.b2nd")}


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for number in range(2):
        image = sitk.GetImageFromArray(noise(12, 20, 30, seed=number).astype(np.float32))
        image.SetSpacing((2.0, 2.0, 5.0))
        sitk.WriteImage(image, str(tmp_path / f"scans/v{number}.nii.gz"))
    imageio.imwrite(tmp_path / "scans/p8.png", noise(40, 50).astype(np.uint8))
    imageio.imwrite(tmp_path / "scans/p16.png", (noise(44, 46) * 256).astype(np.uint16))
    return tmp_path


def test_volumes_are_cut_and_pictures_keep_their_size(scans: Path) -> None:
    with pytest.raises(MFMError, match="--slices") as refused:
        plan(scans)
    assert refused.value.code == "E_FORMAT"
    plans, cases = plan(scans, slices={"every": 3})
    assert list(plans["configurations"]) == ["2d"]
    assert plans["configurations"]["2d"]["spacing"] == [2.0, 2.0]
    assert plans["mfm"]["corpus"] == {"slices": {"axis": 0, "every": 3, "foreground": 0.0}}
    shapes = {name: case.shape for name, case in cases.items()}
    assert shapes == {"v0": (1, 4, 20, 30), "v1": (1, 4, 20, 30), "p8": (1, 1, 40, 50), "p16": (1, 1, 44, 46)}
    assert len(np.unique(cases["p16"])) > 200


def test_another_axis_is_another_preprocessing(scans: Path) -> None:
    first, _ = plan(scans, slices=())
    second, cases = plan(scans, slices=["axis=2"], spacing="original")
    assert cases["v0"].shape == (1, 30, 12, 20)
    names = [plans["configurations"]["2d"]["data_identifier"] for plans in (first, second)]
    assert names[0] != names[1]


def test_slices_with_little_foreground_are_left_out() -> None:
    image = np.zeros((1, 6, 4, 4), np.float32)
    image[:, 2:5, :2] = 1
    settings = {"slices": {"axis": 0, "every": 2, "foreground": 0.3}}
    assert choose_slices(image, (1, 5), settings).tolist() == [2]
    settings["slices"]["foreground"] = 0.9
    with pytest.raises(MFMError, match="Lower it"):
        choose_slices(image, (1, 5), settings)


@pytest.mark.parametrize(("colour", "num_channels"), [("grey", 1), ("rgb", 3)])
def test_colours_become_what_is_asked_for(scans: Path, colour: str, num_channels: int) -> None:
    picture = noise(40, 48, 3).astype(np.uint8)
    imageio.imwrite(scans / "scans/colour.png", picture)
    with pytest.raises(CasesFailedError, match="--colour grey"):
        plan(scans, slices=(), preprocess=False)
    plans, cases = plan(scans, slices=(), colour=colour)
    assert plans["mfm"]["corpus"]["colour"] == colour
    assert {case.shape[0] for case in cases.values()} == {num_channels}
    if colour == "grey":
        grey = (picture @ (0.299, 0.587, 0.114)).ravel()
        assert np.corrcoef(cases["colour"].ravel(), grey)[0, 1] > 0.999999


@pytest.mark.parametrize("words", [["axis=3"], ["every"], ["foregrund=1"], ["every=0"]])
def test_illegal_slices_are_refused(tmp_path: Path, words: list[str]) -> None:
    with pytest.raises(MFMError, match="--slices") as refused:
        plan(tmp_path, slices=words)
    assert refused.value.code == "E_CONFIG"


def test_settings_stay_with_the_corpus(scans: Path) -> None:
    plan(scans, slices={"every": 4}, preprocess=False)
    plan(scans, preprocess=False)
    content = json.loads((scans / "ws/nnUNet_raw/Dataset701_Corpus/dataset.json").read_text())
    assert content["mfm"] == {"modality": "MR", "slices": {"axis": 0, "every": 4, "foreground": 0.0}}
