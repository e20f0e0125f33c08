"""What reading costs: nnU-Net's reader alone, the gate in this process, the gate in a child, and an earlier version.

Every side reads the same real scans in a process of its own, in turn (A B C D, A B C D ...), after one round that does
not count. The median ratio to the first side that is named is the number to quote, with its range.

    python -m tests.benchmarks.reading --before CHECKOUT --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL_SCANS = 50
SIDES = {"child": "the gate in a child process", "here": "the gate in the same process", "stock": "nnU-Net's reader"}


def main() -> None:
    """Parse the command line, time every kind of file on every side, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("MFM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=data, help="folder of real scans (default: %(default)s)")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="rounds after the first (default: %(default)s)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    sides = {"before": arguments.before} if arguments.before else {}
    sides |= dict.fromkeys(SIDES, ROOT)
    workers = {name: start(name, folder) for name, folder in sides.items()}
    print(
        f"load {os.getloadavg()[0]:.1f}, {arguments.rounds} rounds; ms per file, median; ratio to '{next(iter(sides))}'"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, files in groups(arguments.data, Path(folder)).items():
            compare(name, files, workers, arguments.rounds)
    for process in workers.values():
        process.kill()


def groups(data: Path, folder: Path) -> dict[str, list[Path]]:
    """Files by kind: many small scans, one of middle size, and a large one in several formats."""
    import numpy as np
    import SimpleITK as sitk

    small = sorted((data / "Dataset004_Hippocampus" / "imagesTr").glob("*.nii.gz"))[:SMALL_SCANS]
    middle = sorted((data / "Dataset052_STSCT" / "imagesTr").glob("*.nii.gz"), key=lambda file: file.stat().st_size)[-1]
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(middle)))
    large = sitk.GetImageFromArray(np.tile(voxels, (2, 2, 2)))
    result = {f"{len(small)} hippocampus scans, .nii.gz": small, f"CT {voxels.shape}, .nii.gz": [middle]}
    for ending in (".nii.gz", ".nii", ".nrrd", ".mha"):
        file = folder / f"large_0000{ending}"
        sitk.WriteImage(large, str(file), ending == ".nrrd")
        result[f"CT {large.GetSize()[::-1]}, {ending}"] = [file]
    return result


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    """Start a process that reads files with the version in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, __file__, "--worker", "child" if name == "before" else name]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def compare(name: str, files: list[Path], workers: dict[str, subprocess.Popen[str]], rounds: int) -> None:
    """Time a group of files on all sides in turn and print a row each."""
    times: dict[str, list[float]] = {side: [] for side in workers}
    for number in range(rounds + 1):
        for side, process in workers.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(file) for file in files]) + "\n")
            process.stdin.flush()
            seconds = float(process.stdout.readline())
            if number:
                times[side].append(seconds / len(files) * 1000)
    first = next(iter(times.values()))
    print(name)
    for side, values in times.items():
        ratios = [value / base for value, base in zip(values, first)]
        middle, spread = statistics.median(ratios), f"{min(ratios):.2f} to {max(ratios):.2f}"
        label = SIDES.get(side, "an earlier version")
        print(f"  {side:7} {statistics.median(values):9.3f} ms   {middle:.2f} ({spread})   {label}", flush=True)


def work(side: str) -> None:
    """Read the files of each line of stdin; print the seconds that it took."""
    read = reading(side)
    for line in sys.stdin:
        files = [Path(file) for file in json.loads(line)]
        begin = time.perf_counter()
        for file in files:
            read(file)
        print(time.perf_counter() - begin, flush=True)


def reading(side: str) -> Callable[[Path], Any]:
    """The function with which a side reads a file."""
    from mfm_nnunet.images.reading import read_image, reader_for

    if side == "child":
        return lambda file: read_image([file], reader_for(file))
    from mfm_nnunet.images.decode import decode_file, find_reader_class

    if side == "here":
        return lambda file: decode_file(file, reader_for(file))
    return lambda file: find_reader_class(reader_for(file))().read_images((str(file),))


if __name__ == "__main__":
    main()
