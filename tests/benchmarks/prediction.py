"""Prediction of a folder: ours against nnU-Net's ``predict_from_files``, same model and scans, in one run.

    python -m tests.benchmarks.prediction [--model FOLDER --images FOLDER] [--rounds 5] [--workers 1] [--device cpu]
    python -m tests.benchmarks.prediction --model FOLDER --images FOLDER --labels FOLDER --fast

Both sides are timed from loading the model to the last mask on the disk, in turn (A B A B ...) after one round that
does not count. ``--fast`` is ours alone; stock predicts as ever. ``--labels`` adds the Dice of both. Wall and CPU
seconds include all child processes; memory is the private memory of the process tree above what this process held
before. Without a model, a small random one and synthetic scans are used. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mfm_nnunet
from mfm_nnunet.prediction.model import load_model
from mfm_nnunet.workspace import PLUGIN_FOLDER
from tests.builders.tiny_model import dataset_json, save_model, tiny_plans, voxels_of, write_scan


def measure(work: Callable[[], Any]) -> dict[str, float]:
    """Wall and CPU seconds and the highest private memory in MB of a call and its child processes."""
    base, peak, is_done = _private_bytes(os.getpid()), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.1):
            peak[0] = max(peak[0], _private_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    before, start = os.times(), time.perf_counter()
    watcher.start()
    work()
    wall, after = time.perf_counter() - start, os.times()
    is_done.set()
    watcher.join()
    return {"wall_s": wall, "cpu_s": sum(after[:4]) - sum(before[:4]), "memory_mb": max(0, peak[0] - base) / 1e6}


def compare(
    model: Path, images: Path, rounds: int, options: dict[str, Any], workers: int, labels: Path | None = None
) -> dict[str, Any]:
    """Time both sides ``rounds`` times and compare their masks, with each other and with those in ``labels``."""
    ending = json.loads((model / "dataset.json").read_text())["file_ending"]
    options = {**options, "folds": load_model(model, device="cpu").folds}
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("mfm", "stock")}
        jobs = {
            "mfm": lambda: mfm_nnunet.predict(images, folders["mfm"], model_folder=model, overwrite=True, **options),
            "stock": lambda: _stock(model, images, folders["stock"], options, workers),
        }
        results: dict[str, list[dict[str, float]]] = {"mfm": [], "stock": []}
        for number in range(rounds + 1):
            for name, job in jobs.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    result = measure(job)
                if number > 0:
                    results[name].append(result)
        masks = sorted(file.name for file in folders["stock"].glob(f"*{ending}"))
        pairs = [(voxels_of(folders["mfm"] / name), voxels_of(folders["stock"] / name)) for name in masks]
        truth = [] if labels is None else [voxels_of(labels / name) for name in masks]
    ratios = [stock["wall_s"] / mfm["wall_s"] for mfm, stock in zip(results["mfm"], results["stock"])]
    return {
        "cases": len(masks),
        "voxels": sum(mask.size for mask, _ in pairs),
        "voxels_that_differ": int(sum((mask != expected).sum() for mask, expected in pairs)),
        "times_faster": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "dice": {name: mean_dice(side, truth) for name, side in zip(("mfm", "stock"), zip(*pairs)) if truth},
        **{name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in results.items()},
    }


def mean_dice(masks: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Mean over the labels of each reference, then over the references."""
    cases = []
    for mask, reference in zip(masks, truth):
        labels = np.unique(reference[reference > 0])
        cases.append(np.mean([2 * ((mask == v) & (reference == v)).sum() / ((mask == v).sum() + (reference == v).sum())
                              for v in labels]))  # fmt: skip
    return float(np.mean(cases))


def _stock(model: Path, images: Path, output: Path, options: dict[str, Any], workers: int) -> None:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=options["step_size"],
        use_mirroring=options["mirroring"],
        device=torch.device(options["device"]),
        allow_tqdm=False,
    )
    os.environ.setdefault("nnUNet_extTrainer", str(PLUGIN_FOLDER))  # where stock finds the trainer of our models
    predictor.initialize_from_trained_model_folder(str(model), options["folds"])
    predictor.predict_from_files(
        str(images), str(output), num_processes_preprocessing=workers, num_processes_segmentation_export=workers
    )


def _private_bytes(process: int) -> int:
    """Private memory of a process and all its descendants (Linux)."""
    total = 0
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private"))
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            total += sum(_private_bytes(int(child)) for child in children.read_text().split())
    return total


def _synthetic(place: Path, num_cases: int) -> tuple[Path, Path]:
    plans = tiny_plans(spacing=(1.5, 1.2, 1.2), patch_size=(32, 32, 32))
    model = save_model(place / "model", plans, dataset_json(), mirror_axes=(0, 1, 2))
    images = place / "images"
    images.mkdir()
    for seed in range(num_cases):
        write_scan(images / f"case{seed}_0000.nii.gz", seed, (80, 70, 60))
    return model, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--images", type=Path, help="folder with <case>_0000 files")
    parser.add_argument("--cases", type=int, default=6, help="number of synthetic scans")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="stock's processes for each of its two pools")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--step-size", type=float, default=0.5)
    parser.add_argument("--no-mirroring", action="store_true")
    parser.add_argument("--fast", action="store_true", help="ours without mirroring and in bf16, stock as ever")
    parser.add_argument("--labels", type=Path, help="folder of reference masks")
    arguments = parser.parse_args()
    options = {
        "step_size": arguments.step_size,
        "mirroring": not arguments.no_mirroring,
        "device": arguments.device,
        "fast": arguments.fast,
    }
    with tempfile.TemporaryDirectory() as place:
        model, images = arguments.model, arguments.images
        if model is None or images is None:
            model, images = _synthetic(Path(place), arguments.cases)
        result = compare(model, images, arguments.rounds, options, arguments.workers, arguments.labels)
    result["load_average"] = os.getloadavg()
    result["threads"] = torch.get_num_threads()
    result["versions"] = {name: version(name) for name in ("mfm_nnunet", "nnunetv2", "torch")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
