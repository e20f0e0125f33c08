"""How many times faster than nnU-Net: resampling, one case, fingerprint and preprocessing of a data set.

Both sides do the same work on the same real scans in one run, A B A B ..., after a warm-up round; the result is checked
in every comparison. The median ratio of the rounds is the number to quote, with its range.

    OMP_NUM_THREADS=1 python tests/benchmarks/preprocessing.py --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import importlib.metadata
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("resampling", "case", "fingerprint", "dataset")
SPLINE = {"order_z": 0, "force_separate_z": None}
RESAMPLING = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **SPLINE},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, **SPLINE},
}


@dataclass(frozen=True)
class Comparison:
    """The same work by us and by nnU-Net, and how far the two results are apart, in words."""

    name: str
    ours: Callable[[], Any]
    stock: Callable[[], Any]
    difference: Callable[[Any, Any], str]


def main() -> None:
    """Parse the command line, run the chosen parts, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("MFM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    add = parser.add_argument
    add("--data", type=Path, default=data, help="folder of real scans (default: MFM_SHARED_DATA, ../shared/data)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to compare (default: all)")
    add("--rounds", type=int, default=5, help="rounds after the warm-up (default: %(default)s)")
    add("--cases", type=int, default=20, help="scans of a data set (default: %(default)s)")
    add("--processes", type=int, default=1, help="worker processes of both sides (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"no real scans: {arguments.data} is absent (--data DIR, or set MFM_SHARED_DATA)")
    print_conditions(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            for comparison in globals()[part](arguments, Path(folder)):
                print_comparison(comparison, arguments.rounds)


def print_conditions(arguments: argparse.Namespace) -> None:
    """Date, versions, threads and load: without them the numbers say nothing."""
    names = ("mfm_nnunet", "nnunetv2", "batchgenerators", "numpy", "scipy", "scikit-image", "blosc2", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{datetime.date.today()}  Python {platform.python_version()}, {versions}")
    print(
        f"{platform.machine()}, {cores} cores, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}, "
        f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, load {os.getloadavg()[0]:.1f}, "
        f"{arguments.processes} worker processes, {arguments.rounds} rounds, warm file cache\n"
    )


def print_comparison(comparison: Comparison, rounds: int) -> None:
    """Time A B A B ... and print the median ratio, its range, wall and CPU seconds, and the difference of results."""
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "stock": []}
    difference = comparison.difference(comparison.ours(), quietly(comparison.stock))
    # What takes milliseconds is repeated, equally often on both sides.
    repeats = min(20, max(1, round(0.02 / timed(comparison.ours, 1)[0])))
    for _ in range(rounds):
        times["ours"].append(timed(comparison.ours, repeats))
        times["stock"].append(timed(lambda: quietly(comparison.stock), repeats))
    ratios = [stock[0] / ours[0] for ours, stock in zip(times["ours"], times["stock"])]
    wall, cpu = ({side: statistics.median(t[i] for t in values) for side, values in times.items()} for i in (0, 1))
    print(
        f"{comparison.name}\n"
        f"  {statistics.median(ratios):.1f} times faster ({min(ratios):.1f} to {max(ratios):.1f}); "
        f"wall {wall['ours']:.4f} s against {wall['stock']:.4f} s, "
        f"CPU {cpu['ours']:.4f} s against {cpu['stock']:.4f} s; {difference}",
        flush=True,
    )


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall and CPU seconds of one call, finished child processes included."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - wall) / repeats, (cpu_seconds() - cpu) / repeats


def cpu_seconds() -> float:
    """Of this process (finely) and of the children that have ended (in steps of 10 ms)."""
    return time.process_time() + sum(os.times()[2:4])


def quietly(work: Callable[[], Any]) -> Any:
    """The result of ``work`` without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return work()


def max_difference(ours: Any, stock: Any) -> str:
    import numpy as np

    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    differs = f"max difference {np.abs(ours.astype(np.float64) - stock).max():.2g}"
    return differs if ours.dtype.kind == "f" else f"{differs}, {np.count_nonzero(ours != stock)} voxels differ"


def pairs(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, Any, Any]]:
    """Name, image, label and spacing of a small, a large and a many-labelled scan."""
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    data = arguments.data
    single, mr, ct = data / "single_pairs", data / "Dataset004_Hippocampus", data / "Dataset052_STSCT"
    name = min(file.name for file in (ct / "labelsTr").iterdir()).removesuffix(".nii.gz")
    for what, image, label in (
        ("MR hippocampus", mr / "imagesTr/hippocampus_001_0000.nii.gz", mr / "labelsTr/hippocampus_001.nii.gz"),
        ("CT sarcoma", ct / f"imagesTr/{name}_0000.nii.gz", ct / f"labelsTr/{name}.nii.gz"),
        ("CT with many labels", single / "ts_example_ct_sm.nii.gz", single / "ts_example_ct_sm_label.nii.gz"),
    ):
        array, properties = SimpleITKIO().read_images([str(image)])
        yield what, array, SimpleITKIO().read_seg(str(label))[0], [float(mm) for mm in properties["spacing"]]


def resampling(arguments: argparse.Namespace, folder: Path) -> Iterator[Comparison]:
    """The kernels: images of order 3, label maps of order 1, to voxels a quarter finer; and thick slices."""
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape, resample_data_or_seg_to_shape

    from mfm_nnunet.data.resampling import resample_image

    for name, image, label, spacing in pairs(arguments):
        image = (image - image.mean()) / image.std()
        target = [0.8 * mm for mm in spacing]
        shape = compute_new_shape(image.shape[1:], spacing, target)
        thick = [4 * max(spacing), *spacing[1:]]
        for what, array, kwargs, current in (
            ("order 3", image, {"order": 3}, spacing),
            ("order 3, slice by slice", image, {"order": 3}, thick),
            ("labels", label, {"order": 1, "is_seg": True}, spacing),
        ):
            call = (array, shape, current, target)
            settings: dict[str, Any] = {**kwargs, **SPLINE}
            yield Comparison(
                f"resampling {what}, {name}, {'x'.join(map(str, image.shape[1:]))} to {'x'.join(map(str, shape))}",
                functools.partial(resample_image, *call, **settings),
                functools.partial(resample_data_or_seg_to_shape, *call, **settings),
                max_difference,
            )


def case(arguments: argparse.Namespace, folder: Path) -> Iterator[Comparison]:
    """Crop, normalise and resample image and label of one case, in memory."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from mfm_nnunet.data.preprocess import preprocess_case_npy

    for name, image, label, spacing in pairs(arguments):
        dataset_json = {"labels": {"background": 0, **{str(k): k for k in range(1, int(label.max()) + 1)}}}
        manager = PlansManager(make_plans([0.8 * mm for mm in spacing], "ZScoreNormalization"))
        stock = DefaultPreprocessor(verbose=False)
        rest = (manager, manager.get_configuration("3d_fullres"), dataset_json)
        yield Comparison(
            f"case in memory, {name}",
            functools.partial(preprocess_case_npy, image, {"spacing": spacing}, label, *rest),
            functools.partial(stock.run_case_npy, image, label, {"spacing": spacing}, *rest),
            lambda ours, stock: f"image {max_difference(ours[0], stock[0])}; label {max_difference(ours[1], stock[1])}",
        )


def fingerprint(arguments: argparse.Namespace, folder: Path) -> Iterator[Comparison]:
    """From files to dataset_fingerprint.json."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    from mfm_nnunet.data.corpus import load_cases
    from mfm_nnunet.planning.fingerprint import extract_fingerprint

    name, dataset_json = register(arguments, folder)
    cases = load_cases(folder / "nnUNet_raw" / name)

    def stock() -> dict[str, Any]:
        extractor = DatasetFingerprintExtractor(name, arguments.processes)
        extractor.show_progress_bar = False
        return extractor.run(overwrite_existing=True)

    def difference(ours: Any, theirs: Any) -> str:
        key = "foreground_intensity_properties_per_channel"
        assert ours[0]["shapes_after_crop"] == [list(shape) for shape in theirs["shapes_after_crop"]]
        mine, drawn = ours[0][key]["0"], theirs[key][0]
        return ", ".join(f"{n} {mine[n]:.6g} against {drawn[n]:.6g}" for n in ("mean", "std", "percentile_99_5"))

    yield Comparison(
        f"fingerprint of {len(cases)} hippocampus scans",
        lambda: extract_fingerprint(cases, dataset_json, arguments.processes),
        stock,
        difference,
    )


def dataset(arguments: argparse.Namespace, folder: Path) -> Iterator[Comparison]:
    """From files to preprocessed files, nothing reused."""
    import shutil

    import blosc2
    import numpy as np
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    from mfm_nnunet.data.corpus import load_cases
    from mfm_nnunet.data.preprocess import preprocess_dataset

    name, dataset_json = register(arguments, folder)
    cases = load_cases(folder / "nnUNet_raw" / name)
    preprocessed, plans = folder / "nnUNet_preprocessed" / name, make_plans([0.8] * 3, "ZScoreNormalization")
    (preprocessed / "plans.json").write_text(json.dumps(plans))
    ours_plans = copy.deepcopy(plans)
    ours_plans["configurations"]["3d_fullres"]["data_identifier"] = "ours"

    def ours() -> Path:
        shutil.rmtree(preprocessed / "ours", ignore_errors=True)
        report = preprocess_dataset(
            cases, ours_plans, ["3d_fullres"], dataset_json, preprocessed, num_processes=arguments.processes
        )["3d_fullres"]
        assert len(report.done) == len(cases), report
        return preprocessed / "ours"

    def stock() -> Path:
        preprocessor = DefaultPreprocessor(verbose=False)
        preprocessor.show_progress_bar = False
        preprocessor.run(name, "3d_fullres", "plans", arguments.processes)
        return preprocessed / "stock"

    def difference(one: Path, other: Path) -> str:
        files = sorted(file.name for file in one.iterdir() if file.suffix == ".b2nd")
        arrays = [[blosc2.open(str(where / file), mode="r")[:] for where in (one, other)] for file in files]
        distance = max(np.abs(a.astype(np.float64) - b).max() for a, b in arrays)
        return f"max difference {distance:.2g} over {len(files)} files"

    yield Comparison(f"preprocessing of {len(cases)} hippocampus scans to files", ours, stock, difference)


def make_plans(spacing: list[float], scheme: str) -> dict[str, Any]:
    """A plan as far as preprocessing reads it."""
    return {
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "stock",
                "preprocessor_name": "DefaultPreprocessor",
                "patch_size": [40, 56, 40],
                "spacing": spacing,
                "normalization_schemes": [scheme],
                "use_mask_for_norm": [False],
                **RESAMPLING,
                "architecture": {},
            }
        },
    }


def register(arguments: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """An nnU-Net data set of the first scans, read in place; sets nnU-Net's folders."""
    name, source = "Dataset004_Hippocampus", arguments.data / "Dataset004_Hippocampus"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(folder / variable)
        (folder / variable / name).mkdir(parents=True, exist_ok=True)
    images = sorted((source / "imagesTr").iterdir())[: arguments.cases]
    cases = {image.name.removesuffix("_0000.nii.gz"): image for image in images}
    dataset_json = json.loads((source / "dataset.json").read_text()) | {
        "numTraining": len(cases),
        "dataset": {
            key: {"images": [str(image)], "label": str(source / "labelsTr" / f"{key}.nii.gz")}
            for key, image in cases.items()
        },
    }
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        (folder / variable / name / "dataset.json").write_text(json.dumps(dataset_json))
    return name, dataset_json


if __name__ == "__main__":
    main()
