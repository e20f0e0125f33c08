"""An image in memory gets the mask that its file gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from mfm_nnunet import predict
from mfm_nnunet.errors import MFMError
from mfm_nnunet.jobs.predict import PredictReport
from tests.builders.tiny_model import dataset_json, save_model, tiny_plans, voxels_of, write_scan


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = save_model(
        tmp_path_factory.mktemp("results") / "model", tiny_plans(spacing=(1.2, 0.9, 1.1)), dataset_json()
    )
    return {"model_folder": model, "device": "cpu", "step_size": 1.0}


def test_an_image_in_memory_gets_the_mask_of_its_file(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "in" / "a_0000.nii.gz"
    file.parent.mkdir()
    write_scan(file, 3, spacing=(0.7, 1.1, 1.0))
    report = predict(file.parent, tmp_path / "out", **options)
    expected = voxels_of(tmp_path / "out" / "a.nii.gz").T
    assert len(np.unique(expected)) > 1
    image = sitk.ReadImage(str(file))
    mask = predict(image, **options)
    assert np.array_equal(sitk.GetArrayFromImage(mask), expected)
    places = [(i.GetSpacing(), i.GetOrigin(), i.GetDirection()) for i in (mask, image)]
    assert np.allclose(np.concatenate(places[0]), np.concatenate(places[1]))
    array = predict(sitk.GetArrayFromImage(image), spacing=image.GetSpacing()[::-1], **options)
    assert np.array_equal(array, expected)
    loaded = nibabel.load(file)
    mask = predict(loaded, **options)
    assert np.array_equal(np.asanyarray(mask.dataobj).T, expected)
    assert np.allclose(mask.affine, loaded.affine)
    assert "<td>a</td><td>done</td>" in report._repr_html_()
    hostile = PredictReport(done=["<b>\x1b"])
    assert "<td>&lt;b&gt;\\x1b</td>" in hostile._repr_html_()


@pytest.mark.parametrize(
    ("image", "more", "code"),
    [
        (np.zeros((8, 8, 8)), {}, "E_CONFIG"),
        (np.zeros((8, 8)), {"spacing": (1, 1)}, "E_CONFIG"),
        (sitk.Image(8, 8, 8, sitk.sitkFloat32), {"spacing": (1, 1, 1)}, "E_CONFIG"),
        (3.0, {}, "E_CONFIG"),
        ("folder", {}, "E_CONFIG"),
        (np.zeros((8, 8, 8)), {"output_folder": "out", "spacing": (1, 1, 1)}, "E_CONFIG"),
        (np.full((8, 8, 8), np.nan), {"spacing": (1, 1, 1)}, "E_NONFINITE"),
        (np.ones((2, 8, 8, 8)), {"spacing": (1, 1, 1)}, "E_CHANNELS"),
    ],
)
def test_an_image_that_cannot_be_predicted(
    image: Any, more: dict[str, Any], code: str, options: dict[str, Any]
) -> None:
    with pytest.raises(MFMError) as refused:
        predict(image, **more, **options)
    assert refused.value.code == code
    assert "/mfm_image_" not in str(refused.value)
