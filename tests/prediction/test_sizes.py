"""What is refused before it is resampled, and whether the sums behind it are the memory that a process really takes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

import mfm_nnunet
from mfm_nnunet import device
from mfm_nnunet.data import sizes
from mfm_nnunet.data.sizes import Sizes, count_windows, prediction_bytes, preprocessing_bytes
from mfm_nnunet.errors import CasesFailedError, MFMError
from tests.builders.tiny_model import dataset_json, save_model, tiny_plans

PEAK = """
import json, re, sys
from pathlib import Path
import numpy as np, torch
from mfm_nnunet.data.preprocess import preprocess_case_npy
from mfm_nnunet.prediction.export import logits_to_mask
from mfm_nnunet.prediction.model import Model
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tests.builders.tiny_model import dataset_json, tiny_plans

work, channels, shape, spacing, target = json.loads(sys.argv[1])
torch.set_num_threads(1)
plans = PlansManager(tiny_plans(channels=channels, spacing=[target] * 3, patch_size=[48] * 3))
configuration, dataset = plans.get_configuration("3d_fullres"), dataset_json(channels=["a"] * channels)
model = Model(torch.nn.Conv3d(channels, 3, 1), plans, configuration, dataset, torch.device("cpu"))
sizes = []

def run(image):
    properties = {"spacing": [spacing] * 3}
    data, _, properties = preprocess_case_npy(image, properties, None, plans, configuration, dataset, sizes.append)
    if work == "predict":
        image = None
        data = torch.from_numpy(data)
        logits_to_mask(model.predict_logits(data, step_size=1.0, mirroring=False), properties, model.managers)

def largest():  # not getrusage, whose number begins with that of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

run(np.random.default_rng(0).random((channels, 12, 12, 12), np.float32))
before = largest()
run(np.random.default_rng(0).random((channels, *shape), np.float32))
peak = largest() - before
print(json.dumps([peak * 1024, sizes[-1].whole, sizes[-1].cropped, sizes[-1].resampled]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("work", "channels", "edge", "spacing", "target"),
    [
        ("preprocess", 3, 60, 4.0, 1.0),
        pytest.param("preprocess", 1, 80, 5.0, 1.0, marks=pytest.mark.long),
        pytest.param("preprocess", 1, 400, 1.0, 2.0, marks=pytest.mark.long),
        pytest.param("preprocess", 1, 300, 1.0, 1.0, marks=pytest.mark.long),
        pytest.param("predict", 1, 80, 5.0, 1.0, marks=pytest.mark.long),
        pytest.param("predict", 1, 300, 1.0, 2.0, marks=pytest.mark.long),
    ],
)
def test_the_sums_are_the_memory_that_a_process_takes(
    work: str, channels: int, edge: int, spacing: float, target: float
) -> None:
    arguments = json.dumps([work, channels, [edge] * 3, spacing, target])
    command = [sys.executable, "-c", PEAK, arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    peak, *shapes = json.loads(done.stdout.splitlines()[-1])
    case = Sizes(channels, *(tuple(shape) for shape in shapes), (spacing,) * 3, (target,) * 3)
    expected = preprocessing_bytes(case) if work == "preprocess" else prediction_bytes(case, 3)
    # The C library keeps freed blocks below 32 MB for a while.
    assert expected < 1.1 * peak, f"{expected / peak:.3f} of {peak / 1e6:.0f} MB"
    assert peak < 1.2 * expected + 200e6, f"{expected / peak:.3f} of {peak / 1e6:.0f} MB"


def test_more_memory_than_there_is_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Sizes(1, (34, 52, 37), (34, 52, 37), (340, 520, 370), (10.0,) * 3, (1.0,) * 3)
    sizes.require_predictable(case, 3, 100)
    monkeypatch.setattr(device, "available_memory", lambda: 10**9)
    sizes.require_preprocessable(case)  # 0.8 GB
    with pytest.raises(MFMError, match=r"34 x 52 x 37 voxels of 10 x 10 x 10 mm become 340 x 520 x 370.* 1\.\d GB"):
        sizes.require_predictable(case, 3, 100)
    monkeypatch.setattr(device, "available_memory", lambda: 5 * 10**8)
    with pytest.raises(MFMError, match=r"only 0\.5 GB") as caught:
        sizes.require_preprocessable(case)
    assert caught.value.code == "E_TOO_LARGE"


@pytest.mark.parametrize("edge_mm", [20.0, 90.0])
def test_a_thousandfold_is_refused_whatever_the_memory(edge_mm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: sys.maxsize)
    resampled = tuple(round(size * edge_mm) for size in (34, 52, 37))
    case = Sizes(1, (34, 52, 37), (34, 52, 37), resampled, (edge_mm,) * 3, (1.0,) * 3)
    with pytest.raises(MFMError, match="for each voxel of the file") as caught:
        sizes.require_preprocessable(case)
    assert caught.value.code == "E_TOO_LARGE"
    tiny = Sizes(1, (5, 5, 5), (5, 5, 5), (100, 100, 100), (20.0,) * 3, (1.0,) * 3)
    sizes.require_preprocessable(tiny)


def test_work_for_days_is_refused_with_the_number_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda: sys.maxsize)
    case = Sizes(1, (400,) * 3, (400,) * 3, (400,) * 3, (1.0,) * 3, (1.0,) * 3)
    windows = count_windows(case.resampled, (64, 64, 64), 0.1)
    with pytest.raises(MFMError, match=f"{windows:,} windows") as caught:
        sizes.require_predictable(case, 2, windows)
    assert caught.value.code == "E_TOO_LARGE"


@pytest.mark.parametrize(
    ("shape", "patch", "step"),
    [((110, 30, 64), (64, 64, 64), 0.5), ((200, 150, 99), (32, 48, 40), 0.3), ((17, 300, 200), (64, 96), 1.0)],
)
def test_the_number_of_windows_is_nnunets(shape: tuple[int, ...], patch: tuple[int, ...], step: float) -> None:
    padded = tuple(max(size, edge) for size, edge in zip(shape[-len(patch) :], patch))
    steps = compute_steps_for_sliding_window(padded, patch, step)
    slices = math.prod(shape[: len(shape) - len(patch)])
    assert count_windows(shape, patch, step) == slices * math.prod(map(len, steps))


def test_a_case_too_large_is_left_out_and_the_others_are_predicted(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_plans(), dataset_json())
    for name, edge_mm in (("good", 1.0), ("wide", 20.0), ("wider", 90.0)):
        voxels = np.random.default_rng(0).normal(size=(34, 52, 37)).astype(np.int16)
        (tmp_path / "in").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([edge_mm] * 3 + [1])), tmp_path / "in" / f"{name}_0000.nii.gz")
    with pytest.raises(CasesFailedError) as caught:
        mfm_nnunet.predict(tmp_path / "in", tmp_path / "out", model_folder=model, device="cpu", step_size=1.0)
    assert {failure.case: failure.code for failure in caught.value.failures} == {
        "wide": "E_TOO_LARGE",
        "wider": "E_TOO_LARGE",
    }
    assert (tmp_path / "out" / "good.nii.gz").is_file()
