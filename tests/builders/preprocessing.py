"""A plan, cases with zero margins and holes, and preprocessing them, also in a process that is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from mfm_nnunet.data.cases import Case
from mfm_nnunet.data.preprocess import preprocess_dataset
from tests.builders.plans import plan_configuration, plan_of

LABELS = {"background": 0, "a": 1, "b": 2}
DATASET = {"channel_names": {"0": "MR"}, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": 4}
INTENSITIES = {
    "mean": 0.2,
    "median": 0.1,
    "std": 0.9,
    "min": -5,
    "max": 5,
    "percentile_00_5": -2,
    "percentile_99_5": 2.5,
}


def make_plans(channels: int = 1, **configuration: Any) -> dict[str, Any]:
    """A plan with one configuration, '3d_fullres', in nnU-Net's format."""
    transpose = configuration.pop("transpose_forward", [0, 1, 2])
    architecture = {"network_class_name": "x", "arch_kwargs": {}, "_kw_requires_import": []}
    own = {"data_identifier": "mfm_3d_fullres_0", "spacing": [1.0, 1.0, 1.0], **configuration}
    content = plan_configuration(architecture, own.pop("patch_size", [16, 16, 16]), channels, **own)
    name = "Dataset001_Test"
    return plan_of({"3d_fullres": content}, INTENSITIES, channels, transpose, dataset_name=name)


def make_case(
    seed: int, shape: tuple[int, ...] = (14, 18, 16), channels: int = 1, labels: int = 3, margin: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """An image with zero margins, a zero hole and a zero edge of its box, and blocky labels that reach into all."""
    rng = np.random.default_rng(seed)
    image = rng.normal(1, 1, (channels, *shape)).astype(np.float32)
    depth = min(margin, shape[0] - 1)
    image[:, : depth or None] *= 0 if depth else 1
    image[:, :, -margin:] = 0
    image[:, shape[0] // 2, 9:11, 5:8] = 0
    image[:, : max(1, shape[0] // 2), :6, :6] = 0
    label = rng.integers(0, labels, (1, *(-(-n // 3) for n in shape)))
    for axis in (1, 2, 3):
        label = np.repeat(label, 3, axis=axis)
    return image, label[:, : shape[0], : shape[1], : shape[2]].astype(np.float32)


def make_dataset(folder: Path, count: int = 4, labelled: bool = True) -> list[Case]:
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for i in range(count):
        image, label = make_case(10 + i, shape=(12 + i, 14, 13))
        files = [folder / f"case{i}_0000.nii.gz", folder / f"case{i}.nii.gz"]
        for file, array in zip(files, (image[0], label[0].astype(np.uint8))):
            item = sitk.GetImageFromArray(array)
            item.SetSpacing((0.8, 0.9, 1.2))
            sitk.WriteImage(item, str(file))
        cases.append(Case(f"case{i}", (files[0],), files[1] if labelled else None))
    return cases


def run(cases: list[Case], folder: Path, plans: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    return preprocess_dataset(cases, plans or make_plans(), ["3d_fullres"], DATASET, folder, **kwargs)["3d_fullres"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


KILLED = """
import json, os, pickle, signal, sys
from pathlib import Path
from mfm_nnunet.data.preprocess import preprocess_dataset

cases, plans, dataset, base, moments = pickle.loads(sys.stdin.buffer.read())
replace = os.replace
for moment in moments:
    child = os.fork()
    if child == 0:
        count = 0
        def killed(source, target):
            global count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = killed
        preprocess_dataset(cases, plans, ["3d_fullres"], dataset, Path(base) / str(moment))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it should have been killed"
"""
